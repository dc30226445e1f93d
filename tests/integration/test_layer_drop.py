"""Blocks dropped on tiny models of every family: what is left computes what the model without them computes."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from sparsekit import run
from sparsekit.checkpoint.verify import verify
from sparsekit.errors import PlanError, RecipeSchemaError, TooFewTokens, UnsupportedFamily
from sparsekit.models.layers import require_same_blocks, with_blocks
from sparsekit.models.roles import FAMILIES as KNOWN
from sparsekit.models.source import open_model
from sparsekit.models.structure import find_stack
from sparsekit.models.whole import LoadedModel
from sparsekit.prepared import prepare
from sparsekit.progress import Silent
from sparsekit.recipe.load import load_recipe, recipe_from
from sparsekit.search.saved import SavedSearch
from tests.support import tiny

SMALL = [
    "calibration.source=builtin",
    "calibration.samples=4",
    "calibration.sequence_length=16",
    "evaluate.samples=2",
    "evaluate.sequence_length=32",
]
SEARCH = [
    "stages.0.samples=4",
    "stages.0.sequence_length=16",
    "stages.0.tokens=[16, 32]",
    "stages.0.survivors=[1, 1]",
    "stages.0.offspring=6",
    "stages.0.generations=6",
    "stages.0.starts=4",
]
LAYERS = {"gpt2": "n_layer", "gptj": "n_layer", "bloom": "n_layer", "mpt": "n_layers"}
IDS = tiny.ids(2, 24)


def drop(folder, out, *sets, recipe="shortgpt-25", evaluation=False, **options):
    small = [*SMALL, *(SEARCH if recipe == "evodrop-25" else [])]
    prepared = prepare(load_recipe(recipe, [*small, *sets]), open_model(str(folder), Silent()))
    return run.execute(prepared, out, Silent(), evaluation=evaluation, **options)


def save(family, folder, blocks=5, **changes):
    changes[LAYERS.get(family, "num_hidden_layers")] = blocks
    if family == "qwen2":
        changes["max_window_layers"] = 2
    return tiny.save(family, folder, **changes)


def logits(model, ids=IDS):
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits


def without(folder, blocks, silent=()):
    """Return the logits of the dense model with blocks passed over and some linears' outputs zero."""
    lazy = open_model(str(folder), Silent()).lazy()
    infos = [linear.info for index in range(lazy.blocks) for linear in lazy.stack.linears(index)]
    whole = LoadedModel(lazy, IDS, lambda: None)
    whole.omit(blocks, [info for info in infos if info.name in silent])
    return torch.stack([whole.logits(sample) for sample in range(len(IDS))])


@pytest.mark.parametrize("family", sorted(tiny.FAMILIES))
def test_what_is_left_computes_what_the_model_without_the_blocks_does(family, tmp_path):
    folder = save(family, tmp_path / "model")
    outcome = drop(folder, tmp_path / "out", "stages.0.choose=random", "stages.0.drop=0.4")
    gone = outcome.report["reshapes"][0]["plan"]["attention"]
    assert len(gone) == 2
    assert verify(tmp_path / "out", "semantic").problems == ()
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    torch.testing.assert_close(logits(model), without(folder, gone))
    assert not torch.allclose(logits(model), logits(AutoModelForCausalLM.from_pretrained(folder)))
    with torch.no_grad():
        cached = model.generate(IDS, max_new_tokens=6, do_sample=False, use_cache=True)
        plain = model.generate(IDS, max_new_tokens=6, do_sample=False, use_cache=False)
    assert torch.equal(cached, plain)


@pytest.mark.parametrize("family", sorted(KNOWN))
def test_branches_that_go_alone_are_zeros(family, tmp_path):
    folder = save(family, tmp_path / "model")
    sets = ["stages.0.choose=random", "stages.0.unit=branch", "stages.0.drop=0.4", "calibration.seed=0"]
    outcome = drop(folder, tmp_path / "out", *sets)
    plan = outcome.report["reshapes"][0]["plan"]
    attention, mlp = set(plan["attention"]), set(plan["mlp"])
    assert len(attention) == len(mlp) == 2
    assert attention != mlp
    lazy = open_model(str(folder), Silent()).lazy()
    silent = []
    for index in range(5):
        prefix = f"{lazy.stack.path}.{index}."
        names = [linear.name.removeprefix(prefix) for linear in lazy.stack.linears(index)]
        for part, lost in (("attention", attention - mlp), ("mlp", mlp - attention)):
            ends = KNOWN[family].branch(part, names) if index in lost else {}
            assert not ends or any(ends.values())
            silent += [prefix + name for name, last in ends.items() if last]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(logits(model), without(folder, attention & mlp, silent))
    assert outcome.report["reshapes"][0]["blocks"] == 5 - len(attention & mlp)


