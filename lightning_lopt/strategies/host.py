"""Every use of private API of Lightning and torch by the strategies and callbacks, each with its reason.

Lightning has no public way for what stands here; an upgrade of Lightning or torch that breaks something breaks it in
this module. The Trainer's loops are private, too: their names have no underscore, but no documentation either. Checked
with Lightning 2.6.
"""

from __future__ import annotations

import atexit
import copy
import os
import signal
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, TypeGuard

import lightning.pytorch as pl
import numpy as np
import torch
import torch.distributed as dist
from lightning.fabric.plugins import CheckpointIO
from lightning.fabric.utilities.cloud_io import _is_local_file_protocol
from lightning.fabric.utilities.data import _set_sampler_epoch
from lightning.fabric.utilities.init import _materialize_distributed_module
from lightning.fabric.utilities.optimizer import _optimizer_to_device
from lightning.fabric.utilities.seed import _collect_rng_states, _set_rng_states
from lightning.fabric.utilities.types import _Stateful
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loops.loop import _Loop
from lightning.pytorch.loops.optimization.automatic import ClosureResult
from lightning.pytorch.plugins.io.wrapper import _WrappingCheckpointIO
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.trainer import call
from torch import Tensor, nn
from torch._C._distributed_c10d import PrefixStore, Store, TCPStore
from torch.distributed import ProcessGroup
from torch.distributed.constants import default_pg_timeout
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.distributed_c10d import _get_default_store
from torch.nn.modules.batchnorm import _BatchNorm as Norm
from torch.optim import Optimizer
from torch.utils._pytree import tree_unflatten

# -- the strategy's base class ------------------------------------------------------------------------------------


def checkpoint_io_of(strategy: DDPStrategy, make_default: Callable[[], CheckpointIO]) -> CheckpointIO:
    """Return the strategy's `CheckpointIO`, or give it a default one where the user gave none.

    Reason: the public property creates a `TorchCheckpointIO` on its first use, also inside of wrappers such as
    `AsyncCheckpointIO`, and a default passed to the constructor excludes the user's plugins.
    """
    if strategy._checkpoint_io is None:
        strategy._checkpoint_io = make_default()
    elif isinstance(strategy._checkpoint_io, _WrappingCheckpointIO):
        strategy._checkpoint_io.checkpoint_io = make_default()  # a wrapper that has one already keeps it
    return strategy._checkpoint_io


def innermost_checkpoint_io(io: CheckpointIO) -> CheckpointIO:
    """Return the `CheckpointIO` inside of all wrappers, which reads and writes a file before it returns.

    Reason: the class of wrappers, such as `AsyncCheckpointIO`, is private.
    """
    while isinstance(io, _WrappingCheckpointIO):
        assert io.checkpoint_io is not None
        io = io.checkpoint_io
    return io


def set_checkpoint_io(strategy: DDPStrategy, io: CheckpointIO) -> None:
    """Set the strategy's `CheckpointIO`.

    Reason: a property whose getter is overridden needs its setter again.
    """
    strategy._checkpoint_io = io


def connect_restarted(strategy: DDPStrategy) -> None:
    """Initialise the process group of a job that torchrun has restarted, in keys of its own of the agent's store.

    Does nothing in a first start, and outside of torchrun.

    Reason: torchrun's workers use the store of its agent, which outlives them. In torch 2.14 its keys do not depend on
    the number of restarts, so that gloo finds the addresses of the dead workers there. Lightning passes no store on,
    but takes a process group that is initialised.
    """
    restarts = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    if restarts == "0" or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True" or dist.is_initialized():
        return
    strategy.set_world_ranks()
    environment = strategy.cluster_environment
    assert environment is not None
    store = TCPStore(
        environment.main_address,
        environment.main_port,
        environment.world_size(),
        is_master=False,
        timeout=strategy._timeout or default_pg_timeout,
    )
    dist.init_process_group(
        strategy._get_process_group_backend(),
        store=PrefixStore(f"lightning_lopt/restart/{restarts}", store),
        rank=environment.global_rank(),
        world_size=environment.world_size(),
        timeout=strategy._timeout,
        device_id=strategy.root_device if strategy.root_device.type != "cpu" else None,
    )


