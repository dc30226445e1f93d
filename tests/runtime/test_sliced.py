"""Checkpoints with a sliced residual stream: loaded by plain transformers, opened lazily, pruned, packed, saved."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForSequenceClassification
from typer.testing import CliRunner

from sparsekit import run
from sparsekit.checkpoint.shapes import Shapes, Stream, config_entries, read_shapes
from sparsekit.checkpoint.verify import verify
from sparsekit.cli.app import build
from sparsekit.convert import convert
from sparsekit.errors import CheckpointError, IndexMismatch, ModelError, PlanError, SparsekitError, UnsupportedFamily
from sparsekit.inspect_model import inspect_model
from sparsekit.models.source import open_model
from sparsekit.pack.verify import verify as verify_packed
from sparsekit.prepared import prepare
from sparsekit.progress import Silent
from sparsekit.recipe.load import recipe_from
from sparsekit.runtime import native
from tests.runtime.support import assert_same, assert_same_weights, load, prune
from tests.support import narrow, sliced, tiny

FAMILIES = ("llama", "gemma", "gpt2", "gpt_neox", "granite", "opt", "phi", "phi3", "qwen3", "mixtral", "qwen3_moe")
STREAM = Stream(sliced.SEVEN, shortcuts=True)
LEVEL = Stream((24,) * 7, shortcuts=False)
FILE = "sparsekit_model-00001-of-00001.safetensors"
SHORTCUT = "model.layers.1.shortcuts.0.weight"


def model_of(stream=STREAM, **options):
    return sliced.build("llama", stream, **options)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return sliced.write(model_of(dtype=torch.bfloat16), tmp_path_factory.mktemp("sliced"), STREAM)


@pytest.fixture(scope="module")
def level(tmp_path_factory):
    """One width everywhere, no shortcuts."""
    return sliced.write(model_of(LEVEL, dtype=torch.bfloat16), tmp_path_factory.mktemp("level"), LEVEL)


@pytest.fixture
def copy(tmp_path):
    return sliced.write(model_of(dtype=torch.bfloat16), tmp_path / "copy", STREAM)


def executed(folder, out, *stages):
    text = {"source": "builtin", "samples": 3, "sequence_length": 32}
    recipe = {"sparsekit": 1, "name": "r", "description": "a test", "calibration": text, "stages": [*stages]}
    prepared = prepare(recipe_from(recipe), open_model(str(folder), Silent()))
    return run.execute(prepared, out, Silent(), evaluation=False)


def shortcuts(folder):
    tensors = {name: value for path in folder.glob("*.safetensors") for name, value in load_file(path).items()}
    return {name: value for name, value in tensors.items() if ".shortcuts." in name}


# --- loading -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("family", FAMILIES)
def test_plain_transformers_load_it(family, tmp_path):
    stream = Stream(sliced.widths(family), shortcuts=True)
    model = sliced.build(family, stream, dtype=torch.bfloat16)
    assert_same(model, load(sliced.write(model, tmp_path, stream)))


@pytest.mark.parametrize("family", ["gpt2", "gptj", "mpt", "opt", "stablelm"])
def test_plain_transformers_load_one_width_without_shortcuts(family, tmp_path):
    stream = Stream((24,) * (4 if family == "gptj" else 7), shortcuts=False)
    model = sliced.build(family, stream)
    assert_same(model, load(sliced.write(model, tmp_path, stream)))


@pytest.mark.parametrize("options", [{"dtype": torch.float32}, {"device_map": "auto"}], ids=str)
def test_options_of_from_pretrained(folder, options):
    model = load(folder, **options)
    assert_same_weights(model, model_of(dtype=torch.bfloat16).to(model.dtype))


@pytest.mark.parametrize("family", ["llama", "opt", "gpt_neox"])
def test_the_base_model_alone(family, tmp_path):
    stream = Stream(sliced.widths(family), shortcuts=True)
    model = sliced.build(family, stream)
    base = AutoModel.from_pretrained(sliced.write(model, tmp_path, stream))
    assert_same_weights(base, model.base_model)
    with torch.no_grad():
        states = base(tiny.ids(2)).last_hidden_state
    assert torch.equal(states, model.base_model(tiny.ids(2)).last_hidden_state)
    assert states.shape[-1] == stream.widths[-1]


def test_a_head_that_is_none_of_logits_is_refused(folder):
    with pytest.raises(UnsupportedFamily, match=r"score.weight beside embeddings"):
        AutoModelForSequenceClassification.from_pretrained(folder)


@pytest.mark.parametrize("options", [{}, {"use_cache": False}, {"cache_implementation": "static"}], ids=str)
def test_generate(folder, options):
    texts = [
        model.generate(tiny.ids(2), max_new_tokens=8, do_sample=False, **options)
        for model in (load(folder), model_of(dtype=torch.bfloat16))
    ]
    assert torch.equal(*texts)
    assert torch.equal(texts[0], load(folder).generate(tiny.ids(2), max_new_tokens=8, do_sample=False))


def test_hidden_states_are_recorded_in_their_widths(folder):
    with torch.no_grad():
        states = load(folder)(tiny.ids(2), output_hidden_states=True).hidden_states
    assert [state.shape[-1] for state in states] == [24, 16, 12, 32]


def test_it_can_be_trained(folder):
    model = load(folder, dtype=torch.float32)
    model(tiny.ids(2), labels=tiny.ids(2)).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_saved_and_loaded_again_it_is_the_same_model(folder, tmp_path):
    first = load(folder)
    for number in range(2):
        first.save_pretrained(tmp_path / str(number))
        again = load(tmp_path / str(number))
        assert_same(first, again)
        first = again
    entry = json.loads((tmp_path / "1" / "config.json").read_text())["quantization_config"]
    assert entry == config_entries(Shapes(stream=STREAM))["quantization_config"] | {"ordinary_names": True}
    assert_same(first, open_model(str(tmp_path / "1"), Silent()).load())


# --- with sparsekit ----------------------------------------------------------------------------------------
@pytest.mark.parametrize("stream", [STREAM, LEVEL], ids=["shortcuts", "level"])
def test_block_by_block_it_is_the_same_model(stream, tmp_path):
    model = model_of(stream)
    lazy = open_model(str(sliced.write(model, tmp_path, stream)), Silent()).lazy()
    lazy.require_tensors()
    lazy.load_outer()
    for index in range(lazy.blocks):
        lazy.load_block(index)
    assert lazy.shapes == Shapes(stream=stream)
    assert_same(lazy.module, model)


METHODS = {
    "wanda": {},
    "sparsegpt": {},
    "alps": {},
    "ria": {"permute": True},
    "mfac": {"samples": 3, "sequence_length": 32},
    "magnitude": {},
}


@pytest.mark.parametrize("method", sorted(METHODS))
def test_methods_prune_it_and_leave_the_shortcuts(method, folder, tmp_path):
    pattern = {"pattern": "2:4"} if method == "ria" else {}
    stage = {"stage": "prune", "method": method, "sparsity": 0.5, **pattern, **METHODS[method]}
    if method == "wanda":
        stage["update"] = "lstsq"
    outcome = executed(folder, tmp_path / "out", stage)
    assert verify(outcome.out, "semantic").ok
    found, expected = shortcuts(outcome.out), shortcuts(folder)
    assert len(found) == 6
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    model = load(outcome.out)
    for name, parameter in model.named_parameters():
        if "_proj" in name:
            assert int(parameter.count_nonzero()) == parameter.numel() // 2, name
    assert outcome.report["stages"][0]["coverage"] == 1


@pytest.mark.parametrize("form", ["dense", "auto"])
def test_pruned_further_it_stays_sliced(folder, form, tmp_path, monkeypatch):
    out = prune(folder, tmp_path / "out", form, "wanda-50")
    assert verify_packed(out, "semantic").ok
    assert not (out / "model.safetensors.index.json").exists()
    assert open_model(str(out), Silent()).packed == (form == "auto")
    monkeypatch.setenv("SPARSEKIT_RUNTIME", "dense")
    model = load(out)
    assert read_shapes(model.config.quantization_config.to_dict()) == Shapes(stream=STREAM)
    assert torch.equal(model.get_parameter(SHORTCUT), load(folder).get_parameter(SHORTCUT))
    found = inspect_model(str(out), Silent())
    assert found.blocks == 3
    shown = {shape for kind in found.kinds if kind.name.endswith("down_proj") for shape in kind.shapes}
    assert shown == {(16, 48), (12, 48), (32, 48)}


def test_packed_and_back_every_bit_stays(folder, tmp_path, monkeypatch):
    dense = prune(folder, tmp_path / "dense", "dense", "magnitude-50")
    packed = convert(dense, "bitmask", tmp_path / "packed", Silent()).out
    again = convert(packed, "dense", tmp_path / "again", Silent()).out
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
    assert type(model.model.layers[1].shortcuts[0]).__name__ == "Shortcut"
    with torch.no_grad():
        torch.testing.assert_close(model(tiny.ids(2)).logits, expected(tiny.ids(2)).logits, rtol=1e-4, atol=1e-4)
    assert_same(expected, model.dequantize())


COMMANDS = [
    ["eval", "--samples", "2", "--sequence-length", "32"],
    ["generate", "--max-new-tokens", "4", "-p", "a"],
    ["inspect"],
]


@pytest.mark.parametrize("arguments", COMMANDS, ids=lambda a: a[0])
def test_commands_take_it_for_a_model_like_any_other(folder, arguments):
    command, *options = arguments
    done = CliRunner().invoke(build(), [command, str(folder), *options])
    assert done.exit_code == 0, done.output


# --- reshaping it further -----------------------------------------------------------------------------------
def reshape(folder, out, method, **options):
    stage = {"stage": "reshape", "method": method, **options}
    return executed(folder, out, stage).out


def test_blocks_that_shortcuts_chain_together_cannot_be_dropped(folder, tmp_path):
    for choose in ("shortgpt", "random"):
        with pytest.raises(PlanError, match="shortcuts"):
            reshape(folder, tmp_path / "out", "layer_drop", drop=0.34, choose=choose)


def test_without_shortcuts_blocks_can_be_dropped(level, tmp_path):
    out = reshape(level, tmp_path / "out", "layer_drop", drop=0.34, choose="random")
    model = load(out)
    assert read_shapes(model.config.quantization_config.to_dict()).stream == Stream((24,) * 5, shortcuts=False)
    dense = model_of(LEVEL, dtype=torch.bfloat16)
    kept = [
        block
        for block in dense.model.layers
        if torch.equal(block.mlp.up_proj.weight, model.model.layers[1].mlp.up_proj.weight)
    ]
    assert len(kept) == 1
    assert verify(out, "semantic").ok


TYR = {
    "drop": 0.5, "passes": 2, "samples": 3, "sequence_length": 32, "tokens": [32, 64], "survivors": [1, 1],
    "offspring": 3, "generations": 2,
}  # fmt: skip
NARROWED = [
    (STREAM, "modegpt", {"parts": "all", "width": 0.25, "head_multiple": 2}),
    (Stream((24,) * 7, shortcuts=True), "tyr", TYR),
    (LEVEL, "tyr", TYR),
]


@pytest.mark.parametrize(("stream", "method", "options"), NARROWED, ids=["modegpt", "tyr", "tyr-level"])
def test_heads_and_neurons_can_still_be_removed(stream, method, options, tmp_path):
    dense = model_of(stream)
    out = reshape(sliced.write(dense, tmp_path / "source", stream), tmp_path / "out", method, **options)
    shapes = read_shapes(json.loads((out / "config.json").read_text())["quantization_config"])
    assert shapes.stream == stream
    assert any(width.neurons for width in shapes.blocks)
    assert verify(out, "semantic").ok
    model = load(out)
    assert_same(model, open_model(str(out), Silent()).load())
    assert model.model.layers[0].mlp.up_proj.weight.shape[1] == stream.widths[1]
    assert all(torch.equal(value, dense.state_dict()[name]) for name, value in shortcuts(out).items())
    assert model.generate(tiny.ids(1), max_new_tokens=3, do_sample=False).shape == (1, 27)


def test_blocks_that_write_different_widths_exchange_no_heads(folder, tmp_path):
    with pytest.raises(PlanError, match="write streams of different widths: 20, 24, 28"):
        reshape(folder, tmp_path / "out", "tyr", **TYR)


def test_shares_by_influence_need_one_basis(folder, tmp_path):
    with pytest.raises(PlanError, match="shortcuts put the two into different bases"):
        reshape(folder, tmp_path / "out", "modegpt", width=0.25, allocate="influence")


def test_an_order_that_makes_no_sense_is_refused_before_anything_is_computed(tmp_path):
    source = tiny.save("llama", tmp_path / "source", tie_word_embeddings=False)
    slicing = {"stage": "reshape", "method": "slicegpt", "width": 0.25, "allow_growth": True}
    dropping = {"stage": "reshape", "method": "layer_drop", "drop": 0.34, "choose": "random"}
    shared = {**slicing, "rotation": "per_block"}
    for stages in ([shared, dropping], [shared, slicing]):
        with pytest.raises(PlanError, match=r"stages\.1: .*(shortcuts|sliced already)"):
            executed(source, tmp_path / "out", *stages)
    assert not list(tmp_path.glob("out*"))
    out = executed(source, tmp_path / "out", dropping, shared).out
    assert len(load(out).model.layers) == 2


def test_entries_of_config_json_are_read_as_they_are_written():
    shapes = Shapes(stream=STREAM)
    found = config_entries(shapes)["quantization_config"]
    assert found == {"quant_method": "sparsekit", "format_version": 1, **entry()}
    assert read_shapes(found) == shapes
    assert config_entries(shapes, "2:4")["quantization_config"]["pattern"] == "2:4"


# --- bad input ---------------------------------------------------------------------------------------------
def entry(**changes):
    return {"stream": {"widths": [*STREAM.widths], "shortcuts": True, **changes}}


def without(**changes):
    found = entry(**changes)
    return {"stream": {key: value for key, value in found["stream"].items() if value is not None}}


CONFIGS = {
    "a list": ({"stream": [24] * 7}, ModelError, "need an object with widths and shortcuts"),
    "no shortcuts key": (without(shortcuts=None), ModelError, "need an object with widths and shortcuts"),
    "a key too many": (entry(heads=4), ModelError, "need an object with widths and shortcuts"),
    "no numbers": (entry(widths=[24, "24"]), ModelError, "widths is no list of positive whole numbers"),
    "a zero": (entry(widths=[0, *STREAM.widths[1:]]), ModelError, "widths is no list of positive whole numbers"),
    "a truth": (entry(widths=[True, *STREAM.widths[1:]]), ModelError, "widths is no list of positive whole numbers"),
    "nothing": (entry(widths=[]), ModelError, "widths is no list of positive whole numbers"),
    "a flag that is none": (entry(shortcuts=1), ModelError, "shortcuts is 1, not true or false"),
    "a flag turned": (entry(shortcuts=False), ModelError, "without shortcuts all widths must be the same"),
    "too few": (entry(widths=[*STREAM.widths[1:]]), ModelError, "6 widths, LlamaForCausalLM reads it at 7 places"),
    "too many": (entry(widths=[*STREAM.widths, 32]), ModelError, "8 widths, LlamaForCausalLM reads it at 7 places"),
    "too wide": (entry(widths=[40, *STREAM.widths[1:]]), ModelError, "a width of 40"),
    "another first": (entry(widths=[28, *STREAM.widths[1:]]), CheckpointError, r"embed_tokens.weight has shape"),
    "another in the middle": (
        entry(widths=[24, 20, 20, *STREAM.widths[3:]]),
        CheckpointError,
        r"layers\.[01]\.\S+ has shape",
    ),
    "another last": (entry(widths=[*STREAM.widths[:-1], 24]), CheckpointError, r"(lm_head|layers.2)\S+ has shape"),
    "forgotten": ({"stream": None, "pattern": "2:4"}, SparsekitError, "embed_tokens.weight has shape|is packed"),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_streams_that_are_not_the_models_are_refused_by_what_is_wrong(case, copy):
    changes, error, message = CONFIGS[case]
    refused(narrow.change(copy, **changes), error, message)


def refused(folder, error, message, *, lazily=True):
    with pytest.raises(error, match=message):
        load(folder)
    if lazily:
        with pytest.raises(error, match=message):
            open_model(str(folder), Silent()).lazy().require_tensors()
        with pytest.raises(error, match=message):
            prune(folder, folder.parent / "out", "dense", "magnitude-50")
        assert not (folder.parent / "out").exists()


def test_a_tied_head_is_refused(copy):
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    refused(copy, ModelError, "tie_word_embeddings is true")


def tamper(folder, change):
    """Rewrite the weights of a folder, and its index."""
    tensors = change(load_file(folder / FILE))
    save_file(tensors, folder / FILE, {"format": "pt"})
    index = {"metadata": {}, "weight_map": dict.fromkeys(tensors, FILE)}
    (folder / "sparsekit_model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def gone(name):
    return lambda tensors: {key: value for key, value in tensors.items() if key != name}


def other(name, *shape):
    return lambda tensors: {**tensors, name: torch.zeros(shape, dtype=torch.bfloat16)}


WEIGHTS = {
    "no shortcut": (gone(SHORTCUT), IndexMismatch, f"no tensor for {SHORTCUT}"),
    "a shortcut turned": (other(SHORTCUT, 16, 24), CheckpointError, rf"{SHORTCUT} has shape \[16, 24\], .* \[24, 16\]"),
    "a shortcut of the old width": (other(SHORTCUT, 32, 32), CheckpointError, f"{SHORTCUT} has shape"),
    "one shortcut more": (
        other("model.layers.1.shortcuts.2.weight", 24, 24),
        IndexMismatch,
        "the model has no place for model.layers.1.shortcuts.2.weight",
    ),
    "old embeddings": (
        other("model.embed_tokens.weight", tiny.VOCAB, 32),
        CheckpointError,
        r"embed_tokens.weight has shape \[96, 32\], the configuration needs \[96, 24\]",
    ),
    "no head": (gone("lm_head.weight"), IndexMismatch, "no tensor for lm_head.weight"),
    "no norm": (gone("model.norm.weight"), IndexMismatch, "no tensor for model.norm.weight"),
    "a norm of the old width": (
        other("model.layers.0.post_attention_layernorm.weight", 32),
        CheckpointError,
        "post_attention_layernorm.weight has shape",
    ),
}


@pytest.mark.parametrize("case", WEIGHTS)
def test_pieces_that_are_missing_or_misshapen_are_refused_by_name(case, copy):
    change, error, message = WEIGHTS[case]
    refused(tamper(copy, change), error, message)


def test_shortcuts_that_nothing_reads_are_refused(tmp_path):
    """All widths alike: only the flag tells whether there are shortcuts."""
    stream = Stream((24,) * 7, shortcuts=True)
    folder = sliced.write(model_of(stream), tmp_path / "copy", stream)
    narrow.change(folder, stream={"widths": [24] * 7, "shortcuts": False})
    refused(folder, IndexMismatch, "no place for model.layers.0.shortcuts.0.weight")


def test_shortcuts_that_are_only_said_to_be_there_are_refused(tmp_path):
    folder = sliced.write(model_of(LEVEL), tmp_path / "copy", LEVEL)
    narrow.change(folder, stream={"widths": [24] * 7, "shortcuts": True})
    refused(folder, IndexMismatch, r"no tensor for model.layers.0.shortcuts.0.weight and 5 more")


def test_packed_weights_of_another_stream_are_refused(folder, tmp_path):
    packed = prune(folder, tmp_path / "packed", "auto", "magnitude-50")
    narrow.change(packed, **entry(widths=[24, 20, 16, 24, 20, 28, 32]))
    refused(packed, CheckpointError, "shape", lazily=False)


def test_families_that_have_no_such_stream_are_refused(tmp_path):
    model = tiny.build("olmo2", tie_word_embeddings=False)
    sliced.write(model, tmp_path, STREAM)
    refused(tmp_path, UnsupportedFamily, "its stream cannot be rotated or sliced")
