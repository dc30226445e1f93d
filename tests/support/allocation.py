"""Allocators without a model: weights, inputs and losses from plain tensors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sparsekit import registry
from sparsekit.contracts import AllocationContext, LinearInfo, WholeModel
from sparsekit.pattern import Pattern, Unstructured


def context(
    linears: Sequence[LinearInfo],
    weights: Mapping[str, Any] | None = None,
    inputs: Mapping[str, Any] | None = None,
    *,
    pattern: Pattern | None = None,
    pruner: str = "wanda",
    whole: WholeModel | None = None,
    folder: Path | None = None,
) -> AllocationContext:
    """Return what an allocator sees of `linears` with `weights` [out, in] and `inputs` [tokens, in] per name."""

    def visit(needs: frozenset[str]) -> Iterator[Any]:
        assert weights is not None, "looked at a model that it should not need"
        for linear in linears:
            stats = {name: registry.load("stats", name)(linear.in_features) for name in needs}
            for stat in stats.values():
                stat.update(inputs[linear.name])
            yield linear, weights[linear.name], stats

    @contextmanager
    def load() -> Iterator[WholeModel]:
        assert whole is not None, "asked for the whole model"
        yield whole

    method = registry.load("pruners", pruner)
    chosen = method(method.options_type(), 0)
    return AllocationContext(linears, pattern or Unstructured(), visit, chosen, load, folder=folder)


def allocator(name: str, seed: int = 0, **options: Any) -> Any:
    """Return an allocator with its options; a search is short unless they say otherwise."""
    method = registry.load("allocate", name)
    if "generations" in method.options_type.model_fields:
        options = {"generations": 2, "offspring": 3, "tokens": (512, 1024), "samples": 8, **options}
    return method(method.options_type(**options), seed)