def enter_while_checkpointing(trainer: pl.Trainer, context: Callable[[bool], AbstractContextManager[None]]) -> None:
    """Let a context be entered whenever a Trainer puts a checkpoint together.

    Args:
        trainer: Trainer that puts checkpoints together.
        context: Function that makes the context; it is told whether the checkpoint is to hold the weights alone.

    Reason: there is no hook before Lightning reads the module, and none after the last `on_save_checkpoint`.
    """
    connector = trainer._checkpoint_connector
    dump = type(connector).dump_checkpoint

    def dump_in_context(weights_only: bool | None = None) -> dict[str, Any]:
        with context(bool(weights_only)):
            return dump(connector, weights_only)

    connector.dump_checkpoint = dump_in_context


def surround_validation(trainer: pl.Trainer, begin: Callable[[], None], end: Callable[[], None]) -> None:
    """Call functions before the first and after the last hook of each validation within a fit.

    Args:
        trainer: Trainer in a fit.
        begin: Function that is called before `on_validation_model_eval`.
        end: Function that is called after `on_validation_model_train`; not after an exception.

    Reason: of strategies and callbacks Lightning calls no hook outside of these two.
    """
    loop = trainer.fit_loop.epoch_loop.val_loop
    first, last = type(loop)._on_evaluation_model_eval, type(loop)._on_evaluation_model_train

    def begin_and_call_first() -> None:
        begin()
        first(loop)

    def call_last_and_end() -> None:
        last(loop)
        end()

    loop._on_evaluation_model_eval, loop._on_evaluation_model_train = begin_and_call_first, call_last_and_end


def validate_without_inference_mode(trainer: pl.Trainer) -> None:
    """Let validation within a fit run under `torch.no_grad`.

    Args:
        trainer: Trainer in a fit.

    Reason: what is made in inference mode, a buffer that `validation_step` reassigns for example, cannot be written
    by a sync. With gloo Lightning does without it, too.
    """
    trainer.fit_loop.epoch_loop.val_loop.inference_mode = False


def destroy_process_group_at_exit(wanted: bool) -> None:
    """Destroy the process group when the process ends, or no longer do so.

    Args:
        wanted: Whether to destroy it: not after a failure, since the other workers may hang.

    Reason: Lightning does so for NCCL alone. With gloo the end of a process was now and then an abort ("terminate
    called without an active exception"), which torchrun reports as a failure.
    """
    atexit.unregister(_destroy_process_group)
    if wanted:
        atexit.register(_destroy_process_group)


def _destroy_process_group() -> None:
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def set_gradient_group(strategy: DDPStrategy, group: ProcessGroup | None) -> None:
    """Let DDP average gradients in a process group of its own.

    Reason: the arguments of the DDP wrapper are fixed in the constructor, before there are processes.
    """
    strategy._ddp_kwargs["process_group"] = group


def has_synced_batch_norm(trainer: pl.Trainer) -> bool:
    """Whether `Trainer(sync_batchnorm=True)` was given.

    Reason: the Trainer passes this flag on and does not keep it.
    """
    return getattr(trainer.strategy, "_layer_sync", None) is not None


def trainer_of(module: pl.LightningModule | None) -> pl.Trainer | None:
    """Return the Trainer that a module is attached to, None without one.

    Reason: the public property raises an error before the module is attached.
    """
    return None if module is None else module._trainer


# -- hooks --------------------------------------------------------------------------------------------------------


def call_module_hook(trainer: pl.Trainer, name: str, *args: Any) -> Any:
    """Call a hook of the LightningModule as the Trainer does: profiled, with `self.log` knowing where it is.

    Reason: the hooks of one batch are called for each virtual worker, and Lightning calls them once.
    """
    return call._call_lightning_module_hook(trainer, name, *args)


def as_hook_outputs(output: Any) -> Any:
    """Return the output of `training_step` in the form in which `on_train_batch_end` gets it.

    Reason: with automatic optimization Lightning converts it between the two.
    """
    return ClosureResult.from_training_step_output(output).asdict()


