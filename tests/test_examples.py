"""The examples run as a user would run them: the table and the plot are there, and no process is left."""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import re
import runpy
import sys
from functools import partial
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import timm
import torch
import torchvision
import transformers
from PIL import Image
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split

from lightning_lopt import AdaMLP, ControlledNesterov, Controller, WeightsError
from lightning_lopt.meta import Evaluation
from tests.processes import free_port, run_cases, run_command, run_workers

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
METHODS = ["LocalSGD", "SlowMo", "DiLoCo", "LearnedLocalSGD"]
TINY = ["--steps", "4", "--local-steps", "2"]


def run(command: list[str], limit: float = 240) -> str:
    return "".join(run_command([sys.executable, *command], limit, {"OMP_NUM_THREADS": "1", "MPLBACKEND": "agg"}))


def run_here(script: str, *arguments: object) -> None:
    """Run an example in this process, which has imported everything already."""
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [script, *map(str, arguments)])
        patch.setenv("MPLBACKEND", "agg")
        patch.syspath_prepend(EXAMPLES)
        try:
            runpy.run_path(str(EXAMPLES / script), run_name="__main__")
        finally:
            torch.set_num_threads(threads)


def _printed(rank: int, script: str, *arguments: object) -> str:
    """What an example prints as one of the workers that torchrun has started."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        run_here(script, *arguments)
    return printed.getvalue()


def _printed_alone(rank: int, script: str, *arguments: object) -> str:
    """The same without torchrun."""
    del os.environ["TORCHELASTIC_RUN_ID"]
    return _printed(rank, script, *arguments)


def check_report(output: str, methods: list[str], rounds: int, plot: Path) -> None:
    """The table has a row per method with as many rounds, and the plot is a PNG."""
    for method in methods:
        assert re.search(rf"^{method}  +{rounds}  ", output, re.MULTILINE), f"no row for {method}\n{output}"
    assert plot.read_bytes().startswith(b"\x89PNG")


def check_fine_tuning(output: str, folder: Path, script: str, saved: str) -> None:
    assert "Phase 1" in output
    assert (folder / saved).is_file()
    check_report(output, METHODS, rounds=2, plot=folder / f"{script}.png")


def test_fine_tuning_of_a_transformer_for_images(tmp_path: Path):
    output = run([str(EXAMPLES / "finetune_vit.py"), *TINY, "--out", str(tmp_path)])
    check_fine_tuning(output, tmp_path, "finetune_vit", "vit_backbone.pt")


def _save_gpt2(folder: Path) -> tuple[str, Path]:
    text = "who wrote this text? " * 100
    vocabulary = Tokenizer(WordLevel({character: i for i, character in enumerate(sorted(set(text)))}))
    vocabulary.pre_tokenizer = Split("", "isolated")
    transformers.PreTrainedTokenizerFast(tokenizer_object=vocabulary).save_pretrained(folder)
    config = transformers.GPT2Config(
        vocab_size=vocabulary.get_vocab_size(), n_positions=64, n_embd=8, n_layer=1, n_head=2
    )
    transformers.GPT2LMHeadModel(config).save_pretrained(folder)
    (folder / "text").mkdir()
    (folder / "text" / "train.txt").write_text(text)
    return str(folder), folder / "text"


def _save_images(folder: Path) -> Path:
    """Eight images of unlike sizes in each of two classes, all of one colour."""
    for split, name, i in product(("train", "test"), ("dark", "light"), range(8)):
        (folder / split / name).mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20 + i, 30), (200 if name == "light" else 20 + i,) * 3).save(
            folder / split / name / f"{i}.png"
        )
    return folder


def _save_vit(folder: Path) -> tuple[str, Path]:
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    transformers.ViTForImageClassification(transformers.ViTConfig(**sizes, image_size=32)).save_pretrained(folder)
    transformers.ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    return f"hf:{folder}", _save_images(folder / "images")


@pytest.fixture(scope="module")
def fine_tuned(tmp_path_factory):
    """Output and folder of each run; in one launch."""
    folders = {name: tmp_path_factory.mktemp(name) for name in ("bytes", "gpt2", "vit")}
    cases = {"bytes": ("finetune_lm.py", *TINY, "--out", folders["bytes"])}
    for name, script, save in (("gpt2", "finetune_lm.py", _save_gpt2), ("vit", "finetune_vit.py", _save_vit)):
        model, data = save(folders[name])
        cases[name] = (script, *TINY, "--model", model, "--data", data, "--out", folders[name])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        outputs = run_cases(_printed, 2, cases, connect=False, limit=280)
    return {name: (of_ranks[0], folders[name]) for name, of_ranks in outputs.items()}


def test_fine_tuning_of_a_language_model(fine_tuned):
    check_fine_tuning(*fine_tuned["bytes"], "finetune_lm", "gpt.pt")


@pytest.mark.parametrize(("name", "script"), [("gpt2", "finetune_lm"), ("vit", "finetune_vit")])
def test_fine_tuning_of_a_saved_model(fine_tuned, name, script):
    output, folder = fine_tuned[name]
    assert "Phase 1" not in output
    check_report(output, METHODS, rounds=2, plot=folder / f"{script}.png")


def _functions(script: str, monkeypatch) -> dict[str, Any]:
    monkeypatch.syspath_prepend(EXAMPLES)
    return runpy.run_path(str(EXAMPLES / script))


@pytest.mark.parametrize("kind", ["timm", "torchvision"])
def test_a_pretrained_network_gets_a_new_head(kind, tmp_path, monkeypatch):
    functions = _functions("finetune_vit.py", monkeypatch)
    if kind == "timm":
        network = timm.create_model("test_resnet")
        timm.models.save_for_hf(network, tmp_path)
        name = f"timm:local-dir:{tmp_path}"
    else:
        network = torchvision.models.shufflenet_v2_x0_5()
        monkeypatch.setenv("TORCH_HOME", str(tmp_path))
        file = torchvision.models.ShuffleNet_V2_X0_5_Weights.DEFAULT.url.rpartition("/")[2]
        (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
        torch.save(network.state_dict(), tmp_path / "hub" / "checkpoints" / file)
        name = "torchvision:shufflenet_v2_x0_5"
    backbone, num_features, preprocess = functions["build_backbone"](name, 8)
    model = functions["Classifier"](backbone, num_features, preprocess, num_classes=3, lr=0.01)
    images = torch.randint(256, (2, 3, 40, 40), dtype=torch.uint8)
    last = [module for module in network.modules() if isinstance(module, torch.nn.Linear)][-1]
    model.head.load_state_dict({name: value[:3] for name, value in last.state_dict().items()})
    expected = network.eval()(preprocess(images))[:, :3]
    torch.testing.assert_close(model.eval()(images), expected)


def test_low_rank_factors_alone_train(tmp_path, monkeypatch):
    pytest.importorskip("peft")
    path, _ = _save_gpt2(tmp_path)
    model = _functions("finetune_lm.py", monkeypatch)["PretrainedLM"](path, lr=1e-3, lora=2)
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trained
    assert all("lora_" in name for name in trained)


def test_what_an_extra_brings_is_named_where_it_is_missing(monkeypatch):
    need = _functions("report.py", monkeypatch)["need"]
    need("torch")
    with pytest.raises(SystemExit, match=r"needs no_such_package: pip install 'lightning-lopt\[pretrained\]'"):
        need("torch", "no_such_package")


WRONG = {  # arguments: what the message begins with, and a reason that it gives
    "no such data": (["finetune_lm.py", "--data", "nowhere"], "--data nowhere could not be read. It takes a text file"),
    "no text": (["finetune_lm.py", "--data", "images"], "--data images could not be read. It takes a text file"),
    "no weights": (["finetune_lm.py", "--init", "gpt.pt"], "--init gpt.pt could not be read. It takes the weights"),
    "a short text": (["pretrain_islands.py", "--data", "short.txt"], "4 bytes or tokens are too few"),
    "no such model": (["finetune_lm.py", "--model", "./nowhere"], "--model ./nowhere could not be read. It takes"),
    "a network without a head": (["finetune_vit.py", "--model", "hf:images"], "--model hf:images could not be read"),
    "no such timm model": (["finetune_vit.py", "--model", "timm:nothing"], "Unknown model (nothing)"),
    "no such torchvision model": (["finetune_vit.py", "--model", "torchvision:nothing"], "Unknown model nothing"),
    "no images": (["finetune_vit.py", "--data", "texts"], "there are no columns of images and labels"),
    "no such images": (["finetune_vit.py", "--data", "nowhere"], "--data nowhere could not be read. It takes a folder"),
    "no idx files": (["meta_train.py", "--data", "images"], "--data images could not be read. It takes a folder with"),
    "no such task": (["meta_train.py", "--recipe", "own", "--task", "nowhere.py"], "there is none at nowhere.py"),
    "no such checkpoint": (["meta_train.py", "--resume", "run/checkpoints/a.ckpt"], "there is none at run/checkpoints"),
    "ranks that do not fit": (["pretrain_islands.py", "--ranks", "3"], "--ranks must be 'node' or divide the 4 ranks"),
    "a worker too many": (["elastic_loop.py", "--worker", "3"], "--worker must be from 0 to 2, not 3"),
}


@pytest.mark.parametrize(("arguments", "message"), WRONG.values(), ids=WRONG)
def test_what_cannot_be_read_is_named_with_what_was_expected(tmp_path, monkeypatch, capsys, arguments, message):
    _save_images(tmp_path / "images")
    (tmp_path / "texts").mkdir()
    for name in ("texts/train.txt", "short.txt"):
        (tmp_path / name).write_text("text")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("urllib.request.urlopen", None)  # nothing is downloaded
    with pytest.raises(SystemExit) as error:
        run_here(*arguments)
    assert message in f"{error.value} {capsys.readouterr().err}"


def test_errors_of_defaults_are_not_the_users(monkeypatch):
    reading = _functions("report.py", monkeypatch)["reading"]
    with pytest.raises(ZeroDivisionError), reading("--data", None, "numbers"):
        _ = 1 / 0


@pytest.mark.parametrize("megabytes", [0.0, 1.0])
def test_a_plot_has_plain_labels_and_no_panel_of_nothing(tmp_path, monkeypatch, megabytes):
    monkeypatch.setenv("MPLBACKEND", "agg")
    figures = []
    monkeypatch.setattr("matplotlib.pyplot.close", figures.append)
    curve = [{"rounds": i, "MB sent": i * megabytes, "seconds": i, "train loss": 4.0 / 10**i} for i in range(1, 4)]
    _functions("report.py", monkeypatch)["report"]({"one": curve}, ["train loss"], tmp_path / "plot.png")
    axes = figures[0].axes
    assert [panel.get_xlabel() for panel in axes] == ["rounds", "MB sent per worker"][: 2 if megabytes else 1]
    labels = {label.get_text() for label in axes[0].get_yticklabels()}
    assert {"0.1", "0.01"} <= labels


def test_texts_are_files_or_data_sets(tmp_path, monkeypatch):
    load_text = _functions("finetune_lm.py", monkeypatch)["load_text"]
    file = tmp_path / "train.txt"
    file.write_text("one\ntwo")
    assert load_text(str(file)) == load_text(str(tmp_path)) == "one\ntwo"


def test_plain_loop_of_two_workers(tmp_path: Path):
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    output = run([*torchrun, str(EXAMPLES / "plain_loop.py"), *TINY, "--out", str(tmp_path)])
    check_report(output, ["average", "slow momentum", "learned"], rounds=2, plot=tmp_path / "plain_loop.png")


def test_plain_loop_of_one_worker(tmp_path: Path):
    (output,) = run_workers(_printed_alone, 1, "plain_loop.py", *TINY, "--out", tmp_path, connect=False)
    check_report(output, ["average", "slow momentum", "learned"], rounds=2, plot=tmp_path / "plain_loop.png")


@pytest.mark.long
@pytest.mark.parametrize("trainer", [[], ["--trainer"]], ids=["plain loop", "Trainer"])
def test_loop_of_workers_that_come_and_go(trainer: list[str]):
    pytest.importorskip("torchft")
    address = f"127.0.0.1:{free_port()}"
    options = ["--rounds", "4", "--pause", "0", "--lighthouse", address, *trainer]
    output = run([str(EXAMPLES / "elastic_loop.py"), *options])
    assert "round 2 of workers (0, 1, 2): train loss" in output
    for worker in range(3):
        assert re.search(rf"worker {worker}: process \d+ is in from round 0 on", output)
        assert f"worker {worker}: has trained for 4 rounds" in output


@pytest.mark.processes  # it asks git for the commit
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")
def test_meta_training_goes_on_from_an_export_and_overwrites_nothing(tmp_path: Path, capsys, monkeypatch):
    monkeypatch.setattr("lightning_lopt.meta.Evaluation", partial(Evaluation, num_rounds=30))

    def main(*arguments: object) -> str:
        run_here("meta_train.py", *arguments)
        return capsys.readouterr().out

    def refused(*arguments: object) -> str:
        with pytest.raises((SystemExit, WeightsError)) as error:
            main(*arguments)
        return f"{error.value} {capsys.readouterr().err}"

    first, second, export = tmp_path / "first", tmp_path / "second", tmp_path / "first" / "export.safetensors"
    output = main("--out", first, "--steps", 1)
    for curve in ("averaging", "diloco", "before meta-training", "learned"):
        assert re.search(rf"^{curve} +final loss 0\.\d+$", output, re.MULTILINE), output
    assert AdaMLP.load(first / "network.safetensors").card["meta_iterations"] == 1
    assert (first / "curves.png").read_bytes().startswith(b"\x89PNG")
    only = AdaMLP.load(first / "network.safetensors").state_dict()
    mean = AdaMLP.load(first / "mean.safetensors").state_dict()
    assert all(torch.equal(mean[name], only[name]) for name in only)
    main("--out", second, "--steps", 2, "--init", export)
    assert AdaMLP.load(second / "network.safetensors").card["meta_iterations"] == 2
    content = export.read_bytes()
    assert "holds the weights of another run" in refused("--out", first, "--steps", 2)
    assert export.read_bytes() == content
    (second / "checkpoints").mkdir(exist_ok=True)
    assert "holds the weights of another run" in refused("--out", first, "--resume", second / "checkpoints/step=1.ckpt")
    assert "--steps: 0 is not a positive number" in refused("--out", tmp_path / "third", "--steps", 0)
    third = "--out", tmp_path / "third", "--init"
    assert "has 1 meta-iterations already" in refused(*third, export, "--steps", 1)
    assert "is not a file that fits here" in refused(*third, first / "network.safetensors")
    assert "is no checkpoint. Use --init" in refused("--out", first, "--resume", export)


@pytest.mark.parametrize("resumed", [False, True])
def test_meta_training_keeps_the_mean_of_the_last_weights(tmp_path: Path, monkeypatch, resumed):
    monkeypatch.syspath_prepend(EXAMPLES)
    kept = runpy.run_path(str(EXAMPLES / "meta_train.py"))["MeanWeights"]
    mean, network = kept(tmp_path / "mean.safetensors", count=3), AdaMLP(seed=0)
    trainer = SimpleNamespace(accumulate_grad_batches=2, global_step=1)
    for batch_idx in range(10):
        torch.nn.init.constant_(network.layers[2].bias, float(batch_idx))
        mean.on_train_batch_end(trainer, SimpleNamespace(network=network), None, None, batch_idx)
        if resumed:
            state, mean = mean.state_dict(), kept(tmp_path / "mean.safetensors", count=3)
            mean.load_state_dict(state)
    mean.save(network)
    assert AdaMLP.load(mean.path).layers[2].bias.tolist() == [7.0, 7.0]  # of 5, 7 and 9: each second window is a step


def test_the_last_layer_of_a_curriculum_begins_small(monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)
    recipes = runpy.run_path(str(EXAMPLES / "recipes.py"))["RECIPES"]
    data = [(torch.rand(200, 28, 28), torch.arange(200) % 10)]
    small, whole = (recipes[name](data, 0) for name in ("lopt_a_8x8", "paper"))
    assert [task.sizes for task, _ in small.tasks] == [(64, 32, 10)]
    for index, factor in enumerate((1.0, 1.0, 0.1)):
        torch.testing.assert_close(small.network.layers[index].weight, factor * whole.network.layers[index].weight)


def test_the_recipe_of_lagg_a_begins_at_lopt_a(monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)
    module = runpy.run_path(str(EXAMPLES / "recipes.py"))
    short = partial(module["Evaluation"], num_rounds=1)
    monkeypatch.setitem(module["from_lopt_a"].__globals__, "Evaluation", short)
    recipe = module["RECIPES"]["lagg_a_28x28_late"]([(torch.rand(100, 28, 28), torch.arange(100) % 10)], 0)
    start = AdaMLP.bundled("lopt_a").layers[0].weight
    assert recipe.network.inputs == recipe.tasks[0][1].num_workers == 8
    assert torch.equal(recipe.network.layers[0].weight[:, 8:], start[:, 1:])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--recipe", "default"], "needs two sets of images, not 1"),
        (["--data", "nowhere"], "There is no folder nowhere"),
        (["--data", "cifar10"], "There is no folder cifar10"),
    ],
)
def test_meta_training_names_the_data_that_it_misses(tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("torchvision.datasets.FashionMNIST", None)  # nothing is downloaded
    with pytest.raises(SystemExit, match=message):
        run_here("meta_train.py", *arguments)
    assert not [*tmp_path.iterdir()]


OWN = """
import lightning as L
import torch
from lightning_lopt.meta import LightningTask

