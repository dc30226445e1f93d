"""The model card: README.md with the front matter the Hub reads, above the card of the source model."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparsekit.recipe.load import dump_yaml
from sparsekit.report.activations import asked, carries_over, kind_rows, skipped
from sparsekit.report.errors import error_table
from sparsekit.report.scores import ScoreTable, score_table
from sparsekit.report.search import search_panels
from sparsekit.report.summary import Summary, pruned, reshaped, skips, summarise
from sparsekit.report.text import Scrubber, is_hub_id, is_packed, number, percent, to_float
from sparsekit.units import bytes_text, seconds_text

README = "README.md"
SLOW = 0.4
"""Share of the weights below which leaving them out is not expected to save time."""
# What a source's card says about the source alone: its scores, its names, how it was made.
_OF_THE_SOURCE_ALONE = ("model-index", "eval_results", "model_name", "base_model_relation", "new_version", "widget")
_FRONT_MATTER = re.compile(r"\A(\ufeff?\s*---[ \t]*\r?\n)(.*?)(\r?\n---[ \t]*(\r?\n|\Z))", re.DOTALL)


@dataclass(frozen=True)
class SourceCard:
    """The card of the source model.

    Attributes:
        data: Front matter; empty where there is none, or none that can be read.
        text: The rest.
        problem: Why the front matter could not be read, None if it could.
    """

    data: Mapping[str, Any]
    text: str
    problem: str | None = None


def hub_id(report: Mapping[str, Any]) -> str | None:
    """Return the source's id if it came from the Hub: only then is there a revision."""
    model = report["model"]
    return model["name"] if model["revision"] is not None and is_hub_id(model["name"]) else None


def scrubber(report: Mapping[str, Any]) -> Scrubber:
    """Return what takes this machine's paths out of a text about `report`."""
    model, evaluation = report["model"], report.get("evaluation") or {}
    local = {model["name"]} if hub_id(report) is None else set()
    local |= {evaluation.get("model") or "", evaluation.get("baseline") or ""} - {model["name"]}
    return Scrubber({path: re.split(r"[/\\]", path.rstrip("/\\"))[-1] for path in local if re.search(r"[/\\]", path)})


def model_card(report: Mapping[str, Any], source_folder: Path) -> str:
    """Return the text of README.md.

    Args:
        report: Content of report.json.
        source_folder: Folder of the source model, whose own card stands below, its front matter merged.
    """
    from huggingface_hub import ModelCard

    source = read_source_card(source_folder)
    front = _front_matter(report, source)
    return str(ModelCard(f"---\n{front}\n---\n\n{_body(report, source)}"))


def read_source_card(folder: Path) -> SourceCard:
    """Return the card of a model folder; damaged front matter stays where it was, as text."""
    import yaml

    file = folder / README
    if not file.is_file():
        return SourceCard({}, "")
    content = file.read_bytes().decode("utf-8", errors="replace").replace("\r\n", "\n")
    match = _FRONT_MATTER.match(content)
    if match is None:
        return SourceCard({}, content)
    try:
        data = yaml.safe_load(match[2])
    except yaml.YAMLError:
        return SourceCard({}, content, "it is not valid YAML")
    if data is None:
        data = {}
    if not isinstance(data, dict) or not all(isinstance(key, str) for key in data):
        return SourceCard({}, content, "it is not a mapping")
    return SourceCard(data, content[match.end() :])


def _front_matter(report: Mapping[str, Any], source: SourceCard) -> str:
    """Return the YAML: the source's own (license, language, data sets), with what is true of the pruned model."""
    from huggingface_hub import ModelCardData

    data = {key: value for key, value in source.data.items() if key not in _OF_THE_SOURCE_ALONE}
    for key in ("base_model", "library_name", "pipeline_tag", "tags"):
        data.pop(key, None)
    tags = source.data.get("tags") or []
    tags = [str(tag) for tag in tags] if isinstance(tags, list) else [str(tags)]
    card = ModelCardData(
        base_model=_base_model(report, source),
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=[*dict.fromkeys([*tags, *_tags(report)])],
    )
    for key, value in data.items():
        card[key] = value
    yaml: str = card.to_yaml()
    return yaml


