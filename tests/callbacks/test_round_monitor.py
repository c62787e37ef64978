"""What RoundMonitor logs, and its summary."""

from __future__ import annotations

import pytest
import torch

from lightning_lopt import LocalSGD, RoundMonitor
from tests.strategies.support import Classifier, loader, trainer


class _Refused(torch.optim.SGD):
    """Outer optimizer whose steps are always too large."""

    max_update_ratio = 1e-9

    def __init__(self, params) -> None:
        super().__init__(params, lr=1.0)


@pytest.mark.parametrize("overlap_steps", [0, 2])
def test_the_monitor_tells_waiting_from_transfer(overlap_steps):
    monitor = RoundMonitor()
    run = trainer(LocalSGD(4, overlap_steps=overlap_steps), 1, max_steps=12, callbacks=[monitor])
    run.fit(Classifier(seed=0), loader())
    pairs = [(row["rounds/waited_seconds"], row["rounds/transfer_seconds"]) for row in monitor.history]
    assert len(pairs) == 3
    assert [waited == transfer for waited, transfer in pairs] == [overlap_steps == 0] * 2 + [True]


def test_totals_of_the_monitor_begin_anew_with_each_fit():
    monitor = RoundMonitor()
    for _ in range(2):
        refusing = LocalSGD(12, outer_optimizer=_Refused)
        trainer(refusing, 1, max_epochs=1, callbacks=[monitor]).fit(Classifier(seed=0), loader())
    assert [row["rounds/fell_back"] for row in monitor.history] == [1, 2, 1, 2]
    assert [row["rounds/round"] for row in monitor.history] == [1, 2, 1, 2]


def test_a_fit_ends_with_a_summary_and_a_plot(tmp_path, caplog):
    caplog.set_level("INFO", logger="lightning.pytorch")
    monitor = RoundMonitor(plot=tmp_path / "rounds.png")
    strategy = LocalSGD(4, virtual_workers=2)
    trainer(strategy, 1, max_steps=12, callbacks=[monitor]).fit(Classifier(seed=0), loader())
    (summary,) = [record.getMessage() for record in caplog.records if "advice" in record.getMessage()]
    assert summary.startswith("3 rounds of 4 local steps on each of 2 workers")
    assert (tmp_path / "rounds.png").stat().st_size > 10_000


def test_a_fit_without_rounds_has_no_summary(caplog):
    caplog.set_level("INFO", logger="lightning.pytorch")
    trainer(LocalSGD(4), 1, max_steps=0, callbacks=[RoundMonitor()]).fit(Classifier(seed=0), loader())
    assert not [record for record in caplog.records if "advice" in record.getMessage()]


def test_a_plot_that_fails_does_not_fail_the_fit(tmp_path):
    monitor = RoundMonitor(plot=tmp_path / "rounds.nonsense")
    with pytest.warns(UserWarning, match=r"rounds\.nonsense was not drawn"):
        trainer(LocalSGD(4), 1, max_steps=4, callbacks=[monitor]).fit(Classifier(seed=0), loader())
