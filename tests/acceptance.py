"""Lightning's own tests with this package's strategy swapped in for its defaults.

    git clone --branch 2.6.5 --depth 1 https://github.com/Lightning-AI/pytorch-lightning
    python tests/acceptance.py pytorch-lightning [more pytest arguments]

Where a test asks for no strategy, or one process, it gets `LocalSGD(4)` on one CPU process; where it asks for DDP it
gets `LocalSGD(4)` with DDP's way of starting processes. What cannot pass is in EXPECTED, and left out.
"""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

FILES = [
    "callbacks/test_early_stopping.py",
    "callbacks/test_finetuning_callback.py",
    "callbacks/test_gradient_accumulation_scheduler.py",
    "callbacks/test_lr_monitor.py",
    "callbacks/test_stochastic_weight_avg.py",
    "callbacks/test_weight_averaging.py",
    "checkpointing/test_checkpoint_callback_frequency.py",
    "checkpointing/test_model_checkpoint.py",
    "checkpointing/test_trainer_checkpoint.py",
    "core/test_lightning_optimizer.py",
    "core/test_metric_result_integration.py",
    "loops/test_evaluation_loop.py",
    "loops/test_fetchers.py",
    "loops/test_loops.py",
    "loops/test_training_loop.py",
    "models/test_hooks.py",
    "models/test_restore.py",
    "strategies/test_common.py",
    "strategies/test_custom_strategy.py",
    "strategies/test_ddp.py",
    "strategies/test_ddp_integration.py",
    "strategies/test_registry.py",
    "test_cli.py",
    "trainer/connectors/test_data_connector.py",
    "trainer/logging_/test_distributed_logging.py",
    "trainer/optimization/test_backward_calls.py",
    "trainer/optimization/test_manual_optimization.py",
    "trainer/optimization/test_optimizers.py",
    "utilities/test_compile.py",
]


EXPECTED = {
    "loops/test_training_loop.py::test_training_starts_with_seed[True]": "any DDP seeds anew in each fit",
    "loops/test_loops.py::test_workers_are_shutdown": "any DDP copies the loader that the test looks at",
    "loops/test_evaluation_loop.py::test_evaluation_loop_sampler_set_epoch_called": "as above",
    "models/test_hooks.py::test_trainer_model_hook_system_fit": "checkpoints have one key more than the test lists",
    "checkpointing/test_model_checkpoint.py::test_model_checkpoint_no_extraneous_invocations": "all workers save",
    "checkpointing/test_trainer_checkpoint.py::test_trainer_save_checkpoint_storage_options": "our own writer",
    "trainer/optimization/test_optimizers.py::test_none_optimizer": "nothing to train is an error here",
    "callbacks/test_stochastic_weight_avg.py::test_swa_callback_ddp_cpu": "SWA with BatchNorm is refused",
    "callbacks/test_stochastic_weight_avg.py::test_swa_resume_training_from_checkpoint_ddp": "as above",
    "callbacks/test_finetuning_callback.py::test_finetuning_callback_warning": "all is frozen at the start",
    "callbacks/test_finetuning_callback.py::test_base_finetuning_internal_optimizer_metadata": "all is frozen, too",
    "strategies/test_ddp.py::test_ddp_configure_ddp": "workers need no wrapper",
    "test_cli.py::test_lightning_cli_args_cluster_environments": "any DDP asks SLURM, which is mocked, for its node",
    "test_cli.py::test_lightning_cli_jsonnet": "needs the package jsonnet",
}


def pytest_configure(config: Any) -> None:
    """Swap the strategy. This file is its own pytest plugin."""
    import lightning.pytorch as pl
    from lightning.fabric.strategies.launchers.subprocess_script import _ChildProcessObserver
    from lightning.pytorch.strategies import DDPStrategy

    from lightning_lopt import LocalSGD

    _ChildProcessObserver.__init__.__defaults__ = (0.05,)  # each test waits for its thread, which sleeps 5 s
    original = pl.Trainer.__init__

    @functools.wraps(original)  # the command line reads its signature
    def swapped(self: Any, *args: Any, **kwargs: Any) -> None:
        strategy, devices = kwargs.get("strategy", "auto"), kwargs.get("devices", 1)
        on_cpu = kwargs.get("accelerator", "auto") in ("auto", "cpu") and not args
        start = {"ddp": "popen", "ddp_spawn": "spawn", "ddp_fork": "fork"}
        if on_cpu and isinstance(strategy, str) and strategy in start:
            kwargs["strategy"] = LocalSGD(4, process_group_backend="gloo", start_method=start[strategy])
        elif on_cpu and type(strategy) is DDPStrategy and not strategy._ddp_kwargs:
            start_method, timeout = strategy._start_method, strategy._timeout
            kwargs["strategy"] = LocalSGD(4, process_group_backend="gloo", start_method=start_method, timeout=timeout)
        elif on_cpu and strategy == "auto" and devices in (1, "auto"):
            kwargs.update(accelerator="cpu", devices=1, strategy=LocalSGD(4, process_group_backend="gloo"))
        original(self, *args, **kwargs)

    pl.Trainer.__init__ = swapped


def main(checkout: str, *arguments: str) -> int:
    """Run the tests; pytest's exit status."""
    tests = Path(checkout).resolve() / "tests"
    root = Path(__file__).resolve().parents[1]
    files = [str(tests / "tests_pytorch" / name) for name in FILES]
    left_out = [f"--deselect=tests_pytorch/{name}" for name in EXPECTED]
    options = [
        *left_out,
        "-p",
        "tests.acceptance",
        "-o",
        "addopts=",
        f"--rootdir={tests}",
        "--timeout=300",
        "-q",
        *arguments,
    ]
    path = os.pathsep.join([str(root), str(tests)])
    environment = {**os.environ, "PYTHONPATH": path, "GLOO_SOCKET_IFNAME": "lo", "MASTER_ADDR": "127.0.0.1"}
    return subprocess.call([sys.executable, "-m", "pytest", *files, *options], cwd=tests, env=environment)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
