"""Nulls: what a report shows beside a recipe, and what is left of the runs that made it."""

from __future__ import annotations

import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file

from sparsekit import fs, run
from sparsekit.describe import describe_plan
from sparsekit.errors import DiskFull, UsageError
from sparsekit.evaluate.table import render_table
from sparsekit.models.source import open_model
from sparsekit.prepared import prepare
from sparsekit.progress import Silent
from sparsekit.recipe.load import load_recipe
from sparsekit.recipe.nulls import null_recipe
from sparsekit.report import one_line
from tests.fault.command import check_refusal, invoke, prune_arguments
from tests.support import tiny

SMALL = [
    "calibration.source=builtin",
    "calibration.samples=3",
    "calibration.sequence_length=32",
    "evaluate.samples=2",
    "evaluate.sequence_length=32",
]
BOTH = "evaluate.nulls=[uniform, random]"
DEPTH = "stages.0.allocate={method: depth}"


class Notes(Silent):
    def __init__(self):
        self.notes = []

    def note(self, text):
        self.notes.append(text)


def prepared(folder, recipe, sets):
    return prepare(load_recipe(recipe, [*SMALL, *sets]), open_model(str(folder), Silent()))


def prune(folder, out, recipe="wanda-50", sets=(), reporter=None, **options):
    return run.execute(prepared(folder, recipe, sets), out, reporter or Silent(), **options)


def weights(folder):
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return tiny.save("llama", tmp_path_factory.mktemp("llama"), dtype=torch.bfloat16)


@pytest.fixture(scope="module")
def compared(llama, tmp_path_factory):
    """A run with both nulls, in a folder of its own."""
    out = tmp_path_factory.mktemp("compared") / "out"
    return prune(llama, out, sets=[DEPTH, BOTH])


def test_nulls_are_the_recipes_they_stand_for(compared, llama, tmp_path):
    uniform, random = compared.evaluation.nulls
    assert (uniform.name, random.name) == ("uniform", "random")
    alone = prune(llama, tmp_path / "uniform").evaluation.comparison
    assert (uniform.perplexity, uniform.ratio) == pytest.approx((alone.model.perplexity, alone.ratio), rel=1e-9)
    alone = prune(llama, tmp_path / "random", "random-50", [DEPTH, "stages.0.group=row"]).evaluation.comparison
    assert (random.perplexity, random.stderr) == pytest.approx((alone.model.perplexity, alone.model.stderr), rel=1e-9)


def test_nulls_leave_the_checkpoint_as_it_is_and_nothing_beside_it(compared, llama, tmp_path):
    prune(llama, tmp_path / "out", sets=[DEPTH])
    ours, without = weights(compared.out), weights(tmp_path / "out")
    assert ours.keys() == without.keys()
    assert all(torch.equal(ours[name], without[name]) for name in ours)
    assert [path.name for path in compared.out.parent.iterdir()] == ["out"]


def test_nulls_are_shown_everywhere(compared):
    uniform, random = compared.evaluation.nulls
    report = json.loads((compared.out / "report.json").read_text())
    assert [null["name"] for null in report["evaluation"]["nulls"]] == ["uniform", "random"]
    assert f"; uniform {uniform.perplexity:.0f} ({uniform.ratio:.2f}x); random {random.perplexity:.0f}" in one_line(
        report
    )
    table = render_table(compared.evaluation)
    assert max(map(len, table.splitlines())) <= 80
    assert "\n  null uniform  " in table
    assert "null random: the same recipe with random masks" in table
    for name in ("README.md", "report.html"):
        page = (compared.out / name).read_text()
        assert "Perplexity of null uniform" in page
        assert "Perplexity of null random" in page
        assert "Random mask: the output error expected of a random mask" in page
        assert "Uniform: the output error where every matrix has" in page


def test_every_report_has_the_expected_error_of_random_masks(llama, tmp_path):
    stage = prune(llama, tmp_path / "out", "sparsegpt-50", evaluation=False).report["stages"][0]
    for facts in stage["linears"].values():
        null = facts["nulls"]["random"]
        assert "uniform" not in facts["nulls"]
        assert facts["output_error"] < null["output_error"]
        assert null["weight_error"] == 1 - facts["kept"] / facts["numel"]
    errors = json.loads((tmp_path / "out/report.json").read_text())["errors"]
    everything = errors["all"]
    assert everything["output_error"] < everything["random_error"]
    assert everything["uniform_error"] is None
    assert errors.keys() - {"all"} == {name.partition(".0.")[2] for name in stage["linears"] if ".0." in name}


def test_the_errors_of_a_uniform_allocation_are_those_of_a_uniform_run(compared, llama, tmp_path):
    """In the first block, whose inputs are the same."""
    other = prune(llama, tmp_path / "out", evaluation=False).report["stages"][0]["linears"]
    for name, facts in compared.report["stages"][0]["linears"].items():
        if ".layers.0." in name:
            assert facts["nulls"]["uniform"]["output_error_diagonal"] == other[name]["output_error_diagonal"]
    assert "uniform" not in other[name]["nulls"]


@pytest.mark.parametrize(
    ("recipe", "sets", "own"),
    [
        ("wanda-50", [], "uniform"),
        ("wanda-2of4", [], "uniform"),
        ("random-50", ["stages.0.group=linear"], "random"),
    ],
)
def test_a_null_that_is_the_recipe_itself_is_left_out_with_a_note(recipe, sets, own, llama):
    found = prepared(llama, recipe, [*sets, BOTH])
    assert f"null {own} is left out: the recipe itself is {own}" in found.notes
    assert own not in found.nulls


