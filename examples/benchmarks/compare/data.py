"""Tasks of the simulations: images or characters in memory, and a small model."""

from __future__ import annotations

import gzip
import re
from collections import Counter
from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from pydoc_data import topics
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from examples.benchmarks.compare import objectives
from examples.benchmarks.report import UsageError
from lightning_lopt.meta import DataTask, ImageMLP, image_conv, image_vit, language_model
from lightning_lopt.meta.tasks import resize

TASKS = (
    "digits",
    "fashion_mnist",
    "fashion_mnist_8x8",
    "fashion_mnist_14x14",
    "cifar10",
    "characters",
    "cifar10_conv",
    "cifar10_vit",
    "imagenet32",
    "imagenet64",
    "help_lm",
    "novels_lm",
    "lm1b",
    "fashion_mnist_conv",
    "fashion_mnist_vit",
    "fashion_mnist_autoencoder",
    "cifar10_narrow",
    "shakespeare",
    "shakespeare_lm",
    "novels",
    "photograph",
    "breast_cancer",
    "friedman",
    "diabetes",
    "digits_halves",
    "digits_diffusion",
    "flower_factors",
    "fashion_mnist_distilled",
    "fashion_mnist_residual",
    "cifar10_masked",
    "three_texts",
    "novels_words",
    "shakespeare_recurrent",
)
ALPHABET = "abcdefghijklmnopqrstuvwxyz .,'\n"  # all other characters are one more
FASHION_MNIST: dict[str, tuple[int | None, tuple[int, ...], int]] = {  # size in pixels, hidden widths, batch
    "fashion_mnist": (None, (128, 128), 128),
    "fashion_mnist_8x8": (8, (32,), 32),
    "fashion_mnist_14x14": (14, (128, 128), 32),
}
CONTEXT, EXAMPLES = 8, 20_000
SUBSET = 50_000  # rows of data sets that do not fit into memory


