"""Which linears the entries of a stage name, and the counts that its overrides fix."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Mapping, Sequence

from sparsekit import budget as budgets
from sparsekit.contracts import LinearInfo
from sparsekit.errors import PlanError
from sparsekit.pattern import NM, Pattern


def matches(entries: Sequence[str], names: Sequence[str], known: Sequence[str], where: str) -> set[str]:
    """Return the linears that globs and `re:` entries match.

    Args:
        entries: What the recipe says.
        names: Names of linears.
        known: Further names of the model, that an entry may match without effect.
        where: Their key in the recipe, for errors.

    Raises:
        PlanError: An entry matches nothing known.
    """
    found: set[str] = set()
    for position, entry in enumerate(entries):
        expression = _expression(entry, f"{where}.{position}")
        if not any(expression.fullmatch(name) for name in (*names, *known)):
            raise _nothing(entry, "linear of this model", names[0], f"{where}.{position}")
        found |= {name for name in names if expression.fullmatch(name)}
    return found


def fixed_counts(
    overrides: Mapping[str, float], targets: Sequence[LinearInfo], pattern: Pattern, budget: int, where: str
) -> dict[str, int]:
    """Return kept weights of the targets whose sparsity the stage fixes by name.

    Args:
        overrides: Sparsity per glob or `re:` entry.
        targets: Linears of the stage.
        pattern: Pattern of the stage.
        budget: Weights kept in all targets together.
        where: Key of the overrides in the recipe, for errors.

    Raises:
        PlanError: An entry matches no target, two match the same one, or the rest cannot make up the budget.
    """
    if overrides and isinstance(pattern, NM):
        raise PlanError(
            f"pattern {pattern} gives every linear sparsity {pattern.sparsity:g}, overrides cannot change it",
            where=where,
            hint="Add linears that shall stay dense to the stage's ignore list.",
        )
    by: dict[str, str] = {}
    for entry in overrides:
        expression = _expression(entry, where)
        found = [linear.name for linear in targets if expression.fullmatch(linear.name)]
        if not found:
            raise _nothing(entry, "target of this stage", targets[0].name, where)
        if twice := next((name for name in found if name in by), None):
            raise PlanError(
                f"{by[twice]!r} and {entry!r} both match {twice}",
                where=where,
                hint="Narrow one of them, so that every linear has one sparsity.",
            )
        by |= dict.fromkeys(found, entry)
    fixed = {
        linear.name: budgets.total([linear], pattern, overrides[by[linear.name]])
        for linear in targets
        if linear.name in by
    }
    rest = sum(linear.numel for linear in targets if linear.name not in by)
    if not 0 <= budget - sum(fixed.values()) <= rest:
        raise PlanError(
            f"overrides keep {sum(fixed.values()):,} weights, the stage keeps {budget:,} in all: "
            f"the other targets cannot keep {budget - sum(fixed.values()):,} of {rest:,}",
            where=where,
            hint="Change the stage's sparsity or the overrides.",
        )
    return fixed


def _expression(entry: str, where: str) -> re.Pattern[str]:
    try:
        return re.compile(entry[3:] if entry.startswith("re:") else fnmatch.translate(entry))
    except re.error as error:
        raise PlanError(f"{entry!r} is not a regular expression: {error}", where=where) from error


def _nothing(entry: str, what: str, example: str, where: str) -> PlanError:
    return PlanError(
        f"{entry!r} matches no {what}",
        where=where,
        hint=f"Names look like {example!r}; globs such as '*.q_proj' and 're:...' are allowed.",
    )
