"""The learned step: golden numbers of the authors' code, and the separable form against the plain one."""

from __future__ import annotations

import pytest
import torch

from lightning_lopt.functional import ada, learned, plain
from tests.golden import golden_network, golden_tensors

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-6}
FORMS = {"separable": learned.step, "plain": plain.step}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("extreme", [False, True])
@pytest.mark.parametrize("name", ["lopt_a_step", "lopt_a_edge", "lagg_a_step_k4", "lagg_a_step_k8"])
def test_parameters_equal_the_authors(vectors, name, extreme, dtype, form):
    data = vectors(f"{name}.npz")
    prefix = "extreme/" if extreme else ""
    network = golden_network(data, dtype, prefix)
    for tensor in golden_tensors(data):
        wanted = torch.from_numpy(data[f"{prefix}params/{tensor}"])
        param = torch.from_numpy(data[f"params0/{tensor}"]).to(dtype).unsqueeze(0)
        state = ada.AdaState.zeros(tuple(param.shape[1:]), 1, dtype, param.device)
        for t in range(len(wanted) - 1):
            workers = -torch.from_numpy(data[f"delta/{tensor}"][t]).double()
            worker_grads = workers.to(dtype).unsqueeze(0) if network.num_inputs > 1 else None
            grad = workers.mean(0).to(dtype).unsqueeze(0)
            FORMS[form](param, grad, state, network, torch.tensor([t]), worker_grads)
            torch.testing.assert_close(param[0].double(), wanted[t + 1].double(), rtol=0, atol=TOLERANCE[dtype])
