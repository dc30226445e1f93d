"""An evaluation as a table, for the terminal and for model cards."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from pathlib import PurePath

from sparsekit.evaluate.evaluation import EvaluationReport, TaskRow
from sparsekit.recipe.nulls import NULLS
from sparsekit.recipe.optional import left_out_note

WIDTH = 80

_ABSENT = "-"


def render_table(report: EvaluationReport) -> str:
    """Return `report` as plain text, no line longer than WIDTH."""
    header, rows = _cells(report)
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    widths[0] = min(widths[0], WIDTH - sum(widths[1:]) - 2 * (len(widths) - 1))
    lines = [_line(header, widths), "-" * (sum(widths) + 2 * (len(widths) - 1))]
    for row in rows:
        name = textwrap.wrap(row[0], widths[0], subsequent_indent=" ") or [""]
        lines += [*name[:-1], _line([name[-1], *row[1:]], widths)]
    notes = [line for note in _notes(report) for line in textwrap.wrap(note, WIDTH, subsequent_indent="  ")]
    return "\n".join([*lines, "", *notes]) + "\n"


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    first = cells[0].ljust(widths[0])
    return "  ".join([first, *(c.rjust(w) for c, w in zip(cells[1:], widths[1:], strict=True))]).rstrip()


def _cells(report: EvaluationReport) -> tuple[list[str], list[list[str]]]:
    if report.baseline is None:
        text = report.perplexity
        rows = [["perplexity", _number(text.perplexity, text.stderr)]] if text else []
        rows += [[_task_name(row), _number(row.value, row.stderr)] for row in report.tasks]
        return ["", "model"], rows
    rows = _compared(report)
    rows += [
        [
            _task_name(row),
            _number(row.baseline, row.baseline_stderr),
            _number(row.value, row.stderr),
            _number(row.difference, row.difference_stderr, sign=True),
        ]
        for row in report.tasks
    ]
    return ["", "baseline", "model", "difference"], rows


def _compared(report: EvaluationReport) -> list[list[str]]:
    both = report.comparison
    if both is None:
        return []
    baseline = _number(both.baseline.perplexity, both.baseline.stderr)
    measured = [("perplexity", both.model.perplexity, both.model.stderr, both.ratio)]
    measured += [(f"  null {null.name}", null.perplexity, null.stderr, null.ratio) for null in report.nulls]
    return [
        *([name, baseline, _number(value, stderr), f"x {_plain(ratio)}"] for name, value, stderr, ratio in measured),
        [
            "loss, nats/token",
            _number(both.baseline.loss, None),
            _number(both.model.loss, None),
            _number(both.loss_difference, both.loss_difference_stderr, sign=True),
        ],
        ["KL to baseline, nats/token", _ABSENT, _number(both.kl, both.kl_stderr), _ABSENT],
        ["same likeliest token", _ABSENT, f"{both.top1_agreement:.1%}", _ABSENT],
    ]


def _task_name(row: TaskRow) -> str:
    lower = ", lower is better" if row.higher_is_better is False else ""
    documents = f", n={row.samples}" if row.samples else ""
    return f"{row.task} {row.metric}{documents}{lower}"


def _notes(report: EvaluationReport) -> list[str]:
    notes = [f"model: {_short(report.model)}"]
    if report.baseline is not None:
        notes.append(f"baseline: {_short(report.baseline)}")
    if report.perplexity is not None:
        text = report.perplexity
        prompt = f", the first {text.prompt:,} of each a prompt that is not scored" if text.prompt else ""
        notes.append(f"text: {text.source}; {text.tokens:,} tokens, sequence length {text.sequence_length:,}{prompt}")
    notes += [f"null {null.name}: {NULLS[null.name]}" for null in report.nulls]
    if report.tasks:
        limit = f"first {report.limit} documents of each task" if report.limit else "all documents"
        shots = "as the task says" if report.num_fewshot is None else str(report.num_fewshot)
        notes.append(f"tasks: lm-eval, {limit}, examples in the prompt: {shots}")
    if report.left_out:
        notes.append(left_out_note(report.left_out))
    if report.perplexity is not None or report.tasks:
        paired = "; differences are paired by block and document" if report.baseline is not None else ""
        notes.append(f"± is one standard error{paired}")
    return notes


def _short(name: str) -> str:
    """Return a Hub id as it is, a folder by its last part: tables are published, paths are not."""
    path = PurePath(name)
    return path.name if path.is_absolute() or len(path.parts) > 2 else name


def _number(value: float | None, stderr: float | None, *, sign: bool = False) -> str:
    if value is None:
        return _ABSENT
    if not stderr or not math.isfinite(stderr) or not math.isfinite(value):
        return _plain(value, sign=sign)
    decimals = 1 - math.floor(math.log10(stderr))  # two digits of the error decide those of the value
    if not 0 <= decimals <= 6:
        return f"{_plain(value, sign=sign)} ± {_plain(stderr)}"
    return f"{value:{'+' if sign else ''},.{decimals}f} ± {stderr:,.{decimals}f}"


def _plain(value: float, *, sign: bool = False) -> str:
    """Return four significant digits, without an exponent between 0.0001 and 100,000."""
    plus = "+" if sign and value >= 0 else ""
    if value == 0 or not math.isfinite(value):
        return f"{plus}{value:.0f}"
    magnitude = math.floor(math.log10(abs(value)))
    if not -4 <= magnitude < 5:
        return f"{plus}{value:.3g}"
    return f"{plus}{value:,.{max(0, 3 - magnitude)}f}"
