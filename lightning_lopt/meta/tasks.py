"""Tasks to meta-train on: many replicas of a small model, trained side by side."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional as F

Tensors = dict[str, Tensor]


class ImageMLP:
    r"""Classification of images held in memory, by a ReLU MLP with softmax cross-entropy.

    Args:
        images: [N, *pixels], N >= 1; uint8 (divided by 255) or floating (taken as they are).
        labels: integers in [0, num_classes), [N].
        hidden: widths of the hidden layers.
        batch_size: images per local step of one worker, in [1, N].
        size: side in pixels to which [N, height, width] or [N, channels, height, width] are resized by area.
        num_classes: default: the largest label plus 1.

    Shape:
        Parameters of R replicas: ``layers.{i}.weight`` [R, out, in], ``layers.{i}.bias`` [R, out].

    Raises:
        ValueError: there is no data, or the arguments do not fit it.

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
    ) -> None:
        images, labels = torch.as_tensor(images), torch.as_tensor(labels).long()
        _check_data(images, labels, num_classes)
        if not 1 <= batch_size <= len(images):
            raise ValueError(f"batch_size must lie between 1 and the number of images {len(images)}, not {batch_size}.")
        if any(width < 1 for width in hidden):
            raise ValueError(f"hidden widths must be at least 1, not {tuple(hidden)}.")
        pixels = images.float() / 255 if images.dtype == torch.uint8 else images
        if size is not None:
            pixels = _resize(pixels, size)
        # Shuffled once: a batch is then a window of neighbours, which is far faster to read than scattered rows.
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0)).to(images.device)
        self.images = pixels.flatten(1)[order]
        self.labels = labels.to(images.device)[order]
        self.batch_size = batch_size
        self.num_classes = int(labels.max()) + 1 if num_classes is None else num_classes
        self.sizes = (self.images.shape[1], *hidden, self.num_classes)

    def __repr__(self) -> str:
        return f"ImageMLP({len(self.images)} images, {'-'.join(map(str, self.sizes))}, batch_size={self.batch_size})"

    def to(self, device: torch.device) -> ImageMLP:
        """Move the data, in place."""
        self.images, self.labels = self.images.to(device), self.labels.to(device)
        return self

    def init(self, num_replicas: int, generator: torch.Generator) -> Tensors:
        """New parameters: weights normal with std 1/sqrt(fan in), biases 0; {[R, *S]}."""
        params = {}
        for i, (fan_in, fan_out) in enumerate(pairwise(self.sizes)):
            weight = torch.randn(num_replicas, fan_out, fan_in, generator=generator) * fan_in**-0.5
            params[f"layers.{i}.weight"] = weight.to(self.images)
            params[f"layers.{i}.bias"] = self.images.new_zeros(num_replicas, fan_out)
        return params

    def batch(self, num_replicas: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """A batch of its own for each replica: images [R, batch_size, pixels], labels [R, batch_size]."""
        starts = torch.randint(len(self.images) - self.batch_size + 1, (num_replicas,), generator=generator)
        starts = starts.to(self.images.device)
        return self._windows(self.images, starts), self._windows(self.labels, starts)

    def _windows(self, array: Tensor, starts: Tensor) -> Tensor:
        """Runs of batch_size neighbours: [N, *S], [R] -> [R, batch_size, *S]."""
        size = (len(array) - self.batch_size + 1, self.batch_size, *array.shape[1:])
        return array.as_strided(size, (array.stride(0), *array.stride())).index_select(0, starts)

    def _forward(self, params: Tensors, images: Tensor) -> tuple[list[Tensor], Tensor]:
        """The input of every layer, [R, B, in], and the logits, [R, classes, B] (a softmax over rows is far faster)."""
        *hidden, last = [(params[f"layers.{i}.weight"], params[f"layers.{i}.bias"]) for i in range(len(self.sizes) - 1)]
        inputs = [images]
        for weight, bias in hidden:
            inputs.append(torch.baddbmm(bias.unsqueeze(1), inputs[-1], weight.mT).relu_())
        return inputs, torch.baddbmm(last[1].unsqueeze(2), last[0], inputs[-1].mT)

    def loss(self, params: Tensors, images: Tensor, labels: Tensor) -> Tensor:
        """Mean cross-entropy of each replica in nats: {[R, *S]}, [R, B, pixels], [R, B] -> [R]."""
        return F.cross_entropy(self._forward(params, images)[1], labels, reduction="none").mean(1)

    @torch.no_grad()
    def sgd_step(self, params: Tensors, images: Tensor, labels: Tensor, local_lr: Tensor) -> Tensor:
        r"""One SGD step of every replica, in place, with the backward pass written out.

        .. math:: x \leftarrow x - \gamma \nabla \ell(x)

        Args:
            params: {[R, *S]}, changed in place.
            images: [R, B, pixels].
            labels: [R, B].
            local_lr: γ >= 0 of each replica, [R].

        Returns:
            The loss before the step, [R].
        """
        inputs, logits = self._forward(params, images)
        log_probs = logits.log_softmax(1)
        target = labels.unsqueeze(1)
        loss = -log_probs.gather(1, target).mean((1, 2))
        # What flows back is the descent direction -γ dℓ/dz, so that each product with it is an update.
        descent = log_probs.exp_().scatter_add_(1, target, torch.full_like(log_probs[:, :1], -1))
        descent = descent.mul_((-local_lr / labels.shape[1])[:, None, None]).mT
        for i in reversed(range(len(inputs))):
            weight = params[f"layers.{i}.weight"]
            below = torch.ops.aten.threshold_backward(descent @ weight, inputs[i], 0) if i else descent
            weight.baddbmm_(descent.mT, inputs[i])
            params[f"layers.{i}.bias"] += descent.sum(1)
            descent = below
        return loss


def _check_data(images: Tensor, labels: Tensor, num_classes: int | None) -> None:
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


def _resize(images: Tensor, size: int) -> Tensor:
    if images.dim() not in (3, 4):
        raise ValueError(f"Only [N, (channels,) height, width] can be resized, not shape {tuple(images.shape)}.")
    planes = images if images.dim() == 4 else images.unsqueeze(1)
    return F.interpolate(planes, size=(size, size), mode="area")
