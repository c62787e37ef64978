"""Lightning strategies, registered by name: `Trainer(strategy="learned_local_sgd")`."""

from lightning.pytorch.strategies import StrategyRegistry

from lightning_lopt.strategies.local_sgd import LocalSGD
from lightning_lopt.strategies.presets import LOSCAR, DiLoCo, LearnedLocalSGD, SlowMo

__all__ = ["LOSCAR", "DiLoCo", "LearnedLocalSGD", "LocalSGD", "SlowMo"]

for _strategy in (LocalSGD, SlowMo, DiLoCo, LOSCAR, LearnedLocalSGD):
    _strategy.register_strategies(StrategyRegistry)
