"""Turning the residual stream, cutting nothing: the logits stay as they are, on every family that can be turned."""

from __future__ import annotations

import pytest
import torch

from sparsekit.errors import UnsupportedFamily
from sparsekit.models.residual import residual
from sparsekit.models.roles import FAMILIES
from sparsekit.models.structure import find_stack
from sparsekit.solve.rotate import Rotation
from sparsekit.solve.rotation import principal_basis, random_orientation
from tests.support import tiny

REFUSED = {
    "bloom": "word_embeddings_layernorm.weight beside embeddings",
    "gemma2": "post_attention_layernorm, post_feedforward_layernorm between a branch and the residual stream",
    "gemma3_text": "post_attention_layernorm, post_feedforward_layernorm between",
    "glm4": "post_self_attn_layernorm, post_mlp_layernorm between",
    "olmo2": "post_attention_layernorm, post_feedforward_layernorm between",
}
TURNED = sorted(set(FAMILIES) - set(REFUSED))
TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-4}


class ExactNorm(torch.nn.Module):
    """RMSNorm that computes in the dtype it is given; those of transformers compute in float32."""

    def __init__(self, norm, plus):
        super().__init__()
        self.weight, self.plus = norm.weight, plus
        self.eps = getattr(norm, "variance_epsilon", getattr(norm, "eps", None))

    def forward(self, x):
        return (self.weight + self.plus) * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps)


def exact_norms(model):
    """Replace norms that would round to float32."""
    for name, module in list(model.named_modules()):
        kind = type(module).__name__
        if "Norm" in kind and not isinstance(module, torch.nn.LayerNorm):
            if "Cohere" in kind:
                exact = torch.nn.LayerNorm(module.weight.shape, module.variance_epsilon, bias=False).to(torch.float64)
                exact.weight = module.weight
            else:
                exact = ExactNorm(module, 1.0 if kind == "GemmaRMSNorm" else 0.0)
            model.set_submodule(name, exact)
    return model


def build(family, dtype, **changes):
    untied = {} if family == "mpt" else {"tie_word_embeddings": False}
    model = tiny.build(family, dtype=dtype, **untied, **changes)
    model.set_experts_implementation("eager")  # the only one that computes in float64
    if dtype == torch.float64:
        exact_norms(model)
    head = model.get_output_embeddings()
    head.weight = torch.nn.Parameter(head.weight.detach().clone())  # mpt ties it whatever its configuration says
    return model


def logits(model):
    with torch.no_grad():
        return model(tiny.ids(2, 16), use_cache=False).logits


def full_basis(hidden, layer, seed):
    eye = torch.eye(hidden, dtype=torch.float64)
    return random_orientation(principal_basis(eye, hidden, centred=layer), seed, centred=layer)


def rotate(model, seed=0):
    """Turn the stream of a loaded model by one random matrix."""
    stack = find_stack(model)
    stream = residual(model, stack)
    basis = full_basis(model.config.hidden_size, stream.norm.startswith("layer"), seed)
    prefixes = [stack.prefix(block) for block in range(len(stack.blocks))]
    rotation = Rotation(stream, [basis] * len(stream.places), prefixes, shortcuts=False)
    new = rotation.outside(model)
    for block in range(len(stack.blocks)):
        new |= rotation.of_block(model, block)
    with torch.no_grad():
        for name, value in new.items():
            model.get_parameter(name).copy_(value)
    return new


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("family", TURNED)
def test_turning_the_stream_leaves_the_logits_unchanged(family, dtype):
    model = build(family, dtype)
    before = logits(model)
    old = {name: value.clone() for name, value in model.state_dict().items()}
    new = rotate(model)
    torch.testing.assert_close(logits(model), before, atol=TOLERANCE[dtype], rtol=0)
    biases = [name for name in new if name.endswith("bias")]
    assert all(not torch.allclose(value, old[name]) for name, value in new.items() if name not in biases)


@pytest.mark.parametrize("family", ["llama", "opt", "gptj"])
def test_the_tolerance_sees_a_norm_that_was_not_folded(family):
    model = build(family, torch.float64)
    before = logits(model)
    stack = find_stack(model)
    norm = residual(model, stack).places[1].branches[0].norm
    kept = model.get_submodule(norm).weight.detach().clone()
    rotate(model)
    with torch.no_grad():
        model.get_submodule(norm).weight.copy_(kept)
    assert float((logits(model) - before).abs().max()) > 1e-3


@pytest.mark.parametrize("family", sorted(REFUSED))
def test_families_whose_stream_cannot_be_turned_are_refused_with_the_reason(family):
    model = tiny.build(family)
    with pytest.raises(UnsupportedFamily, match=REFUSED[family]):
        residual(model, find_stack(model))


def test_norms_behind_the_sums_are_refused():
    model = tiny.build("opt", do_layer_norm_before=False)
    with pytest.raises(UnsupportedFamily, match="norms behind the sums"):
        residual(model, find_stack(model))


def test_projections_beside_the_embeddings_are_refused():
    model = tiny.build("opt", word_embed_proj_dim=16)
    with pytest.raises(UnsupportedFamily, match=r"project_\w+.weight beside embeddings"):
        residual(model, find_stack(model))


@pytest.mark.parametrize("parallel", [False, True])
def test_a_parallel_block_reads_the_stream_once(parallel):
    model = tiny.build("gpt_neox", use_parallel_residual=parallel)
    assert len(residual(model, find_stack(model)).places) == (3 if parallel else 6) + 1
