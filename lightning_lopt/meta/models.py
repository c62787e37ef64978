"""Small models to meta-train on: a convolutional net, a vision transformer, a language model."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_lopt.meta.base import CLIP
from lightning_lopt.meta.module_task import ModuleTask
from lightning_lopt.meta.tasks import check_images, resize


class Conv(nn.Module):
    """3×3 convolutions with ReLU, the first of stride 2, averaged over the image, and a linear layer.

    Args:
        in_channels: Number of channels of the image.
        channels: Number of channels of each convolution.
        num_classes: Number of outputs.

    Source: the CIFAR-10 task of arXiv 2312.02204, with 32, 64 and 64 channels.
    """

    def __init__(self, in_channels: int, channels: Sequence[int], num_classes: int) -> None:
        super().__init__()
        widths = [in_channels, *channels]
        self.convolutions = nn.ModuleList(
            nn.Conv2d(widths[i], width, 3, stride=1 if i else 2, padding=1) for i, width in enumerate(channels)
        )
        self.head = nn.Linear(widths[-1], num_classes)

    def forward(self, images: Tensor) -> Tensor:
        for convolution in self.convolutions:
            images = convolution(images).relu()
        return self.head(images.mean((-2, -1)))


class Block(nn.Module):
    """A pre-norm transformer block.

    Args:
        width: Width of the residual stream.
        num_heads: Number of heads, which divides it.
        causal: Whether a position sees itself and those before it only.
    """

    def __init__(self, width: int, num_heads: int, causal: bool) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.causal = causal
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        # Written out: the fused kernels have no rule for a batch of models.
        query, key, value = self.qkv(self.norms[0](x)).unflatten(-1, (3, self.num_heads, -1)).unbind(-3)
        scores = torch.einsum("bqhd,bkhd->bhqk", query, key) * query.shape[-1] ** -0.5
        if self.causal:
            later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=x.device).triu(1)
            scores = scores.masked_fill(later, -math.inf)
        x = x + self.out(torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), value).flatten(-2))
        return x + self.mlp(self.norms[1](x))


class VisionTransformer(nn.Module):
    """Patches, learned positions, transformer blocks, and a linear layer on the mean.

    Args:
        shape: Shape of an image, (channels, height, width).
        patch: Side of a patch, which divides height and width.
        width: Width of the residual stream.
        depth: Number of blocks.
        num_heads: Number of heads, which divides width.
        num_classes: Number of outputs.
    """

    def __init__(
        self, shape: tuple[int, int, int], patch: int, width: int, depth: int, num_heads: int, num_classes: int
    ) -> None:
        super().__init__()
        channels, height, side = shape
        self.patch = patch
        self.embed = nn.Linear(channels * patch**2, width)
        self.positions = nn.Parameter(0.02 * torch.randn((height // patch) * (side // patch), width))
        self.blocks = nn.Sequential(*(Block(width, num_heads, causal=False) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        rows = images.unflatten(-2, (-1, self.patch)).unflatten(-1, (-1, self.patch))  # [B, C, rows, p, columns, p]
        patches = rows.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
        x = self.blocks(self.embed(patches) + self.positions)
        return self.head(self.norm(x).mean(1))


class LanguageModel(nn.Module):
    """Token and position embeddings, causal transformer blocks, and a linear layer.

    Args:
        vocabulary: Number of tokens.
        context: Number of positions.
        width: Width of the residual stream.
        depth: Number of blocks.
        num_heads: Number of heads, which divides width.
    """

    def __init__(self, vocabulary: int, context: int, width: int, depth: int, num_heads: int) -> None:
        super().__init__()
        self.tokens = nn.Parameter(0.02 * torch.randn(vocabulary, width))
        self.positions = nn.Parameter(0.02 * torch.randn(context, width))
        self.blocks = nn.Sequential(*(Block(width, num_heads, causal=True) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(self.tokens[tokens] + self.positions)))


def image_conv(
    images: Tensor,
    labels: Tensor,
    channels: Sequence[int] = (32, 64, 64),
    batch_size: int = 128,
    size: int | None = None,
    num_validation: int = 0,
) -> ModuleTask:
    """Create a task of classification by a `Conv`.

    Args:
        images: Images [N, height, width] or [N, channels, height, width], uint8 or floating.
        labels: Labels, [N].
        channels: Number of channels of each convolution.
        batch_size: Number of images per local step of one worker.
        size: Side in pixels to which the images are resized by area.
        num_validation: Number of images held out.

    Example:
        >>> image_conv(torch.rand(50, 8, 8), torch.arange(50) % 5, channels=(4, 8), batch_size=10)
        ModuleTask(Conv, 50 examples, 381 parameters, batch_size=10)
    """
    images, labels, num_classes = _images(images, labels, size)
    return _classification(
        lambda: Conv(images.shape[1], channels, num_classes), images, labels, num_classes, batch_size, num_validation
    )


def image_vit(
    images: Tensor,
    labels: Tensor,
    patch: int = 4,
    width: int = 64,
    depth: int = 2,
    num_heads: int = 4,
    batch_size: int = 128,
    size: int | None = None,
    num_validation: int = 0,
) -> ModuleTask:
    """Create a task of classification by a `VisionTransformer`.

    Args:
        images: Images [N, height, width] or [N, channels, height, width], uint8 or floating.
        labels: Labels, [N].
        patch: Side of a patch, which divides height and width.
        width: Width of the residual stream.
        depth: Number of blocks.
        num_heads: Number of heads, which divides width.
        batch_size: Number of images per local step of one worker.
        size: Side in pixels to which the images are resized by area.
        num_validation: Number of images held out.

    Raises:
        ValueError: A number that does not divide another as it must.

    Example:
        >>> image_vit(torch.rand(50, 8, 8), torch.arange(50) % 5, width=8, depth=1, num_heads=2, batch_size=10)
        ModuleTask(VisionTransformer, 50 examples, 1101 parameters, batch_size=10)
    """
    images, labels, num_classes = _images(images, labels, size)
    shape = (images.shape[1], images.shape[2], images.shape[3])
    if shape[1] % patch or shape[2] % patch:
        raise ValueError(f"Images of {shape[1]}×{shape[2]} pixels cannot be cut into patches of side {patch}.")
    if width % num_heads:
        raise ValueError(f"num_heads={num_heads} must divide width={width}.")
    return _classification(
        lambda: VisionTransformer(shape, patch, width, depth, num_heads, num_classes),
        images,
        labels,
        num_classes,
        batch_size,
        num_validation,
    )


def language_model(
    tokens: Tensor,
    vocabulary: int,
    context: int = 64,
    width: int = 64,
    depth: int = 2,
    num_heads: int = 4,
    batch_size: int = 16,
    num_validation: int = 0,
) -> ModuleTask:
    """Create a task of predicting the next token by a `LanguageModel`, on pieces of a text.

    Args:
        tokens: Text as integers in [0, vocabulary), [N].
        vocabulary: Number of tokens, >= 2.
        context: Number of tokens per piece.
        width: Width of the residual stream.
        depth: Number of blocks.
        num_heads: Number of heads, which divides width.
        batch_size: Number of pieces per local step of one worker.
        num_validation: Number of pieces held out.

    Example:
        >>> language_model(torch.arange(500) % 7, 7, context=9, width=8, depth=1, num_heads=2, batch_size=4)
        ModuleTask(LanguageModel, 55 examples, 1079 parameters, batch_size=4)
    """
    if width % num_heads:
        raise ValueError(f"num_heads={num_heads} must divide width={width}.")
    count = (len(tokens) - 1) // context
    if count < 1 or not 0 <= int(tokens.min()) <= int(tokens.max()) < vocabulary:
        raise ValueError(
            f"tokens must be more than context={context} integers in [0, {vocabulary}); there are {len(tokens)}."
        )
    inputs, targets = (tokens[i : i + count * context].long().view(count, context) for i in (0, 1))
    return ModuleTask(
        lambda: LanguageModel(vocabulary, context, width, depth, num_heads),
        (inputs, targets),
        lambda logits, targets: F.cross_entropy(logits.flatten(0, 1), targets.flatten()),
        batch_size,
        max_loss=CLIP * math.log(vocabulary),
        num_validation=num_validation,
    )


def _images(images: Tensor, labels: Tensor, size: int | None) -> tuple[Tensor, Tensor, int]:
    check_images(images, labels, None)
    if images.dim() not in (3, 4):
        raise ValueError(f"images must be [N, (channels,) height, width], not of shape {tuple(images.shape)}.")
    if images.dim() == 3:
        images = images.unsqueeze(1)
    if size is not None:
        images = resize(images.float() / 255 if images.dtype == torch.uint8 else images, size)
    return images, labels.long(), int(labels.max()) + 1


def _classification(
    make: Callable[[], nn.Module],
    images: Tensor,
    labels: Tensor,
    num_classes: int,
    batch_size: int,
    num_validation: int,
) -> ModuleTask:
    max_loss = CLIP * math.log(num_classes)
    return ModuleTask(make, (images, labels), F.cross_entropy, batch_size, max_loss, num_validation)
