"""Tasks: replicas of a small model as pure functions of their parameters and data."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.data import TensorDataset
from typing_extensions import Self, override

from lightning_lopt.functional.pes import Tensors

Batch = tuple[Tensor, ...]

CLIP = 1.5  # losses are clipped to this multiple of that of a uniform guess


class AbstractTask(ABC):
    """A task to train on: replicas of a small model, as pure functions of their parameters {[R, *S]} and data.

    A task of one's own defines all that is abstract here. The gradient comes from `loss` through torch.func unless it
    is written out; a step of plain SGD may be fused with it.
    """

    @property
    def validation(self) -> AbstractTask | None:
        """Task of the same model on data that this one never draws; None if there is none."""
        return None

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Device of the data, and of the parameters."""

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype:
        """Type of the parameters."""

    @property
    @abstractmethod
    def max_loss(self) -> float:
        """Bound to which losses are clipped in meta-training; also the loss that a diverged replica counts."""

    @abstractmethod
    def to(self, device: torch.device) -> Self:
        """Move the data, in place."""

    @abstractmethod
    def init(self, num_replicas: int, generator: torch.Generator) -> Tensors:
        """Draw new parameters, {[R, *S]}, from a CPU generator."""

    @abstractmethod
    def draw(self, num_replicas: int, generator: torch.Generator) -> Tensor:
        """Draw the data that a batch of each replica holds, [R, *], on the CPU, from a CPU generator."""

    @abstractmethod
    def read(self, drawn: Tensor) -> Batch:
        """Read the batches that were drawn, each tensor [R, B, *]."""

    def batch(self, num_replicas: int, generator: torch.Generator) -> Batch:
        """Draw and read a batch of its own for each replica, each tensor [R, B, *]."""
        return self.read(self.draw(num_replicas, generator))

    @abstractmethod
    def loss(self, params: Tensors, batch: Batch) -> Tensor:
        """Compute the mean loss of each replica over its batch: {[R, *S]}, tensors [R, B, *] to [R]."""

    def loss_and_grad(self, params: Tensors, batch: Batch) -> tuple[Tensor, Tensors]:
        """Compute the loss of each replica, [R], and its gradient, {[R, *S]}."""

        def total(params: Tensors) -> tuple[Tensor, Tensor]:
            loss = self.loss(params, batch)
            return loss.sum(), loss  # replicas do not see each other: the sum's gradient holds everyone's own

        grads, (_, loss) = torch.func.grad_and_value(total, has_aux=True)(params)
        return loss, grads

    @torch.no_grad()
    def sgd_step(self, params: Tensors, batch: Batch, local_lr: Tensor) -> Tensor:
        r"""Take one SGD step of every replica, in place.

        .. math:: x \leftarrow x - \gamma \nabla \ell(x)

        Args:
            params: Parameters, {[R, *S]}, changed in place.
            batch: Batch of each replica, tensors [R, B, *].
            local_lr: Local learning rate γ >= 0 of each replica, [R].

        Returns:
            Loss before the step, [R].
        """
        loss, grads = self.loss_and_grad(params, batch)
        for name, p in params.items():
            p.sub_(column(local_lr, p) * grads[name])
        return loss


def column(vector: Tensor, like: Tensor) -> Tensor:
    """View one number per replica, [R], as [R, 1, ...] beside [R, *S]."""
    return vector.view(-1, *[1] * (like.dim() - 1))


class DataTask(AbstractTask):
    """A task on tensors in memory, whose batches are windows of neighbours in the shuffled examples.

    Args:
        data: Tensors or arrays [N, *] with N >= 1, or a TensorDataset; uint8 is read as fractions of 255.
        batch_size: Number of examples per local step of one worker, in [1, N - num_validation].
        num_validation: Number of examples held out for `validation`; 0 or at least batch_size.

    Raises:
        TypeError: The data is something else.
        ValueError: There is no data, or the arguments do not fit it.
    """

    def __init__(self, data: Sequence[Tensor] | TensorDataset, batch_size: int, num_validation: int = 0) -> None:
        parts = data.tensors if isinstance(data, TensorDataset) else data
        if not isinstance(parts, Sequence):
            raise TypeError(
                f"data must be a sequence of tensors [N, *] or a TensorDataset, not {type(data).__name__}. Put a "
                "tensor into a tuple; make tensors of a dataset: torch.utils.data.default_collate([*dataset])."
            )
        tensors = [torch.as_tensor(part) for part in parts]
        lengths = {len(tensor) for tensor in tensors}
        if len(lengths) != 1 or 0 in lengths:
            raise ValueError(f"data must be tensors of one length N >= 1, not of {[tuple(t.shape) for t in tensors]}.")
        num_training = lengths.pop() - num_validation
        if not 1 <= batch_size <= num_training:
            raise ValueError(
                f"batch_size must lie between 1 and the number of examples {num_training}, not {batch_size}."
            )
        if num_validation and num_validation < batch_size:
            raise ValueError(f"num_validation must be 0 or at least batch_size={batch_size}, not {num_validation}.")
        # Shuffled once: a batch is then a window of neighbours, which is far faster to read than scattered rows.
        order = torch.randperm(len(tensors[0]), generator=torch.Generator().manual_seed(0)).to(tensors[0].device)
        shuffled = [tensor.to(order.device)[order] for tensor in tensors]
        self.data = [tensor[:num_training] for tensor in shuffled]
        self._held_out = [tensor[num_training:] for tensor in shuffled] if num_validation else []
        self.batch_size = batch_size

    @property
    @override
    def validation(self) -> Self | None:
        return self.on(self._held_out) if self._held_out else None

    def on(self, data: Sequence[Tensor]) -> Self:
        """Copy the task for other data, in the order in which they are."""
        task = copy.copy(self)
        task.data, task._held_out = list(data), []
        return task

    @property
    @override
    def device(self) -> torch.device:
        return self.data[0].device

    @override
    def to(self, device: torch.device) -> Self:
        self.data = [tensor.to(device) for tensor in self.data]
        self._held_out = [tensor.to(device) for tensor in self._held_out]
        return self

    @override
    def draw(self, num_replicas: int, generator: torch.Generator) -> Tensor:
        """Draw the places where windows start, [R]."""
        return torch.randint(len(self.data[0]) - self.batch_size + 1, (num_replicas,), generator=generator)

    @override
    def read(self, drawn: Tensor) -> Batch:
        """Read the windows, each tensor [R, batch_size, *]."""
        return self.windows(drawn, self.batch_size)

    def windows(self, starts: Tensor, length: int) -> Batch:
        """Read runs of neighbouring examples, each tensor [R, length, *]."""
        starts = starts.to(self.device)
        batch = (_windows(tensor, starts, length) for tensor in self.data)
        return tuple(part.to(self.dtype) / 255 if part.dtype == torch.uint8 else part for part in batch)


def _windows(array: Tensor, starts: Tensor, length: int) -> Tensor:
    """Read runs of neighbours: [N, *S], [R] to [R, length, *S]."""
    size = (len(array) - length + 1, length, *array.shape[1:])
    return array.as_strided(size, (array.stride(0), *array.stride()), array.storage_offset()).index_select(0, starts)
