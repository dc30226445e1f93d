"""A rotated residual stream: the model computes what it did, and the columns that WINA chooses by are orthogonal."""

from __future__ import annotations

import pytest
import torch

from sparsekit.errors import UnsupportedFamily
from sparsekit.models.gates import TopK
from sparsekit.pack.verify import verify
from sparsekit.runtime import gates
from tests.support import tiny
from tests.support.gated import load, plan, thin

TURNED = ("llama", "qwen2", "qwen3", "gemma", "granite", "phi3", "mistral", "smollm3", "mixtral", "qwen2_moe")
LOOSE = ("stages.1.allocate=uniform", "stages.1.tolerance=0.08")


@pytest.fixture(scope="module")
def rotated(tmp_path_factory):
    made = {}

    def folder(family, *sets):
        if (family, sets) not in made:
            path = made[family, sets] = tmp_path_factory.mktemp(family)
            tiny.save(family, path / "model")
            thin(path / "model", path / "out", "wina-rotated-50", *LOOSE, *sets)
        return made[family, sets]

    return folder


def off_diagonal(weight):
    """Return how far the columns are from orthogonal: the largest cosine that counts beside the largest column."""
    gram = weight.double().T @ weight.double()
    return float((gram - gram.diagonal().diag()).abs().max() / gram.diagonal().max())


@pytest.mark.parametrize("family", TURNED)
def test_the_model_computes_what_it_did(family, rotated):
    folder = rotated(family)
    model, dense, ids = load(folder / "out"), load(folder / "model"), tiny.ids(2, 16)
    assert gates.attached(model)
    with torch.no_grad(), gates.paused(model):
        torch.testing.assert_close(model(ids).logits, dense(ids).logits, atol=2e-3, rtol=2e-3)
    assert verify(folder / "out", "semantic").ok


@pytest.mark.parametrize("family", ["llama", "gemma", "qwen2"])
def test_columns_of_keys_and_gates_are_orthogonal(family, rotated):
    folder = rotated(family)
    before, after = (load(folder / name).model.layers for name in ("model", "out"))
    for old, new in zip(before, after, strict=True):
        for path in ("self_attn.k_proj", "mlp.gate_proj"):
            assert off_diagonal(new.get_submodule(path).weight) < 1e-5
            assert off_diagonal(old.get_submodule(path).weight) > 1e-2
        assert off_diagonal(new.self_attn.v_proj.weight) > 1e-2


def test_all_readers_stacked(rotated):
    layers = load(rotated("llama", "stages.0.readers=all") / "out").model.layers
    for layer in layers:
        attention = torch.cat([getattr(layer.self_attn, f"{name}_proj").weight for name in "qkv"])
        assert off_diagonal(attention) < 1e-5
        assert off_diagonal(torch.cat([layer.mlp.gate_proj.weight, layer.mlp.up_proj.weight])) < 1e-5
        assert off_diagonal(layer.mlp.gate_proj.weight) > 1e-3


def test_no_choice_by_size_is_better_than_winas_there(rotated):
    """For every token: the theorem, on the inputs that the model itself makes."""
    model, seen = load(rotated("llama") / "out"), {}
    for path in ("self_attn.k_proj", "mlp.gate_proj"):
        module = model.model.layers[1].get_submodule(path)
        module.register_forward_pre_hook(lambda module, args: seen.update({module: args[0][0].double()}))
    with torch.no_grad(), gates.paused(model):
        model(tiny.ids(1, 40))
    for module, x in seen.items():
        w = module.weight.double()
        by_norm, by_size = (
            ((x - TopK(16, score)(x)) @ w.T).square().sum(dim=1) for score in (w.norm(dim=0), torch.ones(1))
        )
        assert bool((by_norm <= by_size * (1 + 1e-6) + 1e-12).all())
        assert float((by_norm < by_size * 0.99).double().mean()) > 0.5


def test_a_stream_of_the_whole_width_costs_two_matrices_a_block(rotated):
    model, dense = (load(rotated("llama") / name) for name in ("out", "model"))
    before, after = (sum(p.numel() for p in each.parameters()) for each in (dense, model))
    blocks, hidden = 3, 32
    # the last sum goes back to the basis of the head, which is not turned
    assert after - before == 2 * blocks * hidden**2
    assert isinstance(model.model.layers[0].shortcuts[0].weight, torch.nn.Parameter)


@pytest.mark.parametrize(
    ("family", "why"),
    [("opt", "norms that subtract the mean"), ("gpt_neox", "subtract the mean"), ("phi", "subtract the mean"),
     ("gemma2", "norms"), ("olmo2", "norms"), ("falcon", "is no family")],
)  # fmt: skip
def test_what_cannot_be_turned_is_refused(family, why, tmp_path):
    with pytest.raises(UnsupportedFamily, match=why):
        plan(tiny.save(family, tmp_path / "model"), "wina-rotated-50")
