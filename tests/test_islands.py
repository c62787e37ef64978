"""Workers whose two ranks share one model by FSDP2, beside plain workers that see the same rows."""

from __future__ import annotations

import copy
import sys
import warnings
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.functional import cross_entropy
from torch.nn.utils.parametrizations import spectral_norm

from lightning_lopt import AdaMLP, LearnedOptimizer, PowerSGD, Rounds, SlowMomentum, SyncOptions, TopK
from lightning_lopt.comm import Communicator, DisagreementError
from lightning_lopt.islands import Box, LocalShards, WholeTensors, hold, local_shard
from lightning_lopt.selection import Fragments
from lightning_lopt.strategies.islands import full_state_dict, load_full_state_dict
from tests.optim.test_outer import Norm
from tests.processes import run_cases

CPU = torch.device("cpu")
VOCABULARY, WIDTH, H, STEPS = 13, 5, 4, 12  # odd sizes: shards are uneven
DILOCO = partial(torch.optim.SGD, lr=0.7, momentum=0.9, nesterov=True)


class _Model(nn.Module):
    def __init__(self, hidden: int = 9) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        block = nn.Sequential(nn.Linear(WIDTH, hidden), nn.Tanh(), nn.Linear(hidden, WIDTH))
        self.blocks = nn.ModuleList([block, copy.deepcopy(block)])
        self.scale = nn.Parameter(torch.ones(1))  # one of two shards is empty
        self.register_buffer("mean", torch.zeros(WIDTH))
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def reset_parameters(self):
        nn.init.ones_(self.scale)
        self.mean.zero_()

    def forward(self, tokens):
        x = self.embed(tokens)
        for block in self.blocks:
            x = x + block(x)
        if self.training:
            self.mean = 0.9 * self.mean + 0.1 * x.detach().mean((0, 1))
        return self.head(x * self.scale)


def _shard(model, mesh, **options):
    for block in model.blocks:
        fully_shard(block, mesh=mesh, **options)
    fully_shard(model, mesh=mesh, **options)


def _split_matrices(model, mesh):
    """Tensor parallelism of the blocks, of even width; the other parameters are plain, and the same on all ranks."""
    for block in model.blocks:
        parallelize_module(block, mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})


def _batch(worker, step):
    generator = torch.Generator().manual_seed(100 * worker + step)
    start = torch.randint(VOCABULARY, (4, 1), generator=generator)
    return (start + (1 + worker) * torch.arange(6)) % VOCABULARY


def _loss(model, tokens):
    return cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())


def _nothing(step):
    pass


def _clip(parameters):
    """Clip to norm 1 as torch does, but before 2.11 that adds its 1e-6 to the norm of each shard (pytorch#149768)."""
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters])
    norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
    for p in parameters:
        p.grad.mul_(min(1.0, 1 / (norm.item() + 1e-6)))


def _train(model, optimizer, rounds, worker, part=0, parts=1, clip=True, change=_nothing, spoil=_nothing):
    reports = []
    for step in range(STEPS):
        change(step)
        loss = _loss(model, _batch(worker, step).chunk(parts)[part])
        optimizer.zero_grad()
        loss.backward()
        if clip:
            _clip([p for p in model.parameters() if p.grad is not None])
        optimizer.step()
        spoil(step)
        if rounds.step():
            reports.append(rounds.last_report)
    return reports


class _Wild(torch.optim.SGD):
    """Steps that are refused because of one tensor, of which one of two ranks has nothing."""

    max_update_ratio = 3.0

    @torch.no_grad()
    def step(self, closure=None):
        super().step()
        for p in (p for group in self.param_groups for p in group["params"]):
            if p.grad is not None and p.numel() == 1:
                p += 100


