"""MoDeGPT on tiny models: sizes as asked, what is written computes what was decided, wherever it is loaded."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from sparsekit import run
from sparsekit.checkpoint.shapes import PLAIN, read_shapes
from sparsekit.convert import convert
from sparsekit.errors import CheckpointError, ChecksumError, ModelError, PlanError, RecipeError, UnsupportedFamily
from sparsekit.models.source import open_model
from sparsekit.pack.verify import verify
from sparsekit.prepared import prepare
from sparsekit.progress import Silent
from sparsekit.recipe.load import load_recipe
from sparsekit.reshape import modegpt as module
from tests.runtime.support import assert_same, prune
from tests.runtime.test_loading import python
from tests.runtime.test_without_import import LOAD
from tests.support import narrow, tiny

SMALL = [
    "calibration.source=builtin",
    "calibration.samples=6",
    "calibration.sequence_length=32",
    "evaluate.samples=2",
    "evaluate.sequence_length=32",
    "stages.0.multiple=4",
    "stages.0.head_multiple=2",
]
WIDTH = "stages.0.width=0.25"
PARTS = ("stages.0.parts=all", WIDTH, "stages.0.params=null")
MLP = ("stages.0.parts=mlp", WIDTH, "stages.0.params=null")
HEADS = ("gemma", "gemma2", "granite", "llama", "mistral", "opt", "qwen2", "smollm3", "starcoder2")
"""Families whose heads can lose channels."""
NEURONS = (
    "bloom", "cohere2", "gemma3_text", "glm4", "gpt2", "gpt_neox", "gptj", "mpt", "nemotron", "olmo2", "phi", "phi3",
    "qwen3", "stablelm",
)  # fmt: skip
PLAIN_NEURONS = {*NEURONS} - {"bloom", "mpt"}


def plan(folder, *sets, recipe="modegpt-20"):
    return prepare(load_recipe(recipe, [*SMALL, *sets]), open_model(str(folder), Silent()))


def reshape(folder, out, *sets, evaluation=False, recipe="modegpt-20", **options):
    return run.execute(plan(folder, *sets, recipe=recipe), out, Silent(), evaluation=evaluation, **options)


def load(folder):
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    return model.eval()


def shapes(out):
    return read_shapes(json.loads((out / "config.json").read_text()).get("quantization_config"))


def logits(model, *, cache=False):
    x = tiny.ids(2, 20)
    with torch.no_grad():
        if not cache:
            return model(x, use_cache=False).logits
        first = model(x[:, :12], use_cache=True)
        rest = model(x[:, 12:], past_key_values=first.past_key_values, use_cache=True)
        return torch.cat([first.logits, rest.logits], dim=1)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    folder = tiny.save("llama", tmp_path_factory.mktemp("llama"), attention_bias=True)
    return folder, reshape(folder, tmp_path_factory.mktemp("narrow") / "out", *PARTS)


# --- what comes out ----------------------------------------------------------------------------------------
@pytest.mark.parametrize("family", HEADS)
def test_heads_and_neurons_of_a_family(family, tmp_path):
    folder = tiny.save(family, tmp_path / "model")
    outcome = reshape(folder, tmp_path / "out", *PARTS)
    found, model = shapes(outcome.out), load(outcome.out)
    assert {(width.groups, width.neurons, width.channels) for width in found.blocks} == {(None, 36, 6)}
    assert all((width.rotary is None) == (family == "opt") for width in found.blocks)
    torch.testing.assert_close(logits(model, cache=True), logits(model), atol=2e-4, rtol=1e-4)
    assert verify(outcome.out, "semantic").ok
    reshaped = outcome.report["reshapes"][0]
    assert reshaped["parameters_after"] == sum(parameter.numel() for parameter in model.parameters())
    assert (logits(load(folder)) - logits(model)).abs().max() > 1e-3


@pytest.mark.parametrize("family", NEURONS)
def test_neurons_alone_of_a_family(family, tmp_path):
    folder = tiny.save(family, tmp_path / "model")
    out = reshape(folder, tmp_path / "out", *MLP).out
    assert shapes(out).plain == (family in PLAIN_NEURONS)
    assert torch.isfinite(logits(load(out))).all()
    assert verify(out, "semantic").ok


@pytest.mark.parametrize("family", [*HEADS, *NEURONS])
def test_nothing_taken_away_is_the_same_model(family, tmp_path):
    folder = tiny.save(family, tmp_path / "model")
    parts = "all" if family in HEADS else "mlp"
    sets = [f"stages.0.parts={parts}", "stages.0.width=0", "stages.0.params=null", "stages.0.allow_growth=true"]
    out = reshape(folder, tmp_path / "out", *sets).out
    assert shapes(out) == PLAIN
    assert_same(load(folder), load(out))


def test_equal_widths_need_no_sparsekit(tmp_path):
    script, expected = "import sys\nsys.modules['sparsekit'] = None", []
    for family in ("llama", "gpt2", "opt"):
        folder = tiny.save(family, tmp_path / "model" / family)
        out = reshape(folder, tmp_path / family, *MLP).out
        script += LOAD.format(folder=str(out))
        expected.append(sum(float(value.double().abs().sum()) for value in load(out).state_dict().values()))
    status, output = python(script)
    assert status == 0, output
    found = [float(line.split()[1]) for line in output.splitlines() if line.startswith("loaded")]
    assert found == pytest.approx(expected)


def test_what_is_written_computes_what_was_decided(llama, tmp_path, monkeypatch):
    """The walk puts zeros where the written model has nothing: both see the same last hidden states."""
    folder, outcome = llama
    plans = outcome.report["reshapes"][0]["plan"]
    assert set(plans["files"]) == {"0", "1", "2"}
    dense, model = load(folder), load(outcome.out)
    for old, new, rotary in zip(dense.model.layers, model.model.layers, plans["rotary"].values(), strict=True):
        pairs = torch.tensor(rotary)
        rows = torch.cat([pairs, pairs + 4])
        assert torch.equal(
            old.self_attn.k_proj.weight.view(2, 8, 32)[:, rows].flatten(0, 1), new.self_attn.k_proj.weight
        )
        assert torch.equal(old.self_attn.q_proj.bias.view(4, 8)[:, rows].flatten(), new.self_attn.q_proj.bias)
        assert torch.equal(old.self_attn.o_proj.bias, new.self_attn.o_proj.bias)
        gates = old.mlp.gate_proj.weight
        places = [(gates == row).all(dim=1).nonzero().item() for row in new.mlp.gate_proj.weight]
        assert places == sorted(places)
        assert not torch.equal(old.mlp.down_proj.weight[:, places], new.mlp.down_proj.weight)


def test_generate_and_save_again(llama, tmp_path):
    model = load(llama[1].out)
    texts = [
        model.generate(tiny.ids(2), max_new_tokens=8, do_sample=False, **options)
        for options in ({}, {"use_cache": False}, {"cache_implementation": "static"})
    ]
    assert torch.equal(texts[0], texts[1])
    assert torch.equal(texts[0], texts[2])
    model.save_pretrained(tmp_path)
    assert_same(model, load(tmp_path))
    model.set_attn_implementation("eager")
    torch.testing.assert_close(logits(model), logits(load(tmp_path)), atol=1e-5, rtol=1e-5)


def test_pruned_further_it_stays_narrow(llama, tmp_path):
    out = prune(llama[1].out, tmp_path / "out", "bitmask", "wanda-50")
    assert verify(out, "semantic").ok
    assert shapes(out) == shapes(llama[1].out)
    assert int(load(out).model.layers[0].self_attn.q_proj.weight.count_nonzero()) == 32 * 24 // 2
    dense = convert(out, "dense", tmp_path / "dense", Silent()).out
    assert_same(load(out), load(dense))
    dropped = prune(llama[1].out, tmp_path / "dropped", "dense", "shortgpt-25")
    assert shapes(dropped).blocks[-1] == shapes(llama[1].out).blocks[-1]
    assert torch.isfinite(logits(load(dropped))).all()


@pytest.mark.parametrize("others", [["slicegpt", "modegpt"], ["modegpt", "slicegpt"], ["modegpt", "tyr"]], ids="-".join)
def test_beside_other_reshapers(others, tmp_path):
    folder = tiny.save("llama", tmp_path / "model")
    own = {
        "slicegpt": {"width": 0.25, "rotation": "per_block", "allow_growth": True},
        "modegpt": {"width": 0.25, "parts": "all", "multiple": 4, "head_multiple": 2},
        "tyr": {"drop": 0.5, "choose": "uniform"},
    }
    stages = [{"stage": "reshape", "method": name, **own[name]} for name in others]
    recipe = tmp_path / "both.yaml"
    recipe.write_text(json.dumps({"sparsekit": 1, "name": "both", "description": "two", "stages": stages}))
    prepared = prepare(load_recipe(str(recipe), SMALL[:5]), open_model(str(folder), Silent()))
    out = run.execute(prepared, tmp_path / "out", Silent(), evaluation=False).out
    model = load(out)
    assert {block.self_attn.head_dim for block in model.model.layers} == {6}
    torch.testing.assert_close(logits(model, cache=True), logits(model), atol=2e-4, rtol=1e-4)
    assert verify(out, "semantic").ok


def test_heads_that_have_lost_channels_lose_no_more(llama):
    with pytest.raises(UnsupportedFamily, match="some are gone already, 6 of 8 are left"):
        plan(llama[1].out, *PARTS)


# --- sizes -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("parts", ["mlp", "all"])
@pytest.mark.parametrize("share", [0.1, 0.2, 0.25])
def test_a_share_of_all_parameters(share, parts, llama):
    prepared = plan(llama[0], f"stages.0.params={share}", f"stages.0.parts={parts}", "stages.0.multiple=1")
    chosen = prepared.reshapes[0]
    neuron = 3 * (32 * 3)  # in three blocks
    assert share * chosen.before <= chosen.before - chosen.after < share * chosen.before + neuron


def test_influence_moves_widths_between_blocks_at_the_same_total(tmp_path):
    folder = tiny.save("llama", tmp_path / "model", num_hidden_layers=4)
    sets = ["stages.0.allocate=influence", "stages.0.eps=0.2", *PARTS]
    outcome = reshape(folder, tmp_path / "out", *sets)
    found = shapes(outcome.out).blocks
    widths = [tuple(width.neurons for width in found), tuple(width.channels for width in found)]
    assert [sum(each) for each in widths] == [4 * 36, 4 * 6]
    assert len(set(widths[0])) > 1
    facts = outcome.report["reshapes"][0]["facts"]
    order = sorted(range(4), key=lambda block: facts["influence"][str(block)])
    assert [widths[0][block] for block in order] == sorted(widths[0])
    assert plan(folder, *sets).reshapes[0].after == outcome.report["reshapes"][0]["parameters_after"]
    assert torch.isfinite(logits(load(outcome.out))).all()


def test_uniform_is_the_null_of_influence(tmp_path):
    folder = tiny.save("llama", tmp_path / "model")
    sets = ["stages.0.allocate=influence", *MLP, 'evaluate.nulls=["uniform"]']
    assert reshape(folder, tmp_path / "out", *sets, evaluation=True).report["evaluation"]["nulls"]


# --- interrupted -------------------------------------------------------------------------------------------
@pytest.mark.parametrize("done", [0, 2])
def test_an_interrupted_run_ends_in_the_same_bytes(done, llama, tmp_path, monkeypatch):
    folder, outcome = llama
    original, calls = module.write_block, []

    def stops(*args):
        if len(calls) == done:
            raise KeyboardInterrupt
        calls.append(args)
        return original(*args)

    monkeypatch.setattr(module, "write_block", stops)
    with pytest.raises(KeyboardInterrupt):
        reshape(folder, tmp_path / "out", *PARTS)
    monkeypatch.undo()
    written = []
    monkeypatch.setattr(module, "write_block", lambda *args: written.append(args[1]) or original(*args))
    again = reshape(folder, tmp_path / "out", *PARTS).out
    assert written == list(range(done, 3))
    for path in sorted(outcome.out.glob("*.safetensors")):
        assert path.read_bytes() == (again / path.name).read_bytes(), path.name


def test_files_that_changed_are_refused(llama, tmp_path, monkeypatch):
    original = module.write_block

    def damaged(place, block, tensors):
        written = original(place, block, tensors)
        if block == 2:
            path = place / "2.safetensors"
            path.write_bytes(path.read_bytes()[:-1] + b"\1")
        return written

    monkeypatch.setattr(module, "write_block", damaged)
    with pytest.raises(ChecksumError, match=r"2\.safetensors: not what was written"):
        reshape(llama[0], tmp_path / "out", *PARTS)


# --- bad input ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("family", "sets", "error", "message"),
    [
        ("llama", ["stages.0.width=0.2", "stages.0.params=0.2"], RecipeError, "width and params are given"),
        ("llama", ["stages.0.params=0.9"], PlanError, "of 48 neurons would go"),
        ("llama", ["stages.0.width=0.99", "stages.0.params=null"], PlanError, "48 of 48 neurons would go"),
        ("llama", ["stages.0.width=0.01", "stages.0.params=null"], PlanError, "no saving"),
        ("llama", ["stages.0.allocate=influence", "stages.0.width=0.9", "stages.0.params=null"], PlanError, "80%"),
        ("mixtral", [], UnsupportedFamily, "experts"),
        ("falcon", [], UnsupportedFamily, "falcon"),
        ("qwen3", ["stages.0.parts=all"], UnsupportedFamily, "q_norm and self_attn.k_norm divide by what all"),
        ("olmo2", ["stages.0.parts=all"], UnsupportedFamily, r"q_norm.weight \[32\] goes with all of them"),
        ("phi", ["stages.0.parts=all"], UnsupportedFamily, "positions turn 4 of 8"),
        ("gptj", ["stages.0.parts=all"], UnsupportedFamily, "other pairs of them than channels half a head apart"),
        ("cohere2", ["stages.0.parts=all"], UnsupportedFamily, "other pairs of them"),
        ("phi3", ["stages.0.parts=all"], UnsupportedFamily, "are one linear, self_attn.qkv_proj"),
    ],
)
def test_refused_before_anything_is_read(family, sets, error, message, tmp_path):
    folder = tiny.save(family, tmp_path / "model")
    with pytest.raises(error, match=message):
        plan(folder, "stages.0.parts=mlp", *sets)


def test_other_widths_already_are_refused(tmp_path):
    folder = narrow.write(narrow.build(), tmp_path)
    with pytest.raises(PlanError, match="its blocks have different widths already"):
        plan(folder, "stages.0.parts=mlp")


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"channels": [6, 6, 6.0]}, ModelError, "channels is no list of null and positive whole numbers"),
        ({"channels": None}, ModelError, "channels is no list"),
        ({"channels": [4, 6, 6]}, ModelError, "block 0 has 4 channels in 3 pairs"),
        ({"rotary": [[0, 1, 1]] * 3}, ModelError, "rotary is no list of null and lists of ascending whole numbers"),
        ({"rotary": [[0, 1, -1]] * 3}, ModelError, "rotary is no list"),
        ({"rotary": [[0, 1, 2]] * 2}, ModelError, "rotary of 2 blocks"),
        (
            {"rotary": [[0, 1, 4]] * 3},
            ModelError,
            "block 0 has pair 4 of channels, by the rest of the configuration 4 pairs",
        ),
        ({"rotary": [None] * 3}, ModelError, "block 0 needs pairs of channels"),
        ({"channels": [4] * 3, "rotary": [[0, 1]] * 3}, CheckpointError, r"self_attn.k_proj.bias has shape"),
    ],
    ids=str,
)
def test_entries_that_were_changed_are_refused(changes, error, message, llama, tmp_path):
    import shutil

    folder = shutil.copytree(llama[1].out, tmp_path / "copy")
    given = json.loads((folder / "config.json").read_text())["quantization_config"]["widths"]
    narrow.change(folder, widths={**given, **changes})
    with pytest.raises(error, match=message):
        load(folder)
    with pytest.raises(error, match=message):
        open_model(str(folder), Silent()).lazy().require_tensors()


def test_pairs_of_a_family_without_any_are_refused(tmp_path):
    folder = tiny.save("opt", tmp_path / "model")
    out = reshape(folder, tmp_path / "out", *PARTS).out
    given = json.loads((out / "config.json").read_text())["quantization_config"]["widths"]
    narrow.change(out, widths={**given, "rotary": [[0, 1, 2]] * 3})
    with pytest.raises(ModelError, match="block 0 has no pairs of channels"):
        load(out)
