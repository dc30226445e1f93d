"""Text from a data set on the Hugging Face Hub, streamed: only as many documents as needed are read."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from sparsekit.data.documents import SHUFFLE_BUFFER, Documents, Part, TextSpec, offline_alternatives, shuffled
from sparsekit.errors import CalibrationError, MissingExtra, SourceUnavailable
from sparsekit.progress import Reporter
from sparsekit.rng import derive


@dataclass(frozen=True)
class _Shorthand:
    repo: str
    config: str | None
    calibration_split: str
    held_out_split: str
    article: str | None = None  # where rows are lines: what the first line of an article looks like


SHORTHANDS = {
    "c4": _Shorthand("allenai/c4", "en", "train", "validation"),
    "wikitext2": _Shorthand("Salesforce/wikitext", "wikitext-2-raw-v1", "train", "test", r" = [^=].*[^=] = \n?"),
    "pile": _Shorthand("monology/pile-uncopyrighted", None, "train", "test"),
}
"""Names that stand for a data set, its configuration and its splits."""


def documents(spec: TextSpec, part: Part, reporter: Reporter) -> Documents:
    """Return the documents of a Hub data set in an order drawn from the seed; nothing is downloaded whole.

    Raises:
        SourceUnavailable: The Hub cannot be reached, or has no such data set, configuration or split.
        CalibrationError: The data set has no such field.
    """
    known = SHORTHANDS.get(spec.source)
    repo = known.repo if known else spec.source
    config = spec.config or (known.config if known else None)
    split = spec.split or _default_split(known, part)
    field = spec.field or "text"
    label = f"{repo}, {f'config {config}, ' if config else ''}split {split}, field {field}"
    reporter.note(f"Asking the Hugging Face Hub for {label}")
    order = derive(spec.seed, "text", part)
    if known and known.article:
        lines = _stream(repo, config, split, field, part, None)
        return Documents(shuffled(_articles(lines, known.article), order), label, streamed=True)
    return Documents(_stream(repo, config, split, field, part, order), label, streamed=True)


def _default_split(known: _Shorthand | None, part: Part) -> str:
    if known is None:
        return "train" if part == "calibration" else "test"
    return known.calibration_split if part == "calibration" else known.held_out_split


def _articles(lines: Iterable[str], first_line: str) -> Iterator[str]:
    """Join lines, which the data set gives one a row, to the articles they were cut from."""
    article: list[str] = []
    for line in lines:
        if article and re.fullmatch(first_line, line):
            yield "\n\n".join(article)
            article = []
        article.append(line.strip())
    if article:
        yield "\n\n".join(article)


def _stream(repo: str, config: str | None, split: str, field: str, part: Part, order: int | None) -> Iterator[str]:
    """Yield the texts, shuffled by the data set's own means if `order` seeds it."""
    import datasets

    # HTTPError is taken from here because the HTTP library underneath differs between versions.
    from huggingface_hub.errors import (  # type: ignore[attr-defined]
        HFValidationError,
        HTTPError,
        OfflineModeIsEnabled,
    )

    unreachable = (
        ConnectionError,
        TimeoutError,
        HTTPError,
        OfflineModeIsEnabled,
        datasets.exceptions.DatasetNotFoundError,
        HFValidationError,
    )
    where = f"{repo} ({config})" if config else repo
    try:
        rows = datasets.load_dataset(repo, config, split=split, streaming=True)
        if order is not None:
            rows = rows.shuffle(seed=order % 2**32, buffer_size=SHUFFLE_BUFFER)
        for record in rows:
            text = _field(record, field, where)
            if text.strip():
                yield text
    except unreachable as error:
        raise SourceUnavailable(
            f"the Hugging Face Hub did not give this data set: {_first_line(error)}",
            where=where,
            hint=offline_alternatives(part),
        ) from error
    except ImportError as error:
        raise MissingExtra(
            f"this data set needs a package that is not installed: {_first_line(error)}",
            where=where,
            hint=f"pip install {error.name or 'that package'}",
        ) from error
    except (ValueError, datasets.exceptions.DatasetsError, FileNotFoundError) as error:
        raise SourceUnavailable(
            f"cannot be read with split {split!r}: {_first_line(error)}",
            where=where,
            hint="Set config and split to what the data set offers.",
        ) from error


def _field(record: dict[str, Any], field: str, where: str) -> str:
    value = record.get(field)
    if not isinstance(value, str):
        got = f"holds {type(value).__name__}" if field in record else "is not there"
        raise CalibrationError(
            f"field {field!r} {got}; fields: {', '.join(record)}",
            where=where,
            hint="Set field to a text field.",
        )
    return value


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0]}" if text else type(error).__name__