CASES = {
    "mean": (None, {}),
    "diloco": (DILOCO, {}),
    "adam": (partial(torch.optim.Adam, lr=1e-2), {}),
    "learned": (LearnedOptimizer, {}),
    "lagg": (partial(LearnedOptimizer, network=AdaMLP(2, seed=0)), {}),
    "sums": (Norm, {}),
    "refused": (partial(_Wild, lr=0.7), {}),
    "overlap": (DILOCO, {"overlap_steps": 2}),
    "learned, overlap": (LearnedOptimizer, {"overlap_steps": 2}),
    "fragments": (DILOCO, {"selection": Fragments(2)}),
    "sharded": (partial(SlowMomentum, momentum=0.5), {"sharded": True}),
    "sums, sharded": (Norm, {"sharded": True}),
    "learned, sharded": (LearnedOptimizer, {"sharded": True}),
    "learned, fragments": (LearnedOptimizer, {"selection": Fragments(3)}),
    "reset": (DILOCO, {"local_state": "reset"}),
    "learned, reset": (LearnedOptimizer, {"local_state": "reset", "selection": Fragments(3)}),
    "average": (DILOCO, {"local_state": "average"}),
    "learned, average": (LearnedOptimizer, {"local_state": "average"}),
    "factors": (DILOCO, {"compression": PowerSGD(2)}),
    "density": (None, {"density": 0.5}),
    "bf16": (LearnedOptimizer, {"compression": "bf16"}),
    "int8": (DILOCO, {"compression": "int8"}),
    "top-k": (DILOCO, {"compression": TopK(0.3)}),
    "spoiled": (DILOCO, {}),
    "learned, spoiled": (LearnedOptimizer, {}),
    "written": (DILOCO, {}),
    "learned, written": (LearnedOptimizer, {}),
    "matrices": (DILOCO, {}),
    "learned, matrices": (LearnedOptimizer, {}),
    "singular vectors": (DILOCO, {}),
    "learned, singular vectors": (LearnedOptimizer, {}),
    "teacher": (DILOCO, {}),
    "learned, teacher": (LearnedOptimizer, {}),
    "teacher of the first": (DILOCO, {"sync_rules": {"teacher.*": "first"}}),
    "frozen later": (DILOCO, {}),
    "learned, frozen later": (LearnedOptimizer, {}),
}
LOSSY = {"density": 0.05, "bf16": 1e-3, "int8": 1e-3, "top-k": 0.05}  # other coordinates and blocks than of the whole


def _run(rank, name, islands):
    outer, options = CASES[name]
    torch.set_default_dtype(torch.float64)
    matrices = "matrices" in name
    model, comm, part, parts, worker = _Model(8 if matrices else 9), Communicator(), 0, 1, rank
    if "singular" in name:
        spectral_norm(model.head)
    if "teacher" in name:
        model.teacher = copy.deepcopy(model.head).requires_grad_(False)
    if islands:
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("worker", "shard"))
        worker = mesh.get_local_rank("worker")
        if matrices:
            _split_matrices(model, mesh["shard"])
        else:
            _shard(model, mesh["shard"])
            part, parts = mesh.get_local_rank("shard"), 2
        comm = Communicator(ranks_per_worker=2, by_column=True)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2, foreach=not matrices)  # it takes one kind of tensor
    rounds = Rounds(model, optimizer, H, outer, options=SyncOptions(**options), comm=comm, total_steps=STEPS)
    comm.bytes_sent = 0

    def change(step):
        if "written" in name and step == H:  # in one of two shards
            with torch.no_grad():
                model.scale.add_(1)

        if "frozen" in name and step == H + 1:
            model.blocks[0].requires_grad_(False)

    def spoil(step):
        if "teacher" in name:
            with torch.no_grad():
                for own, p in zip(model.teacher.parameters(), model.head.parameters(), strict=True):
                    own.lerp_(p, 0.1)
        if "spoiled" in name and worker == 1 and step == 2 * H - 1:
            weight = model.head.weight.to_local() if islands else model.head.weight
            if rank == (3 if islands else 1):
                weight.data[-1, -1] = float("nan")

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        reports = _train(model, optimizer, rounds, worker, part, parts, not matrices, change, spoil)
    if islands and not matrices:
        model.reshard()
    weights = {n: (p.full_tensor() if isinstance(p, DTensor) else p).detach() for n, p in model.named_parameters()}
    numbers = [[r.pseudo_grad_norm, r.drift, r.left_out, r.fell_back] for r in reports]
    said = [str(w.message) for w in caught if str(w.message).startswith("Round ")]
    return weights, model.mean, comm.bytes_sent, torch.tensor(numbers, dtype=torch.float64), said


@pytest.fixture(scope="module")
def results():
    """Islands and plain workers, by case."""
    islands = run_cases(_run, 4, {name: (name, True) for name in CASES})
    return islands, run_cases(_run, 2, {name: (name, False) for name in CASES})


