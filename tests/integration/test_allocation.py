"""Allocators and overrides through whole runs on tiny models: counts, refusals, what the report says."""

from __future__ import annotations

import json

import pytest
import torch

from sparsekit import allocation, describe, plan, run
from sparsekit.checkpoint.verify import verify
from sparsekit.errors import OutOfMemory, PlanError, TooFewTokens
from sparsekit.models.source import open_model
from sparsekit.prepared import prepare
from sparsekit.progress import Silent
from sparsekit.recipe.load import load_recipe
from tests.fault.command import invoke, prune_arguments
from tests.support import tiny

SMALL = ["calibration.source=builtin", "calibration.samples=3", "calibration.sequence_length=48"]
PROBES = "{method: ecoflap, samples: 2, sequence_length: 16}"
ECOFLAP = f"stages.0.allocate={PROBES}"


def prepared(folder, sets, recipe="wanda-60"):
    return prepare(load_recipe(recipe, [*SMALL, *sets]), open_model(str(folder), Silent()))


def prune(folder, out, sets, recipe="wanda-60"):
    return run.execute(prepared(folder, sets, recipe), out, Silent(), evaluation=False).report["stages"][0]


def kept(stage):
    return {name: facts["kept"] for name, facts in stage["linears"].items()}


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return tiny.save("llama", tmp_path_factory.mktemp("llama"), dtype=torch.bfloat16)


@pytest.mark.parametrize(
    "allocate",
    [
        "erk", "sap", "depth", "random", "uniform_plus", "owl", "{method: owl, lam: 0.2, outlier: 2}", "dp",
        "{method: dp, levels: 3, span: 1}", "{method: ecoflap, samples: 2, sequence_length: 16}",
    ],
)  # fmt: skip
@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_budgets_are_exact_and_the_report_says_what_led_to_them(allocate, family, llama, tmp_path):
    folder = llama if family == "llama" else tiny.save(family, tmp_path / "model")
    stage = prune(folder, tmp_path / "out", [f"stages.0.allocate={allocate}"])
    assert stage["kept"] == round(0.4 * stage["numel"])
    assert len(set(kept(stage).values())) > 2
    assert verify(tmp_path / "out", "semantic").problems == ()
    told = json.loads((tmp_path / "out/report.json").read_text())["stages"][0]["allocation"]
    assert len(told["density"]) == 3
    for block, density in told["density"].items():
        of_block = [facts for name, facts in stage["linears"].items() if f".{block}." in name.split("experts")[0]]
        assert density == pytest.approx(sum(x["kept"] for x in of_block) / sum(x["numel"] for x in of_block), abs=1e-6)
    key = {"owl": "outliers_percent", "dp": "summed_output_error", "sap": "pq_index", "ecoflap": "standard_error"}
    assert all(fact in told for name, fact in key.items() if name in allocate)


def test_overrides_fix_what_they_name_and_the_others_make_up_the_total(llama, tmp_path):
    fixed = {"*.k_proj": 0.0, "re:.*[.]1[.].*down_proj": 0.9}
    for allocate in ("uniform", "owl"):
        sets = [f"stages.0.overrides={json.dumps(fixed)}", f"stages.0.allocate={allocate}"]
        stage = prune(llama, tmp_path / allocate, sets)
        assert stage["kept"] == round(0.4 * stage["numel"])
        assert stage["overrides"] == fixed
        found = kept(stage)
        numel = {name: facts["numel"] for name, facts in stage["linears"].items()}
        assert all(found[name] == numel[name] for name in found if "k_proj" in name)
        assert found["model.layers.1.mlp.down_proj"] == round(0.1 * numel["model.layers.1.mlp.down_proj"])
        others = [name for name in found if "k_proj" not in name and name != "model.layers.1.mlp.down_proj"]
        if allocate == "uniform":
            assert max(found[n] / numel[n] for n in others) - min(found[n] / numel[n] for n in others) < 2e-3
        # The weights of a dense linear stay bit for bit.
        before, after = (tiny_tensors(folder) for folder in (llama, tmp_path / allocate))
        name = "model.layers.0.self_attn.k_proj.weight"
        assert torch.equal(before[name], after[name])