def transfer_batch(trainer: pl.Trainer, leaves: Sequence[Any]) -> Any:
    """Build a training batch from one item of each loader, and bring it to the device as Lightning does.

    Reason: Lightning fetches and transfers the first virtual worker's batch only.

    Args:
        trainer: Trainer in a fit.
        leaves: Batches of the single loaders, in their order.
    """
    combined = trainer.fit_loop._combined_loader
    assert combined is not None
    batch = tree_unflatten(list(leaves), combined._spec)
    batch = trainer.precision_plugin.convert_input(batch)
    batch = trainer.lightning_module._on_before_batch_transfer(batch, dataloader_idx=0)
    return trainer.strategy.batch_to_device(batch, dataloader_idx=0)


def optimizer_to_device(optimizer: Optimizer, device: torch.device) -> None:
    """Move an optimizer's state to a device, where it stays after loading it.

    Reason: Lightning does so for the optimizers that it loads itself.
    """
    _optimizer_to_device(optimizer, device)


# -- position in the run ------------------------------------------------------------------------------------------


def epochs_done(trainer: pl.Trainer) -> int:
    """Return the number of epochs whose batches are all done; their last hooks may yet be to come.

    Reason: `trainer.current_epoch` counts an epoch later.
    """
    progress: Any = trainer.fit_loop.epoch_progress.current
    return progress.processed


def batches_done(trainer: pl.Trainer) -> int:
    """Return the number of batches of this epoch that are done; their last hooks may yet be to come.

    Reason: the Trainer counts batches only over all epochs.
    """
    progress: Any = trainer.fit_loop.epoch_loop.batch_progress.current
    return progress.processed


def is_within_batch(trainer: pl.Trainer) -> bool:
    """Whether a training batch has begun and not ended.

    Reason: no hook of a strategy ends a batch.
    """
    progress: Any = trainer.fit_loop.epoch_loop.batch_progress.current
    return trainer.training and progress.ready > progress.completed


def accumulates_gradients(trainer: pl.Trainer) -> bool:
    """Whether the optimizer takes no step with the present batch.

    Reason: it depends on the batch's position, on the last batch of an epoch, and on the strategy.
    """
    return trainer.fit_loop._should_accumulate()


def is_out_of_data(trainer: pl.Trainer) -> bool:
    """Whether this worker has used the last batch of its epoch.

    Reason: validation at the end of an epoch runs before the epoch's counters say that it is over.
    """
    return trainer.fit_loop.epoch_loop._num_ready_batches_reached()


def move_within_epoch(trainer: pl.Trainer, batches: int) -> None:
    """Let the epoch go on after another number of batches than the loops' loaded state says.

    Reason: with another number of workers the same rows are another number of batches.
    """
    current: Any = trainer.fit_loop.epoch_loop.batch_progress.current
    moved = batches - current.ready
    current.ready += moved
    current.started += moved
    current.processed += moved
    current.completed += moved


def batches_begun(trainer: pl.Trainer, *, in_run: bool) -> int:
    """Return the number of batches that have begun, those before a checkpoint included.

    Reason: the Trainer counts steps of optimizers alone.

    Args:
        trainer: Trainer in a fit.
        in_run: Whether to count the batches of all epochs, rather than those of the present one.
    """
    progress: Any = trainer.fit_loop.epoch_loop.batch_progress
    return progress.total.ready if in_run else progress.current.ready


def resumes_with_new_epoch(trainer: pl.Trainer) -> bool:
    """Whether a resumed fit comes next to the first batch of an epoch.

    Reason: no hook tells at what stage of an epoch a fit begins.
    """
    loop = trainer.fit_loop
    in_epoch = 0 < batches_done(trainer) < loop.max_batches
    ends_epoch_first = loop.restarted_mid_epoch and loop.epoch_loop.restarted_on_last  # saved by its last validation
    if in_epoch or ends_epoch_first or epochs_done(trainer) == 0:
        return False
    return loop.is_resuming or loop.restarting


def was_saved_at_epoch_end(trainer: pl.Trainer) -> bool:
    """Whether the checkpoint of a resumed fit was written by a hook at the end of an epoch.

    Reason: no hook tells at what stage of an epoch a fit begins.
    """
    return trainer.fit_loop.restarted_on_epoch_end


def was_saved_at_batch_end(trainer: pl.Trainer) -> bool:
    """Whether the checkpoint of a resumed fit was written between a batch and a validation that may follow it.

    Reason: no hook tells at what stage of an epoch a fit begins.
    """
    return trainer.fit_loop.epoch_loop.restarted_on_train_batch_end


