"""Bases of a model's residual stream, found in a walk over its blocks, and kept in files.

Nothing is turned meanwhile: hidden states stay in their own space. Where a place has been cut, they are projected on
what its basis holds, which is what the sliced model computes.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsekit import fs, ranks
from sparsekit.checkpoint.jsonio import JSON
from sparsekit.checkpoint.safetensors_file import encode
from sparsekit.contracts import OpenBlock, ReshapeContext
from sparsekit.errors import ChecksumError
from sparsekit.models.raw import to_raw
from sparsekit.models.residual import Residual
from sparsekit.solve.rotation import Basis, refitted
from sparsekit.stats.gram import Gram

if TYPE_CHECKING:
    from torch import Tensor

_SEEN = "directions"
"""The statistic of what readers see: a norm makes all tokens alike."""


@dataclass(frozen=True)
class StreamBases:
    """Finds the bases of a stream; all ranks find the same.

    Attributes:
        context: What may be looked at.
        stream: The residual stream.
        stat: The statistic, a gram matrix of the stream, whose principal components are kept.
        make: Makes the basis of a place, from that gram matrix [hidden, hidden], its width and its number.
    """

    context: ReshapeContext
    stream: Residual
    stat: str
    make: Callable[[Tensor, int, int], Basis]

    def shared(self, width: int, *, refit: bool) -> Iterator[tuple[int, Basis]]:
        """Yield the basis of each place, with its number: one for all, of the dense model's streams together.

        Args:
            width: Of the stream, everywhere.
            refit: Each place's readers make up for what the basis lacks there; a second walk.
        """
        total: Gram | None = None
        for _, gram in self._dense(self.stat):
            if total is None:
                total = gram
            else:
                total.merge(gram)
        assert total is not None  # noqa: S101  (a model has blocks)
        basis = ranks.share(partial(self.make, total.matrix, width, 0))
        if not refit:
            yield from ((number, basis) for number in range(len(self.stream.places)))
            return
        for number, gram in self._dense(_SEEN):
            yield number, ranks.share(partial(refitted, basis, gram.matrix, centred=self.stream.centred))

    def each(self, widths: Sequence[int | None]) -> Iterator[tuple[int, Basis]]:
        """Yield a basis of its own for each place, of the stream as it is after all cuts before it.

        Args:
            widths: One for each place; None for the head's leaves that uncut.
        """
        number = 0
        with ExitStack() as hooks:
            for block in self.context.blocks():
                hooks.close()  # those of the block before, which ran with them until now
                for k, norm in enumerate(self._norms(block)):
                    stat = block.observe([norm], self.stat)[norm] if k else block.inputs(self.stat)
                    basis = self._cut(stat, widths[number], number)
                    if k == 0:
                        block.map_inputs(basis.project)
                    else:
                        self._project_sum(hooks, block, k, basis)
                    yield number, basis
                    number += 1
                if block.index == self.context.anatomy.blocks - 1 and widths[number] is not None:
                    yield number, self._cut(block.observe([""], self.stat)[""], widths[number], number)

    def _cut(self, stat: object, width: int | None, number: int) -> Basis:
        assert width is not None  # noqa: S101  (only the head's place is uncut)
        return ranks.share(partial(self.make, _gram(stat).matrix, width, number))

    def _dense(self, stat: str) -> Iterator[tuple[int, Gram]]:
        """Walk the dense model once; yield the number and a gram matrix of the stream at each place."""
        number = 0
        for block in self.context.blocks():
            _, *inner = self._norms(block)
            behind = [""] if block.index == self.context.anatomy.blocks - 1 else []
            yield number, _gram(block.inputs(stat))
            found = block.observe([*inner, *behind], stat) if inner or behind else {}
            for path in (*inner, *behind):
                number += 1
                yield number, _gram(found[path])
            number += 1

    def _norms(self, block: OpenBlock) -> list[str]:
        """Return a norm of each place of a block, relative to the block."""
        return [self._inner(block, place.branches[0].norm) for _, place in self.stream.of_block(block.index)]

    def _inner(self, block: OpenBlock, name: str) -> str:
        return name.removeprefix(f"{self.context.anatomy.prefix}.{block.index}.")

    def _project_sum(self, hooks: ExitStack, block: OpenBlock, k: int, basis: Basis) -> None:
        """Have a block's branch add what makes the sum with the stream one that the basis of place k can hold."""
        _, place = self.stream.of_block(block.index)[k - 1]
        norm, module = (
            block.block.get_submodule(self._inner(block, name))
            for name in (place.branches[0].norm, place.branches[0].module)
        )
        share = float(getattr(block.block, "residual_multiplier", 1.0))  # of the branch, in the sum
        entered = threading.local()  # samples go through a block side by side

        def enter(module: Any, args: tuple[Tensor, ...]) -> None:
            entered.stream = args[0]

        def leave(module: Any, args: Any, out: Any) -> Any:
            first = out[0] if isinstance(out, tuple) else out
            changed = (basis.project(entered.stream + share * first) - entered.stream) / share
            return (changed, *out[1:]) if isinstance(out, tuple) else changed

        hooks.callback(norm.register_forward_pre_hook(enter).remove)
        hooks.callback(module.register_forward_hook(leave).remove)


class BasisFiles(Sequence["Basis | None"]):
    """The bases of all places, a file each, read when they are asked for; None for a place that is uncut."""

    def __init__(self, folder: Path, files: Mapping[str, JSON], widths: Sequence[int | None]) -> None:
        """Take what is there.

        Args:
            folder: Where the files are.
            files: The sha256 of each, by the number of its place.
            widths: Of all places.
        """
        self._folder, self._files, self._widths = folder, files, widths

    def __len__(self) -> int:
        """Return the number of places."""
        return len(self._widths)

    def __getitem__(self, number: Any) -> Any:
        """Return the basis of a place.

        Raises:
            ChecksumError: Its file is not what was written.
        """
        from safetensors.torch import load_file

        number = range(len(self))[number]
        if self._widths[number] is None:
            return None
        path = _path(self._folder, number)
        if fs.sha256_file(path).sha256 != self._files[str(number)]:
            raise ChecksumError("not what was written", where=str(path), hint="Run with --no-resume.")
        return Basis(**load_file(path))

    @staticmethod
    def write(folder: Path, number: int, basis: Basis) -> str:
        """Write the basis of a place; return the sha256 of its file."""
        fs.make_folder(folder)
        data = encode({"columns": to_raw(basis.columns), "back": to_raw(basis.back)}, {})
        return fs.replace_file(_path(folder, number), data).sha256


def _gram(stat: object) -> Gram:
    assert isinstance(stat, Gram)  # noqa: S101  (what was asked for)
    return stat


def _path(folder: Path, number: int) -> Path:
    return folder / f"{number}.safetensors"
