"""Narrow blocks compute what the dense ones do with the removed heads and neurons silenced."""

from __future__ import annotations

import pytest
import torch

from sparsekit.errors import ModelError, UnsupportedFamily
from sparsekit.models.block import pairs_to_channels
from sparsekit.models.roles import FAMILIES
from sparsekit.models.structure import find_stack
from sparsekit.models.widths import Kept, Widths, cuts, head_groups, narrow, narrow_block, neurons, silence_rest
from tests.support import tiny

ONE = {"olmo2": "neurons", "gpt2": "neurons", "phi3": "neurons", "gpt_neox": "neurons", "bloom": "neurons"}
ONE |= {"mpt": "neurons", "mixtral": "groups", "qwen2_moe": "groups", "qwen3_moe": "groups"}
"""Families of which one kind alone can be narrowed, and which."""
BOTH = (
    "cohere2", "gemma", "gemma2", "gemma3_text", "gptj", "granite", "llama", "mistral", "nemotron", "opt", "phi",
    "qwen2", "qwen3", "smollm3", "stablelm", "starcoder2", "glm4",
)  # fmt: skip
CHANNELS = (
    "gemma", "gemma2", "granite", "llama", "mistral", "mixtral", "opt", "qwen2", "qwen2_moe", "smollm3", "starcoder2",
)  # fmt: skip
"""Families whose heads can lose channels."""
NEITHER = ("gpt_oss", "olmoe")
OPTIONS = {"phi": {"qk_layernorm": True}, "llama": {"attention_bias": True, "mlp_bias": True}}


def build(family):
    return tiny.build(family, dtype=torch.float64, **OPTIONS.get(family, {}))


def choose(model, stack, index, family):
    """Keep other groups and neurons in every block, in the last one all but one of each."""
    generator = torch.Generator().manual_seed(index)

    def some(count, fewest):
        stay = max(1, count - 1 if index else fewest)
        return torch.randperm(count, generator=generator)[:stay].sort().values

    kind = ONE.get(family)
    groups = None if kind == "neurons" else some(len(head_groups(model, stack, index)[1]), 1)
    width = None if kind == "groups" else some(len(neurons(model, stack, index)[1]), 7)
    return Kept(groups, width)


def silence(model, stack, index, kept):
    """Zero the columns that a narrow block does not have."""
    for chosen, find in ((kept.groups, head_groups), (kept.neurons, neurons)):
        if chosen is not None:
            linear, sets = find(model, stack, index)
            gone = [group for group in range(len(sets)) if group not in chosen.tolist()]
            weight = linear.weight().clone()
            weight[:, sets[gone].flatten()] = 0
            linear.replace(weight)


def logits(model, *, cache=False):
    x = tiny.ids(2, 20)
    with torch.no_grad():
        if not cache:
            return model(x, use_cache=False).logits
        first = model(x[:, :12], use_cache=True)
        parts, past = [first.logits], first.past_key_values
        for place in range(12, x.shape[1]):
            step = model(x[:, place : place + 1], past_key_values=past, use_cache=True)
            parts.append(step.logits)
            past = step.past_key_values
        return torch.cat(parts, dim=1)


def test_every_family_of_the_table_is_here():
    assert {*BOTH, *ONE, *NEITHER} == set(FAMILIES)
    assert len(BOTH) + len(ONE) + len(NEITHER) == len(FAMILIES)


@pytest.mark.parametrize("family", sorted((*BOTH, *ONE)))
def test_equals_the_dense_model_with_the_rest_silenced(family):
    dense, narrowed = build(family), build(family)
    for model in (dense, narrowed):
        model.set_experts_implementation("eager")
    stack, other = find_stack(dense), find_stack(narrowed)
    before = sum(parameter.numel() for parameter in narrowed.parameters())
    untouched = logits(dense)
    for index in range(len(stack.blocks)):
        kept = choose(dense, stack, index, family)
        removed = sum(cut.linear.info.numel for cut in cuts(narrowed, other, index, kept))
        assert removed
        silence(dense, stack, index, kept)
        narrow_block(narrowed, other, index, kept)
    assert sum(parameter.numel() for parameter in narrowed.parameters()) < before
    assert float((logits(dense) - untouched).abs().max()) > 1e-3
    torch.testing.assert_close(logits(narrowed), logits(dense), atol=1e-9, rtol=0)
    torch.testing.assert_close(logits(narrowed, cache=True), logits(dense, cache=True), atol=1e-9, rtol=0)


@pytest.mark.parametrize("family", sorted((*BOTH, *ONE)))
def test_a_model_on_meta_gets_the_same_shapes(family):
    narrowed, meta = build(family), build(family).to("meta")
    stack, widths = find_stack(narrowed), []
    for index in range(len(stack.blocks)):
        kept = choose(narrowed, stack, index, family)
        narrow_block(narrowed, stack, index, kept)
        widths.append(Widths(*(None if chosen is None else len(chosen) for chosen in (kept.groups, kept.neurons))))
    narrow(meta, find_stack(meta), widths)
    shapes = dict(meta.named_parameters(remove_duplicate=False))  # on meta nothing is tied any more
    for name, parameter in narrowed.named_parameters(remove_duplicate=False):
        assert shapes[name].is_meta
        assert parameter.shape == shapes[name].shape, name
    for (name, module), (_, other) in zip(narrowed.named_modules(), meta.named_modules(), strict=True):
        numbers = ({key: value for key, value in vars(m).items() if type(value) is int} for m in (module, other))
        assert next(numbers) == next(numbers), name


