"""The evaluation of a report as table rows, for the model card and the HTML page.

Works on the JSON of a report, so that a page can be made again from report.json alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sparsekit.recipe.nulls import NULLS
from sparsekit.recipe.optional import left_out_note
from sparsekit.report.text import ABSENT, TIMES, number, to_float, with_error


@dataclass(frozen=True)
class ScoreRow:
    """One measured quantity. `better` is "higher", "lower" or "" where the measure does not say."""

    name: str
    better: str
    base: str
    pruned: str
    difference: str


@dataclass(frozen=True)
class ScoreTable:
    """All measured quantities, and in words what they were measured on."""

    rows: tuple[ScoreRow, ...]
    notes: tuple[str, ...]
    compared: bool


def score_table(evaluation: Mapping[str, Any] | None) -> ScoreTable | None:
    """Return the table of an evaluation; None where nothing was measured."""
    if not evaluation:
        return None
    comparison = evaluation.get("comparison")
    rows = _text_rows(comparison, evaluation.get("perplexity"))
    if comparison:
        base = _perplexity(comparison["baseline"])
        rows[1:1] = [_null(null, base) for null in evaluation.get("nulls", [])]
    rows += [_task(row) for row in evaluation["tasks"]]
    compared = evaluation.get("baseline") is not None
    return ScoreTable(tuple(rows), tuple(_notes(evaluation, compared)), compared) if rows else None


def _text_rows(comparison: Mapping[str, Any] | None, alone: Mapping[str, Any] | None) -> list[ScoreRow]:
    if comparison is None:
        return [ScoreRow("Perplexity", "lower", ABSENT, _perplexity(alone), ABSENT)] if alone else []
    base, pruned = comparison["baseline"], comparison["model"]
    keys = ("ratio", "loss_difference", "loss_difference_stderr", "kl", "kl_stderr", "top1_agreement")
    f = {key: to_float(comparison[key]) for key in keys}
    agreement = f["top1_agreement"]
    return [
        ScoreRow("Perplexity", "lower", _perplexity(base), _perplexity(pruned), f"{TIMES} {number(f['ratio'])}"),
        ScoreRow(
            "Loss, nats per token",
            "lower",
            number(to_float(base["loss"])),
            number(to_float(pruned["loss"])),
            with_error(f["loss_difference"], f["loss_difference_stderr"], sign=True),
        ),
        ScoreRow("KL divergence to base, nats per token", "lower", ABSENT, with_error(f["kl"], f["kl_stderr"]), ABSENT),
        ScoreRow(
            "Same likeliest next token",
            "higher",
            ABSENT,
            ABSENT if agreement is None else f"{agreement:.1%}",
            ABSENT,
        ),
    ]


def _null(null: Mapping[str, Any], base: str) -> ScoreRow:
    name = f"Perplexity of null {null['name']}"
    return ScoreRow(name, "", base, _perplexity(null), f"{TIMES} {number(to_float(null['ratio']))}")


def _perplexity(facts: Mapping[str, Any]) -> str:
    return with_error(to_float(facts["perplexity"]), to_float(facts["stderr"]))


def _task(row: Mapping[str, Any]) -> ScoreRow:
    f = {
        key: to_float(row[key])
        for key in ("value", "stderr", "baseline", "baseline_stderr", "difference", "difference_stderr")
    }
    documents = f" ({row['samples']:,} documents)" if row["samples"] else ""
    return ScoreRow(
        name=f"{row['task']}: {row['metric']}{documents}",
        better={True: "higher", False: "lower", None: ""}[row["higher_is_better"]],
        base=with_error(f["baseline"], f["baseline_stderr"]),
        pruned=with_error(f["value"], f["stderr"]),
        difference=with_error(f["difference"], f["difference_stderr"], sign=True),
    )


def _notes(evaluation: Mapping[str, Any], compared: bool) -> list[str]:
    notes = []
    if text := evaluation.get("perplexity"):
        prompt = f", the first {text['prompt']:,} of each a prompt that is not scored" if text.get("prompt") else ""
        notes.append(
            f"Text: {text['source']}; {text['tokens']:,} predicted tokens, sequence length "
            f"{text['sequence_length']:,}{prompt}."
        )
    if evaluation["tasks"]:
        limit = evaluation.get("limit")
        shots = evaluation.get("num_fewshot")
        notes.append(
            f"Tasks: lm-eval, {f'first {limit:,} documents of each' if limit else 'all documents'}, "
            f"{'examples in the prompt as the task says' if shots is None else f'{shots} examples in the prompt'}."
        )
    if left_out := evaluation.get("left_out"):
        notes.append(left_out_note(left_out))
    notes += [f"Null {null['name']}: {NULLS[null['name']]}." for null in evaluation.get("nulls", [])]
    paired = " Differences are paired by block and by document." if compared else ""
    notes.append(f"± is one standard error.{paired}")
    return notes