def forget_stage(trainer: pl.Trainer) -> bool:
    """Let Lightning count an epoch that begins, and call its first hooks, where it takes it for the one of the save.

    Reason: no hook tells at what stage of an epoch a fit begins.

    Returns:
        Whether it would have taken it for that.
    """
    loop = trainer.fit_loop
    if not (loop.restarted_mid_epoch or loop.restarted_on_epoch_end):
        return False
    loop.reset_restart_stage()
    return True


def begin_new_epoch(trainer: pl.Trainer) -> None:
    """Let a resumed fit whose epoch is over begin the next one, and not train on in the old one.

    Reason: with `max_steps` Lightning takes any checkpoint for one within an epoch, and the public setter of
    `FitLoop.restarting` cannot say otherwise.
    """
    trainer.fit_loop.epoch_progress.increment_completed()
    _Loop.restarting.__set__(trainer.fit_loop, False)


def keep_validation_progress(trainer: pl.Trainer) -> None:
    """Do not count a validation as done when the next batch begins; `count_validation_progress` takes this back.

    Reason: a restarted epoch loop that comes to its first batch asks whether batch -1 was followed by a validation,
    and if so, goes through the validation's loaders, which draws a seed. An epoch that begins has none behind it.
    """
    trainer.fit_loop.epoch_loop.val_loop.increment_progress_to_evaluation_end = _keep_progress


def count_validation_progress(trainer: pl.Trainer) -> None:
    """Take back `keep_validation_progress`, if it was called.

    Reason: only the first batch of an epoch is to be spared.
    """
    vars(trainer.fit_loop.epoch_loop.val_loop).pop("increment_progress_to_evaluation_end", None)


def pass_over_validation(trainer: pl.Trainer) -> None:
    """Draw the seeds of a validation that is not run again, and count it.

    Reason: a restarted loop does so by itself, but not before the iterators of the next epoch are made.
    """
    trainer.fit_loop.epoch_loop.val_loop.increment_progress_to_evaluation_end()


def fit_progress(trainer: pl.Trainer) -> dict[str, Any]:
    """Return the counters of a fit, as a checkpoint has them, without the states of loaders.

    Reason: the Trainer shows only some of them.
    """
    return {**trainer.fit_loop.state_dict(), "state_dict": {}}


def go_to_progress(trainer: pl.Trainer, progress: Mapping[str, Any]) -> None:
    """Let a fit that is about to begin its first batch go on from these counters, as from those of a checkpoint.

    Reason: Lightning restores them before it sets up the data, and looks at them once before the first batch.
    """
    loop = trainer.fit_loop
    loop.load_state_dict(dict(progress))
    loop.reset()
    if trainer.max_steps == -1:
        loop.epoch_progress.current.completed = epochs_done(trainer)


def reset_validation_progress(trainer: pl.Trainer) -> None:
    """Count the batches of validations from 0.

    Reason: Lightning does so before it runs a restarted epoch's last validation, and not in a new epoch.
    """
    trainer.fit_loop.epoch_loop.val_loop.batch_progress.total.reset()


def manual_progress(trainer: pl.Trainer) -> dict[str, Any]:
    """Return the counters of optimizer steps with manual optimization, as a copy.

    Reason: each virtual worker's `training_step` moves them on, and a batch counts once.
    """
    return copy.deepcopy(trainer.fit_loop.epoch_loop.manual_optimization.optim_step_progress.state_dict())


def set_manual_progress(trainer: pl.Trainer, progress: Mapping[str, Any]) -> None:
    """Restore what `manual_progress` returned.

    Reason: the same.
    """
    steps = trainer.fit_loop.epoch_loop.manual_optimization.optim_step_progress
    steps.load_state_dict(copy.deepcopy(dict(progress)))


def _keep_progress() -> None:
    """Leave the validation loop's counters and loaders as they are."""


# -- data ---------------------------------------------------------------------------------------------------------


def train_loaders(trainer: pl.Trainer) -> list[Any] | None:
    """Return the training loaders as Lightning iterates over them, None before they are set up.

    Reason: `trainer.train_dataloader` has them in the user's nested structure.
    """
    combined = trainer.fit_loop._combined_loader
    return None if combined is None else combined.flattened


