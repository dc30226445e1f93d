"""A pruner that needs gradients, through whole runs on tiny models: counts, refusals, what a killed run leaves."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from sparsekit import describe, plan, run
from sparsekit.checkpoint.staging import StagedCheckpoint
from sparsekit.checkpoint.verify import verify
from sparsekit.errors import OutOfMemory, TooFewTokens
from sparsekit.models.gradients import BlockGradients
from sparsekit.models.source import open_model
from sparsekit.prepared import prepare
from sparsekit.progress import Silent
from sparsekit.recipe.load import load_recipe
from tests.fault.command import identity
from tests.support import tiny

SMALL = [
    "calibration.source=builtin",
    "calibration.samples=4",
    "calibration.sequence_length=32",
    "save.format=dense",
]
PROBES = ["stages.0.samples=4", "stages.0.sequence_length=16"]


def prepared(folder, *sets, probes=PROBES):
    return prepare(load_recipe("mfac-50", [*SMALL, *probes, *sets]), open_model(str(folder), Silent()))


def prune(folder, out, *sets):
    return run.execute(prepared(folder, *sets), out, Silent(), evaluation=False).report["stages"][0]


def same_tensors(one, other):
    before, after = ({k: v for f in out.glob("*.safetensors") for k, v in load_file(f).items()} for out in (one, other))
    assert before.keys() == after.keys() != set()
    return all(torch.equal(before[key], after[key]) for key in before)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return tiny.save("llama", tmp_path_factory.mktemp("llama"), dtype=torch.bfloat16)


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
@pytest.mark.parametrize("pattern", ["unstructured", "2:4", "4x2"])
def test_counts_are_exact(family, pattern, tmp_path):
    folder = tiny.save(family, tmp_path / "model")
    stage = prune(folder, tmp_path / "out", f"stages.0.pattern={pattern}")
    assert stage["kept"] * 2 == stage["numel"]
    assert verify(tmp_path / "out", "semantic").problems == ()


def test_masks_do_not_depend_on_what_was_pruned_before(llama, tmp_path):
    """Gradients are the dense model's, so later linears are pruned as if they were the only ones."""
    for propagate in ("block", "none"):
        prune(llama, tmp_path / propagate, f"stages.0.propagate={propagate}")
    assert same_tensors(tmp_path / "block", tmp_path / "none")


def test_a_trained_model_loses_less_than_by_magnitude(llama, tmp_path):
    """In loss, not by the Fisher matrix: for that the model must have learnt something about the text."""
    ids = run.calibration_blocks(prepared(llama, "calibration.samples=32"), Silent()).ids
    model = open_model(str(llama), Silent()).load().float().requires_grad_(True)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(60):
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    model.save_pretrained(tmp_path / "trained")
    tiny.byte_tokenizer().save_pretrained(tmp_path / "trained")
    losses = {}
    for name, option in (("joint", "compensate=joint"), ("none", "compensate=none"), ("magnitude", "damping=1e9")):
        more = ["calibration.samples=32", "stages.0.samples=32", f"stages.0.{option}"]
        prune(tmp_path / "trained", tmp_path / name, *more)
        with torch.no_grad():
            losses[name] = float(open_model(str(tmp_path / name), Silent()).load()(input_ids=ids, labels=ids).loss)
    assert losses["joint"] < 0.95 * min(losses["none"], losses["magnitude"])


