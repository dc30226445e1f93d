"""The level databases of parts: built where they are not there, looked up, and read for what was chosen in the end.

There is one for each kind, of the grids that are searched at the time; those of earlier grids are removed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from sparsekit import fs, ranks
from sparsekit.checkpoint import jsonio
from sparsekit.checkpoint.jsonio import JSON
from sparsekit.contracts import LinearInfo, ReshapeContext, Stats
from sparsekit.errors import SparsekitError
from sparsekit.lazy import torch
from sparsekit.models.block_files import write_block
from sparsekit.pattern import Unstructured
from sparsekit.search.grid import Grid
from sparsekit.search.levels import LevelDatabase
from sparsekit.search.parts import Kind
from sparsekit.search.switches import Levels
from sparsekit.stats.gram import Gram
from sparsekit.units import bytes_text

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Stores:
    """Databases of several kinds, looked up by the name of the linear."""

    databases: Mapping[str, LevelDatabase]

    def weight(self, linear: LinearInfo, dense: Tensor, level: int) -> Tensor:
        """Return a linear at a level, [out, in] of the dtype of `dense`."""
        return self.databases[linear.name].weight(linear, dense, level)

    def mask(self, linear: LinearInfo, level: int) -> Tensor:
        """Return the mask of a linear at a level, [out, in] bool."""
        return self.databases[linear.name].mask(linear, level)


@contextmanager
def part_levels(
    context: ReshapeContext, kinds: Sequence[Kind], grids: Sequence[Grid], damping: float
) -> Iterator[Stores]:
    """Open the databases of some grids, one for each kind, and build what they lack."""
    identity = identity_of(context, grids)
    mine = folder_of(context) / "levels" / jsonio.digest(identity)[:16]
    ranks.share(partial(_remove_others, mine))
    with ExitStack() as stack:
        opened = {
            kind.name: stack.enter_context(ranks.share(partial(LevelDatabase, mine / kind.name, identity, grid)))
            for kind, grid in zip(kinds, grids, strict=True)
        }
        _build(context, kinds, opened, damping)
        yield Stores({linear.name: opened[kind.name] for kind in kinds for linear in kind.linears})


def _build(context: ReshapeContext, kinds: Sequence[Kind], opened: Mapping[str, LevelDatabase], damping: float) -> None:
    """Remove parts of every linear that the databases lack at all of its levels, on the dense model's inputs."""
    missing = ranks.share(lambda: {kind.name: opened[kind.name].missing(kind.linears) for kind in kinds})
    wanted = {linear.name: kind for kind in kinds for linear in missing[kind.name]}
    if not wanted:
        return
    dtype, folder = context.anatomy.model.dtype, opened[kinds[0].name].folder
    size = sum(opened[name].expected_bytes(each, nested=False, dtype=dtype) for name, each in missing.items())
    ranks.share(lambda: fs.require_space(folder, size, "the level database"))
    context.reporter.note(f"search: level database of {bytes_text(size)} in {folder.parent}")

    def parts(each: tuple[LinearInfo, Tensor, Stats]) -> dict[str, Tensor]:
        linear, weight, stats = each
        kind, gram = wanted[linear.name], stats["gram"]
        assert isinstance(gram, Gram)  # noqa: S101  (what was asked for)
        database = opened[kind.name]
        at = kind.fit(linear, weight, gram, database.grid, damping)
        return database.parts(linear, weight, at, Unstructured(), nested=False, dtype=dtype)

    visited = (each for each in context.visit(frozenset({"gram"})) if each[0].name in wanted)
    while batch := list(islice(visited, ranks.here().size)):
        for (linear, *_), found in zip(batch, ranks.spread(batch, parts), strict=True):
            opened[wanted[linear.name].name].keep(linear, found)


def write_chosen(folder: Path, kinds: Sequence[Kind], best: Levels, stores: Stores) -> dict[str, JSON]:
    """Write a file for each block with the parts and columns that stay; return the sha256 of each.

    Args:
        folder: Where the files go, named by the number of the block.
        kinds: What was searched over.
        best: The level of each linear, one kind after the other.
        stores: Where the levels are.
    """
    written: dict[str, JSON] = {}
    count = len(kinds[0].linears)
    for place in range(count):
        found: dict[str, Tensor] = {}
        for number, kind in enumerate(kinds):
            linear, level = kind.linears[place], best[number * count + place]
            keep, weight = stores.mask(linear, level), stores.weight(linear, torch.empty(0), level)
            found |= {f"{kind.name}.kept": kind.kept(linear, keep), f"{kind.name}.weight": weight[:, keep[0]]}
        block = kinds[0].linears[place].block
        written[str(block)] = write_block(folder, block, found)
    return written


def identity_of(context: ReshapeContext, grids: Sequence[Grid]) -> dict[str, JSON]:
    """Return all that the levels of some grids depend on."""
    around: list[JSON] = [{"step": grid.step, "uniform": dict(grid.uniform)} for grid in grids]
    return {**context.identity, "grids": around}


def folder_of(context: ReshapeContext) -> Path:
    """Return where files are kept.

    Raises:
        SparsekitError: Nowhere.
    """
    if context.folder is None:
        raise SparsekitError("a search over widths needs a folder for its levels")
    return context.folder


def _remove_others(folder: Path) -> None:
    """Remove what stands beside a folder."""
    for other in sorted(folder.parent.iterdir()) if folder.parent.is_dir() else ():
        if other != folder:
            fs.remove_tree(other)