def tiny_tensors(folder):
    from safetensors.torch import load_file

    return {k: v for file in folder.glob("*.safetensors") for k, v in load_file(file).items()}


def test_overrides_of_blocks_keep_whole_blocks(llama, tmp_path):
    sets = ["stages.0.pattern=4x2", "stages.0.overrides={'*.q_proj': 0.33}"]
    found = kept(prune(llama, tmp_path / "out", sets))
    assert all(count % 8 == 0 for count in found.values())
    assert found["model.layers.0.self_attn.q_proj"] == 8 * round(0.67 * 32 * 32 / 8)


def test_overrides_of_every_target_leave_nothing_to_distribute(llama, tmp_path):
    stage = prune(llama, tmp_path / "out", ["stages.0.overrides={'*': 0.6}"], recipe="wanda-60")
    assert stage["kept"] == pytest.approx(0.4 * stage["numel"], abs=1)


@pytest.mark.parametrize(
    ("sets", "says"),
    [
        (["stages.0.overrides={'*.kproj': 0}"], r"stages\.0\.overrides: '\*\.kproj' matches no target of this stage"),
        (
            ["stages.0.overrides={'*.k_proj': 0}", "stages.0.ignore=['*.k_proj']", "stages.0.min_coverage=0"],
            r"'\*\.k_proj' matches no target of this stage",
        ),
        (
            ["stages.0.overrides={'*.k_proj': 0, 're:.*[.]0[.].*': 0.5}"],
            r"overrides: '\*\.k_proj' and 're:.*' both match model\.layers\.0\.self_attn\.k_proj",
        ),
        (
            ["stages.0.overrides={'*mlp*': 0}"],
            r"overrides keep 13,824 weights, the stage keeps 9,216 in all: the other targets cannot keep -4,608 of",
        ),
        (["stages.0.overrides={'*mlp*': 1, '*.q_proj': 0.9}"], r"the other targets cannot keep .* of 6,144"),
        (["stages.0.overrides={'*': 0.5}"], r"cannot keep -2,304 of 0"),
        (["stages.0.allocate={method: erk, max_density: 0.3}"], r"from 0 to 0\.3 keep .* the budget is 9,216"),
    ],
)
def test_what_cannot_be_is_refused_before_any_weight_is_read(sets, says, llama):
    with pytest.raises(PlanError, match=says):
        allocation.allocate_unseen(prepared(llama, sets).plans[0])


def test_patterns_that_leave_no_freedom_refuse_allocators_and_overrides(llama):
    for sets, says in (
        (["stages.0.allocate=owl"], r"stages\.0\.allocate: pattern 2:4 fixes .* owl has nothing to distribute"),
        (["stages.0.overrides={'*.k_proj': 0}"], r"stages\.0\.overrides: pattern 2:4 gives every linear sparsity 0\.5"),
    ):
        with pytest.raises(PlanError, match=says):
            prepared(llama, sets, "wanda-2of4")


def test_a_dry_run_shows_overrides_and_the_rest(llama, tmp_path):
    sets = ["stages.0.overrides={'*.k_proj': 0}"]
    for allocate in ("uniform", "owl", "erk"):
        stage = describe.describe_plan(prepared(llama, [*sets, f"stages.0.allocate={allocate}"]), tmp_path)["stages"][0]
        assert stage["overrides"] == {"*.k_proj": 0.0}
        assert stage["allocated"] == (allocate != "owl")
        ranges = {kind["kind"]: kind["sparsity_range"] for kind in stage["kinds"]}
        assert ranges["self_attn.k_proj"] == [0, 0]
        assert all(low > 0 for kind, (low, _) in ranges.items() if kind != "self_attn.k_proj") or allocate == "erk"
        assert sum(facts["kept"] for facts in stage["linears"].values()) == pytest.approx(stage["kept"], abs=20)


