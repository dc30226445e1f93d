"""`sparsekit eval`: perplexity, KL divergence and lm-eval tasks, with a baseline beside them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from sparsekit.cli import render
from sparsekit.cli.options import Dtype, Json, Quiet, Revision, TrustRemoteCode, Verbose
from sparsekit.errors import GateMissed


def evaluate(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Checkpoint folder, Hub id, or .gguf file.")],
    baseline: Annotated[
        str | None, typer.Option("--baseline", metavar="MODEL", help="Dense model to compare with.")
    ] = None,
    text: Annotated[
        str | None,
        typer.Option("--text", metavar="SOURCE", help="builtin, a text file or glob, or a Hub data set; or none."),
    ] = None,
    samples: Annotated[int, typer.Option("--samples", min=1, help="Sequences of text.")] = 16,
    sequence_length: Annotated[int, typer.Option("--sequence-length", min=8, help="Tokens in a sequence.")] = 512,
    tasks: Annotated[
        str | None, typer.Option("--tasks", metavar="A,B", help="lm-eval tasks, separated by commas.")
    ] = None,
    include_path: Annotated[
        Path | None, typer.Option("--include-path", metavar="DIR", help="Folder with task files of your own.")
    ] = None,
    limit: Annotated[int | None, typer.Option("--limit", min=1, help="First documents of each task only.")] = None,
    num_fewshot: Annotated[int | None, typer.Option("--num-fewshot", min=0, help="Examples in the prompt.")] = None,
    max_perplexity_ratio: Annotated[
        float | None, typer.Option("--max-perplexity-ratio", help="Gate: exit 6 above it.")
    ] = None,
    max_kl: Annotated[float | None, typer.Option("--max-kl", help="Gate: exit 6 above it.")] = None,
    dtype: Dtype = "auto",
    revision: Revision = None,
    trust_remote_code: TrustRemoteCode = False,
    quiet: Quiet = False,
    verbose: Verbose = 0,
    json: Json = False,
) -> None:
    """Measure a model, side by side with a baseline."""
    from sparsekit.data.documents import TextSpec
    from sparsekit.evaluate.evaluation import EvaluationRequest
    from sparsekit.evaluate.evaluation import evaluate as run_evaluation
    from sparsekit.evaluate.gates import GatesSpec, check
    from sparsekit.evaluate.table import render_table
    from sparsekit.models.source import open_model
    from sparsekit.plan import BASE_MEMORY_BYTES, require_memory

    names = tuple(name.strip() for name in (tasks or "").split(",") if name.strip())
    # Naming tasks alone means tasks alone; naming nothing means the built-in text.
    source = text or (None if names else "builtin")
    spec = None
    if source not in (None, "none"):
        spec = TextSpec(source=str(source), samples=samples, sequence_length=sequence_length)
    weights_bytes = 0
    with render.reporter(quiet=quiet) as reporter:

        def open_for_evaluation(name: str) -> tuple[Any, Any]:
            chosen = revision if name == model else None
            opened = open_model(name, reporter, revision=chosen, dtype=dtype, trust_remote_code=trust_remote_code)
            nonlocal weights_bytes
            weights_bytes += opened.weights.total_bytes
            require_memory(BASE_MEMORY_BYTES + weights_bytes, f"evaluating {name}", "Use a machine with more memory.")
            return opened.load(), opened.tokenizer

        report = run_evaluation(
            EvaluationRequest(
                model=model,
                open_model=open_for_evaluation,
                baseline=baseline,
                text=spec,
                tasks=names,
                include_path=include_path,
                limit=limit,
                num_fewshot=num_fewshot,
                reporter=reporter,
            )
        )
    missed = check(GatesSpec(max_perplexity_ratio=max_perplexity_ratio, max_kl=max_kl), report)
    if json:
        render.emit_json({**report.to_json(), "missed_gates": missed})
    else:
        render.emit(render_table(report))
    if missed:
        render.end_with(GateMissed("; ".join(missed), where=model, hint="See the table for what was measured."))
