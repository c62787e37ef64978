"""Outer optimizers: ordinary `torch.optim.Optimizer`s whose `p.grad` is the averaged pseudo-gradient."""

from lightning_lopt.optim.learned import LearnedOptimizer
from lightning_lopt.optim.slow_momentum import SlowMomentum

__all__ = ["LearnedOptimizer", "SlowMomentum"]