@pytest.fixture(scope="module")
def idle(tmp_path_factory):
    """A llama of 6 blocks of which 2 and 4 do nothing."""
    folder = tmp_path_factory.mktemp("idle")
    model = tiny.build("llama", num_hidden_layers=6)
    for block in (2, 4):
        for linear in (model.model.layers[block].self_attn.o_proj, model.model.layers[block].mlp.down_proj):
            linear.weight.data.zero_()
    model.save_pretrained(folder)
    tiny.byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("recipe", "unit"), [("shortgpt-25", "block"), ("evodrop-25", "block"), ("evodrop-25", "branch")]
)
def test_blocks_that_do_nothing_are_found(recipe, unit, idle, tmp_path):
    sets = [f"stages.0.unit={unit}", "stages.0.drop=0.3"]
    sets += ["stages.0.generations=40", "stages.0.offspring=12"] if recipe == "evodrop-25" else []
    outcome = drop(idle, tmp_path / "out", *sets, recipe=recipe)
    assert outcome.report["reshapes"][0]["plan"] == {"attention": [2, 4], "mlp": [2, 4]}
    dense, small = (AutoModelForCausalLM.from_pretrained(path) for path in (idle, tmp_path / "out"))
    torch.testing.assert_close(logits(small), logits(dense))


def test_influence_is_one_minus_the_cosine_of_in_and_out(idle, tmp_path):
    influence = drop(idle, tmp_path / "out").report["reshapes"][0]["facts"]["influence"]
    model = AutoModelForCausalLM.from_pretrained(idle)
    prepared = prepare(load_recipe("shortgpt-25", SMALL), open_model(str(idle), Silent()))
    from sparsekit.calibration import calibration_blocks

    ids = calibration_blocks(prepared, Silent()).ids
    seen = []
    hooks = [
        block.register_forward_hook(lambda _, args, out: seen.append((args[0], out)))
        for block in find_stack(model).blocks
    ]
    with torch.no_grad():
        model(input_ids=ids)
    for hook in hooks:
        hook.remove()
    for block, (before, after) in enumerate(seen):
        cosine = (before.double() * after.double()).sum(-1) / (
            before.double().norm(dim=-1) * after.double().norm(dim=-1)
        )
        assert influence[str(block)] == pytest.approx(float(1 - cosine.mean()), abs=1e-6)


def test_a_search_reports_its_nulls_and_repeats(idle, tmp_path):
    found = [drop(idle, tmp_path / name, recipe="evodrop-25").report["reshapes"][0] for name in ("one", "two")]
    assert found[0]["plan"] == found[1]["plan"]
    facts = found[0]["facts"]
    assert set(facts["fitness"]) == {"evopress", "shortgpt", "random_search"}
    history = list(facts["fitness_by_generation"].values())
    assert history == sorted(history, reverse=True)
    assert history[-1] == pytest.approx(facts["fitness"]["evopress"])
    page = (tmp_path / "one/report.html").read_text()
    assert "What is left of the blocks" in page
    assert "Search: evopress" in page
    card = (tmp_path / "one/README.md").read_text()
    assert "4 of 6 blocks" in card
    assert "What changed" not in card
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "two"]


def test_an_interrupted_search_goes_on_where_it_was(idle, tmp_path, monkeypatch):
    class Stopped(Exception):
        pass

    wanted = drop(idle, tmp_path / "whole", recipe="evodrop-25").report["reshapes"][0]
    add, seen = SavedSearch.add, []

    def stops(self, found):
        add(self, found)
        seen.append(found.number)
        if found.number == 3:
            raise Stopped

    monkeypatch.setattr(SavedSearch, "add", stops)
    with pytest.raises(Stopped):
        drop(idle, tmp_path / "out", recipe="evodrop-25")
    got = drop(idle, tmp_path / "out", recipe="evodrop-25").report["reshapes"][0]
    assert seen == [0, 1, 2, 3, 4, 5, 6]
    assert got["plan"] == wanted["plan"]
    assert got["facts"] == wanted["facts"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "whole"]


def test_what_is_left_is_pruned_as_a_model_of_its_own(idle, tmp_path):
    stage = "{stage: prune, method: wanda, sparsity: 0.5}"
    reshape = "{stage: reshape, method: layer_drop, choose: shortgpt}"
    both = drop(idle, tmp_path / "both", f"stages=[{reshape}, {stage}]", "save.format=dense")
    drop(idle, tmp_path / "first")
    drop(tmp_path / "first", tmp_path / "second", f"stages=[{stage}]", "save.format=dense")
    wanted, got = (
        {k: v for f in sorted(folder.glob("*.safetensors")) for k, v in load_file(f).items()}
        for folder in (tmp_path / "second", tmp_path / "both")
    )
    assert wanted.keys() == got.keys()
    assert all(torch.equal(wanted[name], got[name]) for name in wanted)
    assert both.report["stages"][0]["kept"] * 2 == both.report["stages"][0]["numel"]
    assert both.report["reshapes"][0]["blocks"] == 4
    assert not list(tmp_path.glob("both.*"))


