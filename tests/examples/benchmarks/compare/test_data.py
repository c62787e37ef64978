"""Data of the tasks, from small files with the layout of the real ones."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from examples.benchmarks.compare import data

datasets = pytest.importorskip("datasets")
image = pytest.importorskip("PIL.Image")


@pytest.fixture(autouse=True)
def _no_sleep(monkeypatch):
    """Streams that end early sleep for five seconds before they leave their threads."""
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0, raising=False)


def write_images(folder, column: str, side: int, shards: int) -> None:
    """Write files of 80 images each; the colour of an image tells its class."""
    folder.mkdir()
    for shard in range(shards):
        labels = [(shard + i) % 10 for i in range(80)]
        pictures = [image.fromarray(np.full((side, side, 3), (20 * label, 7, 0), np.uint8)) for label in labels]
        table = datasets.Dataset.from_dict({column: pictures, "label": labels})
        table = table.cast_column(column, datasets.Image())
        table.to_parquet(folder / f"train-{shard:05}-of-{shards:05}.parquet")


@pytest.mark.parametrize(("name", "side"), [("imagenet32", 32), ("imagenet64", 64)])
@pytest.mark.parametrize("stored", [32, 64, 128])
def test_imagenet(tmp_path, name, side, stored, monkeypatch):
    monkeypatch.setattr(data, "SUBSET", 150)
    write_images(tmp_path / "data", "image", stored, shards=3)
    task = data.load_task(name, tmp_path)
    assert task.sizes == (3 * side**2, 128, 128, 10)
    assert task.batch_size == 128
    assert task.images.shape == (150, 3 * side**2)
    red = task.images.view(150, 3, -1)[:, 0]
    assert torch.equal((red * 255 / 20).round(), task.labels[:, None].expand_as(red).float())
    assert len(task.labels.unique()) == 10


def test_cifar10_in_order(tmp_path):
    write_images(tmp_path / "data", "img", 32, shards=2)
    images, labels = data._images(data._rows(tmp_path), "img")
    assert images.shape == (160, 3, 32, 32)
    assert labels.tolist() == [(i // 80 + i % 80) % 10 for i in range(160)]
    assert torch.equal(images[:, 0, 0, 0], 20 * labels.to(torch.uint8))


def test_lm1b(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "SUBSET", 40)
    sentences = [f"Sentence {'abcdefghij'[i % 10]} of the corpus ." for i in range(60)]
    datasets.Dataset.from_dict({"text": sentences}).to_parquet(tmp_path / "train-00000-of-00001.parquet")
    text = data._text("lm1b", tmp_path).split("\n")
    assert len(text) == 40
    assert set(text) <= {sentence.lower() for sentence in sentences}
    task = data.load_task("lm1b", tmp_path)
    assert task.batch(2, torch.Generator())[0].shape == (2, 16, 32)


@pytest.mark.parametrize("name", ["imagenet32", "lm1b", "cifar10", "fashion_mnist", "novels_lm"])
def test_missing_data_is_named(tmp_path, name):
    with pytest.raises(FileNotFoundError, match=f"There is no train.* under {tmp_path}"):
        data.load_task(name, tmp_path)
