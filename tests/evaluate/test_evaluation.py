from __future__ import annotations

import json
import math
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sparsekit.data import TextSpec
from sparsekit.errors import EvaluationError
from sparsekit.evaluate.compare import Comparison
from sparsekit.evaluate.evaluation import (
    EvaluationReport,
    EvaluationRequest,
    TaskRow,
    evaluate,
    model_max_length,
    pair,
)
from sparsekit.evaluate.gates import GatesSpec, check
from sparsekit.evaluate.harness import TaskMetric, find_tasks, parse_results, run_tasks, shipped_tasks
from sparsekit.evaluate.perplexity import Perplexity
from sparsekit.evaluate.table import WIDTH, render_table
from sparsekit.progress import Silent
from tests.support.byte_model import byte_model, byte_tokenizer

SMOKE = ("sparsekit_smoke_choice", "sparsekit_smoke_generate")


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture(scope="module")
def models() -> dict[str, tuple[Any, Any]]:
    return {name: (byte_model(seed), byte_tokenizer()) for seed, name in enumerate(("dense", "pruned"))}


class Recorder(Silent):
    def __init__(self) -> None:
        self.started: dict[str, int | None] = {}
        self.advanced: dict[str, int] = {}
        self.finished: list[str] = []
        self.notes: list[str] = []

    def start(self, task: str, total: int | None, unit: str) -> None:
        self.started[task] = total

    def advance(self, task: str, amount: int = 1) -> None:
        self.advanced[task] = self.advanced.get(task, 0) + amount

    def finish(self, task: str) -> None:
        self.finished.append(task)

    def note(self, text: str) -> None:
        self.notes.append(text)


# --- tasks ---
def test_both_smoke_tasks_run_offline_and_report_progress(
    models: dict[str, Any], capfd: pytest.CaptureFixture[str]
) -> None:
    recorder = Recorder()
    metrics = run_tasks(*models["dense"], SMOKE, reporter=recorder)
    found = {(metric.task, metric.metric): metric for metric in metrics}
    assert set(found) == {(SMOKE[0], "acc"), (SMOKE[0], "acc_norm"), (SMOKE[1], "exact_match")}
    for metric in metrics:
        assert metric.samples == 16
        assert metric.higher_is_better is True
        assert len(metric.per_document) == 16
        assert metric.value == pytest.approx(np.mean(metric.per_document))
        assert metric.stderr == pytest.approx(np.std(metric.per_document, ddof=1) / 4)
    assert recorder.started["answer likelihoods"] == 64
    assert recorder.advanced["generation"] == 16
    assert set(recorder.finished) == {"answer likelihoods", "generation"}
    assert capfd.readouterr().out == ""


def test_the_shipped_tasks_have_sound_items() -> None:
    files = sorted(shipped_tasks().glob("*smoke*.jsonl"))
    assert [file.stem for file in files] == sorted(SMOKE)
    for file in files:
        items = [json.loads(line) for line in file.read_text().splitlines()]
        assert 12 <= len(items) <= 20
        assert len({item["question"] for item in items}) == len(items)
        for item in items:
            if "choices" in item:
                assert len(set(item["choices"])) == 4
                assert item["answer"] in range(4)
            else:
                assert item["answer"].strip() == item["answer"] != ""
    choices = [json.loads(line)["answer"] for line in files[0].read_text().splitlines()]
    assert {choices.count(position) for position in range(4)} == {4}  # no position wins by itself


def test_sequences_to_go_on_with_have_six_items_that_follow_from_what_is_shown() -> None:
    items = [json.loads(line) for line in (shipped_tasks() / "sparsekit_continue.jsonl").read_text().splitlines()]
    assert len(items) == 40
    assert len({item["start"] for item in items}) == len(items)
    for item in items:
        shown, rest = item["start"].split(", "), item["rest"].split(", ")
        assert len(rest) == 6
        assert len(shown) >= 4
        if all(word.isdigit() for word in shown):
            numbers = [int(word) for word in shown + rest]
            assert len({after - before for before, after in pairwise(numbers)}) == 1


