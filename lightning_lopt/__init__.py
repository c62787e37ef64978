"""Communication-efficient training with learned optimizers, as PyTorch Lightning strategies."""

from lightning_lopt.callbacks import BatchNormReestimation, RoundMonitor
from lightning_lopt.comm import DisagreementError
from lightning_lopt.compression import BF16, Codec, Int8, LinearCodec, PowerSGD, Reduction, TopK
from lightning_lopt.controller import Controller
from lightning_lopt.network import AdaMLP
from lightning_lopt.optim import BlendedNesterov, ControlledNesterov, LearnedOptimizer, SlowMomentum
from lightning_lopt.rounds import Rounds
from lightning_lopt.schedules import QSR, Constant, RoundInfo
from lightning_lopt.selection import Fragments, RandomCoordinates, Selection
from lightning_lopt.strategies import LOSCAR, DiLoCo, LearnedLocalSGD, LocalSGD, SlowMo
from lightning_lopt.strategies.errors import CheckpointError, WorkerLostError
from lightning_lopt.sync.options import SyncOptions
from lightning_lopt.sync.report import RoundReport
from lightning_lopt.weights_file import WeightsError

__version__ = "0.2.0"
__all__ = [
    "BF16",
    "LOSCAR",
    "QSR",
    "AdaMLP",
    "BatchNormReestimation",
    "BlendedNesterov",
    "CheckpointError",
    "Codec",
    "Constant",
    "ControlledNesterov",
    "Controller",
    "DiLoCo",
    "DisagreementError",
    "Fragments",
    "Int8",
    "LearnedLocalSGD",
    "LearnedOptimizer",
    "LinearCodec",
    "LocalSGD",
    "PowerSGD",
    "RandomCoordinates",
    "Reduction",
    "RoundInfo",
    "RoundMonitor",
    "RoundReport",
    "Rounds",
    "Selection",
    "SlowMo",
    "SlowMomentum",
    "SyncOptions",
    "TopK",
    "WeightsError",
    "WorkerLostError",
]
