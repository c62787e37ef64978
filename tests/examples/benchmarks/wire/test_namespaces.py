"""Worker processes: a failure ends all of them, and a missing tool is named."""

from __future__ import annotations

import pytest

from examples.benchmarks.wire import namespaces


def test_a_worker_that_fails_ends_the_others():
    with pytest.raises(RuntimeError, match="Worker 1 of 2 failed"):
        namespaces.run_local(
            ["-c", "import os, sys, time; sys.exit(3) if os.environ['RANK'] == '1' else time.sleep(600)"], 2
        )


def test_a_missing_tool_is_named(tmp_path, monkeypatch):
    for tool in ("unshare", "sh", "nsenter", "ip"):
        (tmp_path / tool).touch(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(RuntimeError, match="No link can be limited here: not on the PATH: tc "):
        namespaces.run_linked(["-c", ""], 2, mbit=1)


def test_a_command_that_is_refused_is_a_reason(tmp_path, monkeypatch):
    (tmp_path / "unshare").write_text("#!/bin/sh\necho nobody may >&2\nexit 1\n")
    (tmp_path / "unshare").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert "nobody may" in (namespaces.why_not(["true"]) or "")
