"""The benchmark `finetune` on a tiny encoder and books of nonsense."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from itertools import islice

import pytest
import transformers
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from examples.benchmarks.__main__ import main
from examples.benchmarks.compare import finetune
from examples.benchmarks.compare.finetune import AUTHORS, BATCH_SIZE, CLASSES, DDP, METHODS, Run, points, summary
from examples.benchmarks.report import read_rows

WORDS = 6_000  # of a book: enough for passages that do not touch


@pytest.fixture(scope="module", autouse=True)
def _fewer_passages():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(finetune, "PASSAGES", 40)
        patch.setattr(finetune, "HELD_OUT", 5)
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tokenizer of numbers, an encoder of width 8, and books that count on from the one before."""
    folder = tmp_path_factory.mktemp("novels")
    words = ["[PAD]", "[UNK]", *(str(number) for number in range(100_000, 100_000 + 21 * WORDS))]
    vocabulary = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    vocabulary.pre_tokenizer = Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=vocabulary, pad_token="[PAD]", unk_token="[UNK]")
    tokenizer.save_pretrained(folder)
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    transformers.BertModel(transformers.BertConfig(vocab_size=len(words), **sizes)).save_pretrained(folder)
    numbers = iter(words[2:])
    for file, names in AUTHORS.items():
        books = [" ".join(islice(numbers, WORDS)) for _ in names.split()]
        (folder / f"{file}.txt").write_text("\n\n".join(books))
    return folder


@pytest.fixture(scope="module")
def data(folder):
    return finetune.load_passages(str(folder), folder)


def test_no_split_has_passages_of_another(data):
    words = {split: set(dataset.tensors[0].unique().tolist()) - {0, 1} for split, dataset in data.items()}
    assert sum(map(len, words.values())) == len(set.union(*words.values()))
    counts = {split: Counter(dataset.tensors[2].tolist()) for split, dataset in data.items()}
    assert counts.pop("train") == dict.fromkeys(range(4), finetune.PASSAGES)
    assert counts == {split: dict.fromkeys(range(4), finetune.HELD_OUT) for split in ("search", "compare", "unseen")}


def test_unseen_books_are_of_the_same_authors(data):
    books = {"train": {}, "unseen": {}}  # of each author, by the numbers in them
    for split, of_author in books.items():
        tokens, _, labels = data[split].tensors
        for row, label in zip(tokens.tolist(), labels.tolist(), strict=True):
            of_author.setdefault(CLASSES[label], set()).add((row[0] - 2) // WORDS)
    order = [name for names in AUTHORS.values() for name in names.split()]
    for name in CLASSES:
        of_name = {index for index, author in enumerate(order) if author == name}
        assert books["train"][name] == {index for index in of_name if index < 17}
        assert books["unseen"][name] == {index for index in of_name if index >= 17}


def test_all_methods_see_the_same_passages(folder, data, monkeypatch):
    seen = []
    step = finetune.AuthorClassifier.training_step

    def recording(module, batch, batch_idx):
        seen.append(batch[2].tolist())
        return step(module, batch, batch_idx)

    monkeypatch.setattr(finetune.AuthorClassifier, "training_step", recording)
    run = Run("final", DDP, 1e-3, num_workers=2, local_steps=1, steps=3, seed=1)
    run.train(str(folder), data, eval_steps=3)
    together = [sorted(labels) for labels in seen]
    assert [len(labels) for labels in together] == [2 * BATCH_SIZE] * 3
    seen.clear()
    replace(run, method="Local SGD", local_steps=3).train(str(folder), data, eval_steps=3)
    assert [sorted(a + b) for a, b in zip(seen[::2], seen[1::2], strict=True)] == together


def test_one_command_searches_compares_and_goes_on(folder, tmp_path, capsys):
    out, png = tmp_path / "runs.jsonl", tmp_path / "plot.png"
    command = ["finetune", out, "--model", folder, "--data", folder, "--passages", 64, "--local-steps", 2]
    command += ["--eval-steps", 2, "--seeds", 0, "--png", png]
    main([*map(str, command)])
    rows = read_rows(out)
    assert Counter(row["stage"] for row in rows) == {"times": 1, "search": 8, "final": len(METHODS)}
    learned, local = (
        next(row for row in rows[-5:] if row["method"] == name) for name in ("LearnedLocalSGD", "Local SGD")
    )
    assert learned["local_lr"] == local["local_lr"]
    assert learned["options"] == {}
    assert png.read_bytes().startswith(b"\x89PNG")
    before = capsys.readouterr().out
    main([*map(str, command)])
    assert read_rows(out) == rows
    after = capsys.readouterr().out
    assert before.endswith(after)
    assert [line.split("  ")[0] for line in after.splitlines()[1:]] == ["2"] * len(METHODS)


def test_the_best_of_the_search_is_that_of_the_lowest_loss(folder, tmp_path, monkeypatch):
    losses = {5e-4: 1.0, 2e-4: 3.0, 0.5: 0.7, 0.2: 0.6, 0.7: 0.8}

    def train(run, model, data, eval_steps):
        loss = losses.get(run.options.get("momentum", run.local_lr), 9.0)
        point = {**dict.fromkeys(finetune.METRICS, 0.5), "steps": 1, "loss": loss}
        return {"parameters": 1, "run_seconds": 0.0, "curve": [point]}

    monkeypatch.setattr(Run, "train", train)
    out = tmp_path / "runs.jsonl"
    main([*map(str, ["finetune", out, "--model", folder, "--data", folder, "--passages", 64])])
    final = {row["method"]: row for row in read_rows(out) if row["stage"] == "final"}
    assert {row["local_lr"] for row in final.values()} == {5e-4}
    assert final["SlowMo"]["options"] == {"momentum": 0.2}
    assert final["DiLoCo"]["options"]["momentum"] == 0.5


def test_costs_are_those_of_the_network_model():
    times = {"stage": "times", "step_seconds": 0.5, "outer_seconds": {"LearnedLocalSGD": 3.0}}
    row = {"stage": "final", "parameters": 10**6, "num_workers": 2, "local_lr": 0.1, "options": {}, "seed": 0}
    row["curve"] = [{"steps": 16, **dict.fromkeys(finetune.METRICS, 0.5)}]
    (ddp,) = points({**row, "method": DDP, "local_steps": 1}, times, mbit=100)
    (ours,) = points({**row, "method": "LearnedLocalSGD", "local_steps": 8}, times, mbit=100)
    assert (ddp["rounds"], ours["rounds"]) == (16, 2)
    assert ddp["MB sent"] == pytest.approx(16 * 4)
    assert ours["MB sent"] == pytest.approx(2 * 4, rel=1e-3)
    transfer = 4e6 * 8 / 100e6 * 1514 / 1448
    assert ours["seconds"] == pytest.approx(2 * (8 * 0.5 + transfer + 3), rel=1e-3)
    rows = [times, {**row, "method": DDP, "local_steps": 1}, {**row, "method": "LearnedLocalSGD", "local_steps": 8}]
    assert [(line["H"], line["method"]) for line in summary(rows, 100)] == [(8, DDP), (8, "LearnedLocalSGD")]
