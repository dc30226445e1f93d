"""What a search may spend, as people say it: `10min`, `2h`, `20Mtokens`."""

from __future__ import annotations

import re
from dataclasses import dataclass

_FORM = re.compile(r"(\d+(?:\.\d+)?)\s*(s|min|h|d|tokens|ktokens|Mtokens|Gtokens)")
_SECONDS = {"s": 1, "min": 60, "h": 3600, "d": 86400}
_TOKENS = {"tokens": 1, "ktokens": 10**3, "Mtokens": 10**6, "Gtokens": 10**9}


@dataclass(frozen=True)
class SearchBudget:
    """A limit: seconds or tokens, the other one None."""

    seconds: float | None
    tokens: int | None


def parse_budget(text: str) -> SearchBudget:
    """Read a budget.

    Raises:
        ValueError: The text is none, or nothing.
    """
    found = _FORM.fullmatch(text.strip())
    if found is None or float(found[1]) == 0:
        raise ValueError(f"{text!r} is no budget: write a time such as 10min or 2h, or an amount such as 20Mtokens")
    amount, unit = float(found[1]), found[2]
    if unit in _SECONDS:
        return SearchBudget(amount * _SECONDS[unit], None)
    return SearchBudget(None, round(amount * _TOKENS[unit]))