class Line(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(4, 4)

    def training_step(self, batch, batch_idx):
        return torch.nn.functional.mse_loss(self.layer(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05)

def task():
    x = torch.rand(200, 4, generator=torch.Generator().manual_seed(0))
    return LightningTask(Line, (x, x.flip(1)), batch_size=8)
"""


@pytest.mark.processes  # it asks git for the commit
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("constants", [False, True])
def test_a_controller_for_a_task_of_ones_own(tmp_path: Path, capsys, monkeypatch, constants):
    monkeypatch.syspath_prepend(EXAMPLES)
    controllers = importlib.import_module("controllers")
    monkeypatch.setattr(controllers, "ROUNDS", 6)
    monkeypatch.setattr(controllers, "RUNS", 4)
    file, out = tmp_path / "own.py", tmp_path / "out"
    file.write_text(OWN)
    more = ["--constants"] if constants else []
    run_here("meta_train.py", "--recipe", "own", "--task", file, "--steps", 5, "--pairs", 2, "--out", out, *more)
    output = capsys.readouterr().out
    logs = {"averaging": 0.0}
    for name in ("LearnedOptimizer", "BlendedNesterov", "ControlledNesterov", "fitted"):
        found = re.search(rf"^{name} +\d\.\d+ +([+-]\d\.\d+) ± ", output, re.MULTILINE)
        assert found, output
        logs[name] = float(found[1])
    assert logs["BlendedNesterov"] < -0.05  # averaging is slow here
    used = re.search(r"(Use (\w+)|fitted controller is ahead).*: \w+\(", output)
    assert used, output
    assert used[2] in (None, min((name for name in logs if name != "fitted"), key=lambda name: logs[name]))
    loaded = ControlledNesterov([torch.zeros(1)], controller=out / "controller.safetensors").controller
    assert loaded.card["meta_iterations"] == 5
    bundled = Controller.bundled()
    assert torch.allclose(loaded.weight, bundled.weight, rtol=1e-3, atol=1e-4) == constants
    assert not torch.allclose(loaded.bias, bundled.bias, atol=1e-3)
    with pytest.raises(SystemExit):
        run_here("meta_train.py", "--recipe", "own", "--task", file, "--out", out)
    assert "holds the weights of another run" in capsys.readouterr().err


def test_a_file_without_a_task_is_named(tmp_path: Path, monkeypatch):
    load_own = _functions("controllers.py", monkeypatch)["load_own"]
    file = tmp_path / "empty.py"
    file.write_text("")
    with pytest.raises(SystemExit, match=r"must define a function task\(\)"):
        load_own(file)
    file.write_text("task = object")
    with pytest.raises(SystemExit, match="must also define local"):
        load_own(file)


def test_the_tasks_of_the_controller_are_of_all_kinds(monkeypatch):
    recipes = _functions("recipes.py", monkeypatch)
    images = torch.randint(256, (300, 28, 28), dtype=torch.uint8), torch.arange(300) % 10
    tasks = recipes["controller_tasks"]([images, images])
    names = [str(task) for task, _ in tasks]
    for kind in ("VisionTransformer", "LanguageModel", "autoencoder 64-16-64", "autoencoder 256-32-256"):
        assert any(kind in name for name in names)
    assert {training.optimizer.kind for _, training in tasks} == {"sgd", "momentum", "adamw", "muon"}
    for task, training in tasks:
        generator = torch.Generator().manual_seed(0)
        assert task.loss(training.init(task, generator), task.batch(1, generator)).isfinite().all()


@pytest.mark.parametrize("argument", ["--steps", "--local-steps", "--workers", "--lora", "--lr"])
def test_counts_are_positive(tmp_path, capsys, argument):
    with pytest.raises(SystemExit):
        run_here("finetune_lm.py", argument, 0, "--out", tmp_path / "out")
    assert f"{argument}: 0 is not a positive number" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
