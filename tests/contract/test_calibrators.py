"""Every calibrator of activation sparsity: the contract, and what methods become where their weights do not differ."""

from __future__ import annotations

import json

import pytest
import torch

from sparsekit import registry
from sparsekit.contracts import LinearInfo, Site
from sparsekit.models.gates import TopK
from sparsekit.recipe.schema import Recipe
from sparsekit.stats.absolute import Absolute

METHODS = registry.names("activations")
OUT, IN = 24, 16
INPUT = Site("x.up_proj", "input", 0, IN, (LinearInfo("x.up_proj", 0, OUT, IN),), "query")
NEURONS = Site("x.down_proj", "neurons", 0, IN, (LinearInfo("x.down_proj", 0, OUT, IN),))
GATE = Site("x.act_fn", "gate", 0, IN, (LinearInfo("x.down_proj", 0, OUT, IN),), up="x.up_proj")


def weight(seed: int = 0) -> torch.Tensor:
    return torch.randn(OUT, IN, generator=torch.Generator().manual_seed(seed))


def calibrator(name: str, **options):
    kind = registry.load("activations", name)
    return kind(kind.options_type(**options), 0)


def means(values: torch.Tensor) -> dict[str, Absolute]:
    stat = Absolute(IN)
    stat.update(values)
    return {"absolute": stat}


@pytest.mark.parametrize("name", METHODS)
def test_importance_is_one_size_per_entry_and_weights_stay(name):
    method, w = calibrator(name), weight()
    before = w.clone()
    sites = [site for site in (INPUT, GATE, NEURONS) if method.covers(site)]
    assert sites
    for site in sites:
        found = method.importance(site, w, means(torch.ones(2, IN)) if site.kind == "gate" else {})
        if found is not None:
            assert found.shape == (IN,)
            assert bool((found >= 0).all())
        method.remainder(site, w, 0.5)
    assert torch.equal(w, before)


@pytest.mark.parametrize("name", METHODS)
def test_recipes_take_its_options_and_refuse_others(name):
    options = registry.load("activations", name).options_type().model_dump()
    stage = {"stage": "activations", "method": name, "sparsity": 0.5, **options}
    recipe = {"sparsekit": 1, "name": "x", "description": "x", "stages": [stage]}
    assert Recipe.model_validate_json(json.dumps(recipe)).activations.method_options().model_dump() == options
    with pytest.raises(ValueError, match="nothing"):
        Recipe.model_validate_json(json.dumps({**recipe, "stages": [{**stage, "nothing": 1}]}))


def test_wina_counts_by_column_norms_and_is_teal_where_they_are_equal():
    w = weight()
    torch.testing.assert_close(calibrator("wina").importance(INPUT, w, {}), w.square().sum(0).sqrt())
    equal = calibrator("wina").importance(INPUT, w / w.norm(dim=0), {})
    torch.testing.assert_close(equal, torch.ones(IN))


def test_chess_counts_by_what_the_gate_is_multiplied_by():
    up = torch.randn(40, IN, generator=torch.Generator().manual_seed(1))
    found = calibrator("chess").importance(GATE, weight(), means(up))
    torch.testing.assert_close(found, up.abs().mean(dim=0))
    assert calibrator("chess").importance(INPUT, weight(), {}) is None
    keys = Site("x.k_proj", "input", 0, IN, INPUT.skips, "key")
    assert not calibrator("chess").covers(keys)
    assert not calibrator("chess", attention=False).covers(INPUT)


def test_rsparse_spends_what_columns_leave_on_the_rank():
    w, cost = weight(), 0.5
    found = calibrator("rsparse", channels=0.5).remainder(INPUT, w, 1 - cost)
    rank = int(cost * 0.5 * OUT * IN / (OUT + IN))
    assert found.left.shape == (OUT, rank)
    assert found.right.shape == (rank, IN)
    assert found.sparsity == pytest.approx(1 - cost * 0.5)
    u, s, v = torch.linalg.svd(w.double())
    best = (u[:, :rank] * s[:rank]) @ v[:rank]
    torch.testing.assert_close(found.left.double() @ found.right.double(), best, atol=1e-5, rtol=1e-5)
    assert calibrator("rsparse", channels=1.0).remainder(INPUT, w, 0.5) is None  # then it is wina


def test_on_orthogonal_columns_no_choice_of_as_many_entries_is_better_than_winas():
    q = torch.linalg.qr(weight().double()).Q
    scale = torch.rand(IN, generator=torch.Generator().manual_seed(2), dtype=torch.float64) * 5 + 0.1
    w = q * scale
    x = torch.randn(200, IN, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    norms = calibrator("topk", weigh="columns").importance(INPUT, w, {})
    errors = [((x - TopK(6, by)(x)) @ w.T).square().sum(dim=1) for by in (norms, torch.ones(1))]
    assert bool((errors[0] <= errors[1] * (1 + 1e-9)).all())
    assert float((errors[0] < errors[1] * 0.99).double().mean()) > 0.5
