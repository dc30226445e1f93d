"""report.html: the whole report on one page that loads nothing from anywhere."""

from __future__ import annotations

import importlib.resources
import shlex
from collections.abc import Mapping
from typing import Any

from sparsekit.recipe.load import dump_yaml
from sparsekit.report import charts
from sparsekit.report.activations import activation_panel
from sparsekit.report.card import hub_id, scrubber
from sparsekit.report.errors import error_table
from sparsekit.report.reshape import reshape_panels
from sparsekit.report.scores import score_table
from sparsekit.report.search import search_panels
from sparsekit.report.summary import Summary, one_line, pruned, skips, summarise
from sparsekit.report.text import TIMES, Scrubber, is_packed, number, percent, short, to_float
from sparsekit.units import bytes_text, seconds_text

TEMPLATE = "report.html.j2"
_WORST = 12  # matrices in the list of the most changed


def html_page(report: Mapping[str, Any]) -> str:
    """Return the text of report.html; every text of the report is escaped, no path of this machine is in it."""
    import jinja2

    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    source = importlib.resources.files("sparsekit.report").joinpath(TEMPLATE).read_text(encoding="utf-8")
    clean = scrubber(report)
    summary = summarise(report)
    kinds_header, kinds, kinds_meaning = error_table(summary)
    lines = (charts.line_chart(summary, name) for name in ("output_error", "weight_error"))
    maps = (charts.heat_map(summary, name) for name in charts.MEASURES)
    return environment.from_string(source).render(
        title=f"{report['recipe']['name']} on {_name(report, clean)}",
        description=report["recipe"].get("description") or "",
        one_line=one_line(report),
        tiles=_tiles(report, summary),
        made="pruned" if pruned(report) else "sparse",
        scores=score_table(clean.value(report["evaluation"])),
        missed=clean.value(report["missed_gates"]),
        lines=[chart for chart in lines if chart],
        maps=[chart for chart in maps if chart],
        width=charts.WIDTH,
        searches=search_panels(report),
        reshapes=reshape_panels(report),
        activations=activation_panel(report),
        kinds_header=kinds_header,
        kinds=kinds,
        kinds_meaning=kinds_meaning,
        worst=[_linear_row(linear) for linear in summary.worst(_WORST)],
        worst_measure=summary.measure.replace("_", " "),
        blocks=_block_rows(summary),
        facts=_facts(report, summary, clean),
        ignored=[name for stage in report["stages"] for name in stage["ignored"]],
        notes=clean.value([note for stage in report["stages"] for note in stage["notes"]]),
        recipe=dump_yaml(clean.value(report["recipe"])).rstrip("\n"),
    )


def _name(report: Mapping[str, Any], clean: Scrubber) -> str:
    return hub_id(report) or clean.text(report["model"]["label"])


def _tiles(report: Mapping[str, Any], summary: Summary) -> list[tuple[str, str, str]]:
    """Return (what, figure, remark) of what is read first."""
    before, after = report["bytes"]["source"], report["bytes"]["output"]
    tiles = []
    if changes := report.get("reshapes"):
        share = changes[-1]["parameters_after"] / changes[0]["parameters_before"]
        tiles.append(("Parameters", percent(share), f"{changes[-1]['blocks']} of {report['model']['blocks']} blocks"))
    if report["stages"]:
        remark = (
            f"in {summary.with_zeros:,} of {len(summary.linears):,} target matrices, "
            f"{percent(summary.coverage)} of block weights"
        )
        tiles.append(("Zeros", percent(summary.sparsity), remark))
    if said := report.get("activations"):
        remark = f"of the block weights per token, by {said['method']}; {said['protocol'].partition(';')[0]}"
        tiles.append(("Skipped", percent(skips(report)), remark))
    comparison = (report["evaluation"] or {}).get("comparison")
    if comparison:
        base, ours, ratio = (
            to_float(value)
            for value in (comparison["baseline"]["perplexity"], comparison["model"]["perplexity"], comparison["ratio"])
        )
        if base is not None and ours is not None and ratio is not None:
            nulls = "".join(
                f"; {null['name']} {TIMES}\N{NO-BREAK SPACE}{short(float(null['ratio']))}"
                for null in report["evaluation"].get("nulls", [])
            )
            remark = f"{short(base)} before, {short(ours)} after{nulls}"
            tiles.append(("Perplexity", f"{TIMES} {short(ratio)}", remark))
    room = "" if is_packed(report) or not report["stages"] else "; zeros in dense tensors still take room"
    tiles.append(("Files", bytes_text(after), f"{bytes_text(before)} before{room}"))
    memory = f"peak memory {bytes_text(report['peak_memory_bytes'])}"
    tiles.append(("Time", seconds_text(report["seconds"]), memory))
    return tiles