def restarts_short_loaders(trainer: pl.Trainer) -> bool:
    """Whether training loaders that end before the longest one begin anew.

    Reason: a `CombinedLoader` keeps its mode for itself.
    """
    combined = trainer.fit_loop._combined_loader
    return combined is not None and combined._mode == "max_size_cycle"


def restore_stateful_loaders(trainer: pl.Trainer) -> None:
    """Give training loaders that have a state of their own the one of the checkpoint.

    Reason: Lightning does so when it sets up the data, which can be before the checkpoint's loops were restored.
    """
    trainer.fit_loop._load_combined_loader_states()


def make_train_iterators(trainer: pl.Trainer) -> None:
    """Make the iterators of the training loaders anew, from where their samplers are now.

    Reason: Lightning makes them when it sets up the data, and takes these for the first epoch after a restart.
    """
    fetcher: Any = trainer.fit_loop._data_fetcher
    iter(fetcher)


def set_sampler_epoch(loader: Any, epoch: int) -> None:
    """Tell the samplers of a loader the epoch that comes, as Lightning does.

    Reason: processes of a loader fetch before Lightning tells them.
    """
    _set_sampler_epoch(loader, epoch)


def is_stateful(loader: Any) -> bool:
    """Whether Lightning saves and restores the loader's own state.

    Reason: those rewind themselves.
    """
    return isinstance(loader, _Stateful)


def random_state() -> dict[str, Any]:
    """Return the states of torch, CUDA, numpy and Python, as types that `torch.load(weights_only=True)` accepts.

    Reason: Lightning collects them, with numpy's arrays, for its own `isolate_rng`.
    """
    states = _collect_rng_states()
    if "numpy" in states:
        states["numpy"] = [x.tolist() if isinstance(x, np.ndarray) else x for x in states["numpy"]]
    return states


def set_random_state(states: Mapping[str, Any]) -> None:
    """Restore what `random_state` returned.

    Reason: Lightning restores them, too, for its own `isolate_rng`.
    """
    _set_rng_states(dict(states))


def logged_with_sync(trainer: pl.Trainer) -> list[str]:
    """Return the names of what `self.log` was given in this epoch's training with `sync_dist=True`.

    Reason: the strategy sees only a reduction of a number.
    """
    return [metric.meta.name for metric in trainer.fit_loop.epoch_loop._results.values() if metric.meta.sync.should]


# -- files --------------------------------------------------------------------------------------------------------


def is_local_path(path: Any) -> bool:
    """Whether a path lies in the local file system, which has atomic renames and links.

    Reason: fsspec's names for it are known to Lightning.
    """
    return _is_local_file_protocol(path)


# -- signals ------------------------------------------------------------------------------------------------------


def replace_signal_handlers(
    trainer: pl.Trainer, stop: Callable[[int, Any], None], requeue: Callable[[int, Any], None]
) -> None:
    """Replace Lightning's handlers of SIGTERM and of SLURM's requeue signal, until the Trainer restores the old ones.

    Reason: Lightning acts inside of them, with collectives, while another worker waits in a sync for this one.

    Args:
        trainer: Trainer in a fit.
        stop: Handler in the place of the one for SIGTERM.
        requeue: Handler in the place of the one that saves and asks SLURM to start the job again.
    """
    connector = trainer._signal_connector
    new = ((connector._sigterm_notifier_fn, stop), (connector._slurm_sigusr_handler_fn, requeue))
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        handlers: list[Any] = getattr(signal.getsignal(number), "signal_handlers", [])
        for old, replacement in new:
            handlers[:] = [replacement if handler == old else handler for handler in handlers]


def requeue_job(trainer: pl.Trainer, number: int, frame: Any) -> None:
    """Save a checkpoint and ask SLURM to start the job again, as Lightning's own handler does.

    Reason: this handler was replaced, and is to run when all workers are at the same step.
    """
    trainer._signal_connector._slurm_sigusr_handler_fn(number, frame)


def stop_after_batch(trainer: pl.Trainer) -> None:
    """Let the Trainer raise `SIGTERMException` at the end of the present batch.

    Reason: `trainer.received_sigterm` cannot be set.
    """
    trainer._signal_connector.received_sigterm = True


