"""Tasks to meta-train on: many replicas of a small model, trained side by side."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional as F
from typing_extensions import override

from lightning_lopt.functional.integers import as_integer
from lightning_lopt.meta.base import CLIP, Batch, DataTask, Tensors


class ImageMLP(DataTask):
    r"""Classification of images held in memory, by a ReLU MLP with softmax cross-entropy.

    Args:
        images: Images [N, *pixels], N >= 1; uint8 (divided by 255) or floating (taken as they are).
        labels: Labels, integers in [0, num_classes), [N].
        hidden: Widths of the hidden layers.
        batch_size: Number of images per local step of one worker, in [1, N].
        size: Side in pixels to which [N, height, width] or [N, channels, height, width] are resized by area.
        num_classes: Number of classes; default: the largest label plus 1.
        num_validation: Number of images held out for validation batches; 0, or in [batch_size, N - batch_size].

    Shape:
        Parameters of R replicas: ``layers.{i}.weight`` [R, out, in], ``layers.{i}.bias`` [R, out].

    Raises:
        ValueError: There is no data, or the arguments do not fit it.

    Example:
        >>> task = ImageMLP(torch.rand(50, 8, 8), torch.arange(50) % 5, hidden=(16,), batch_size=10)
        >>> task
        ImageMLP(50 images, 64-16-5, batch_size=10)
        >>> params = task.init(3, torch.Generator().manual_seed(0))
        >>> params["layers.0.weight"].shape
        torch.Size([3, 16, 64])
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        hidden: Sequence[int] = (128, 128),
        batch_size: int = 128,
        size: int | None = None,
        num_classes: int | None = None,
        num_validation: int = 0,
    ) -> None:
        images, labels = torch.as_tensor(images), torch.as_tensor(labels).long()
        check_images(images, labels, num_classes)
        if not isinstance(hidden, Sequence) or any(as_integer(width, least=1) is None for width in hidden):
            raise ValueError(f"hidden must be widths of layers, integers >= 1, not {hidden!r}.")
        pixels = images.float() / 255 if images.dtype == torch.uint8 else images
        if size is not None:
            pixels = resize(pixels, size)
        super().__init__((pixels.flatten(1), labels), batch_size, num_validation)
        self.num_classes = int(labels.max()) + 1 if num_classes is None else num_classes
        self.sizes = (self.images.shape[1], *hidden, self.num_classes)

    def __repr__(self) -> str:
        return f"ImageMLP({len(self.images)} images, {'-'.join(map(str, self.sizes))}, batch_size={self.batch_size})"

    @property
    def images(self) -> Tensor:
        """Images [N, pixels], shuffled."""
        return self.data[0]

    @property
    def labels(self) -> Tensor:
        """Labels [N], in the order of the images."""
        return self.data[1]

    @property
    @override
    def dtype(self) -> torch.dtype:
        return self.images.dtype

    @property
    @override
    def max_loss(self) -> float:
        return CLIP * math.log(self.num_classes)

    @override
    def init(self, num_replicas: int, generator: torch.Generator) -> Tensors:
        """Draw new parameters {[R, *S]}: weights normal with std 1/sqrt(fan in), biases 0."""
        params = {}
        for i, (fan_in, fan_out) in enumerate(pairwise(self.sizes)):
            weight = torch.randn(num_replicas, fan_out, fan_in, generator=generator) * fan_in**-0.5
            params[f"layers.{i}.weight"] = weight.to(self.images)
            params[f"layers.{i}.bias"] = self.images.new_zeros(num_replicas, fan_out)
        return params

    def _forward(self, params: Tensors, images: Tensor) -> tuple[list[Tensor], Tensor]:
        """Compute the input of every layer, [R, B, in], and the logits, [R, classes, B] (for a faster softmax)."""
        *hidden, last = [(params[f"layers.{i}.weight"], params[f"layers.{i}.bias"]) for i in range(len(self.sizes) - 1)]
        inputs = [images]
        for weight, bias in hidden:
            inputs.append(torch.baddbmm(bias.unsqueeze(1), inputs[-1], weight.mT).relu_())
        return inputs, torch.baddbmm(last[1].unsqueeze(2), last[0], inputs[-1].mT)

    @override
    def loss(self, params: Tensors, batch: Batch) -> Tensor:
        """Compute the mean cross-entropy of each replica in nats: {[R, *S]}, ([R, B, pixels], [R, B]) to [R]."""
        images, labels = batch
        return F.cross_entropy(self._forward(params, images)[1], labels, reduction="none").mean(1)

    @override
    @torch.no_grad()
    def loss_and_grad(self, params: Tensors, batch: Batch) -> tuple[Tensor, Tensors]:
        loss, layers = self._backward(params, batch, params["layers.0.bias"].new_ones(()))
        grads = {}
        for i, error, inputs in layers:
            grads[f"layers.{i}.weight"] = error.mT @ inputs
            grads[f"layers.{i}.bias"] = error.sum(1)
        return loss, {name: grads[name] for name in params}

    @override
    @torch.no_grad()
    def sgd_step(self, params: Tensors, batch: Batch, local_lr: Tensor) -> Tensor:
        # The descent direction -γ dℓ/dz flows back, so that each product with it is an update.
        loss, layers = self._backward(params, batch, -local_lr)
        for i, descent, inputs in layers:
            params[f"layers.{i}.weight"].baddbmm_(descent.mT, inputs)
            params[f"layers.{i}.bias"] += descent.sum(1)
        return loss

    def _backward(
        self, params: Tensors, batch: Batch, factor: Tensor
    ) -> tuple[Tensor, Iterator[tuple[int, Tensor, Tensor]]]:
        """Compute the loss [R]; and from the last layer to the first: its index, factor · dℓ/dz [R, B, out], its input.

        A layer's parameters may be changed once it has been given.
        """
        images, labels = batch
        inputs, logits = self._forward(params, images)
        log_probs = logits.log_softmax(1)
        target = labels.unsqueeze(1)
        loss = -log_probs.gather(1, target).mean((1, 2))
        error = log_probs.exp_().scatter_add_(1, target, torch.full_like(log_probs[:, :1], -1))
        error = error.mul_((factor / labels.shape[1]).view(-1, 1, 1)).mT

        def layers(error: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
            for i in reversed(range(len(inputs))):
                below = error
                if i:
                    below = torch.ops.aten.threshold_backward(error @ params[f"layers.{i}.weight"], inputs[i], 0)
                yield i, error, inputs[i]
                error = below

        return loss, layers(error)


def check_images(images: Tensor, labels: Tensor, num_classes: int | None) -> None:
    """Raise a ValueError that names what is wrong with the data."""
    if images.dim() < 2 or len(images) == 0:
        raise ValueError(f"images must be [N, *pixels] with N >= 1; these have shape {tuple(images.shape)}.")
    if labels.shape != images.shape[:1]:
        raise ValueError(f"There must be one label per image: {tuple(labels.shape)} for {len(images)} images.")
    if not (images.dtype == torch.uint8 or images.is_floating_point()):
        raise ValueError(f"images must be uint8 or floating, not {images.dtype}.")
    if not torch.isfinite(images).all():
        raise ValueError("images hold values that are not finite; clean the data first.")
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or (num_classes is not None and high >= num_classes):
        raise ValueError(f"labels must lie in [0, num_classes); they run from {low} to {high} ({num_classes=}).")


def resize(images: Tensor, size: int) -> Tensor:
    """Resize images [N, (channels,) height, width] by area to [N, channels, size, size]."""
    if images.dim() not in (3, 4):
        raise ValueError(f"Only [N, (channels,) height, width] can be resized, not shape {tuple(images.shape)}.")
    planes = images if images.dim() == 4 else images.unsqueeze(1)
    return F.interpolate(planes, size=(size, size), mode="area")
