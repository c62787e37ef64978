"""Workers of several ranks: 4 processes as 2 x 2."""

from __future__ import annotations

from functools import partial

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_lopt import (
    AdaMLP,
    LearnedLocalSGD,
    LearnedOptimizer,
    LocalSGD,
    PowerSGD,
    RoundMonitor,
    Rounds,
    SlowMo,
    SlowMomentum,
    SyncOptions,
    TopK,
)
from lightning_lopt.comm import Communicator
from tests.processes import run_cases, run_workers
from tests.strategies.support import Classifier, flat, loader, trainer

STRATEGIES = {
    "local_sgd": partial(LocalSGD),
    "loscar": partial(LocalSGD, density=0.5, overlap_steps=2),
    "lagg": partial(LearnedLocalSGD, network=AdaMLP(2, seed=0), sharded=True),
    "int8": partial(SlowMo, compression="int8"),
}


class _Regression(pl.LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2))

    def training_step(self, batch, batch_idx):
        return (self.net(batch[0]) - batch[1]).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def _regression(rank, name, ranks_per_worker):
    """Each worker sees the same rows, split among its ranks."""
    x = torch.randn(10, 4, 3, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    mine = x[:, rank] if ranks_per_worker == 2 else x[:, 2 * rank : 2 * rank + 2].flatten(1, 2)
    strategy = STRATEGIES[name](local_steps=4, ranks_per_worker=ranks_per_worker)
    run = trainer(
        strategy, devices=2 * ranks_per_worker, max_epochs=1, precision="64-true", use_distributed_sampler=False
    )
    module = _Regression()
    run.fit(module, DataLoader(TensorDataset(mine, mine[..., :2]), batch_size=None))
    return flat(module), strategy.rounds.round_idx, strategy.rounds.comm.num_workers


@pytest.mark.parametrize("name", STRATEGIES)
def test_two_ranks_with_half_the_rows_each_are_one_with_all(name):
    pairs = run_workers(_regression, 4, name, 2, connect=False)
    singles = run_workers(_regression, 2, name, 1, connect=False)
    for rank, (weights, rounds, num_workers) in enumerate(pairs):
        torch.testing.assert_close(weights, singles[rank // 2][0], rtol=0, atol=1e-5 if name == "int8" else 1e-12)
        assert (rounds, num_workers) == (3, 2)


def _resumed(rank, folder, ckpt):
    strategy = SlowMo(local_steps=4, ranks_per_worker="node" if ckpt == "node" else 2)
    checkpoint = ModelCheckpoint(dirpath=folder, save_top_k=-1, filename="{step}", every_n_train_steps=3)
    callbacks = [RoundMonitor(), checkpoint]
    run = trainer(strategy, devices=4, max_epochs=2, callbacks=callbacks, enable_checkpointing=True)
    module = Classifier(seed=0)
    run.fit(module, loader(), loader(24, shuffle=False), ckpt_path=None if ckpt == "node" else ckpt)
    return flat(module), strategy.rounds.comm.num_workers


def test_resume_in_mid_round(tmp_path):
    whole = run_workers(_resumed, 4, str(tmp_path), None, connect=False)
    resumed = run_workers(_resumed, 4, str(tmp_path / "again"), str(tmp_path / "step=6.ckpt"), connect=False)
    for a, b in zip(whole, resumed, strict=True):
        assert torch.equal(a[0], b[0])
        assert torch.equal(a[0], whole[0][0])


def test_a_node_is_a_worker(tmp_path):
    assert [workers for _, workers in run_workers(_resumed, 4, str(tmp_path), "node", connect=False)] == [1] * 4


@pytest.mark.parametrize("ranks", [0, 2.5, "rack"])
def test_wrong_arguments(ranks):
    with pytest.raises(ValueError, match="ranks_per_worker must be"):
        LocalSGD(ranks_per_worker=ranks)


def test_ranks_that_do_not_divide_are_refused_before_any_process_starts():
    with pytest.raises(ValueError, match="4 processes cannot be workers of 3 ranks each"):
        trainer(LocalSGD(ranks_per_worker=3), devices=4)


def _other_ranks(rank, ranks_per_worker, folder, ckpt_path):
    saving = ModelCheckpoint(folder, "{step}", every_n_train_steps=1, save_top_k=-1)
    run = trainer(
        SlowMo(4, ranks_per_worker=ranks_per_worker), 4, max_epochs=2, enable_checkpointing=True, callbacks=[saving]
    )
    module, seen = Classifier(seed=0), []

    class Look(pl.Callback):
        def on_train_batch_end(self, trainer, module, *_):
            seen.append(torch.cat([p.detach().flatten() for p in module.parameters()]))

    run.callbacks.append(Look())
    run.fit(module, loader(96), ckpt_path=ckpt_path)
    return seen[0]


def test_single_ranks_become_workers_of_two(tmp_path):
    """As many processes as before; those of a worker must hold the same weights all the time."""
    run_workers(_other_ranks, 4, 1, str(tmp_path / "a"), None, connect=False)
    path = tmp_path / "a" / "step=6.ckpt"  # the round has 4 steps
    weights = run_workers(_other_ranks, 4, 2, str(tmp_path / "b"), str(path), connect=False)
    assert torch.equal(weights[0], weights[1])
    assert torch.equal(weights[2], weights[3])
    assert not torch.equal(weights[0], weights[2])


LAGG = partial(LearnedOptimizer, network=AdaMLP(2, seed=0))
SENT = {  # outer optimizer and options, of all that is sent in different ways
    "mean": (None, {}),
    "momentum": (SlowMomentum, {}),
    "learned": (LearnedOptimizer, {}),
    "every worker's": (LAGG, {}),
    "sharded": (LearnedOptimizer, {"sharded": True}),
    "every worker's, sharded": (LAGG, {"sharded": True}),
    "coordinates": (None, {"density": 0.5}),
    "int8": (LearnedOptimizer, {"compression": "int8"}),
    "top-k": (SlowMomentum, {"compression": TopK(0.3)}),
    "every worker's, int8": (LAGG, {"compression": "int8"}),
    "factors": (None, {"compression": PowerSGD(4)}),
    "average": (None, {"local_state": "average"}),
}


def _bytes_of_a_sync(rank, name, ranks_per_worker):
    """Bytes that this rank sends in the second sync, and the weights after it."""
    outer, options = SENT[name]
    comm = Communicator(ranks_per_worker=ranks_per_worker)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(61, 101), nn.Linear(101, 41, bias=False))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    rounds = Rounds(model, optimizer, 1, outer, comm=comm, options=SyncOptions(**options))
    for step in range(2):
        torch.manual_seed(100 * step + comm.rank)
        for p in model.parameters():
            p.grad = torch.randn(p.shape)
        optimizer.step()
        rounds.step()
    return rounds.last_report.bytes_sent, flat(model)


def test_each_rank_of_a_worker_sends_its_share():
    """Whatever the outer step and the options; the weights are bitwise those of workers of one rank."""
    pairs = run_cases(_bytes_of_a_sync, 4, {name: (name, 2) for name in SENT})
    singles = run_cases(_bytes_of_a_sync, 2, {name: (name, 1) for name in SENT})
    for name, of_ranks in pairs.items():
        for rank, (sent, weights) in enumerate(of_ranks):
            (all_sent, expected), messages = singles[name][rank // 2], 600
            assert abs(sent - all_sent / 2) < messages, (name, rank, sent, all_sent)
            assert torch.equal(weights, expected), name
