"""Exports during meta-training, as a callback."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
from typing_extensions import override

from lightning_lopt.meta.module import MetaTraining


class Exporting(L.Callback):
    """Write an `Export` of a `MetaTraining` every so many meta-iterations and at the end, to one file.

    Args:
        path: Path of the file; each export replaces the one before.
        every_n_steps: Number of meta-iterations N >= 1 from one export to the next.
        overwrite: Whether a file that is there before the run may be replaced, too.

    Raises:
        ValueError: An argument out of its range.
        FileExistsError: There is such a file at the start of the run, and not `overwrite`.
    """

    def __init__(self, path: str | Path, every_n_steps: int = 20, overwrite: bool = False) -> None:
        if every_n_steps < 1:
            raise ValueError(f"every_n_steps must be at least 1, not {every_n_steps}.")
        self.path = Path(path)
        self.every_n_steps = every_n_steps
        self.overwrite = overwrite
        self._written: int | None = None

    @override
    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.path.exists() and not self.overwrite:
            raise FileExistsError(f"{self.path} exists already. Choose another name, or overwrite=True.")

    @override
    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step % self.every_n_steps == 0:
            self._write(trainer, pl_module)

    @override
    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._write(trainer, pl_module)

    def _write(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, MetaTraining)
        if trainer.is_global_zero and trainer.global_step not in (0, self._written):
            self._written = trainer.global_step
            self.path.parent.mkdir(parents=True, exist_ok=True)
            pl_module.export().save(self.path, overwrite=True)
