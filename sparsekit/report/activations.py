"""What an activation stage skips, as tables and charts: asked beside achieved, by kind of signal, text and block."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sparsekit.report.charts import WIDTH, Cell, LineChart, Mark, block_chart
from sparsekit.report.summary import block_and_kind
from sparsekit.report.text import ABSENT, TIMES, number, percent, to_float
from sparsekit.units import bytes_text, count_text

FAR = 0.02
"""Difference in sparsity between texts from which the page warns."""
_HELD_OUT = "calibration text kept apart"
_PER_ROW = 3  # histograms beside each other
_BARS_HEIGHT = 84.0
_TITLE = 20.0
_GAP = 30.0


@dataclass(frozen=True)
class Histogram:
    """How many entries of one kind of signal are kept how often, as bars from never (left) to always (right).

    Attributes:
        title: The kind.
        bars: Rectangles of the common drawing.
        left, right: Ends of the axis.
    """

    title: Mark
    bars: tuple[Cell, ...]
    left: Mark
    right: Mark


@dataclass(frozen=True)
class ActivationPanel:
    """An activation stage, ready to be shown.

    Attributes:
        name: The method.
        remark: What was asked for, and what is read for a token.
        protocol: Which tokens are thinned out.
        warnings: Texts on which it does something else.
        header, rows: A row for each kind of signal, then all together.
        texts_header, texts: A row for each text that it was measured on.
        search_header, search: Steps of the search that a budget asked for; no rows without one.
        chart: Achieved by block, and what was asked for.
        usage: A histogram for each kind.
        usage_height: Of their drawing, in SVG units of `charts.WIDTH`.
    """

    name: str
    remark: str
    protocol: str
    warnings: list[str]
    header: list[str]
    rows: list[list[str]]
    texts_header: list[str]
    texts: list[list[str]]
    search_header: list[str]
    search: list[list[str]]
    chart: LineChart
    usage: list[Histogram]
    usage_height: float


def activation_panel(report: Mapping[str, Any]) -> ActivationPanel | None:
    """Return the panel of the activation stage; None without one."""
    said = report.get("activations")
    if not said:
        return None
    texts = {_HELD_OUT: said["held_out"], **said["other_text"]}
    histograms = _histograms(said["usage"])
    return ActivationPanel(
        name=said["method"],
        remark=f"{asked(said)} {skipped(said)}",
        protocol=said["protocol"],
        warnings=carries_over(said),
        header=["signal", "count", "asked", "achieved", "spread", "shared by 8"],
        rows=kind_rows(said),
        texts_header=["text", "tokens", "sparsity", "difference", "perplexity"],
        texts=[_text_row(name, reading, said["held_out"]) for name, reading in texts.items()],
        search_header=["sparsity", "perplexity"],
        search=[[percent(step["sparsity"]), _ratio(step["ratio"])] for step in said["search"]],
        chart=_chart(said["signals"]),
        usage=histograms,
        usage_height=-(-len(histograms) // _PER_ROW) * (_TITLE + _BARS_HEIGHT + _GAP),
    )


def asked(said: Mapping[str, Any]) -> str:
    """Return what the stage was asked for, as a sentence."""
    spread = f"distributed by {said['allocate']}, thresholds taken behind {said['propagate']} blocks"
    if said["budget"]:
        rise = said["budget"]["perplexity"]
        return f"At most {rise:+.2%} perplexity allowed {percent(said['found_sparsity'])} sparsity, {spread}."
    return f"Asked for {percent(said['sparsity'])} of the weights that can be skipped, {spread}."


def skipped(said: Mapping[str, Any]) -> str:
    """Return what is read for a token, as a sentence; of dense weights, blocks and head."""
    weights, size = said["weights_per_token"], said["bytes_per_token"]
    return (
        f"For a token {count_text(weights['read'])} of {count_text(weights['dense'])} weights are read "
        f"({bytes_text(size['dense'])} -> {bytes_text(size['read'])} where they are stored dense), "
        f"{percent(weights['read'] / weights['dense'])}; "
        f"{percent(said['coverage'])} of the block weights can be skipped."
    )


def carries_over(said: Mapping[str, Any]) -> list[str]:
    """Return a warning for every text on which the sparsity is another one than on calibration text."""
    here = said["held_out"]["sparsity"]
    return [
        f"On {name} the sparsity is {percent(reading['sparsity'])}, {100 * (reading['sparsity'] - here):+.1f} points "
        "from that on calibration text: thresholds belong to the kind of text that they were calibrated on."
        for name, reading in said["other_text"].items()
        if abs(reading["sparsity"] - here) >= FAR
    ]


def kind_rows(said: Mapping[str, Any]) -> list[list[str]]:
    """Return (kind, count, asked, achieved, spread, shared by 8 tokens) for each kind of signal, then for all.

    Means are weighted by the weights that a signal lets skip.
    """
    kinds: dict[str, list[Mapping[str, Any]]] = {}
    for name, facts in said["signals"].items():
        kinds.setdefault(block_and_kind(name)[1], []).append(facts)
    return [_kind_row(kind, signals) for kind, signals in [*kinds.items(), ("all", list(said["signals"].values()))]]


def _kind_row(kind: str, signals: Sequence[Mapping[str, Any]]) -> list[str]:
    shares = (_mean(signals, key) for key in ("asked", "achieved", "spread", "together_8"))
    return [kind, f"{len(signals):,}", *(ABSENT if share is None else f"{share:.3f}" for share in shares)]


def _mean(signals: Sequence[Mapping[str, Any]], key: str) -> float | None:
    """Return the mean weighted by the weights that can be skipped; None where none is known (too short a text)."""
    known = [(float(facts[key]), int(facts["numel"])) for facts in signals if str(facts[key]) != "nan"]
    return sum(value * numel for value, numel in known) / sum(numel for _, numel in known) if known else None


def _text_row(name: str, reading: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    points = ABSENT if reading is here else f"{100 * (reading['sparsity'] - here['sparsity']):+.1f} points"
    return [
        name,
        f"{reading['tokens']:,}",
        percent(reading["sparsity"]),
        points,
        _ratio(reading["perplexity_ratio"]),
    ]


def _ratio(value: Any) -> str:
    return f"{TIMES} {number(to_float(value))}"


def _chart(signals: Mapping[str, Mapping[str, Any]]) -> LineChart:
    blocks: dict[int, list[Mapping[str, Any]]] = {}
    for facts in signals.values():
        blocks.setdefault(facts["block"], []).append(facts)
    known = []
    marks = []
    for block, members in sorted(blocks.items()):
        achieved = [facts["achieved"] for facts in members]
        known.append((block, _mean(members, "achieved") or 0.0, (min(achieved), max(achieved))))
        marks.append(_mean(members, "asked") or 0.0)
    return block_chart("Achieved sparsity", known, marks, "asked")


def _histograms(usage: Mapping[str, Sequence[int]]) -> list[Histogram]:
    """Return the bars of all kinds, on one scale, in rows of _PER_ROW."""
    shares = {kind: [count / max(sum(counts), 1) for count in counts] for kind, counts in usage.items()}
    top = max((share for found in shares.values() for share in found), default=0) or 1.0
    cell = WIDTH / _PER_ROW
    found = []
    for position, (kind, counts) in enumerate(usage.items()):
        x, y = cell * (position % _PER_ROW), (_TITLE + _BARS_HEIGHT + _GAP) * (position // _PER_ROW)
        width, base = (cell - _GAP) / len(counts), y + _TITLE + _BARS_HEIGHT
        bars = tuple(
            Cell(
                round(x + width * i, 2),
                round(base - _BARS_HEIGHT * share / top, 2),
                round(width - 1, 2),
                round(_BARS_HEIGHT * share / top, 2),
                1.0,
                f"{kind}: kept for {100 * i / len(counts):.0f} to {100 * (i + 1) / len(counts):.0f} % of the tokens: "
                f"{counts[i]:,} entries ({percent(share)})",
            )
            for i, share in enumerate(shares[kind])
        )
        below = round(base + 15, 2)
        ends = Mark(round(x, 2), below, "never"), Mark(round(x + cell - _GAP, 2), below, "always")
        found.append(Histogram(Mark(round(x, 2), round(y + 13, 2), kind), bars, *ends))
    return found
