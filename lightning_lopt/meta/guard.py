"""Which workers the rounds of simulated runs leave out, by the strategies' rule."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_lopt.functional.outliers import Norms, outliers
from lightning_lopt.meta.base import Tensors
from lightning_lopt.meta.local import LocalState


class Guard:
    """Leaves out of each round the workers whose pseudo-gradients are `outliers`, as the strategies do.

    They take the value of the others' mean and forget their optimizer's state. If all are left out they get the anchor.

    Args:
        num_runs: P >= 1.
        num_workers: K >= 1.
        device: of what is remembered.

    Attributes:
        last: norms in the round before, [P, K]; 0 for those left out, and before the first.
        peak: the largest of earlier rounds, as `Norms` has it, [P].
        left_out: how many workers the rounds of each run left out so far.
    """

    def __init__(self, num_runs: int, num_workers: int, device: torch.device | None = None) -> None:
        self.last = torch.zeros(num_runs, num_workers, dtype=torch.float64, device=device)
        self.peak = torch.zeros(num_runs, dtype=torch.float64, device=device)
        self.left_out = [0] * num_runs

    def check(self, anchor: Tensors, workers: Tensors, state: LocalState) -> list[int]:
        """Mend a round's workers and their optimizers' state in place.

        Args:
            anchor: {[P, *S]}.
            workers: {[P, K, *S]}.
            state: of P * K replicas.

        Returns:
            The runs all of whose workers are left out, whose outer step is to be skipped.
        """
        squares = [_squares(a.unsqueeze(1) - workers[name]) for name, a in anchor.items()]
        norms = torch.stack(squares).sum(0).sqrt().tolist()
        last, peak = self.last.tolist(), self.peak.tolist()
        skipped = []
        for run, own in enumerate(norms):
            before = Norms(last[run], peak[run])
            left_out = outliers(own, before)
            kept = [k for k in range(len(own)) if k not in left_out]
            if kept:
                last[run], peak[run] = before.then([0.0 if k in left_out else norm for k, norm in enumerate(own)])
            else:
                skipped.append(run)
            if left_out:
                self.left_out[run] += len(left_out)
                for name, w in workers.items():
                    w[run, left_out] = w[run, kept].mean(0) if kept else anchor[name][run]
                state.forget([run * len(own) + k for k in left_out])
        self.last.copy_(torch.tensor(last, dtype=torch.float64))
        self.peak.copy_(torch.tensor(peak, dtype=torch.float64))
        return skipped


def _squares(tensor: Tensor) -> Tensor:
    """[P, K, *S] -> [P, K]."""
    return torch.linalg.vector_norm(tensor.reshape(*tensor.shape[:2], -1), dim=2).square()
