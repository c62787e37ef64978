"""AdaMLP: its arguments, the ablation without Ada features, and the bundled weights."""

from __future__ import annotations

from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import ClassVar

import pytest
import torch

from lightning_lopt import AdaMLP, LearnedLocalSGD, LearnedOptimizer, WeightsError


def test_missing_file_and_name():
    for wrong in ("nowhere.safetensors", "defualt"):
        with pytest.raises(FileNotFoundError, match=rf"no weights file {wrong}\. Give a path that .* \['default', "):
            LearnedLocalSGD(network=wrong)
    with pytest.raises(WeightsError, match="no bundled weights 'nonsense'"):
        AdaMLP.bundled("nonsense")


@pytest.mark.parametrize(
    "options",
    [
        *({"inputs": inputs} for inputs in (0, True, "all")),
        *({"hidden": hidden} for hidden in ((), 8, (8,), (8, 8, 8), (8, 0), (8, -1), (8, 8.0), "ab")),
        {"step_mult": 0},
        {"exp_mult": -1},
        {"update": "x"},
    ],
    ids=str,
)
def test_wrong_arguments(options):
    with pytest.raises(ValueError, match="must be"):
        AdaMLP(**options)


def test_the_ablation_is_an_mlp_on_gradient_parameter_and_time():
    """LOpt, written out: whatever the accumulators hold, 13 inputs make the step."""
    network = AdaMLP(hidden=(6, 5), step_mult=0.5, ada_features=False, seed=0)
    p = torch.nn.Parameter(torch.linspace(-1, 2, 12).view(3, 4))
    outer = LearnedOptimizer([p], network)
    first, second, last = (layer for layer in network.layers)
    weight = torch.cat([first.weight[:, :2], first.weight[:, -11:]], 1)
    scales = torch.tensor([1, 3, 10, 30, 100, 300, 1_000, 3_000, 10_000, 30_000, 100_000])
    for t in range(3):
        p.grad = torch.randn(3, 4)
        normed = [x * (x.square().mean() + 1e-5).rsqrt() for x in (p.grad, p.detach().clone())]
        time = torch.tanh(t / scales - 1).expand(3, 4, 11)
        hidden = torch.cat([torch.stack(normed, -1), time], -1) @ weight.T + first.bias
        d, m = last(second(hidden.relu()).relu()).unbind(-1)
        expected = p.detach() - 0.5 * d * torch.exp(0.001 * m)
        outer.step()
        torch.testing.assert_close(p.detach(), expected.detach())


def test_the_ablation_is_saved_with_the_network(tmp_path):
    AdaMLP(ada_features=False).save(tmp_path / "lopt.safetensors")
    assert not AdaMLP.load(tmp_path / "lopt.safetensors").ada_features
    with pytest.raises(ValueError, match="ada_features must be True"):
        AdaMLP(update="blended_nesterov", ada_features=False)


@pytest.mark.parametrize("options", [{"lr": 0}, {"lr": 10}, {"momentum": 0}, {"momentum": 1}])
def test_wrong_arguments_of_the_base_step(options):
    with pytest.raises(ValueError, match="must be in"):
        AdaMLP.base_step(**options)


# Sums of three tensors and their first number after four steps, as the first release with the name computed them; the
# default's as its update of 0.2 does (CHANGELOG, numerics).
STEPS_OF_BUNDLED = {
    "default": [-19.586697079022, -0.886528138803, 21.213512049635, 1.5570488516490024],
    "lagg_a_short": [-3.148743539912, -1.273139408679, -0.978794702537, 1.5405628831758833],
    "lagg_short": [-3.141486185822, -1.270607315508, -0.951089257627, 1.541832929135854],
    "lopt_a": [-3.182861559706, -1.275891841276, -0.932430571292, 1.5444790831328157],
    "lopt_a_short": [-3.152446949002, -1.271539045038, -0.960242130583, 1.5418423997133954],
    "lopt_short": [-3.144506046933, -1.271258677782, -0.956965862112, 1.5403911734462368],
}


