"""Checkpoints with a sliced stream: used everywhere, and refused by name where a piece is missing or wrong."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from sparsekit import run
from sparsekit.checkpoint.shapes import Shapes, Stream, config_entries, read_shapes
from sparsekit.checkpoint.verify import verify
from sparsekit.convert import convert
from sparsekit.errors import ModelError, SparsekitError, UnsupportedFamily
from sparsekit.models.source import open_model
from sparsekit.prepared import prepare
from sparsekit.progress import Silent
from sparsekit.recipe.load import load_recipe
from tests.integration.test_slicegpt import IDS, logits, low_rank, parameters, slice_
from tests.support import tiny

PRUNE = ["calibration.source=builtin", "calibration.samples=4", "calibration.sequence_length=64"]


@pytest.fixture(scope="module")
def sliced(tmp_path_factory):
    """A llama with a basis for each place, widths 24, 24, 16, 16 and the head's 32."""
    folder = tmp_path_factory.mktemp("sliced")
    low_rank("llama", folder / "model", rank=14, num_hidden_layers=2)
    slice_(
        folder / "model",
        folder / "out",
        "allow_growth=true",
        "rotation=per_block",
        "width=null",
        "schedule=[0.25, 0.5]",
    )
    return folder / "out"


def prune(folder, out, recipe, *sets):
    prepared = prepare(load_recipe(recipe, [*PRUNE, *sets]), open_model(str(folder), Silent()))
    return run.execute(prepared, out, Silent(), evaluation=False)


