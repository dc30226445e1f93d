"""Which drafts a command asked for, made ready for a loaded model."""

from __future__ import annotations

import time
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from sparsekit.data.blocks import load_blocks
from sparsekit.data.documents import TextSpec
from sparsekit.errors import CheckpointError, UsageError
from sparsekit.models.source import ModelSource
from sparsekit.progress import Reporter
from sparsekit.runtime import gates
from sparsekit.speculate import skip_file
from sparsekit.speculate.cached import require_croppable
from sparsekit.speculate.choose import choose, tries
from sparsekit.speculate.decoding import Mode, Spoken, Window
from sparsekit.speculate.generating import Drafting
from sparsekit.speculate.skip_file import SkipSet
from sparsekit.speculate.skipping import PARTS, Skipper, Skips
from sparsekit.units import seconds_text

Kind = Literal["skip", "sparse"]
SEARCH = "search"
CHANGES = 64
"""Random changes of a skip set that is searched for a command."""
SPARSE_WINDOW = Window(8, confidence=0.8)
"""Shorter than for skipped branches: a sparse token costs nearly what a full one does."""
_SAMPLES, _SAMPLE_TOKENS, _SEED = 4, 128, 0


@dataclass(frozen=True)
class DraftRequest:
    """How a command wants to have text drafted.

    Attributes:
        self_speculate: What drafts, the full model verifying; None: nothing does.
        correct: Tokens that the sparse model speaks between corrections; None: it is not corrected.
        threshold: Least probability at which a corrected token stays.
        skip_set: File of a skip set, or `search`; None: the one in the model's folder, or search.
        save_skip_set: Where to keep the skip set.
    """

    self_speculate: Kind | None = None
    correct: int | None = None
    threshold: float = 0.1
    skip_set: str | None = None
    save_skip_set: str | None = None

    def __bool__(self) -> bool:
        """Return whether anything is drafted."""
        return self.self_speculate is not None or self.correct is not None

    def check(self) -> None:
        """Refuse options that contradict each other.

        Raises:
            UsageError: says which.
        """
        if self.self_speculate is not None and self.correct is not None:
            raise UsageError(
                "--self-speculate and --correct cannot both draft: the one repeats the full model, the other departs "
                "from it",
                hint="Choose one.",
            )
        if self.self_speculate != "skip" and (self.skip_set or self.save_skip_set):
            raise UsageError("--skip-set and --save-skip-set belong to --self-speculate skip", hint="Add it.")
        if not 0 <= self.threshold <= 1:
            raise UsageError(f"--correct-threshold {self.threshold:g}: need a probability, 0 to 1")


@dataclass(frozen=True)
class DraftReport:
    """What came of drafts.

    Attributes:
        kind: `skip`, `sparse` or `correct`.
        drafted: Tokens that were drafted.
        accepted: Of these, how many stayed.
        verifications: Passes of the full model behind the prompt.
        accepted_share: `accepted` of `drafted`; None where nothing was drafted.
        accepted_length: Tokens that stayed on average per verification, each of which adds one of its own.
        skipped: Blocks without attention and without MLP while drafting; None unless `skip`.
    """

    kind: str
    drafted: int
    accepted: int
    verifications: int
    accepted_share: float | None
    accepted_length: float | None
    skipped: dict[str, list[int]] | None

    def __str__(self) -> str:
        """Return it in a few words."""
        if self.accepted_length is None:
            return "nothing drafted"
        return f"{self.accepted} of {self.drafted} drafted kept, {self.accepted_length:.1f} a check"


@dataclass(frozen=True)
class Prepared:
    """Drafts, ready for a model.

    Attributes:
        kind: `skip`, `sparse` or `correct`.
        drafting: What the loop needs.
        skips: What is left out; None unless `skip`.
    """

    kind: str
    drafting: Drafting
    skips: Skips | None = None

    def report(self, spoken: Spoken) -> DraftReport:
        """Say what came of them."""
        return DraftReport(
            self.kind,
            spoken.drafted,
            spoken.accepted,
            spoken.verifications,
            spoken.accepted / spoken.drafted if spoken.drafted else None,
            spoken.accepted / spoken.verifications if spoken.verifications else None,
            None if self.skips is None else {part: list(self.skips.of(part)) for part in PARTS},
        )


