"""Activation stages on tiny models of every family: what is asked for is met, and what is written runs so anywhere."""

from __future__ import annotations

import json

import pytest
import torch

from sparsekit import thinning
from sparsekit.checkpoint.source import SIDECAR
from sparsekit.data import builtin
from sparsekit.errors import CalibrationError, LowCoverage, PlanError, TooFewTokens, UnsupportedFamily
from sparsekit.models.gate_files import read_gate_file
from sparsekit.pack.verify import verify
from sparsekit.runtime import gates
from tests.support import tiny
from tests.support.gated import load, plan, thin

UNIFORM = "stages.0.allocate=uniform"
LOOSE = "stages.0.tolerance=0.03"  # 47 tokens of one sample are held out
GATED = ("gemma", "gemma2", "gemma3_text", "glm4", "granite", "llama", "mistral", "phi3", "qwen2", "qwen3", "stablelm")


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return tiny.save("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def thinned(llama, tmp_path_factory):
    out = tmp_path_factory.mktemp("thinned") / "out"
    return out, thin(llama, out, "teal-50", LOOSE, evaluation=True).report


def logits(model, ids, **options):
    with torch.no_grad():
        return model(ids, **options).logits


@pytest.mark.parametrize("family", sorted(tiny.FAMILIES))
def test_every_family_meets_what_is_asked_and_runs_as_it_was_measured(family, tmp_path):
    folder = tiny.save(family, tmp_path / "model")
    found = thin(folder, tmp_path / "out", "teal-50", UNIFORM, LOOSE).report["activations"]
    assert found["held_out"]["sparsity"] == pytest.approx(0.5, abs=0.03)
    assert found["coverage"] > 0.9
    model, dense = load(tmp_path / "out"), load(folder)
    assert gates.attached(model)
    ids = tiny.ids(2, 20)
    ours, full = logits(model, ids), logits(dense, ids)
    assert torch.equal(ours[:, 0], full[:, 0])  # the first token is dense
    assert not torch.allclose(ours[:, 5:], full[:, 5:], atol=1e-3)
    with gates.paused(model):
        assert torch.equal(logits(model, ids), full)
    gates.detach(model)
    assert torch.equal(logits(model, ids), full)


@pytest.mark.parametrize("family", GATED)
@pytest.mark.parametrize("recipe", ["cats-50", "chess-50"])
def test_gates_are_thinned_out_where_a_family_has_them(family, recipe, tmp_path):
    folder = tiny.save(family, tmp_path / "model")
    found = thin(folder, tmp_path / "out", recipe, UNIFORM, LOOSE, "stages.0.min_coverage=0").report["activations"]
    assert found["held_out"]["sparsity"] == pytest.approx(0.5, abs=0.03)
    model, seen = load(tmp_path / "out"), []
    down = model.get_submodule(model.base_model_prefix).layers[1].mlp.down_proj
    down.register_forward_pre_hook(lambda module, args: seen.append(args[0]) or None)
    logits(model, tiny.ids(1, 40))
    asked = [facts["asked"] for name, facts in found["signals"].items() if ".1.mlp.act" in name]
    assert float((seen[0][:, 1:] == 0).float().mean()) == pytest.approx(asked[0], abs=0.15)
    assert bool((seen[0][:, 0] != 0).all())


@pytest.mark.parametrize("family", ["opt", "gpt2", "gpt_neox", "phi", "starcoder2", "mixtral"])
def test_a_family_without_such_gates_is_refused(family, tmp_path):
    folder = tiny.save(family, tmp_path / "model")
    with pytest.raises(UnsupportedFamily, match=r"has no gate|of experts"):
        plan(folder, "cats-50")


@pytest.mark.parametrize("recipe", ["wina-50", "rsparse-50", "gaussian-50"])
def test_other_methods_of_inputs(recipe, llama, tmp_path):
    found = thin(llama, tmp_path / "out", recipe, LOOSE, "stages.0.tolerance=0.08").report["activations"]
    assert found["held_out"]["sparsity"] == pytest.approx(0.5, abs=0.08)
    assert gates.attached(load(tmp_path / "out"))


@pytest.mark.parametrize("weigh", ["none", "columns"])
def test_top_k_keeps_as_many_of_every_token(weigh, llama, tmp_path):
    options = ("stages.0.method=topk", f"stages.0.weigh={weigh}", "stages.0.allocate=uniform")
    found = thin(llama, tmp_path / "out", "teal-50", *options).report["activations"]
    assert found["held_out"]["spread"] == pytest.approx(0, abs=0.01)
    assert found["held_out"]["sparsity"] == pytest.approx(0.5, abs=1e-6)


@pytest.mark.parametrize("allocate", ["greedy", "global"])
def test_levels_are_spent_within_blocks_or_between_them(allocate, llama, tmp_path):
    found = thin(llama, tmp_path / "out", "teal-40", LOOSE, f"stages.0.allocate={allocate}").report["activations"]
    prepared = plan(llama, "teal-40")
    sizes = {site.name: site.numel for site in prepared.activations.sites}
    blocks: dict[int, list[tuple[float, int]]] = {}
    for name, facts in found["signals"].items():
        blocks.setdefault(facts["block"], []).append((facts["asked"], sizes[name]))
    means = [sum(level * size for level, size in each) / sum(size for _, size in each) for each in blocks.values()]
    assert sum(means) / len(means) == pytest.approx(0.4)
    assert (max(means) - min(means) < 1e-6) == (allocate == "greedy")


def test_the_report_says_what_was_done(thinned):
    out, report = thinned
    found = report["activations"]
    assert found["protocol"] == "all but the first token of a text; in generation the prompt is dense"
    assert found["weights_per_token"]["read"] < found["weights_per_token"]["dense"]
    assert found["other_text"]["stdlib"]["sparsity"] == pytest.approx(0.5, abs=0.1)
    assert sum(sum(counts) for counts in found["usage"].values()) == sum(
        site.width for site in plan_sites(out.parent, report)
    )
    assert report["evaluation"]["comparison"]["ratio"] != 1
    manifest = json.loads((out / "sparsekit.json").read_text())
    assert manifest["activations"]["file"] == SIDECAR
    assert verify(out, "semantic").ok


def plan_sites(folder, report):
    return plan(report["model"]["name"], "teal-50").activations.sites


def test_a_second_run_of_the_same_writes_the_same_bytes(llama, thinned, tmp_path):
    thin(llama, tmp_path / "again", "teal-50", LOOSE, evaluation=True)
    assert (tmp_path / "again" / SIDECAR).read_bytes() == (thinned[0] / SIDECAR).read_bytes()


def test_weights_are_those_of_the_source(llama, thinned):
    ours, dense = load(thinned[0]), load(llama)
    for name, parameter in dense.named_parameters():
        assert torch.equal(ours.get_parameter(name), parameter)


def test_without_sparsekit_it_is_the_dense_model(llama, thinned):
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(thinned[0], output_loading_info=True)
    assert not any(info.values())
    assert torch.equal(logits(model, tiny.ids()), logits(load(llama), tiny.ids()))


@pytest.mark.parametrize("prefill", ["dense", "sparse"])
def test_token_by_token_is_one_pass_with_the_same_dense_prefix(prefill, llama, tmp_path):
    """What decoding computes is what a whole pass computes with as many dense tokens in front."""
    thin(llama, tmp_path / "out", "teal-40", UNIFORM, LOOSE, f"stages.0.prefill={prefill}")
    model, ids = load(tmp_path / "out"), tiny.ids(1, 16)
    scope = gates.describe(model).scope
    scope.generating = True
    steps = [model(ids[:, :6], use_cache=True)]
    for place in range(6, 16):
        past = steps[-1].past_key_values
        with torch.no_grad():
            steps.append(model(ids[:, place : place + 1], past_key_values=past, use_cache=True))
    scope.generating = False
    found = torch.cat([step.logits for step in steps], dim=1)
    gates.describe(model).file.__dict__["dense_tokens"] = 6 if prefill == "dense" else 1
    torch.testing.assert_close(found, logits(model, ids), atol=1e-4, rtol=1e-4)


def test_generation_thins_out_what_follows_the_prompt(llama, thinned):
    model, dense = load(thinned[0]), load(llama)
    ids = tiny.ids(1, 8)
    counts = []
    model.model.layers[0].mlp.down_proj.register_forward_pre_hook(lambda module, args: None)
    before = gates.Gated.__call__

    def counting(self, x, *args, **kwargs):
        counts.append((x.shape[1], self.scope.off))
        return before(self, x, *args, **kwargs)

    gates.Gated.__call__ = counting
    try:
        made = model.generate(ids, max_new_tokens=6, do_sample=False, eos_token_id=-1)
    finally:
        gates.Gated.__call__ = before
    assert {off for length, off in counts if length > 1} == {True}
    assert {off for length, off in counts if length == 1} == {False}
    with gates.paused(model):
        full = model.generate(ids, max_new_tokens=6, do_sample=False, eos_token_id=-1)
    assert torch.equal(full, dense.generate(ids, max_new_tokens=6, do_sample=False, eos_token_id=-1))
    assert torch.equal(full[:, :9], made[:, :9])


@pytest.mark.parametrize("save", ["auto", "dense"])
def test_weights_and_activations_together(save, llama, tmp_path):
    from transformers import AutoModelForCausalLM

    sets = (f"save.format={save}", "stages.1.tolerance=0.03", "stages.1.allocate=uniform")
    report = thin(llama, tmp_path / "out", "wanda-50-teal-40", *sets).report
    assert report["activations"]["held_out"]["sparsity"] == pytest.approx(0.4, abs=0.03)
    assert len(report["stages"]) == 1
    model = load(tmp_path / "out")
    assert gates.attached(model)
    assert float((model.model.layers[0].mlp.up_proj.weight == 0).float().mean()) == pytest.approx(0.5, abs=0.02)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert gates.attached(plain) == (save == "auto")  # a packed checkpoint is loaded by sparsekit anyway
    assert verify(tmp_path / "out", "semantic").ok


@pytest.fixture(scope="module")
def learned(tmp_path_factory):
    """Return a model that has learned letters of the text: of a random one, thinning out may lower the perplexity."""
    folder = tmp_path_factory.mktemp("learned")
    model, tokenizer = tiny.build("llama"), tiny.byte_tokenizer()
    ids = torch.tensor(tokenizer("\n".join(builtin.documents("calibration").texts[:8]))["input_ids"])
    ids = ids[: len(ids) // 384 * 384].reshape(-1, 8, 48)
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-2)
    for batch in ids[:120]:
        optimiser.zero_grad()
        model(batch, labels=batch).loss.backward()
        optimiser.step()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_a_budget_in_perplexity(learned, tmp_path):
    sets = (UNIFORM, LOOSE, "stages.0.budget.perplexity=0.05")
    found = thin(learned, tmp_path / "out", "teal-ppl1", *sets).report["activations"]
    assert found["held_out"]["perplexity_ratio"] <= 1.05
    assert 0 < found["found_sparsity"] < 0.9
    assert len(found["search"]) >= 5
    assert found["sparsity"] is None


def test_a_budget_that_allows_nothing_says_how_far_it_got(learned, tmp_path, monkeypatch):
    monkeypatch.setattr(thinning, "_SMALLEST", 0.6)  # a rise of nothing is within the noise of 47 tokens further down
    with pytest.raises(CalibrationError, match=r"may rise by 0\.00%, and rises by .* at a sparsity of only"):
        thin(learned, tmp_path / "out", "teal-ppl1", UNIFORM, LOOSE, "stages.0.budget.perplexity=1e-9")
    assert not (tmp_path / "out").exists()


def test_a_sparsity_that_is_not_met_is_refused(llama, tmp_path):
    with pytest.raises(CalibrationError, match=r"skipped on held-out text after 3 calibrations, asked for were 50\.0%"):
        thin(llama, tmp_path / "out", "teal-50", UNIFORM, "stages.0.tolerance=1e-9")
    assert not (tmp_path / "out").exists()


def test_too_little_text_is_refused(llama):
    with pytest.raises(TooFewTokens, match="at least 2 calibration samples"):
        plan(llama, "teal-50", "calibration.samples=1")
    with pytest.raises(TooFewTokens, match=r"quantile of the 32 entries of .* needs at least 3125 tokens, got 423"):
        plan(llama, "teal-50", "stages.0.sparsity=0.01")
    with pytest.raises(TooFewTokens, match="first 47 tokens stay dense"):
        plan(llama, "teal-50", "stages.0.dense_tokens=47")


def test_coverage_and_targets(llama, tmp_path):
    with pytest.raises(LowCoverage, match=r"can skip .* of the block weights here, 90% are asked for"):
        plan(llama, "teal-50", 'stages.0.targets=["*.q_proj"]')
    with pytest.raises(PlanError, match="no signal is left"):
        plan(llama, "teal-50", 'stages.0.ignore=["*"]')
    with pytest.raises(PlanError, match="matches no linear"):
        plan(llama, "teal-50", 'stages.0.ignore=["*.nothing"]')
    with pytest.raises(PlanError, match=r"sparsity 0\.95 is more than 0\.9"):
        plan(llama, "teal-50", "stages.0.sparsity=0.95")
    few = plan(llama, "teal-50", 'stages.0.targets=["*.q_proj"]', "stages.0.min_coverage=0")
    assert len(few.activations.sites) == 3


def test_one_changed_weight_is_found(thinned, tmp_path):
    import shutil

    folder = tmp_path / "copy"
    shutil.copytree(thinned[0], folder)
    shard = sorted(folder.glob("model-*.safetensors"))[0]
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    assert not verify(folder, "full").ok
    shard.write_bytes(bytes(data) + b"\0")
    with pytest.raises(Exception, match="belongs to"):
        read_gate_file(folder)
