"""`sparsekit generate`: run a prompt, text streaming out as it is made."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from sparsekit.cli import render
from sparsekit.cli.options import Dtype, Json, Quiet, Revision, TrustRemoteCode, Verbose
from sparsekit.errors import UsageError
from sparsekit.units import seconds_text

if TYPE_CHECKING:
    from sparsekit.generate import Generation


def generate(
    model: Annotated[str, typer.Argument(metavar="DIR|MODEL", help="Checkpoint, local model, .gguf file or Hub id.")],
    prompt: Annotated[
        str | None, typer.Option("--prompt", "-p", metavar="TEXT", help="Prompt; - or none: standard input.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", min=1, help="Stop after so many.")] = 128,
    chat: Annotated[
        bool | None, typer.Option("--chat/--no-chat", help="Use the chat template; by default where there is one.")
    ] = None,
    temperature: Annotated[
        float, typer.Option("--temperature", min=0.0, help="0: always the likeliest token; else draw.")
    ] = 0.0,
    top_p: Annotated[
        float, typer.Option("--top-p", min=0.01, max=1.0, help="Draw from the likeliest tokens of this probability.")
    ] = 1.0,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of the draws.")] = 0,
    threads: Annotated[int | None, typer.Option("--threads", min=1, help="Threads to compute with.")] = None,
    self_speculate: Annotated[
        Literal["skip", "sparse"] | None,
        typer.Option("--self-speculate", help="Draft with fewer branches or inputs; the text is the same."),
    ] = None,
    correct: Annotated[
        int | None,
        typer.Option("--correct", metavar="K", min=1, help="A sparse model, corrected by the full one every K tokens."),
    ] = None,
    correct_threshold: Annotated[
        float, typer.Option("--correct-threshold", help="Probability from which a sparse model's token stays.")
    ] = 0.1,
    skip_set: Annotated[
        str | None,
        typer.Option("--skip-set", metavar="FILE|search", help="Branches to skip; by default the model folder's."),
    ] = None,
    save_skip_set: Annotated[
        str | None, typer.Option("--save-skip-set", metavar="FILE", help="Keep the skip set that was used.")
    ] = None,
    dtype: Dtype = "auto",
    revision: Revision = None,
    trust_remote_code: TrustRemoteCode = False,
    quiet: Quiet = False,
    verbose: Verbose = 0,
    json: Json = False,
) -> None:
    """Run a prompt; packed checkpoints multiply packed."""
    from sparsekit.drafting import DraftRequest
    from sparsekit.generate import GenerationRequest
    from sparsekit.generate import generate as run
    from sparsekit.models.source import open_model

    request = GenerationRequest(
        prompt=_text(prompt),
        max_new_tokens=max_new_tokens,
        chat=chat,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
        threads=threads,
        drafting=DraftRequest(self_speculate, correct, correct_threshold, skip_set, save_skip_set),
    )
    with render.reporter(quiet=quiet) as reporter:
        opened = open_model(model, reporter, revision=revision, dtype=dtype, trust_remote_code=trust_remote_code)
        begun = False

        def write(text: str) -> None:
            nonlocal begun
            begun = True
            print(render.printable(text), end="", flush=True)

        try:
            made = run(opened, request, (lambda text: None) if json else write, reporter)
        finally:
            if begun:
                print(flush=True)  # whatever ended the text, the next line starts at the left
    if json:
        render.emit_json({"model": model, "prompt": request.prompt, **made.to_json()})
    elif not quiet:
        print(_summary(made), file=sys.stderr)


def _text(prompt: str | None) -> str:
    """Return the prompt, read from standard input where it is not given.

    Raises:
        UsageError: It is not UTF-8.
    """
    try:
        if prompt is None or prompt == "-":
            return sys.stdin.buffer.read().decode("utf-8") if sys.stdin else ""
        prompt.encode("utf-8")  # an argument keeps bytes that are not as lone surrogates
    except UnicodeError as error:
        raise UsageError(f"the prompt is not UTF-8: {error}") from error
    return prompt


def _summary(made: Generation) -> str:
    speed = "" if made.tokens_per_second is None else f" at {made.tokens_per_second:.1f}/s"
    count = f"{made.new_tokens} token{'s'[: made.new_tokens > 1]}{speed}"
    drafts = "" if made.drafting is None else f"; {made.drafting}"
    return f"[{count}, first after {seconds_text(made.first_token_seconds)}; {made.runtime}{drafts}]"
