"""Channels reordered while a model is pruned: it computes the same, and N:M keeps more of it."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from sparsekit import run
from sparsekit.checkpoint.source import open_weights
from sparsekit.checkpoint.staging import StagedCheckpoint
from sparsekit.checkpoint.verify import verify
from sparsekit.errors import PlanError, UnsupportedFamily
from sparsekit.models.lazy_model import LazyModel
from sparsekit.models.source import open_model
from sparsekit.pattern import NM
from sparsekit.permutation import permute_block
from sparsekit.prepared import prepare
from sparsekit.progress import Silent
from sparsekit.pruners.ria import RIA, RIAOptions
from sparsekit.recipe.load import load_recipe
from sparsekit.walk import walk
from tests.support import tiny

SMALL = [
    "calibration.source=builtin",
    "calibration.samples=3",
    "calibration.sequence_length=32",
    "save.format=dense",
    "stages.0.permute=true",
]
ALL = ["stages.0.pattern=4:4", "stages.0.sparsity=0"]


def plan(folder, sets=()):
    return prepare(load_recipe("ria-2of4", [*SMALL, *sets]), open_model(str(folder), Silent()))


def prune(folder, out, sets=()):
    return run.execute(plan(folder, sets), out, Silent(), evaluation=False)


def logits(folder):
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()(tiny.ids(2, 16)).logits


def at_random(self, linear, weight, pattern, sets, stats):
    """An order that has nothing to do with weights; no place keeps its input but by chance."""
    generator = torch.Generator().manual_seed(len(linear.name) + linear.block)
    order = torch.empty(sets.numel(), dtype=torch.int64)
    for members in sets:
        order[members] = members[:, torch.randperm(members.shape[1], generator=generator)]
    return order


@pytest.mark.parametrize(
    ("family", "sets"),
    [
        ("llama", []),
        ("llama", ["stages.0.ignore=['*.v_proj', '*.up_proj']", "stages.0.min_coverage=0"]),
        ("llama", ["stages.0.targets=['*.o_proj']", "stages.0.min_coverage=0"]),
        ("llama", ["save.format=nm"]),
        (
            "llama",
            [f"stages={'[' + ', '.join(['{stage: prune, method: ria, pattern: 4:4, permute: true}'] * 2) + ']'}"],
        ),
        ("phi3", []),
        ("opt", []),
        ("gpt2", []),
        ("gpt_neox", []),
        ("gemma3_text", []),
        ("mixtral", []),
        ("qwen2_moe", []),
        ("gpt_oss", []),
    ],
)
def test_reordered_and_unpruned_the_written_model_computes_the_same(family, sets, tmp_path, monkeypatch):
    """Names, fused experts, transposed weights, biases, linears that are no targets: all of it arrives in the file."""
    folder = tiny.save(family, tmp_path / "model")
    monkeypatch.setattr(RIA, "order", at_random)
    facts = prune(folder, tmp_path / "out", [*ALL, *sets]).report["stages"][-1]["linears"]
    assert sum(linear.get("inputs_moved", 0) > 0 for linear in facts.values()) >= 3
    assert verify(tmp_path / "out", "semantic").problems == ()
    torch.testing.assert_close(logits(tmp_path / "out"), logits(folder), atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", ["llama", "phi3", "gpt2", "qwen3_moe"])
def test_a_pattern_keeps_more_of_the_score_where_channels_may_move_and_the_same_elsewhere(
    family, tmp_path, monkeypatch
):
    folder = tiny.save(family, tmp_path / "model")
    kept = {}
    real = RIA.fit

    def fit(self, linear, weight, stats):
        level = real(self, linear, weight, stats)

        def at(pattern, budget):
            pruned = level(pattern, budget)
            kept[self.options.permute, linear.name] = float(self._score(weight, stats)[pruned.keep].sum())
            return pruned

        return at

    monkeypatch.setattr(RIA, "fit", fit)
    moved = prune(folder, tmp_path / "out").report["stages"][0]
    stay = prune(folder, tmp_path / "stay", ["stages.0.permute=false"]).report["stages"][0]
    assert verify(tmp_path / "out", "semantic").problems == ()
    first = [name for name in moved["linears"] if ".0." in name.partition("experts")[0]]
    gains = []
    for name in first:  # later blocks have other inputs
        if "inputs_moved" in moved["linears"][name]:
            gains.append(kept[True, name] / kept[False, name])
        else:
            assert kept[True, name] == pytest.approx(kept[False, name], rel=1e-5)
    assert min(gains) >= 1
    assert max(gains) > 1.01
    assert not any("inputs_moved" in facts for facts in stay["linears"].values())


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox"])
def test_statistics_after_a_permutation_are_those_of_the_reordered_block(family, tmp_path):
    folder = tiny.save(family, tmp_path, tokenizer=False)
    model = LazyModel(open_weights(folder), AutoConfig.from_pretrained(folder), torch.float32)
    needs = frozenset({"sumsq", "moments", "gram"})
    pruner = RIA(RIAOptions(permute=True), 0)
    for visit in walk(model, tiny.ids(3), Silent()):
        before = visit.collect(visit.linears, needs)
        result = permute_block(model, visit.index, pruner, NM(2, 4), before)
        assert sum(count > 0 for count in result.moved.values()) == 2
        again = visit.collect(visit.linears, needs)
        for linear in visit.linears:
            got, wanted = result.stats[linear.name], again[linear.name]
            assert all(got[key].tokens == wanted[key].tokens for key in needs)
            if not result.moved.get(linear.name):
                assert got is before[linear.name]
            torch.testing.assert_close(got["sumsq"].sumsq, wanted["sumsq"].sumsq, rtol=1e-4, atol=1e-6)
            torch.testing.assert_close(got["moments"].mean, wanted["moments"].mean, rtol=1e-4, atol=1e-6)
            torch.testing.assert_close(got["moments"].variance, wanted["moments"].variance, rtol=1e-4, atol=1e-6)
            torch.testing.assert_close(got["gram"].matrix, wanted["gram"].matrix, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("part", ["update=lstsq", "update=obs", "refine=dsnot"])
def test_updates_and_refiners_work_on_the_reordered_block(part, tmp_path):
    """Their aims are met in the statistics that layer errors are computed with: errors fall from the mask alone."""
    folder = tiny.save("llama", tmp_path / "model")
    gram = "stages.0.refine={method: dsnot, cycles: 0}"  # asks for the gram matrix, changes nothing
    more = [gram, f"stages.0.{part}"] if part.startswith("update") else [f"stages.0.{part}"]
    plain, better = (
        prune(folder, tmp_path / name, sets).report["stages"][0]["linears"]
        for name, sets in (("plain", [gram]), ("better", more))
    )
    assert verify(tmp_path / "better", "semantic").problems == ()
    first = [name for name in plain if ".0." in name]
    assert sum("inputs_moved" in plain[name] for name in first) == 2
    for name in first:
        assert plain[name].get("inputs_moved") == better[name].get("inputs_moved")
        assert better[name]["output_error"] <= plain[name]["output_error"] * (1 + 1e-3), name
    assert sum(better[name]["output_error"] for name in first) < sum(plain[name]["output_error"] for name in first)


class Killed(BaseException):
    """Stands for SIGKILL: nothing of the run catches it."""


def test_a_killed_run_goes_on_bit_identically(tmp_path, monkeypatch):
    folder, packed = tiny.save("phi3", tmp_path / "model", dtype=torch.bfloat16), ["save.format=auto"]
    prune(folder, tmp_path / "whole", packed)
    real, written = StagedCheckpoint.write_shard, []

    def die_after_one(self, *args, **kwargs):
        if written:
            raise Killed
        written.append(args[0])
        return real(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(StagedCheckpoint, "write_shard", die_after_one)
        with pytest.raises(Killed):
            prune(folder, tmp_path / "out", packed)
    assert prune(folder, tmp_path / "out", packed).report["stages"][0]["resumed_blocks"] == 1
    whole, out = (json.loads((tmp_path / name / "sparsekit.json").read_text()) for name in ("whole", "out"))
    assert whole["identity_sha256"] == out["identity_sha256"]


def test_what_cannot_be_reordered_is_said_before_the_run(tmp_path):
    folder = tiny.save("llama", tmp_path)
    assert plan(folder).notes[0] == (
        "channels of 6 linears are reordered, first model.layers.0.self_attn.o_proj; the inputs of the others stay"
    )
    wide = plan(folder, ["stages.0.pattern=8:16"]).notes
    assert wide[0].startswith("channels of 3 linears are reordered, first model.layers.0.mlp.down_proj")
    assert wide[1] == (
        "channels of 3 linears are not reordered: sets of 8, first model.layers.0.self_attn.o_proj, are not "
        "divisible by 16"
    )


@pytest.mark.parametrize(
    ("sets", "text"),
    [
        (["stages.0.pattern=unstructured", "stages.0.sparsity=0.5"], "pattern unstructured has no groups of inputs"),
        (["stages.0.pattern=4x1", "stages.0.sparsity=0.5"], "pattern 4x1 has no groups of inputs"),
        (["stages.0.targets=['*.q_proj']", "stages.0.min_coverage=0"], "no target has inputs that can change places"),
        (["stages.0.targets=['*.o_proj']", "stages.0.min_coverage=0", "stages.0.pattern=8:16"], "in groups of 16"),
    ],
)
def test_what_has_nothing_to_reorder_is_refused(sets, text, tmp_path):
    with pytest.raises(PlanError, match=rf"^stages\.0: .*{text}.*permute"):
        plan(tiny.save("llama", tmp_path), sets)


def test_other_families_are_refused_before_anything_is_read(tmp_path):
    with pytest.raises(UnsupportedFamily, match=r"falcon.*known are .*llama.*Set permute: false"):
        plan(tiny.save("falcon", tmp_path))


def test_blocks_of_an_earlier_stage_are_not_torn(tmp_path):
    stages = "[{stage: prune, method: magnitude, sparsity: 0.5, pattern: 4x1, targets: ['*.v_proj'], min_coverage: 0}"
    stages += ", {stage: prune, method: ria, pattern: 2:4, permute: true, ignore: ['*.v_proj']}]"
    with pytest.raises(PlanError, match=r"stages\.1: .*would break the 4x1 blocks of stages\.0"):
        plan(tiny.save("llama", tmp_path), [f"stages={stages}"])
