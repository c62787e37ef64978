"""K workers in one process, which take turns in one module.

`Trainer(devices=1, strategy=LearnedLocalSGD(virtual_workers=4))` trains four workers in one process: on a laptop, on
one GPU, in a debugger. In each step of the Trainer every worker takes a turn in the module, with its own weights,
BatchNorm statistics, optimizer state, GradScaler and batch; then they sync by the same code as processes, the
collectives excepted. Steps, learning rates, logs and checkpoints are those of rank 0 of K processes: `max_steps`,
schedules and callbacks stay as they are, and a run of either kind resumes the other's checkpoints. Two virtual workers
are bitwise two gloo processes; with more, an all-reduce adds in another order.

**Data.** A loader that Lightning would shard by a `DistributedSampler` is dealt as K processes would get it. Batches of
iterable datasets, of other loaders, and with `use_distributed_sampler=False` are dealt in turn; fewer than K last ones
are dropped.

**Differences from processes.** Random numbers come from one stream (dropout, augmentation), `trainer.world_size` is 1,
and the means of `self.log` are over all workers. `rounds/bytes_sent` lacks the 80 bytes by which processes compare
their numbers of batches. Tensors in plain attributes of the module, neither parameters nor buffers, are shared; so are
hooks that run outside of a batch, which see the first worker. `eval()` and `train()` of an optimizer (schedule-free)
move the weights of all workers there, too. Buffers that such hooks register after the start of the training are the
first worker's alone.

**Refused**: `accumulate_grad_batches` (not with manual optimization), `SyncBatchNorm`, `dataloader_iter`, several
devices, `ranks_per_worker`, `worker_speeds`, checkpoints of workers that took unequal steps, callbacks that average
weights, and `BatchNormReestimation`.

**Memory** is that of K processes, less K - 1 times the gradients, activations and CUDA contexts; with `sharded=True`
the outer state is held once. **Time** is the sum over the workers.
"""

from lightning_lopt.virtual.rounds import VirtualRounds
from lightning_lopt.virtual.shared_module import SharedModule

__all__ = ["SharedModule", "VirtualRounds"]
