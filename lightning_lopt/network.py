"""AdaMLP: the network of the learned optimizer, its decays, and the file it lives in."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from importlib import resources
from itertools import pairwise
from numbers import Integral
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_lopt.functional import ada, blended
from lightning_lopt.functional.features import count_features, feature_slices
from lightning_lopt.functional.layers import Network
from lightning_lopt.functional.updates import GATE_RANGE, UPDATES, Update
from lightning_lopt.weights_file import WeightsError, read_file, write_file

FORMAT = "lightning_lopt.AdaMLP"
DEFAULT_WEIGHTS = "default"
HUB_FILE = "ada_mlp.safetensors"  # its name in a repository
ABLATION_FEATURES = ("grads", "param", "time")


class AdaMLP(nn.Module):
    r"""A per-coordinate MLP over Ada features, together with the decays of their accumulators.

    .. math:: (d, m, \ldots) = W_3\,\mathrm{relu}(W_2\,\mathrm{relu}(W_1 f + b_1) + b_2) + b_3

    Args:
        inputs: Pseudo-gradients that the network sees: ``"mean"`` for their average (LOpt-A, 39 features), or an
            integer K for those of K workers in fixed order (LAgg-A, 38 + K features); it then belongs to that K.
        hidden: Widths of the two hidden layers.
        step_mult: Multiplier λ1 > 0 of the first output d: the size of the published step, or that of the correction in
            units of the base step.
        exp_mult: Multiplier λ2 >= 0 of the other outputs: of the magnitude, or of the gate and the logits.
        update: Kind of update that the output becomes: ``"published"`` (the paper's) or ``"masked_blended_nesterov"``,
            which also sees 11 features of the tensor as a whole, and moves nothing whose pseudo-gradient is and was
            exactly 0 (see `lightning_lopt.functional.updates`). ``"blended_nesterov"`` is the latter without this mask,
            for weights that were saved with it.
        ada_features: Whether the network sees Ada features; without them only the pseudo-gradients, the parameter and
            the time: the paper's ablation, LOpt and LAgg. They are computed all the same.
        card: Provenance, anything that JSON can hold; saved with the weights.
        seed: Seed of the initial weights (truncated normal, std 1/sqrt(fan in); biases 0); None leaves torch's
            global generator in charge.

    Shape:
        Weights ``layers.{0,1,2}.weight`` [32, F], [32, 32], [O, 32], with O = 2 outputs for ``"published"``, else 4;
        offsets ``decays.momentum`` [3], ``decays.rms`` [1], ``decays.factored`` [3].

    Raises:
        ValueError: An argument out of its range.

    Source: arXiv 2312.02204, section 3 and appendix.

    Example:
        >>> sum(p.numel() for p in AdaMLP().parameters())
        2409
    """

    def __init__(
        self,
        inputs: Literal["mean"] | int = "mean",
        hidden: tuple[int, int] = (32, 32),
        step_mult: float = 0.001,
        exp_mult: float = 0.001,
        update: str = "published",
        ada_features: bool = True,
        card: Mapping[str, Any] | None = None,
        seed: int | None = None,
    ) -> None:
        super().__init__()
        if inputs != "mean" and (isinstance(inputs, bool) or not isinstance(inputs, int) or inputs < 1):
            raise ValueError(f"inputs must be 'mean' or a number of workers >= 1, not {inputs!r}.")
        if update not in UPDATES:
            raise ValueError(f"update must be one of {sorted(UPDATES)}, not {update!r}.")
        if "tensor" in UPDATES[update].feature_kinds and not ada_features:
            raise ValueError(f"The update {update!r} is made of Ada features: ada_features must be True.")
        if not (step_mult > 0 and math.isfinite(step_mult) and exp_mult >= 0 and math.isfinite(exp_mult)):
            raise ValueError(f"step_mult must be > 0 and exp_mult >= 0, not {step_mult} and {exp_mult}.")
        if not isinstance(hidden, Sequence) or len(hidden) != 2 or not all(_is_width(width) for width in hidden):
            raise ValueError(f"hidden must be two integers >= 1, the widths of the hidden layers, not {hidden!r}.")
        self.inputs = inputs
        self.hidden = (int(hidden[0]), int(hidden[1]))
        self.step_mult = float(step_mult)
        self.exp_mult = float(exp_mult)
        self.update = update
        self.ada_features = bool(ada_features)
        self.card = dict(card or {})
        sizes = (self.num_features, *self.hidden, self._update.num_outputs)
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(sizes))
        self.decays = nn.ParameterDict(
            {
                "momentum": torch.zeros(len(ada.MOMENTUM_INIT)),
                "rms": torch.zeros(len(ada.RMS_INIT)),
                "factored": torch.zeros(len(ada.FACTORED_INIT)),
            }
        )
        self._reset(None if seed is None else torch.Generator().manual_seed(seed))

    @classmethod
    def base_step(
        cls,
        lr: float = blended.LR,
        momentum: float = blended.MOMENTUM,
        blend: tuple[float, float, float] = blended.BLEND,
        hidden: tuple[int, int] = (8, 8),
        seed: int | None = None,
    ) -> AdaMLP:
        """Create a network that takes the step of `BlendedNesterov`, from which the default was meta-trained.

        Its last layer's weights are 0, so the features do not count. The equations of the step are those of
        `lightning_lopt.functional.blended.step_model`.

        Args:
            lr: Learning rate, in [0.02, 1.65].
            momentum: Momentum β in (0, 1).
            blend: Weights w of the step as it is, orthogonalised and whitened, each at least 1e-6, of sum 1.
            hidden: Widths of the two hidden layers.
            seed: Seed of their weights.

        Raises:
            ValueError: An argument out of its range.

        Source: `lightning_lopt.functional`: `blended`, `orthogonal`, `whitening`, `damping`.

        Example:
            >>> from lightning_lopt import LearnedOptimizer
            >>> p = torch.nn.Parameter(torch.zeros(2))
            >>> p.grad = torch.tensor([1.0, -2.0])
            >>> LearnedOptimizer([p], AdaMLP.base_step(lr=0.5, blend=(0.5, 0.3, 0.2))).step()
            >>> [round(x, 3) for x in p.tolist()]  # in the first round there is no momentum yet
            [-0.558, 0.959]
        """
        low, high = (math.exp(end) for end in GATE_RANGE)
        if not (low <= lr <= high and 0 < momentum < 1):
            raise ValueError(f"lr must be in [{low:.2f}, {high:.2f}] and momentum in (0, 1), not {lr} and {momentum}.")
        if not (isinstance(blend, Sequence) and len(blend) == 3 and min(blend) >= 1e-6 and abs(sum(blend) - 1) < 1e-6):
            raise ValueError(f"blend must be three numbers of at least 1e-6 whose sum is 1, not {blend!r}.")
        network = cls("mean", hidden, 1.0, 1.0, "masked_blended_nesterov", seed=seed)
        last = network.layers[-1]
        assert isinstance(last, nn.Linear)
        nn.init.zeros_(last.weight)
        with torch.no_grad():
            last.bias[1] = math.log(lr)
            last.bias[2:] = torch.tensor([weight / blend[0] for weight in blend[1:]]).log()
        nn.init.constant_(network.decays["momentum"][:1], math.log((1 - momentum) / (1 - ada.MOMENTUM_INIT[0])) / 10)
        return network

    @property
    def num_inputs(self) -> int:
        """Number of pseudo-gradients that the network sees: 1, or K."""
        return self.inputs if isinstance(self.inputs, int) else 1

    @property
    def _update(self) -> Update:
        return UPDATES[self.update]

    @property
    def num_features(self) -> int:
        """Number of inputs of the first layer."""
        return count_features(self.num_inputs, self._update.feature_kinds)

    @property
    def config(self) -> dict[str, Any]:
        """Arguments with which `__init__` builds this network again, besides the card."""
        return {
            "inputs": self.inputs,
            "hidden": list(self.hidden),
            "step_mult": self.step_mult,
            "exp_mult": self.exp_mult,
            "update": self.update,
            "ada_features": self.ada_features,
        }

    def _reset(self, generator: torch.Generator | None) -> None:
        for layer in self.layers:
            assert isinstance(layer, nn.Linear)
            std = layer.in_features**-0.5
            nn.init.trunc_normal_(layer.weight, std=std, a=-2 * std, b=2 * std, generator=generator)
            nn.init.zeros_(layer.bias)

    def functional(self, parameters: Mapping[str, Tensor] | None = None) -> Network:
        """Return the meta-parameters as `functional.learned` takes them.

        Args:
            parameters: Meta-parameters named like `named_parameters`, each with a leading particle dimension P;
                default: this module's own, with P = 1.
        """
        if parameters is None:
            parameters = {name: p.detach().unsqueeze(0) for name, p in self.named_parameters()}
        count = len(self.layers)
        first, *others = (parameters[f"layers.{i}.weight"] for i in range(count))
        if not self.ada_features:
            first = first.clone()
            for feature, columns in feature_slices(self.num_inputs, self._update.feature_kinds).items():
                if feature not in ABLATION_FEATURES:
                    first[..., columns] = 0
        return Network(
            weights=(first, *others),
            biases=tuple(parameters[f"layers.{i}.bias"] for i in range(count)),
            decays=ada.decay_complements(*(parameters[f"decays.{k}"] for k in ("momentum", "rms", "factored"))),
            num_inputs=self.num_inputs,
            step_mult=self.step_mult,
            exp_mult=self.exp_mult,
            update=self._update,
        )

    def save(self, path: str | Path, overwrite: bool = False) -> None:
        """Write the weights, the configuration and the card to a safetensors file.

        Args:
            path: Path of the file.
            overwrite: Whether a file that is there is replaced, at once and as a whole.

        Raises:
            FileExistsError: There is such a file, and not `overwrite`.
            FileNotFoundError: There is no such folder; none is made, as torch.save makes none.
            WeightsError: A weight is not finite.
        """
        write_file(path, FORMAT, self.config, self.card, dict(self.named_parameters()), overwrite)

    @classmethod
    def load(cls, path: str | Path) -> AdaMLP:
        """Read a network from a file that `save` wrote. Nothing in the file is executed.

        Raises:
            FileNotFoundError: There is no such file.
            WeightsError: The file is corrupt, truncated, of another format or version, or holds wrong shapes or
                values that are not finite.

        Example:
            >>> AdaMLP.load(AdaMLP.bundled_path("default")).inputs
            'mean'
        """
        if not Path(path).is_file():
            raise FileNotFoundError(
                f"There is no weights file {path}. Give a path that exists, or a bundled name: {cls.bundled_names()}."
            )
        network, tensors = read_file(path, FORMAT, cls, parameter_shapes)
        network.load_state_dict(tensors, assign=True)
        return network

    @classmethod
    def from_pretrained(cls, repo_or_folder: str | Path, revision: str | None = None) -> AdaMLP:
        """Load a network from a folder or from a repository of the Hugging Face Hub, in which it is `HUB_FILE`.

        To share one, `save` it as ``ada_mlp.safetensors`` and upload it: ``hf upload NAME/REPO ada_mlp.safetensors``.

        Args:
            repo_or_folder: Folder, or else a repository, ``"name/repo"``. The latter needs `huggingface_hub`.
            revision: Branch, tag or commit of the repository; None is the head of its main branch.

        Raises:
            FileNotFoundError: The folder has no such file.
            WeightsError: The file cannot be used, see `load`.
            ImportError: `huggingface_hub` is needed and not installed.

        Example:
            >>> import tempfile
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     AdaMLP(hidden=(8, 8)).save(f"{folder}/ada_mlp.safetensors")
            ...     AdaMLP.from_pretrained(folder).hidden
            (8, 8)
        """
        if Path(repo_or_folder).is_dir():
            return cls.load(Path(repo_or_folder) / HUB_FILE)
        from huggingface_hub import hf_hub_download  # an extra

        return cls.load(hf_hub_download(str(repo_or_folder), HUB_FILE, revision=revision))

    @classmethod
    def bundled(cls, name: str = DEFAULT_WEIGHTS) -> AdaMLP:
        """Load a network whose weights come with the package.

        Args:
            name: Name of the network, one of `bundled_names()`.
        """
        return cls.load(cls.bundled_path(name))

    @staticmethod
    def bundled_names() -> list[str]:
        """List the names that `bundled` knows."""
        folder = resources.files("lightning_lopt") / "weights"
        return sorted(Path(f.name).stem for f in folder.iterdir() if f.name.endswith(".safetensors"))

    @staticmethod
    def bundled_path(name: str) -> Path:
        """Return the path of the file of a bundled network."""
        if name not in AdaMLP.bundled_names():
            raise WeightsError(f"There are no bundled weights {name!r}; there are {AdaMLP.bundled_names()}.")
        return Path(str(resources.files("lightning_lopt") / "weights" / f"{name}.safetensors"))

    @override
    def extra_repr(self) -> str:
        return ", ".join(f"{k}={v!r}" for k, v in self.config.items())


def _is_width(value: Any) -> bool:
    return isinstance(value, Integral) and int(value) >= 1  # NumPy's integers, too


def parameter_shapes(network: AdaMLP) -> dict[str, tuple[int, ...]]:
    """List the shapes of all meta-parameters by name."""
    return {name: tuple(p.shape) for name, p in network.named_parameters()}
