"""Unrolls that live on from window to window: one antithetic pair per particle."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from lightning_lopt.functional.learned import Network
from lightning_lopt.meta.base import AbstractTask, Tensors
from lightning_lopt.meta.local import LocalTraining, half_cosine
from lightning_lopt.meta.outer import LearnedStep
from lightning_lopt.meta.simulation import Simulation
from lightning_lopt.meta.truncation import LogUniform

MetaLoss = Literal["local", "updated", "validation"]
VERSION = 4  # of the state


def seeded(*counters: int | str) -> torch.Generator:
    """Create a generator that depends on nothing but its arguments, so that no random state has to be saved."""
    digest = hashlib.sha256(repr(counters).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


class Particles:
    """Unrolls of one task, two for each particle, which share the start, the data and the local learning rate.

    A particle depends on its own random numbers alone, so it is the same whichever process simulates it.

    Args:
        task: Task that is trained on.
        training: Local training of the workers.
        num_particles: Number of particles P >= 1.
        unroll_length: Length T in rounds, drawn at each start of an unroll.
        meta_loss: Loss of a round: the mean local training loss (``"local"``), or that of the updated anchor on K fresh
            batches (``"updated"``), or on K validation batches (``"validation"``).
        seed: Seed of everything drawn.
        update: Kind of update of the networks.
        rank: Rank of this process, which holds its part of the particles.
        num_processes: Number of processes, which divides P.

    Attributes:
        simulation: Simulation of both unrolls of each particle here: θ + ε of all, then θ − ε of all.
        indices: Indices of the particles here among all P.

    Raises:
        ValueError: An argument out of its range, a loss that is not finite at the start, or a state of another task.
    """

    def __init__(
        self,
        task: AbstractTask,
        training: LocalTraining,
        num_particles: int,
        unroll_length: LogUniform,
        meta_loss: MetaLoss,
        seed: int,
        update: str = "published",
        rank: int = 0,
        num_processes: int = 1,
    ) -> None:
        if num_particles < 1:
            raise ValueError(f"num_particles must be at least 1, not {num_particles}.")
        if num_particles % num_processes:
            raise ValueError(
                f"{num_processes} processes cannot share num_particles={num_particles} evenly. Choose a multiple."
            )
        if meta_loss not in get_args(MetaLoss):
            raise ValueError(f"meta_loss must be one of {get_args(MetaLoss)}, not {meta_loss!r}.")
        self.task = task
        self.training = training
        here = num_particles // num_processes
        self.indices = range(rank * here, (rank + 1) * here)
        self.num_particles = num_particles
        self.unroll_length = unroll_length
        self.meta_loss: MetaLoss = meta_loss
        self._seed = seed
        self._update = update
        generators = self.generators("start")
        starts = [training.init(task, generator) for generator in generators]
        anchor = _both_signs(starts)
        self._outer = LearnedStep(anchor, update)
        self.simulation = Simulation(task, anchor, training.num_workers, self._outer, training.optimizer)
        self.round_idx = torch.zeros(here, dtype=torch.long)
        self.length = torch.cat([unroll_length.draw_first(1, generator) for generator in generators])
        rates = [training.draw_lr(generator) for generator in generators]
        self.base_lr = torch.tensor([lr for lr, _ in rates], dtype=torch.float64)
        self.decays = torch.tensor([decays for _, decays in rates])
        self._check_start(generators)

    def part_of(self, rank: int, num_processes: int) -> Particles:
        """Create the particles of one of several processes, at their start."""
        return Particles(
            self.task,
            self.training,
            self.num_particles,
            self.unroll_length,
            self.meta_loss,
            self._seed,
            self._update,
            rank,
            num_processes,
        )

    def _check_start(self, generators: Sequence[torch.Generator]) -> None:
        loss = self._anchor_loss(generators)
        if not loss.isfinite().all():
            raise ValueError(
                f"The loss of {self.task} is {loss.tolist()} before the first step. Check its data, its initial "
                f"parameters and {self.training}."
            )

    def __len__(self) -> int:
        """Return the number of particles here."""
        return len(self.indices)

    @property
    def anchor(self) -> Tensors:
        """Global parameters of all unrolls here, {[2P, *S]}."""
        return self.simulation.anchor

    def generators(self, when: int | str) -> list[torch.Generator]:
        """Create a generator for each particle."""
        return [seeded(self._seed, when, index) for index in self.indices]

    def local_lr(self) -> Tensor:
        """Compute γ of each particle in the coming round, [P]."""
        factor = torch.where(self.decays, half_cosine(self.round_idx, self.length), 1.0)
        return self.base_lr * factor

    def round(self, network: Network, local_steps: int, generators: Sequence[torch.Generator]) -> Tensor:
        """Simulate one round of every unroll; both signs of a particle see the same data.

        Args:
            network: Meta-parameters, those of θ + ε of all particles, then those of θ − ε.
            local_steps: Number of local steps H.
            generators: Generator of each particle.

        Returns:
            Losses, [2P].
        """
        device = self.task.device
        local_lr = self.local_lr().to(device, self.task.dtype).repeat(2)
        drawn = self._draw(self.task, local_steps, generators).unbind(1)
        batches = (self.task.read(places.flatten(0, 1).to(device)) for places in drawn)
        self._outer.network = network
        loss = self.simulation.round(batches, local_lr, self.round_idx.to(device).repeat(2))
        self.round_idx += 1
        return loss if self.meta_loss == "local" else self._anchor_loss(generators)

    def _draw(self, task: AbstractTask, count: int, generators: Sequence[torch.Generator]) -> Tensor:
        """Draw several batches for every worker of every unroll, [2P, count, K, *], the same for both signs."""
        num_workers = self.training.num_workers
        drawn = torch.stack([task.draw(count * num_workers, generator) for generator in generators])
        return drawn.unflatten(1, (count, num_workers)).repeat(2, *[1] * drawn.dim())

    def _anchor_loss(self, generators: Sequence[torch.Generator]) -> Tensor:
        """Compute the loss of the anchors, [2P], on K batches each."""
        task = self.task.validation if self.meta_loss == "validation" else self.task
        if task is None:
            raise ValueError(f"{self.task} has no validation data, which meta_loss='validation' needs. Hold some out.")
        batch = task.read(self._draw(task, 1, generators).flatten(0, 2))
        return task.loss(self.anchor, tuple(part.unflatten(0, (2 * len(self), -1)).flatten(1, 2) for part in batch))

    def restart_finished(self, generators: Sequence[torch.Generator]) -> Tensor:
        """Start a new unroll where one is complete, and return where, [P] bool."""
        done = self.round_idx >= self.length
        finished = done.nonzero().flatten().tolist()
        if finished:
            starts = []
            for i in finished:
                starts.append(self.training.init(self.task, generators[i]))
                self.length[i] = self.unroll_length.draw(1, generators[i])
                lr, decays = self.training.draw_lr(generators[i])
                self.base_lr[i], self.decays[i] = lr, decays
            self.round_idx[done] = 0
            runs = [*finished, *(len(self) + i for i in finished)]
            self.simulation.restart(runs, _both_signs(starts))
            self._outer.forget(runs)
        return done

    def join_signs(self) -> None:
        """Let both unrolls of each particle go on from the state of the first."""
        for tensor in _leaves(self._replicas()):
            pos, neg = tensor.chunk(2)
            neg.copy_(pos)
        filters = self.simulation.filters[: len(self)]
        self.simulation.filters[len(self) :] = [copy.copy(each) for each in filters]

    def _replicas(self) -> dict[str, Any]:
        """The tensors of all unrolls, and of their workers, each with their dimension first."""
        return {
            "anchor": self.anchor,
            "states": {name: vars(state) for name, state in self._outer.states.items()},
            "local": vars(self.simulation.local),
        }

    def _by_particle(self, replicas: dict[str, Any]) -> dict[str, Any]:
        """Views of such tensors whose first dimension is that of the particles."""
        return _map(lambda t: t.unflatten(0, (2, len(self), -1)).transpose(0, 1), replicas)

    def state_dict(self) -> dict[str, Any]:
        """Return all that the next round of the particles here depends on; their dimension is the first of each."""
        return {
            "version": VERSION,
            "task": f"{self.task}, {self.training}, meta_loss={self.meta_loss!r}, update={self._update!r}",
            "replicas": self._by_particle({**self._replicas(), "outliers": self.simulation.norms}),
            "unrolls": {name: getattr(self, name) for name in ("round_idx", "length", "base_lr", "decays")},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from the `state_dict` of all particles, joined by `joined` if several processes had parts of them."""
        if state.get("version") != VERSION:
            raise ValueError(
                f"The checkpoint's particles are of version {state.get('version')}, but this code reads {VERSION}. "
                "Go on with the network alone: MetaTraining(network=...)."
            )
        norms = self.simulation.norms
        ours = {**self.state_dict(), "replicas": self._by_particle({**self._replicas(), "outliers": norms})}
        found = f"{state['task']} with {len(state['unrolls']['length'])} particles"
        expected = f"{ours['task']} with {self.num_particles} particles"
        if found != expected:
            raise ValueError(
                f"The checkpoint is of {found}, but this run is of {expected}. Resume with the arguments of that run, "
                "or start anew."
            )
        for name in ("replicas", "unrolls"):
            for target, source in zip(_leaves(ours[name]), _leaves(state[name]), strict=True):
                target.copy_(self.part_here(source))
        self.simulation.norms = norms

    def part_here(self, tensor: Tensor) -> Tensor:
        """Select the particles of this process from all: [P, *] to [len(self), *]."""
        return tensor[self.indices.start : self.indices.stop]


def joined(states: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Join the states of the processes' particles, in the order of their ranks."""

    def join(parts: Sequence[Any]) -> Any:
        first = parts[0]
        if isinstance(first, dict):
            return {name: join([part[name] for part in parts]) for name in first}
        return torch.cat(list(parts)) if isinstance(first, Tensor) else first

    return join(states)


def _both_signs(starts: Sequence[Tensors]) -> Tensors:
    """Repeat one start for each particle, {[1, *S]}, for both signs: {[2P, *S]}."""
    return {name: torch.cat([start[name] for start in starts] * 2) for name in starts[0]}


def _map(function: Callable[[Tensor], Tensor], tree: dict[str, Any]) -> dict[str, Any]:
    return {k: _map(function, v) if isinstance(v, dict) else function(v) for k, v in tree.items()}


def _leaves(tree: dict[str, Any]) -> Iterator[Tensor]:
    for value in tree.values():
        yield from _leaves(value) if isinstance(value, dict) else [value]
