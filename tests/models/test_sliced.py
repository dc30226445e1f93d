"""Sliced streams: identities as shortcuts change nothing on any family, and other widths compute what they should."""

from __future__ import annotations

import copy

import pytest
import torch

from sparsekit.checkpoint.shapes import Shapes, Stream
from sparsekit.errors import ModelError, UnsupportedFamily
from sparsekit.models.residual import residual
from sparsekit.models.roles import FAMILIES
from sparsekit.models.shapes import variant
from sparsekit.models.structure import find_stack
from tests.models.test_rotate import REFUSED, TURNED
from tests.support import sliced, tiny

CLOSED = {
    "gptj": "they return attention weights beside the stream",
    "mpt": "their MLP adds the stream itself",
}
WIRED = sorted(set(TURNED) - set(CLOSED))
CASES = [
    *((family, {}) for family in WIRED),
    ("gpt_neox", {"use_parallel_residual": False}),
    ("stablelm", {"use_parallel_residual": True}),
    ("phi", {"qk_layernorm": True}),
    ("llama", {"attention_bias": True, "mlp_bias": True}),
]
OTHER_ORDER = {"cohere2", "stablelm"}
"""Parallel blocks that add attention to the stream before the MLP: another rounding."""
IDS = tiny.ids(2, 20)


def plain(family, **changes):
    return tiny.build(family, tie_word_embeddings=False, **changes)


def logits(model):
    with torch.no_grad():
        return model(IDS, use_cache=False).logits


def steps(model):
    """Return the logits of a prompt and, with its cache, of what follows one by one."""
    with torch.no_grad():
        found = [model(IDS[:, :12], use_cache=True)]
        for place in range(12, IDS.shape[1]):
            past = found[-1].past_key_values
            found.append(model(IDS[:, place : place + 1], past_key_values=past, use_cache=True))
    return torch.cat([each.logits for each in found], dim=1)


def assert_equal(found, expected, family, changes):
    parallel = family in OTHER_ORDER and residual(*built(family, changes)).places[0].branches[0].module == ""
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 if parallel else 0)


def built(family, changes):
    model = plain(family, **changes)
    return model, find_stack(model)


def test_every_family_whose_stream_can_be_turned_is_here():
    assert {*WIRED, *CLOSED, *REFUSED} == set(FAMILIES)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize(("family", "changes"), CASES, ids=str)
def test_identities_as_shortcuts_change_nothing(family, changes, attention):
    stock, wired = plain(family, **changes), sliced.uncut(family, **changes)
    if attention == "sdpa" and not stock._supports_sdpa:
        pytest.skip(f"{family} has no sdpa attention")
    for model in (stock, wired):
        model.set_attn_implementation(attention)
    assert_equal(logits(wired), logits(stock), family, changes)
    assert_equal(steps(wired), steps(stock), family, changes)


@pytest.mark.parametrize(("family", "changes"), CASES, ids=str)
def test_with_other_widths_a_cache_changes_nothing(family, changes):
    model = sliced.build(family, Stream(sliced.widths(family, **changes), shortcuts=True), **changes)
    out = logits(model)
    assert out.shape == (*IDS.shape, tiny.VOCAB)
    torch.testing.assert_close(steps(model), out, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["llama", "granite", "mixtral", "phi3", "qwen2_moe", "qwen3"])
def test_a_width_is_what_is_left_of_a_stream_that_is_zero_in_its_last_directions(family):
    """Weights filled up with zeros, norms corrected for the number of zeros they average over."""
    widths = sliced.widths(family)
    small = sliced.build(family, Stream(widths, shortcuts=True), rms_norm_eps=1e-12)
    full = sliced.uncut(family, rms_norm_eps=1e-12)
    norms = {
        f"{branch.norm}.weight": (width / full.config.hidden_size) ** 0.5
        for width, place in zip(widths, residual(full, find_stack(full)).places, strict=True)
        for branch in place.branches
    }
    given = dict(small.named_parameters())
    with torch.no_grad():
        for name, parameter in full.named_parameters():
            parameter.zero_()
            parameter[tuple(map(slice, given[name].shape))] = given[name] * norms.get(name, 1)
    torch.testing.assert_close(logits(small), logits(full), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", TURNED)
def test_without_shortcuts_blocks_are_those_of_the_family(family):
    model = plain(family)
    count = len(residual(model, find_stack(model)).places)
    small = sliced.build(family, Stream((24,) * count, shortcuts=False))
    assert [type(block) for block in find_stack(small).blocks] == [type(block) for block in find_stack(model).blocks]
    torch.testing.assert_close(steps(small), logits(small), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "opt", "mixtral"])
