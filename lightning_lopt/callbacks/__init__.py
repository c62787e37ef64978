"""Callbacks: a monitor of rounds, and the re-estimation of BatchNorm's statistics for the global weights."""

from lightning_lopt.callbacks.batch_norm import BatchNormReestimation
from lightning_lopt.callbacks.round_monitor import RoundMonitor

__all__ = ["BatchNormReestimation", "RoundMonitor"]
