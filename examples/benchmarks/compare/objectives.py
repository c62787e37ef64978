"""Small models with objectives of many kinds, for the held-out tasks."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_lopt.meta import ModuleTask
from lightning_lopt.meta.models import Block


def mlp(*sizes: int) -> nn.Sequential:
    """A ReLU MLP with these widths."""
    layers = [layer for a, b in pairwise(sizes) for layer in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(*layers[:-1])


def regression(sizes: Sequence[int], inputs: Tensor, targets: Tensor, batch_size: int, name: str) -> ModuleTask:
    """A ReLU MLP fits targets [N, n] by mean squared error."""
    return ModuleTask(lambda: mlp(*sizes), (inputs, targets), F.mse_loss, batch_size, name=name)


class TwoTowers(nn.Module):
    """Cosines, times 10, between an embedding of the upper and one of the lower half of each image of a block.

    Args:
        pixels: Number of pixels of a half.
        block: Number of images among which the other half is to be found.
    """

    def __init__(self, pixels: int, block: int) -> None:
        super().__init__()
        self.block = block
        self.towers = nn.ModuleList(mlp(pixels, 64, 32) for _ in range(2))

    def forward(self, images: Tensor) -> Tensor:
        halves = images.flatten(1).chunk(2, 1)
        upper, lower = (F.normalize(tower(half), dim=1) for tower, half in zip(self.towers, halves, strict=True))
        blocks = (part.unflatten(0, (-1, self.block)) for part in (upper, lower))
        return 10 * torch.einsum("nid,njd->nij", *blocks)


def contrastive(images: Tensor, batch_size: int, name: str) -> ModuleTask:
    """Find the lower half of each image [N, height, width] in its batch, by cross-entropy."""

    def loss(logits: Tensor) -> Tensor:
        return -logits.log_softmax(-1).diagonal(dim1=-2, dim2=-1).mean()

    return ModuleTask(lambda: TwoTowers(images[0].numel() // 2, batch_size), (images,), loss, batch_size, name=name)


def diffusion(images: Tensor, width: int, copies: int, batch_size: int, name: str) -> ModuleTask:
    """An MLP finds the noise in noisy images [N, pixels], given its angle t: x = cos(t) image + sin(t) noise."""
    generator = torch.Generator().manual_seed(0)
    pixels = images.shape[1]
    clean = images.repeat(copies, 1)
    noise = torch.randn(clean.shape, generator=generator)
    angle = torch.pi / 2 * torch.rand(len(clean), 1, generator=generator)
    noisy = angle.cos() * clean + angle.sin() * noise
    sizes = (pixels + 1, width, width, pixels)
    return regression(sizes, torch.cat([noisy, angle], 1), noise, batch_size, name)


class Factors(nn.Module):
    """A matrix as biases and the product of two factors; takes positions [B, 2].

    Args:
        shape: Rows and columns of the matrix.
        rank: Width of the factors.
    """

    def __init__(self, shape: tuple[int, int], rank: int) -> None:
        super().__init__()
        self.rows, self.columns = (nn.Parameter(0.3 * torch.randn(size, rank)) for size in shape)
        self.row_biases, self.column_biases = (nn.Parameter(torch.zeros(size)) for size in shape)

    def forward(self, places: Tensor) -> Tensor:
        row, column = places.unbind(-1)
        return (self.rows[row] * self.columns[column]).sum(-1) + self.row_biases[row] + self.column_biases[column]


def factorisation(matrix: Tensor, rank: int, batch_size: int, name: str) -> ModuleTask:
    """Fit `Factors` to the standardised entries of a matrix by mean squared error."""
    rows, columns = matrix.shape
    values = (matrix - matrix.mean()) / matrix.std()
    places = torch.cartesian_prod(torch.arange(rows), torch.arange(columns))
    return ModuleTask(
        lambda: Factors((rows, columns), rank), (places, values.flatten()), F.mse_loss, batch_size, name=name
    )


def distillation(images: Tensor, labels: Tensor, width: int, batch_size: int, name: str) -> ModuleTask:
    """A narrow MLP learns what a wide one, trained here for 600 steps of Adam, says of images [N, pixels]."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        teacher = mlp(images.shape[1], 128, 10)
        optimizer = torch.optim.Adam(teacher.parameters(), lr=3e-3)
        for _ in range(600):
            chosen = torch.randint(len(images), (128,))
            optimizer.zero_grad()
            F.cross_entropy(teacher(images[chosen]), labels[chosen]).backward()
            optimizer.step()
    with torch.no_grad():
        targets = teacher(images).log_softmax(1)

    def loss(logits: Tensor, targets: Tensor) -> Tensor:
        return (targets.exp() * (targets - logits.log_softmax(1))).sum(1).mean()  # kl_div has no batching rule

    return ModuleTask(lambda: mlp(images.shape[1], width, 10), (images, targets), loss, batch_size, name=name)


