"""Checkpoints with blocks of different widths: loaded by plain transformers, opened lazily, pruned, packed, saved."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM
from typer.testing import CliRunner

from sparsekit.checkpoint.shapes import Shapes, Widths, config_entries, read_shapes
from sparsekit.cli.app import build
from sparsekit.convert import convert
from sparsekit.errors import CheckpointError, IndexMismatch, ModelError, UnsupportedFamily, VersionError
from sparsekit.inspect_model import inspect_model
from sparsekit.models.source import open_model
from sparsekit.models.widths import Kept
from sparsekit.pack.verify import verify
from sparsekit.progress import Silent
from sparsekit.runtime import native
from tests.runtime.support import assert_same, assert_same_weights, load, prune
from tests.runtime.test_loading import python
from tests.runtime.test_without_import import LOAD
from tests.support import narrow, tiny

GROUPS_ALONE = ((Kept(), Kept(torch.tensor([0])), Kept()), (Widths(), Widths(groups=1), Widths()))
NEURONS_ALONE = ((Kept(), Kept(), Kept(neurons=torch.arange(9))), (Widths(), Widths(), Widths(neurons=9)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return narrow.write(narrow.build(dtype=torch.bfloat16), tmp_path_factory.mktemp("narrow"))


@pytest.fixture
def copy(tmp_path):
    return narrow.write(narrow.build(dtype=torch.bfloat16), tmp_path)


def shapes(model):
    return [
        (tuple(block.self_attn.q_proj.weight.shape), tuple(block.mlp.down_proj.weight.shape))
        for block in model.model.layers
    ]


# --- loading -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("family", ["llama", "gemma2", "glm4", "gptj", "opt", "phi", "qwen2", "qwen3", "stablelm"])
def test_plain_transformers_load_both_widths(family, tmp_path):
    model = narrow.build(family)
    assert_same(model, load(narrow.write(model, tmp_path)))


@pytest.mark.parametrize(
    ("family", "kept"),
    [("gpt2", NEURONS_ALONE), ("phi3", NEURONS_ALONE), ("olmo2", NEURONS_ALONE), ("mixtral", GROUPS_ALONE)],
)
def test_plain_transformers_load_one_width(family, kept, tmp_path):
    model = narrow.build(family, kept[0])
    assert_same(model, load(narrow.write(model, tmp_path, kept[1])))


@pytest.mark.parametrize("options", [{"dtype": torch.float32}, {"device_map": "auto"}], ids=str)
def test_options_of_from_pretrained(folder, options):
    model = load(folder, **options)
    assert_same_weights(model, narrow.build(dtype=torch.bfloat16).to(model.dtype))
    with torch.no_grad():
        assert torch.isfinite(model(tiny.ids(2)).logits).all()


def test_the_base_model_alone(folder):
    assert_same_weights(AutoModel.from_pretrained(folder, dtype="auto"), narrow.build(dtype=torch.bfloat16).model)


@pytest.mark.parametrize("options", [{}, {"use_cache": False}, {"cache_implementation": "static"}], ids=str)
def test_generate(folder, options):
    texts = [
        model.generate(tiny.ids(2), max_new_tokens=8, do_sample=False, **options)
        for model in (load(folder), narrow.build(dtype=torch.bfloat16))
    ]
    assert torch.equal(*texts)
    assert torch.equal(texts[0], load(folder).generate(tiny.ids(2), max_new_tokens=8, do_sample=False))


def test_without_sparsekit_nothing_is_loaded(folder):
    status, output = python(LOAD.format(folder=str(folder)))
    assert status != 0
    assert "no file named model.safetensors" in output


# --- saving ------------------------------------------------------------------------------------------------
def test_saved_and_loaded_again_it_is_the_same_model(folder, tmp_path):
    first = load(folder)
    for number in range(2):
        first.save_pretrained(tmp_path / str(number))
        again = load(tmp_path / str(number))
        assert_same(first, again)
        first = again
    assert not again.is_quantized
    entry = json.loads((tmp_path / "1" / "config.json").read_text())["quantization_config"]
    assert entry == config_entries(narrow.SHAPES)["quantization_config"] | {"ordinary_names": True}
    assert_same(first, open_model(str(tmp_path / "1"), Silent()).load())


def test_a_saved_copy_without_sparsekit_is_an_error_not_another_model(folder, tmp_path):
    load(folder).save_pretrained(tmp_path)
    status, output = python(LOAD.format(folder=str(tmp_path)))
    assert status != 0
    assert "RuntimeError" in output
    assert "mismatch" in output


def test_it_can_be_trained(folder):
    model = load(folder, dtype=torch.float32)
    model(tiny.ids(2), labels=tiny.ids(2)).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert model.hf_quantizer.is_trainable


# --- with sparsekit ----------------------------------------------------------------------------------------
def test_block_by_block_it_is_the_same_model(folder):
    lazy = open_model(str(folder), Silent()).lazy()
    lazy.require_tensors()
    expected = dict(load(folder).named_parameters())
    for index in range(lazy.blocks):
        block = lazy.load_block(index)
        for name, parameter in block.named_parameters():
            assert torch.equal(parameter, expected[f"{lazy.stack.prefix(index)}.{name}"]), name
        lazy.release_block(index)
    assert lazy.shapes == narrow.SHAPES
    assert shapes(lazy.in_dtype(torch.float32).module) == shapes(load(folder))


@pytest.mark.parametrize("form", ["dense", "auto"])
def test_pruned_further_it_stays_narrow(folder, form, tmp_path, monkeypatch):
    out = prune(folder, tmp_path / "out", form, "wanda-50")
    assert verify(out, "semantic").ok
    assert not (out / "model.safetensors.index.json").exists()
    assert open_model(str(out), Silent()).packed == (form == "auto")
    monkeypatch.setenv("SPARSEKIT_RUNTIME", "dense")
    model = load(out)
    assert shapes(model) == shapes(load(folder))
    weight = model.model.layers[2].mlp.down_proj.weight
    assert int(weight.count_nonzero()) == weight.numel() // 2
    found = inspect_model(str(out), Silent())
    shown = {shape for kind in found.kinds if kind.name.endswith("down_proj") for shape in kind.shapes}
    assert shown == {(32, 48), (32, 24), (32, 8)}
    assert found.blocks == 3


def test_packed_and_back_every_bit_stays(folder, tmp_path, monkeypatch):
    dense = prune(folder, tmp_path / "dense", "dense", "magnitude-50")
    packed = convert(dense, "bitmask", tmp_path / "packed", Silent()).out
    again = convert(packed, "dense", tmp_path / "again", Silent()).out
    assert open_model(str(packed), Silent()).packed
    monkeypatch.setenv("SPARSEKIT_RUNTIME", "dense")
    assert_same(load(dense), load(packed))
    assert_same(load(dense), load(again))
    load(packed).save_pretrained(tmp_path / "saved")
    assert_same(load(dense), load(tmp_path / "saved"))


@pytest.mark.skipif(not native.available(), reason=str(native.missing_reason()))
def test_it_multiplies_packed(folder, tmp_path, monkeypatch):
    dense = prune(folder, tmp_path / "dense", "dense", "magnitude-50")
    packed = convert(dense, "bitmask", tmp_path / "packed", Silent()).out
    monkeypatch.setenv("SPARSEKIT_RUNTIME", "packed")
    model, expected = load(packed, dtype=torch.float32), load(dense, dtype=torch.float32)
    assert type(model.model.layers[1].mlp.down_proj).__name__ == "SparseLinear"
    with torch.no_grad():
        torch.testing.assert_close(model(tiny.ids(2)).logits, expected(tiny.ids(2)).logits, rtol=1e-4, atol=1e-4)
    model.save_pretrained(tmp_path / "saved")
    assert_same(expected, load(tmp_path / "saved", dtype=torch.float32))
    assert_same(expected, model.dequantize())


@pytest.mark.parametrize(
    "arguments",
    [["eval", "--samples", "2", "--sequence-length", "32"], ["generate", "--max-new-tokens", "4", "-p", "a"]],
    ids=lambda a: a[0],
)
def test_commands_take_it_for_a_model_like_any_other(folder, arguments):
    command, *options = arguments
    done = CliRunner().invoke(build(), [command, str(folder), *options])
    assert done.exit_code == 0, done.output


# --- bad input ---------------------------------------------------------------------------------------------
GIVEN = config_entries(narrow.SHAPES)["quantization_config"]["widths"]
BAD = {
    "a list": ([1, 2], ModelError, "need an object with groups and neurons"),
    "text": ("wide", ModelError, "need an object with groups and neurons"),
    "a kind missing": ({"groups": [1, 1, 1]}, ModelError, "need an object with groups and neurons"),
    "a kind too many": ({**GIVEN, "heads": [1]}, ModelError, "need an object with groups and neurons"),
    "no numbers": ({**GIVEN, "groups": [None, "1", None]}, ModelError, "groups is no list of null and positive"),
    "fractions": ({**GIVEN, "neurons": [None, 24.0, 8]}, ModelError, "neurons is no list of null and positive"),
    "a truth": ({**GIVEN, "groups": [None, True, None]}, ModelError, "groups is no list of null and positive"),
    "nothing left": ({**GIVEN, "groups": [None, 0, None]}, ModelError, "groups is no list of null and positive"),
    "uneven": ({**GIVEN, "groups": [None, 1]}, ModelError, "groups of 2 blocks, neurons of 3"),
    "fewer blocks": ({"groups": [None, 1], "neurons": [None, 24]}, ModelError, "of 2 blocks, the configuration has 3"),
    "too many groups": ({**GIVEN, "groups": [None, 3, None]}, ModelError, "block 1 has 3 groups, .* it has 2"),
    "too many neurons": ({**GIVEN, "neurons": [49, 24, 8]}, ModelError, "block 0 has 49 neurons, .* it has 48"),
    "other widths": ({**GIVEN, "neurons": [None, 24, 9]}, CheckpointError, r"layers.2.mlp.*_proj.weight has shape"),
    "other groups": ({**GIVEN, "groups": [1, 1, None]}, CheckpointError, r"layers.0.self_attn.*_proj.weight has shape"),
    "forgotten": (None, CheckpointError, "no packed tensor|has shape"),
}


@pytest.mark.parametrize("case", sorted(BAD))
def test_bad_widths_are_refused_by_what_is_wrong(case, copy):
    given, error, message = BAD[case]
    narrow.change(copy, widths=given)
    with pytest.raises(error, match=message):
        load(copy)
    if given is not None:
        with pytest.raises(error, match=message):
            open_model(str(copy), Silent()).lazy().require_tensors()


def test_a_version_from_the_future_is_refused(copy):
    narrow.change(copy, format_version=2)
    with pytest.raises(VersionError, match="packed format version 2"):
        load(copy)


def test_widths_of_a_family_that_has_none_are_refused(tmp_path):
    model = tiny.build("falcon")
    narrow.write(model, tmp_path, (Widths(), Widths(neurons=9), Widths()))
    with pytest.raises(UnsupportedFamily, match="falcon"):
        load(tmp_path)
    with pytest.raises(UnsupportedFamily, match="falcon"):
        open_model(str(tmp_path), Silent()).lazy()


def test_packed_tensors_behind_widths_alone_are_refused(folder, tmp_path):
    packed = prune(folder, tmp_path / "packed", "auto", "magnitude-50")
    narrow.change(packed, pattern=None)
    with pytest.raises(IndexMismatch):
        open_model(str(packed), Silent()).lazy().require_tensors()


def test_entries_are_read_as_they_were_written():
    assert config_entries(Shapes()) == {}
    assert config_entries(Shapes((Widths(),) * 3)) == {}
    assert read_shapes(None) == Shapes()
    assert read_shapes({"quant_method": "sparsekit", "pattern": "2:4"}) == Shapes()
    entry = config_entries(narrow.SHAPES, "2:4")["quantization_config"]
    assert json.loads(json.dumps(entry)) == entry
    assert (entry["pattern"], read_shapes(entry)) == ("2:4", narrow.SHAPES)


def test_plain_loading_keeps_no_mark_of_this(tmp_path):
    """A model without widths is none of our business."""
    folder = tiny.save("llama", tmp_path)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert not hasattr(model.config, "quantization_config")
    assert open_model(str(folder), Silent()).lazy().shapes == Shapes()


def test_blocks_dropped_from_it_take_their_widths_along(folder, tmp_path):
    """The narrow block 2 moves up, the narrow block 1 goes."""
    out = prune(folder, tmp_path / "out", "dense", "shortgpt-25")
    model, dense = load(out), narrow.build(dtype=torch.bfloat16)
    assert read_shapes(model.config.quantization_config.to_dict()).blocks == (Widths(), Widths(neurons=8))
    assert_same_weights(model.model.layers[1], dense.model.layers[2])
    assert verify(out, "semantic").ok
