"""Workers that come and go: the rounds on a fake engine in one process, and kills of real workers on torchft's."""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import pickle
import signal
import socket
import sys
import threading
import time
from datetime import timedelta
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from lightning_lopt import (
    AdaMLP,
    DisagreementError,
    Fragments,
    LearnedOptimizer,
    Rounds,
    SlowMomentum,
    SyncOptions,
)
from lightning_lopt.comm import Communicator, Members
from lightning_lopt.elastic import Candidate, Elastic, GlooCollectives, _all_listen, _interruptible, admit, is_complete
from lightning_lopt.rounds import _from_bytes
from tests.elastic_support import (
    HEARTBEAT,
    OUTER,
    H,
    Processes,
    Trial,
    die,
    local_step,
    lose,
    make,
    parts_of,
    replay,
    seeded,
    torchft_member,
)
from tests.sync_support import flat
from tests.threads import run_threads

ALL, SOME, FOUR = (0, 1, 2), (0, 1), (0, 1, 2, 3)


def _restart(trial):
    trial.let_in(2)


def _leave(trial):
    trial.rounds[2].leave()


def _leave_now(trial):
    """Worker 2 ends within a round."""
    trial.rounds[2].finish_round()


# The plan, and the workers of each round.
PLANS = {
    "nobody": ({}, [ALL] * 6),
    "killed between two steps": ({(2, 2, 1): die}, [ALL, ALL, *[SOME] * 4]),
    "killed before the status": ({(2, 2, "status"): die}, [ALL, ALL, *[SOME] * 4]),
    "killed between status and mean": ({(2, 2, "mean"): die}, [ALL, ALL, *[SOME] * 4]),
    "killed after the mean": ({(2, 2, "after the mean"): die}, [ALL, ALL, ALL, *[SOME] * 3]),
    "two are killed": ({(2, 2, 1): die, (1, 2, "mean"): die}, [ALL, ALL, *[(0,)] * 4]),
    "two are killed, one of them in the repetition": (
        {(2, 2, "mean"): die, (1, 2, "status"): lambda trial: trial.plan.update({(1, 2, "status"): die})},
        [ALL, ALL, *[(0,)] * 4],
    ),
    "killed and restarted": ({(2, 1, "mean"): die, (0, 3, 1): _restart}, [ALL, *[SOME] * 3, ALL, ALL]),
    "the first one is killed and restarted": (
        {(0, 1, "mean"): die, (1, 3, 1): lambda trial: trial.let_in(0)},
        [ALL, *[(1, 2)] * 3, ALL, ALL],
    ),
    "the joiner is killed while it heals": (
        {(2, 1, 1): die, (0, 2, 1): _restart, (2, 3, "receive"): die},
        [ALL, *[SOME] * 5],
    ),
    "the joiner is killed before all know that it has healed": (
        {(2, 1, 1): die, (0, 2, 1): _restart, (2, 3, "barrier"): die},
        [ALL, *[SOME] * 5],
    ),
    "its donor is killed while it heals": (
        {(2, 1, 1): die, (0, 2, 1): _restart, (0, 3, "send"): die},
        [ALL, SOME, SOME, *[(1, 2)] * 3],
    ),
    "one leaves": ({(2, 2, 1): _leave}, [*[ALL] * 3, *[SOME] * 3]),
    "one leaves and comes back": (
        {(2, 1, 1): _leave, (0, 3, 1): _restart},
        [ALL, ALL, SOME, SOME, ALL, ALL],
    ),
    "one ends within a round": ({(2, 2, 1): _leave_now}, [ALL, ALL, *[SOME] * 4]),
    "one comes when the others end": (
        {
            (2, 1, 1): die,
            **{(w, 4, 1): (lambda trial, w=w: trial.rounds[w].leave()) for w in SOME},
            (0, 4, 2): _restart,
        },
        [ALL, *[SOME] * 4, ALL],
    ),
    "a mean arrives at one alone": ({(1, 2, "after the mean"): lose}, [ALL] * 6),
    "a mean arrives at one alone, and that one is killed": (
        {(1, 2, "after the mean"): lose, (0, 2, "after the mean"): lose, (2, 2, "after the mean"): die},
        [ALL, ALL, *[SOME] * 4],
    ),
    "one that was brought up to the others loses one of them at once": (
        {(1, 2, "after the mean"): lose, (2, 3, "barrier"): die},
        [*[ALL] * 3, *[SOME] * 3],
    ),
    "one that leaves repeats first": ({(2, 2, 1): _leave, (1, 2, "mean"): die}, [ALL, ALL, (0, 2), *[(0,)] * 3]),
    "one joins while others repeat": (
        {(2, 1, 1): die, (0, 3, 1): _restart, (1, 3, "after the mean"): lose, (0, 3, "after the mean"): lose},
        [ALL, SOME, SOME, SOME, ALL, ALL],
    ),
    "one of four dies in the mean": ({(3, 2, "mean"): die}, [FOUR, FOUR, *[ALL] * 4]),
    "two of four die at once, one between steps and one in the status": (
        {(3, 2, 1): die, (1, 2, "status"): die},
        [FOUR, FOUR, *[(0, 2)] * 4],
    ),
    "two of four die, one in the status and one in the repeated mean": (
        {(3, 2, "status"): die, (0, 2, "mean"): die},
        [FOUR, FOUR, *[(1, 2)] * 4],
    ),
    "two of four die in turn, and come back in turn": (
        {
            (3, 1, "mean"): die,
            (2, 2, "after the mean"): die,
            (0, 3, 1): _restart,
            (0, 4, 1): lambda trial: trial.let_in(3),
        },
        [FOUR, ALL, ALL, SOME, ALL, FOUR],
    ),
}


