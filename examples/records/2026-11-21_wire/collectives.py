"""Time gloo's collectives and this package's all-to-all on a link; started by `run_linked`, see the README."""

import time
from collections.abc import Callable

import torch
import torch.distributed as dist

from lightning_lopt.comm import Communicator


def main() -> None:
    """Time each collective three times for each size."""
    dist.init_process_group("gloo")
    comm = Communicator()
    num_workers = dist.get_world_size()
    for size in (8, 1_000_000, 4_000_000, 21_494_056):
        flat = torch.zeros(max(num_workers, size // 4 // num_workers * num_workers))
        collectives: dict[str, Callable[[torch.Tensor], object]] = {
            "all_reduce": dist.all_reduce,
            "all_to_all": lambda flat: dist.all_to_all_single(torch.empty_like(flat), flat),
            "Communicator.all_to_all": lambda flat: comm.all_to_all(
                flat, *[[len(flat) // num_workers] * num_workers] * 2
            ),
        }
        for name, run in [*collectives.items()] * 3:
            dist.barrier()
            start = time.perf_counter()
            run(flat)
            print(f"worker {dist.get_rank()}: {name} of {size} bytes: {time.perf_counter() - start:.3f} s", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
