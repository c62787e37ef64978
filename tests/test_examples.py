"""The examples run as a user would run them: the table and the plot are there, and no process is left."""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path

import pytest

from lightning_lopt import AdaMLP, WeightsError
from tests.processes import run_command

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
METHODS = ["LocalSGD", "SlowMo", "DiLoCo", "LearnedLocalSGD"]
TINY = ["--steps", "4", "--local-steps", "2"]


def run(command: list[str], limit: float = 240) -> str:
    return "".join(run_command([sys.executable, *command], limit, {"OMP_NUM_THREADS": "1", "MPLBACKEND": "agg"}))


def check_report(output: str, methods: list[str], rounds: int, plot: Path) -> None:
    """The table has a row per method with as many rounds, and the plot is a PNG."""
    for method in methods:
        assert re.search(rf"^{method}  +{rounds}  ", output, re.MULTILINE), f"no row for {method}\n{output}"
    assert plot.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(("script", "saved"), [("finetune_vit", "vit_backbone.pt"), ("finetune_lm", "gpt.pt")])
def test_fine_tuning(script: str, saved: str, tmp_path: Path):
    output = run([str(EXAMPLES / f"{script}.py"), *TINY, "--out", str(tmp_path)])
    assert "Phase 1" in output
    assert (tmp_path / saved).is_file()
    check_report(output, METHODS, rounds=2, plot=tmp_path / f"{script}.png")


@pytest.mark.parametrize("launcher", [[], ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]])
def test_plain_loop(launcher: list[str], tmp_path: Path):
    output = run([*launcher, str(EXAMPLES / "plain_loop.py"), *TINY, "--out", str(tmp_path)])
    check_report(output, ["average", "slow momentum", "learned"], rounds=2, plot=tmp_path / "plain_loop.png")


def test_meta_training(tmp_path: Path):
    output = run([str(EXAMPLES / "meta_train.py"), "--steps", "1", "--out", str(tmp_path)])
    for curve in ("averaging", "diloco", "before meta-training", "learned"):
        assert re.search(rf"^{curve} +final loss 0\.\d+$", output, re.MULTILINE), output
    assert AdaMLP.load(tmp_path / "network.safetensors").card["meta_iterations"] == 1
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")
def test_meta_training_goes_on_from_an_export_and_overwrites_nothing(tmp_path: Path, monkeypatch, capsys):
    def main(*arguments: object) -> None:
        monkeypatch.setattr(sys, "argv", ["meta_train.py", *map(str, arguments)])
        runpy.run_path(str(EXAMPLES / "meta_train.py"), run_name="__main__")

    def refused(*arguments: object) -> str:
        with pytest.raises((SystemExit, WeightsError)) as error:
            main(*arguments)
        return f"{error.value} {capsys.readouterr().err}"

    monkeypatch.syspath_prepend(EXAMPLES)
    monkeypatch.setattr("torch.set_num_threads", lambda count: None)
    first, second, export = tmp_path / "first", tmp_path / "second", tmp_path / "first" / "export.safetensors"
    main("--out", first, "--steps", 1)
    main("--out", second, "--steps", 3, "--init", export)
    assert AdaMLP.load(second / "network.safetensors").card["meta_iterations"] == 3
    content = export.read_bytes()
    assert "holds the weights of another run" in refused("--out", first, "--steps", 2)
    assert export.read_bytes() == content
    third = "--out", tmp_path / "third", "--init"
    assert "has 1 meta-iterations already" in refused(*third, export, "--steps", 1)
    assert "is not a file that fits here" in refused(*third, first / "network.safetensors")