def _tags(report: Mapping[str, Any]) -> list[str]:
    """Return the tags that are added to the source's."""
    said = report.get("activations")
    stages = [*report.get("reshapes", ()), *report["stages"], *([said] if said else [])]
    kinds = [*(["pruned", "sparse"] if pruned(report) else []), *(["activation-sparsity"] if said else [])]
    return ["sparsekit", *kinds, *sorted({str(stage["method"]) for stage in stages})]


def _base_model(report: Mapping[str, Any], source: SourceCard) -> str | list[str] | None:
    """Return the source's Hub id; for a local source the ids its own card names, since ours descends from them."""
    if found := hub_id(report):
        return found
    named = source.data.get("base_model")
    ids = [item for item in (named if isinstance(named, list) else [named]) if isinstance(item, str)]
    ids = [item for item in ids if is_hub_id(item) and "/" in item]
    return ids[0] if len(ids) == 1 else ids or None


# --- body --------------------------------------------------------------------------------------------------
def _body(report: Mapping[str, Any], source: SourceCard) -> str:
    summary, clean = summarise(report), scrubber(report)
    label = clean.text(report["model"]["label"])
    how = "pruned with" if pruned(report) else "activation sparsity by"
    said = report.get("activations")
    parts = [
        f"# {escape(label)}, {how} {escape(report['recipe']['name'])}",
        _what(report, summary, label),
        "Made with this command:",
        fenced(_command(report, clean), "bash"),
        "## What it cost",
        _scores(report, clean),
        *[panel.verdict for panel in search_panels(report)],
        *(["## What is skipped", *_skipped(said)] if said else []),
        *(["## What changed", _kinds(summary), _blocks(summary)] if report["stages"] else []),
        "## How to load",
        *_loading(report),
        "## Limits",
        _limits(report, summary),
        "## Recipe",
        fenced(dump_yaml(clean.value(report["recipe"])).rstrip("\n"), "yaml"),
        _versions(report),
    ]
    if source.text.strip():
        damaged = f" Its front matter is shown as text: {source.problem}." if source.problem else ""
        parts += ["---", f"*The card of the source model follows.{damaged}*", source.text.strip()]
    return "\n\n".join(parts) + "\n"


def _loading(report: Mapping[str, Any]) -> list[str]:
    if is_packed(report):
        gates = " Its gates come with the weights." if report.get("activations") else ""
        return [
            fenced(f"import sparsekit  # lets transformers read packed weights\n{_LOAD}", "python"),
            f"Pruned weights are stored packed.{gates} Without sparsekit the folder does not load; `sparsekit convert` "
            "makes it an ordinary checkpoint, bit for bit.",
        ]
    ordinary = "The folder is an ordinary Hugging Face checkpoint"
    if report["stages"]:
        ordinary += ": pruned weights are stored as zeros in dense tensors"
    elif report.get("reshapes"):
        ordinary += "; only where its weights are called `sparsekit_model` do they need `import sparsekit` first"
    if not report.get("activations"):
        return [fenced(_LOAD, "python"), f"{ordinary}."]
    return [
        fenced(_LOAD_GATED, "python"),
        f"{ordinary}. Plain `from_pretrained` runs it dense: only `sparsekit.load`, `sparsekit generate` and "
        "`sparsekit eval` read the thresholds beside the weights and skip what lies below them.",
    ]


_LOAD = """from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "."  # this folder, or its id on the Hub
model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
tokenizer = AutoTokenizer.from_pretrained(folder)"""

_LOAD_GATED = """import sparsekit
from transformers import AutoTokenizer

folder = "."  # this folder, or its id on the Hub
model = sparsekit.load(folder)
tokenizer = AutoTokenizer.from_pretrained(folder)"""


