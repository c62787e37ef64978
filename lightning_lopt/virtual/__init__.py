"""K workers in one process, which take turns in one module."""

from lightning_lopt.virtual.rounds import VirtualRounds
from lightning_lopt.virtual.shared_module import SharedModule

__all__ = ["SharedModule", "VirtualRounds"]
