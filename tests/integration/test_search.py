"""Searches through whole runs on tiny models: budgets, nulls, interruption, databases, refusals."""

from __future__ import annotations

import errno
import json
import os

import pytest
import torch
from safetensors.torch import load_file

from sparsekit import run
from sparsekit.checkpoint.verify import verify
from sparsekit.errors import DiskFull, RecipeError, ResumeMismatch, TooFewTokens
from sparsekit.fs import FileSystem
from sparsekit.models.source import open_model
from sparsekit.prepared import prepare
from sparsekit.progress import Silent
from sparsekit.recipe.load import load_recipe
from sparsekit.search.saved import SavedSearch
from tests.fault.command import check_refusal, invoke
from tests.support import tiny

SMALL = ["calibration.source=builtin", "calibration.samples=8", "calibration.sequence_length=32", "save.format=dense"]
SEARCH = [
    "stages.0.allocate.samples=8",
    "stages.0.allocate.sequence_length=32",
    "stages.0.allocate.tokens=[32,64]",
    "stages.0.allocate.offspring=4",
    "stages.0.allocate.generations=6",
]


class Told(Silent):
    def __init__(self):
        self.notes, self.told = [], []

    def note(self, text):
        self.notes.append(text)

    def tell(self, task, text):
        self.told.append(text)


def prepared(folder, *sets, recipe="evopress-50"):
    return prepare(load_recipe(recipe, [*SMALL, *SEARCH, *sets]), open_model(str(folder), Silent()))


def prune(folder, out, *sets, reporter=None, database=None, recipe="evopress-50"):
    done = run.execute(
        prepared(folder, *sets, recipe=recipe), out, reporter or Silent(), evaluation=False, database=database
    )
    return done.report["stages"][0]


def tensors(out):
    return {key: value for file in out.glob("*.safetensors") for key, value in load_file(file).items()}


def same(one, other):
    before, after = tensors(one), tensors(other)
    return before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return tiny.save("llama", tmp_path_factory.mktemp("llama"), dtype=torch.bfloat16)


@pytest.fixture(scope="module")
def whole(llama, tmp_path_factory):
    """A search that nothing interrupts: (OUT, its stage in the report)."""
    out = tmp_path_factory.mktemp("whole") / "out"
    return out, prune(llama, out)


@pytest.mark.parametrize("family", ["gpt2", "mixtral"])
@pytest.mark.parametrize("pattern", ["unstructured", "4x2"])
def test_counts_are_exact(family, pattern, tmp_path):
    folder = tiny.save(family, tmp_path / "model")
    stage = prune(folder, tmp_path / "out", f"stages.0.pattern={pattern}")
    assert stage["kept"] * 2 == stage["numel"]
    assert sum(stage["allocation"]["level"].values()) == 0
    assert verify(tmp_path / "out", "semantic").problems == ()


def test_the_report_holds_the_search_and_its_nulls(whole):
    out, stage = whole
    facts = stage["allocation"]
    assert set(facts["fitness"]) == {"evopress", "uniform", "owl", "dp", "random_search"}
    history = [value for _, value in sorted((int(k), v) for k, v in facts["fitness_by_generation"].items())]
    assert history == sorted(history, reverse=True)
    assert facts["fitness"]["evopress"] == pytest.approx(history[-1])
    start = min(facts["fitness"][name] for name in ("uniform", "owl", "dp"))
    assert start == pytest.approx(history[0])
    # the fixed samples for the start, then 4 x 1 and 1 x 2 samples of 32 tokens in each of 6 generations
    assert facts["tokens_searched"]["all"] == (2 + 6 * (4 + 2)) * 32
    assert "Best fitness by generation" in (out / "report.html").read_text(encoding="utf-8")
    assert "evopress" in (out / "README.md").read_text(encoding="utf-8")


def test_what_was_measured_is_gone_after_the_run(whole):
    out, _ = whole
    assert [path.name for path in out.parent.iterdir()] == ["out"]


def test_a_pruner_that_moves_weights_is_searched_too(llama, tmp_path):
    stage = prune(llama, tmp_path / "out", "stages.0.allocate.nulls=[]", recipe="evopress-sparsegpt-70")
    assert stage["kept"] == round(0.3 * stage["numel"])
    assert set(stage["allocation"]["fitness"]) == {"evopress", "uniform"}