@pytest.mark.parametrize("name", [name for name in CASES if name not in LOSSY])
def test_islands_train_as_plain_workers_do(results, name):
    islands, plain = (of_kind[name] for of_kind in results)
    for rank, (weights, mean, sent, numbers, _) in enumerate(islands):
        expected, expected_mean, all_sent, expected_numbers, _ = plain[rank // 2]
        for key, value in expected.items():
            torch.testing.assert_close(weights[key], value, rtol=0, atol=1e-10, msg=lambda m, key=key: f"{key}: {m}")
        torch.testing.assert_close(mean, expected_mean, rtol=0, atol=1e-10)
        torch.testing.assert_close(numbers, expected_numbers, rtol=1e-8, atol=1e-10)
        assert "matrices" in name or sent < 0.75 * all_sent


@pytest.mark.parametrize("name", LOSSY)
def test_islands_send_a_share_of_what_loses_something(results, name):
    """The last sync of a run sends everything, so that all end with the same weights."""
    islands, plain = (of_kind[name] for of_kind in results)
    weights, _, sent, *_ = islands[0]
    for key, value in plain[0][0].items():
        assert all(torch.equal(other[0][key], weights[key]) for other in islands)
        torch.testing.assert_close(weights[key], value, rtol=0, atol=LOSSY[name])
    assert sent < 0.75 * plain[0][2]


def test_what_one_rank_finds_holds_for_its_worker(results):
    """A value that is not finite in one shard, a step that is too large in another: both ranks act, and one warns."""
    for name, column, counts, said in (
        ("spoiled", 2, [0, 1, 0], "Round 1 leaves out worker 1 (not finite)"),
        ("refused", 3, [1, 1, 1], "Round 0: the outer step was refused"),
    ):
        for rank, (*_, numbers, warned) in enumerate(results[0][name]):
            assert numbers[:, column].tolist() == counts
            assert [text[: len(said)] for text in warned[:1]] == ([said] if rank == 0 else [])


# -- set-up -----------------------------------------------------------------------------------------------------------


def _model_of(shape=(2, 2), dim="shard", **options):
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("worker", "shard"))
    model = _Model()
    _shard(model, mesh[dim], **options)
    return model, mesh


def _rounds(model, ranks_per_worker=2):
    comm = Communicator(ranks_per_worker=ranks_per_worker, by_column=True)
    return Rounds(model, torch.optim.SGD(model.parameters(), lr=0.1), 2, comm=comm)


def _refused(make):
    with pytest.raises((ValueError, DisagreementError)) as error:
        make()
    return str(error.value)


def _each_rank_is_a_worker(rank):
    return _refused(lambda: _rounds(_model_of()[0], 1))


def _mesh_beyond_the_worker(rank):
    return _refused(lambda: _rounds(_model_of(dim="worker")[0]))


def _stages_of_a_pipeline(rank):
    model, _ = _model_of()
    if rank % 2:
        del model.blocks[1]
    return _refused(lambda: _rounds(model))


def _flat_parameters(rank):
    return _refused(lambda: _rounds(nn.Sequential(FullyShardedDataParallel(nn.Linear(2, 2), device_id=CPU))))


def _offloaded(rank):
    model, _ = _model_of()
    with pytest.MonkeyPatch.context() as patch:  # a mesh of GPUs whose shards are in the memory of the host
        patch.setattr(DeviceMesh, "device_type", property(lambda _: "cuda"), raising=False)
        return _refused(lambda: _rounds(model))


def _another_anchor(rank):
    rounds = _rounds(_model_of()[0])
    if rank == 3:
        next(p.anchor for p in rounds.sync.replica.parameters() if p.anchor.numel())[0] += 1e-7
    rounds.step()
    return _refused(rounds.step)


def _groups(rank):
    """Process groups that FSDP does not use: a sync in flight would come between its collectives."""
    _, mesh = _model_of()
    comm = Communicator(ranks_per_worker=2, by_column=True)
    of_mesh = {mesh.get_group(name) for name in ("worker", "shard")} | {dist.group.WORLD}
    return not of_mesh & {comm._group, comm._island, comm._world}