@pytest.mark.parametrize("family", ["llama", "gptj", "glm4"])
def test_a_narrow_block_can_be_narrowed_again(family):
    once, twice = build(family), build(family)
    a, b = find_stack(once), find_stack(twice)
    narrow_block(once, a, 1, Kept(torch.tensor([1]), torch.tensor([3, 9, 20])))
    narrow_block(twice, b, 1, Kept(neurons=torch.tensor([1, 3, 9, 20, 30])))
    narrow_block(twice, b, 1, Kept(torch.tensor([1]), torch.tensor([1, 2, 3])))
    for (name, left), (_, right) in zip(once.named_parameters(), twice.named_parameters(), strict=True):
        assert torch.equal(left, right), name


@pytest.mark.parametrize("family", CHANNELS)
def test_heads_of_fewer_channels_equal_dense_ones_with_the_rest_silenced(family):
    """Queries and keys without a pair, values and their reader without two channels: all in place, as zeros."""
    dense, narrowed, meta = build(family), build(family), build(family).to("meta")
    for model in (dense, narrowed):
        model.set_experts_implementation("eager")
    stack, other = find_stack(dense), find_stack(narrowed)
    untouched = logits(dense)
    pairs = [(0, 1, 3), (1, 2), (0, 1, 2, 3)]
    kinds = [
        Kept(groups=groups, channels=pairs_to_channels(torch.tensor(p), 8))
        for groups, p in zip((None, torch.tensor([1]), None), pairs, strict=True)
    ]
    widths = []
    for index, (kept, each) in enumerate(zip(kinds, pairs, strict=True)):
        silence_rest(dense, stack, index, kept, {})
        narrow_block(narrowed, other, index, kept)
        groups = None if kept.groups is None else 1
        widths.append(Widths(groups, None, 2 * len(each), None if family == "opt" else each))
    assert float((logits(dense) - untouched).abs().max()) > 1e-4
    torch.testing.assert_close(logits(narrowed), logits(dense), atol=1e-9, rtol=0)
    torch.testing.assert_close(logits(narrowed, cache=True), logits(dense, cache=True), atol=1e-9, rtol=0)
    narrow(meta, find_stack(meta), widths)
    shapes = {name: parameter.shape for name, parameter in meta.named_parameters(remove_duplicate=False)}
    for name, parameter in narrowed.named_parameters(remove_duplicate=False):
        assert parameter.shape == shapes[name], name


def test_nothing_kept_back_is_nothing_changed():
    model = build("llama")
    stack = find_stack(model)
    assert cuts(model, stack, 0, Kept()) == ()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    narrow(model, stack, [Widths(), Widths(groups=2), Widths(neurons=48)])
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


@pytest.mark.parametrize(
    ("family", "options", "kept", "message"),
    [
        ("phi3", {}, "groups", "queries, keys and values are one linear, self_attn.qkv_proj"),
        ("gpt2", {}, "groups", "are one linear, attn.c_attn"),
        ("olmo2", {}, "groups", r"self_attn.q_norm.weight \[32\] goes with all of them"),
        ("olmoe", {}, "groups", r"self_attn.q_norm.weight \[32\] goes with all of them"),
        ("stablelm", {"qk_layernorm": True}, "groups", r"q_layernorm.norms.0.weight \[8\] goes with all"),
        ("gpt_oss", {"head_dim": 4}, "groups", r"self_attn.sinks \[4\] goes with all of them"),
        ("mixtral", {}, "neurons", "the block has 4 MLPs, experts"),
        ("qwen2_moe", {}, "neurons", "the block has 5 MLPs, experts"),
        ("gpt_oss", {}, "neurons", "the block has 4 MLPs, experts"),
        ("olmoe", {}, "neurons", "the block has 4 MLPs, experts"),
        ("qwen3", {}, "channels", "q_norm and self_attn.k_norm divide by what all of them are"),
        ("gemma3_text", {}, "channels", "q_norm and self_attn.k_norm divide"),
        ("phi", {}, "channels", "channels of heads cannot be removed: positions turn 4 of 8"),
        ("stablelm", {}, "channels", "positions turn 2 of 8"),
        ("nemotron", {}, "channels", "positions turn 4 of 8"),
        ("glm4", {}, "channels", "positions turn other pairs of them"),
        ("gptj", {}, "channels", "positions turn other pairs of them"),
        ("cohere2", {}, "channels", "positions turn other pairs of them"),
        ("gpt_neox", {}, "channels", "are one linear, attention.query_key_value"),
        ("falcon", {}, "groups", "FalconForCausalLM .* is no family of which it is known"),
    ],
)
def test_what_cannot_be_removed_is_refused_by_name(family, options, kept, message):
    model = tiny.build(family, **options)
    with pytest.raises(UnsupportedFamily, match=message):
        cuts(model, find_stack(model), 0, Kept(**{kept: torch.tensor([0])}))


@pytest.mark.parametrize(
    ("widths", "message"),
    [
        ([Widths()] * 2, "they are of 2 blocks, the configuration has 3"),
        ([Widths(), Widths(groups=3), Widths()], "block 1 has 3 groups, by the rest of the configuration it has 2"),
        ([Widths(neurons=0), Widths(), Widths()], "block 0 has 0 neurons, by the rest of the configuration it has 48"),
        ([Widths(neurons=49), Widths(), Widths()], "block 0 has 49 neurons"),
    ],
)
def test_widths_of_another_model_are_refused(widths, message):
    model = build("llama")
    with pytest.raises(ModelError, match=message):
        narrow(model, find_stack(model), widths)


def test_queries_of_another_shape_are_refused():
    model = tiny.build("llama")
    stack = find_stack(model)
    model.model.layers[0].self_attn.q_proj = torch.nn.Linear(32, 24)
    with pytest.raises(UnsupportedFamily, match=r"o_proj: heads cannot be removed: self_attn.q_proj has 24 outputs"):
        head_groups(model, stack, 0)
