"""The tasks of the simulations: images or characters in memory and a small MLP."""

from __future__ import annotations

import gzip
import io
from pathlib import Path
from pydoc_data import topics

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_lopt.meta.tasks import ImageMLP

TASKS = ("digits", "fashion_mnist", "cifar10", "characters")
ALPHABET = "abcdefghijklmnopqrstuvwxyz .,'\n"  # all other characters are one more
CONTEXT, EXAMPLES = 8, 20_000


def load_task(name: str, data: Path | None = None) -> ImageMLP:
    """A task by name.

    Args:
        name: ``"digits"`` (scikit-learn's, MLP 64-32-10, batch 32), ``"fashion_mnist"`` (28×28, 784-128-128-10, batch
            128), ``"cifar10"`` (resized to 16×16, 768-128-128-10, batch 128) or ``"characters"`` (the next character
            from the eight before it, in the texts of Python's `help()`, MLP 256-64-32, batch 32).
        data: folder that holds, at any depth, Fashion-MNIST's idx.gz files or CIFAR-10's train-*.parquet.

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


def _characters() -> tuple[Tensor, Tensor]:
    """One-hot contexts [N, CONTEXT, 32] and next characters [N], from evenly spaced places."""
    text = "\n".join(topics.topics.values()).lower()
    codes = torch.tensor([ALPHABET.find(character) % (len(ALPHABET) + 1) for character in text])
    places = torch.linspace(0, len(codes) - CONTEXT - 1, EXAMPLES).long()
    contexts = codes[places[:, None] + torch.arange(CONTEXT)]
    return F.one_hot(contexts, len(ALPHABET) + 1).float(), codes[places + CONTEXT]