def _skipped(said: Mapping[str, Any]) -> list[str]:
    """Return what an activation stage skips, with the tokens it does so for beside the numbers."""
    readings = [("calibration text kept apart", said["held_out"]), *said["other_text"].items()]
    texts = [
        [escape(name), f"{of['tokens']:,}", percent(of["sparsity"]), number(to_float(of["perplexity_ratio"]))]
        for name, of in readings
    ]
    rows = [[code(kind) if kind != "all" else kind, *cells] for kind, *cells in kind_rows(said)]
    return [
        f"{asked(said)} {skipped(said)} Thinned out: {said['protocol']}.",
        table(["text", "tokens", "sparsity", "perplexity, times dense"], texts),
        *carries_over(said),
        "Asked for and achieved on the text kept apart, by kind of signal; spread over tokens, and what eight tokens "
        f"in a row drop together.\n\n{table(['signal', 'count', 'asked', 'achieved', 'spread', 'shared by 8'], rows)}",
    ]


def _overrides(stage: Mapping[str, Any]) -> str:
    """Return what the recipe fixes by name, as the end of a clause."""
    fixed = [f"{code(name)} at {value:g}" for name, value in stage["overrides"].items()]
    return f", with {', '.join(fixed)}" if fixed else ""


def _what(report: Mapping[str, Any], summary: Summary, label: str) -> str:
    base = hub_id(report)
    name = f"[{escape(base)}](https://huggingface.co/{base})" if base else f"**{escape(label)}**"
    revision = f" (revision {code(report['model']['revision'][:12])})" if base else ""
    steps = "; then ".join(
        f"{code(stage['method'])} at sparsity {stage['sparsity']:g}, pattern {code(stage['pattern'])}, "
        f"distributed by {code(stage['allocate'])}{_overrides(stage)}"
        for stage in report["stages"]
    )
    calibration = report["calibration"]
    text = "No calibration text was needed."
    if calibration:
        text = (
            f"Calibration text: {escape(scrubber(report).text(calibration['source']))}, {calibration['samples']:,} x "
            f"{calibration['sequence_length']:,} tokens."
        )
    done = "made smaller after training" if pruned(report) else "its activations made sparse after training"
    parts = [f"This is {name}{revision}, {done}, without retraining."]
    if report.get("reshapes"):
        how = "; then ".join(f"{code(change['method'])}, {_plan(change['plan'])}" for change in report["reshapes"])
        parts.append(f"It has {reshaped(report)}: {how}.")
    if steps:
        blocks = report["reshapes"][-1]["blocks"] if report.get("reshapes") else report["model"]["blocks"]
        parts.append(
            f"{percent(summary.sparsity)} of the weights in {summary.with_zeros:,} matrices of its {blocks:,} blocks "
            f"are zero: {steps}. The pruned matrices hold {percent(summary.coverage)} of the block weights; "
            "embeddings, norms, routers and the output head were left as they were."
        )
    if said := report.get("activations"):
        kept = "" if pruned(report) else " No weight was changed."
        parts.append(
            f"At run time it skips {percent(skips(report))} of the block weights per token by {code(said['method'])}: "
            f"those that small activations would be multiplied with.{kept}"
        )
    return " ".join([*parts, text])


def _plan(plan: Mapping[str, Any]) -> str:
    """Return what a reshaper decided, in words."""
    return ", ".join(f"{key}: {escape(str(value))}" for key, value in plan.items())


def _command(report: Mapping[str, Any], clean: Scrubber) -> str:
    words = [clean.argument(str(word)) for word in report["command"]]
    if not words:
        return f"# called from Python with recipe {clean.text(report['recipe']['name'])!r}, see below"
    return shlex.join(words)


def _scores(report: Mapping[str, Any], clean: Scrubber) -> str:
    found = score_table(clean.value(report["evaluation"]))
    if found is None:
        return f"The {_made(report)} model was not evaluated in this run. Measure it before you rely on it."
    missed = [f"- Quality gate missed: {escape(clean.text(text))}" for text in report["missed_gates"]]
    return "\n".join([_score_rows(found, _made(report)), "", *(f"- {escape(note)}" for note in found.notes), *missed])


def _made(report: Mapping[str, Any]) -> str:
    """Return what the model is called beside the one it was made from."""
    return "pruned" if pruned(report) else "sparse"


def _score_rows(found: ScoreTable, made: str) -> str:
    def name(index: int) -> str:
        better = found.rows[index].better
        return escape(found.rows[index].name) + (f" ({better} is better)" if better else "")

    rows = enumerate(found.rows)
    if not found.compared:
        return table(["", made], [[name(index), row.pruned] for index, row in rows])
    return table(
        ["", "base", made, "difference"],
        [[name(index), row.base, row.pruned, row.difference] for index, row in rows],
    )


