"""Unrolls that live on from window to window: one antithetic pair per particle."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from lightning_lopt.functional.learned import Network
from lightning_lopt.meta.base import AbstractTask, Tensors
from lightning_lopt.meta.guard import Guard
from lightning_lopt.meta.local import LocalTraining
from lightning_lopt.meta.truncation import LogUniform
from lightning_lopt.meta.unroll import local_round, outer_step, zero_states

MetaLoss = Literal["local", "updated", "validation"]
VERSION = 4  # of the state


def seeded(*counters: int | str) -> torch.Generator:
    """A generator that depends on nothing but its arguments, so that no random state has to be saved."""
    digest = hashlib.sha256(repr(counters).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


class Particles:
    """Unrolls of one task, two for each particle, which share the start, the data and the local learning rate.

    A particle depends on its own random numbers alone, so it is the same whichever process simulates it.

    Args:
        task: what is trained.
        training: how.
        num_particles: P >= 1.
        unroll_length: T, drawn at each start of an unroll.
        meta_loss: what a round gives: the mean local training loss (``"local"``), or the loss of the updated anchor on
            K fresh batches (``"updated"``), or on K validation batches (``"validation"``).
        seed: of everything drawn.
        update: of the networks.
        rank: of this process, which holds its share of the particles.
        num_processes: that divides P.

    Raises:
        ValueError: an argument out of its range, a loss that is not finite at the start, or a state of another task.
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
        own = num_particles // num_processes
        self.indices = range(rank * own, (rank + 1) * own)
        self.num_particles = num_particles
        self.unroll_length = unroll_length
        self.meta_loss: MetaLoss = meta_loss
        self._seed = seed
        self._update = update
        generators = self.generators("start")
        starts = [training.init(task, generator) for generator in generators]
        self.anchor = _both_signs(starts)
        self.states = zero_states(self.anchor, update)
        self.local = training.optimizer.init(self._per_worker(self.anchor))
        self.guard = Guard(2 * own, training.num_workers, task.device)
        self.round_idx = torch.zeros(own, dtype=torch.long)
        self.length = torch.cat([unroll_length.draw_first(1, generator) for generator in generators])
        rates = [training.draw_lr(generator) for generator in generators]
        self.base_lr = torch.tensor([lr for lr, _ in rates], dtype=torch.float64)
        self.decays = torch.tensor([decays for _, decays in rates])
        self._check_start(generators)

    def share(self, rank: int, num_processes: int) -> Particles:
        """The particles of one of several processes, at their start."""
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
        return len(self.indices)

    def generators(self, when: int | str) -> list[torch.Generator]:
        """One for each particle."""
        return [seeded(self._seed, when, index) for index in self.indices]

    def _per_worker(self, anchor: Tensors) -> Tensors:
        return {name: p.repeat_interleave(self.training.num_workers, 0) for name, p in anchor.items()}

    def local_lr(self) -> Tensor:
        """γ of each particle in the coming round, [P]."""
        factor = torch.where(self.decays, 0.5 * (1 + torch.cos(math.pi * self.round_idx / self.length)), 1.0)
        return self.base_lr * factor

    def round(self, network: Network, local_steps: int, generators: Sequence[torch.Generator]) -> Tensor:
        """One round of every unroll; both signs of a particle see the same data.

        Args:
            network: meta-parameters, those of θ + ε of all particles, then those of θ − ε.
            local_steps: H.
            generators: one for each particle.

        Returns:
            The losses, [2P].
        """
        training, device = self.training, self.task.device
        local_lr = self.local_lr().to(device, self.task.dtype).repeat(2)
        drawn = self._draw(self.task, local_steps, generators).unbind(1)
        batches = (self.task.read(places.flatten(0, 1).to(device)) for places in drawn)
        workers, loss = local_round(
            self.task, self.anchor, batches, local_lr, training.num_workers, training.optimizer, self.local
        )
        skipped = self.guard.check(self.anchor, workers, self.local)
        round_idx = self.round_idx.to(device).repeat(2)
        scale, carried = local_lr * local_steps, training.optimizer.carried(local_steps)
        outer_step(self.anchor, workers, self.states, network, round_idx, scale, skipped, carried)
        self.round_idx += 1
        return loss if self.meta_loss == "local" else self._anchor_loss(generators)

    def _draw(self, task: AbstractTask, count: int, generators: Sequence[torch.Generator]) -> Tensor:
        """Several batches for every worker of every unroll, [2P, count, K, *]; both signs of a particle share them."""
        num_workers = self.training.num_workers
        drawn = torch.stack([task.draw(count * num_workers, generator) for generator in generators])
        return drawn.unflatten(1, (count, num_workers)).repeat(2, *[1] * drawn.dim())

    def _anchor_loss(self, generators: Sequence[torch.Generator]) -> Tensor:
        """The loss of the anchors, [2P], on K batches each."""
        task = self.task.validation if self.meta_loss == "validation" else self.task
        if task is None:
            raise ValueError(f"{self.task} has no validation data, which meta_loss='validation' needs. Hold some out.")
        batch = task.read(self._draw(task, 1, generators).flatten(0, 2))
        return task.loss(self.anchor, tuple(part.unflatten(0, (2 * len(self), -1)).flatten(1, 2) for part in batch))

    def restart_finished(self, generators: Sequence[torch.Generator]) -> Tensor:
        """Start a new unroll where one is complete; returns where, [P] bool."""
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
            replicas = done.repeat(2).to(self.task.device)
            for name, start in _both_signs(starts).items():
                self.anchor[name][replicas] = start
            for tensor in _leaves(self._memory()):
                tensor.unflatten(0, (2 * len(self), -1))[replicas] = 0
        return done

    def join_signs(self) -> None:
        """Let both unrolls of each particle go on from the state of the first."""
        for tensor in _leaves({"anchor": self.anchor, **self._memory()}):
            pos, neg = tensor.chunk(2)
            neg.copy_(pos)

    def _memory(self) -> dict[str, Any]:
        """What the optimizers and the guard remember of each unroll; zero at its start."""
        return {
            "states": {name: vars(state) for name, state in self.states.items()},
            "local": vars(self.local),
            "guard": {"last": self.guard.last, "peak": self.guard.peak},
        }

    def state_dict(self) -> dict[str, Any]:
        """All that the next round of this process's particles depends on; their dimension is the first of each."""
        replicas = {"anchor": self.anchor, **self._memory()}
        return {
            "version": VERSION,
            "task": f"{self.task}, {self.training}, meta_loss={self.meta_loss!r}, update={self._update!r}",
            "replicas": _map(lambda t: t.unflatten(0, (2, len(self), -1)).transpose(0, 1), replicas),
            "unrolls": {name: getattr(self, name) for name in ("round_idx", "length", "base_lr", "decays")},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from the `state_dict` of all particles, joined by `joined` if several processes shared them."""
        if state.get("version") != VERSION:
            raise ValueError(
                f"The checkpoint's particles are of version {state.get('version')}, but this code reads {VERSION}. "
                "Go on with the network alone: MetaTraining(network=...)."
            )
        own = self.state_dict()
        found = f"{state['task']} with {len(state['unrolls']['length'])} particles"
        expected = f"{own['task']} with {self.num_particles} particles"
        if found != expected:
            raise ValueError(
                f"The checkpoint is of {found}, but this run is of {expected}. Resume with the arguments of that run, "
                "or start anew."
            )
        for name in ("replicas", "unrolls"):
            for ours, theirs in zip(_leaves(own[name]), _leaves(state[name]), strict=True):
                ours.copy_(self.own(theirs))

    def own(self, tensor: Tensor) -> Tensor:
        """The part of this process: [P, *] -> [own, *]."""
        return tensor[self.indices.start : self.indices.stop]


def joined(states: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The state of all particles from those of the processes, in the order of their ranks."""

    def join(parts: Sequence[Any]) -> Any:
        first = parts[0]
        if isinstance(first, dict):
            return {name: join([part[name] for part in parts]) for name in first}
        return torch.cat(list(parts)) if isinstance(first, Tensor) else first

    return join(states)


def _both_signs(starts: Sequence[Tensors]) -> Tensors:
    """One start for each particle, {[1, *S]}, as {[2P, *S]}."""
    return {name: torch.cat([start[name] for start in starts] * 2) for name in starts[0]}


def _map(function: Callable[[Tensor], Tensor], tree: dict[str, Any]) -> dict[str, Any]:
    return {k: _map(function, v) if isinstance(v, dict) else function(v) for k, v in tree.items()}


def _leaves(tree: dict[str, Any]) -> Iterator[Tensor]:
    for value in tree.values():
        yield from _leaves(value) if isinstance(value, dict) else [value]