def _linear_row(linear: Any) -> list[str]:
    return [
        linear.name,
        f"{linear.sparsity:.3f}",
        number(linear.weight_error),
        number(linear.output_error),
        f"{linear.numel:,}",
    ]


def _block_rows(summary: Summary) -> list[list[str]]:
    return [
        [
            str(index),
            str(len(group.linears)),
            f"{group.sparsity:.4f}",
            number(group.mean("weight_error")),
            number(group.mean("output_error")),
        ]
        for index, group in summary.by_block().items()
    ]


def _facts(report: Mapping[str, Any], summary: Summary, clean: Scrubber) -> list[tuple[str, list[tuple[str, str]]]]:
    """Return (heading, [(what, value)])."""
    model, calibration = report["model"], report["calibration"]
    source = [("name", _name(report, clean)), ("architecture", model["model_type"]), ("blocks", f"{model['blocks']:,}")]
    source += [("dtype", model["dtype"])]
    if model["revision"]:
        source.append(("revision", model["revision"]))
    source += [(f"sha256 of {name}", digest) for name, digest in model["files"].items()]
    text = [("calibration text", "none needed")]
    if calibration:
        text = [
            ("source", clean.text(calibration["source"])),
            ("amount", f"{calibration['samples']:,} {TIMES} {calibration['sequence_length']:,} tokens"),
            ("fingerprint", calibration["fingerprint"]),
        ]
    run = [
        ("command", shlex.join(clean.argument(str(word)) for word in report["command"]) or "called from Python"),
        ("run", report["run_id"]),
        ("time", seconds_text(report["seconds"])),
        ("peak memory", bytes_text(report["peak_memory_bytes"])),
        ("bytes before", f"{report['bytes']['source']:,}"),
        ("bytes after", f"{report['bytes']['output']:,}"),
    ]
    resumed = sum(stage["resumed_blocks"] for stage in report["stages"])
    if resumed:
        run.append(("blocks taken from an interrupted run", f"{resumed:,}"))
    facts = [("Source model", source), ("Calibration", text), ("Run", run)]
    for position, change in enumerate(changes := report.get("reshapes", [])):
        facts.append((f"Stage {position}: {change['method']}", _reshape(change)))
    for position, stage in enumerate(report["stages"], len(changes)):
        facts.append((f"Stage {position}: {stage['method']}", _stage(stage)))
    if said := report.get("activations"):
        facts.append((f"Stage {len(report['recipe']['stages']) - 1}: {said['method']}", _activations(said)))
    return [*facts, ("Versions", list(report["tools"].items()))]


def _reshape(change: Mapping[str, Any]) -> list[tuple[str, str]]:
    options = ", ".join(f"{key} = {value}" for key, value in change["options"].items())
    return [
        ("options", options or "none"),
        *[(key, str(value)) for key, value in change["plan"].items()],
        ("blocks left", f"{change['blocks']:,}"),
        ("parameters", f"{change['parameters_after']:,} of {change['parameters_before']:,}"),
    ]


def _activations(said: Mapping[str, Any]) -> list[tuple[str, str]]:
    options = ", ".join(f"{key} = {value}" for key, value in said["options"].items())
    budget = [(f"budget: {key}", f"{value:+.2%}") for key, value in (said["budget"] or {}).items()]
    return [
        ("options", options or "none"),
        *budget,
        ("allocation", said["allocate"]),
        ("thresholds taken behind", f"{said['propagate']} blocks"),
        ("tokens", said["protocol"]),
        ("sparsity asked", f"{said['found_sparsity']:.6f}"),
        (
            "sparsity achieved",
            f"{said['held_out']['sparsity']:.6f} on {said['held_out']['tokens']:,} tokens kept apart",
        ),
        ("calibrations until it was met", f"{said['calibrations']:,}"),
        ("coverage of block weights", percent(said["coverage"])),
    ]


def _stage(stage: Mapping[str, Any]) -> list[tuple[str, str]]:
    options = ", ".join(f"{key} = {value}" for key, value in stage["options"].items())
    return [
        ("options", options or "none"),
        ("pattern", stage["pattern"]),
        ("allocation", stage["allocate"]),
        ("sparsity asked", f"{stage['sparsity']:g}"),
        *[(f"sparsity of {name}", f"{value:g}") for name, value in stage["overrides"].items()],
        ("sparsity achieved", f"{stage['achieved_sparsity']:.6f}"),
        ("weights kept", f"{stage['kept']:,} of {stage['numel']:,}"),
        ("coverage of block weights", percent(stage["coverage"])),
    ]
