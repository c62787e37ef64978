"""Time the mean of int8 codes, and its two collectives alone, on a link; started by `run_linked`, see the README."""

import time
from collections.abc import Callable

import torch
import torch.distributed as dist

from lightning_lopt.comm import Communicator
from lightning_lopt.compression import Int8
from lightning_lopt.sync.compressed import compressed_mean

PARAMETERS = 5_373_514


def main() -> None:
    """Time each twice at once, and twice after a pause of three seconds."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    comm = Communicator()
    values, share = torch.randn(PARAMETERS), PARAMETERS // comm.num_workers
    code = torch.zeros(share * comm.num_workers, dtype=torch.uint8)
    runs: dict[str, Callable[[], object]] = {
        "mean": lambda: compressed_mean(comm, values, [PARAMETERS], Int8()),
        "all-to-all": lambda: comm.all_to_all(code, *[[share] * comm.num_workers] * 2),
        "all-gather": lambda: comm.gather(code[:share]),
    }
    for pause in (0, 3, 0, 3):
        for name, run in runs.items():
            dist.barrier()
            time.sleep(pause)
            dist.barrier()
            start = time.perf_counter()
            run()
            if comm.rank == 0:
                print(f"{name} after {pause} s: {time.perf_counter() - start:.3f} s", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