def _sums_silently(rank, forced):
    """Steps of SGD over a backend that sums where it is told to average; gradients in float64 are always summed."""
    torch.set_default_dtype(torch.float32)
    called = "reduce_scatter_single" if hasattr(dist, "reduce_scatter_single") else "reduce_scatter_tensor"
    reduce_scatter = getattr(dist, called)

    def sum_silently(output, input, op=dist.ReduceOp.SUM, **options):
        return reduce_scatter(output, input, op=dist.ReduceOp.SUM, **options)

    results = []
    for broken in (False, True) if forced else (True,):
        with pytest.MonkeyPatch.context() as patch:
            if broken:
                patch.setattr(dist, called, sum_silently)
            if not forced:
                patch.delattr(FSDPModule, "set_force_sum_reduction_for_comms")
            model, mesh = _model_of()
            if not forced:
                return _refused(lambda model=model: _rounds(model))
            rounds = _rounds(model)
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            for step in range(2):
                optimizer.zero_grad()
                _loss(model, _batch(rank // 2, step).chunk(2)[mesh.get_local_rank("shard")]).backward()
                optimizer.step()
                rounds.step()
            results.append(torch.cat([p.full_tensor().detach().flatten() for p in model.parameters()]))
    return results


def _whole_tensors(rank, kind):
    """Largest difference of what a rank holds from the whole tensors, before and after a change."""
    model, ranks = _Model(), ("replicate", "shard") if kind == "replicas" else ("shard", "matrix")
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=ranks)
    model.blocks[0][0].weight.requires_grad_(False)
    model.blocks[1][2].weight = model.blocks[0][2].weight  # tied
    if kind == "both":
        _split_matrices(model, mesh["matrix"])
        _shard(model, mesh["shard"])
    elif kind == "replicas":
        _shard(model, mesh)
    elif kind == "columns":
        model = _Model(8)  # torch splits columns evenly
        _shard(model, mesh["shard"], shard_placement_fn=lambda p: Shard(1) if p.ndim == 2 and p.shape[1] == 8 else None)
    else:
        model = nn.Linear(5, 7, bias=False)  # fewer tensors than ranks
        fully_shard(model, mesh=init_device_mesh("cpu", (4,)))
    held = WholeTensors(
        model, torch.optim.SGD(model.parameters(), lr=0.1), Communicator(ranks_per_worker=4, by_column=True)
    )
    differences, names = [], dict(model.named_parameters())
    for change in (0, 1):
        for own in held.held.values():
            own.data += change
        held.push()
        if change:
            held.pull()
        whole = {n: p.full_tensor() if isinstance(p, DTensor) else p.detach() for n, p in names.items()}
        differences += [float((whole[name] - own).abs().max()) for name, own in held.named_parameters()]
    total = torch.tensor(sum(own.numel() for own in held.held.values()))
    dist.all_reduce(total)
    return differences, total.item() == sum(p.numel() for p in model.parameters())


def _names_of_wrapped(rank):
    """Compiled blocks, and those that checkpoint activations, have the names of the module in files, and their own."""
    (model, mesh), plain = _model_of((1, 4)), _Model()
    comm = Communicator(ranks_per_worker=4, by_column=True)
    wrapped = _Model()
    for own in (wrapped, plain):
        own.blocks[0], own.blocks[1] = torch.compile(own.blocks[0]), checkpoint_wrapper(own.blocks[1])
    _shard(wrapped, mesh["shard"])
    full = full_state_dict(wrapped)
    wrapped.mean += 1  # of which it has a copy
    layouts = [LocalShards(m, torch.optim.SGD(m.parameters(), lr=0.1), comm).layout() for m in (model, wrapped)]
    with torch.no_grad():
        for p in wrapped.parameters():
            p.zero_()
    expected = plain.state_dict()
    load_full_state_dict(wrapped, expected, strict=True)
    loaded = all(torch.equal(local_shard(p), Box.of(p).of_whole(expected[n])) for n, p in wrapped.state_dict().items())
    with pytest.raises(RuntimeError, match=r"Missing key.*head\.bias"):
        load_full_state_dict(wrapped, {n: v for n, v in expected.items() if n != "head.bias"}, strict=True)
    same = [*full] == ([*expected] if rank == 0 else []) and not full.get("mean", torch.zeros(1)).any()
    return same, layouts[0] == layouts[1], loaded


def _kinds_held(rank):
    """What is held for the mean: shards, but whole tensors where several ranks have the same."""
    comm = Communicator(ranks_per_worker=4, by_column=True)
    kinds = []
    for shape in ((1, 4), (2, 2)):
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard"))
        model = _Model()
        _shard(model, mesh if shape[0] > 1 else mesh["shard"])
        kinds.append(type(hold(model, torch.optim.SGD(model.parameters(), lr=0.1), comm, whole=False)))
    return kinds == [LocalShards, WholeTensors]


SET_UP = {
    "each rank is a worker": (_each_rank_is_a_worker,),
    "mesh beyond the worker": (_mesh_beyond_the_worker,),
    "stages of a pipeline": (_stages_of_a_pipeline,),
    "flat parameters": (_flat_parameters,),
    "offloaded": (_offloaded,),
    "another anchor": (_another_anchor,),
    "groups": (_groups,),
    "kinds held": (_kinds_held,),
    "names": (_names_of_wrapped,),
    "sums": (_sums_silently, True),
    "sums, old torch": (_sums_silently, False),
    **{f"whole {kind}": (_whole_tensors, kind) for kind in ("both", "replicas", "columns", "few")},
}


def _case(rank, function, *arguments):
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    return function(rank, *arguments)


@pytest.fixture(scope="module")
def set_up():
    return run_cases(_case, 4, SET_UP)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("each rank is a worker", "sharded over 2 ranks (DTensor), but each process is a worker here"),
        ("mesh beyond the worker", "the mesh of a DTensor must lie within one worker"),
        ("stages of a pipeline", "other parameters, as the stages of a pipeline"),
        ("flat parameters", "wrapped with FullyShardedDataParallel (FSDP1)"),
        ("offloaded", "shards that are offloaded cannot be exchanged between workers"),
        ("another anchor", "The workers disagree on the global weights"),
        ("sums, old torch", "gradients would be 2 times too large: use torch >= 2.8"),
    ],
)
def test_all_ranks_refuse_what_cannot_work(set_up, name, message):
    assert [message in said for said in set_up[name]] == [True] * 4, set_up[name]


