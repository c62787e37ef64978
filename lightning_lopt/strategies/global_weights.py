"""Shows the global weights in the module while hooks and callbacks evaluate, save or export it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn

from lightning_lopt.strategies import host
from lightning_lopt.strategies.errors import explain_lost_worker
from lightning_lopt.strategies.modes import OptimizerModes
from lightning_lopt.sync.sync import EvalWeights

if TYPE_CHECKING:
    from lightning_lopt.strategies.local_sgd import LocalSGD

ROUNDING = 4  # in units of a type's eps: the error of an operation followed by its inverse


class GlobalWeights:
    """Puts the global weights into the module, and this worker's own back.

    During a validation it keeps a copy of the weights that it has put in. If the module's weights differ from it at the
    end, a hook has swapped in weights of its own during the validation and will swap them out after it, or has done
    the reverse: either would spoil the training.

    Args:
        strategy: Strategy of the fit.
        modes: Modes of its optimizers.
        weights: Weights that are shown: `"anchor"` or `"mean"`.

    Attributes:
        weights: Weights that are shown.
    """

    def __init__(self, strategy: LocalSGD, modes: OptimizerModes, weights: EvalWeights) -> None:
        self._strategy, self._modes = strategy, modes
        self.weights: EvalWeights = weights
        self._wanted = False  # where a worker's own are the global ones, they are not replaced
        self._watches = False
        self._put_in: dict[str, tuple[nn.Parameter, Tensor]] = {}

    def begin_validation(self) -> None:
        """Show the global weights until `end_validation`."""
        self._wanted = self._watches = True
        self._show()

    def end_validation(self) -> None:
        """Give the module this worker's own weights back.

        Raises:
            MisconfigurationException: Weights that were shown have been changed, and not changed back.
        """
        self._wanted = self._watches = False
        self._hide()

    def abandon(self) -> None:
        """Give the module this worker's own weights back after an exception, in the optimizers' training mode."""
        self._wanted = self._watches = False
        self._put_in = {}
        self._hide()
        self._modes.train()

    @contextmanager
    def shown(self) -> Iterator[None]:
        """Show the global weights for a while; all workers must enter this."""
        rounds = self._strategy.rounds
        if rounds is None or rounds.sync.swap.active or self._wanted:
            yield
            return
        before, self._wanted = self._wanted, True
        self._show()
        try:
            yield
        finally:
            self._wanted = before
            self._hide()

    @contextmanager
    def moving(self) -> Iterator[None]:
        """Give the module this worker's own weights while they are moved; then show the new global ones."""
        self._hide()
        yield
        if self._strategy.rounds is not None:
            self._strategy.rounds.undo_rounding()
        if self._wanted:
            self._show()

    def _show(self) -> None:
        strategy, rounds = self._strategy, self._strategy.rounds
        trainer = host.trainer_of(strategy.lightning_module)
        if rounds is None or trainer is None or trainer.state.fn != TrainerFn.FITTING or trainer.state.finished:
            return
        moved = self._modes.evaluating and not trainer.sanity_checking
        weights: EvalWeights = "mean" if moved else self.weights
        if weights == "mean" and strategy.num_workers == 1:
            return  # it is this worker's own
        parameters = {} if strategy.has_islands else dict(trainer.lightning_module.named_parameters())
        own = {name: p.data_ptr() for name, p in parameters.items()}
        with explain_lost_worker(strategy.timeout):
            rounds.swap_in("anchor" if trainer.interrupted else weights, moved=moved)
        if self._watches:
            replaced = {name: p for name, p in parameters.items() if p.data_ptr() != own[name]}
            self._put_in = {name: (p, p.detach().clone()) for name, p in replaced.items()}

    def _hide(self) -> None:
        changes = {name: change for name, pair in self._put_in.items() if (change := _change(*pair))}
        self._put_in = {}
        if self._strategy.rounds is not None:
            self._strategy.rounds.swap_out()
        if not changes:
            return
        name = max(changes, key=lambda name: changes[name])
        others = f" and {len(changes) - 1} more" if len(changes) > 1 else ""
        raise MisconfigurationException(
            f"During validation {name}{others} was changed by up to {changes[name]:.2g}, and not changed back. From "
            "on_validation_model_eval to on_validation_model_train the module shows the global weights of all workers, "
            "which are then removed: what hooks write there is lost, and what they read there would overwrite this "
            "worker's own weights. Store and restore weights (an EMA, for example) both between these two hooks, or "
            "both outside of them; change weights for good outside, in on_train_epoch_end for example. "
            "EMAWeightAveraging is an EMA of all workers."
        )


def _change(now: nn.Parameter, before: Tensor) -> float:
    """Return the largest change of a parameter, 0 if it is rounding."""
    values = now.detach()
    if values.shape != before.shape:
        return float("inf")
    if torch.equal(values, before):
        return 0.0
    rounding = ROUNDING * torch.finfo(before.dtype).eps * before.abs().nan_to_num(0, 0, 0).max().item()
    if torch.allclose(values, before, rtol=0, atol=rounding, equal_nan=True):
        return 0.0
    return (values - before).abs().nan_to_num(float("inf")).max().item()