def load_task(name: str, data: Path | None = None, split: Literal["train", "test"] = "train") -> DataTask:
    """Make a task by its name.

    ============================== ================================================================ =====
    name                           data and model                                                   batch
    ============================== ================================================================ =====
    ``digits``                     scikit-learn's digits, 8×8; MLP 64-32-10                         32
    ``fashion_mnist``              Fashion-MNIST, 28×28; MLP 784-128-128-10                         128
    ``fashion_mnist_8x8``          Fashion-MNIST resized to 8×8; MLP 64-32-10                       32
    ``fashion_mnist_14x14``        Fashion-MNIST resized to 14×14; MLP 196-128-128-10               32
    ``cifar10``                    CIFAR-10 resized to 16×16; MLP 768-128-128-10                    128
    ``characters``                 next character from the eight before it, in the texts of         32
                                   Python's `help()`; MLP 256-64-32
    ``cifar10_conv``               CIFAR-10, 16×16; 3×3 convolutions 16-32-32                       32
    ``cifar10_vit``                CIFAR-10, 16×16; transformer of width 32 with 2 blocks           32
                                   on patches of 4
    ``imagenet32``, ``imagenet64`` 50,000 images of ImageNet, 32×32 or 64×64; MLP 128-128           128
    ``help_lm``                    texts of Python's `help()`; transformer of width 32 with         16
                                   2 blocks on 32 characters
    ``novels_lm``                  text of a train.txt; the same transformer                        16
    ``lm1b``                       50,000 sentences of LM1B; the same transformer                   16
    ``fashion_mnist_conv``         Fashion-MNIST resized to 14×14; 3×3 convolutions 8-16-16         16
    ``fashion_mnist_vit``          Fashion-MNIST resized to 16×16; transformer of width 24 with     16
                                   2 blocks on patches of 4
    ``fashion_mnist_autoencoder``  Fashion-MNIST, 28×28; MLP 784-64-784, squared error              16
    ``cifar10_narrow``             CIFAR-10 resized to 16×16; MLP 768-128-64-10                     32
    ``shakespeare``                next character from the eight before it, in a                    32
                                   tinyshakespeare.txt; MLP 256-48-48-32
    ``shakespeare_lm``             the same text; transformer of width 24 with 2 blocks on          8
                                   24 characters
    ``novels``                     next character from the eight before it, in a train.txt;         32
                                   MLP 256-64-32
    ``photograph``                 colours of scikit-learn's china.jpg by position, as 32 waves;    64
                                   MLP 32-64-64-3, squared error
    ``breast_cancer``              scikit-learn's table of 569 tumours; MLP 30-16-2                 16
    ``friedman``                   scikit-learn's regression Friedman #1 with noise 1;              16
                                   MLP 10-32-32-1, squared error
    ``diabetes``                   scikit-learn's table of 442 patients; MLP 10-64-64-1, squared    16
                                   error
    ``digits_halves``              the digits' upper and lower halves; two MLPs 32-64-32 that tell  32
                                   which belong together
    ``digits_diffusion``           the digits with Gaussian noise of 20 draws; MLP 65-288-288-64,   32
                                   squared error of the noise
    ``flower_factors``             brightness of scikit-learn's flower.jpg by row and column;       128
                                   factors of rank 16, squared error
    ``fashion_mnist_distilled``    Fashion-MNIST resized to 14×14; MLP 196-48-10 that learns the    16
                                   output of a trained MLP 196-128-10
    ``fashion_mnist_residual``     Fashion-MNIST resized to 14×14; 3×3 convolutions, five of 12     16
                                   channels with group norms in residual blocks
    ``cifar10_masked``             20,000 images of CIFAR-10 resized to 16×16, half of the patches  16
                                   of 4 masked; transformer of width 32 with 2 blocks, squared
                                   error of these patches
    ``three_texts``                24 characters of Python's `help()`, a tinyshakespeare.txt or a   16
                                   train.txt: of which? transformer of width 24 with 1 block
    ``novels_words``               next word from the four before it, in a train.txt, among the     64
                                   1,000 most frequent; embeddings and MLP 192-48-1000
    ``shakespeare_recurrent``      a tinyshakespeare.txt; gated recurrent unit of width 48 on 20    8
                                   characters
    ============================== ================================================================ =====

    Args:
        name: Name of the task.
        data: Folder that holds, at any depth, Fashion-MNIST's idx.gz files, train.txt, tinyshakespeare.txt, or the
            train*.parquet of CIFAR-10 (columns img and label), ImageNet (image and label) or LM1B (text), as on the
            Hugging Face hub.
        split: Part of the data: the examples to train on or, of Fashion-MNIST only, to test with.

    Raises:
        FileNotFoundError: The data is not in the folder.
        ValueError: The name is unknown, or there is no test data of that name.

    Example:
        >>> load_task("digits")
        ImageMLP(1797 images, 64-32-10, batch_size=32)
    """
    if split == "test" and name not in FASHION_MNIST:
        raise UsageError(f"There is no test data of {name!r}, only of {[*FASHION_MNIST]}.")
    if name == "digits":
        from sklearn.datasets import load_digits  # an extra

        pixels, labels = load_digits(return_X_y=True)
        images = torch.as_tensor(pixels).float().unflatten(1, (8, 8)) / 16
        return ImageMLP(images, torch.as_tensor(labels), hidden=(32,), batch_size=32)
    if name in FASHION_MNIST:
        size, hidden, batch_size = FASHION_MNIST[name]
        images = fashion_mnist("train" if split == "train" else "t10k", data)
        return ImageMLP(*images, hidden=hidden, batch_size=batch_size, size=size)
    if name == "cifar10":
        return ImageMLP(*_images(_rows(data), "img"), hidden=(128, 128), batch_size=128, size=16)
    if name == "characters":
        return ImageMLP(*_characters(_help()), hidden=(64,), batch_size=32)
    if name == "cifar10_conv":
        return image_conv(*_images(_rows(data), "img"), channels=(16, 32, 32), batch_size=32, size=16)
    if name == "cifar10_vit":
        return image_vit(*_images(_rows(data), "img"), width=32, batch_size=32, size=16)
    if name in ("imagenet32", "imagenet64"):
        images, labels = _images(_rows(data, SUBSET), "image", side=int(name[-2:]))
        return ImageMLP(images, labels, hidden=(128, 128), batch_size=128)
    if name in ("help_lm", "novels_lm", "lm1b"):
        return language_model(_codes(_text(name, data)), len(ALPHABET) + 1, context=32, width=32)
    if name == "fashion_mnist_conv":
        return image_conv(*fashion_mnist("train", data), channels=(8, 16, 16), batch_size=16, size=14)
    if name == "fashion_mnist_vit":
        return image_vit(*fashion_mnist("train", data), width=24, batch_size=16, size=16)
    if name == "fashion_mnist_autoencoder":
        pixels = fashion_mnist("train", data)[0].flatten(1)
        return objectives.regression((784, 64, 784), pixels, pixels.float() / 255, batch_size=16, name=name)
    if name == "cifar10_narrow":
        return ImageMLP(*_images(_rows(data), "img"), hidden=(128, 64), batch_size=32, size=16)
    if name == "shakespeare":
        return ImageMLP(*_characters(_text(name, data)), hidden=(48, 48), batch_size=32)
    if name == "shakespeare_lm":
        return language_model(_codes(_text(name, data)), len(ALPHABET) + 1, context=24, width=24, batch_size=8)
    if name == "novels":
        return ImageMLP(*_characters(_text(name, data)), hidden=(64,), batch_size=32)
    if name == "photograph":
        return objectives.regression((32, 64, 64, 3), *_photograph(), batch_size=64, name=name)
    if name == "breast_cancer":
        from sklearn.datasets import load_breast_cancer  # an extra

        table, classes = map(torch.as_tensor, load_breast_cancer(return_X_y=True))
        return ImageMLP(_standardised(table), classes, hidden=(16,), batch_size=16)
    if name == "friedman":
        from sklearn.datasets import make_friedman1  # an extra

        inputs, targets = map(torch.as_tensor, make_friedman1(2000, noise=1.0, random_state=0))
        return objectives.regression((10, 32, 32, 1), _standardised(inputs), _standardised(targets[:, None]), 16, name)
    if name == "diabetes":
        from sklearn.datasets import load_diabetes  # an extra

        inputs, targets = map(torch.as_tensor, load_diabetes(return_X_y=True))
        inputs, targets = _standardised(inputs), _standardised(targets[:, None])
        return objectives.regression((10, 64, 64, 1), inputs, targets, 16, name)
    if name.startswith("digits_"):
        from sklearn.datasets import load_digits  # an extra

        images = torch.as_tensor(load_digits(return_X_y=True)[0]).float() / 16
        if name == "digits_halves":
            return objectives.contrastive(images, 32, name)
        return objectives.diffusion(2 * images - 1, 288, 20, 32, name)
    if name == "flower_factors":
        from sklearn.datasets import load_sample_image  # an extra

        picture = torch.tensor(load_sample_image("flower.jpg"))
        return objectives.factorisation(picture.float().mean(2), 16, 128, name)
    if name in ("fashion_mnist_distilled", "fashion_mnist_residual"):
        images, labels = fashion_mnist("train", data)
        images, labels = resize(images.float() / 255, 14), labels.long()
        if name == "fashion_mnist_distilled":
            return objectives.distillation(images.flatten(1), labels, 48, 16, name)
        return objectives.residual(images, labels, 12, 16, name)
    if name == "cifar10_masked":
        images = _images(islice(_rows(data), 20_000), "img")[0]
        return objectives.masked_patches(resize(images.float() / 255, 16), 4, 32, 16, name)
    if name == "three_texts":
        codes = [_codes(_text(each, data)) for each in ("help_lm", "shakespeare", "novels")]
        return objectives.which_text(codes, len(ALPHABET) + 1, 16, name)
    if name == "novels_words":
        return objectives.next_word(_words(_text(name, data), 1000), 1000, 48, 64, name)
    if name == "shakespeare_recurrent":
        return objectives.recurrent(_codes(_text(name, data)), len(ALPHABET) + 1, 20, 48, 8, name)
    raise UsageError(f"The task must be one of {TASKS}, not {name!r}.")


