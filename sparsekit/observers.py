"""What looks on while the walk runs a block: it feeds what passes to statistics, in the order of the samples.

Of several ranks each has its own samples; their statistics become one in the order of the ranks.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from sparsekit import ranks
from sparsekit.contracts import Stat
from sparsekit.errors import NonFinite, SparsekitError
from sparsekit.finite import all_finite
from sparsekit.lanes import Turns
from sparsekit.lazy import torch
from sparsekit.models.linears import Linear

if TYPE_CHECKING:
    from torch import Tensor, nn

EXPERT_MIN_TOKENS = 64
"""An expert that saw fewer tokens borrows the missing ones from the statistic pooled over its siblings."""


def merged(own: dict[str, Stat]) -> dict[str, Stat]:
    """Return the sum of the statistics that the ranks have of one linear; of another rank's one is held at a time."""
    found = ranks.share(lambda: own)
    for source in range(1, ranks.here().size):
        part = ranks.share(lambda: own, source)
        for name, stat in found.items():
            stat.merge(part[name])
    return found


class SeenAll(Exception):  # a signal that ends a pass, not an error
    """Every linear has got its input: what the block would still compute is not needed."""


class _Sample(threading.local):
    """What a thread knows of the sample it works on."""

    number: int
    turns: Turns
    whole: bool
    inputs: dict[str, Tensor]  # holding them keeps their addresses unique
    seen: set[str]


class Observer:
    """Feeds what passes modules to statistics, in the order of the samples."""

    def __init__(self, stats: dict[str, Stat], *, all_seen_ends: bool = False) -> None:
        self.stats = stats
        self._all_seen_ends = all_seen_ends
        self._sample = _Sample()

    def begin(self, sample: int, turns: Turns) -> None:
        """The calling thread starts a sample."""
        self._sample.number, self._sample.turns, self._sample.seen = sample, turns, set()

    # Hooks must return None: anything else replaces the module's input or output.
    def hook(self, path: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        """Return a pre-hook that sees what enters a module."""

        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            self.see(path, args[0])

        return hook

    def behind(self, path: str) -> Callable[[nn.Module, Any, Tensor], None]:
        """Return a hook that sees what a module returns."""

        def hook(module: nn.Module, args: Any, out: Tensor) -> None:
            self.see(path, out)

        return hook

    def see(self, name: str, x: Tensor) -> None:
        """Add `x: [..., width]` to the statistic of this name, if there is one."""
        sample = self._sample
        if name not in self.stats:
            return
        with sample.turns.turn(name, sample.number):
            self.stats[name].update(x.reshape(-1, x.shape[-1]))
        sample.seen.add(name)
        if self._all_seen_ends and len(sample.seen) == len(self.stats):
            raise SeenAll


class Collector:
    """Feeds inputs to statistics, once per distinct input tensor, in the order of the samples."""

    def __init__(self, linears: list[Linear], kinds: Mapping[str, type[Stat]], first_sample: int) -> None:
        self._linears = {linear.name: linear for linear in linears}
        self._first_sample = first_sample
        self._classes = kinds
        self._stats: dict[str, dict[str, Stat]] = {}
        self._leader: dict[str, str] = {}  # linear -> the linear whose statistic it shares
        self._sample = _Sample()

    def begin(self, sample: int, turns: Turns, *, whole: bool) -> None:
        """The calling thread starts a sample; `whole`: its block output is needed."""
        self._sample.number, self._sample.turns, self._sample.whole = sample, turns, whole
        self._sample.inputs, self._sample.seen = {}, set()

    def tap(self, name: str, x: Tensor) -> None:
        """Add what enters a linear, `x: [..., in]`, to its statistics, once for all that share it."""
        sample = self._sample
        shared = next((other for other, seen in sample.inputs.items() if seen is x), None)
        self._follow(name, shared or name)
        if not shared:
            sample.inputs[name] = x
            rows = x.reshape(-1, x.shape[-1])
            refuse_nonfinite(rows, name, self._first_sample + sample.number)
            with sample.turns.turn(name, sample.number):
                for stat in self._own(name).values():
                    stat.update(rows)
        sample.seen.add(name)
        if len(sample.seen) == len(self._linears) and not sample.whole:
            raise SeenAll

    def _follow(self, name: str, leader: str) -> None:
        """Have a linear share the statistic of another, or have its own."""
        if self._leader.setdefault(name, leader) != leader:
            raise SparsekitError("linears that shared an input in one sample do not in the next", where=name)

    def finish(self) -> tuple[dict[str, dict[str, Stat]], list[str]]:
        """Return statistics by linear and kind, of all ranks, and notes on experts that saw too few tokens."""
        self._merge_ranks()
        notes = self._fill_starved_experts()
        return {name: self._own(self._leader.get(name, name)) for name in self._linears}, notes

    def _own(self, name: str) -> dict[str, Stat]:
        if name not in self._stats:
            width = self._linears[name].info.in_features
            self._stats[name] = {key: cls(width) for key, cls in self._classes.items()}
        return self._stats[name]

    def _merge_ranks(self) -> None:
        """Make the statistics of all ranks, of which each has seen its own samples, one."""
        for leaders in ranks.gather(self._leader):
            for name, leader in leaders.items():
                self._follow(name, leader)
        for name in self._linears:
            if self._leader.get(name, name) == name:
                self._stats[name] = merged(self._own(name))

    def _fill_starved_experts(self) -> list[str]:
        """Add pseudo-tokens of the pooled mean to experts that saw too few tokens: unseen is not dead."""
        notes = []
        groups: dict[tuple[int, str], list[str]] = {}
        for name, linear in self._linears.items():
            if linear.expert is not None:
                groups.setdefault((id(linear.module), linear.parameter), []).append(name)
        for names in groups.values():
            for key, cls in self._classes.items():
                pooled = cls(self._linears[names[0]].info.in_features)
                for name in names:
                    pooled.merge(self._own(name)[key])
                for name in names:
                    stat = self._own(name)[key]
                    missing = EXPERT_MIN_TOKENS - stat.tokens
                    if missing > 0 and pooled.tokens:
                        notes.append(f"{name}: {stat.tokens} tokens, {key} filled up with the mean over all experts")
                        stat.merge(pooled, missing / pooled.tokens)
        return notes


def refuse_nonfinite(x: Tensor, where: str, sample: int) -> None:
    """Raise NonFinite, with place and first token, unless all of `x: [..., width]` is finite."""
    if all_finite(x):
        return
    rows = x.reshape(-1, x.shape[-1])
    bad = (~torch.isfinite(rows)).any(dim=1)
    kind = "NaN" if bool(torch.isnan(rows).any()) else "infinite"
    first = int(bad.nonzero()[0])
    raise NonFinite(
        f"{int(bad.sum())} of {len(bad)} activation rows are {kind} (sample {sample}, first at token {first})",
        where=where,
        hint="Check that sample, set another calibration source, or run with --dtype fp32.",
    )