@pytest.mark.parametrize("plan", PLANS)
def test_all_are_bitwise_equal_and_the_replay_proves_it(plan):
    events, expected = PLANS[plan]
    trial = Trial(6, expected[0], events)
    logs = trial.run()
    assert not trial.plan  # everything happened
    assert parts_of(logs) == expected
    start = next(log.start for log in logs.values() if log.begins == [0])
    repeated = replay(start, expected)
    for log in logs.values():
        for index, anchors in log.anchors.items():
            assert all(torch.equal(a, b) for a, b in zip(anchors, repeated[index], strict=True)), index


class _Net(nn.Module):
    """A net with buffers, frozen tensors, and a teacher that follows it without an optimizer."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 4))
        self.teacher = nn.Linear(4, 4)
        self.teacher.requires_grad_(False)
        self.net[0].bias.requires_grad_(False)

    def forward(self, x):
        self.teacher.weight.lerp_(self.net[2].weight[:, :4].detach(), 0.1)
        return self.net(x)


def _make_net(seed):
    with seeded(seed):
        model = _Net().double()
    return model, torch.optim.AdamW(model.net.parameters(), lr=0.01)


def _tensors(state):
    """All tensors in nested dicts."""
    for value in state.values():
        if isinstance(value, dict):
            yield from _tensors(value)
        elif isinstance(value, torch.Tensor):
            yield value


@pytest.mark.parametrize(
    ("options", "outer"),
    [
        ({}, None),
        ({"compression": "int8"}, SlowMomentum),
        ({"local_state": "average"}, partial(SlowMomentum, momentum=0.5)),
        ({"local_state": "reset"}, OUTER),
        ({}, partial(LearnedOptimizer, network=AdaMLP.bundled())),
    ],
    ids=["average", "int8", "averaged states", "reset states", "learned"],
)
def test_all_state_is_bitwise_equal_with_any_option(options, outer):
    """Parameters, buffers, a teacher; a death in the mean, and one who joins."""
    make_rounds = partial(Rounds, local_steps=H, outer_optimizer=outer, options=SyncOptions(**options))
    trial = Trial(6, ALL, {(2, 2, "status"): die, (0, 3, 1): _restart}, make_rounds, _make_net)
    assert parts_of(trial.run()) == [ALL, ALL, SOME, SOME, ALL, ALL]
    states = [trial.models[w].state_dict() for w in ALL]
    for name, value in states[0].items():
        assert all(torch.equal(value, state[name]) for state in states), name
    outers = [[*_tensors(trial.rounds[w].sync.state_dict(alone=True)["outer"] or {})] for w in ALL]
    for first, *others in zip(*outers, strict=True):
        assert all(torch.equal(first, other) for other in others)


def _spoil(trial):
    trial.rounds[2].sync.outer.param_groups[0]["params"][0].view(-1)[:2] += torch.tensor([1e-3, -1e-3])


def test_the_weights_of_all_are_compared_after_one_has_joined():
    trial = Trial(9, ALL, {(2, 1, 1): die, (0, 4, 1): _restart, (2, 5, 1): _spoil})
    with pytest.raises(DisagreementError, match="the global weights"):
        trial.run()


def _jump(trial):
    for p in trial.models[2].parameters():
        p.data += 100


def test_one_whose_data_are_new_to_the_others_weights_counts_in_its_first_round():
    """Its pseudo-gradient is far over ten times theirs."""
    trial = Trial(6, ALL, {(2, 1, 1): die, (0, 3, 1): _restart, (2, 4, 2): _jump})
    assert parts_of(trial.run()) == [ALL, SOME, SOME, SOME, ALL, ALL]


class _Remembering:
    """H local steps, as long as it has been asked in every round."""

    def __init__(self):
        self.asked = 0

    def __call__(self, info):
        self.asked += 1
        return H if self.asked == info.round_idx + 1 else 1

    def state_dict(self):
        return {"asked": self.asked}

    def load_state_dict(self, state):
        self.asked = state["asked"]


def test_one_that_joins_takes_over_what_a_schedule_remembers():
    def make_rounds(model, optimizer, elastic):
        return Rounds(model, optimizer, _Remembering(), OUTER, elastic=elastic)

    plan = {(2, 1, "mean"): die, (0, 2, 1): _restart, (1, 4, "after the mean"): lose}
    assert parts_of(Trial(6, ALL, plan, make_rounds).run()) == [ALL, SOME, SOME, ALL, ALL, ALL]


def _fixed(rank, make_comm):
    model, optimizer = make(rank + 1)
    rounds = Rounds(model, optimizer, H, OUTER, comm=make_comm())
    start = flat(model)
    for index in range(4):
        for step in range(H):
            local_step(model, optimizer, rank, index, step)
            rounds.step()
    return start, flat(model), rounds.last_report.workers


def test_without_any_change_it_is_the_run_of_a_fixed_group():
    trial = Trial(4, ALL, {}, make_model=lambda seed: make(seed % 100 + 1))
    trial.run()
    for rank, (start, end, workers) in enumerate(run_threads(_fixed, 3)):
        assert torch.equal(start, torch.cat([p.flatten() for p in trial.logs[rank].start]))
        assert torch.equal(end, flat(trial.models[rank]))
        assert workers == trial.rounds[rank].last_report.workers == ALL


def test_weights_that_are_loaded_before_the_first_meeting_are_where_all_begin():
    def make_rounds(model, optimizer, elastic):
        rounds = Rounds(model, optimizer, H, OUTER, elastic=elastic)
        for tensor in model.state_dict().values():
            tensor.fill_(elastic.worker_id + 1)
        return rounds

    trial = Trial(2, ALL, {}, make_rounds)
    logs = trial.run()
    assert parts_of(logs) == [ALL, ALL]
    assert all((tensor == 1).all() for log in logs.values() for tensor in log.start)


def test_a_checkpoint_of_one_worker_is_enough():
    first = Trial(3, ALL, {})
    logs = first.run()
    saved = first.rounds[1]
    states = saved.state_dict(alone=True), saved.local_state(), saved._local_optimizer.state_dict()

    def make_rounds(model, optimizer, elastic):
        rounds = Rounds(model, optimizer, H, OUTER, elastic=elastic)
        if elastic.worker_id == 1:
            rounds.load_state_dict(states[0])
            rounds.load_local_state(states[1])
            optimizer.load_state_dict(states[2])
        return rounds

    again = Trial(5, ALL, {}, make_rounds).run()
    for log in again.values():
        assert log.begins == [3]
        assert all(torch.equal(a, b) for a, b in zip(log.start, logs[0].anchors[2], strict=True))
        assert all(torch.equal(a, b) for a, b in zip(log.anchors[4], again[0].anchors[4], strict=True))


class _Alone:
    """A membership without others, which remembers what it was asked."""

    worker_id, max_workers = 0, 2

    def meet(self, round_idx, *, settings, repeats, leaves):
        self.settings = settings
        return Members((0,), (round_idx,), None)

    def disconnect(self):
        pass

    close = disconnect


def _settings_of(companion, make_optimizer=torch.optim.SGD, width=6, **arguments):
    model, membership = nn.Linear(4, width), _Alone()
    optimizer = make_optimizer(model.parameters(), lr=0.1)
    rounds = Rounds(model, optimizer, **{"local_steps": 2, "total_steps": 10, **arguments}, elastic=membership)
    rounds.companions = [companion(optimizer, 3)]
    rounds.meet()
    return membership.settings


_StepLR, _ExponentialLR = torch.optim.lr_scheduler.StepLR, torch.optim.lr_scheduler.ExponentialLR


@pytest.mark.parametrize(
    ("changed", "names"),
    [
        ({}, set()),
        ({"total_steps": 11}, {"total_steps"}),  # they would sync at other steps, and take the others with them
        ({"local_steps": 3}, {"local_steps"}),
        ({"outer_optimizer": SlowMomentum}, {"outer optimizer"}),
        ({"width": 7}, {"model"}),
        ({"make_optimizer": torch.optim.Adam}, {"local optimizer"}),
        ({"companion": _ExponentialLR}, {"companions"}),
        ({"options": SyncOptions(compression="int8")}, {"compression"}),
    ],
    ids=str,
)
def test_workers_of_another_run_differ_in_a_setting(changed, names):
    own, other = (_settings_of(**{"companion": _StepLR, **arguments}) for arguments in ({}, changed))
    assert {name for name in own if own[name] != other[name]} == names


def test_the_first_step_needs_a_meeting():
    model, optimizer = make(0)
    rounds = Rounds(model, optimizer, 1, elastic=Trial(0, (), {}).membership(0))
    with pytest.raises(RuntimeError, match=r"call rounds\.meet\(\)"):
        rounds.step()


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"options": SyncOptions(sharded=True)}, "outer state of a lost worker"),
        ({"options": SyncOptions(overlap_steps=1)}, "cannot be repeated"),
        ({"options": SyncOptions(density=0.5)}, "common weights"),
        ({"options": SyncOptions(selection=Fragments(2))}, "common weights"),
        ({"options": SyncOptions(merge=0.5)}, "common weights"),
        ({"worker_speeds": "measured"}, "a fixed number"),
        ({"comm": Communicator()}, "a fixed group"),
        (
            {"outer_optimizer": partial(LearnedOptimizer, network=AdaMLP(inputs=3))},
            "belongs to 3 workers, but there are as many as come",
        ),
    ],
    ids=str,
)
def test_what_cannot_work_is_refused_with_the_reason(arguments, reason):
    model, optimizer = make(0)
    with pytest.raises(ValueError, match=reason):
        Rounds(model, optimizer, 4, elastic=Trial(0, (), {}).membership(0), **arguments)


@pytest.mark.parametrize(
    ("there", "expected"),
    [
        ([Candidate("a", 0, 5), Candidate("b", 1, -1)], "ab"),
        ([Candidate("a", 0, 5), Candidate("b", 1, 5, leaves=True)], "a"),
        ([Candidate("a", 0, 5, leaves=True), Candidate("b", 1, -1)], "ab"),  # who else would have the weights?
        ([Candidate("a", 0, 5, leaves=True), Candidate("b", 1, 5, leaves=True)], ""),
        ([Candidate("a", 0, 5), Candidate("b", 0, -1)], "a"),  # twins
        ([Candidate("a", 0, -1, {"total_steps": "1"}), Candidate("b", 1, 5)], "b"),
    ],
)
def test_who_is_let_in(there, expected):
    assert "".join(c.name for c in admit(there)) == expected


def test_when_a_round_begins():
    new = [Candidate("a", 0), Candidate("b", 1)]
    assert not is_complete(new, new, 1, 3)  # the first round waits for the third
    assert is_complete(new, [new[0]._replace(waited=True), new[1]], 1, 3)
    there = [c._replace(round_idx=2) for c in new]
    assert is_complete(there, there, 2, 3)
    assert not is_complete(there, there, 3, 3)


def test_a_connection_is_given_up_when_one_of_the_others_is_gone():
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        assert _all_listen([address])
    assert not _all_listen([address])
    with pytest.raises(RuntimeError, match="given up"):
        _interruptible(partial(threading.Event().wait, 1), while_true=partial(_all_listen, [address]))


def test_states_of_others_are_not_unpickled():
    file = io.BytesIO()
    torch.save({"rounds": Path("a file")}, file)
    with pytest.raises(pickle.UnpicklingError):
        _from_bytes(torch.frombuffer(file.getbuffer(), dtype=torch.uint8))


@pytest.mark.parametrize(("worker", "most", "least"), [(3, 3, 1), (-1, 3, 1), (0, 3, 4), (0, 3, 0)])
def test_wrong_numbers(worker, most, least):
    with pytest.raises(ValueError, match="0 <= worker_id < max_workers"):
        Elastic("http://127.0.0.1:1", worker, most, least)


@pytest.mark.parametrize(
    ("lighthouse", "seconds", "problem"),
    [("10.0.0.1:29510", 60, "is like"), ("http://10.0.0.1:29510", 600, "must be longer than start_seconds")],
)
def test_wrong_addresses_and_times(lighthouse, seconds, problem):
    with pytest.raises(ValueError, match=problem):
        Elastic(lighthouse, 0, 3, start_seconds=seconds)


def test_a_lighthouse_that_does_not_answer_is_named_with_the_cause(monkeypatch):
    def refuse(address, timeout):
        raise RuntimeError("connection refused")

    monkeypatch.setattr("lightning_lopt.elastic._client_class", lambda: refuse)
    monkeypatch.setattr("lightning_lopt.elastic.CONNECT_SECONDS", 0.1)
    with (
        pytest.warns(UserWarning, match=r"127.0.0.1:1 does not answer.*connection refused"),
        pytest.raises(TimeoutError, match=r"No quorum by the lighthouse http://127.0.0.1:1 .*connection refused"),
    ):
        _meet_alone()


def _meet_alone(settings=None, **arguments):
    alone = Elastic("http://127.0.0.1:1", 0, 3, start_seconds=0, timeout=timedelta(seconds=0.3), **arguments)
    try:
        return alone.meet(-1, settings=settings or {}, repeats=False, leaves=False).workers
    finally:
        alone.close()


def _with_others(monkeypatch, *quorums):
    """Let the lighthouse answer with these candidates, each time with the next ones, and with who asks."""
    answers = iter(quorums)

    class Client:
        def __init__(self, address, timeout):
            pass

        def heartbeat(self, name, timeout):
            pass

        def quorum(self, name, timeout, *, data, **_):
            others = [candidate._asdict() for candidate in next(answers, quorums[-1])]
            return SimpleNamespace(
                participants=[SimpleNamespace(data=json.loads(json.dumps(d))) for d in (data, *others)],
                quorum_id=1,
                created=SimpleNamespace(seconds=0, nanos=0),
            )

    monkeypatch.setattr("lightning_lopt.elastic._client_class", lambda: Client)
    monkeypatch.setattr("lightning_lopt.elastic.PAUSE_SECONDS", 0.01)
    monkeypatch.setattr("lightning_lopt.elastic.CONNECT_SECONDS", 0.05)


RUN = {"total_steps": "100", "min_workers": "1", "max_workers": "3"}


def test_a_setting_that_differs_is_named_with_both_values(monkeypatch):
    _with_others(monkeypatch, [Candidate("b", 1, 4, {**RUN, "companions": "StepLR"})])
    with pytest.raises(
        DisagreementError, match=r"\[1\], .*\(total_steps: 100, here 50; companions: StepLR, here None\)"
    ):
        _meet_alone({"total_steps": "50"})


def test_a_second_one_of_a_number_is_refused(monkeypatch):
    _with_others(monkeypatch, [Candidate("b", 0, 4, RUN)])
    with pytest.raises(
        DisagreementError, match=r"a worker 0 already: give each its own worker_id\. If it is an earlier"
    ):
        _meet_alone({"total_steps": "100"})


def test_one_that_comes_before_its_earlier_life_has_left_waits_for_that(monkeypatch):
    """Another worker makes the earlier life free to go; then this one is alone, so that it need not connect."""
    _with_others(monkeypatch, [Candidate("b", 0, 4, RUN, leaves=True), Candidate("c", 1, 4, RUN)], [])
    assert _meet_alone({"total_steps": "100"}) == [0]


def test_one_that_waits_says_for_whom_and_where_they_are(monkeypatch):
    _with_others(monkeypatch, [])
    said = r"worker 0 at 127.0.0.1:\d+; min_workers=2 are needed, .* \(host=\.\.\.\)"
    with pytest.warns(UserWarning, match=said), pytest.raises(TimeoutError, match=f"No round began .*{said}"):
        _meet_alone(min_workers=2)


def test_a_host_that_is_none_of_this_machine_is_named(monkeypatch):
    _with_others(monkeypatch, [])
    with pytest.raises(ValueError, match=r"address of this machine .*, not '192\.0\.2\.1'"):
        _meet_alone(host="192.0.2.1")


def test_without_torchft_the_error_says_where_it_exists(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchft", None)
    monkeypatch.setitem(sys.modules, "torchft.coordination", None)
    with pytest.raises(ModuleNotFoundError, match="Linux on x86_64"):
        Elastic("http://127.0.0.1:1", 0, 3)


# -- real processes on torchft's lighthouse ---------------------------------------------------------------------------

STEP_SECONDS, ROUNDS = 0.03, 14


def _die_at(place, rounds, index):
    """Let the process kill itself as it comes to a collective, in a round or after it, or to its first connection."""
    if place == "connect":
        GlooCollectives.__init__ = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
    names = {"status": "all_reduce", "mean": "all_reduce", "send": "send", "receive": "recv"}
    if place not in names:
        return
    method = getattr(GlooCollectives, names[place])

    def replaced(self, tensor, *args, **options):
        summed = tensor.is_floating_point()
        if rounds.round_idx >= index and (names[place] != "all_reduce" or summed == (place == "mean")):
            os.kill(os.getpid(), signal.SIGKILL)
        method(self, tensor, *args, **options)

    setattr(GlooCollectives, names[place], replaced)


def _work(worker, life, port, folder, place, index):
    torch.set_num_threads(1)
    log = (folder / f"{worker}.jsonl").open("a", buffering=1)

    def note(event, **values):
        print(json.dumps({"event": event, "life": life, "time": time.time(), **values}), file=log)

    model, optimizer = make(100 * life + worker)
    rounds = Rounds(model, optimizer, H, OUTER, elastic=torchft_member(worker, port))
    signal.signal(signal.SIGTERM, lambda *_: rounds.leave())
    _die_at(place, rounds, index)
    note("up")
    rounds.meet()
    note("begins", round=rounds.round_idx)
    if rounds.round_idx == 0:
        torch.save([p.detach() for p in model.parameters()], folder / "start.pt")
    while rounds.round_idx < ROUNDS and not rounds.left:
        present = rounds.round_idx
        for step in range(H):
            if place == "step" and (present, step) == (index, 1):
                os.kill(os.getpid(), signal.SIGKILL)
            local_step(model, optimizer, worker, present, step)
            time.sleep(STEP_SECONDS)
            start = time.time()
            rounds.step()
        torch.save([p.detach() for p in model.parameters()], folder / f"{worker}.{present}.pt")
        workers = rounds.last_report.workers
        note("round", round=present, workers=workers, seconds=time.time() - start, here=rounds.comm.workers)
    note("ends", left=rounds.left)


class _Run(Processes):
    def start(self, worker, life=0, place="", index=-1):
        return self.launch(_work, worker, life, self.port, self.folder, place, index)

    def parts(self):
        """The workers of each round, whose anchors are bitwise the same on all and equal the replay's."""
        rounds = {w: {event["round"]: event["workers"] for event in self.events(w, "round")} for w in ALL}
        parts = []
        for index in range(ROUNDS):
            (workers,) = {tuple(r[index]) for r in rounds.values() if index in r}
            parts.append(workers)
        for index, expected in enumerate(replay(torch.load(self.folder / "start.pt"), parts)):
            found = [torch.load(self.folder / f"{w}.{index}.pt") for w in ALL if index in rounds[w]]
            for anchors in found:
                assert all(torch.equal(a, b) for a, b in zip(anchors, found[0], strict=True)), index
                for a, b in zip(anchors, expected, strict=True):
                    torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
        return parts


