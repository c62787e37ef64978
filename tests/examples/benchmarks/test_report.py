"""Files of rows: the end of a killed run is tolerated, and any other broken line is named."""

from __future__ import annotations

import pytest

from examples.benchmarks import __main__ as bench
from examples.benchmarks.report import append_rows, read_rows
from examples.benchmarks.wire import wire

ROWS = [{"method": "local_sgd", "losses": [2.0, 1.0]}, {"method": "learned", "losses": [2.0, 0.5]}]


@pytest.fixture
def path(tmp_path):
    append_rows(tmp_path / "rows.jsonl", ROWS)
    return tmp_path / "rows.jsonl"


def test_a_last_line_that_is_cut_off_is_left_out_with_a_note(path, capsys):
    whole = path.read_text()
    first = whole.index("\n") + 1
    for end in range(first + 1, len(whole) - 1):
        path.write_text(whole[:end])
        assert read_rows(path) == ROWS[:1]
        assert capsys.readouterr().err.count("the last line is incomplete") == 1
    path.write_text(whole[:-1])  # whole, but for the end of the line
    assert read_rows(path) == ROWS
    assert not capsys.readouterr().err


@pytest.mark.parametrize("cut", [1, 5])
def test_new_rows_begin_a_line_of_their_own(path, cut, capsys):
    path.write_text(path.read_text()[:-cut])
    append_rows(path, ROWS[:1])
    assert read_rows(path) == [*(ROWS if cut == 1 else ROWS[:1]), ROWS[0]]
    assert ("is removed" in capsys.readouterr().err) == (cut > 1)


@pytest.mark.parametrize("line", ["", '{"method": "lo', "3", '{"rows": 2}'])
def test_other_broken_lines_are_named(path, line):
    first, second = path.read_text().splitlines()
    path.write_text(f"{first}\n{line}\n{second}\n")
    with pytest.raises(ValueError, match=r"rows.jsonl, line 2, is not a row"):
        bench.main(["plot", str(path)])


@pytest.mark.parametrize("content", ["", '{"method": "lo'])
def test_a_file_without_rows_is_named(path, content):
    path.write_text(content)
    with pytest.raises(ValueError, match=r"rows.jsonl holds no rows"):
        bench.main(["plot", str(path)])


def test_a_tuning_that_was_killed_before_its_last_stage_is_named(path):
    path.write_text('{"method": "diloco", "losses": [1.0], "stage": "first"}\n')
    with pytest.raises(ValueError, match="nothing of the last stage"):
        bench.main(["plot", str(path)])


def test_the_rounds_of_a_wire_follow_its_setup(path):
    with pytest.raises(ValueError, match="does not hold a setup"):
        wire.read(path)
