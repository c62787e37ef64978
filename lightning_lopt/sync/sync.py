"""One synchronisation: the merge rule that every method here shares.

    g = anchor - mean_i y_i          averaged pseudo-gradient, a gradient's sign; on the coordinates that are sent
    anchor <- Outer(anchor, g)       plain averaging: anchor <- mean_i y_i, computed as such
    x_i = anchor + (z_i - y_i)       the merge (or overwrite, or blend); y_i at the launch, z_i at the finish

The anchor (the global parameters) and the pseudo-gradient are float32 (float64 for float64 parameters).
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_lopt.comm import MODEL, CommonInteger, Communicator, digest
from lightning_lopt.compression import Codec, LinearCodec
from lightning_lopt.functional.merge import MergeRule, merge
from lightning_lopt.functional.outliers import Norms, OutlierFilter
from lightning_lopt.islands import foreign_sharding, has_dtensors, hold
from lightning_lopt.optim.outer import OuterFactory, check_coordinatewise
from lightning_lopt.selection import Everything, Selection, drawn_ahead
from lightning_lopt.sync.anchors import AnchoredParameter, training_checksum
from lightning_lopt.sync.compressed import check_codec
from lightning_lopt.sync.exchange import Exchange, Transport
from lightning_lopt.sync.flat import ParameterSlice, choose
from lightning_lopt.sync.options import SyncOptions
from lightning_lopt.sync.outer_step import OuterStep, StepResult, Total, average
from lightning_lopt.sync.replica import OptimizerLike, Replica
from lightning_lopt.sync.report import RoundReport, explain_outliers
from lightning_lopt.sync.sharding import Shards
from lightning_lopt.sync.status import (
    COORDINATES,
    EVERYTHING,
    GLOBAL_WEIGHTS,
    IN_TRAINING,
    LOCAL_STATE,
    LOCAL_STEPS,
    NEW_WEIGHTS,
    ROUND,
    UNSTEPPED,
    LocalSettings,
    SyncPoint,
    WorkerStatus,
    gather_status,
)
from lightning_lopt.sync.swap import Swap
from lightning_lopt.sync.unstepped import NamedTensors

EvalWeights = Literal["anchor", "mean"]
OUTER_OPTIMIZER = CommonInteger("the outer optimizer", "Give all workers the same outer optimizer and network.")
OPTIONS = CommonInteger("the sync options", "Give all workers the same SyncOptions.")


class Sync:
    """One worker's replica of the model, the outer optimizer, and the exchange with the other workers.

    Creating one checks that all workers have the same model, and gives them the parameters and buffers of rank 0.

    Args:
        model: Model whose tensors are synchronised, those that no optimizer steps by the rules of `sync/rules.py`.
        optimizer: Local optimizer, whose parameters are synchronised.
        outer_optimizer: Function that makes a `torch.optim.Optimizer` from parameter groups of anchors; None averages.
        comm: Collectives among the workers.
        options: Parts that are sent, time in flight, and merge rule.

    Attributes:
        replica: This worker's parameters with their anchors, other tensors and local optimizer states.
        worker_statuses: Status of every worker at the last sync, or when all waited at the same point.
        common: Whether all workers held the same weights after the last sync.
        settings: Texts that differ for other models and outer optimizers.

    Raises:
        ValueError: There is nothing to train, parameters are not dense and real, or in wrappers of FSDP1 or DeepSpeed,
            the length of a code depends on the values, or the outer optimizer belongs to another number of workers.
        DisagreementError: The workers' models differ.
    """

    def __init__(
        self,
        model: NamedTensors,
        optimizer: OptimizerLike,
        outer_optimizer: OuterFactory | None,
        comm: Communicator,
        options: SyncOptions,
    ) -> None:
        self._comm, self._options, self._codec = comm, options, options.codec
        if (reason := foreign_sharding(model)) is not None:
            raise ValueError(reason)
        if has_dtensors(model):
            if not comm.fixed:
                raise ValueError("Workers that come and go must be of one rank each, with a model that is not sharded.")
            whole = options.sends_means_alone or _needs_whole_tensors(outer_optimizer)
            model = optimizer = hold(model, optimizer, comm, whole=whole)
        self.replica = Replica(model, optimizer, options.sync_rules)
        if self._codec is not None and not isinstance(self._codec, LinearCodec):
            check_codec(self._codec, self.device)
        self.worker_statuses: list[WorkerStatus] = []
        self.common = True
        self._exchange: Exchange | None = None  # launched and not finished
        self._abandoned: Exchange | None = None  # launched, never to be finished, and perhaps not yet over
        self._outlier_filter = OutlierFilter()
        self._num_groups = len(self.replica.groups)  # whose settings are in every message
        self._warned = False  # of the first workers that were left out
        named = self.replica.common_tensors()
        model_lines = [f"{name} {tuple(t.shape)} {t.dtype}" for name, t in named]
        comm.agree(self.device, {MODEL: model_lines})
        comm.broadcast_([tensor for _, tensor in named])
        self.replica.push()
        self.replica.adopt()
        self.replica.unstepped.adopt()
        if comm.is_first and (unused := self.replica.unused_rules()):
            near = ", ".join(repr(name) for name in unused.values() if name)
            warnings.warn(
                f"sync_rules {[*unused]} fit no parameter or buffer that there is now. Patterns match full names"
                + (f", such as {near}." if near else "."),
                stacklevel=2,
            )
        self._selection = drawn_ahead(options.effective_selection)
        self._shards = Shards(comm) if options.sharded else None
        self._outer_step, self._total = None, Total(comm, self._shards)
        if outer_optimizer is not None:
            self._outer_step = OuterStep(outer_optimizer, self.replica.groups, comm, self._shards, self._total)
        outer = None if self._outer_step is None else self._outer_step.contract.fingerprint
        equal = {OUTER_OPTIMIZER: digest(repr(outer)), OPTIONS: options.fingerprint}
        comm.agree(self.device, equal)
        values = sum(t.numel() for _, t in named)
        held = f"{len(named)} tensors of {values} values, digest {digest(str(model_lines)):x}"
        self.settings = {"model": held, "outer optimizer": str(outer)}

    @property
    def device(self) -> torch.device:
        """Device of the parameters."""
        return self.replica.device

    @property
    def swap(self) -> Swap:
        """Global values that the model shows for a while in place of this worker's own."""
        return self.replica.swap

    @property
    def outer(self) -> Optimizer | None:
        """The outer optimizer, None for averaging."""
        return None if self._outer_step is None else self._outer_step.optimizer

    @property
    def in_flight(self) -> bool:
        """Whether a sync was launched and not finished."""
        return self._exchange is not None

    # -- a sync ---------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def launch(
        self, round_idx: int, status: WorkerStatus, *, everything: bool = False, same_steps: bool = True
    ) -> None:
        """Send this worker's present parameters.

        A sync that is still in flight is given up: it is waited for, and nothing of it is used. Where all workers wait
        at the same point, nothing is sent, and there is nothing to finish.

        Args:
            round_idx: Index of the round that ends, the same on all workers.
            status: Status of this worker. At `SyncPoint.LAUNCH` the call returns at once; otherwise `finish` must
                follow before the next local step.
            everything: Whether to send everything, uncompressed, and make the weights the same on all workers.
            same_steps: Whether workers at a sync must have taken the same number of local steps.

        Raises:
            DisagreementError: The workers do not agree on the round, its steps, or the parameters in training.
        """
        start = time.perf_counter()
        self.wait()
        self.replica.pull()
        in_flight = status.point is SyncPoint.LAUNCH
        parameters = self._parameters_in_training()
        slices = self._slices(parameters, round_idx, everything=everything)
        states = []
        if self._options.local_state == "average":
            states = self.replica.local_states(
                self.replica.optimized(slices, self._selection_of(everything), round_idx)
            )
        as_it_is = everything or not all(p.has_anchor for p in parameters)
        self._exchange = Exchange(
            comm=self._comm,
            device=self.device,
            slices=slices,
            unstepped=self.replica.unstepped.snapshot(),
            optimizer_states=states,
            status=status,
            equal={
                ROUND: round_idx,
                LOCAL_STEPS: status.local_steps if same_steps and status.point.needs_sync else None,
                EVERYTHING: everything,
                IN_TRAINING: training_checksum(parameters),
                COORDINATES: sum(s.checksum for s in slices),
                LOCAL_STATE: sum(state.numel() for state in states),
                GLOBAL_WEIGHTS: self.replica.checksum(round_idx),
            },
            settings=self._settings(launching=True),
            round_idx=round_idx,
            everything=everything,
            differences=self._outer_step is not None or self._codec is not None,
            transport=self._transport(None if as_it_is else self._codec),
            outlier_filter=self._outlier_filter,
        )
        self._exchange.launch(background=in_flight)
        self._exchange.launch_seconds = time.perf_counter() - start
        if not in_flight and self._exchange.status.all_wait:
            self.worker_statuses, self._exchange = self._exchange.status.workers, None

    def wait(self) -> None:
        """Return when nothing is being sent; a sync that was launched can still be finished.

        Raises:
            DisagreementError: The workers do not agree on the round, its steps, or the parameters in training.
        """
        if self._abandoned is not None:  # or collectives to come would meet its own
            abandoned, self._abandoned = self._abandoned, None
            abandoned.wait()
        if self._exchange is not None:
            self._exchange.wait()

    @torch.no_grad()
    def finish(self) -> RoundReport:
        """Step the anchors by what arrived, and merge.

        Raises:
            DisagreementError: The workers do not agree on the round, its steps, or the parameters in training.
        """
        start = time.perf_counter()
        self.wait()
        received, bytes_before = time.perf_counter(), self._comm.bytes_sent
        exchange, self._exchange = self._exchange, None
        assert exchange is not None
        self.worker_statuses = exchange.status.workers
        if exchange.launched is not None:
            self.replica.pull()  # steps were taken since the launch
        squared_drift, result = 0.0, StepResult(0.0)
        if not exchange.skipped:
            result = self._step_anchors(exchange)
            squared_drift = exchange.squared_drift(result.squared_norm)
            self._merge(exchange)
            self._apply_states_and_unstepped(exchange)
            self.replica.push()
        self._outlier_filter.update(exchange.status.norms, exchange.left_out)
        if exchange.left_out and self._comm.is_first and not self._warned:
            self._warned = True
            warnings.warn(explain_outliers(exchange), stacklevel=2)
        if self._comm.rank in exchange.left_out:
            self._reset_diverged_worker(exchange)
        drifts = any(worker.point is SyncPoint.LAUNCH for worker in exchange.status.workers)
        leaves_common = self._options.leaves_common_weights and not drifts
        self.common = exchange.everything or exchange.skipped or leaves_common
        self.replica.note_versions()
        done = time.perf_counter()
        return RoundReport(
            round_idx=exchange.round_idx,
            local_steps=exchange.local_steps,
            pseudo_grad_norm=math.sqrt(result.squared_norm),
            drift=math.sqrt(squared_drift),
            bytes_sent=exchange.bytes_sent + self._comm.bytes_sent - bytes_before,
            transfer_seconds=exchange.transfer_seconds,
            waited_seconds=exchange.transfer_seconds if exchange.launched is None else received - start,
            outer_seconds=done - received,
            sync_seconds=exchange.launch_seconds + done - start,
            left_out=len(exchange.left_out),
            fell_back=result.fell_back,
            partial=self._options.effective_selection.partial and not exchange.everything,
            workers=tuple(w for k, w in enumerate(self._comm.workers) if k not in exchange.left_out),
        )

    def check(self, status: WorkerStatus, equal: Mapping[CommonInteger, int | None] | None = None) -> None:
        """Make sure that all workers are at the same point; a sync in flight is left alone.

        Args:
            status: Status of this worker.
            equal: Values of some of the `COMMON` integers of `sync/status.py`.

        Raises:
            DisagreementError: They are not, or an integer differs.
        """
        self.wait()
        self._meet(status, equal)

    def _meet(self, own: WorkerStatus, equal: Mapping[CommonInteger, int | Sequence[str] | None] | None = None) -> None:
        unstepped = self.replica.unstepped
        unchanged = [False] * len(unstepped.followed())
        gather_status(self._comm, self.device, equal or {}, own, unchanged, self._settings(), unstepped.num_pieces)

    # -- weights from outside -------------------------------------------------------------------------------------

    def replaced(self, *, thorough: bool = False) -> bool:
        """Whether weights of this worker were written since the last sync, and differ from it by more than rounding.

        Args:
            thorough: Whether to compare all values, which also finds writes through `.data`.
        """
        if not self._comm.any_inside(thorough or self.replica.touched, self.device):
            return False
        self.replica.pull()
        return self._comm.any_inside(bool(self.replica.replaced()), self.device)

    @torch.no_grad()
    def adopt(self, *, keep_near: bool = False) -> None:
        """Take the present weights, which must be the same on all workers, as the global ones.

        Local progress since the last sync is in them, or is lost; a sync in flight is given up. The outer optimizer
        starts afresh for the parameters that differ from their anchors, and nothing is owed to them by compression.
        Tensors that no optimizer steps may differ between the workers: those that do are combined by the next sync.

        Args:
            keep_near: Whether the outer state of a parameter stays that moved by at most half of its norm, as clipping,
                a projection or pruning moves it.

        Raises:
            DisagreementError: The workers' weights differ, or some worker is not here.
        """
        self.give_up()
        self.wait()
        self.replica.pull()
        self._meet(WorkerStatus(0, SyncPoint.ADOPTION), {NEW_WEIGHTS: self.replica.value_checksum()})
        replaced = self.replica.replaced()
        if keep_near:
            replaced = [p for p in replaced if p.moved(0.5)]
        if self._outer_step is not None:
            self._outer_step.forget(replaced)
        for p in replaced:
            if p.residual is not None:
                p.residual.zero_()
        self.replica.adopt()
        self.adopt_unstepped()
        self.common = True

    def adopt_unstepped(self) -> None:
        """Take the present values of what no optimizer steps as those of the last sync, where they are the same on all.

        Raises:
            DisagreementError: The workers have other buffers, or shapes of these.
        """
        unstepped = self.replica.unstepped
        self._comm.agree(self.device, {UNSTEPPED: unstepped.described()})
        own, num_pieces = unstepped.checksums()
        bounds = [bound for checksum in own for bound in (checksum, -checksum)]
        largest = self._comm.agree(self.device, {}, bounds, 2 * num_pieces)
        unstepped.adopt([a == -b for a, b in zip(largest[::2], largest[1::2], strict=True)])

    # -- parts of a sync ------------------------------------------------------------------------------------------

    def _parameters_in_training(self) -> list[AnchoredParameter]:
        """All parameters in training, those that were unfrozen or added since the last sync included."""
        for group in self.replica.add_new_groups():
            if self._outer_step is not None:
                self._outer_step.add_group(group)
        parameters = self.replica.in_training()
        if self._shards is not None:
            self._shards.assign(parameters)
        if self._codec is not None:
            for p in parameters:
                p.residual = torch.zeros_like(p.anchor) if p.residual is None else p.residual
        return parameters

    def _slices(
        self, parameters: Sequence[AnchoredParameter], round_idx: int, *, everything: bool
    ) -> list[ParameterSlice]:
        """The slices of the parameters that the sync of a round sends."""
        slices = choose(parameters, self.replica.pick(parameters, self._selection_of(everything), round_idx))
        return slices if self._shards is None else self._shards.sort(slices)

    def _selection_of(self, everything: bool) -> Selection:
        """The selection of a sync, which may be told to send everything."""
        return Everything() if everything else self._selection

    def _optimized_by(self, exchange: Exchange) -> list[Tensor]:
        """The local optimizer's parameters that an exchange has sent."""
        return self.replica.optimized(exchange.slices, self._selection_of(exchange.everything), exchange.round_idx)

    def _settings(self, *, launching: bool = False) -> LocalSettings:
        """Settings of the local optimizer for the outer one; none where there is no outer optimizer.

        Args:
            launching: Whether to include groups that no message has had yet.
        """
        if self._outer_step is None:
            return LocalSettings()
        turns = self._options.effective_selection.num_turns
        settings = self.replica.local_settings(math.inf if self._options.local_state == "reset" else turns)
        known = self._num_groups
        if not launching:
            return LocalSettings(settings.lrs[:known], settings.momenta[:known])
        self._num_groups = len(settings.lrs)
        return replace(settings, num_new=len(settings.lrs) - known)

    def _transport(self, codec: Codec | LinearCodec | None = None) -> Transport:
        gather = self._outer_step is not None and self._outer_step.contract.needs_worker_grads
        return Transport(codec, self._shards, gather)

    def _step_anchors(self, exchange: Exchange) -> StepResult:
        """Step the anchors, and send them to the workers that do not own them."""
        flat_buffers = exchange.flat_buffers.values()
        if self._outer_step is None:
            result = average(flat_buffers, self._total)
        else:
            status = exchange.status
            keys = {"round_idx": exchange.round_idx, "local_steps": max(w.local_steps for w in status.workers)}
            scratch = exchange.launched is None and isinstance(self._merge_rule(exchange), str)
            result = self._outer_step.step(flat_buffers, keys, status.settings, scratch=scratch)
        if self._shards is not None:
            for flat_buffer in flat_buffers:
                self._shards.all_gather(flat_buffer)
        return result

    def _merge_rule(self, exchange: Exchange) -> MergeRule:
        return "overwrite" if exchange.everything else self._options.merge

    def _merge(self, exchange: Exchange) -> None:
        """Merge the anchors into the worker's parameters."""
        for i, s in enumerate(exchange.slices):
            p = s.parameter
            y = None if exchange.launched is None else exchange.launched[i]
            s.write(p.param, merge(s.read(p.anchor), y, s.read(p.param), self._merge_rule(exchange)))
            p.has_anchor = True

    def _apply_states_and_unstepped(self, exchange: Exchange) -> None:
        """Take up the residuals of compression, the local optimizer's states, and the unstepped tensors."""
        if self._codec is not None:
            exchange.keep_compression_state()
        for state, mean in zip(exchange.optimizer_states, exchange.mean_states, strict=True):
            state.copy_(mean)
        if self._options.local_state == "reset":
            self.replica.reset_local_states(self._optimized_by(exchange))
        self._apply_unstepped(exchange)

    def _apply_unstepped(self, exchange: Exchange) -> None:
        if self._comm.is_first:
            self.replica.unstepped.warn_of_spoiled(exchange.unstepped, exchange.arrived)
        anchors = {p: p.anchor for p in self.replica.anchored()}
        self.replica.unstepped.merge(exchange.unstepped, self.replica.renewed(exchange.arrived, anchors))

    def _reset_diverged_worker(self, exchange: Exchange) -> None:
        """Forget everything that made this worker diverge, but optimizer states that are now the others' mean."""
        self.restore_anchor()
        averaged = bool(exchange.optimizer_states) and not exchange.skipped
        kept = {*self._optimized_by(exchange)} if averaged else set()
        self.replica.reset_local_states(p for p in self.replica.all_optimized() if p not in kept)

    # -- global weights -------------------------------------------------------------------------------------------

    @torch.no_grad()
    def swap_in(self, weights: EvalWeights, *, unstepped_alone: bool = False) -> None:
        """Put the global weights and their buffers into the model, until `swap.undo`.

        Args:
            weights: `"anchor"`, the last synced ones, needs no communication; `"mean"` averages the workers as they
                are now, and all of them must call it.
            unstepped_alone: Whether the parameters in training are the global ones as they are.

        Raises:
            ValueError: There are no such weights.
        """
        if weights not in get_args(EvalWeights):
            raise ValueError(f"weights must be 'anchor' or 'mean', not {weights!r}.")
        if self.swap.active:
            return
        self.replica.pull()
        parameters = [] if unstepped_alone else self.replica.anchored()
        exchange = self._exchange_weights(parameters) if weights == "mean" else None
        if exchange is None or exchange.skipped:
            pairs = [(p.param, p.anchor.clone()) for p in parameters]
            self.swap.put(pairs + self.replica.unstepped.pairs())
        else:
            means = {s.parameter: mean for s, mean in exchange.means()}
            weights_of = {p: p.anchor for p in self.replica.anchored()} | means
            pairs = [(p.param, mean) for p, mean in means.items()]
            self.swap.put(pairs + self.replica.unstepped.pairs(self.replica.renewed(exchange.arrived, weights_of)))

    @torch.no_grad()
    def sync_unstepped(self) -> None:
        """Sync what no optimizer steps, where hooks have changed it since the last sync; all workers must call it."""
        self.replica.pull()
        exchange = self._exchange_weights([])
        self._apply_unstepped(exchange)
        self.replica.push()

    @torch.no_grad()
    def average_workers(self) -> None:
        """Give every worker the mean of their weights and optimizer states; anchors stay as they are."""
        self.replica.pull()
        parameters = self.replica.anchored()
        optimized = self.replica.optimized([ParameterSlice(p) for p in parameters], Everything(), round_idx=0)
        exchange = self._exchange_weights(parameters, self.replica.local_states(optimized))
        if exchange.skipped:
            return
        for state, mean in zip(exchange.optimizer_states, exchange.mean_states, strict=True):
            state.copy_(mean)
        for s, mean in exchange.means():
            s.write(s.parameter.param, mean)
        self.replica.push()

    def _exchange_weights(self, parameters: Sequence[AnchoredParameter], states: Sequence[Tensor] = ()) -> Exchange:
        """Average parameters, buffers and states of local optimizers as they are now, and change nothing."""
        self.wait()
        exchange = Exchange(
            comm=self._comm,
            device=self.device,
            slices=[ParameterSlice(p) for p in parameters],
            unstepped=self.replica.unstepped.snapshot(),
            optimizer_states=states,
            status=WorkerStatus(0, SyncPoint.EVALUATION),
            equal={IN_TRAINING: training_checksum(parameters), LOCAL_STATE: sum(state.numel() for state in states)},
            settings=self._settings(),
            outlier_filter=self._outlier_filter,
        )
        exchange.launch(background=False)
        return exchange

    def give_up(self) -> None:
        """Use nothing of a sync in flight, which goes on in the background; it may be launched again.

        Parameters, anchors and outer state are as they were: a sync that fails changes none of them before everything
        has arrived. The call does not wait, since a worker may be lost; whatever communicates next does.
        """
        exchange, self._exchange = self._exchange, None
        if exchange is not None and not exchange.failed:
            self._abandoned = exchange

    def note_newcomers(self) -> None:
        """Compare the global weights in the next round, and leave out no worker for its norm; on all workers."""
        self.replica.compare_next()
        self._outlier_filter.trust_next()

    @torch.no_grad()
    def restore_anchor(self) -> None:
        """Go back to the last synced weights and buffers, without communication; give up a sync in flight."""
        self.give_up()
        self.replica.restore()
        self.replica.push()
        self.replica.note_versions()
        self.common = True

    # -- checkpoints ----------------------------------------------------------------------------------------------

    def state_dict(self, *, alone: bool = False) -> dict[str, Any]:
        """Anchors, buffers of the last sync and state of the outer optimizer, the same on all workers.

        Args:
            alone: Whether to leave out a sync in flight and the outer state of tensors that others step, and not to
                talk to the other workers. Otherwise all must call it, and rank 0 gets everything.
        """
        if not alone:
            self.wait()
        divided = self._comm.inside_size > 1  # each rank has its own
        return {
            **self.replica.state_dict(),
            "outer": None if self._outer_step is None else self._outer_step.state_dict(alone=alone or divided),
            "outer_kind": type(self.outer).__name__,
            "norms": self._outlier_filter.norms._asdict(),
            "common": self.common,
            "exchange": None if alone or self._exchange is None else self._exchange.state_dict(),
        }

    def local_state(self) -> dict[str, Any]:
        """Everything that differs between the workers: parameters, buffers, residuals, and y of a sync in flight."""
        if not self.swap.active:
            self.replica.pull()
        exchange = self._exchange
        return {
            **self.replica.local_state(),
            "exchange": exchange and {**exchange.local_state(), "sent": self._positions(exchange.slices)},
        }

    def _positions(self, slices: Sequence[ParameterSlice]) -> list[int] | None:
        """Position of each slice's parameter among all; None if a slice is not all of its parameter."""
        positions = {p: i for i, p in enumerate(self.replica.parameters())}
        whole = all(s.index is None for s in slices)
        return [positions[s.parameter] for s in slices] if whole else None

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the result of `state_dict`, for the same parameters in the same groups.

        Raises:
            ValueError: The state is of another number of parameters, or another kind of outer optimizer (one or none).
        """
        parameters = self._parameters_in_training()
        count, kind = len(list(self.replica.parameters())), type(self.outer).__name__
        if count != len(state["anchors"]) or kind != state["outer_kind"]:
            raise ValueError(
                f"This checkpoint holds {len(state['anchors'])} parameters and the outer optimizer "
                f"{state['outer_kind']}; here there are {count} parameters and {kind}. Resume with the "
                "strategy that wrote it, or start from its weights alone."
            )
        self.replica.load_state_dict(state)
        if self._outer_step is not None:
            self._outer_step.load_state_dict(state["outer"])
        self._outlier_filter.norms, self.common = Norms(**state.get("norms", {})), state.get("common", True)
        self.give_up()
        exchange = state.get("exchange")
        self._exchange = None if exchange is None else self._exchange_of(parameters, exchange)

    def _exchange_of(self, parameters: Sequence[AnchoredParameter], state: Mapping[str, Any]) -> Exchange:
        """The exchange in flight that a state holds."""
        exchange = Exchange(
            comm=self._comm,
            device=self.device,
            slices=self._slices(parameters, state["round_idx"], everything=False),
            unstepped=self.replica.unstepped.snapshot(),
            status=WorkerStatus(state["local_steps"], SyncPoint.LAUNCH),
            equal={},
            round_idx=state["round_idx"],
            transport=self._transport(),
        )
        exchange.load_state_dict(state)
        return exchange

    @torch.no_grad()
    def load_local_state(self, state: Mapping[str, Any]) -> None:
        """Restore the result of `local_state`, after `load_state_dict`."""
        self.replica.load_local_state(state)
        if self._codec is None:  # the state may be of a run with compression
            for p in self.replica.parameters():
                p.residual = None
        self.replica.push()
        self.replica.note_versions()
        if self._exchange is not None:
            self._exchange.load_local_state(state["exchange"])


def _needs_whole_tensors(factory: OuterFactory | None) -> bool:
    """Whether the steps of an outer optimizer depend on more than single coordinates."""
    if factory is None:
        return False
    try:
        check_coordinatewise(factory)
    except ValueError:
        return True
    return False