@pytest.mark.parametrize("name", STEPS_OF_BUNDLED)
def test_a_released_name_never_steps_otherwise(name):
    """Weights and numerics under a name that a saved run may hold stay; new ones get a new name or version."""
    network = AdaMLP.bundled(name)
    generator = torch.Generator().manual_seed(0)
    shapes = [(4, 3), (5,), (2, 2, 3, 3)]
    params = [torch.nn.Parameter(torch.randn(s, generator=generator, dtype=torch.float64)) for s in shapes]
    outer = LearnedOptimizer(params, network=network)
    num_workers = network.inputs if isinstance(network.inputs, int) else 1
    for t in range(4):
        outer.param_groups[0].update(round_idx=t, local_steps=4, local_lr=0.1, local_momentum=0.5)
        for p in params:
            p.worker_grads = torch.randn((num_workers, *p.shape), generator=generator, dtype=torch.float64)
            p.grad = p.worker_grads.mean(0)
        outer.step()
    found = [*(p.sum().item() for p in params), params[0][0, 0].item()]
    assert found == pytest.approx(STEPS_OF_BUNDLED[name], rel=1e-8)


def test_the_former_update_never_steps_otherwise():
    """The default with the update that it had in 0.1, which moved rows without gradient; numbers as then."""
    network = AdaMLP.bundled()
    network.update = "blended_nesterov"
    generator = torch.Generator().manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(s, generator=generator, dtype=torch.float64)) for s in [(4, 3), (5,)]]
    outer = LearnedOptimizer(params, network=network)
    for _ in range(4):
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator, dtype=torch.float64)
            p.grad[1] = 0
        outer.step()
    found = [*(p.sum().item() for p in params), *(p[1].flatten()[0].item() for p in params)]
    assert found == pytest.approx([-1.3151622451580884, -6.478403856616351, 0.7038807524851761, 1.2235948775483196])


def test_bundled_weights_have_a_card_and_are_the_default():
    assert "default" in AdaMLP.bundled_names()
    for name in AdaMLP.bundled_names():
        path = AdaMLP.bundled_path(name)
        network = AdaMLP.bundled(name)
        assert path.with_suffix(".md").read_text().strip()
        assert {"command", "commit", "seed"} <= set(network.card)
    p = torch.nn.Parameter(torch.ones(3))
    default = LearnedOptimizer([p]).network
    assert all(torch.equal(a, b) for a, b in zip(default.parameters(), AdaMLP.bundled().parameters(), strict=True))
    assert default.inputs == "mean"


class _Hub(BaseHTTPRequestHandler):
    """A repository of the Hugging Face Hub with one file, as its client asks for it."""

    content = b""
    asked: ClassVar[list[str]] = []

    def do_HEAD(self):
        self._answer()

    def do_GET(self):
        self._answer()
        self.wfile.write(self.content)

    def _answer(self):
        self.asked.append(self.path)
        found = self.path == "/somebody/steps/resolve/v1/ada_mlp.safetensors"
        self.send_response(200 if found else 404)
        self.send_header("ETag", '"0123456789abcdef"')
        self.send_header("X-Repo-Commit", "0" * 40)
        self.send_header("Content-Length", str(len(self.content)))
        self.end_headers()

    def log_message(self, *_):
        pass


def test_weights_come_from_a_hub(tmp_path, monkeypatch):
    constants = pytest.importorskip("huggingface_hub.constants")
    network = AdaMLP(hidden=(4, 4), seed=3)
    network.save(tmp_path / "mine.safetensors")
    _Hub.content = (tmp_path / "mine.safetensors").read_bytes()
    with ThreadingHTTPServer(("127.0.0.1", 0), _Hub) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        endpoint = f"http://127.0.0.1:{server.server_port}"
        monkeypatch.setattr(constants, "ENDPOINT", endpoint)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        loaded = AdaMLP.from_pretrained("somebody/steps", revision="v1")
        server.shutdown()
    assert _Hub.asked
    assert all(torch.equal(a, b) for a, b in zip(network.parameters(), loaded.parameters(), strict=True))


def test_a_folder_without_weights_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"ada_mlp\.safetensors"):
        AdaMLP.from_pretrained(tmp_path)
