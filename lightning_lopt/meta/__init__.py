"""Meta-training of the learned optimizer."""

from lightning_lopt.meta.module import MetaTraining
from lightning_lopt.meta.tasks import ImageMLP
from lightning_lopt.meta.truncation import LogUniform

__all__ = ["ImageMLP", "LogUniform", "MetaTraining"]
