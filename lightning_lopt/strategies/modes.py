"""Optimizers with two modes: schedule-free ones, whose weights in training are not those to evaluate."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

from torch.optim import Optimizer

from lightning_lopt.strategies.virtual import ProcessWorkers

METHODS = ("eval", "train")


class OptimizerModes:
    """Applies `eval()` and `train()` of optimizers to the workers' own weights, whenever a hook calls them.

    `eval()` changes the weights, and `train()` changes them back. If one of the two were applied to global weights that
    are shown in the module, and the other to the worker's own, the worker's own would be wrong afterwards.

    Args:
        workers: Workers of this process; the weights of all are moved.
    """

    def __init__(self, workers: ProcessWorkers) -> None:
        self._workers = workers
        self._replaced: list[Any] = []  # objects with methods of our own
        self._evaluating: dict[Optimizer, Callable[[], object]] = {}  # with the methods that lead back
        self._optimizers: list[Optimizer] = []
        self._own_weights: Callable[[], AbstractContextManager[None]] | None = None

    @property
    def exist(self) -> bool:
        """Whether any optimizer has modes."""
        return bool(self._optimizers)

    @property
    def evaluating(self) -> bool:
        """Whether an optimizer is in its mode for evaluation, by the calls since `attach`."""
        return bool(self._evaluating)

    def attach(
        self,
        optimizers: Sequence[Optimizer],
        wrappers: Sequence[Any],
        own_weights: Callable[[], AbstractContextManager[None]],
    ) -> None:
        """Take over the methods of optimizers that have them.

        Args:
            optimizers: Optimizers of a fit.
            wrappers: Lightning's wrapper of each.
            own_weights: Context in which the module has the worker's own weights.
        """
        self.detach()
        self._own_weights = own_weights
        for optimizer, wrapper in zip(optimizers, wrappers, strict=True):
            if not all(callable(getattr(optimizer, name, None)) for name in METHODS):
                continue
            self._optimizers.append(optimizer)
            originals = {name: getattr(optimizer, name) for name in METHODS}
            for name in METHODS:
                for thing in {id(thing): thing for thing in (optimizer, wrapper)}.values():
                    setattr(thing, name, partial(self._change, optimizer, name, originals))
            self._replaced += [optimizer, wrapper]

    def detach(self) -> None:
        """Give the optimizers their own methods back."""
        for thing in self._replaced:
            for name in METHODS:
                vars(thing).pop(name, None)
        self._replaced, self._optimizers, self._evaluating = [], [], {}

    def train(self) -> None:
        """Bring all optimizers back to their mode for training."""
        for back in [*self._evaluating.values()]:
            back()

    @contextmanager
    def in_training(self) -> Iterator[None]:
        """Keep all optimizers in their mode for training during a sync, then restore the modes that they had."""
        evaluating = [*self._evaluating]
        self.train()
        yield
        for optimizer in evaluating:
            optimizer.eval()  # pyright: ignore[reportAttributeAccessIssue]

    def _change(
        self, optimizer: Optimizer, name: str, originals: dict[str, Callable[..., object]], *args: Any, **kwargs: Any
    ) -> None:
        assert self._own_weights is not None
        with self._own_weights():
            for _ in self._workers.turns():
                originals[name](*args, **kwargs)
            if name == "eval":
                self._evaluating[optimizer] = partial(self._change, optimizer, "train", originals)
            else:
                self._evaluating.pop(optimizer, None)
