"""How a search compares with its nulls, in words."""

from __future__ import annotations

from collections.abc import Mapping


def verdict(name: str, found: Mapping[str, float]) -> str:
    """Return in a sentence what the fitness of a search and its nulls says, worst news first."""
    own = found[name]
    named = {null.replace("_", " "): value for null, value in found.items() if null != name}
    better = [null for null, value in named.items() if value <= own]
    if better:
        return f"{name} is NOT better than {' and '.join(better)} here."
    gains = [f"{1 - own / value:.1%} below {null}" for null, value in named.items()]
    return f"The fitness that {name} found is {', '.join(gains)}." if gains else f"{name} was compared with nothing."
