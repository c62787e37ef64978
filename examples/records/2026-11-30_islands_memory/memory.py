"""Bytes that a rank holds for the rounds, in addition to its model and local optimizer: sums of storages, no estimates.

    python examples/records/2026-11-30_islands_memory/memory.py

Every tensor that Python can reach in the process is counted once by its storage: before `Rounds` is made, after three
rounds, and at the highest point within the syncs that is seen at the ends of the functions in `SEEN`.
"""

import argparse
import gc
import os
import socket
from functools import partial

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.functional import cross_entropy

from lightning_lopt import LearnedOptimizer, Rounds, SyncOptions
from lightning_lopt.comm import Communicator
from lightning_lopt.functional.balance import least_loaded
from lightning_lopt.islands import WholeTensors
from lightning_lopt.sync.exchange import Exchange
from lightning_lopt.sync.flat import FlatBuffer
from lightning_lopt.sync.outer_step import OuterStep
from lightning_lopt.sync.sharding import Shards

WORKERS, VOCABULARY, LOCAL_STEPS = 2, 256, 2
SEEN = [
    (WholeTensors, "_exchange"),
    (FlatBuffer, "fill"),
    (Exchange, "launch"),
    (OuterStep, "step"),
    (Shards, "reduce_scatter"),
    (Shards, "all_gather"),
]
DILOCO = partial(torch.optim.SGD, lr=0.7, momentum=0.9, nesterov=True)
METHODS = {
    "mean": (None, {}, 0),
    "DiLoCo": (DILOCO, {}, 4),
    "DiLoCo, `sharded=True`": (DILOCO, {"sharded": True}, 4),
    "learned": (LearnedOptimizer, {}, None),
    "learned, `sharded=True`": (LearnedOptimizer, {"sharded": True}, None),
}


class GPT(nn.Module):
    """Embedding, blocks of attention's and MLPs' matrices, and a head that is tied."""

    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(VOCABULARY, width)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.LayerNorm(width),
                nn.Linear(width, 3 * width),
                nn.Linear(3 * width, width),
                nn.Linear(width, 4 * width),
                nn.GELU(),
                nn.Linear(4 * width, width),
            )
            for _ in range(depth)
        )

    def forward(self, tokens):
        x = self.embed(tokens)
        for block in self.blocks:
            x = x + block(x)
        return x @ self.embed.weight.T


def held() -> int:
    """Bytes of all storages that Python can reach."""
    gc.collect()
    storages = {}
    for thing in gc.get_objects():  # but for those that `gc.freeze` has set aside
        if issubclass(type(thing), torch.Tensor) and type(thing).__name__ != "DTensor" and thing.device.type == "cpu":
            storage = thing.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def watch(peak: list[int]) -> None:
    """Look at the bytes held whenever one of `SEEN` ends, while its local tensors are alive."""
    for owner, name in SEEN:
        function = getattr(owner, name)

        def wrapper(*args, function=function, **options):
            result = function(*args, **options)
            peak[0] = max(peak[0], held())
            return result

        setattr(owner, name, wrapper)


def measure(rank: int, ranks: int, width: int, depth: int, method: str, port: int, queue) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), GLOO_SOCKET_IFNAME="lo")
    torch.set_num_threads(1)
    gc.freeze()  # modules and all else that was there before
    dist.init_process_group("gloo", rank=rank, world_size=WORKERS * ranks)
    outer, options, _ = METHODS[method]
    model = GPT(width, depth)
    if ranks > 1:
        mesh = init_device_mesh("cpu", (WORKERS, ranks), mesh_dim_names=("worker", "shard"))["shard"]
        for block in model.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    generator = torch.Generator().manual_seed(rank)

    def step():
        tokens = torch.randint(VOCABULARY, (4, 17), generator=generator)
        cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()

    step()  # makes the local optimizer's states
    if ranks > 1:
        model.reshard()
    before, peak = held(), [0]
    rounds = Rounds(
        model,
        optimizer,
        LOCAL_STEPS,
        outer,
        options=SyncOptions(**options),
        comm=Communicator(ranks_per_worker=ranks, by_column=ranks > 1),
    )
    watch(peak)
    for _ in range(3 * LOCAL_STEPS):
        step()
        rounds.step()
    everybody = [None] * dist.get_world_size()
    dist.all_gather_object(everybody, (before, held() - before, peak[0] - before))
    if rank == 0:
        queue.put(everybody)
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--depth", type=int, default=4)
    args = parser.parse_args()
    sizes = [p.numel() for p in GPT(args.width, args.depth).parameters()]
    total = sum(sizes)
    print(f"{total} parameters, the largest tensor {max(sizes) / total:.3f} of them; {WORKERS} workers")
    print("| outer step | R | model and AdamW | between syncs | expected | in a sync |\n|---|---|---|---|---|---|")
    context = mp.get_context("fork")
    learned = None
    for method, (_, options, state) in METHODS.items():
        for ranks in (1, 2, 4):
            with socket.socket() as sock:
                sock.bind(("127.0.0.1", 0))
                port = sock.getsockname()[1]
            queue = context.SimpleQueue()
            arguments = (ranks, args.width, args.depth, method, port, queue)
            processes = [context.Process(target=measure, args=(r, *arguments)) for r in range(WORKERS * ranks)]
            for process in processes:
                process.start()
            everybody = queue.get()
            for process in processes:
                process.join()
            before, between, peak = (max(column) / total for column in zip(*everybody, strict=True))
            if state is None:
                if method == "learned" and ranks == 1:
                    learned = between - 4  # measured: the state of the network and its Gram matrices
                state_bytes, copy = learned, 4 if ranks > 1 else 0
                loads = [0] * ranks
                for size, owner in zip(sizes, least_loaded(sizes, [0] * ranks), strict=True):
                    loads[owner] += size
                share = max(loads) / total
            else:
                state_bytes, copy, share = state, 0, 1 / ranks
            workers = WORKERS if options.get("sharded") else 1
            expected = share * (4 + copy + state_bytes / workers)
            print(f"| {method} | {ranks} | {before:.2f} | {between:.2f} | {expected:.2f} | {peak:.2f} |", flush=True)


if __name__ == "__main__":
    main()