@pytest.fixture
def run(tmp_path):
    pytest.importorskip("torchft")
    run = _Run(tmp_path, multiprocessing.get_context("fork"))
    yield run
    run.kill()


def _seconds_to_go_on(run, killed, index, workers=SOME):
    """Seconds from a death until the first end of a round after it, of the slowest of the others."""
    return max(min(e["time"] for e in run.events(w, "round") if e["round"] >= index) for w in workers) - killed


@pytest.mark.long
@pytest.mark.parametrize("place", ["step", "status", "mean"])
def test_one_is_killed_and_joins_again(run, place):
    workers = [run.start(w, place=place if w == 2 else "", index=3) for w in ALL]
    workers[2].join(40)
    killed = time.time()
    run.wait_for(0, 4)
    restarted = time.time()
    run.start(2, life=1)
    run.end()
    (joined,) = {event["round"] for event in run.events(2, "begins") if event["life"] == 1}
    assert run.parts() == [ALL] * 3 + [SOME] * (joined - 3) + [ALL] * (ROUNDS - joined)
    (up,), (begins,) = ([e["time"] for e in run.events(2, name) if e["life"] == 1] for name in ("up", "begins"))
    went_on = _seconds_to_go_on(run, killed, 3)
    print(
        f"{place}: went on after {went_on:.2f} s; joined after {begins - restarted:.2f} s, {begins - up:.2f} s after up"
    )
    assert went_on < HEARTBEAT + 1 + H * STEP_SECONDS
    assert begins - up < H * STEP_SECONDS + 1