def skip_signal_broadcast(trainer: pl.Trainer) -> None:
    """Stop Lightning from broadcasting in every batch whether rank 0 received SIGTERM (since 2.6).

    Reason: nothing is communicated between syncs; `Signals` lets all workers stop at the same step without it.
    """
    epoch_loop = trainer.fit_loop.epoch_loop
    if hasattr(epoch_loop, "_broadcast_sigterm_tensor"):
        epoch_loop._broadcast_sigterm_tensor = _broadcast_nothing


def _broadcast_nothing() -> None:
    """Broadcast nothing: a signal is noted in the store of the process group."""


def shared_store(name: str) -> Store:
    """Return a key-value store that all processes share.

    Reason: torch gives no public access to the one of the default process group, and another one would need a port.

    Args:
        name: Prefix of the keys.
    """
    return PrefixStore(name, _get_default_store())


def call_module_hook_now(trainer: pl.Trainer, name: str, *args: Any) -> None:
    """Call a hook of the module as Lightning does, and let Lightning's own next call of it do nothing.

    Reason: Lightning calls it after all callbacks, those that save checkpoints included.

    Args:
        trainer: Trainer in a fit.
        name: Name of the hook.
        *args: Arguments of the hook.
    """
    own = vars(trainer.lightning_module)
    if isinstance(own.get(name), _Skip):  # an exception came before Lightning's call
        del own[name]
    call_module_hook(trainer, name, *args)
    own[name] = _Skip(partial(own.pop, name))


class _Skip:
    """A hook that does nothing, once."""

    def __init__(self, remove: Callable[[], object]) -> None:
        self._remove = remove

    def __call__(self, *_: Any) -> None:
        self._remove()


# -- sharded models -----------------------------------------------------------------------------------------------


def set_device_mesh(module: pl.LightningModule, mesh: DeviceMesh) -> None:
    """Give a module the mesh that it reads as `self.device_mesh` in `configure_model`.

    Reason: only Lightning's own `ModelParallelStrategy` is to set it.
    """
    module._device_mesh = mesh


def configure_model(trainer: pl.Trainer) -> None:
    """Let a module build and shard its layers, before callbacks are set up.

    Reason: Lightning does so after it.
    """
    call._call_configure_model(trainer)


def materialize(module: nn.Module, device: torch.device) -> None:
    """Give tensors on the meta device memory, and initialise them, as `ModelParallelStrategy` does.

    Reason: the function is private.
    """
    _materialize_distributed_module(module, device)


# -- callbacks and layers -----------------------------------------------------------------------------------------


def callbacks_of(trainer: Any) -> list[Callback]:
    """Return the list of the Trainer's callbacks, which can be changed.

    Reason: the Trainer does not declare it, and reorders a list that it is given.
    """
    return trainer.callbacks


def average_model_of(callback: Callback) -> nn.Module | None:
    """Return the average that a callback holds (`WeightAveraging`, `StochasticWeightAveraging`), None without one.

    Reason: neither shows it.
    """
    average = getattr(callback, "_average_model", None)
    return average if isinstance(average, nn.Module) else None


def averages_weights(callback: Callback) -> bool:
    """Whether a callback averages weights over time; it may hold no average yet.

    Reason: the callbacks that do (`average_model_of` names them) have no class in common, but this attribute.
    """
    return hasattr(callback, "_average_model")


def steps_between_saves(callback: ModelCheckpoint) -> int:
    """Return `every_n_train_steps` of a `ModelCheckpoint`, 0 if it does not count steps.

    Reason: it does not show its arguments.
    """
    return callback._every_n_train_steps


def saves_by_time(callback: ModelCheckpoint) -> bool:
    """Whether a `ModelCheckpoint` has a `train_time_interval`.

    Reason: it does not show its arguments.
    """
    return bool(callback._train_time_interval)


def is_normalization_layer(module: nn.Module) -> TypeGuard[Norm]:
    """Whether a module is a BatchNorm layer that has running statistics, of any number of dimensions.

    Reason: their common base class is private.
    """
    return isinstance(module, Norm) and isinstance(module.running_mean, Tensor)


def modes_before_validation(trainer: pl.Trainer) -> dict[str, bool]:
    """Return whether each submodule was in training mode before the present validation, by name.

    Reason: the validation loop keeps the modes to itself until it restores them.
    """
    return trainer.fit_loop.epoch_loop.val_loop._module_mode.mode