def test_a_perfect_continuation_scores_one_whatever_follows() -> None:
    """The first six items count; a model that goes on is not wrong, one that stops early is."""
    task = find_tasks(["sparsekit_continue"]).loaded["tasks"]["sparsekit_continue"]
    document = next(iter(task.test_docs()))
    assert task.doc_to_text(document) == f"{document['start']},"
    scores = {}
    for name, said in {
        "exact": f" {document['rest']}",
        "goes on": f" {document['rest']}, and so on",
        "stops": f" {document['rest'].rpartition(',')[0]}",
        "wrong": " 1, 2, 1, 2, 1, 2",
    }.items():
        answers: Any = [[said]]
        for step in task._filters[0].filters:
            answers = step().apply(answers, [document])
        scores[name] = task.process_results(document, list(answers))["exact_match"]
    assert scores == {"exact": 1, "goes on": 1, "stops": 0, "wrong": 0}


def test_a_perfect_answer_scores_one(tmp_path: Path, models: dict[str, Any]) -> None:
    """What the tiny model writes is made the answer: exact match must then be 1, and 0 for another answer."""
    model, tokenizer = models["dense"]
    prompt = "Question: a\nAnswer:"
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    written = model.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=1)[0, ids.shape[1] :]
    answer = tokenizer.decode(written, skip_special_tokens=True).strip()
    for name, target in (("right", answer), ("wrong", "something else")):
        write_task(tmp_path, name, [{"question": "a", "answer": target}])
    right, wrong = run_tasks(model, tokenizer, ["right", "wrong"], include_path=tmp_path)
    assert (right.value, wrong.value) == (1.0, 0.0)
    assert right.stderr is None  # one document


def write_task(folder: Path, name: str, items: list[dict[str, str]]) -> None:
    (folder / "data").mkdir(exist_ok=True)
    (folder / "data" / f"{name}.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    (folder / f"{name}.yaml").write_text(
        f"task: {name}\ndataset_path: json\n"
        f"dataset_kwargs: {{data_files: {{test: data/{name}.jsonl}}}}\ntest_split: test\n"
        "output_type: generate_until\n"
        'doc_to_text: "Question: {{question}}\\nAnswer:"\ndoc_to_target: "{{answer}}"\n'
        'generation_kwargs: {until: ["\\n\\n\\n"], do_sample: false, max_gen_toks: 4}\n'
        "filter_list: [{name: none, filter: [{function: remove_whitespace}, {function: take_first}]}]\n"
        "metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]\n"
    )


