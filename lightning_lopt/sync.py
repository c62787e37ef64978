"""One synchronisation: the merge rule that every method here shares.

    g = anchor - mean_i y_i        averaged pseudo-gradient, a gradient's sign
    anchor <- Outer(anchor, g)     plain averaging: anchor <- mean_i y_i, computed as such
    y_i    <- anchor

The anchor (the global parameters) and the pseudo-gradient are float32 (float64 for float64 parameters).
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_lopt.buffers import Buffers, maxima
from lightning_lopt.comm import Communicator, digest
from lightning_lopt.packing import Tracked, Wire, pack, size
from lightning_lopt.report import RoundReport

OuterFactory = Callable[[Any], Optimizer]
EvalWeights = Literal["anchor", "mean"]


class Sync:
    """Anchor, outer optimizer and buffers of one worker, and the exchange with the others.

    Creating one checks that all workers have the same model and gives them the parameters and buffers of rank 0.

    Args:
        model: its buffers travel too: floating-point ones that some worker changed are averaged, of integers the
            maximum is taken.
        optimizer: the local optimizer, whose parameters are synchronised.
        outer_optimizer: makes a `torch.optim.Optimizer` from parameter groups of anchors; None averages.
        comm: the collectives.

    Attributes:
        outer: the outer optimizer, None for averaging. Its groups mirror the local optimizer's; before each step they
            hold `round_idx`, `local_steps` and `local_lr`.

    Raises:
        ValueError: nothing to train, parameters that are not dense and real, or an outer optimizer that belongs to
            another number of workers.
        DisagreementError: the workers' models differ.
    """

    def __init__(
        self, model: nn.Module, optimizer: Optimizer, outer_optimizer: OuterFactory | None, comm: Communicator
    ) -> None:
        self._groups = [[Tracked(p) for p in group["params"]] for group in optimizer.param_groups]
        if not any(t.param.requires_grad for t in self._all()):
            raise ValueError(
                "There is nothing to train: the local optimizer holds no parameter with requires_grad=True."
            )
        self._optimizer = optimizer
        self._comm = comm
        self._device = next(t.param.device for t in self._all())
        self._swapped: list[tuple[Tensor, Tensor]] = []
        named = [*model.named_parameters(), *model.named_buffers()]
        comm.check_same_shapes(named, self._device)
        comm.broadcast_([tensor for _, tensor in named])
        for t in self._all():
            if t.param.requires_grad:
                t.adopt(t.param)
        self._buffers = Buffers(model)
        self.outer: Optimizer | None = None
        if outer_optimizer is not None:
            self.outer = outer_optimizer([{"params": [t.anchor for t in group]} for group in self._groups])
            _check_num_workers(self.outer, comm.num_workers)
        comm.agree(self._device, {"the outer optimizer (as a digest)": _digest(self.outer)})

    def _all(self) -> Iterator[Tracked]:
        for group in self._groups:
            yield from group

    def _follow_optimizer(self) -> list[Tracked]:
        """All parameters in training, those that were unfrozen or added since the last sync included.

        Newcomers have no common value yet; their anchor is 0 until their first sync, which averages them.
        """
        for group in self._optimizer.param_groups[len(self._groups) :]:
            self._groups.append([Tracked(p) for p in group["params"]])
            if self.outer is not None:
                self.outer.add_param_group({"params": [t.anchor for t in self._groups[-1]]})
        tracked = [t for t in self._all() if t.known or t.param.requires_grad]
        for t in tracked:
            if not t.known:
                t.anchor.data = torch.zeros_like(t.param, dtype=t.dtype)
        return tracked

    @torch.no_grad()
    def run(self, round_idx: int, local_steps: int) -> RoundReport:
        """Synchronise all workers.

        Args:
            round_idx: index of the round that ends, the same on all workers.
            local_steps: H of that round, likewise.

        Raises:
            DisagreementError: the workers do not agree on the round, its steps, or the parameters in training.
        """
        start, bytes_before = time.perf_counter(), self._comm.bytes_sent
        tracked = self._follow_optimizer()
        equal = {"round": round_idx, "local steps": local_steps, "parameters in training": size(tracked)}
        changed = self._agree(equal)
        wires, finish = self._launch(tracked, changed)
        launched = time.perf_counter()
        workers = finish()
        received = time.perf_counter()
        local_square = sum(float(wire.square) for wire in wires)
        if self.outer is None:
            square, fell_back = _average(wires), False
        else:
            square, fell_back = self._outer_step(self.outer, wires, workers, round_idx, local_steps)
        for t in tracked:
            t.known = True
            t.param.copy_(t.anchor)
        done = time.perf_counter()
        self._buffers.remember()
        return RoundReport(
            round_idx=round_idx,
            local_steps=local_steps,
            pseudo_grad_norm=math.sqrt(square),
            drift=math.sqrt(max(local_square - square, 0.0)),
            bytes_sent=self._comm.bytes_sent - bytes_before,
            transfer_seconds=received - launched,
            outer_seconds=done - received,
            sync_seconds=time.perf_counter() - start,
            fell_back=fell_back,
        )

    def _launch(
        self, tracked: list[Tracked], changed: list[Tensor]
    ) -> tuple[list[Wire], Callable[[], list[Tensor] | None]]:
        """Pack and start the exchange of parameters and buffers.

        Returns:
            The wires, which hold means once the returned function was called; that returns each wire's content on
            every worker [K, n] if the outer optimizer needs it. The module's own buffers are then up to date.
        """
        wires = pack(tracked, changed, differences=self.outer is not None)
        gather = getattr(self.outer, "needs_worker_grads", False)
        waits = [] if gather else [self._comm.start_mean(wire.flat) for wire in wires]

        def finish() -> list[Tensor] | None:
            workers = [self._comm.gather(wire.flat) for wire in wires] if gather else None
            for wait in waits:
                wait()
            for wire, stacked in zip(wires, workers or (), strict=False):
                torch.mean(stacked, 0, out=wire.flat)
            for wire in wires:
                for buffer, view in zip(wire.buffers, wire.buffer_views, strict=True):
                    buffer.copy_(view)
            for buffer, value in maxima(changed, self._comm):
                buffer.copy_(value)
            return workers

        return wires, finish

    def _agree(self, equal: dict[str, int]) -> list[Tensor]:
        """Agree with the other workers; the buffers that any of them changed since the last sync."""
        return self._buffers.select(self._comm.agree(self._device, equal, self._buffers.changed()))

    def _outer_step(
        self, outer: Optimizer, wires: list[Wire], workers: list[Tensor] | None, round_idx: int, local_steps: int
    ) -> tuple[float, bool]:
        """Step the anchors; the squared norm of the pseudo-gradient, and whether averaging replaced the step."""
        for index, wire in enumerate(wires):
            per_worker = None if workers is None else wire.split(workers[index])
            for i, (t, grad) in enumerate(zip(wire.tracked, wire.views, strict=True)):
                if not t.known:  # from an anchor of 0, minus the pseudo-gradient is the mean
                    t.anchor.copy_(-grad)
                    grad.zero_()
                    continue
                t.anchor.grad = grad
                if per_worker is not None:
                    t.anchor.worker_grads = per_worker[i]  # pyright: ignore[reportAttributeAccessIssue]
        for group, local in zip(outer.param_groups, self._optimizer.param_groups, strict=True):
            group.update(round_idx=round_idx, local_steps=local_steps, local_lr=float(local.get("lr", math.nan)))
        square = sum(float(view.square().sum()) for wire in wires for view in wire.views)
        limit = getattr(outer, "max_update_ratio", None)
        before = [_parked_anchor(t) for wire in wires for t in wire.tracked] if limit is not None else []
        outer.step()
        refused = limit is not None and self._refuse(outer, wires, before, limit, square, round_idx)
        for t in self._all():
            t.anchor.grad = None
            if hasattr(t.anchor, "worker_grads"):
                del t.anchor.worker_grads  # pyright: ignore[reportAttributeAccessIssue]
        return square, refused

    def _refuse(
        self, outer: Optimizer, wires: list[Wire], before: list[Tensor], limit: float, square: float, round_idx: int
    ) -> bool:
        """Average instead if the outer step is not finite or over `limit` times the averaged one; say so."""
        pairs = [(t, view) for wire in wires for t, view in zip(wire.tracked, wire.views, strict=True)]
        update = sum(float((t.anchor - old).square().sum()) for (t, _), old in zip(pairs, before, strict=True))
        if math.isfinite(update) and update <= limit**2 * square:
            return False
        for (t, grad), old in zip(pairs, before, strict=True):
            torch.sub(old, grad, out=t.anchor)
        if not math.isfinite(update):
            outer.state.clear()
        if self._comm.rank == 0:
            warnings.warn(
                f"Round {round_idx}: the outer step was refused and the workers were averaged instead. Its norm is "
                f"{math.sqrt(update):.3g}, that of the averaged pseudo-gradient {math.sqrt(square):.3g}; "
                + _advice(math.isfinite(update), math.isfinite(square), limit),
                stacklevel=2,
            )
        return True

    @torch.no_grad()
    def swap_in(self, weights: EvalWeights) -> None:
        """Put the global weights and their buffers into the model, until `swap_out`.

        Args:
            weights: `"anchor"`, the last synced ones, needs no communication; `"mean"` averages the workers as they
                are now, and all of them must call it.
        """
        if self._swapped:
            return
        if weights == "anchor":
            new = [(t.param, t.anchor) for t in self._all() if t.known]
            new += self._buffers.pairs()
        else:
            tracked = [t for t in self._all() if t.known]
            changed = self._agree({"parameters in training": size(tracked)})
            wires = pack(tracked, changed, differences=False)
            for wait in [self._comm.start_mean(wire.flat) for wire in wires]:
                wait()
            new = [(t.param, view) for wire in wires for t, view in zip(wire.tracked, wire.views, strict=True)]
            new += [pair for wire in wires for pair in zip(wire.buffers, wire.buffer_views, strict=True)]
            new += maxima(changed, self._comm)
        for target, value in new:
            self._swapped.append((target, target.data))
            target.data = value.to(target.dtype, copy=weights == "anchor")

    def swap_out(self) -> None:
        """Give the model this worker's own weights back."""
        self.exchange()
        self._swapped.clear()

    def exchange(self) -> None:
        """Put this worker's own weights into the model and those swapped in aside, or the reverse."""
        for i, (target, aside) in enumerate(self._swapped):
            self._swapped[i] = target, target.data
            target.data = aside

    @torch.no_grad()
    def restore_anchor(self) -> None:
        """Go back to the last synced weights and buffers."""
        for t in self._all():
            if t.known:
                t.param.copy_(t.anchor)
        for buffer, synced in self._buffers.pairs():
            buffer.copy_(synced)

    @property
    def swapped(self) -> bool:
        return bool(self._swapped)

    def state_dict(self) -> dict[str, Any]:
        """Anchors, the buffers of the last sync and the state of the outer optimizer."""
        return {
            "anchors": [t.anchor.clone() if t.known else None for t in self._all()],
            "buffers": self._buffers.synced_state(),
            "outer": None if self.outer is None else self.outer.state_dict(),
            "outer_kind": type(self.outer).__name__,
        }

    def local_state(self) -> dict[str, Any]:
        """This worker's own parameters and buffers, which differ from the others' in mid-round."""
        return {
            "params": [t.param.detach().clone() if t.known else None for t in self._all()],
            "buffers": self._buffers.own_state(),
        }

    @torch.no_grad()
    def load_local_state(self, state: dict[str, Any]) -> None:
        """Restore what `local_state` returned."""
        for t, param in zip(self._all(), state["params"], strict=True):
            if param is not None:
                t.param.copy_(param)
        self._buffers.load_own_state(state["buffers"])

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned, for the same parameters in the same groups.

        Raises:
            ValueError: another number of parameters, or another kind of outer optimizer (one or none).
        """
        self._follow_optimizer()
        own = list(self._all())
        kind = type(self.outer).__name__
        if len(own) != len(state["anchors"]) or kind != state["outer_kind"]:
            raise ValueError(
                f"This checkpoint holds {len(state['anchors'])} parameters and the outer optimizer "
                f"{state['outer_kind']}; here there are {len(own)} parameters and {kind}. Resume with the "
                "strategy that wrote it, or start from its weights alone."
            )
        for t, anchor in zip(own, state["anchors"], strict=True):
            if anchor is not None:
                t.adopt(anchor.to(t.param.device))
        self._buffers.load_synced_state(state["buffers"])
        if self.outer is not None:
            self.outer.load_state_dict(state["outer"])


def _advice(finite_update: bool, finite_average: bool, limit: float) -> str:
    if finite_update:
        return f"more than {limit:g} times as much is not trusted."
    if finite_average:
        return "the outer optimizer starts afresh."
    return (
        "a worker has diverged, and so the average is not finite either: the model is lost. Go back to a checkpoint "
        "with a lower local learning rate or clipped gradients, or try LocalSGD."
    )


def _digest(outer: Optimizer | None) -> int:
    """An integer that differs for outer optimizers of another kind, with other settings or another network."""
    settings = [] if outer is None else [{k: v for k, v in g.items() if k != "params"} for g in outer.param_groups]
    return digest(repr((type(outer).__name__, settings, getattr(outer, "fingerprint", None))))


def _parked_anchor(t: Tracked) -> Tensor:
    """A copy of the anchor, in the parameter itself where it fits: its local value has been sent."""
    return t.param.detach().copy_(t.anchor) if t.param.dtype == t.dtype else t.anchor.clone()


def _average(wires: list[Wire]) -> float:
    """The anchors become the means; the squared norm of the pseudo-gradient that this amounts to."""
    square = 0.0
    for wire in wires:
        for t, mean in zip(wire.tracked, wire.views, strict=True):
            square += float((t.anchor - mean).square().sum())
            t.anchor.copy_(mean)
    return square


def _check_num_workers(outer: Optimizer, num_workers: int) -> None:
    needed = getattr(outer, "num_workers", None)
    if needed not in (None, num_workers):
        raise ValueError(
            f"This outer optimizer's network belongs to {needed} workers, but there are {num_workers}. Use as many "
            "workers, weights meta-trained for this number, or weights with inputs='mean', which take any number."
        )
