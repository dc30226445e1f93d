"""Tyr-the-Pruner on tiny models: what is written is what was chosen, the budget is exact, the search helps."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from sparsekit import run
from sparsekit.checkpoint.shapes import read_shapes
from sparsekit.errors import ChecksumError, PlanError, UnsupportedFamily
from sparsekit.models.source import open_model
from sparsekit.pack.verify import verify
from sparsekit.prepared import prepare
from sparsekit.progress import Silent
from sparsekit.recipe.load import load_recipe
from sparsekit.reshape import tyr as module
from sparsekit.search.saved import SavedSearch
from tests.support import tiny

SMALL = [
    "calibration.source=builtin",
    "calibration.samples=6",
    "calibration.sequence_length=32",
    "evaluate.samples=2",
    "evaluate.sequence_length=32",
    "stages.0.samples=6",
    "stages.0.sequence_length=16",
    "stages.0.tokens=[16, 64]",
    "stages.0.offspring=6",
    "stages.0.generations=5",
    "stages.0.passes=2",
]
BLOCKS = 4


def reshape(folder, out, *sets, recipe="tyr-50", evaluation=False, **options):
    prepared = prepare(load_recipe(recipe, [*SMALL, *sets]), open_model(str(folder), Silent()))
    return run.execute(prepared, out, Silent(), evaluation=evaluation, **options)


def save(family, folder, **changes):
    changes = {"num_hidden_layers": BLOCKS, **changes}
    if family in ("gptj", "gpt2"):
        changes["n_layer"] = changes.pop("num_hidden_layers")
    return tiny.save(family, folder, **changes)


def load(folder):
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    return model.eval()


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    folder = save("llama", tmp_path_factory.mktemp("llama"), num_key_value_heads=4)
    return folder, reshape(folder, folder.parent / "out")


def widths(out):
    return read_shapes(json.loads((out / "config.json").read_text()).get("quantization_config")).blocks


def test_the_sums_are_exact_and_each_block_has_what_its_widths_say(llama):
    folder, outcome = llama
    found = widths(outcome.out)
    assert sum(width.groups for width in found) == BLOCKS * 4 // 2
    assert sum(width.neurons for width in found) == BLOCKS * 48 // 2
    assert all(width.neurons % 8 == 0 for width in found)
    assert verify(outcome.out, "semantic").ok
    model = load(outcome.out)
    for width, block in zip(found, model.model.layers, strict=True):
        assert block.self_attn.v_proj.weight.shape == (8 * width.groups, 32)
        assert block.mlp.down_proj.weight.shape == (32, width.neurons)
    reshaped = outcome.report["reshapes"][0]
    assert reshaped["parameters_after"] == sum(p.numel() for p in model.parameters())
    assert reshaped["parameters_before"] == sum(p.numel() for p in load(folder).parameters())


def test_what_is_kept_is_a_part_of_the_dense_model_with_a_better_reader(llama):
    folder, outcome = llama
    dense, model = load(folder), load(outcome.out)
    for old, new in zip(dense.model.layers, model.model.layers, strict=True):
        rows = old.mlp.up_proj.weight
        places = [(rows == row).all(dim=1).nonzero().item() for row in new.mlp.up_proj.weight]
        assert places == sorted(places)
        assert torch.equal(old.mlp.gate_proj.weight[places], new.mlp.gate_proj.weight)
        if len(places) < len(rows):
            assert not torch.equal(old.mlp.down_proj.weight[:, places], new.mlp.down_proj.weight)
        else:
            assert torch.equal(old.mlp.down_proj.weight, new.mlp.down_proj.weight)


def test_the_search_never_ends_above_uniform_and_says_what_it_did(llama):
    facts = llama[1].report["reshapes"][0]["facts"]
    found = facts["fitness"]
    assert set(found) == {"tyr", "uniform", "random_search"}
    assert found["tyr"] <= found["uniform"]
    assert facts["generations"]["all"] == 10
    assert len(facts["groups"]) == len(facts["neurons"]) == BLOCKS
    assert facts["fitness_by_generation"]["0"] == found["uniform"]


@pytest.mark.parametrize(
    ("family", "parts"),
    [
        ("qwen3", "both"),
        ("gptj", "both"),
        ("glm4", "both"),
        ("phi3", "neurons"),
        ("gpt2", "neurons"),
        ("mixtral", "heads"),
    ],
)
def test_other_families(family, parts, tmp_path):
    folder = save(family, tmp_path / "model")
    out = reshape(folder, tmp_path / "out", f"stages.0.parts={parts}", "stages.0.passes=1").out
    assert torch.isfinite(load(out)(tiny.ids()).logits).all()
    assert verify(out, "semantic").ok
    expected = {"both": {False}, "neurons": {True}, "heads": {False}}[parts]
    assert {width.groups is None for width in widths(out)} <= expected  # none, where all blocks are alike


def test_uniform_is_the_null_and_needs_no_search(tmp_path):
    folder = save("llama", tmp_path / "model", num_key_value_heads=4)
    out = reshape(folder, tmp_path / "out", "stages.0.choose=uniform").out
    config = json.loads((out / "config.json").read_text())
    assert "quantization_config" not in config
    names = ("num_key_value_heads", "num_attention_heads", "head_dim", "intermediate_size")
    assert [config[name] for name in names] == [2, 2, 8, 24]
    assert load(out).model.layers[0].self_attn.v_proj.weight.shape == (16, 32)
    outcome = reshape(folder, tmp_path / "other", 'evaluate.nulls=["uniform"]', evaluation=True)
    assert outcome.report["evaluation"]["nulls"]


def test_a_pruning_stage_goes_on_with_what_is_left(tmp_path):
    folder = save("llama", tmp_path / "model", num_key_value_heads=4)
    chosen = load_recipe("tyr-50", SMALL).resolved()
    recipe = tmp_path / "both.yaml"
    chosen["stages"].append({"stage": "prune", "method": "wanda", "sparsity": 0.5})
    chosen["save"]["format"] = "bitmask"
    recipe.write_text(json.dumps({**chosen, "name": "both"}))
    prepared = prepare(load_recipe(str(recipe), []), open_model(str(folder), Silent()))
    out = run.execute(prepared, tmp_path / "out", Silent(), evaluation=False).out
    assert verify(out, "semantic").ok
    assert open_model(str(out), Silent()).packed
    weight = load(out).model.layers[0].mlp.down_proj.weight
    assert int((weight != 0).sum()) == weight.numel() // 2


@pytest.mark.parametrize("point", ["first search", "second search", "last files"])
def test_an_interrupted_run_ends_in_the_same_bytes(point, llama, tmp_path, monkeypatch):
    folder, outcome = llama
    calls = {"n": 0}

    def stop_after(limit, target, name):
        original = getattr(target, name)

        def wrapped(*args, **kwargs):
            calls["n"] += 1
            if calls["n"] > limit:
                raise KeyboardInterrupt
            return original(*args, **kwargs)

        monkeypatch.setattr(target, name, wrapped)

    if point == "last files":
        stop_after(0, module, "write_chosen")
    else:
        stop_after(3 if point == "first search" else 9, SavedSearch, "add")
    with pytest.raises(KeyboardInterrupt):
        reshape(folder, tmp_path / "out")
    monkeypatch.undo()
    again = reshape(folder, tmp_path / "out").out
    for path in sorted(outcome.out.glob("*.safetensors")):
        assert path.read_bytes() == (again / path.name).read_bytes(), path.name


def test_files_that_changed_are_refused(tmp_path, monkeypatch):
    folder = save("llama", tmp_path / "model", num_key_value_heads=4)
    original = module.write_chosen

    def damaged(place, *rest):
        written = original(place, *rest)
        path = place / "2.safetensors"
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)
        return written

    monkeypatch.setattr(module, "write_chosen", damaged)
    with pytest.raises(ChecksumError, match=r"2\.safetensors: not what was written"):
        reshape(folder, tmp_path / "out")


@pytest.mark.parametrize(
    ("family", "sets", "error", "message"),
    [
        ("phi3", [], UnsupportedFamily, "queries, keys and values are one linear"),
        ("olmo2", [], UnsupportedFamily, "q_norm"),
        ("mixtral", ["stages.0.parts=neurons"], UnsupportedFamily, "experts"),
        ("llama", ["stages.0.drop=0.95"], PlanError, "leaves none here"),
        ("llama", ["stages.0.drop=0.01"], PlanError, "removes nothing"),
    ],
)
def test_refused_before_anything_is_read(family, sets, error, message, tmp_path):
    folder = save(family, tmp_path / "model")
    with pytest.raises(error, match=message):
        prepare(load_recipe("tyr-50", [*SMALL, *sets]), open_model(str(folder), Silent()))
