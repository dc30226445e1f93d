"""Text that needs no network and no file: the language reference inside every CPython (`pydoc_data.topics`).

The topics are divided once and for ever by a hash of their name, about three quarters of the characters for
calibration. Topics quote each other, so a paragraph that any held-out topic contains is taken out of the
calibration part: no paragraph is ever in both, whichever Python ships the text.
"""

from __future__ import annotations

import hashlib
import platform
import re
from functools import cache

from sparsekit.data.documents import Documents, Part

SHORTEST_PARAGRAPH = 60
"""Characters; shorter paragraphs are headings, signatures and labels."""

PROSE_SHARE = 0.8
"""Share of letters, blanks and plain punctuation from which a paragraph is prose, not code or grammar."""

_SALT = "sparsekit builtin 26:"  # fixed for ever; chosen once so that the parts come out near 75:25
_HELD_OUT_BELOW = 64  # of 256
_PLAIN = re.compile(r"[A-Za-z ,.;:'-]")
_MARKUP = re.compile(r"^>>>|^\+-|::=|^class .*:$|^def .*:$|[=*~^-]{4}")
_LIST_MARK = re.compile(r"^(\*|\d+\.) +")


def documents(part: Part) -> Documents:
    """Return one document per topic of `part`, its paragraphs unwrapped and separated by blank lines."""
    texts = tuple("\n\n".join(paragraphs) for paragraphs in parts()[part])
    label = part.replace("_", "-")
    description = f"builtin (pydoc_data.topics of Python {platform.python_version()}), {label} part"
    return Documents(texts, description)


@cache
def parts() -> dict[Part, tuple[tuple[str, ...], ...]]:
    """Return the paragraphs of every topic by part; each paragraph occurs once in all."""
    from pydoc_data.topics import topics

    by_part: dict[Part, list[list[str]]] = {"calibration": [], "held_out": []}
    for name in sorted(topics):
        by_part[part_of(name)].append(_prose(topics[name]))
    seen: set[str] = set()
    result: dict[Part, tuple[tuple[str, ...], ...]] = {}
    for part in ("held_out", "calibration"):  # held-out first: a quoted paragraph stays there
        kept: list[tuple[str, ...]] = []
        for paragraphs in by_part[part]:
            fresh = list(dict.fromkeys(paragraph for paragraph in paragraphs if paragraph not in seen))
            seen.update(fresh)
            if fresh:
                kept.append(tuple(fresh))
        result[part] = tuple(kept)
    return result


def part_of(topic: str) -> Part:
    """Return the part a topic belongs to, from its name alone."""
    first_byte = hashlib.sha256((_SALT + topic).encode()).digest()[0]
    return "held_out" if first_byte < _HELD_OUT_BELOW else "calibration"


def _prose(text: str) -> list[str]:
    paragraphs = []
    for lines in re.split(r"\n\s*\n", text):
        paragraph = _LIST_MARK.sub("", " ".join(line.strip() for line in lines.strip().splitlines()))
        plain = len(_PLAIN.findall(paragraph))
        long_enough = len(paragraph) >= SHORTEST_PARAGRAPH
        if long_enough and plain >= PROSE_SHARE * len(paragraph) and not _MARKUP.search(paragraph):
            paragraphs.append(paragraph)
    return paragraphs
