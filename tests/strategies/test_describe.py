"""The repr of a strategy."""

from __future__ import annotations

import pytest

from lightning_lopt import LOSCAR, QSR, DiLoCo, Fragments, LearnedLocalSGD, LocalSGD, PowerSGD, SlowMo
from tests.strategies.support import trainer


@pytest.mark.parametrize(
    ("strategy", "shown"),
    [
        (LocalSGD(4, virtual_workers=2), "LocalSGD(K=2, H=4, sends 4 B/param/round)"),
        (LocalSGD(4), "LocalSGD(K=1, H=4, sends 0 B/param/round)"),
        (
            SlowMo(QSR(0.5, 2), virtual_workers=4),
            "SlowMo(K=4, H=QSR(alpha=0.5, base_steps=2, power=2.0, warmup_steps=0), "
            "outer_optimizer=SlowMomentum(lr=1.0, momentum=0.5), sends 6 B/param/round)",
        ),
        (
            LearnedLocalSGD(8, network="lagg_a_short", virtual_workers=8, sharded=True),
            "LearnedLocalSGD(K=8, H=8, outer_optimizer=LearnedOptimizer(network=AdaMLP(…)), sharded=True, "
            "sends 7 B/param/round)",
        ),
        (LocalSGD(9, compression=PowerSGD(2)), "LocalSGD(K=1, H=9, compression=PowerSGD(rank=2))"),
        (
            LOSCAR(64, density=0.1, overlap_steps=16, virtual_workers=2),
            "LOSCAR(K=2, H=64, density=0.1, overlap_steps=16, sends 0.4 B/param/round)",
        ),
        (
            DiLoCo(8, selection=Fragments(4), virtual_workers=2),
            "DiLoCo(K=2, H=8, outer_optimizer=SGD(lr=0.7, momentum=0.9, nesterov=True), "
            "selection=Fragments(num_fragments=4), sends 1 B/param/round)",
        ),
    ],
    ids=lambda value: value.split("(")[0] if isinstance(value, str) else None,
)
def test_shown_in_a_trainer(strategy, shown):
    trainer(strategy, 1)
    assert repr(strategy) == shown


def test_shown_before_the_trainer_knows_the_workers():
    assert repr(LocalSGD(4)) == "LocalSGD(H=4)"