class _Engine(nn.Module):
    """Stands for `deepspeed.DeepSpeedEngine`."""

    def __init__(self, module):
        super().__init__()
        self.module = module


def _partitioned(module):
    """What `deepspeed.zero.Init` leaves of parameters: nothing, and a number."""
    for i, p in enumerate(module.parameters()):
        p.data, p.ds_id = torch.empty(0), i
    return module


@pytest.mark.parametrize("wrap", [_Engine, _partitioned])
def test_modules_of_deepspeed_are_refused(wrap, monkeypatch):
    monkeypatch.setitem(sys.modules, "deepspeed", SimpleNamespace(DeepSpeedEngine=_Engine))
    model = nn.Sequential(wrap(nn.Linear(2, 2)), nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"modules of DeepSpeed, .* Leave out .*fully_shard \(FSDP2\)"):
        Rounds(model, torch.optim.SGD(model.parameters(), lr=0.1), 2)


def test_a_sync_has_process_groups_of_its_own(set_up):
    assert set_up["groups"] == [True] * 4


def test_wrapped_blocks_change_no_names_in_files(set_up):
    assert set_up["names"] == [(True, True, True)] * 4


def test_gradients_are_means_where_the_backend_sums(set_up):
    for expected, weights in set_up["sums"]:
        torch.testing.assert_close(weights, expected, rtol=0, atol=1e-6)


def test_nothing_is_sent_or_counted_twice(set_up):
    assert set_up["kinds held"] == [True] * 4


@pytest.mark.parametrize("kind", ["both", "replicas", "columns", "few"])
def test_whole_tensors_are_gathered_and_scattered(set_up, kind):
    for differences, complete in set_up[f"whole {kind}"]:
        assert max(differences, default=0.0) == 0.0
        assert complete


# -- one rank: a fast look at what happens to DTensors ----------------------------------------------------------------


def train_alone(device, name, sharded):
    """Weights of one worker of one rank, and losses of its global weights in mid-round, in float64.

    Args:
        device: Type of the device.
        name: One of `CASES`.
        sharded: Whether the model is sharded over a mesh of one device; there must be a process group.
    """
    outer, options = CASES[name]
    model, losses = _Model().to(device, torch.float64), []
    if sharded:
        _shard(model, init_device_mesh(device, (1,)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    rounds = Rounds(model, optimizer, H, outer, options=SyncOptions(**options), total_steps=STEPS)
    for step in range(STEPS):
        tokens = _batch(0, step).to(device)
        optimizer.zero_grad()
        _loss(model, tokens).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        rounds.step()
        if step % H == 1:  # before or within a flight
            rounds.swap_in("anchor")
            with torch.no_grad():
                losses.append(_loss(model.eval(), tokens).item())
            rounds.swap_out()
            model.train()
    if sharded:
        model.reshard()
    return [(p.full_tensor() if sharded else p).detach().cpu() for p in model.parameters()], losses


ALONE = ["mean", "diloco", "learned", "overlap", "learned, overlap"]


def _alone(rank, name):
    return train_alone("cpu", name, True), train_alone("cpu", name, False)


@pytest.fixture(scope="module")
def alone():
    return run_cases(_alone, 1, {name: (name,) for name in ALONE})


@pytest.mark.parametrize("name", ALONE)
def test_a_worker_of_one_rank_may_be_sharded(alone, name):
    (((weights, losses), (expected, expected_losses)),) = alone[name]
    torch.testing.assert_close(weights, expected, rtol=0, atol=1e-12)
    assert losses == pytest.approx(expected_losses, abs=1e-12)