@pytest.mark.long
def test_two_of_three_are_killed(run):
    workers = [run.start(w, place=["", "step", "mean"][w], index=3) for w in ALL]
    workers[2].join(40)
    workers[1].join(40)
    killed = time.time()
    run.end()
    assert run.parts() == [ALL] * 3 + [(0,)] * (ROUNDS - 3)
    assert _seconds_to_go_on(run, killed, 3, (0,)) < HEARTBEAT + 1 + H * STEP_SECONDS


@pytest.mark.long
@pytest.mark.parametrize("dies", ["the joiner", "its donor"])
def test_one_is_killed_while_a_worker_heals(run, dies):
    """The second life of worker 2 takes over the state of worker 0."""
    donor_dies = dies == "its donor"
    first = run.start(0, place="send" if donor_dies else "", index=1)
    run.start(1)
    run.start(2, place="step", index=2).join(40)
    run.wait_for(1, 3)
    again = run.start(2, life=1, place="" if donor_dies else "receive", index=0)
    (first if donor_dies else again).join(40)
    run.end()
    parts = run.parts()
    assert parts[:4] == [ALL, ALL, SOME, SOME]
    assert parts[-1] == ((1, 2) if donor_dies else SOME)


@pytest.mark.long
def test_one_is_killed_while_the_others_connect_to_it(run):
    run.start(0)
    run.start(1)
    run.start(2, place="step", index=2).join(40)
    run.wait_for(1, 3)
    again = run.start(2, life=1, place="connect")
    again.join(40)
    killed = time.time()
    last = max(event["round"] for event in run.events(0, "round"))
    run.end()
    assert run.parts() == [ALL, ALL, *[SOME] * (ROUNDS - 2)]
    went_on = _seconds_to_go_on(run, killed, last + 1)
    print(f"connect: went on after {went_on:.2f} s")
    assert went_on < HEARTBEAT + 1 + H * STEP_SECONDS


