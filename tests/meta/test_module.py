"""MetaTraining in a Trainer: automatic optimization on the estimate, and a killed run that goes on bitwise."""

from __future__ import annotations

import os
from functools import partial

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_lopt import AdaMLP
from lightning_lopt.functional.updates import UPDATES
from lightning_lopt.meta import ImageMLP, LogUniform, MetaTraining
from tests.processes import run_workers

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")


def make(tasks: int = 2, **keywords) -> MetaTraining:
    generator = torch.Generator().manual_seed(0)
    images, labels = torch.rand(100, 6, 6, generator=generator), torch.randint(4, (100,), generator=generator)
    settings = {
        "num_workers": 2,
        "local_steps": [1, 2],
        "local_lr": (0.05, 1.0),
        "num_particles": 2,
        "truncation": 5,
        "unroll_length": LogUniform(4, 20),
    }
    widths = [(8,), (4, 4)][:tasks]
    return MetaTraining(
        task=[ImageMLP(images, labels, hidden=hidden, batch_size=8) for hidden in widths], **{**settings, **keywords}
    )


def trainer(max_steps: int, *callbacks: L.Callback, **keywords) -> L.Trainer:
    return L.Trainer(
        max_steps=max_steps,
        callbacks=list(callbacks),
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=any(isinstance(c, ModelCheckpoint) for c in callbacks),
        **keywords,
    )


