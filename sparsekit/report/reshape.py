"""What a reshape stage left of each block, as a table: decisions beside what they were made from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sparsekit.report.text import number, percent


@dataclass(frozen=True)
class ReshapePanel:
    """A reshape stage, ready to be shown.

    Attributes:
        name: The method.
        remark: What is left, in a sentence.
        header, rows: A row for each old block.
    """

    name: str
    remark: str
    header: list[str]
    rows: list[list[str]]


def reshape_panels(report: Mapping[str, Any]) -> list[ReshapePanel]:
    """Return a panel for every reshape stage."""
    return [_panel(change) for change in report.get("reshapes", ())]


def _panel(change: Mapping[str, Any]) -> ReshapePanel:
    facts = {name: values for name, values in change["facts"].items() if _is_by_block(values)}
    lost = {name: blocks for name, blocks in change["plan"].items() if isinstance(blocks, list)}
    known = {int(key) for values in facts.values() for key in values} | {
        block for gone in lost.values() for block in gone
    }
    count = 1 + max(known, default=-1)
    rows = [
        [
            str(block),
            *(number(values[str(block)]) if str(block) in values else "" for values in facts.values()),
            *("dropped" if block in blocks else "" for blocks in lost.values()),
        ]
        for block in range(count)
    ]
    share = change["parameters_after"] / change["parameters_before"]
    remark = (
        f"{change['blocks']} blocks are left, {percent(share)} of the parameters "
        f"({change['parameters_after']:,} of {change['parameters_before']:,})."
    )
    return ReshapePanel(change["method"], remark, ["block", *facts, *lost], rows)


def _is_by_block(values: Mapping[str, float]) -> bool:
    return bool(values) and set(values) == {str(block) for block in range(len(values))}