def prepare(model: Any, source: ModelSource, request: DraftRequest, reporter: Reporter) -> Prepared:
    """Make the drafts that were asked for ready.

    Args:
        model: Loaded from `source`.
        source: The opened model.
        request: What was asked for; checked.
        reporter: Told of a search and what it found.

    Raises:
        UnsupportedFamily: The model's cache cannot take back tokens, or its branches are not known.
        UsageError: A sparse draft of a model that is not sparse, a skip set that is not there or another model's.
        CheckpointError: A damaged skip set.
    """
    require_croppable(model)
    if request.self_speculate == "skip":
        skipper = Skipper(model)
        skips = _skip_set(model, skipper, source, request, reporter).skips
        return Prepared("skip", Drafting(skipper.skipping(skips), full_mode(model)), skips)
    draft, full = sparse_draft(model)
    if request.correct is not None:
        window = Window(request.correct, confidence=0.0)
        return Prepared("correct", Drafting(draft, full, window, request.threshold))
    return Prepared("sparse", Drafting(draft, full, SPARSE_WINDOW))


def sparse_draft(model: Any) -> tuple[Mode, Mode]:
    """Return what opens the contexts in which a model with gates is sparse, and in which it is whole.

    Raises:
        UsageError: The model has no gates.
    """
    if not gates.attached(model):
        raise UsageError(
            f"{type(model).__name__} skips no inputs: there is nothing sparse to draft with",
            hint="Make such a checkpoint: sparsekit prune MODEL --recipe teal-50 -o OUT",
        )
    return nullcontext, full_mode(model)


def full_mode(model: Any) -> Mode:
    """Return what opens the context in which all of a model computes, whether it has gates or not."""
    return lambda: gates.paused(model)


def _skip_set(model: Any, skipper: Skipper, source: ModelSource, request: DraftRequest, reporter: Reporter) -> SkipSet:
    """Return the skip set of a request, read or searched, and keep it where that was asked for."""
    model_id = skip_file.fingerprint(source)
    stored = Path(request.skip_set) if request.skip_set else source.folder / skip_file.SKIP_FILE
    if request.skip_set == SEARCH or (request.skip_set is None and not stored.exists()):
        found = _search(model, skipper, source, model_id, reporter)
    else:
        found = skip_file.read(stored, model_id)
        if found.blocks != skipper.blocks:
            raise CheckpointError(f"blocks: got {found.blocks}, the model has {skipper.blocks}", where=str(stored))
    if request.save_skip_set is not None:
        skip_file.write(Path(request.save_skip_set), found)
    return found


def _search(model: Any, skipper: Skipper, source: ModelSource, model_id: str, reporter: Reporter) -> SkipSet:
    spec = TextSpec(samples=_SAMPLES, sequence_length=min(_SAMPLE_TOKENS, source.max_length))
    text = load_blocks(spec, source.tokenizer, model_max_length=source.max_length, part="calibration")
    start = time.perf_counter()
    reporter.start("skip set", tries(skipper.blocks, CHANGES), "tries")
    try:
        found = choose(
            model,
            skipper,
            text.ids,
            changes=CHANGES,
            seed=_SEED,
            full=full_mode(model),
            advance=lambda: reporter.advance("skip set"),
        )
    finally:
        reporter.finish("skip set")
    taken = seconds_text(time.perf_counter() - start)
    reporter.note(
        f"skip set: {len(found.skips)} of {2 * skipper.blocks} branches, {found.agreement:.0%} agreement, "
        f"about {found.speed:.2f}x the speed expected; found in {taken}"
        + ("" if found.speed > 1 else "; no gain is to be had from this model")
    )
    return SkipSet(
        model_id,
        skipper.blocks,
        found.skips.attention,
        found.skips.mlp,
        found.agreement,
        text.source,
        int(text.ids.numel()),
        found.tries,
        _SEED,
    )
