"""Skip sets as files: found once on some text, used whenever the model generates.

{"schema": 1, "model": "3f0c...", "blocks": 30, "attention": [3, 7], "mlp": [4], "agreement": 0.81,
 "text": "...", "tokens": 2048, "tries": 200, "seed": 0}
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sparsekit import fs
from sparsekit.errors import CheckpointError, UsageError
from sparsekit.models.source import ModelSource
from sparsekit.speculate.skipping import Skips

SKIP_FILE = "sparsekit_skip.json"
"""Where a skip set lies in its model's folder."""
SCHEMA = 1
_SAMPLE_BYTES = 1 << 20
_LARGEST_BYTES = 1 << 20


@dataclass(frozen=True)
class SkipSet:
    """A skip set and where it comes from.

    Attributes:
        model: Fingerprint of the model it was found for.
        blocks: Blocks of that model.
        attention, mlp: Blocks whose branch is left out, ascending.
        agreement: Share of the text's tokens behind which draft and full model expect the same token.
        text: The text it was found on.
        tokens: Of that text.
        tries: Sets that were tried.
        seed: Of the choice.
    """

    model: str
    blocks: int
    attention: tuple[int, ...]
    mlp: tuple[int, ...]
    agreement: float
    text: str
    tokens: int
    tries: int
    seed: int

    @property
    def skips(self) -> Skips:
        """What is left out."""
        return Skips(self.attention, self.mlp)


def fingerprint(source: ModelSource) -> str:
    """Return what tells models apart: a hash of config.json and of the beginning of every weight file.

    Reading all weights would take longer than many a text; a set that slips through costs speed, never correctness.
    """
    digest = hashlib.sha256()
    for path in (source.folder / "config.json", *(source.weights.path(name) for name in sorted(source.weights.files))):
        with path.open("rb") as file:
            digest.update(f"{path.name} {path.stat().st_size}\n".encode())
            digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()


def write(path: Path, found: SkipSet) -> None:
    """Write a skip set.

    Raises:
        ResourceError: The file cannot be written.
    """
    fs.replace_file(path, (json.dumps({"schema": SCHEMA, **asdict(found)}) + "\n").encode())


def read(path: Path, model: str) -> SkipSet:
    """Read a skip set for the model with the fingerprint `model`.

    Raises:
        UsageError: No such file, or it belongs to another model.
        CheckpointError: An entry makes no sense; says which.
    """
    found = _checked(path, _document(path))
    if found.model != model:
        raise UsageError(
            f"model: the skip set was found for another model ({found.model[:12]}, this one is {model[:12]})",
            where=str(path),
            hint="Search one for this model: --skip-set search --save-skip-set FILE",
        )
    return found


def _document(path: Path) -> dict[str, Any]:
    try:
        size = path.stat().st_size
        text = path.read_text(encoding="utf-8") if size <= _LARGEST_BYTES else ""
    except OSError as error:
        raise UsageError(
            f"the skip set cannot be read: {error.strerror}",
            where=str(path),
            hint="Search one: --skip-set search --save-skip-set FILE",
        ) from error
    except UnicodeDecodeError as error:
        raise CheckpointError("not UTF-8", where=str(path)) from error
    try:
        document = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError("not JSON", where=str(path), hint="Search the skip set again.") from error
    if not isinstance(document, dict):
        raise CheckpointError("not a JSON object", where=str(path), hint="Search the skip set again.")
    return document


def _checked(path: Path, document: dict[str, Any]) -> SkipSet:
    def refuse(entry: str, what: str) -> CheckpointError:
        return CheckpointError(f"{entry}: {what}", where=str(path), hint="Search the skip set again.")

    types = {"model": str, "text": str, "agreement": float, "blocks": int, "tokens": int, "tries": int, "seed": int}
    wanted = {"schema", *types, "attention", "mlp"}
    if wanted != document.keys():
        entry = min(wanted ^ document.keys())
        raise refuse(entry, "missing" if entry in wanted else "unknown entry")
    if document["schema"] != SCHEMA:
        raise refuse("schema", f"got {document['schema']!r}, this sparsekit reads {SCHEMA}")
    for entry, kind in types.items():
        if not isinstance(document[entry], kind) or isinstance(document[entry], bool):
            raise refuse(entry, f"got {document[entry]!r}, need {kind.__name__}")
    last = document["blocks"] - 1
    for entry in ("attention", "mlp"):
        numbers = document[entry]
        if not isinstance(numbers, list) or any(type(number) is not int for number in numbers):
            raise refuse(entry, f"got {numbers!r}, need a list of block numbers")
        for number in numbers:
            if not 0 < number < last:
                raise refuse(
                    entry, f"block {number}: need 1 to {last - 1}, the first and the last block always compute"
                )
        if numbers != sorted(set(numbers)):
            raise refuse(entry, "need ascending block numbers, each once")
    del document["schema"]
    return SkipSet(**{**document, "attention": tuple(document["attention"]), "mlp": tuple(document["mlp"])})