def test_a_group_of_local_tasks_from_another_folder(
    tmp_path: Path, models: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    tasks, elsewhere = tmp_path / "tasks", tmp_path / "elsewhere"
    tasks.mkdir()
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    for name in ("one", "two"):
        write_task(tasks, name, [{"question": name, "answer": "x"}] * 3)
    (tasks / "both.yaml").write_text(
        "group: both\ntask: [one, two]\naggregate_metric_list: [{metric: exact_match, weight_by_size: true}]\n"
    )
    metrics = run_tasks(*models["dense"], ["both"], include_path=tasks, limit=2)
    assert {metric.task: metric.samples for metric in metrics}["one"] == 2
    assert {metric.task for metric in metrics} >= {"one", "two", "both"}


def test_limit_fewshot_and_repeatability(models: dict[str, Any]) -> None:
    selection = find_tasks(["sparsekit_smoke_cho*"])
    assert selection.names == (SMOKE[0],)
    first = run_tasks(*models["dense"], selection, limit=5, num_fewshot=1)
    again = run_tasks(*models["dense"], selection, limit=5, num_fewshot=1)
    fresh = run_tasks(*models["dense"], [SMOKE[0]], limit=5, num_fewshot=1)
    assert first == again == fresh
    assert first[0].samples == 5


def test_an_unknown_task_is_found_before_a_model_is_opened() -> None:
    def never(name: str) -> Any:
        raise AssertionError(f"opened {name}")

    expected = r"Unknown task 'sparsekit_smoke_chioce'\. Did you mean 'sparsekit_smoke_choice'"
    with pytest.raises(EvaluationError, match=expected):
        evaluate(EvaluationRequest("m", never, tasks=["sparsekit_smoke_chioce"]))


def test_unknown_folders_and_limits(models: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match=r"no such folder.*--include-path"):
        find_tasks(SMOKE, include_path=tmp_path / "missing")
    with pytest.raises(EvaluationError, match="limit must be at least 1, got 0"):
        run_tasks(*models["dense"], SMOKE, limit=0)


def test_a_task_whose_data_is_missing(tmp_path: Path) -> None:
    write_task(tmp_path, "gone", [{"question": "a", "answer": "b"}])
    (tmp_path / "data" / "gone.jsonl").unlink()
    with pytest.raises(EvaluationError, match=r"gone: the task's data cannot be loaded: .*gone\.jsonl"):
        find_tasks(["gone"], include_path=tmp_path)


def test_without_lm_eval_the_extra_is_named() -> None:
    code = (
        "import sys; sys.modules['lm_eval'] = None\n"
        "from sparsekit.errors import MissingExtra; from sparsekit.evaluate.harness import find_tasks\n"
        "try: find_tasks(['x'])\n"
        "except MissingExtra as error: print(error, error.exit_code)"
    )
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "pip install 'sparsekit[eval]'" in printed
    assert printed.strip().endswith("5")


RESULTS: dict[str, Any] = {
    "results": {
        "a": {"alias": "a", "acc,none": 0.5, "acc_stderr,none": "N/A", "word_perplexity,none": 12.5, "x": 3},
        "b": {
            "exact_match,strict": 0.25,
            "exact_match_stderr,strict": 0.1,
            "note,none": "text",
            "f,none": True,
        },
    },
    "n-samples": {"a": {"original": 9, "effective": 4}},
    "higher_is_better": {"a": {"acc": True, "word_perplexity": False}},
    "samples": {
        "a": [
            {"doc_id": 1, "filter": "none", "acc": 1.0, "word_perplexity": [-3.0, 2]},
            {"doc_id": 0, "filter": "none", "acc": 0.0, "word_perplexity": [-2.0, 1]},
        ]
    },
}


def test_results_are_parsed_whatever_is_in_them() -> None:
    acc, perplexity, exact = parse_results(RESULTS)
    assert (acc.task, acc.metric, acc.value, acc.samples, acc.higher_is_better) == ("a", "acc", 0.5, 4, True)
    assert acc.per_document == (0.0, 1.0)
    assert acc.stderr == pytest.approx(0.5)
    assert (perplexity.metric, perplexity.stderr, perplexity.per_document) == ("word_perplexity", None, ())
    assert perplexity.higher_is_better is False
    assert (exact.metric, exact.stderr, exact.samples) == ("exact_match,strict", 0.1, None)


@pytest.mark.parametrize("results", [None, {}, {"results": {}}, {"results": {"a": {"alias": "a"}}}])
def test_results_without_numbers_are_refused(results: Any) -> None:
    with pytest.raises(EvaluationError):
        parse_results(results)


# --- the whole evaluation ---
def request(models: dict[str, Any], **options: Any) -> EvaluationRequest:
    return EvaluationRequest("pruned", lambda name: models[name], **options)


def test_evaluation_with_baseline_tasks_and_json(models: dict[str, Any]) -> None:
    recorder = Recorder()
    report = evaluate(
        request(
            models,
            baseline="dense",
            text=TextSpec(samples=4, sequence_length=64),
            tasks=SMOKE,
            limit=6,
            reporter=recorder,
        )
    )
    assert report.comparison is not None
    assert report.perplexity == report.comparison.model
    assert "held-out part" in report.perplexity.source
    assert report.perplexity.tokens == 4 * 63
    assert len(report.tasks) == 3
    mine = {(m.task, m.metric): m for m in run_tasks(*models["pruned"], SMOKE, limit=6)}
    other = {(m.task, m.metric): m for m in run_tasks(*models["dense"], SMOKE, limit=6)}
    for row in report.tasks:
        a, b = mine[row.task, row.metric], other[row.task, row.metric]
        assert (row.value, row.baseline, row.samples) == (a.value, b.value, 6)
        assert row.difference == pytest.approx(a.value - b.value)
        pairs = np.array(a.per_document) - np.array(b.per_document)
        assert row.difference_stderr == pytest.approx(pairs.std(ddof=1) / math.sqrt(6))
    assert recorder.started["comparison"] == recorder.advanced["comparison"] == 4
    loaded = json.loads(json.dumps(report.to_json(), allow_nan=False))
    assert loaded["schema"] == 1
    assert loaded["comparison"]["kl"] == report.comparison.kl
    assert loaded["text_fingerprint"] == report.text_fingerprint
    assert loaded["tasks"][0]["difference_stderr"] == report.tasks[0].difference_stderr


def test_a_model_beside_itself_differs_in_nothing(models: dict[str, Any]) -> None:
    same = {"pruned": models["dense"], "dense": models["dense"]}
    report = evaluate(
        request(same, baseline="dense", text=TextSpec(samples=2, sequence_length=32), tasks=SMOKE[:1], limit=3)
    )
    assert report.comparison is not None
    assert (report.comparison.kl, report.comparison.ratio) == (0.0, 1.0)
    assert {row.difference for row in report.tasks} == {0.0}
    assert {row.difference_stderr for row in report.tasks} == {0.0}


def test_evaluation_of_a_text_only_and_of_tasks_only(models: dict[str, Any]) -> None:
    text = evaluate(request(models, text=TextSpec(samples=2, sequence_length=32)))
    assert text.comparison is None
    assert text.perplexity is not None
    assert text.tasks == ()
    tasks = evaluate(request(models, tasks=SMOKE[:1], limit=2))
    assert (tasks.perplexity, tasks.text_fingerprint) == (None, None)
    assert tasks.tasks[0].baseline is None
    with pytest.raises(EvaluationError, match="nothing to evaluate"):
        evaluate(request(models))


def test_the_longest_sequence_comes_from_the_configuration(models: dict[str, Any]) -> None:
    assert model_max_length(*models["dense"]) == 512


def test_pairs_of_other_documents_are_refused() -> None:
    mine, other = TaskMetric("t", "acc", 0.5, None, True, 4), TaskMetric("t", "acc", 0.5, None, True, 5)
    with pytest.raises(EvaluationError, match="t: acc has 4 documents for the model, 5 for the baseline"):
        pair([mine], [other])


# --- gates and tables ---
def report(ratio: float = 1.2, kl: float = 0.3, baseline: str | None = "org/dense") -> EvaluationReport:
    text = "builtin (pydoc_data.topics of Python 3.11.7), held-out part"
    mine = Perplexity(1234.5678 * ratio, 12.345, 3.1, 3570, 256, text)
    other = Perplexity(1234.5678, 9.87, 3.0, 3570, 256, text)
    comparison = Comparison(mine, other, ratio, 0.1, 0.012, kl, 0.0123, 0.812) if baseline else None
    both = baseline is not None
    rows = (
        TaskRow("arc_easy", "acc", 0.5, 0.05, *((0.6, 0.04, -0.1, 0.03) if both else (None,) * 4), True, 100),
        TaskRow("a_task_with_quite_a_long_name_indeed", "word_perplexity,some-filter", 1e9, None,
                *((12.5, None, 1e9, None) if both else (None,) * 4), False, 62),
    )  # fmt: skip
    return EvaluationReport("/home/x/out/model-wanda-50", baseline, mine, comparison, rows, "f" * 64, None, None, 3)


def test_gates_that_hold_say_nothing() -> None:
    assert check(GatesSpec(), report()) == []
    assert check(GatesSpec(1.2, 0.3, {"arc_easy/acc": 0.5}), report()) == []


def test_missed_gates_say_got_and_needed() -> None:
    missed = check(GatesSpec(1.1, 0.2, {"arc_easy/acc": 0.55}), report())
    text = "3,570 tokens of builtin (pydoc_data.topics of Python 3.11.7), held-out part, sequence length 256"
    assert missed == [
        f"perplexity ratio is 1.2, need at most 1.1 ({text})",
        f"KL divergence is 0.3, need at most 0.2 ({text})",
        "arc_easy/acc is 0.5, need at least 0.55 (100 documents)",
    ]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_gates_are_missed_by_what_is_no_number(bad: float) -> None:
    assert len(check(GatesSpec(1.1, 0.2), report(ratio=bad, kl=bad))) == 2


def test_gates_on_what_was_not_measured_are_missed() -> None:
    missed = check(GatesSpec(1.1, 0.2, {"arc_easy/ac": 0.1}), report(baseline=None))
    assert len(missed) == 3
    assert missed[2] == "arc_easy/ac was not measured, need at least 0.1; did you mean 'arc_easy/acc'?"


@pytest.mark.parametrize("baseline", ["org/dense", None])
@pytest.mark.parametrize("ratio", [1.2, 1e6, math.inf])
def test_tables_fit_and_name_text_and_length(baseline: str | None, ratio: float) -> None:
    shown = render_table(report(ratio=ratio, baseline=baseline))
    assert max(map(len, shown.splitlines())) <= WIDTH
    flat = " ".join(shown.split())
    assert "3,570 tokens, sequence length 256" in flat
    assert "held-out part" in flat
    assert "examples in the prompt: 3" in flat
    assert "model-wanda-50" in flat
    assert "/home/x" not in shown


def test_infinite_numbers_survive_json() -> None:
    loaded = json.loads(json.dumps(report(ratio=math.inf).to_json(), allow_nan=False))
    assert loaded["comparison"]["ratio"] == "inf"
