"""The table of roles is right: what it says of each family is tried on random models of it."""

from __future__ import annotations

import pytest
import torch

from sparsekit.errors import UnsupportedFamily
from sparsekit.models.feeds import feeds, reorder_inputs
from sparsekit.models.roles import FAMILIES, family
from sparsekit.models.structure import find_stack
from tests.support import tiny

PLUS_ONE = ("modeling_gemma", "modeling_gemma2", "modeling_gemma3")  # norms that scale by one more than their weight
TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-5}


def logits(model):
    model.set_experts_implementation("eager")  # the only one that computes in float64
    with torch.no_grad():
        return model(tiny.ids(2, 16), use_cache=False).logits


def random_order(sets, generator):
    """An order that moves inputs inside each set, in all its copies alike."""
    order = torch.empty(sets.numel(), dtype=torch.int64)
    for members in sets:
        order[members] = members[:, torch.randperm(members.shape[1], generator=generator)]
    return order


def reorder_all(model, seed=0):
    """Reorder every linear of a model that has a feed; return their names."""
    stack, generator = find_stack(model), torch.Generator().manual_seed(seed)
    names = []
    for index in range(len(stack.blocks)):
        linears = stack.linears(index)
        for name, feed in feeds(family(model), model.config, linears, stack.prefix(index)).items():
            order = random_order(feed.sets, generator)
            assert not torch.equal(order, torch.arange(len(order)))
            reorder_inputs(next(linear for linear in linears if linear.name == name), feed, order)
            names.append(name)
    return names


def readers(spec):
    """Linears that read the residual stream, numbers of experts as `*`."""
    attention = {spec.attention.query, spec.attention.key, spec.attention.value}
    return attention, {part for mlp in spec.mlps for part in (mlp.up, mlp.gate) if part}


def without_numbers(name):
    return ".".join("*" if part.isdigit() else part for part in name.split("."))


def fed(model):
    """All linears but those that read the residual stream."""
    stack = find_stack(model)
    reading = set().union(*readers(family(model)))
    return {
        linear.name
        for index in range(len(stack.blocks))
        for linear in stack.linears(index)
        if without_numbers(linear.name.removeprefix(f"{stack.prefix(index)}.")) not in reading
    }


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_reordered_channels_leave_the_logits_unchanged(name, dtype):
    model = tiny.build(name, dtype=dtype)
    before = logits(model)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    names = reorder_all(model)
    assert set(names) == fed(model)
    moved = sum(not torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert moved >= 4 * len(find_stack(model).blocks)
    torch.testing.assert_close(logits(model), before, atol=TOLERANCE[dtype], rtol=0)


@pytest.mark.parametrize("name", ["llama", "phi3", "gpt_neox", "gpt_oss"])
def test_without_reordering_what_makes_them_the_logits_change(name):
    """The tolerance above sees a wrong row: reordering the columns alone is far off."""
    model = tiny.build(name, dtype=torch.float64)
    before, stack = logits(model), find_stack(model)
    linears = stack.linears(1)
    found = feeds(family(model), model.config, linears, stack.prefix(1))
    for linear in linears:
        if linear.name in found:
            kept = linear.weight().clone()
            linear.replace(kept[:, random_order(found[linear.name].sets, torch.Generator().manual_seed(1))])
            assert float((logits(model) - before).abs().max()) > 1e-3, linear.name
            linear.replace(kept)
    torch.testing.assert_close(logits(model), before, atol=0, rtol=0)


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_scales_of_norms_fold_into_what_reads_them(name):
    """Norms named for attention, MLPs and head are read by exactly the modules that the table says."""
    model = tiny.build(name, dtype=torch.float64, **({} if name == "mpt" else {"tie_word_embeddings": False}))
    spec, stack, hidden = family(model), find_stack(model), model.config.hidden_size
    attention, mlp = readers(spec)
    before, generator = logits(model), torch.Generator().manual_seed(0)

    def scale(norm):
        by = torch.rand(hidden, generator=generator, dtype=torch.float64) + 0.5
        one = 1.0 if norm.extra_repr.__module__.split(".")[-1] in PLUS_ONE or "1P" in type(norm).__name__ else 0.0
        norm.weight.data = (norm.weight.data + one) * by - one
        if getattr(norm, "bias", None) is not None:
            norm.bias.data *= by
        return by

    for index, block in enumerate(stack.blocks):
        linears = [(linear.name.removeprefix(f"{stack.prefix(index)}."), linear) for linear in stack.linears(index)]
        assert all(block.get_submodule(norm).weight.shape == (hidden,) for norm in spec.branch_norms)
        for norm in {spec.attention_norm, spec.mlp_norm} - {None}:
            reading = (attention if norm == spec.attention_norm else set()) | (mlp if norm == spec.mlp_norm else set())
            by = scale(block.get_submodule(norm))
            for linear_name, linear in linears:
                if without_numbers(linear_name) in reading:
                    linear.replace(linear.weight() / by)
            for router in spec.routers if norm == spec.mlp_norm else ():
                block.get_submodule(router).weight.data /= by
    head = model.get_submodule(spec.head)
    assert head is model.get_output_embeddings()
    assert model.get_submodule(spec.embeddings[0]) is model.get_input_embeddings()
    assert all(model.get_submodule(path).weight.shape[1] == hidden for path in spec.embeddings)
    head.weight = torch.nn.Parameter(head.weight.detach() / scale(model.get_submodule(spec.final_norm)))
    torch.testing.assert_close(logits(model), before, atol=1e-5, rtol=0)  # norms compute in float32


def test_other_families_are_refused_with_the_list():
    with pytest.raises(UnsupportedFamily, match=r"FalconForCausalLM \(falcon\).*known are bloom, .*llama"):
        family(tiny.build("falcon"))


def test_a_models_own_code_is_refused_whatever_it_calls_itself():
    model = tiny.build("llama")
    own = type("LlamaForCausalLM", (type(model),), {"__module__": "transformers_modules.custom"})
    model.__class__ = own
    with pytest.raises(UnsupportedFamily, match="no family of which it is known"):
        family(model)


def test_linears_of_other_shapes_are_refused_by_name():
    model = tiny.build("llama")
    stack = find_stack(model)
    stack.blocks[0].self_attn.v_proj = torch.nn.Linear(32, 24)
    with pytest.raises(UnsupportedFamily, match=r"o_proj: self_attn.v_proj, .* has 24 outputs, needed 16"):
        feeds(family(model), model.config, stack.linears(0), stack.prefix(0))