def test_what_a_block_is_to_transformers_stays(family):
    model, stock = sliced.uncut(family), plain(family)
    for left, right in zip(find_stack(model).blocks, find_stack(stock).blocks, strict=True):
        assert type(left).__name__ == type(right).__name__
        assert isinstance(left, type(right))
    first, second, *_ = find_stack(model).blocks
    assert type(first) is type(second)
    states, expected = (each(IDS, output_hidden_states=True).hidden_states for each in (model, stock))
    assert len(states) == len(expected) == 4
    for left, right in zip(states, expected, strict=True):
        assert torch.equal(left, right)
    assert torch.equal(logits(copy.deepcopy(model)), logits(stock))


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "opt", "phi", "phi3"])
def test_gradients_and_dropout_are_those_of_the_family(family):
    dropout = {"gpt_neox": ["hidden_dropout"], "opt": ["dropout"], "phi": ["resid_pdrop"], "phi3": ["resid_pdrop"]}
    changes = dict.fromkeys(dropout.get(family, []), 0.3)
    found = []
    for model in (sliced.uncut(family, **changes), plain(family, **changes)):
        for checkpointed in (False, True):
            model.train().zero_grad()
            if checkpointed:
                model.gradient_checkpointing_enable()
            torch.manual_seed(0)
            model(IDS, labels=IDS, use_cache=False).loss.backward()
            found.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for other in found[:3]:
        for name, gradient in found[3].items():
            torch.testing.assert_close(other[name], gradient, rtol=1e-4, atol=1e-6, msg=name)
    assert all(gradient is not None for name, gradient in found[0].items() if "embed_positions" not in name)


def test_shortcuts_are_neither_linears_nor_counted():
    model, stock = sliced.uncut("llama"), plain("llama")
    stack, expected = find_stack(model), find_stack(stock)
    assert stack.matrix_weights() == expected.matrix_weights()
    for index in range(3):
        assert [linear.info for linear in stack.linears(index)] == [linear.info for linear in expected.linears(index)]


BAD = {
    "too few": ({"widths": (24,) * 6}, "6 widths, LlamaForCausalLM reads it at 7 places"),
    "too many": ({"widths": (24,) * 8}, "8 widths, LlamaForCausalLM reads it at 7 places"),
    "wider than it was": (
        {"widths": (24, 24, 40, 24, 24, 24, 24)},
        "a width of 40, the configuration's hidden_size is 32",
    ),
    "a tied head": ({"tie_word_embeddings": True}, "tie_word_embeddings is true"),
}


@pytest.mark.parametrize("case", BAD)
def test_streams_of_other_models_are_refused(case):
    changes, message = BAD[case]
    config = {"tie_word_embeddings": changes.get("tie_word_embeddings", False)}
    stream = Stream(changes.get("widths", (24,) * 7), shortcuts=True)
    with pytest.raises(ModelError, match=message):
        variant(tiny.build("llama"), config, Shapes(stream=stream))


@pytest.mark.parametrize("family", CLOSED)
def test_families_that_cannot_have_shortcuts_are_refused_with_the_reason(family):
    model = plain(family)
    count = len(residual(model, find_stack(model)).places)
    with pytest.raises(UnsupportedFamily, match=CLOSED[family]):
        variant(model, {}, Shapes(stream=Stream((24,) * count, shortcuts=True)))


@pytest.mark.parametrize("family", tiny.MOE_FAMILIES)
def test_experts_that_would_write_another_width_are_refused(family):
    stream = Stream((24,) * 6 + (32,), shortcuts=True)
    with pytest.raises(UnsupportedFamily, match="here they would read 24 and write 32"):
        variant(plain(family), {}, Shapes(stream=stream))


def test_ends_of_other_widths_are_refused_where_the_code_needs_them_alike():
    stream = Stream((24,) * 6 + (32,), shortcuts=True)
    with pytest.raises(UnsupportedFamily, match="it would be 24 and 32"):
        variant(plain("gpt2"), {}, Shapes(stream=stream))


def test_a_block_with_more_than_the_table_says_is_refused():
    model = plain("llama")
    model.model.layers[1].adapter = torch.nn.Linear(4, 4)
    with pytest.raises(UnsupportedFamily, match="they have adapter too"):
        sliced.slice_shapes(model, find_stack(model), Stream((32,) * 7, shortcuts=True))
