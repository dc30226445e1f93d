"""The calibration text of a run: read from a source, or written by the model itself."""

from __future__ import annotations

from sparsekit.data import DEFAULT_SEQUENCE_LENGTH, OWN_TEXT, TextSpec, TokenBlocks, load_blocks, write_blocks
from sparsekit.errors import CalibrationError
from sparsekit.memory import release_freed
from sparsekit.plan import BASE_MEMORY_BYTES, require_memory
from sparsekit.prepared import Prepared
from sparsekit.progress import Reporter


def calibration_blocks(prepared: Prepared, reporter: Reporter) -> TokenBlocks:
    """Return the token blocks that a run calibrates on.

    Raises:
        CalibrationError: Text that does not exist, is too short, or does not fit the model.
        OutOfMemory: A model too large to write its own text here.
    """
    spec, source = prepared.recipe.calibration, prepared.source
    if spec.source == OWN_TEXT:
        return _own_text(prepared, reporter)
    blocks = load_blocks(
        TextSpec(**spec.model_dump()),
        source.tokenizer,
        model_max_length=source.max_length,
        part="calibration",
        reporter=reporter,
    )
    highest, vocabulary = int(blocks.ids.max()), prepared.model.vocabulary
    if highest >= vocabulary:
        raise CalibrationError(
            f"token id {highest:,} does not exist in the model's vocabulary of {vocabulary:,}",
            where=blocks.source,
            hint="Use the tokenizer that belongs to the model.",
        )
    return blocks


def _own_text(prepared: Prepared, reporter: Reporter) -> TokenBlocks:
    """Let the dense model, whole in memory for as long as that takes, write its calibration text."""
    spec, source = prepared.recipe.calibration, prepared.source
    if spec.config or spec.split or spec.field:
        raise CalibrationError(
            "config, split and field choose within a Hub data set or file, not within what the model writes",
            where=f"calibration.source={OWN_TEXT}",
            hint="Remove them.",
        )
    require_memory(
        source.weights.total_bytes + BASE_MEMORY_BYTES,
        "loading the model whole, so that it writes its own calibration text,",
        "Set another calibration source.",
    )
    try:
        return write_blocks(
            source.load(),
            source.tokenizer,
            samples=spec.samples,
            sequence_length=spec.sequence_length or min(DEFAULT_SEQUENCE_LENGTH, source.max_length),
            seed=spec.seed,
            reporter=reporter,
        )
    finally:
        release_freed()
