"""Streams sliced on tiny models of every family: what holds no signal costs nothing, and sizes are as announced."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from sparsekit import run
from sparsekit.calibration import calibration_blocks
from sparsekit.checkpoint.verify import verify
from sparsekit.errors import PlanError, RecipeSchemaError, TooFewTokens, UnsupportedFamily
from sparsekit.models.residual import residual
from sparsekit.models.source import open_model
from sparsekit.models.structure import find_stack
from sparsekit.prepared import prepare
from sparsekit.progress import Silent
from sparsekit.recipe.load import load_recipe
from sparsekit.solve.rotate import turned
from tests.models.test_rotate import REFUSED, TURNED
from tests.support import tiny

SMALL = ["calibration.source=builtin", "calibration.samples=4", "calibration.sequence_length=32"]
IDS = tiny.ids(2, 24)
RANK = 20  # of the streams below; a width of 24 holds them
PLAIN = {"cohere2", "gemma", "gpt_oss", "granite", "llama", "mistral", "mixtral", "nemotron", "phi", "phi3"}
PLAIN |= {"qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "smollm3", "starcoder2"}
"""Families whose configuration can express a narrower stream beside heads of their own size."""


def slice_(folder, out, *sets, recipe="slicegpt-25", **options):
    sets = [*SMALL, *(f"stages.0.{each}" for each in sets)]
    prepared = prepare(load_recipe(recipe, sets), open_model(str(folder), Silent()))
    return run.execute(prepared, out, Silent(), evaluation=False, **options)


def low_rank(family, folder, rank=RANK, **changes):
    """Save a model all of whose writers write into one space of few dimensions."""
    model = tiny.build(family, **changes)
    stream = residual(model, find_stack(model))
    hidden = model.config.hidden_size
    space, _ = torch.linalg.qr(torch.randn(hidden, rank, generator=torch.Generator().manual_seed(7)))
    writers = [writer for place in stream.places for branch in place.branches for writer in branch.writers]
    for matrix in (*stream.embeddings, *writers):
        for name, axis in ((matrix.name, matrix.axis), (matrix.bias, -1)):
            if name is not None:
                parameter = model.get_parameter(name)
                parameter.data = turned(parameter.data, axis, space @ space.T)
    model.save_pretrained(folder)
    tiny.byte_tokenizer().save_pretrained(folder)
    return folder


def logits(folder, **options):
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **options)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False).logits


def parameters(out):
    return sum(tensor.numel() for path in out.glob("*.safetensors") for tensor in load_file(path).values())


def own_code(family, out):
    """Whether plain transformers cannot build it: says config.json."""
    return "quantization_config" in json.loads((out / "config.json").read_text())


@pytest.mark.parametrize("family", TURNED)
def test_a_stream_of_few_dimensions_is_sliced_at_no_cost(family, tmp_path):
    folder = low_rank(family, tmp_path / "model")
    outcome = slice_(folder, tmp_path / "out", "allow_growth=true")
    assert outcome.report["reshapes"][0]["parameters_after"] == parameters(tmp_path / "out")
    assert verify(tmp_path / "out", "semantic").problems == ()
    torch.testing.assert_close(logits(tmp_path / "out"), logits(folder), atol=2e-4, rtol=0)
    assert own_code(family, tmp_path / "out") == (family not in PLAIN)
    if family in PLAIN:
        assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.hidden_size == 24


WHOLE_HEAD = {"gpt2", "gpt_oss", "mixtral", "olmoe", "qwen2_moe", "qwen3_moe"}
"""Families whose experts write what they read, or whose code needs both ends alike: the head's place is cut too."""
UNWIRED = {"gptj", "mpt"}


@pytest.mark.parametrize("family", sorted(set(TURNED) - UNWIRED))
def test_with_a_basis_for_each_place_too(family, tmp_path):
    folder = low_rank(family, tmp_path / "model")
    sets = ["allow_growth=true", "rotation=per_block"]
    sets += ["slice_head=true"] if family in WHOLE_HEAD else []
    outcome = slice_(folder, tmp_path / "out", *sets)
    assert outcome.report["reshapes"][0]["parameters_after"] == parameters(tmp_path / "out")
    assert verify(tmp_path / "out", "semantic").problems == ()
    torch.testing.assert_close(logits(tmp_path / "out"), logits(folder), atol=2e-4, rtol=0)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        cached = model.generate(IDS, max_new_tokens=6, do_sample=False, use_cache=True)
        plain = model.generate(IDS, max_new_tokens=6, do_sample=False, use_cache=False)
    assert torch.equal(cached, plain)


@pytest.mark.parametrize("family", sorted(UNWIRED))
def test_blocks_that_cannot_have_shortcuts_are_refused(family, tmp_path):
    folder = low_rank(family, tmp_path / "model")
    with pytest.raises(UnsupportedFamily, match="cannot have shortcuts") as caught:
        slice_(folder, tmp_path / "out", "allow_growth=true", "rotation=per_block")
    assert "rotation: global" in caught.value.hint


