"""Kill a run with SIGKILL at random moments, resume it each time, and compare with one that was left alone."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import time
from functools import partial
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_lopt import AdaMLP, LearnedLocalSGD, SlowMo
from tests.processes import run_workers
from tests.strategies.support import Classifier, flat, loader, trainer

EPOCHS, NUM_WORKERS = 5, 2
STRATEGIES = {
    "slowmo": partial(SlowMo, 4),
    "learned": partial(LearnedLocalSGD, 5, network=AdaMLP(seed=0)),
}


class Journal(pl.Callback):
    """Every step's loss and round, appended to a file at once."""

    def __init__(self, path: Path) -> None:
        self.file = os.open(path, os.O_CREAT | os.O_APPEND | os.O_WRONLY)

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        step = [trainer.global_step, outputs["loss"].item(), trainer.strategy.rounds.round_idx]
        os.write(self.file, (json.dumps(step) + "\n").encode())


def _train(rank, name, folder):
    pl.seed_everything(11, verbose=False)
    saving = ModelCheckpoint(folder, "{step}", every_n_train_steps=1, save_last=True)
    journal = Journal(Path(folder) / f"steps{rank}.jsonl")
    run = trainer(
        STRATEGIES[name](),
        NUM_WORKERS,
        max_epochs=EPOCHS,
        callbacks=[journal, saving],
        enable_checkpointing=True,
        val_check_interval=0.5,
    )
    module = Classifier(seed=0, dropout=0.3)
    run.fit(module, loader(96), loader(16, shuffle=False), ckpt_path="last")
    torch.save(flat(module), Path(folder) / f"weights{rank}.pt")


def _group(name, folder):
    """The leader of a process group of workers."""
    os.setsid()
    run_workers(_train, NUM_WORKERS, name, folder, connect=False)


def _attempt(name, folder, seconds):
    """Train until the end, or kill all processes after some seconds; whether it came to its end."""
    leader = multiprocessing.get_context("fork").Process(target=_group, args=(name, str(folder)))
    leader.start()
    leader.join(seconds)
    if not leader.is_alive():
        assert leader.exitcode == 0
        return True
    os.killpg(leader.pid, signal.SIGKILL)
    leader.join()
    return False


def _steps(folder, rank):
    """Losses and rounds by step; a step that was repeated after a kill must have been the same."""
    steps = {}
    for line in (folder / f"steps{rank}.jsonl").read_text().splitlines():
        try:
            step, *values = json.loads(line)
        except json.JSONDecodeError:  # killed while writing
            continue
        assert steps.setdefault(step, values) == values, (rank, step)
    return steps


def soak(name: str, folder: Path, kills: int, seed: int) -> dict[str, float]:
    """Kill runs until so many kills have hit, and compare each that comes to its end with one left alone."""
    (folder / "whole").mkdir()
    start = time.monotonic()
    assert _attempt(name, folder / "whole", 120)
    whole_seconds = time.monotonic() - start
    generator = random.Random(seed)
    hits = runs = 0
    while hits < kills:
        folder_k = folder / f"killed{runs}"
        folder_k.mkdir()
        while not _attempt(name, folder_k, generator.uniform(0.1, 0.7) * whole_seconds if hits < kills else 120):
            hits += 1
        runs += 1
        for rank in range(NUM_WORKERS):
            weights = [torch.load(f / f"weights{rank}.pt", weights_only=True) for f in (folder / "whole", folder_k)]
            assert torch.equal(*weights)
            expected = _steps(folder / "whole", rank)
            assert len(expected) == EPOCHS * 12
            assert _steps(folder_k, rank) == expected
    return {"kills": hits, "runs": runs, "steps": runs * EPOCHS * 12, "hours": (time.monotonic() - start) / 3600}


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_killed_run_goes_on_bitwise(name, tmp_path):
    assert soak(name, tmp_path, kills=2, seed=1)["kills"] >= 2


@pytest.mark.soak
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("name", STRATEGIES)
def test_fifty_kills(name, tmp_path, capsys):
    figures = soak(name, tmp_path, kills=50, seed=2)
    with capsys.disabled():
        print(name, figures)
    assert figures["kills"] >= 50
