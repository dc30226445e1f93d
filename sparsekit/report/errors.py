"""The errors of each kind of matrix as a table, with what chance and a uniform allocation do beside them."""

from __future__ import annotations

from sparsekit.report.summary import Group, Summary
from sparsekit.report.text import number


def error_table(summary: Summary) -> tuple[list[str], list[list[str]], str]:
    """Return header, rows (each kind, then all) and what the columns mean, in words."""
    uniform = summary.whole.mean("uniform_error") is not None
    header = ["matrices", "count", "sparsity", "weight error", "output error", "random mask"]
    groups = {**summary.by_kind(), "all": summary.whole}
    rows = [_row(name, group, uniform=uniform) for name, group in groups.items()]
    measure = summary.measure.replace("_", " ")
    meaning = f"Random mask: the {measure} expected of a random mask of as many weights, which stay as they are."
    if uniform:
        header.append("uniform")
        meaning += f" Uniform: the {measure} where every matrix has the stage's sparsity, on the same inputs."
    return header, rows, meaning


def _row(name: str, group: Group, *, uniform: bool) -> list[str]:
    measures = ["weight_error", "output_error", "random_error", *(["uniform_error"] if uniform else [])]
    cells = [number(group.mean(measure)) for measure in measures]
    return [name, f"{len(group.linears):,}", f"{group.sparsity:.4f}", *cells]