def test_the_gradient_is_the_estimate_and_the_loss_is_the_meta_loss():
    meta, seen = make(), {}
    expected = make()._estimators[0].window(meta.network, 0)

    class Look(L.Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            seen.update({name: p.grad.clone() for name, p in pl_module.network.named_parameters()})

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            seen["loss"] = outputs["loss"].item()

    trainer(1, Look()).fit(meta)
    assert seen.pop("loss") == pytest.approx(expected.loss, rel=1e-6)
    assert set(seen) == set(expected.gradient)
    assert all(torch.equal(grad, expected.gradient[name]) for name, grad in seen.items())


@pytest.mark.parametrize("update", UPDATES)
def test_a_step_trains_every_meta_parameter(update):
    network = AdaMLP(update=update, step_mult=0.1, exp_mult=0.1, seed=0)
    before = {name: p.detach().clone() for name, p in network.named_parameters()}
    trainer(1).fit(make(tasks=1, network=network, truncation=20))
    assert [name for name, p in network.named_parameters() if torch.equal(p, before[name])] == []


def test_each_window_is_clipped_before_it_is_accumulated():
    meta, grads = make(max_window_norm=0.01), {}
    windows = [estimator.window(meta.network, i).gradient for i, estimator in enumerate(make()._estimators)]
    norms = [torch.stack([g.norm() for g in gradient.values()]).norm() for gradient in windows]
    assert min(norms) > 0.01

    class Look(L.Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            grads.update({name: p.grad.clone() for name, p in pl_module.network.named_parameters()})

    trainer(1, Look(), accumulate_grad_batches=2).fit(meta)
    for name, grad in grads.items():
        wanted = sum(0.01 * gradient[name] / norm for gradient, norm in zip(windows, norms, strict=True)) / 2
        torch.testing.assert_close(grad, wanted, rtol=1e-4, atol=1e-6)


def test_tasks_are_taken_in_turn_and_metrics_are_logged():
    meta = make()
    fit = trainer(3)
    fit.fit(meta)
    assert [bool(e._accumulator) for e in meta._estimators] == [True, True]
    assert {"meta_loss", "rounds_per_second"} <= set(fit.callback_metrics)


def assert_equal_trees(ours, theirs):
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        if isinstance(value, dict):
            assert_equal_trees(ours[key], value)
        else:
            assert torch.equal(ours[key], value) if isinstance(value, torch.Tensor) else ours[key] == value


class Kill(L.Callback):
    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == 7:
            raise KeyError("killed")


@pytest.mark.parametrize("kind", ["sgd", "momentum", "adamw"])
def test_a_killed_run_goes_on_bitwise(tmp_path, kind):
    make_own = partial(make, local_optimizer=kind, meta_loss="updated")
    whole = make_own()
    trainer(11).fit(whole)

    saving = ModelCheckpoint(tmp_path, every_n_train_steps=5, save_top_k=-1, filename="{step}")
    with pytest.raises(KeyError, match="killed"):
        trainer(11, saving, Kill()).fit(make_own())
    resumed = make_own()
    resuming = trainer(11, saving)
    resuming.fit(resumed, ckpt_path=tmp_path / "step=5.ckpt")

    assert resuming.global_step == 11
    for ours, theirs in zip(resumed.parameters(), whole.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    for ours, theirs in zip(resumed._estimators, whole._estimators, strict=True):
        assert_equal_trees(ours.state_dict(), theirs.state_dict())


def test_a_checkpoint_with_other_tasks_is_refused(tmp_path):
    saving = ModelCheckpoint(tmp_path, every_n_train_steps=1, filename="saved")
    trainer(1, saving).fit(make())
    with pytest.raises(ValueError, match="particles of 2 tasks, but this run has 1"):
        trainer(2).fit(make(tasks=1), ckpt_path=tmp_path / "saved.ckpt")


def test_a_checkpoint_of_a_run_with_other_settings_is_refused(tmp_path):
    saving = ModelCheckpoint(tmp_path, every_n_train_steps=1, filename="saved")
    trainer(1, saving).fit(make())
    for name, value in {"seed": 1, "sigma": 0.02, "truncation": 6, "unroll_length": 8, "log_floor": 0.1}.items():
        with pytest.raises(ValueError, match=f"a run with {name}=.*, but this one has {name}=.*{value}"):
            trainer(2).fit(make(**{name: value}), ckpt_path=tmp_path / "saved.ckpt")


def run_shared(rank: int, folder: str, resume: str | None = None) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """The gradients of each step, and the parameters at the end, of one of the processes."""
    gradients = []

    class Look(L.Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            gradients.append(torch.cat([p.grad.flatten() for p in pl_module.network.parameters()]))

    saving = ModelCheckpoint(folder, every_n_train_steps=2, save_top_k=-1, filename="{step}")
    num_processes = int(os.environ.get("WORLD_SIZE", "1"))
    keywords = {"strategy": "ddp", "devices": num_processes} if num_processes > 1 else {"devices": 1}
    meta = make(num_particles=4, local_optimizer="momentum", max_window_norm=0.1)
    trainer(4, saving, Look(), gradient_clip_val=1.0, **keywords).fit(meta, ckpt_path=resume)
    return gradients, [p.detach().clone() for p in meta.parameters()]


def test_two_processes_share_the_particles(tmp_path):
    """The same gradients as one process with all of them, and checkpoints that any number of processes resumes."""
    gradients, _ = run_shared(0, str(tmp_path / "one"))
    both = run_workers(run_shared, 2, str(tmp_path / "two"), connect=False)
    for gradients_of_rank, parameters_of_rank in both:
        for ours, wanted in zip(gradients_of_rank, gradients, strict=True):
            torch.testing.assert_close(ours, wanted, rtol=1e-3, atol=1e-5 * wanted.abs().max())
        for ours, wanted in zip(parameters_of_rank, both[0][1], strict=True):
            assert torch.equal(ours, wanted)
    checkpoint = str(tmp_path / "two" / "step=2.ckpt")
    resumed = run_workers(run_shared, 2, str(tmp_path / "resumed"), checkpoint, connect=False)
    for ours, wanted in zip(resumed[1][1], both[1][1], strict=True):
        assert torch.equal(ours, wanted)
    alone, _ = run_shared(0, str(tmp_path / "alone"), checkpoint)
    for ours, wanted in zip(alone, gradients[2:], strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-3, atol=1e-5 * wanted.abs().max())


def test_uneven_parts_are_refused():
    particles = make(num_particles=3)._estimators[0].particles
    with pytest.raises(ValueError, match="2 processes cannot share num_particles=3 evenly"):
        particles.part_of(0, 2)


def test_meta_training_improves_on_an_untrained_twin():
    """With a tiny local rate only the outer step can lower the loss; both runs see the same data."""

    def losses(lr: float) -> list[float]:
        found = []

        class Record(L.Callback):
            def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
                found.append(outputs["loss"].item())

        settings = {"num_particles": 8, "truncation": 10, "unroll_length": LogUniform(10, 10)}
        trainer(40, Record()).fit(make(tasks=1, local_lr=1e-3, local_steps=1, lr=lr, **settings))
        return found

    trained, untrained = losses(1e-2), losses(0.0)
    assert trained[0] == untrained[0]
    assert sum(trained[-10:]) < sum(untrained[-10:]) - 0.03


def test_a_network_for_k_workers_needs_that_k():
    assert make(network=AdaMLP(inputs=2)).network.num_inputs == 2
    with pytest.raises(ValueError, match=r"sees 3 workers but there are num_workers=2"):
        make(network=AdaMLP(inputs=3))


def test_bad_trainers_and_arguments_are_named():
    images = ImageMLP(torch.rand(20, 4).double(), torch.arange(20) % 2, hidden=(3,), batch_size=4)
    with pytest.raises(ValueError, match=r"computes in torch\.float64 but the network in torch\.float32"):
        MetaTraining(task=images, num_workers=2)
    with pytest.raises(TypeError, match=r"task must be a task, .* not Linear"):
        MetaTraining(task=torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="at least one task"):
        make(tasks=0)
    with pytest.raises(TypeError, match=r"network must be an AdaMLP, not 'nonsense'.* \['default'"):
        make(network="nonsense")
    with pytest.raises(ValueError, match="max_steps"):
        trainer(-1, max_epochs=1).fit(make())


@pytest.mark.parametrize("name", ["lr", "final_lr", "decays_lr", "warmup_steps", "max_window_norm", "sigma"])
@pytest.mark.parametrize("value", [-1, float("nan")])
def test_arguments_out_of_their_range_are_named(name, value):
    with pytest.raises(ValueError, match=f"^{name} must be .*, not {value}"):
        make(**{name: value})
