"""Quality gates: a report against the least quality a recipe or command line asks for."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field

from sparsekit.evaluate.evaluation import EvaluationReport


@dataclass(frozen=True)
class GatesSpec:
    """Least quality; None and an empty mapping ask for nothing.

    Attributes:
        max_perplexity_ratio: Highest perplexity of the model over that of the baseline.
        max_kl: Highest KL divergence to the baseline, nats per token.
        min_metrics: Lowest value per `task/metric`.
    """

    max_perplexity_ratio: float | None = None
    max_kl: float | None = None
    min_metrics: Mapping[str, float] = field(default_factory=dict)


def check(gates: GatesSpec, report: EvaluationReport) -> list[str]:
    """Return one sentence for each gate that was not met, with got versus needed.

    A gate on something that was not measured, or that came out as no number, counts as missed.
    """
    comparison = report.comparison
    missed = []
    for name, highest, got in (
        ("perplexity ratio", gates.max_perplexity_ratio, comparison.ratio if comparison else None),
        ("KL divergence", gates.max_kl, comparison.kl if comparison else None),
    ):
        if highest is None:
            continue
        if got is None:
            missed.append(f"{name} was not measured, need at most {highest:g}; give a baseline and a text")
        elif not got <= highest:  # NaN on either side is a miss
            missed.append(f"{name} is {got:.4g}, need at most {highest:g} ({_measured_on(report)})")
    values = {f"{row.task}/{row.metric}": row for row in report.tasks}
    for key, lowest in sorted(gates.min_metrics.items()):
        row = values.get(key)
        if row is None:
            near = difflib.get_close_matches(key, values, n=1, cutoff=0.5)
            guess = f"; did you mean {near[0]!r}?" if near else ""
            missed.append(f"{key} was not measured, need at least {lowest:g}{guess}")
        elif not row.value >= lowest:
            documents = f" ({row.samples} documents)" if row.samples else ""
            missed.append(f"{key} is {row.value:.4g}, need at least {lowest:g}{documents}")
    return missed


def _measured_on(report: EvaluationReport) -> str:
    text = report.perplexity
    return f"{text.tokens:,} tokens of {text.source}, sequence length {text.sequence_length}" if text else ""
