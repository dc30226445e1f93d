"""What a recipe's optional tasks are where they cannot be run."""

from __future__ import annotations

from collections.abc import Sequence


def left_out_note(tasks: Sequence[str]) -> str:
    """Return what to do about tasks that were not run for want of lm-eval, as sentences."""
    return (
        f"Not run: {', '.join(tasks)}, since lm-eval is not installed. To run it later: pip install 'sparsekit[eval]', "
        f"then sparsekit eval with --tasks {','.join(tasks)} and the dense model as --baseline."
    )