@pytest.mark.parametrize(
    ("family", "message"), [("mixtral", "would read 24 and write 32"), ("gpt2", "would be 24 and 32")]
)
def test_ends_of_other_widths_are_refused_where_the_code_needs_them_alike(family, message, tmp_path):
    folder = low_rank(family, tmp_path / "model")
    with pytest.raises(UnsupportedFamily, match=message) as caught:
        slice_(folder, tmp_path / "out", "allow_growth=true", "rotation=per_block")
    assert "slice_head: true" in caught.value.hint


@pytest.mark.parametrize("family", ["llama", "granite", "qwen3"])
def test_every_basis_is_of_the_stream_that_the_sliced_model_computes(family, tmp_path):
    """What is kept of principal components is uncorrelated, the largest first; of any other stream it would not be."""
    folder = tiny.save(family, tmp_path / "model", tie_word_embeddings=False)
    sets = ["allow_growth=true", "rotation=per_block", "width=0.25"]
    slice_(folder, tmp_path / "out", *sets)
    prepared = prepare(load_recipe("slicegpt-25", SMALL), open_model(str(folder), Silent()))
    ids = calibration_blocks(prepared, Silent()).ids
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    original = AutoModelForCausalLM.from_pretrained(folder)
    stream = residual(original, find_stack(original))
    seen = {}

    def keep(norm):
        def hook(module, args):  # returns None: anything else would replace the input
            seen[norm] = args[0].reshape(-1, 24).double()

        return hook

    for place in stream.places[:-1]:
        norm = place.branches[0].norm
        model.get_submodule(norm).register_forward_pre_hook(keep(norm))
    with torch.no_grad():
        model(input_ids=ids, use_cache=False)
    assert len(seen) == len(stream.places) - 1
    for z in seen.values():
        gram = z.T @ z
        sizes = gram.diagonal()
        off = (gram - sizes.diag()).abs() / (sizes[:, None] * sizes[None, :]).sqrt()
        assert float(off.max()) < 1e-3
        assert bool((sizes[:-1] >= 0.999 * sizes[1:]).all())


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "granite", "opt"])
def test_every_block_may_have_a_width_of_its_own(family, tmp_path):
    folder = low_rank(family, tmp_path / "model", rank=14)
    sets = ["allow_growth=true", "rotation=per_block", "width=null", "schedule=[0.25, 0.5]"]
    slice_(folder, tmp_path / "out", *sets)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    widths = config["quantization_config"]["stream"]["widths"]
    assert widths == ([24, 16, 16, 32] if len(widths) == 4 else [24, 24, 16, 16, 16, 16, 32])
    torch.testing.assert_close(logits(tmp_path / "out"), logits(folder), atol=2e-4, rtol=0)


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """A llama without tied weights."""
    return tiny.save("llama", tmp_path_factory.mktemp("wide"), num_hidden_layers=2)


