"""Meta-training of the learned optimizer, and of the controller of the blended step."""

from lightning_lopt.meta.base import AbstractTask, DataTask
from lightning_lopt.meta.callbacks import Exporting
from lightning_lopt.meta.controller_training import ControllerTraining
from lightning_lopt.meta.evaluation import Evaluation
from lightning_lopt.meta.export import Export
from lightning_lopt.meta.lightning_task import LightningTask
from lightning_lopt.meta.local import LocalOptimizer, LocalTraining
from lightning_lopt.meta.models import image_conv, image_vit, language_model
from lightning_lopt.meta.module import MetaTraining
from lightning_lopt.meta.module_task import ModuleTask
from lightning_lopt.meta.simulation import Simulation
from lightning_lopt.meta.tasks import ImageMLP
from lightning_lopt.meta.truncation import LogUniform
from lightning_lopt.meta.whole_unrolls import Horizons
from lightning_lopt.meta.worker_inputs import with_worker_inputs

__all__ = [
    "AbstractTask",
    "ControllerTraining",
    "DataTask",
    "Evaluation",
    "Export",
    "Exporting",
    "Horizons",
    "ImageMLP",
    "LightningTask",
    "LocalOptimizer",
    "LocalTraining",
    "LogUniform",
    "MetaTraining",
    "ModuleTask",
    "Simulation",
    "image_conv",
    "image_vit",
    "language_model",
    "with_worker_inputs",
]
