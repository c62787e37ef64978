"""Time the parts of the mean of int8 codes, the first time and later, on a link; started by `run_linked`."""

import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from lightning_lopt.comm import Communicator
from lightning_lopt.compression import Int8
from lightning_lopt.sync.compressed import compressed_mean

PARAMETERS = 5_373_514


def main() -> None:
    """Time a mean at once, two after a pause of eight seconds, and two at once; before them two plain means."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    comm, codec = Communicator(), Int8()
    seconds: defaultdict[str, float] = defaultdict(float)

    def timed(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            start = time.perf_counter()
            result = function(*args)
            seconds[name] += time.perf_counter() - start
            return result

        return run

    comm.all_to_all, comm.gather = timed("all-to-all", comm.all_to_all), timed("all-gather", comm.gather)
    values = torch.randn(PARAMETERS)
    for _ in range(2):
        comm.mean_(torch.zeros(PARAMETERS))
    for pause in (0, 8, 8, 0, 0):
        dist.barrier()
        time.sleep(pause)
        dist.barrier()
        seconds.clear()
        timed("mean", compressed_mean)(comm, values, [PARAMETERS], codec)
        print(f"worker {comm.rank} after {pause} s:", {k: round(v, 3) for k, v in seconds.items()}, flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