class Residual(nn.Module):
    """A 3×3 convolution of stride 2, and two residual blocks of two with group norms; the mean; a linear layer."""

    def __init__(self, in_channels: int, width: int, num_classes: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(in_channels, width, 3, stride=2, padding=1)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.GroupNorm(2, width),
                nn.ReLU(),
                nn.Conv2d(width, width, 3, padding=1),
                nn.GroupNorm(2, width),
                nn.ReLU(),
                nn.Conv2d(width, width, 3, padding=1),
            )
            for _ in range(2)
        )
        self.head = nn.Linear(width, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        x = self.stem(images)
        for block in self.blocks:
            x = x + block(x)
        return self.head(x.relu().mean((-2, -1)))


def residual(images: Tensor, labels: Tensor, width: int, batch_size: int, name: str) -> ModuleTask:
    """Classify images [N, channels, height, width] in ten classes by `Residual`."""
    return ModuleTask(
        lambda: Residual(images.shape[1], width, 10), (images, labels), F.cross_entropy, batch_size, name=name
    )


class Encoder(nn.Module):
    """A linear embedding, learned positions, transformer blocks, and a linear layer.

    Args:
        num_positions: Number of positions.
        sizes: Widths of an input, of the residual stream, and of an output.
        depth: Number of blocks, of four heads.
        pooled: Whether the output is that of the mean over the positions.
    """

    def __init__(self, num_positions: int, sizes: tuple[int, int, int], depth: int, pooled: bool) -> None:
        super().__init__()
        inputs, width, outputs = sizes
        self.pooled = pooled
        self.embed = nn.Linear(inputs, width)
        self.positions = nn.Parameter(0.02 * torch.randn(num_positions, width))
        self.blocks = nn.Sequential(*(Block(width, 4, causal=False) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, outputs)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.blocks(self.embed(x) + self.positions))
        return self.head(x.mean(1) if self.pooled else x)


def masked_patches(images: Tensor, patch: int, width: int, batch_size: int, name: str) -> ModuleTask:
    """An `Encoder` finds the half of an image's patches that is masked, by mean squared error.

    Args:
        images: Images [N, channels, side, side]; all together are standardised.
        patch: Side of a patch.
        width: Width of the encoder, of two blocks.
        batch_size: Number of images per local step of one worker.
        name: Name of the task.
    """
    patches = F.unfold((images - images.mean()) / images.std(), patch, stride=patch).mT
    generator = torch.Generator().manual_seed(0)
    hidden = torch.rand(patches.shape[:2], generator=generator).argsort(1).argsort(1) < patches.shape[1] // 2
    mask = hidden.unsqueeze(2).float()
    inputs = torch.cat([patches * (1 - mask), mask], 2)

    def loss(outputs: Tensor, patches: Tensor, mask: Tensor) -> Tensor:
        return 2 * ((outputs - patches).square() * mask).mean()

    sizes = (inputs.shape[2], width, patches.shape[2])
    return ModuleTask(
        lambda: Encoder(patches.shape[1], sizes, 2, pooled=False), (inputs, patches, mask), loss, batch_size, name=name
    )


def which_text(codes: Sequence[Tensor], vocabulary: int, batch_size: int, name: str) -> ModuleTask:
    """An `Encoder` of one block tells from which text a piece of 24 characters is; texts are numbers of characters."""
    count = min(map(len, codes)) // 24
    pieces = torch.cat([text[: count * 24].view(count, 24) for text in codes])
    labels = torch.arange(len(codes)).repeat_interleave(count)
    inputs = torch.eye(vocabulary, dtype=torch.uint8).mul_(255)[pieces]  # 255 is read as 1
    sizes = (vocabulary, 24, len(codes))
    return ModuleTask(
        lambda: Encoder(24, sizes, 1, pooled=True), (inputs, labels), F.cross_entropy, batch_size, name=name
    )


class NextWord(nn.Module):
    """The next word from those before it, by their embeddings and one hidden layer."""

    def __init__(self, vocabulary: int, context: int, width: int) -> None:
        super().__init__()
        self.words = nn.Parameter(torch.randn(vocabulary, width) * width**-0.5)
        self.layers = mlp(context * width, width, vocabulary)

    def forward(self, words: Tensor) -> Tensor:
        return self.layers(self.words[words].flatten(-2))


def next_word(words: Tensor, vocabulary: int, width: int, batch_size: int, name: str) -> ModuleTask:
    """Predict each word, a number, from the four before it by `NextWord`."""
    pieces = words.unfold(0, 5, 1)
    data = (pieces[:, :4].contiguous(), pieces[:, 4].contiguous())
    return ModuleTask(lambda: NextWord(vocabulary, 4, width), data, F.cross_entropy, batch_size, name=name)


class Recurrent(nn.Module):
    """Embeddings, a gated recurrent unit, and a linear layer."""

    def __init__(self, vocabulary: int, width: int) -> None:
        super().__init__()
        self.tokens = nn.Parameter(torch.randn(vocabulary, width) * width**-0.5)
        self.from_input, self.from_hidden = (nn.Linear(width, 3 * width) for _ in range(2))
        self.head = nn.Linear(width, vocabulary)

    def forward(self, tokens: Tensor) -> Tensor:
        inputs = self.from_input(self.tokens[tokens])
        hidden, seen = torch.zeros_like(inputs[:, 0, : self.from_hidden.in_features]), []
        for of_input in inputs.unbind(1):  # written out: GRUCell has no batching rule
            *gates, new = of_input.chunk(3, -1)
            *more, old = self.from_hidden(hidden).chunk(3, -1)
            reset, update = (torch.sigmoid(a + b) for a, b in zip(gates, more, strict=True))
            new = torch.tanh(new + reset * old)
            hidden = new + update * (hidden - new)
            seen.append(hidden)
        return self.head(torch.stack(seen, 1))


def recurrent(codes: Tensor, vocabulary: int, context: int, width: int, batch_size: int, name: str) -> ModuleTask:
    """Predict the next character of a text, given as numbers, by `Recurrent` on pieces of it."""
    count = (len(codes) - 1) // context
    inputs, targets = (codes[i : i + count * context].view(count, context) for i in (0, 1))
    return ModuleTask(
        lambda: Recurrent(vocabulary, width),
        (inputs, targets),
        lambda logits, targets: F.cross_entropy(logits.flatten(0, 1), targets.flatten()),
        batch_size,
        name=name,
    )
