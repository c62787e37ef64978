"""Communication-efficient training with learned optimizers, as PyTorch Lightning strategies."""

from lightning_lopt.network import AdaMLP

__version__ = "0.1.0"
__all__ = ["AdaMLP"]
