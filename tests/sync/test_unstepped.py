"""Tensors that no optimizer steps: buffers in all their lives, EMA teachers, frozen weights, and what stays local."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
import torch.ao.quantization as quantization
from torch import nn

from lightning_lopt import DisagreementError, Rounds, SyncOptions
from tests.sync_support import Point
from tests.threads import run_threads


class _Buffers(Point):
    def __init__(self) -> None:
        super().__init__(torch.zeros(1))
        self.register_buffer("mean", torch.zeros(2))
        self.register_buffer("count", torch.zeros(2, dtype=torch.int64))
        self.register_buffer("seen", torch.zeros(2, dtype=torch.bool))
        self.register_buffer("mask", torch.tensor([0.0, -torch.inf]))

    def values(self):
        return [b.tolist() for b in (self.mean, self.count, self.seen)]


def _rounds(model, make_comm, local_steps=1, **options):
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    return Rounds(model, optimizer, local_steps, comm=make_comm(), options=SyncOptions(**options))


def _in_flight(rank, make_comm):
    """Both workers change all buffers before the launch and, in other places, before the finish."""
    model = _Buffers()
    rounds = _rounds(model, make_comm, 2, overlap_steps=1)
    model.mean[0], model.count[0], model.seen[0] = 2.0 * rank, 2 * rank, bool(rank)
    rounds.step()
    model.mean += torch.tensor([0.0, 1.0 + rank])
    model.count += torch.tensor([1, 1 + rank])
    model.seen[1] = bool(rank)
    rounds.step()
    assert model.mask.tolist() == [0.0, -torch.inf]
    landed = model.values()
    rounds.abandon_round()
    return landed, model.values()


def test_what_changes_in_flight_is_added_to_what_arrives():
    first, second = run_threads(_in_flight, 2)
    assert first[0] == [[1.0, 1.0], [3, 1], [True, False]]
    assert second[0] == [[1.0, 2.0], [3, 2], [True, True]]
    assert first[1] == second[1] == [[1.0, 0.0], [2, 0], [True, False]]


def _types_in_flight(rank, make_comm, dtype):
    model = Point(torch.zeros(1))
    model.register_buffer("b", torch.zeros(2).to(dtype))
    rounds = _rounds(model, make_comm, 2, overlap_steps=1, sync_rules={"b": "sum_of_changes"})
    for added in ([1.0, 0.0], [0.0, 2.0]):
        model.b = (model.b.double() + torch.tensor(added)).to(dtype)
        rounds.step()
    return model.b.double().tolist()


@pytest.mark.parametrize(
    "dtype", [torch.float8_e4m3fn, torch.bfloat16, torch.float64, torch.uint8, torch.uint16], ids=str
)
def test_each_type_in_flight(dtype):
    assert run_threads(_types_in_flight, 2, dtype) == [[2.0, 2.0]] * 2


# -- lives of buffers -------------------------------------------------------------------------------------------------


def _reassign(model, rank):
    model.b = model.b + rank


def _resize(model, rank):
    model.b = torch.full((len(model.b) + 1,), float(rank))


def _register(model, rank):
    model.register_buffer("late", torch.tensor([float(rank)]))


def _fill(model, rank):
    model.cache = torch.tensor([2.0 * rank])


def _delete(model, rank):
    del model.b


LIVES = {
    "reassigned": (_reassign, {"b": [0.5, 0.5], "cache": None}),
    "resized": (_resize, {"b": [0.5, 0.5, 0.5], "cache": None}),
    "registered late": (_register, {"b": [0.0, 0.0], "cache": None, "late": [0.5]}),
    "filled late": (_fill, {"b": [0.0, 0.0], "cache": [1.0]}),
    "deleted": (_delete, {"cache": None}),
}


def _live(rank, make_comm, change):
    model = Point(torch.zeros(1))
    model.register_buffer("b", torch.zeros(1).expand(2))
    model.register_buffer("cache", None)
    rounds = _rounds(model, make_comm)
    change(model, rank)
    rounds.step()
    first = {name: None if b is None else b.tolist() for name, b in model._buffers.items()}
    for b in model.buffers():
        b += rank  # and goes on living
    rounds.step()
    return first, [b.tolist() for b in model.buffers()]


@pytest.mark.parametrize(("change", "expected"), LIVES.values(), ids=LIVES)
def test_buffers_are_found_as_they_are(change, expected):
    results = run_threads(_live, 2, change)
    present = [value for value in expected.values() if value is not None]
    assert results == [(expected, [[x + 0.5 for x in value] for value in present])] * 2


def _resized_in_flight(rank, make_comm):
    model = Point(torch.zeros(1))
    model.register_buffer("b", torch.zeros(1))
    rounds = _rounds(model, make_comm, 2, overlap_steps=1)
    seen = []
    for values in ([1.0], [2.0, 2.0], [2.0, 2.0], [2.0, 2.0]):
        model.b = torch.tensor(values) * rank
        rounds.step()
        seen.append(model.b.tolist())
    return seen


def test_a_buffer_that_is_resized_in_flight_is_synced_next():
    assert run_threads(_resized_in_flight, 2)[1] == [[1.0], [2.0, 2.0], [2.0, 2.0], [1.0, 1.0]]


def _other_shapes(rank, make_comm, rules):
    model = Point(torch.zeros(1))
    model.register_buffer("part_queue", torch.zeros(2))
    rounds = _rounds(model, make_comm, sync_rules=rules)
    model.part_queue = torch.zeros(2 + rank)
    rounds.step()
    return len(model.part_queue)


def test_shapes_that_differ_between_workers():
    message = r"'part_queue \(2,\) torch.float32', rank 1 has 'part_queue \(3,\) .*sync_rules={name: 'local'}"
    with pytest.raises(DisagreementError, match=message):
        run_threads(_other_shapes, 2, {})
    assert run_threads(_other_shapes, 2, {"*queue": "local"}) == [2, 3]


def test_sparse_buffers_are_refused_by_name():
    model = Point(torch.zeros(1))
    model.register_buffer("graph", torch.eye(2).to_sparse())
    with pytest.raises(ValueError, match=r"graph is .*sparse.*sync_rules={'graph': 'local'}"):
        Rounds(model, torch.optim.SGD([model.x], lr=1.0), 1)
    Rounds(model, torch.optim.SGD([model.x], lr=1.0), 1, options=SyncOptions(sync_rules={"graph": "local"}))


# -- EMA teachers and frozen weights ----------------------------------------------------------------------------------


class _Teacher(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)  # of its own, as the workers are threads that run at once
        self.student = nn.Linear(3, 2)
        for p in self.student.parameters():
            p.data.copy_(torch.randn(p.shape, generator=generator))
        self.teacher = copy.deepcopy(self.student).requires_grad_(False)


def _new_parameter(model, new):
    model.teacher.weight = nn.Parameter(new, requires_grad=False)


UPDATES = {
    "in place": lambda model, new: model.teacher.weight.copy_(new),
    "through data": lambda model, new: model.teacher.weight.data.copy_(new),
    "new data": lambda model, new: setattr(model.teacher.weight, "data", new),
    "new parameter": _new_parameter,
}


def _follow(rank, make_comm, update, held, overlap=0):
    model = _Teacher()
    optimizer = torch.optim.SGD(model.parameters() if held else model.student.parameters(), lr=0.1)
    rounds = Rounds(model, optimizer, 2, comm=make_comm(), options=SyncOptions(overlap_steps=overlap))
    teachers = []
    for step in range(6):
        model.student(torch.full((1, 3), 1.0 + rank + step)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            update(model, torch.lerp(model.teacher.weight, model.student.weight, 0.5))
        before = model.teacher.weight.clone()
        if rounds.step():
            teachers.append((before, model.teacher.weight.clone()))
    rounds.finish_round()
    return teachers


@pytest.mark.parametrize(("update", "held"), [*((u, False) for u in UPDATES), *((u, True) for u in [*UPDATES][:3])])
def test_a_teacher_is_the_mean_of_the_workers(update, held):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        first, second = run_threads(_follow, 2, UPDATES[update], held)
    assert len(first) == 3
    for (a, merged_a), (b, merged_b) in zip(first, second, strict=True):
        assert not torch.equal(a, b)
        assert torch.equal(merged_a, (a + b) / 2)
        assert torch.equal(merged_a, merged_b)


def test_a_teacher_with_a_sync_in_flight():
    first, second = run_threads(_follow, 2, UPDATES["in place"], False, 1)
    assert len(first) == 3
    apart = [
        (a - b).norm() / (before_a - before_b).norm()
        for (before_a, a), (before_b, b) in zip(first, second, strict=True)
    ]
    assert all(0 < ratio < 0.9 for ratio in apart)  # apart by the steps in flight alone


def _only_one(rank, make_comm):
    model = _Teacher()
    rounds = _rounds(model, make_comm)
    if rank == 1:
        model.teacher.bias.data += 1.0
    rounds.step()


def test_a_parameter_that_one_worker_alone_changes():
    message = r"rank 0 has 'teacher.bias \(2,\) torch.float32', rank 1 has 'teacher.bias \(2,\) torch.float32, changed'"
    with pytest.raises(DisagreementError, match=message):
        run_threads(_only_one, 2)


def _held_bytes(rounds):
    """Bytes of all tensors that the rounds hold beyond the model."""
    unstepped = rounds.sync.replica.unstepped
    copies = [seen.copy for seen in unstepped._watch._seen.values()]
    return sum(t.numel() * t.element_size() for t in [*unstepped._synced.values(), *copies])


def _frozen(rank, make_comm):
    model = nn.Sequential(nn.Linear(400, 250), nn.Linear(250, 20))
    model[0].requires_grad_(False)
    rounds = _rounds(model, make_comm)
    before = rounds.comm.bytes_sent
    rounds.step()
    rounds.step()
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    trained = sum(p.numel() * 4 for p in model[1].parameters())
    return (rounds.comm.bytes_sent - before - 2 * trained) / size, _held_bytes(rounds) / size


def test_frozen_weights_cost_neither_memory_nor_bytes():
    (sent, held), _ = run_threads(_frozen, 2)
    assert sent < 0.01
    assert 0 < held < 0.01


def _fresh(rank, make_comm, stop, overlap, state=None):
    """A run with a teacher, of which the loss depends, up to a step; or its continuation from a state."""
    model = _Teacher()
    model.register_buffer("center", torch.zeros(2))
    optimizer = torch.optim.SGD(model.student.parameters(), lr=0.1, momentum=0.9)
    rounds = Rounds(model, optimizer, 3, comm=make_comm(), options=SyncOptions(overlap_steps=overlap))
    if state is not None:
        rounds.load_state_dict(copy.deepcopy(state[0]["rounds"]))
        rounds.load_local_state(copy.deepcopy(state[rank]["local"]))
        optimizer.load_state_dict(copy.deepcopy(state[rank]["optimizer"]))
    generator = torch.Generator().manual_seed(rank)
    inputs = torch.randn(9, 4, 3, generator=generator)
    for x in inputs[rounds.step_idx : stop]:
        out = model.student(x)
        model.center = 0.9 * model.center + 0.1 * out.detach().mean(0)
        (out - model.teacher(x) - model.center).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            for t, s in zip(model.teacher.parameters(), model.student.parameters(), strict=True):
                t.lerp_(s, 0.1)
        rounds.step()
    state = {"rounds": rounds.state_dict(), "local": rounds.local_state(), "optimizer": optimizer.state_dict()}
    return state, [t.clone() for t in model.state_dict().values()]


@pytest.mark.parametrize("overlap", [0, 1, 2])
def test_resumes_bitwise_from_every_step(overlap, tmp_path):
    whole = run_threads(_fresh, 2, 9, overlap)
    for stop in range(1, 9):
        torch.save([state for state, _ in run_threads(_fresh, 2, stop, overlap)], tmp_path / "state.pt")
        resumed = run_threads(_fresh, 2, 9, overlap, torch.load(tmp_path / "state.pt", weights_only=True))
        for (_, a), (_, b) in zip(whole, resumed, strict=True):
            assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True)), stop


# -- what is said -----------------------------------------------------------------------------------------------------


def _observed(rank, make_comm):
    model = nn.Module()
    model.x = nn.Parameter(torch.zeros(1))
    model.norm = nn.BatchNorm1d(3)
    model.observer = quantization.MovingAveragePerChannelMinMaxObserver(ch_axis=1)
    rounds = _rounds(model, make_comm)
    for step in range(3):
        x = torch.randn(4, 3, generator=torch.Generator().manual_seed(10 * step + rank))
        model.norm(x)
        model.observer(x)
        own = model.observer.min_val.clone()
        rounds.step()
    return own, model.observer.min_val.clone(), model.norm.running_mean.clone()


def test_batch_norm_and_observers_are_silent():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        first, second = run_threads(_observed, 2)
    assert torch.equal(first[1], torch.minimum(first[0], second[0]))
    assert all(torch.equal(a, b) for a, b in zip(first[1:], second[1:], strict=True))


def _spoil(rank, make_comm, rules):
    model = Point(torch.zeros(1))
    model.register_buffer("queue", nn.functional.normalize(torch.eye(4) + 0.5, dim=1))
    rounds = _rounds(model, make_comm, sync_rules=rules)
    for step in range(2):
        draw = torch.randn(4, 4, generator=torch.Generator().manual_seed(2 * step + rank))
        model.queue.copy_(nn.functional.normalize(draw, dim=1))
        rounds.step()
    return model.queue.norm(dim=1).tolist()


def test_a_queue_of_unit_vectors_is_warned_of_once():
    with pytest.warns(UserWarning, match="queue holds vectors of norm 1") as caught:
        run_threads(_spoil, 2, {})
    assert len([w for w in caught if "queue" in str(w.message)]) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert run_threads(_spoil, 2, {"queue": "first"})[0] == pytest.approx([1.0] * 4)
        run_threads(_spoil, 2, {"queue": "mean"})


def test_a_pattern_that_fits_nothing_is_warned_of():
    match = r"sync_rules \['quene'\] fit no parameter or buffer .* full names, such as 'queue'\."
    with pytest.warns(UserWarning, match=match):
        run_threads(_spoil, 2, {"quene": "local", "queue": "local"})
