"""The tasks of the simulations: images or characters in memory and a small model."""

from __future__ import annotations

import gzip
import io
from pathlib import Path
from pydoc_data import topics

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_lopt.meta import DataTask, ImageMLP, image_conv, image_vit, language_model

TASKS = ("digits", "fashion_mnist", "cifar10", "characters", "cifar10_conv", "cifar10_vit", "help_lm", "novels_lm")
ALPHABET = "abcdefghijklmnopqrstuvwxyz .,'\n"  # all other characters are one more
CONTEXT, EXAMPLES = 8, 20_000


def load_task(name: str, data: Path | None = None) -> DataTask:
    """A task by name.

    Args:
        name: ``"digits"`` (scikit-learn's, MLP 64-32-10, batch 32), ``"fashion_mnist"`` (28×28, 784-128-128-10, batch
            128), ``"cifar10"`` (resized to 16×16, 768-128-128-10, batch 128) or ``"characters"`` (the next character
            from the eight before it, in the texts of Python's `help()`, MLP 256-64-32, batch 32), ``"cifar10_conv"``
            (16×16, 3×3 convolutions 16-32-32, batch 32), ``"cifar10_vit"`` (16×16, patches of 4, width 32, 2 blocks,
            batch 32), ``"help_lm"`` or ``"novels_lm"`` (a transformer of width 32 and 2 blocks on 32 characters, batch
            16, of the same texts or of a train.txt).
        data: folder that holds, at any depth, Fashion-MNIST's idx.gz files, CIFAR-10's train-*.parquet or train.txt.

    Raises:
        FileNotFoundError: the data is not there.
        ValueError: an unknown name.

    Example:
        >>> load_task("digits")
        ImageMLP(1797 images, 64-32-10, batch_size=32)
    """
    if name == "digits":
        from sklearn.datasets import load_digits  # an extra

        pixels, labels = load_digits(return_X_y=True)
        images = torch.as_tensor(pixels).float().unflatten(1, (8, 8)) / 16
        return ImageMLP(images, torch.as_tensor(labels), hidden=(32,), batch_size=32)
    if name == "fashion_mnist":
        images, labels = (_idx(_find(data, f"train-{part}-ubyte.gz")) for part in ("images-idx3", "labels-idx1"))
        return ImageMLP(images, labels, hidden=(128, 128), batch_size=128)
    if name == "cifar10":
        return ImageMLP(*_cifar10(_find(data, "train-*.parquet")), hidden=(128, 128), batch_size=128, size=16)
    if name == "characters":
        return ImageMLP(*_characters(), hidden=(64,), batch_size=32)
    if name == "cifar10_conv":
        return image_conv(*_cifar10(_find(data, "train-*.parquet")), channels=(16, 32, 32), batch_size=32, size=16)
    if name == "cifar10_vit":
        return image_vit(*_cifar10(_find(data, "train-*.parquet")), width=32, batch_size=32, size=16)
    if name in ("help_lm", "novels_lm"):
        text = _help() if name == "help_lm" else _find(data, "train.txt").read_text().lower()
        return language_model(_codes(text), len(ALPHABET) + 1, context=32, width=32)
    raise ValueError(f"The task must be one of {TASKS}, not {name!r}.")


def _find(folder: Path | None, pattern: str) -> Path:
    found = sorted(folder.rglob(pattern)) if folder else []
    if not found:
        raise FileNotFoundError(f"There is no {pattern} under {folder}: point --data at a folder that holds it.")
    return found[0]


def _idx(path: Path) -> Tensor:
    content = gzip.decompress(path.read_bytes())
    sides = np.frombuffer(content, ">i4", count=content[3], offset=4)
    return torch.from_numpy(np.frombuffer(content, np.uint8, offset=4 + 4 * content[3]).reshape(sides).copy())


def _cifar10(path: Path) -> tuple[Tensor, Tensor]:
    import pyarrow.parquet  # an extra
    from PIL import Image

    columns = pyarrow.parquet.read_table(path).to_pydict()
    images = np.stack([np.asarray(Image.open(io.BytesIO(image["bytes"]))) for image in columns["img"]])
    return torch.from_numpy(images).permute(0, 3, 1, 2), torch.tensor(columns["label"])


def _help() -> str:
    return "\n".join(topics.topics.values()).lower()


def _codes(text: str) -> Tensor:
    table = {ord(character): code for code, character in enumerate(ALPHABET)}
    return torch.tensor([table.get(ord(character), len(ALPHABET)) for character in text])


def _characters() -> tuple[Tensor, Tensor]:
    """One-hot contexts [N, CONTEXT, 32] and next characters [N], from evenly spaced places."""
    codes = _codes(_help())
    places = torch.linspace(0, len(codes) - CONTEXT - 1, EXAMPLES).long()
    contexts = codes[places[:, None] + torch.arange(CONTEXT)]
    return F.one_hot(contexts, len(ALPHABET) + 1).float(), codes[places + CONTEXT]