def test_a_killed_run_goes_on_with_the_gradients_of_what_is_left(llama, tmp_path, monkeypatch):
    write = StagedCheckpoint.write_shard
    differentiate = BlockGradients._differentiate
    begun = []

    def until_block_1(self, key, *rest):
        if key == "block-1":
            raise KeyboardInterrupt
        return write(self, key, *rest)

    prune(llama, tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr(StagedCheckpoint, "write_shard", until_block_1)
        with pytest.raises(KeyboardInterrupt):
            prune(llama, tmp_path / "out")
    monkeypatch.setattr(BlockGradients, "_differentiate", lambda self, i: begun.append(i) or differentiate(self, i))
    stage = prune(llama, tmp_path / "out")
    assert stage["resumed_blocks"] == 1
    assert begun == [1]
    assert identity(tmp_path / "out") == identity(tmp_path / "whole")


def test_the_number_of_threads_changes_nothing(llama, tmp_path):
    threads = torch.get_num_threads()
    try:
        for number in (1, 2):
            torch.set_num_threads(number)
            prune(llama, tmp_path / str(number))
    finally:
        torch.set_num_threads(threads)
    assert identity(tmp_path / "1") == identity(tmp_path / "2")


def test_a_later_stage_has_the_gradients_of_what_the_earlier_one_made(llama, tmp_path):
    first = {"stage": "prune", "method": "magnitude", "sparsity": 0.3}
    second = {"stage": "prune", "method": "mfac", "sparsity": 0.5, "samples": 4, "sequence_length": 16}
    two = prepared(llama, f"stages={json.dumps([first, second])}", probes=[])
    stages = run.execute(two, tmp_path / "two", Silent(), evaluation=False).report["stages"]
    assert [stage["kept"] / stage["numel"] for stage in stages] == pytest.approx([0.7, 0.5], abs=1e-4)
    prune(llama, tmp_path / "one")
    assert not same_tensors(tmp_path / "one", tmp_path / "two")


@pytest.mark.parametrize("allocate", ["dp", "owl", "{method: ecoflap, samples: 2, sequence_length: 16}"])
def test_allocators_that_look_have_what_the_pruner_needs(allocate, llama, tmp_path):
    stage = prune(llama, tmp_path / "out", f"stages.0.allocate={allocate}")
    assert stage["kept"] * 2 == stage["numel"]
    assert len({facts["kept"] / facts["numel"] for facts in stage["linears"].values()}) > 1


def test_refiner_and_update_go_on_from_its_mask(llama, tmp_path):
    stage = prune(llama, tmp_path / "out", "stages.0.update=lstsq", "stages.0.refine=dsnot")
    assert stage["kept"] * 2 == stage["numel"]
    assert all("output_error" in facts for facts in stage["linears"].values())


@pytest.mark.parametrize(("key", "number"), [("samples", 5), ("sequence_length", 33)])
def test_less_text_than_gradients_are_asked_for_is_refused(key, number, llama):
    with pytest.raises(
        TooFewTokens, match=rf"stages\.0\.method: mfac measures gradients on .*{number}.*calibration has 4 of 32"
    ):
        prepared(llama, f"stages.0.{key}={number}")


def test_the_cost_counts_gradients_and_a_dry_run_shows_it(llama, tmp_path):
    few, many = (prepared(llama, f"stages.0.samples={number}") for number in (2, 4))
    block = sum(linear.numel for linear in many.plans[0].targets if linear.block == 0)
    largest, states = 48 * 32, 2 * 3 * 16 * 32
    assert many.cost.gradient_bytes - few.cost.gradient_bytes >= 4 * 2 * (block + largest + states)
    wanda = prepare(load_recipe("wanda-50", SMALL), open_model(str(llama), Silent()))
    assert wanda.cost.gradient_bytes == 0
    assert many.cost.memory_bytes > many.cost.gradient_bytes
    assert describe.describe_plan(many, tmp_path)["cost"]["gradient_bytes"] == many.cost.gradient_bytes


def test_gradients_that_do_not_fit_are_refused_with_numbers(llama, tmp_path, monkeypatch):
    ready = prepared(llama)
    monkeypatch.setattr(plan, "available_memory_bytes", lambda: 100 << 10)
    monkeypatch.setattr(plan, "_statm", lambda field: plan.BASE_MEMORY_BYTES)
    with pytest.raises(
        OutOfMemory, match=r"gradients of all samples.*needs? about \d+ kB more memory, 102 kB are free"
    ):
        run.execute(ready, tmp_path / "out", Silent(), evaluation=False)
    assert not (tmp_path / "out").exists()
