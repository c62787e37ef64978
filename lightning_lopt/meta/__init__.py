"""Meta-training of the learned optimizer."""

from lightning_lopt.meta.local import LocalOptimizer, LocalTraining
from lightning_lopt.meta.module import MetaTraining
from lightning_lopt.meta.tasks import AbstractTask, ImageMLP
from lightning_lopt.meta.truncation import LogUniform

__all__ = ["AbstractTask", "ImageMLP", "LocalOptimizer", "LocalTraining", "LogUniform", "MetaTraining"]