def test_perplexity_of_the_text_can_be_the_fitness(llama, tmp_path):
    sets = ["stages.0.allocate.fitness=perplexity", "stages.0.allocate.nulls=[]"]
    facts = prune(llama, tmp_path / "out", *sets)["allocation"]
    history = list(facts["fitness_by_generation"].values())
    assert history == sorted(history, reverse=True)
    assert history[0] == pytest.approx(facts["fitness"]["uniform"])
    # of a random model about that of a guess: never as small as a divergence from it
    assert 3 < facts["fitness"]["evopress"] < 12


def test_the_published_start_is_uniform(llama, tmp_path):
    facts = prune(llama, tmp_path / "out", "stages.0.allocate.start=uniform")["allocation"]
    assert facts["fitness"]["uniform"] == pytest.approx(facts["fitness_by_generation"]["0"])


@pytest.mark.parametrize("stopped", [0, 3])
def test_an_interrupted_search_goes_on_and_ends_the_same(llama, whole, tmp_path, monkeypatch, stopped):
    add = SavedSearch.add

    def interrupted(self, found):
        add(self, found)
        if found.number == stopped:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(SavedSearch, "add", interrupted)
        with pytest.raises(KeyboardInterrupt):
            prune(llama, tmp_path / "out")
    assert (tmp_path / "out.levels").is_dir()
    numbers = []
    monkeypatch.setattr(SavedSearch, "add", lambda self, found: (numbers.append(found.number), add(self, found)))
    again = prune(llama, tmp_path / "out")
    assert numbers == list(range(stopped + 1, 7))
    assert again["allocation"] == whole[1]["allocation"]
    assert same(tmp_path / "out", whole[0])
    assert not (tmp_path / "out.levels").exists()


def test_a_database_serves_another_search(llama, whole, tmp_path):
    first, second = Told(), Told()
    prune(llama, tmp_path / "one", database=tmp_path / "kept", reporter=first)
    files = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "kept").rglob("*.safetensors")}
    assert len(files) == len({linear for linear in whole[1]["linears"]})
    prune(llama, tmp_path / "two", "stages.0.allocate.offspring=3", database=tmp_path / "kept", reporter=second)
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "kept").rglob("*.safetensors")} == files
    assert any("level database of" in note for note in first.notes)
    assert not any("level database of" in note for note in second.notes)
    assert same(tmp_path / "one", whole[0])


def test_the_database_of_another_run_is_refused_by_what_differs(llama, tmp_path):
    prune(llama, tmp_path / "one", database=tmp_path / "kept")
    with pytest.raises(ResumeMismatch, match=r"stage\.sparsity: 0\.5 -> 0\.6.*--database"):
        prune(llama, tmp_path / "two", "stages.0.sparsity=0.6", database=tmp_path / "kept")
    with pytest.raises(ResumeMismatch, match="calibration:"):
        prune(llama, tmp_path / "two", "calibration.seed=1", database=tmp_path / "kept")
    assert not (tmp_path / "two").exists()


def test_a_budget_of_tokens_ends_the_search(llama, tmp_path):
    told = Told()
    stage = prune(llama, tmp_path / "out", "stages.0.allocate.budget=1ktokens", reporter=told)
    # half of it for the random search: (500 // 32 - 2 fixed) // 6 = 2 generations
    assert stage["allocation"]["generations"] == {"all": 2.0}
    assert stage["allocation"]["tokens_searched"]["all"] <= 500
    assert any("2 generations of 4, 11 evaluations, 448 tokens" in note for note in told.notes)
    assert any("KL" in text and "below uniform" in text for text in told.told)


def test_a_budget_of_time_is_kept_by_a_search_that_goes_on(llama, tmp_path, monkeypatch):
    add = SavedSearch.add

    def interrupted(self, found):
        add(self, found)
        raise KeyboardInterrupt

    sets = ["stages.0.allocate.budget=2s", "stages.0.allocate.generations=40"]
    with monkeypatch.context() as patched:
        patched.setattr(SavedSearch, "add", interrupted)
        with pytest.raises(KeyboardInterrupt):
            prune(llama, tmp_path / "out", *sets)
    (state,) = (tmp_path / "out.levels").rglob("search-*.json")
    decided = SavedSearch.__new__(SavedSearch)
    decided._path = state
    decided._load()
    assert 1 <= decided.generations <= 40
    stage = prune(llama, tmp_path / "out", *sets)
    assert stage["allocation"]["generations"] == {"all": float(decided.generations)}