@pytest.mark.long
def test_the_lighthouse_is_killed_and_comes_back(run):
    for worker in ALL:
        run.start(worker)
    run.wait_for(0, 2)
    run.lighthouse.kill()
    time.sleep(1.5)
    assert len({len(run.events(w, "round")) for w in ALL}) == 1  # all wait
    run.restart_lighthouse()
    run.end()
    assert run.parts() == [ALL] * ROUNDS


@pytest.mark.long
def test_a_signal_is_a_leave(run):
    workers = [run.start(w) for w in ALL]
    run.wait_for(2, 2)
    workers[2].terminate()
    run.end()
    (last,) = [event["round"] for event in run.events(2, "round")][-1:]
    assert run.parts() == [ALL] * (last + 1) + [SOME] * (ROUNDS - last - 1)
    assert run.events(2, "ends")[0]["left"]


def _listening():
    """Addresses at which this process listens, as the kernel writes them."""
    inodes = {os.readlink(link) for link in Path("/proc/self/fd").iterdir() if link.is_symlink()}
    found = set()
    for name in ("tcp", "tcp6"):
        rows = [line.split() for line in Path(f"/proc/self/net/{name}").read_text().splitlines()[1:]]
        found |= {row[1].split(":")[0] for row in rows if row[3] == "0A" and f"socket:[{row[9]}]" in inodes}
    return found


def _meet_once(connection, worker, port, seed, local_steps):
    model, optimizer = make(seed)
    rounds = Rounds(model, optimizer, local_steps, OUTER, elastic=torchft_member(worker, port, start_seconds=5))
    try:
        rounds.meet()
        for step in range(3 * H):
            local_step(model, optimizer, worker, 0, step)
            rounds.step()
        connection.send((None, _listening()))
    except Exception as error:
        connection.send((repr(error), set()))


@pytest.mark.long
def test_it_listens_at_one_interface_and_strangers_are_turned_away(run):
    """A twin, and a worker with other settings, get errors; the others go on."""
    found = []
    for worker, local_steps in ((0, H), (1, H), (1, H), (2, H + 1)):
        receive, send = run.context.Pipe(duplex=False)
        run.launch(_meet_once, send, worker, run.port, worker, local_steps)
        found.append(receive)
    results = [receive.recv() for receive in found]
    errors = [error for error, _ in results if error is not None]
    assert sorted("already" in error for error in errors) == [False, True]
    assert any("other settings" in error for error in errors)
    addresses = [listening for error, listening in results if error is None]
    assert addresses == [{"0100007F"}] * 2
