"""Outer optimizers: ordinary `torch.optim.Optimizer`s whose `p.grad` is the averaged pseudo-gradient."""

from lightning_lopt.optim.blended_nesterov import BlendedNesterov
from lightning_lopt.optim.controlled_nesterov import ControlledNesterov
from lightning_lopt.optim.learned import LearnedOptimizer
from lightning_lopt.optim.slow_momentum import SlowMomentum

__all__ = ["BlendedNesterov", "ControlledNesterov", "LearnedOptimizer", "SlowMomentum"]