def test_saved_again_it_loads_again(sliced, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(sliced)
    model.save_pretrained(tmp_path / "saved")
    torch.testing.assert_close(logits(tmp_path / "saved"), logits(sliced), atol=0, rtol=0)


def test_hidden_states_are_recorded_and_attention_may_be_eager(sliced):
    model = AutoModelForCausalLM.from_pretrained(sliced, attn_implementation="eager")
    with torch.no_grad():
        out = model(input_ids=IDS, output_hidden_states=True)
    assert [states.shape[-1] for states in out.hidden_states] == [24, 16, 32]
    torch.testing.assert_close(out.logits, logits(sliced), atol=1e-5, rtol=0)


def test_gradients_flow_through_shortcuts_with_and_without_checkpointing(sliced):
    found = []
    for checkpointing in (False, True):
        model = AutoModelForCausalLM.from_pretrained(sliced).train()
        model.requires_grad_(True)
        if checkpointing:
            model.gradient_checkpointing_enable()
        model(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
        found.append(model.model.layers[0].shortcuts[1].weight.grad)
    torch.testing.assert_close(*found)
    assert float(found[0].abs().max()) > 0


@pytest.mark.parametrize("recipe", ["wanda-50", "sparsegpt-50", "mfac-50"])
def test_it_is_pruned_and_its_shortcuts_stay_dense(recipe, sliced, tmp_path):
    sets = {"mfac-50": ["stages.0.samples=4", "stages.0.sequence_length=64"]}.get(recipe, [])
    prune(sliced, tmp_path / "out", recipe, *sets)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    before = AutoModelForCausalLM.from_pretrained(sliced)
    for index, layer in enumerate(model.model.layers):
        for one, other in zip(layer.shortcuts, before.model.layers[index].shortcuts, strict=True):
            assert torch.equal(one.weight, other.weight)
        zeros = (layer.mlp.up_proj.weight == 0).double().mean()
        assert zeros == 0.5
    assert verify(tmp_path / "out", "semantic").problems == ()


@pytest.mark.parametrize("runtime", ["dense", "packed"])
def test_it_is_packed_and_unpacked(runtime, sliced, tmp_path, monkeypatch):
    prune(sliced, tmp_path / "pruned", "wanda-50")
    convert(tmp_path / "pruned", "bitmask", tmp_path / "packed", Silent())
    convert(tmp_path / "packed", "dense", tmp_path / "dense", Silent())
    dense = logits(tmp_path / "dense")
    monkeypatch.setenv("SPARSEKIT_RUNTIME", runtime)
    torch.testing.assert_close(logits(tmp_path / "packed"), dense, atol=1e-4 if runtime == "packed" else 0, rtol=0)
    assert not torch.allclose(dense, logits(sliced))


def test_blocks_joined_by_shortcuts_cannot_be_dropped(sliced, tmp_path):
    with pytest.raises(SparsekitError, match="shortcut"):
        prune(sliced, tmp_path / "out", "shortgpt-25", "stages.0.drop=0.5", "stages.0.keep_first=0")
    assert not (tmp_path / "out").exists()


def test_blocks_of_a_stream_of_one_width_can(tmp_path):
    folder = low_rank("gpt_neox", tmp_path / "model")
    slice_(folder, tmp_path / "sliced", "allow_growth=true")
    prune(tmp_path / "sliced", tmp_path / "out", "shortgpt-25", "stages.0.drop=0.34", "stages.0.choose=random")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"]["stream"]["widths"] == [24] * 3
    assert logits(tmp_path / "out").shape == (2, 24, 96)


@pytest.fixture
def copy(sliced, tmp_path):
    return shutil.copytree(sliced, tmp_path / "copy")


def change(folder, **stream):
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["stream"] |= stream
    (folder / "config.json").write_text(json.dumps(config))


def edit(folder, name, value):
    """Replace a tensor in its file; None removes it."""
    for path in folder.glob("*.safetensors"):
        tensors = load_file(path)
        if name in tensors:
            tensors.pop(name)
            save_file({**tensors, **({} if value is None else {name: value})}, path, {"format": "pt"})
            index = folder / "sparsekit_model.safetensors.index.json"
            content = json.loads(index.read_text())
            if value is None:
                del content["weight_map"][name]
            index.write_text(json.dumps(content))
            return
    raise AssertionError(name)


WIDTHS = [24, 24, 16, 16, 32]
SHORTCUT = "model.layers.0.shortcuts.1.weight"
DAMAGE = {
    "a shortcut is missing": (lambda folder: edit(folder, SHORTCUT, None), r"no tensor for model.layers.0.shortcuts.1"),
    "a norm is missing": (
        lambda folder: edit(folder, "model.layers.1.input_layernorm.weight", None),
        r"no tensor for model.layers.1.input_layernorm",
    ),
    "a shortcut has another shape": (
        lambda folder: edit(folder, SHORTCUT, torch.zeros(24, 24)),
        r"shortcuts.1.weight has shape \[24, 24\], the configuration needs \[16, 24\]",
    ),
    "embeddings of the old width": (
        lambda folder: edit(folder, "model.embed_tokens.weight", torch.zeros(96, 32)),
        r"embed_tokens.weight has shape \[96, 32\], the configuration needs \[96, 24\]",
    ),
    "another width": (lambda folder: change(folder, widths=[24, 24, 8, 16, 32]), r"has shape \[\d+, \d+\], the conf"),
    "too few widths": (lambda folder: change(folder, widths=WIDTHS[1:]), r"4 widths, .* at 5 places"),
    "wider than the model": (lambda folder: change(folder, widths=[24, 24, 16, 16, 40]), r"a width of 40, .* is 32"),
    "no shortcuts": (lambda folder: change(folder, shortcuts=False), r"without shortcuts all widths must be the same"),
    "no list": (lambda folder: change(folder, widths="24"), r"widths is no list of positive whole numbers"),
    "zero": (lambda folder: change(folder, widths=[0, 24, 16, 16, 32]), r"widths is no list of positive whole numbers"),
    "shortcuts no boolean": (lambda folder: change(folder, shortcuts=1), r"shortcuts is 1, not true or false"),
    "another key": (lambda folder: change(folder, more=1), r"need an object with widths and shortcuts"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_what_is_missing_or_wrong_is_named_by_both_loaders(case, copy):
    damage, message = DAMAGE[case]
    damage(copy)
    with pytest.raises(SparsekitError, match=message):
        AutoModelForCausalLM.from_pretrained(copy)
    with pytest.raises(SparsekitError, match=message):
        prepare(load_recipe("wanda-50", PRUNE), open_model(str(copy), Silent()))


def test_shortcuts_that_the_configuration_does_not_know_are_refused(tmp_path):
    """All widths alike, the flag flipped: every shape fits, and the stream would go on without its shortcuts."""
    low_rank("llama", tmp_path / "model", num_hidden_layers=2)
    slice_(tmp_path / "model", tmp_path / "out", "allow_growth=true", "rotation=per_block", "slice_head=true")
    change(tmp_path / "out", shortcuts=False)
    message = r"no place for model.layers.0.shortcuts.0.weight"
    with pytest.raises(SparsekitError, match=message):
        AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    with pytest.raises(SparsekitError, match=message):
        prepare(load_recipe("wanda-50", PRUNE), open_model(str(tmp_path / "out"), Silent()))


def test_a_stream_of_a_family_that_has_none_is_refused(tmp_path):
    folder = tiny.save("gemma2", tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    shapes = Shapes(stream=Stream((24,) * 7, False))
    (folder / "config.json").write_text(json.dumps(config | config_entries(shapes)))
    with pytest.raises(UnsupportedFamily, match="between a branch and the residual stream"):
        prepare(load_recipe("wanda-50", PRUNE), open_model(str(folder), Silent()))


def test_entries_of_config_json_are_read_as_they_are_written():
    shapes = Shapes(stream=Stream((24, 16, 32), True))
    entry = config_entries(shapes)["quantization_config"]
    assert entry == {
        "quant_method": "sparsekit", "format_version": 1, "stream": {"widths": [24, 16, 32], "shortcuts": True}
    }  # fmt: skip
    assert read_shapes(entry) == shapes
    assert config_entries(shapes, "2:4")["quantization_config"]["pattern"] == "2:4"
    with pytest.raises(ModelError, match="stream"):
        read_shapes({**entry, "stream": [1]})


def test_counts_are_of_what_was_written(sliced):
    assert parameters(sliced) == sum(
        value.numel() for value in AutoModelForCausalLM.from_pretrained(sliced).parameters()
    )
