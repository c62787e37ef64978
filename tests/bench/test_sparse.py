"""The benchmark of choosing and coding coordinates, on a small model."""

from __future__ import annotations

import json

from lightning_lopt.bench import __main__ as bench
from lightning_lopt.bench import sparse


def test_every_job_works():
    for name, (prepare, work) in sparse.jobs(10_000).items():
        prepare()
        assert work() is not None, name


def test_the_command_prints_a_table_and_writes_json(monkeypatch, capsys, tmp_path):
    first = next(iter(sparse.jobs(1)))
    monkeypatch.setattr(sparse, "jobs", lambda parameters: {first: None})
    monkeypatch.setattr(sparse, "ProcessPoolExecutor", _Here)
    monkeypatch.setattr(sparse, "measure_one", lambda name, *sizes: {"what": name, "ms": float(sizes[0])})
    path = tmp_path / "result.json"
    bench.main(["sparse", "--parameters", "1000", "--json", str(path)])
    assert first in capsys.readouterr().out
    assert json.loads(path.read_text())["rows"] == [{"what": first, "ms": 1000.0}]


class _Here:
    """An executor without a process."""

    def __init__(self, *_, **__):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def submit(self, function, *args):
        class Done:
            def result(self):
                return function(*args)

        return Done()
