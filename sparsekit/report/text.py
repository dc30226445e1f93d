"""Numbers as people read them, and text that names nothing of the machine a run was made on."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any

ABSENT = "-"
TIMES = "\N{MULTIPLICATION SIGN}"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}(/[A-Za-z0-9][\w.-]{0,95})?")
_ROOTED = re.compile(r"(?:~[\w.-]*|\.{1,2})?/|[A-Za-z]:[/\\]|\\\\|(?:~|\.{1,2})$")
# An absolute path inside a sentence; not the slashes of a URL, a glob, a relative path or a Hub id.
_EMBEDDED = re.compile(
    r"(?:file:/{2,3}|(?<![\w./\\:~*?\])}<-])(?:(?:~[\w.-]*|\.{1,2})?/|[A-Za-z]:[/\\]))[^\s'\"`<>|,;()]+"
)


def to_float(value: Any) -> float | None:
    """Return a number of a report; "inf" and "nan" are spelt as text there. None where there is none."""
    return None if value is None else float(value)


def number(value: float | None, *, sign: bool = False) -> str:
    """Return four significant digits, without an exponent between 0.0001 and 100,000."""
    if value is None:
        return ABSENT
    plus = "+" if sign and value >= 0 else ""
    if value == 0 or not math.isfinite(value):
        return f"{plus}{value:.0f}"
    magnitude = math.floor(math.log10(abs(float(f"{value:.3e}"))))  # of the rounded number: 9.9999 is 10.00
    if not -4 <= magnitude < 5:
        return f"{plus}{value:.3g}"
    return f"{plus}{value:,.{max(0, 3 - magnitude)}f}"


def with_error(value: float | None, stderr: float | None, *, sign: bool = False) -> str:
    """Return `value ± standard error`: the error to two digits, the value as far as it reaches."""
    if value is None or stderr is None or not (math.isfinite(value) and math.isfinite(stderr)) or stderr <= 0:
        return number(value, sign=sign)
    decimals = 1 - math.floor(math.log10(float(f"{stderr:.1e}")))
    if not 0 <= decimals <= 6:
        return f"{number(value, sign=sign)} ± {number(stderr)}"
    return f"{value:{'+' if sign else ''},.{decimals}f} ± {stderr:,.{decimals}f}"


def short(value: float) -> str:
    """Return three significant digits: `32.7`, `1,250`, `0.0123`."""
    if value == 0 or not math.isfinite(value):
        return f"{value:.0f}"
    magnitude = math.floor(math.log10(abs(float(f"{value:.2e}"))))  # of the rounded number: 9.999 is 10.0
    return f"{value:,.{max(0, 2 - magnitude)}f}" if -4 <= magnitude < 6 else f"{value:.2g}"


def percent(share: float) -> str:
    """Return a share as a percentage with one decimal; never 100.0 % or 0.0 % of what is not all or nothing."""
    rounded = round(100 * share, 1)
    if rounded == 100 and share < 1:
        return "> 99.9 %"
    if rounded == 0 and share > 0:
        return "< 0.1 %"
    return f"{rounded:.1f} %"


def is_packed(report: Mapping[str, Any]) -> bool:
    """Whether the run that a report is about wrote packed weights."""
    return bool(report["stages"] and report["recipe"]["save"]["format"] != "dense")


def is_hub_id(text: str) -> bool:
    """Tell whether `text` can be the id of a model on the Hub."""
    return _HUB_ID.fullmatch(text) is not None and ".." not in text and "--" not in text


class Scrubber:
    """Replaces paths of the local machine by their last part, for pages that get published.

    Args:
        known: Paths that certainly are local, as they were typed, each with what stands for it.
    """

    def __init__(self, known: Mapping[str, str]) -> None:
        # The longest first: a path may begin with another one.
        self._known = sorted(((key, value) for key, value in known.items() if key), key=lambda item: -len(item[0]))

    def text(self, text: str) -> str:
        """Return `text` with local paths shortened; a whole path may hold spaces, one in a sentence may not."""
        for path, replacement in self._known:
            # A short name such as `out` is only a path where it stands alone.
            whole = re.compile(rf"(?<![\w./\\-]){re.escape(path)}(?![\w-])")
            text = whole.sub(lambda _, to=replacement: to, text)  # type: ignore[misc]
        if _ROOTED.match(text):
            return _last(text)
        return _EMBEDDED.sub(lambda found: _last(found[0]), text)

    def argument(self, argument: str) -> str:
        """Return one word of a command line; `KEY=PATH` keeps its key."""
        key, equals, value = argument.partition("=")
        if equals and re.fullmatch(r"[\w.-]+", key):
            return f"{key}={self.text(value)}"
        return self.text(argument)

    def value(self, value: Any) -> Any:
        """Return a JSON value with every text in it scrubbed."""
        if isinstance(value, str):
            return self.text(value)
        if isinstance(value, Mapping):
            return {key: self.value(item) for key, item in value.items()}
        return [self.value(item) for item in value] if isinstance(value, Sequence) else value


def _last(path: str) -> str:
    trailing = re.search(r"[.:!?)]*$", path) if path.strip("./\\~") else None
    tail = trailing[0] if trailing else ""
    body = path[: len(path) - len(tail)] if tail else path
    flavour = PureWindowsPath if "\\" in body else PurePosixPath
    return (flavour(body).name or ".") + tail
