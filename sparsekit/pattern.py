"""Sparsity patterns as plain values. `N:M` KEEPS N of every M consecutive inputs of a row."""

from __future__ import annotations

import re
from dataclasses import dataclass

from sparsekit.errors import PlanError, RecipeSchemaError


@dataclass(frozen=True)
class Unstructured:
    """Any weight may be kept or removed."""

    def __str__(self) -> str:
        return "unstructured"

    @property
    def unit(self) -> int:
        """Number of weights that are kept or removed together."""
        return 1

    def check(self, out_features: int, in_features: int, *, where: str) -> None:
        """Every shape is possible."""


@dataclass(frozen=True)
class NM:
    """Exactly `keep` weights of every `of` consecutive inputs of a row are kept."""

    keep: int
    of: int

    def __post_init__(self) -> None:
        if not 0 < self.keep <= self.of:
            raise RecipeSchemaError(f"pattern {self.keep}:{self.of} keeps {self.keep} of {self.of}; need 1 <= N <= M")

    def __str__(self) -> str:
        return f"{self.keep}:{self.of}"

    @property
    def unit(self) -> int:
        """Number of weights that are kept or removed together."""
        return 1

    @property
    def sparsity(self) -> float:
        """Fraction of zeros the pattern implies: 1:4 is 0.75."""
        return 1 - self.keep / self.of

    def check(self, out_features: int, in_features: int, *, where: str) -> None:
        """Raise PlanError unless `of` divides the number of inputs."""
        if in_features % self.of:
            raise PlanError(
                f"pattern {self} needs an input width divisible by {self.of}, got {in_features}",
                where=where,
                hint="Choose another pattern, or add this linear to the stage's ignore list.",
            )


@dataclass(frozen=True)
class Block:
    """Blocks of `rows` outputs x `cols` inputs are kept or removed whole."""

    rows: int
    cols: int

    def __post_init__(self) -> None:
        if self.rows < 1 or self.cols < 1:
            raise RecipeSchemaError(f"pattern {self} has an empty block; need at least 1x1")

    def __str__(self) -> str:
        return f"{self.rows}x{self.cols}"

    @property
    def unit(self) -> int:
        """Number of weights that are kept or removed together."""
        return self.rows * self.cols

    def check(self, out_features: int, in_features: int, *, where: str) -> None:
        """Raise PlanError unless the block tiles the weight."""
        if out_features % self.rows or in_features % self.cols:
            raise PlanError(
                f"blocks of {self} do not tile a weight of {out_features} x {in_features} (outputs x inputs)",
                where=where,
                hint="Choose another block size, or add this linear to the stage's ignore list.",
            )


Pattern = Unstructured | NM | Block


def parse_pattern(text: str) -> Pattern:
    """Read `unstructured`, `2:4` (keep 2 of 4) or `4x1` (blocks of 4 outputs x 1 input)."""
    if text == "unstructured":
        return Unstructured()
    if match := re.fullmatch(r"(\d{1,4}):(\d{1,4})", text):
        return NM(int(match[1]), int(match[2]))
    if match := re.fullmatch(r"(\d{1,4})x(\d{1,4})", text):
        return Block(int(match[1]), int(match[2]))
    raise RecipeSchemaError(
        f"unknown pattern {text!r}; use unstructured, N:M such as 2:4 (keep 2 of 4), or RxC such as 4x1"
    )