def fashion_mnist(split: str, data: Path | None) -> tuple[Tensor, Tensor]:
    """Load Fashion-MNIST: images, uint8 [N, 28, 28], and labels [N].

    Args:
        split: Name of the split, ``"train"`` or ``"t10k"``.
        data: Folder that holds the idx.gz files, at any depth.
    """
    images, labels = (_idx(find(data, f"{split}-{part}-ubyte.gz")[0]) for part in ("images-idx3", "labels-idx1"))
    return images, labels


def find(folder: Path | None, pattern: str) -> list[Path]:
    """Files of a pattern in a folder, at any depth.

    Raises:
        FileNotFoundError: There is none.
    """
    found = sorted(folder.rglob(pattern)) if folder else []
    if not found:
        where = f"under {folder}" if folder else "without --data"
        raise FileNotFoundError(f"There is no {pattern} {where}: point --data at a folder that holds it.")
    return found


def _idx(path: Path) -> Tensor:
    content = gzip.decompress(path.read_bytes())
    sides = np.frombuffer(content, ">i4", count=content[3], offset=4)
    return torch.from_numpy(np.frombuffer(content, np.uint8, offset=4 + 4 * content[3]).reshape(sides).copy())


def _rows(data: Path | None, count: int | None = None) -> Iterable[dict[str, Any]]:
    """Stream the rows of parquet files, or a random sample of them."""
    from datasets import load_dataset  # an extra

    files = [str(path) for path in find(data, "train*.parquet")]
    rows = load_dataset("parquet", data_files=files, split="train", streaming=True)
    return rows if count is None else rows.shuffle(seed=0, buffer_size=10_000).take(count)


