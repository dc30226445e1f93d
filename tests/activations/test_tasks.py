"""Recipes of activation sparsity measure a task that generates; where lm-eval is not installed they say so."""

from __future__ import annotations

import json
import sys

import pytest

from sparsekit.evaluate.table import render_table
from sparsekit.progress import Silent
from sparsekit.recipe.catalog import trees
from sparsekit.recipe.load import load_recipe
from sparsekit.report.scores import score_table
from sparsekit.run import execute
from tests.support import tiny
from tests.support.gated import plan

TASK = "sparsekit_continue"
ACTIVE = [path.stem for path in sorted(trees().recipes.glob("*.yaml")) if load_recipe(path.stem).activations]
SETS = ("stages.0.allocate=uniform", "stages.0.tolerance=0.04", "evaluate.limit=2")


class Notes(Silent):
    """Remembers what it is told."""

    def __init__(self):
        self.notes = []

    def note(self, text):
        self.notes.append(text)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return tiny.save("llama", tmp_path_factory.mktemp("llama"), max_position_embeddings=512)


def run(llama, out, *sets):
    told = Notes()
    found = execute(plan(llama, "teal-50", *SETS, *sets), out, told)
    return found, json.loads((out / "report.json").read_text())["evaluation"], told.notes


@pytest.mark.parametrize("name", ACTIVE)
def test_every_recipe_of_activation_sparsity_has_a_task_that_generates(name):
    spec = load_recipe(name).evaluate
    assert spec.optional_tasks == (TASK,)
    assert spec.limit == 16
    assert spec.tasks == ()


def test_it_is_measured_beside_the_dense_model(llama, tmp_path):
    pytest.importorskip("lm_eval", reason="tasks need lm-eval")
    found, said, notes = run(llama, tmp_path / "out")
    (row,) = said["tasks"]
    assert (row["task"], row["samples"]) == (TASK, 2)
    assert row["baseline"] is not None
    assert said["limit"] == 2
    assert said["left_out"] == []
    assert "first 2 documents of each task" in " ".join(render_table(found.evaluation).split())
    assert not [note for note in notes if "lm-eval is not installed" in note]


def test_without_lm_eval_it_is_left_out_with_a_note(llama, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)  # as if it were not installed
    found, said, notes = run(llama, tmp_path / "out")
    assert said["tasks"] == []
    assert said["left_out"] == [TASK]
    assert said["perplexity"] is not None
    wanted = f"Not run: {TASK}, since lm-eval is not installed. To run it later: pip install 'sparsekit[eval]'"
    shown = [" ".join(text.split()) for text in (*notes, render_table(found.evaluation), *score_table(said).notes)]
    assert len([text for text in shown if wanted in text]) == 3
    for page in ("README.md", "report.html"):
        assert "lm-eval is not installed" in (tmp_path / "out" / page).read_text()


def test_tasks_that_are_asked_for_are_not_left_out(llama, tmp_path, monkeypatch):
    from sparsekit.errors import MissingExtra

    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(MissingExtra, match="not installed"):
        run(llama, tmp_path / "out", f'evaluate.tasks=["{TASK}"]')