def test_a_dry_run_says_that_averages_are_averages(llama, tmp_path):
    for allocate, told in (("erk", False), ("owl", True)):
        ended = invoke(*prune_arguments(llama, tmp_path / "out", "--dry-run", "--set", f"stages.0.allocate={allocate}"))
        assert ended.code == 0
        assert (f"Averages: {allocate} looks at the model first" in ended.out) == told


def test_a_resumed_run_keeps_the_allocation_it_began_with(llama, tmp_path, monkeypatch):
    from sparsekit.allocate.owl import Owl
    from sparsekit.checkpoint.staging import StagedCheckpoint

    write = StagedCheckpoint.write_shard

    def until_block_1(self, key, *rest):
        if key == "block-1":
            raise KeyboardInterrupt
        return write(self, key, *rest)

    def never(self, context, budget):
        raise AssertionError("looked again")

    owl = ["stages.0.allocate=owl"]
    whole = prune(llama, tmp_path / "whole", owl)
    with monkeypatch.context() as patch:
        patch.setattr(StagedCheckpoint, "write_shard", until_block_1)
        with pytest.raises(KeyboardInterrupt):
            prune(llama, tmp_path / "out", owl)
    with monkeypatch.context() as patch:
        patch.setattr(Owl, "allocate", never)
        stage = prune(llama, tmp_path / "out", owl)
    assert stage["resumed_blocks"] == 1
    assert stage["allocation"] == whole["allocation"]
    assert kept(stage) == kept(whole)


def test_the_cost_counts_what_the_allocator_needs(llama):
    uniform, dp, ecoflap = (prepared(llama, [f"stages.0.allocate={name}"]).cost for name in ("uniform", "dp", PROBES))
    grams = 4 * 32**2 + 48**2  # inputs of a block: two of attention, two of the MLP's first linears, one of its last
    assert dp.memory_bytes - uniform.memory_bytes == 8 * grams
    assert ecoflap.memory_bytes >= plan.BASE_MEMORY_BYTES + ecoflap.whole_bytes
    assert dp.whole_bytes == uniform.whole_bytes == 0


def test_losses_on_more_text_than_there_is_are_refused(llama):
    for probe in ("samples: 4, sequence_length: 16", "samples: 2, sequence_length: 64"):
        with pytest.raises(TooFewTokens, match=r"stages\.0\.allocate: ecoflap measures losses on .* has 3 of 48"):
            prepared(llama, [f"stages.0.allocate={{method: ecoflap, {probe}}}"])


def test_a_model_that_does_not_fit_as_a_whole_is_refused_with_numbers(llama, tmp_path, monkeypatch):
    ready = prepared(llama, [ECOFLAP])
    parameters = sum(parameter.numel() for parameter in ready.model.module.parameters())
    assert ready.cost.whole_bytes > 4 * parameters
    monkeypatch.setattr(plan, "available_memory_bytes", lambda: 100 << 10)
    monkeypatch.setattr(plan, "_statm", lambda field: plan.BASE_MEMORY_BYTES)
    with pytest.raises(OutOfMemory, match=r"whole model, which.*needs about 1\d\d kB more memory, 102 kB are free"):
        run.execute(ready, tmp_path / "out", Silent(), evaluation=False)
    assert not (tmp_path / "out").exists()


def test_a_later_stage_probes_what_the_earlier_one_made(llama, tmp_path):
    """With everything removed before, no change of a weight behind it can matter: the scores fall."""
    alone = prune(llama, tmp_path / "alone", [ECOFLAP])
    first = {"stage": "prune", "method": "magnitude", "sparsity": 0.9}
    second = {
        "stage": "prune", "method": "magnitude", "sparsity": 0.95,
        "allocate": {"method": "ecoflap", "samples": 2, "sequence_length": 16},
    }  # fmt: skip
    stages = run.execute(
        prepared(llama, [f"stages={json.dumps([first, second])}"]), tmp_path / "two", Silent(), evaluation=False
    ).report["stages"]
    assert stages[1]["kept"] == round(0.05 * stages[1]["numel"])
    assert stages[1]["allocation"]["score"] != alone["allocation"]["score"]