def _images(rows: Iterable[dict[str, Any]], column: str, side: int | None = None) -> tuple[Tensor, Tensor]:
    """Load colour images [N, 3, height, width], averaged to `side` pixels if it is given, and labels [N]."""
    from PIL.Image import Resampling  # an extra

    images, labels = [], []
    for row in rows:
        image = row[column].convert("RGB")
        if side is not None and image.size != (side, side):
            image = image.resize((side, side), Resampling.BOX)  # the filter of the downsampled ImageNet
        images.append(np.asarray(image))
        labels.append(row["label"])
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2), torch.tensor(labels)


def _text(name: str, data: Path | None) -> str:
    if name == "lm1b":
        return "\n".join(row["text"] for row in _rows(data, SUBSET)).lower()
    file = "tinyshakespeare.txt" if name.startswith("shakespeare") else "train.txt"
    return _help() if name == "help_lm" else find(data, file)[0].read_text().lower()


def _help() -> str:
    return "\n".join(topics.topics.values()).lower()


def _codes(text: str) -> Tensor:
    table = {ord(character): code for code, character in enumerate(ALPHABET)}
    return torch.tensor([table.get(ord(character), len(ALPHABET)) for character in text])


def _words(text: str, vocabulary: int) -> Tensor:
    """Numbers of the words of a text by frequency; the last number is that of all rarer ones."""
    words = re.findall("[a-z']+", text)
    table = {word: number for number, (word, _) in enumerate(Counter(words).most_common(vocabulary - 1))}
    return torch.tensor([table.get(word, vocabulary - 1) for word in words])


def _characters(text: str) -> tuple[Tensor, Tensor]:
    """One-hot contexts [N, CONTEXT, 32] and next characters [N], from evenly spaced positions."""
    codes = _codes(text)
    places = torch.linspace(0, len(codes) - CONTEXT - 1, EXAMPLES).long()
    contexts = codes[places[:, None] + torch.arange(CONTEXT)]
    return F.one_hot(contexts, len(ALPHABET) + 1).float(), codes[places + CONTEXT]


def _standardised(table: Tensor) -> Tensor:
    """Columns of mean 0 and standard deviation 1, float32."""
    return ((table - table.mean(0)) / table.std(0)).float()


def _photograph() -> tuple[Tensor, Tensor]:
    """Sines and cosines of 16 random waves at every pixel, [N, 32], and its standardised colours [N, 3]."""
    from sklearn.datasets import load_sample_image  # an extra

    picture = torch.tensor(load_sample_image("china.jpg"))
    rows, columns = torch.meshgrid(*(torch.arange(n) / 640 for n in picture.shape[:2]), indexing="ij")
    waves = 2 * torch.pi * 3 * torch.randn(2, 16, generator=torch.Generator().manual_seed(0))
    phases = torch.stack([rows, columns], -1).flatten(0, 1) @ waves
    return torch.cat([phases.sin(), phases.cos()], 1), _standardised(picture.flatten(0, 1).double())
