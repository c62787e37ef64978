"""Tasks made of any LightningModule and its data."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.data import Dataset, TensorDataset, default_collate
from typing_extensions import override

from lightning_lopt.meta.base import Batch, Tensors
from lightning_lopt.meta.local import BETAS, EPS, MOMENTUM, MUON_MOMENTUM, LocalOptimizer, LocalTraining, OptimizerKind
from lightning_lopt.meta.module_task import ModuleTask

MAX_EXAMPLES = 20_000  # of a data set that are kept in memory
NUM_STEPS = 1_000  # of the Trainer that `configure_optimizers` may ask
PLAIN_SGD = {"dampening": 0, "nesterov": False, "maximize": False}
SIMULATED: list[tuple[type[Optimizer], OptimizerKind, Mapping[str, Any]]] = [
    (SGD, "sgd", {**PLAIN_SGD, "momentum": 0}),
    (SGD, "momentum", {**PLAIN_SGD, "momentum": MOMENTUM}),
    (AdamW, "adamw", {"betas": BETAS, "eps": EPS, "amsgrad": False, "maximize": False}),
    (Adam, "adamw", {"betas": BETAS, "eps": EPS, "amsgrad": False, "maximize": False, "weight_decay": 0}),
]
if hasattr(torch.optim, "Muon"):  # since torch 2.9
    muon = {"momentum": MUON_MOMENTUM, "nesterov": True, "adjust_lr_fn": "match_rms_adamw"}
    SIMULATED.append((torch.optim.Muon, "muon", muon))


class LightningTask(ModuleTask):
    r"""A task made of a LightningModule as it is: to meta-train on a training of one's own.

    .. math:: \ell(x) = \mathrm{module}_x.\mathrm{training\_step}(\text{batch})

    Replicas train side by side through torch.vmap; a module that does not allow it trains one replica after the other.
    The module runs in evaluation mode (dropout does nothing), what it logs is dropped, and its buffers and frozen
    parameters are constants.

    Args:
        make: Function that builds the module with new parameters, from torch's global generator.
        data: Data set of which a `DataLoader` would make the batches, of which at most 20,000 examples are kept as they
            are read now; or a batch of all examples: tensors [N, *] in any nesting.
        batch_size: Number of examples per local step of one worker, in [1, N - num_validation].
        max_loss: Bound > 0 to which losses are clipped, as they are at 0; default: 1.5 times the loss of new
            parameters.
        num_validation: Number of examples held out; 0 or at least batch_size.

    Raises:
        TypeError: The batches hold something else than tensors.
        ValueError: The module optimizes by itself or its step returns no loss; or an error of `ModuleTask`.

    Example:
        >>> class Line(L.LightningModule):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.layer = nn.Linear(3, 1)
        ...     def training_step(self, batch, batch_idx):
        ...         loss = nn.functional.mse_loss(self.layer(batch[0]), batch[1])
        ...         self.log("loss", loss)
        ...         return loss
        ...     def configure_optimizers(self):
        ...         return torch.optim.AdamW(self.parameters(), lr=0.01)
        >>> x = torch.rand(64, 3)
        >>> task = LightningTask(Line, TensorDataset(x, x.sum(1, True)), batch_size=8)
        >>> task
        LightningTask(Line, 64 examples, 4 parameters, batch_size=8)
        >>> task.local_training().local_lr
        0.01
    """

    def __init__(
        self,
        make: Callable[[], L.LightningModule],
        data: Any,
        batch_size: int,
        max_loss: float | None = None,
        num_validation: int = 0,
    ) -> None:
        tensors, self._structure = tree_flatten(_whole_batch(data))
        if not tensors or not all(isinstance(tensor, Tensor) for tensor in tensors):
            raise TypeError(f"The batches must hold tensors, not {[type(tensor).__name__ for tensor in tensors]}.")
        # ModuleTask reads uint8 as fractions of 255, but a training step has its own way with it.
        tensors = [tensor.short() if tensor.dtype == torch.uint8 else tensor for tensor in tensors]
        self._make_module = make
        with torch.random.fork_rng(devices=[]):
            name = type(make()).__name__
        super().__init__(lambda: _TrainingStep(make()), tensors, _no_loss, batch_size, max_loss, num_validation, name)

    def local_training(self, num_workers: int = 2, local_steps: int = 8) -> LocalTraining:
        """Read the optimizer of the workers and its learning rate from the module's `configure_optimizers`.

        The learning rate decays where the module has a scheduler, and is constant where it has none.

        Args:
            num_workers: Number of workers K >= 1.
            local_steps: Number of local steps H >= 1.

        Raises:
            ValueError: The module has several optimizers, or one that simulated workers do not have.
        """
        with torch.random.fork_rng(devices=[]):
            module = self._make_module()
        module.trainer = L.Trainer(
            max_epochs=-1,
            max_steps=NUM_STEPS,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        optimizers, has_scheduler = _optimizers(module.configure_optimizers())
        if len(optimizers) != 1:
            raise ValueError(
                f"{type(module).__name__} has {len(optimizers)} optimizers, but simulated workers have one. "
                f"{_ADVICE.format(kind='adamw')}"
            )
        optimizer, local_lr = simulated(optimizers[0])
        return LocalTraining(num_workers, local_steps, local_lr, float(has_scheduler), optimizer)

    @cached_property
    def _together(self) -> bool:
        """Whether torch.vmap can train the replicas side by side."""
        generator = torch.Generator().manual_seed(0)
        try:
            super().loss_and_grad(self.init(2, generator), self.batch(2, generator))
        except Exception:  # if it is not torch.vmap's, one replica alone will raise it again
            return False
        return True

    @override
    def _single(self, params: Tensors, batch: Batch) -> Tensor:
        whole = tree_unflatten(list(batch), self._structure)
        return functional_call(self._module, (params, self._buffers), (whole,))

    @override
    def loss(self, params: Tensors, batch: Batch) -> Tensor:
        with _for_replicas():
            if self._together:
                return super().loss(params, batch)
            with torch.no_grad():
                return torch.stack([self._single(*each) for each in _replicas(params, batch)])

    @override
    def loss_and_grad(self, params: Tensors, batch: Batch) -> tuple[Tensor, Tensors]:
        with _for_replicas():
            if self._together:
                return super().loss_and_grad(params, batch)
            losses, grads = [], []
            for own, part in _replicas(params, batch):
                leaves = {name: p.detach().requires_grad_() for name, p in own.items()}
                with torch.enable_grad():
                    loss = self._single(leaves, part)
                grads.append(torch.autograd.grad(loss, [*leaves.values()], materialize_grads=True))
                losses.append(loss.detach())
        return torch.stack(losses), {
            name: torch.stack(of_all) for name, of_all in zip(params, zip(*grads, strict=True), strict=True)
        }


class _TrainingStep(nn.Module):
    """The training step of a LightningModule as the forward pass of a module."""

    def __init__(self, module: L.LightningModule) -> None:
        super().__init__()
        if not module.automatic_optimization:
            raise ValueError(
                f"{type(module).__name__} optimizes by itself (automatic_optimization=False), which simulated workers "
                "cannot repeat. Use ModuleTask with its network and loss."
            )
        self.module = module
        module.log = module.log_dict = _log_nothing
        self._num_arguments = len(inspect.signature(module.training_step).parameters)

    def forward(self, batch: Any) -> Tensor:
        result: Any = self.module.training_step(*(batch, 0)[: self._num_arguments])
        loss = result["loss"] if isinstance(result, Mapping) else result
        if not isinstance(loss, Tensor):
            raise ValueError(f"The training step of {type(self.module).__name__} returned {loss!r} instead of a loss.")
        return loss


def simulated(optimizer: Optimizer) -> tuple[LocalOptimizer, float]:
    """Find the simulated optimizer that steps as one of torch.optim, and its learning rate.

    Args:
        optimizer: SGD, with momentum 0.9 or without, AdamW, Adam without weight decay, or Muon with the rates of
            AdamW, otherwise with torch's defaults, and the same for all parameters.

    Raises:
        ValueError: It is another one; the error says what to pass.

    Example:
        >>> simulated(torch.optim.SGD([torch.zeros(1)], lr=0.1, momentum=0.9))
        (LocalOptimizer(kind='momentum', weight_decay=0.0, max_grad_norm=None), 0.1)
    """
    groups = optimizer.param_groups
    rates = [float(max(group.get(key, 0.0) for key in ("lr", "initial_lr", "max_lr"))) for group in groups]
    decays = [float(group.get("weight_decay", 0.0)) for group in groups]
    nearest: OptimizerKind = "sgd" if isinstance(optimizer, SGD) else "adamw"
    for cls, kind, settings in SIMULATED:
        as_it_is = all(group.get(name) == value for name, value in settings.items() for group in groups)
        if type(optimizer) is cls and as_it_is and len({*rates}) == len({*decays}) == 1:
            return LocalOptimizer(kind, decays[0]), rates[0]
    raise ValueError(
        "Simulated workers have SGD, with momentum 0.9 or without, AdamW, or Muon at AdamW's rates, with the "
        f"same settings for all parameters and otherwise torch's defaults, but not {optimizer!r}. "
        f"{_ADVICE.format(kind=nearest)}"
    )


_ADVICE = (
    "Give the nearest yourself, instead of `local_training()`: LocalTraining(num_workers, local_steps, local_lr, "
    "optimizer=LocalOptimizer({kind!r}))."
)


def _optimizers(configured: Any) -> tuple[list[Optimizer], bool]:
    """Optimizers that `configure_optimizers` has returned, and whether there is a scheduler."""
    if configured is None or isinstance(configured, Optimizer):
        return [] if configured is None else [configured], False
    if isinstance(configured, Mapping):
        return [configured["optimizer"]], configured.get("lr_scheduler") is not None
    parts = list(configured)
    if len(parts) == 2 and isinstance(parts[0], Sequence):
        return list(parts[0]), bool(parts[1])
    several = [_optimizers(part) for part in parts]
    return [optimizer for optimizers, _ in several for optimizer in optimizers], any(has for _, has in several)


def _whole_batch(data: Any) -> Any:
    """One batch of all examples, nested as a DataLoader's."""
    if isinstance(data, TensorDataset):
        return list(data.tensors)
    if not isinstance(data, Dataset):
        return data
    count: int = len(data)  # pyright: ignore[reportArgumentType]
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0))[:MAX_EXAMPLES]
    return default_collate([data[index] for index in order.tolist()])


def _replicas(params: Tensors, batch: Batch) -> Iterator[tuple[Tensors, Batch]]:
    """Parameters and batch of each replica."""
    for i in range(len(batch[0])):
        yield {name: p[i] for name, p in params.items()}, tuple(part[i] for part in batch)


@contextmanager
def _for_replicas() -> Iterator[None]:
    """Let attention be written out, which torch.vmap has rules for."""
    with sdpa_kernel(SDPBackend.MATH), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "There is a performance drop")
        yield


def _log_nothing(*arguments: Any, **keywords: Any) -> None:
    """Stand in for `LightningModule.log`, which warns without a Trainer."""


def _no_loss(*arguments: Any) -> Tensor:
    raise AssertionError("A LightningModule has its loss in its training step.")