def _kinds(summary: Summary) -> str:
    header, rows, meaning = error_table(summary)
    rows = [[code(name) if name != "all" else name, *cells] for name, *cells in rows]
    return (
        "Relative squared error, mean over matrices weighted by size; without the inputs' gram matrix the output error "
        f"takes inputs as uncorrelated. {meaning}\n\n{table(header, rows)}"
    )


def _blocks(summary: Summary) -> str:
    rows = []
    for index, group in summary.by_block().items():
        worst = max(group.linears, key=lambda linear: linear.output_error or linear.weight_error or 0.0)
        rows.append(
            [
                str(index),
                f"{group.sparsity:.3f}",
                number(group.mean("weight_error")),
                number(group.mean("output_error")),
                code(worst.kind),
            ]
        )
    header = ["block", "sparsity", "weight error", "output error", "most changed"]
    return f"The same by block; every matrix, with charts, is in `report.html`.\n\n{table(header, rows)}"


def _limits(report: Mapping[str, Any], summary: Summary) -> str:
    before, after = report["bytes"]["source"], report["bytes"]["output"]
    files = f"Files are {bytes_text(after)} ({bytes_text(before)} before)"
    dense = "zeros in dense tensors take as much room as other numbers, and plain transformers computes with them at "
    lines = [
        f"{files}." if is_packed(report) or not report["stages"] else f"{files}: {dense}the same speed.",
    ]
    if pruned(report):
        lines.append(
            "Fine-tuning, or merging an adapter, fills zeros again unless the mask is kept; `sparsekit inspect` shows "
            "it."
        )
    if report.get("activations"):
        lines += _activation_limits(report)
    if report["evaluation"]:
        lines.append(
            "Quality was measured on the text and tasks above only; other languages, domains and safety behaviour "
            "were not."
        )
    if report["stages"] and summary.coverage < 1:
        lines.append(f"{percent(1 - summary.coverage)} of the block weights stayed dense.")
    return "\n".join(f"- {line}" for line in lines)


def _activation_limits(report: Mapping[str, Any]) -> list[str]:
    share = skips(report)
    little = f"; here it is {percent(share)}" if share < SLOW else ""
    return [
        "Thresholds belong to exactly these weights: after fine-tuning or merging an adapter, calibrate again.",
        f"Time is saved when text is generated, one sequence at a time. No speed-up is expected below about {SLOW:.0%} "
        f"skipped weights{little}, in batches (what one sequence skips another one needs), while a prompt is read, or "
        "without the CPU kernels of sparsekit.",
        f"What was measured holds for this protocol: {report['activations']['protocol']}. Multi-step reasoning is "
        "known to suffer first: measure with tasks that generate text, such as `sparsekit_continue`.",
    ]


def _versions(report: Mapping[str, Any]) -> str:
    tools = ", ".join(f"{name} {version}" for name, version in report["tools"].items())
    return f"Run {code(report['run_id'])}, {seconds_text(report['seconds'])}, with {escape(tools)}."


# --- markdown ----------------------------------------------------------------------------------------------
def escape(text: str) -> str:
    """Return text that Markdown shows as it is, on one line."""
    flat = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    flat = flat.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    # An underscore inside a word is text already; elsewhere it would start emphasis.
    flat = re.sub(r"([\\`*\[\]|~#!])", r"\\\1", flat)
    return re.sub(r"(?<!\w)_|_(?!\w)", r"\\_", flat)


def code(text: str) -> str:
    """Return inline code."""
    flat = " ".join(str(text).split()).replace("|", "\\|")
    ticks = "`" * (1 + max((len(run) for run in re.findall(r"`+", flat)), default=0))
    return f"{ticks} {flat} {ticks}" if "`" in flat else f"`{flat}`"


def fenced(text: str, language: str) -> str:
    """Return a code block whose content cannot end it."""
    ticks = "`" * max(3, 1 + max((len(run) for run in re.findall(r"`+", text)), default=0))
    return f"{ticks}{language}\n{text}\n{ticks}"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table, all columns but the first aligned to the right."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