@pytest.mark.parametrize(
    ("sets", "message"),
    [
        (["stages.0.allocate.budget=soon"], "'soon' is no budget: write a time such as 10min"),
        (["stages.0.allocate.budget=0h"], "is no budget"),
        (["stages.0.allocate.tokens=[33,64]"], "33 tokens are no whole samples of 32"),
        (["stages.0.allocate.tokens=[32]"], "2 numbers of survivors for 1 stages"),
        (["stages.0.allocate.survivors=[1,2]"], "leaves one survivor"),
        (["stages.0.allocate.survivors=[5,1]"], "leaves 5 of 4 states"),
        (["stages.0.allocate.tokens=[32,256]"], "draws 1 samples beside 8 fixed ones, it has 8"),
        (["stages.0.allocate.nulls=[wanda]"], "nulls"),
    ],
)
def test_impossible_options_are_recipe_errors(llama, sets, message):
    with pytest.raises(RecipeError) as caught:
        prepared(llama, *sets)
    assert message in str(caught.value)


def test_less_text_than_the_search_compares_on_is_refused_before_anything_is_read(llama):
    with pytest.raises(TooFewTokens, match=r"evopress .* 8 samples of 32 tokens, the calibration has 4 of 32"):
        prepared(llama, "calibration.samples=4")


def test_patterns_that_fix_the_counts_leave_nothing_to_search(llama):
    with pytest.raises(RecipeError, match="evopress has nothing to distribute"):
        prepared(llama, "stages.0.pattern=2:4", "stages.0.sparsity=0.5")


def test_a_disk_too_small_for_the_database_is_said_before_it_is_built(llama, tmp_path, monkeypatch):
    class Small(FileSystem):
        def free_bytes(self, path):
            return 1000 if "levels" in str(path) or "kept" in str(path) else 1 << 40

    from sparsekit import fs

    monkeypatch.setattr(fs, "FS", Small())
    with pytest.raises(DiskFull, match="the level database"):
        prune(llama, tmp_path / "out", database=tmp_path / "kept")
    assert not list((tmp_path / "kept").rglob("*.safetensors"))


def test_a_state_that_is_damaged_is_named(llama, tmp_path, monkeypatch):
    def interrupted(self, found):
        self._path.write_text('{"number": 1}', encoding="utf-8")
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(SavedSearch, "add", interrupted)
        with pytest.raises(KeyboardInterrupt):
            prune(llama, tmp_path / "out")
    from sparsekit.errors import CheckpointError

    with pytest.raises(CheckpointError, match="Delete that file: the search begins again"):
        prune(llama, tmp_path / "out")


def test_errors_of_the_disk_reach_the_user_typed(llama, tmp_path, monkeypatch):
    replace = SavedSearch.add

    def full(self, found):
        monkeypatch.setattr(os, "write", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSPC, "full")))
        replace(self, found)

    monkeypatch.setattr(SavedSearch, "add", full)
    with pytest.raises(DiskFull):
        prune(llama, tmp_path / "out")


def test_budget_on_the_command_line_reaches_the_search(llama, tmp_path):
    sets = [word for setting in (*SMALL, *SEARCH) for word in ("--set", setting)]
    base = ["prune", str(llama), "--recipe", "evopress-50", "-o", str(tmp_path / "out"), *sets, "--json", "--dry-run"]
    small, large = (json.loads(invoke(*base, "--budget", amount).out) for amount in ("1ktokens", "900s"))
    assert large["cost"]["seconds"] - small["cost"]["seconds"] > 800
    assert not (tmp_path / "out").exists()


def test_a_budget_for_nothing_is_refused(llama, tmp_path):
    arguments = ("prune", str(llama), "--recipe", "wanda-50", "-o", str(tmp_path / "out"), "--budget", "10min")
    check_refusal(invoke(*arguments), 2, "--budget limits a search, wanda-50 has none")
