"""`sparsekit bench`: a checkpoint beside its dense baseline, measured on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sparsekit.cli import render
from sparsekit.cli.options import Json, Quiet, TrustRemoteCode, Verbose

if TYPE_CHECKING:
    from sparsekit.benchmark.result import Benchmark, Contender, Layer, Metric

_TITLES = {"torch": "torch eager", "streaming": "tuned dense"}
_SHORT = {"torch": "x eager", "streaming": "x tuned"}


def bench(
    model: Annotated[str, typer.Argument(metavar="DIR", help="Checkpoint, packed or dense.")],
    baseline: Annotated[
        str | None,
        typer.Option("--baseline", metavar="MODEL", help="Dense model; default: what DIR was made from."),
    ] = None,
    prompt_tokens: Annotated[int, typer.Option("--prompt-tokens", min=1, help="Tokens of the prompt.")] = 128,
    new_tokens: Annotated[int, typer.Option("--new-tokens", min=2, help="Tokens made after it.")] = 32,
    rounds: Annotated[int, typer.Option("--rounds", min=1, help="Rounds that count; one more is dropped.")] = 5,
    threads: Annotated[int | None, typer.Option("--threads", min=1, help="Threads of every contender.")] = None,
    streaming: Annotated[
        bool, typer.Option("--streaming/--no-streaming", help="Measure a tuned dense kernel beside torch's.")
    ] = True,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of the random prompt.")] = 0,
    plot: Annotated[
        Path | None, typer.Option("--plot", metavar="FILE", help="Draw it: .png or .svg (extra: report).")
    ] = None,
    save: Annotated[Path | None, typer.Option("--save", metavar="FILE", help="Write the JSON document too.")] = None,
    trust_remote_code: TrustRemoteCode = False,
    quiet: Quiet = False,
    verbose: Verbose = 0,
    json: Json = False,
) -> None:
    """Measure speed, memory and disk beside the dense model, and every kernel."""
    from sparsekit.benchmark import plot as drawing
    from sparsekit.benchmark.result import write
    from sparsekit.benchmark.session import BenchRequest
    from sparsekit.benchmark.session import bench as run

    if plot is not None:
        drawing.require(plot)  # before minutes of measuring
    request = BenchRequest(
        model=model,
        baseline=baseline,
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        rounds=rounds,
        threads=threads,
        streaming=streaming,
        seed=seed,
        trust_remote_code=trust_remote_code,
    )
    with render.reporter(quiet=quiet) as reporter:
        found = run(request, reporter)
    if save is not None:
        write(found, save)
    if plot is not None:
        drawing.draw(found, plot)
    if json:
        render.emit_json(found.to_json())
    else:
        render.emit(page(found))


def page(found: Benchmark) -> str:
    """Return what is printed: facts, comparison, verdict, kernels, notes."""
    parts = [_facts(found), _comparison(found), _verdict(found), *([_layers(found)] if found.layers else [])]
    parts += [render.fill(f"note: {text}") for text in found.warnings]
    return "\n\n".join(parts)


def _facts(found: Benchmark) -> str:
    settings, machine, dense = found.settings, found.machine, found.contenders[1]
    cores = machine["cores"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items() if name != "safetensors")
    threads = f"{settings['threads']} of {cores} cores"
    rows = [
        (_ours(found), f"{found.model} ({found.ours.runtime})"),
        ("baseline", f"{found.baseline} ({dense.dtype}, dense)"),
        (
            "measured",
            f"prompt of {settings['prompt_tokens']} tokens, {settings['new_tokens']} new ones, batch 1; "
            f"median of {settings['rounds']} interleaved rounds",
        ),
        ("machine", ", ".join(text for text in (machine["processor"], threads, machine["isa"]) if text)),
        ("versions", versions),
    ]
    return render.pairs(rows)


def _ours(found: Benchmark) -> str:
    return "packed" if found.ours.runtime.packed else "this model"


def _comparison(found: Benchmark) -> str:
    from sparsekit.benchmark.result import METRICS

    others = found.contenders[1:]
    headers = ["", _ours(found), *(_TITLES[c.name] for c in others), *(_SHORT[c.name] for c in others)]
    rows = []
    for metric in METRICS:
        cells = [_value(metric, contender) for contender in found.contenders]
        rows.append([metric.label, *cells, *(_quotient(metric, found.quotient(metric, other)) for other in others)])
    note = "x: times as fast; of bytes, the share. Higher x and lower shares are better."
    return f"{render.table(headers, rows, right=range(1, len(headers)))}\n{note}"


def _value(metric: Metric, contender: Contender) -> str:
    value = metric.of(contender)
    return "-" if value is None else metric.text(value)


def _quotient(metric: Metric, value: float | None) -> str:
    return "-" if value is None else metric.quotient_text(value)


def _verdict(found: Benchmark) -> str:
    lost = found.dense_is_better()
    if not lost:
        return render.fill("In nothing measured here is a dense model better.")
    rows = []
    for metric in dict.fromkeys(metric for metric, _ in lost):
        theirs = [f"{_TITLES[c.name]} {_value(metric, c)}" for which, c in lost if which is metric]
        rows.append((f"  {metric.label}", f"{', '.join(theirs)} against {_value(metric, found.ours)}"))
    return f"Dense is better here in\n{render.pairs(rows)}"


def _layers(found: Benchmark) -> str:
    headers = ["count", "out x in", "kernel", "zeros", "bits", "GB/s", "roofline", "x eager", "x tuned"]
    layers = sorted(found.layers, key=lambda layer: -layer.count * layer.seconds)
    table = render.table(headers, [_cells(layer) for layer in layers], right=(0, 3, 4, 5, 6, 7, 8))
    taken, limit = (sum(layer.count * value(layer) for layer in layers) for value in (_taken, _limit))
    bandwidth = sum(layer.count * layer.nbytes for layer in layers) / limit / 1e9
    decode = 1 / found.ours.decode_tokens_per_second
    text = (
        f"Kernels at batch 1, weights read from memory. Linears take {1e3 * taken:.1f} ms of the {1e3 * decode:.1f} ms "
        f"of a token; at the read bandwidth of {bandwidth:.1f} GB/s (roofline) they would take {1e3 * limit:.1f} ms."
    )
    return f"{table}\n{render.fill(text)}"


def _cells(layer: Layer) -> list[str]:
    zeros = "-" if layer.sparsity < 0.005 else f"{layer.sparsity:.0%}"
    return [
        f"{layer.count}",
        f"{layer.rows} x {layer.cols}",
        layer.kernel,
        zeros if layer.pattern in (None, "unstructured") else f"{layer.pattern}",
        f"{layer.bits_per_weight:.2f}",
        f"{layer.bytes_per_second / 1e9:.1f}",
        f"{layer.roofline_share:.0%}",
        f"{layer.torch_seconds / layer.seconds:.2f}x",
        f"{layer.dense_seconds / layer.seconds:.2f}x",
    ]


def _taken(layer: Layer) -> float:
    return layer.seconds


def _limit(layer: Layer) -> float:
    return layer.roofline_seconds