def test_overrides_are_an_allocation_too():
    recipe = load_recipe("sparsegpt-60", [*SMALL, "stages.0.overrides={'*k_proj': 0.2}", "stages.0.update=lstsq"])
    uniform, random = null_recipe(recipe, "uniform"), null_recipe(recipe, "random")
    assert (uniform.stages[0].overrides, uniform.stages[0].method) == ({}, "sparsegpt")
    assert (random.stages[0].overrides, random.stages[0].method) == ({"*k_proj": 0.2}, "random")
    assert random.stages[0].update.method == "lstsq"
    assert not hasattr(random.stages[0], "damping")


def test_a_dry_run_tells_what_nulls_cost(llama, tmp_path):
    plan = describe_plan(prepared(llama, "wanda-50", [DEPTH, BOTH]), tmp_path / "out")
    assert plan["nulls"]["uniform"]["disk_bytes"] == plan["cost"]["disk_bytes"]
    assert plan["nulls"]["random"]["tokens"] == 0  # neither masks nor this allocation read text
    ended = invoke(*prune_arguments(llama, tmp_path / "out", "--nulls", "random", "--dry-run", recipe="wanda-50"))
    assert ended.code == 0, ended.err
    (line,) = (line for line in ended.out.splitlines() if line.startswith("null"))
    assert line == "null    random: the run again, 16.8 MB of disk meanwhile"


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ("unifrom", "evaluate.nulls.0: must be one of uniform, random, got 'unifrom'; did you mean 'uniform'?"),
        ("random,random", "evaluate.nulls: names 'random' twice"),
        ("random,", "evaluate.nulls.1: must be one of uniform, random, got ''"),
        ("[random", "evaluate.nulls.0: must be one of uniform, random, got '[random'"),
    ],
)
def test_bad_values_are_refused(value, says, llama, tmp_path):
    check_refusal(invoke(*prune_arguments(llama, tmp_path / "out", "--nulls", value)), 2, says)


def test_disk_for_a_null_is_asked_for_before_the_work(llama, tmp_path, monkeypatch):
    alone, both = (prepared(llama, "wanda-50", [DEPTH, *more]) for more in ([], [BOTH]))
    assert both.disk_bytes == 2 * alone.disk_bytes

    class Small(type(fs.FS)):
        def free_bytes(self, path):
            return both.disk_bytes - 1

    monkeypatch.setattr(fs, "FS", Small())
    with pytest.raises(DiskFull):
        run.execute(both, tmp_path / "out", Silent())
    assert list(tmp_path.iterdir()) == []


def test_nulls_without_an_evaluation_are_refused(llama, tmp_path):
    with pytest.raises(UsageError, match="--no-evaluate leaves nothing to compare the nulls with: uniform, random"):
        prune(llama, tmp_path / "out", sets=[BOTH], evaluation=False)
    assert list(tmp_path.iterdir()) == []


def test_nulls_of_several_stages_leave_nothing_behind(llama, tmp_path):
    stages = "[{stage: prune, method: magnitude, sparsity: 0.3}, {stage: prune, method: wanda, sparsity: 0.6}]"
    outcome = prune(llama, tmp_path / "out", sets=[f"stages={stages}", BOTH])
    assert [null.name for null in outcome.evaluation.nulls] == ["random"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


class Stopping(Notes):
    """Ends the run like Ctrl-C in the second block of the null."""

    def __init__(self, error):
        super().__init__()
        self.error = error

    def advance(self, task, amount=1):
        if task.startswith("prune (random)"):
            raise self.error


def test_a_run_that_is_stopped_in_a_null_leaves_the_null_nowhere_and_goes_on(compared, llama, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        prune(llama, tmp_path / "out", sets=[DEPTH, BOTH], reporter=Stopping(KeyboardInterrupt()))
    left = sorted(path.name for path in tmp_path.iterdir())
    assert len(left) == 2, left
    assert all(name.startswith("out.partial-") for name in left)
    outcome = prune(llama, tmp_path / "out", sets=[DEPTH, BOTH])
    assert outcome.report["stages"][0]["resumed_blocks"] == 3
    assert outcome.evaluation.nulls == compared.evaluation.nulls
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_folder_that_has_the_name_of_a_null_is_not_touched(llama, tmp_path):
    mine = tmp_path / "out.null-random"
    mine.mkdir()
    (mine / "thesis.txt").write_text("mine")
    prune(llama, tmp_path / "out", sets=[BOTH])
    assert (mine / "thesis.txt").read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "out.null-random"]


def test_a_null_without_finite_outputs_is_infinitely_bad(tmp_path):
    """Huge weights of opposite sign on equal inputs cancel, unless a random mask takes some of them."""
    folder = tiny.save("llama", tmp_path / "model", dtype=torch.float16)
    (file,) = folder.glob("*.safetensors")
    tensors = load_file(file)
    for name in ("gate_proj", "up_proj"):
        weight = tensors[f"model.layers.2.mlp.{name}.weight"]
        weight[:8] = torch.randn(1, weight.shape[1], generator=torch.Generator().manual_seed(0))
    down = tensors["model.layers.2.mlp.down_proj.weight"]
    down[:, 0:8:2], down[:, 1:8:2] = 30000, -30000
    save_file(tensors, file, metadata={"format": "pt"})
    reporter = Notes()
    outcome = prune(folder, tmp_path / "out", sets=["evaluate.nulls=[random]"], reporter=reporter)
    (null,) = outcome.evaluation.nulls
    assert null.perplexity == null.ratio == math.inf
    assert any(note.startswith("Null random has no finite outputs: NaN or infinity") for note in reporter.notes)
    assert math.isfinite(outcome.evaluation.comparison.ratio)
    assert "random inf (infx)" in one_line(json.loads((outcome.out / "report.json").read_text()))