def test_what_is_left_is_packed_and_measured(idle, tmp_path):
    stages = "[{stage: reshape, method: layer_drop, choose: shortgpt}, {stage: prune, method: wanda, sparsity: 0.5}]"
    sets = [f"stages={stages}", "evaluate.nulls=[random]"]
    outcome = drop(idle, tmp_path / "out", *sets, evaluation=True)
    assert outcome.evaluation is not None
    assert [null.name for null in outcome.evaluation.nulls] == ["random"]
    assert verify(tmp_path / "out", "semantic").problems == ()
    assert list((tmp_path / "out").glob("sparsekit_model-*"))
    assert json.loads((tmp_path / "out/config.json").read_text())["num_hidden_layers"] == 4


def test_two_reshapes_chain(idle, tmp_path):
    reshape = "{stage: reshape, method: layer_drop, choose: shortgpt, drop: 0.17}"
    report = drop(idle, tmp_path / "out", f"stages=[{reshape}, {reshape}]").report
    assert [change["blocks"] for change in report["reshapes"]] == [5, 4]
    dense, small = (AutoModelForCausalLM.from_pretrained(path) for path in (idle, tmp_path / "out"))
    torch.testing.assert_close(logits(small), logits(dense))


@pytest.mark.parametrize(
    ("sets", "message"),
    [
        (["stages.0.drop=0.9"], "0.9 of 6 blocks is 5; 4 may go"),
        (["stages.0.drop=0.05"], "0.05 of 6 blocks is 0"),
        (["stages.0.keep_first=4", "stages.0.keep_last=4"], "0 may go"),
        (["stages.0.unit=branch"], "shortgpt measures whole blocks"),
    ],
)
def test_what_cannot_be_dropped_is_refused_before_anything_is_read(sets, message, idle, tmp_path):
    with pytest.raises(PlanError, match=message):
        drop(idle, tmp_path / "out", *sets)
    assert not list(tmp_path.iterdir())


def test_more_samples_than_calibration_holds_are_refused(idle, tmp_path):
    with pytest.raises(TooFewTokens, match=r"layer_drop measures predictions on 9 samples.*has 4"):
        drop(idle, tmp_path / "out", "stages.0.samples=9", recipe="evodrop-25")


def test_a_reshape_behind_a_prune_is_refused():
    stages = [{"stage": "prune", "method": "wanda", "sparsity": 0.5}, {"stage": "reshape", "method": "layer_drop"}]
    with pytest.raises(RecipeSchemaError, match="a reshape stage stands behind a prune stage"):
        recipe_from({"sparsekit": 1, "name": "x", "description": "d", "stages": stages})


@pytest.mark.parametrize(("kind", "message"), [("reshpae", "did you mean 'reshape'"), ("prun", "did you mean 'prune'")])
def test_an_unknown_kind_of_stage_names_those_there_are(kind, message):
    with pytest.raises(RecipeSchemaError, match=message):
        recipe_from({"sparsekit": 1, "name": "x", "description": "d", "stages": [{"stage": kind, "method": "wanda"}]})


def test_a_block_that_would_be_of_another_kind_is_refused():
    model = tiny.build("qwen3_moe", num_hidden_layers=4, decoder_sparse_step=2)
    with pytest.raises(UnsupportedFamily, match="it would be block"):
        require_same_blocks(model, with_blocks(model.config, [0, 2, 3]), [0, 2, 3])
    require_same_blocks(model, with_blocks(model.config, [0, 3]), [0, 3])
    scaled = tiny.build("gpt2", scale_attn_by_inverse_layer_idx=True)
    with pytest.raises(UnsupportedFamily, match="scales attention by the number"):
        require_same_blocks(scaled, with_blocks(scaled.config, [0, 2]), [0, 2])


@pytest.mark.parametrize("family", ["gemma2", "gemma3_text", "qwen2", "cohere2", "gpt_oss"])
def test_lists_with_an_entry_for_each_block_are_cut(family):
    model = tiny.build(family, num_hidden_layers=6, **({"max_window_layers": 2} if family == "qwen2" else {}))
    types = model.config.layer_types
    without_one = [[block for block in range(6) if block != gone] for gone in range(6)]
    kept = next(blocks for blocks in without_one if [types[block] for block in blocks] != types[:5])
    changes = with_blocks(model.config, kept)
    assert changes["layer_types"] == [types[block] for block in kept]
    require_same_blocks(model, changes, kept)
    with pytest.raises(UnsupportedFamily, match=r"is .*, not "):
        require_same_blocks(model, {**changes, "layer_types": types[:5]}, kept)
