"""What a report says, added up: totals, per block, per kind of linear, and the one line that ends a run."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparsekit.report.text import percent, short, to_float
from sparsekit.units import bytes_text

_BLOCK = re.compile(r"^(?P<stack>.*?)\.(?P<block>\d+)\.(?P<rest>.+)$")
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)|^\d+(?=\.)|(?<=\.)\d+$")


@dataclass(frozen=True)
class LinearResult:
    """One pruned linear.

    Attributes:
        name: Dotted name.
        block: Number of its block.
        kind: Name inside the block; numbers, such as those of experts, are `*`.
        kept, numel: Weights kept, and all.
        weight_error: Squared change of the weights over their squares.
        output_error: The same for the outputs; without a gram matrix inputs are taken as uncorrelated, without
            calibration text it is None.
        random_error: What the output error is expected to be with a random mask of as many weights; the weight error
            where there is no output error.
        uniform_error: The same error at the stage's average sparsity; None where that is no cheap thing to know, or
            the stage is uniform.
    """

    name: str
    block: int
    kind: str
    kept: int
    numel: int
    weight_error: float | None
    output_error: float | None
    random_error: float | None = None
    uniform_error: float | None = None

    @property
    def sparsity(self) -> float:
        """Fraction of zeros."""
        return 1 - self.kept / self.numel


@dataclass(frozen=True)
class Group:
    """Several linears together: of one block, of one kind, of both, or all; errors are means weighted by size."""

    linears: tuple[LinearResult, ...]

    @property
    def numel(self) -> int:
        """Number of weights."""
        return sum(linear.numel for linear in self.linears)

    @property
    def sparsity(self) -> float:
        """Fraction of zeros."""
        return 1 - sum(linear.kept for linear in self.linears) / self.numel if self.linears else 0.0

    def mean(self, measure: str) -> float | None:
        """Return the mean of `sparsity` or of an error, weighted by size; None if unknown."""
        if measure == "sparsity":
            return self.sparsity
        known = [(getattr(linear, measure), linear.numel) for linear in self.linears]
        known = [(value, numel) for value, numel in known if value is not None]
        total = sum(numel for _, numel in known)
        return sum(value * numel for value, numel in known) / total if total else None

    def range(self, measure: str) -> tuple[float, float] | None:
        """Return the least and the greatest value among the linears; None if unknown."""
        known = [value for linear in self.linears if (value := getattr(linear, measure)) is not None]
        return (min(known), max(known)) if known else None


@dataclass(frozen=True)
class Summary:
    """The prune stages of a report taken together.

    Attributes:
        linears: Every pruned linear once, in model order.
        coverage: Share of all matrix weights of the blocks that were targets.
    """

    linears: tuple[LinearResult, ...]
    coverage: float

    @property
    def whole(self) -> Group:
        """All targets together."""
        return Group(self.linears)

    @property
    def sparsity(self) -> float:
        """Fraction of zeros in all targets."""
        return self.whole.sparsity

    @property
    def measure(self) -> str:
        """The error to look at: of the outputs where it was measured, else of the weights."""
        measured = any(linear.output_error is not None for linear in self.linears)
        return "output_error" if measured else "weight_error"

    @property
    def with_zeros(self) -> int:
        """Number of targets that lost weights."""
        return sum(linear.kept < linear.numel for linear in self.linears)

    def by_block(self) -> dict[int, Group]:
        """Return the linears of each block, blocks in order."""
        return _grouped(sorted(self.linears, key=lambda linear: linear.block), "block")

    def by_kind(self) -> dict[str, Group]:
        """Return the linears of each kind, in the order a block runs them."""
        return _grouped(self.linears, "kind")

    def worst(self, count: int) -> list[LinearResult]:
        """Return the `count` linears that changed most by `measure`."""
        known = [linear for linear in self.linears if getattr(linear, self.measure) is not None]
        return sorted(known, key=lambda linear: -getattr(linear, self.measure))[:count]

    def errors(self) -> dict[str, dict[str, Any]]:
        """Return, for report.json, the mean errors of each kind and of all, with those of the nulls beside them."""
        measures = ("sparsity", "weight_error", "output_error", "random_error", "uniform_error")
        groups = {**self.by_kind(), "all": self.whole}
        return {kind: {measure: group.mean(measure) for measure in measures} for kind, group in groups.items()}


def summarise(report: Mapping[str, Any]) -> Summary:
    """Add up the stages of a report.

    Where two stages prune the same linear its zeros are those of the sparser one: no stage brings a weight back.
    """
    found: dict[str, LinearResult] = {}
    whole = 0.0
    for stage in report["stages"]:
        whole = max(whole, stage["numel"] / stage["coverage"])
        for name, facts in stage["linears"].items():
            linear = _linear(name, facts)
            before = found.get(name)
            found[name] = linear if before is None or linear.kept <= before.kept else before
    linears = tuple(found.values())
    return Summary(linears, min(1.0, sum(linear.numel for linear in linears) / whole) if whole else 0.0)


def one_line(report: Mapping[str, Any], out: Path | str | None = None) -> str:
    """Return the last line of a run: zeros, coverage, what is skipped, bytes, perplexity, where it lies.

    Args:
        report: Content of report.json.
        out: The checkpoint folder; left out where None.
    """
    summary = summarise(report)
    parts = [reshaped(report)] if report.get("reshapes") else []
    if report["stages"]:
        parts.append(
            f"{summary.sparsity:.2f} zeros in {summary.with_zeros}/{len(summary.linears)} target matrices "
            f"({percent(summary.coverage)} of block weights)"
        )
    if report.get("activations"):
        parts.append(f"skips {percent(skips(report))} of the block weights per token")
    parts.append(f"{bytes_text(report['bytes']['source'])} -> {bytes_text(report['bytes']['output'])}")
    evaluation = report.get("evaluation") or {}
    if comparison := evaluation.get("comparison"):
        dense, pruned = (to_float(comparison[key]["perplexity"]) for key in ("baseline", "model"))
        ratio = to_float(comparison["ratio"])
        if dense is not None and pruned is not None and ratio is not None:
            nulls = "".join(
                f"; {null['name']} {short(float(null['perplexity']))} ({_times(float(null['ratio']))})"
                for null in evaluation.get("nulls", [])
            )
            parts.append(f"perplexity {short(dense)} -> {short(pruned)} ({_times(ratio)}){nulls}")
    elif evaluation.get("perplexity"):
        parts.append(f"perplexity {short(float(evaluation['perplexity']['perplexity']))}")
    if out is not None:
        parts.append(str(out))
    return ", ".join(parts)


def skips(report: Mapping[str, Any]) -> float:
    """Return the share of all block weights that an activation stage leaves unread for a token of held-out text."""
    said = report["activations"]
    return float(said["held_out"]["sparsity"] * said["coverage"])


def pruned(report: Mapping[str, Any]) -> bool:
    """Return whether any weight was changed; an activation stage alone leaves all as they were."""
    return bool(report["stages"] or report.get("reshapes"))


def reshaped(report: Mapping[str, Any]) -> str:
    """Return what is left of a model whose shape was changed: blocks and parameters."""
    last = report["reshapes"][-1]
    before, after = report["reshapes"][0]["parameters_before"], last["parameters_after"]
    return f"{last['blocks']} of {report['model']['blocks']} blocks, {percent(after / before)} of the parameters"


def _times(ratio: float) -> str:
    return f"{ratio:.2f}x" if ratio < 99.995 or math.isinf(ratio) else f"{short(ratio)}x"


def block_and_kind(name: str) -> tuple[int, str]:
    """Return in which block a module is, and its name there; numbers, such as those of experts, are `*`."""
    place = _BLOCK.match(name)
    return int(place["block"]) if place else 0, _NUMBER.sub("*", place["rest"] if place else name)


def _linear(name: str, facts: Mapping[str, Any]) -> LinearResult:
    block, kind = block_and_kind(name)
    return LinearResult(
        name=name,
        block=block,
        kind=kind,
        kept=int(facts["kept"]),
        numel=int(facts["numel"]),
        weight_error=to_float(facts.get("weight_error")),
        output_error=_output_error(facts),
        random_error=_null_error(facts, "random"),
        uniform_error=_null_error(facts, "uniform"),
    )


def _output_error(facts: Mapping[str, Any]) -> float | None:
    return to_float(facts.get("output_error", facts.get("output_error_diagonal")))


def _null_error(facts: Mapping[str, Any], null: str) -> float | None:
    found = facts.get("nulls", {}).get(null, {})
    measured = _output_error(found)
    return to_float(found.get("weight_error")) if measured is None else measured


def _grouped(linears: Iterable[LinearResult], key: str) -> dict[Any, Group]:
    groups: dict[Any, list[LinearResult]] = {}
    for linear in linears:
        groups.setdefault(getattr(linear, key), []).append(linear)
    return {name: Group(tuple(members)) for name, members in groups.items()}
