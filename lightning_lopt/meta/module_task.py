"""Tasks made of any module, data and loss function, through torch.func."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value, vmap
from torch.utils.data import TensorDataset
from typing_extensions import Self, override

from lightning_lopt.meta.base import CLIP, Batch, DataTask, Tensors

START_REPLICAS = 8  # over which the loss at the start is averaged


class ModuleTask(DataTask):
    r"""A task made of a module, tensors and a loss function: to meta-train on a model of one's own.

    .. math:: \ell(x) = \mathrm{loss}(\mathrm{module}_x(\text{inputs}), \text{targets})

    The module runs in evaluation mode (dropout does nothing); its buffers and frozen parameters are constants.

    Args:
        make: Function that builds the module with new parameters, from torch's global generator.
        data: Tensors or arrays [N, *], or a TensorDataset: the inputs, of the module's floating type or integers, then
            all else that the loss takes. uint8 is read as float, divided by 255.
        loss: Function of (output, *targets), the mean over a batch: a scalar.
        batch_size: Number of examples per local step of one worker, in [1, N - num_validation].
        max_loss: Bound > 0 to which losses are clipped, as they are at 0; default: 1.5 times the loss of new
            parameters.
        num_validation: Number of examples held out; 0 or at least batch_size.
        name: Name in messages and checkpoints; default: that of the module's class.

    Shape:
        Parameters of R replicas: those of the module that are not frozen, by name, [R, *S].

    Raises:
        TypeError: The data is something else.
        ValueError: The data is empty, uneven or of another floating type than the module, an argument out of its range,
            a loss of new parameters that is not positive and finite, or the module keeps running statistics.

    Example:
        >>> x = torch.rand(64, 3)
        >>> task = ModuleTask(lambda: nn.Linear(3, 1), (x, x.sum(1, True)), nn.functional.mse_loss, batch_size=8)
        >>> task
        ModuleTask(Linear, 64 examples, 4 parameters, batch_size=8)
        >>> generator = torch.Generator().manual_seed(0)
        >>> params = task.init(5, generator)
        >>> params["weight"].shape, task.loss(params, task.batch(5, generator)).shape
        (torch.Size([5, 1, 3]), torch.Size([5]))
    """

    def __init__(
        self,
        make: Callable[[], nn.Module],
        data: Sequence[Tensor] | TensorDataset,
        loss: Callable[..., Tensor],
        batch_size: int,
        max_loss: float | None = None,
        num_validation: int = 0,
        name: str | None = None,
    ) -> None:
        super().__init__(data, batch_size, num_validation)
        self._make = make
        self._loss = loss
        self._module = self._new_module(0)
        self._buffers = _constants(self._module)
        self._name = name or type(self._module).__name__
        inputs = self.data[0]
        if inputs.is_floating_point() and inputs.dtype != self.dtype:
            raise ValueError(
                f"The inputs of {self} are {inputs.dtype} but its parameters {self.dtype}. Convert one of them: "
                "NumPy's numbers are float64, for example."
            )
        self._max_loss = self._start_loss() * CLIP if max_loss is None else max_loss
        if not 0 < self._max_loss < math.inf:
            raise ValueError(
                f"Losses of {self} are clipped to [0, max_loss], but max_loss is {self._max_loss}. It must be positive "
                "and finite: check the data, or make the loss positive."
            )

    def __repr__(self) -> str:
        count = sum(p.numel() for p in _trained(self._module).values())
        size = f"{len(self.data[0])} examples, {count} parameters, batch_size={self.batch_size}"
        return f"{type(self).__name__}({self._name}, {size})"

    def _new_module(self, seed: int) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            module = self._make().eval()
        for name, part in module.named_modules():
            if getattr(part, "track_running_stats", False):
                raise ValueError(
                    f"{name} ({type(part).__name__}) keeps running statistics, which replicas cannot share. Use "
                    "track_running_stats=False, or GroupNorm."
                )
        return module.to(self.device)

    def _start_loss(self) -> float:
        generator = torch.Generator().manual_seed(0)
        params = self.init(START_REPLICAS, generator)
        return self.loss(params, self.batch(START_REPLICAS, generator)).mean().item()

    @property
    @override
    def dtype(self) -> torch.dtype:
        return next(self._module.parameters()).dtype

    @property
    @override
    def max_loss(self) -> float:
        return self._max_loss

    @override
    def to(self, device: torch.device) -> Self:
        self._module.to(device)
        self._buffers = _constants(self._module)
        return super().to(device)

    @override
    def init(self, num_replicas: int, generator: torch.Generator) -> Tensors:
        seeds = torch.randint(2**62, (num_replicas,), generator=generator).tolist()
        replicas = [_trained(self._new_module(seed)) for seed in seeds]
        return {name: torch.stack([params[name].detach() for params in replicas]) for name in replicas[0]}

    def _single(self, params: Tensors, batch: Batch) -> Tensor:
        inputs, *targets = batch
        return self._loss(functional_call(self._module, (params, self._buffers), (inputs,)), *targets)

    @override
    def loss(self, params: Tensors, batch: Batch) -> Tensor:
        with torch.no_grad():
            return vmap(self._single)(params, batch)

    @override
    def loss_and_grad(self, params: Tensors, batch: Batch) -> tuple[Tensor, Tensors]:
        grads, loss = vmap(grad_and_value(self._single))(params, batch)
        return loss, grads


def _trained(module: nn.Module) -> Tensors:
    return {name: p for name, p in module.named_parameters() if p.requires_grad}


def _constants(module: nn.Module) -> Tensors:
    frozen = {name: p.detach() for name, p in module.named_parameters() if not p.requires_grad}
    return {**dict(module.named_buffers()), **frozen}
