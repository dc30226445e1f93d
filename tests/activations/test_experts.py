"""Experts with gates compute what transformers' plain loop over experts computes on masked inputs."""

from __future__ import annotations

import pytest
import torch

from sparsekit.models.expert_gates import GatedExperts
from sparsekit.models.gates import Placed, Scope, Threshold
from sparsekit.models.linears import is_experts, projections
from sparsekit.runtime import gates
from tests.support import tiny
from tests.support.gated import load, thin


def experts(family: str):
    model = tiny.build(family, num_hidden_layers=1)
    return model, next(module for module in model.modules() if is_experts(module))


def routing(tokens: int, count: int, seed: int = 0):
    scores = torch.rand(tokens, count, generator=torch.Generator().manual_seed(seed))
    weights, index = scores.topk(2, dim=-1)
    return index, weights


@pytest.mark.parametrize("family", tiny.MOE_FAMILIES)
def test_open_gates_leave_the_outputs_as_they_are(family):
    _, module = experts(family)
    x, (index, weights) = torch.randn(12, 32), routing(12, 4)
    gated = GatedExperts(module, Scope())
    with torch.no_grad():
        torch.testing.assert_close(gated(x, index, weights), module(x, index, weights), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", tiny.MOE_FAMILIES)
def test_each_expert_has_its_own_thresholds(family):
    """Against every expert computed by hand."""
    _, module = experts(family)
    first, down = projections(module)
    x, (index, weights) = torch.randn(10, 32), routing(10, 4)
    t = torch.rand(4, 32)
    scope = Scope(dense=2)
    gated = GatedExperts(module, scope)
    gated.gates[first] = Threshold(t)
    gated.gates[down] = Threshold(torch.tensor([0.3]))
    plain = GatedExperts(module, Scope())
    wanted = torch.zeros_like(x)
    with torch.no_grad():
        for token in range(10):
            for choice in range(2):
                e, row = int(index[token, choice]), x[token]
                kept = row if token < 2 else torch.where(row.abs() <= t[e], 0, row)
                up = plain.project(first, e, kept[None])
                middle = module._apply_gate(up)
                middle = middle if token < 2 else torch.where(middle.abs() <= 0.3, 0, middle)
                wanted[token] += weights[token, choice] * plain.project(down, e, middle)[0]
        torch.testing.assert_close(gated(x, index, weights), wanted, atol=1e-5, rtol=1e-5)


def test_column_norms_give_every_expert_thresholds_of_its_own(tmp_path):
    folder = tiny.save("mixtral", tmp_path / "model")
    thin(folder, tmp_path / "out", "wina-50", "stages.0.allocate=uniform", "stages.0.tolerance=0.05")
    model = load(tmp_path / "out")
    placed: Placed = gates.describe(model).file.gates["model.layers.0.mlp.experts.down_proj"]
    assert placed.gate.t.shape == (4, 48)
    norms = model.model.layers[0].mlp.experts.down_proj.norm(dim=1)
    torch.testing.assert_close(placed.gate.t * norms, (placed.gate.t * norms)[:1, :1].expand(4, 48), rtol=1e-2, atol=0)