@pytest.mark.parametrize("family", sorted(REFUSED))
def test_families_are_refused_before_anything_is_written(family, tmp_path):
    folder = tiny.save(family, tmp_path / "model")
    with pytest.raises(UnsupportedFamily, match=REFUSED[family]):
        slice_(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_size_is_known_before_anything_is_read(wide, tmp_path):
    prepared = prepare(load_recipe("slicegpt-25", SMALL), open_model(str(wide), Silent()))
    (plan,) = prepared.reshapes
    outcome = run.execute(prepared, tmp_path / "out", Silent(), evaluation=False)
    assert plan.before == parameters(wide)
    assert plan.after == parameters(tmp_path / "out") == outcome.report["reshapes"][0]["parameters_after"]


@pytest.mark.parametrize("share", [0.1, 0.3, 0.5])
def test_params_takes_away_at_least_as_much_and_one_step_less_would_not(share, wide, tmp_path):
    slice_(wide, tmp_path / "asked", f"params={share}", "width=null", "multiple=4")
    width = json.loads((tmp_path / "asked" / "config.json").read_text())["hidden_size"]
    slice_(wide, tmp_path / "wider", f"width={1 - (width + 4) / 32}", "multiple=4", "allow_growth=true")
    assert json.loads((tmp_path / "wider" / "config.json").read_text())["hidden_size"] == width + 4
    asked, wider = (parameters(tmp_path / name) for name in ("asked", "wider"))
    assert asked <= (1 - share) * parameters(wide) < wider


def test_what_is_no_saving_is_refused_with_both_numbers(tmp_path):
    """A tied head becomes a matrix of its own."""
    folder = tiny.save("llama", tmp_path / "model", tie_word_embeddings=True, vocab_size=2000)
    before = parameters(folder)
    with pytest.raises(PlanError, match=rf"would have [\d,]+ parameters, now it has {before:,}: no saving") as caught:
        slice_(folder, tmp_path / "out")
    assert "allow_growth" in caught.value.hint
    assert not (tmp_path / "out").exists()
    outcome = slice_(folder, tmp_path / "out", "allow_growth=true")
    assert outcome.report["reshapes"][0]["parameters_after"] > before


BAD = {
    "both": (["params=0.5"], RecipeSchemaError, "width and params are given"),
    "schedule beside a width": (["schedule=[0.1, 0.2]"], RecipeSchemaError, "width and schedule are given"),
    "schedule of one basis": (["width=null", "schedule=[0.1, 0.2]"], RecipeSchemaError, "one basis has one width"),
    "shares of a schedule": (
        ["width=null", "rotation=per_block", "schedule=[0.1, 1.2]"],
        RecipeSchemaError,
        r"need shares from 0 up to 1, got \[0.1, 1.2\]",
    ),
    "another length": (
        ["width=null", "rotation=per_block", "schedule=[0.1, 0.2, 0.3]"],
        PlanError,
        "3 entries, the model 2 blocks",
    ),
    "nothing left": (["width=0.9"], PlanError, r"3.2 of the width is left, less than 8"),
    "more than there is": (["width=null", "params=0.99"], PlanError, r"a stream of width 8 still leaves [\d,]+ param"),
    "width of one": (["width=1.0"], RecipeSchemaError, "of at least 0 and below 1"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_options_are_refused_before_anything_is_written(case, wide, tmp_path):
    sets, kind, message = BAD[case]
    with pytest.raises(kind, match=message):
        slice_(wide, tmp_path / "out", *sets)
    assert not (tmp_path / "out").exists()


def test_fewer_tokens_than_directions_are_refused(wide, tmp_path):
    sets = [*SMALL, "calibration.samples=1", "calibration.sequence_length=23"]
    with pytest.raises(TooFewTokens, match=r"slicegpt needs at least 24 tokens, got 23"):
        prepare(load_recipe("slicegpt-25", sets), open_model(str(wide), Silent()))


def test_a_killed_run_goes_on_with_the_same_bases(wide, tmp_path, monkeypatch):
    import sparsekit.reshaping as reshaping

    slice_(wide, tmp_path / "whole")
    real, calls = reshaping._write_block, []

    def killed(*args):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(reshaping, "_write_block", killed)
    with pytest.raises(KeyboardInterrupt):
        slice_(wide, tmp_path / "out")
    monkeypatch.setattr(reshaping, "_write_block", real)
    slice_(wide, tmp_path / "out")
    for path in (tmp_path / "whole").glob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / "out" / path.name).read_bytes()


def test_a_random_orientation_computes_the_same(wide, tmp_path):
    slice_(wide, tmp_path / "pca")
    slice_(wide, tmp_path / "random", "orientation=random")
    torch.testing.assert_close(logits(tmp_path / "random"), logits(tmp_path / "pca"), atol=1e-4, rtol=0)


def test_a_sliced_model_is_pruned_by_the_next_stage(wide, tmp_path):
    recipe = tmp_path / "chain.yaml"
    recipe.write_text(
        "sparsekit: 1\nname: chain\ndescription: two stages\n"
        "calibration: {source: builtin, samples: 4, sequence_length: 32}\nstages:\n"
        "  - {stage: reshape, method: slicegpt, width: 0.25}\n  - {stage: prune, method: wanda, sparsity: 0.5}\n"
    )
    prepared = prepare(load_recipe(str(recipe), []), open_model(str(wide), Silent()))
    outcome = run.execute(prepared, tmp_path / "out", Silent(), evaluation=False)
    assert outcome.report["reshapes"][0]["parameters_after"] < parameters(wide)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    weight = model.model.layers[0].mlp.up_proj.weight
    assert weight.shape == (48, 24)
    assert int((weight == 0).sum()) == weight.numel() // 2


def test_a_pruned_model_is_not_sliced_but_may_lose_blocks(wide, tmp_path):
    def go(model, out, recipe, *sets):
        sets = ["calibration.source=builtin", "calibration.samples=4", "calibration.sequence_length=64", *sets]
        return run.execute(
            prepare(load_recipe(recipe, sets), open_model(str(model), Silent())), out, Silent(), evaluation=False
        )

    go(wide, tmp_path / "pruned", "wanda-50", "save.format=dense")
    with pytest.raises(PlanError, match=r"the model is pruned \(wanda\), and slicegpt would fill its zeros") as caught:
        slice_(tmp_path / "pruned", tmp_path / "out")
    assert "prune what is left" in caught.value.hint
    go(tmp_path / "pruned", tmp_path / "dropped", "shortgpt-25", "stages.0.drop=0.5", "stages.0.keep_first=0")


def test_a_sliced_model_cannot_be_sliced_again_where_its_stream_is_in_pieces(tmp_path):
    folder = tiny.save("gpt_neox", tmp_path / "model", tie_word_embeddings=False)
    slice_(folder, tmp_path / "once", "allow_growth=true")
    with pytest.raises(PlanError, match="sliced already"):
        slice_(tmp_path / "once", tmp_path / "twice", "allow_growth=true")
