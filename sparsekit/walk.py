"""The one block walker: load a block, look at its inputs, let a visitor change it, propagate, release.

Everything that methods share happens here: capturing inputs, hooks, propagation, finite checks. Samples go through a
block one by one (several side by side, in threads), so results cannot depend on a batch size. Of several ranks each
has its own samples, and statistics are merged in the order of the ranks, which is that of the samples.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

from sparsekit import ranks, registry
from sparsekit.contracts import OpenBlock, Stat
from sparsekit.errors import NonFinite, SparsekitError
from sparsekit.finite import all_finite
from sparsekit.lanes import MAX_LANES, Turns, side_by_side
from sparsekit.lazy import torch
from sparsekit.memory import release_freed
from sparsekit.models.capture import Call, capture, run_block
from sparsekit.models.gradients import BlockGradients
from sparsekit.models.lazy_model import LazyModel
from sparsekit.models.linears import Linear, tap_inputs
from sparsekit.progress import Reporter, track

if TYPE_CHECKING:
    from torch import Tensor, nn

Propagate = Literal["block", "none"]
"""`block`: each block sees the outputs of changed earlier blocks. `none`: dense inputs everywhere."""

EXPERT_MIN_TOKENS = 64
"""An expert that saw fewer tokens borrows the missing ones from the statistic pooled over its siblings."""


class Visit(OpenBlock):
    """One block while it is loaded."""

    def __init__(self, walk: _Walk, index: int, block: nn.Module) -> None:
        self.index = index
        self.block = block
        self.linears: list[Linear] = walk.model.stack.linears(index)
        self.prefix = walk.model.stack.prefix(index)
        self.dtype = walk.model.dtype
        self.notes: list[str] = []
        self._walk = walk

    def collect(self, linears: Collection[Linear], needs: frozenset[str]) -> dict[str, dict[str, Stat]]:
        """Run the block once on all samples; return {linear name: {statistic name: statistic}}.

        Linears that receive the same tensor share one statistic of inputs. Statistics of gradients are the dense
        model's, whatever was changed on the way.
        """
        kinds: dict[str, type[Stat]] = {name: registry.load("stats", name) for name in sorted(needs)}
        stats: dict[str, dict[str, Stat]] = {linear.name: {} for linear in linears}
        if of_inputs := {name: kind for name, kind in kinds.items() if kind.of == "inputs"}:
            _join(stats, self._walk.collect(self, list(linears), of_inputs))
        if of_gradients := {name: kind for name, kind in kinds.items() if kind.of == "gradients"}:
            _join(stats, self._walk.differentiate(self, stats.keys(), of_gradients))
        return stats

    def flow(self, name: str) -> Stat:
        """Run the block on all samples; return a statistic of the hidden states around it.

        Its outputs are the next block's inputs: what is changed afterwards, later blocks do not see.
        """
        return self._walk.flow(self, registry.load("stats", name))

    def observe(self, paths: Collection[str], name: str) -> dict[str, Stat]:
        """Run the block on all samples; return the statistic `name` of what enters each of these modules.

        Args:
            paths: Relative to the block; the empty one stands for what leaves the block.
            name: Of the statistic.
        """
        return self._walk.observe(self, paths, registry.load("stats", name))

    def watch(self, inputs: Mapping[str, Stat], outputs: Mapping[str, Stat] = MappingProxyType({})) -> dict[str, Stat]:
        """Run the block on all samples as far as needed; return the statistics with what they have seen.

        Args:
            inputs: Name of a linear of the block -> statistic of its inputs.
            outputs: Path of a module, relative to the block -> statistic of what it returns.
        """
        return self._walk.watch(self, inputs, outputs)

    def sequence(self) -> list[list[Linear]]:
        """Return the block's linears in the order they run in; those that get the same input are together."""
        return self._walk.sequence(self)

    def outputs(self) -> list[Tensor]:
        """Run the block on all samples; return what leaves it, [..., tokens, hidden] of each of this rank's."""
        return self._walk.outputs(self)

    def inputs(self, name: str) -> Stat:
        """Return the statistic `name` of the hidden states in front of the block."""
        return self._walk.inputs(registry.load("stats", name))

    def map_inputs(self, change: Callable[[Tensor], Tensor]) -> None:
        """Replace the hidden states in front of the block, [..., tokens, hidden] of each sample, by what it returns."""
        for hidden in self._walk.hidden:
            hidden.copy_(change(hidden))

    def adopt(self, shard: Path) -> None:
        """Take this block's tensors from a shard written earlier."""
        self._walk.model.release_block(self.index)
        self._walk.model.redirect(self.index, shard)
        self._walk.model.load_block(self.index)


def walk(
    model: LazyModel,
    samples: Tensor | None,
    reporter: Reporter,
    *,
    propagate: Propagate = "block",
    probed: Tensor | None = None,
    task: str = "blocks",
) -> Iterator[Visit]:
    """Visit every block in order; what the visitor changes is what later blocks see.

    Args:
        model: Nothing needs to be loaded.
        samples: ids [samples, sequence_length], or None when nobody will ask for statistics of inputs.
        reporter: Told about every block.
        propagate: What the inputs of a block are made by.
        probed: ids [samples, sequence_length] for statistics of gradients, None when nobody will ask for them.
        task: Name of the step in the progress display.
    """
    own = probed[ranks.portion(len(probed))] if probed is not None else None
    gradients = BlockGradients(model, own, reporter, task) if own is not None else None
    yield from _Walk(model, samples, reporter, propagate, gradients, task).run()


class _Walk:
    def __init__(
        self,
        model: LazyModel,
        samples: Tensor | None,
        reporter: Reporter,
        propagate: Propagate,
        gradients: BlockGradients | None,
        task: str,
    ) -> None:
        self.model = model
        own = ranks.portion(len(samples)) if samples is not None else slice(0)
        self.samples = samples[own] if samples is not None else None
        self.first_sample = own.start or 0
        self.reporter = reporter
        self.propagate = propagate
        self.gradients = gradients
        self.task = task
        self.hidden: list[Tensor] = []
        self.calls: list[list[Call]] = []
        self.propagated = False

    def run(self) -> Iterator[Visit]:
        if self.samples is not None:
            with ranks.together():
                self._capture(self.samples)
        for index in track(range(self.model.blocks), self.reporter, self.task, self.model.blocks, "blocks"):
            block = self.model.load_block(index)
            _refuse_nonfinite_weights(self.model, block, index)
            visit = Visit(self, index, block)
            self.propagated = False
            yield visit
            if self.samples is not None and not self.propagated and index + 1 < self.model.blocks:
                self._forward(visit, keep=True)
            if self.calls:
                self.calls[index] = []
            self.model.release_block(index)

    def _capture(self, samples: Tensor) -> None:
        if not len(samples):  # fewer than ranks
            self.calls = [[] for _ in range(self.model.blocks)]
            return
        self.model.load_outer()
        self.model.load_block(0)
        step = f"{self.task}: capture inputs"
        self.reporter.start(step, len(samples), "samples")
        self.hidden, self.calls = capture(self.model, samples, lambda: self.reporter.advance(step))
        self.reporter.finish(step)
        self.model.release_block(0)
        self.model.release_outer()
        release_freed()
        for sample, states in enumerate(self.hidden):
            _refuse_nonfinite(states, "embeddings", self.first_sample + sample)

    def differentiate(
        self, visit: Visit, names: Collection[str], kinds: Mapping[str, type[Stat]]
    ) -> dict[str, dict[str, Stat]]:
        if self.gradients is None:
            raise SparsekitError("statistics of gradients asked for in a walk without probes")
        with ranks.together():
            found = self.gradients.collect(visit.index, names, kinds)
        return {name: _merged(stats) for name, stats in found.items()}

    def collect(
        self, visit: Visit, linears: list[Linear], kinds: Mapping[str, type[Stat]]
    ) -> dict[str, dict[str, Stat]]:
        if self.samples is None:
            raise SparsekitError("statistics of inputs asked for in a walk without samples")
        collector = _Collector(linears, kinds, self.first_sample)
        handles = tap_inputs(linears, collector.tap)
        try:
            self._forward(visit, keep=self.propagate == "none", collector=collector)
        finally:
            for handle in handles:
                handle.remove()
        stats, notes = collector.finish()
        visit.notes.extend(notes)
        return stats

    def flow(self, visit: Visit, kind: type[Stat]) -> Stat:
        stat = self._of_stream(kind)
        self._forward(visit, keep=True, flow=stat)
        return _merged({"flow": stat})["flow"]

    def inputs(self, kind: type[Stat]) -> Stat:
        stat = self._of_stream(kind)
        for hidden in self.hidden:
            stat.update(hidden.reshape(-1, hidden.shape[-1]))
        return _merged({"": stat})[""]

    def observe(self, visit: Visit, paths: Collection[str], kind: type[Stat]) -> dict[str, Stat]:
        observer = _Observer({path: self._of_stream(kind) for path in sorted(paths)})
        handles = [
            visit.block.get_submodule(path).register_forward_pre_hook(observer.hook(path)) for path in paths if path
        ]
        try:
            self._forward(visit, keep=False, observer=observer)
        finally:
            for handle in handles:
                handle.remove()
        return _merged(observer.stats)

    def watch(self, visit: Visit, inputs: Mapping[str, Stat], outputs: Mapping[str, Stat]) -> dict[str, Stat]:
        observer = _Observer({**inputs, **outputs}, all_seen_ends=True)
        handles = tap_inputs([linear for linear in visit.linears if linear.name in inputs], observer.see)
        handles += [visit.block.get_submodule(path).register_forward_hook(observer.behind(path)) for path in outputs]
        try:
            self._forward(visit, keep=False, observer=observer)
        finally:
            for handle in handles:
                handle.remove()
        return _merged(observer.stats)

    def sequence(self, visit: Visit) -> list[list[Linear]]:
        linears = {linear.name: linear for linear in visit.linears}
        names = ranks.share(lambda: self._sequence(visit))
        return [[linears[name] for name in together] for together in names]

    def _sequence(self, visit: Visit) -> list[list[str]]:
        """Return the names of the linears in the order of their calls on the first sample, by input."""
        inputs: list[tuple[Tensor, list[str]]] = []

        def tap(name: str, x: Tensor) -> None:
            if not inputs or inputs[-1][0] is not x:
                inputs.append((x, []))
            inputs[-1][1].append(name)

        handles = tap_inputs(visit.linears, tap)
        try:
            run_block(visit.block, self.hidden[0], self.calls[visit.index][0])
        finally:
            for handle in handles:
                handle.remove()
        return [together for _, together in inputs]

    def outputs(self, visit: Visit) -> list[Tensor]:
        calls = self.calls[visit.index]
        with ranks.together():
            return [run_block(visit.block, hidden, call) for hidden, call in zip(self.hidden, calls, strict=True)]

    def _of_stream(self, kind: type[Stat]) -> Stat:
        """Return an empty statistic of hidden states."""
        if self.samples is None:
            raise SparsekitError("statistics of hidden states asked for in a walk without samples")
        return kind(ranks.share(lambda: self.hidden[0].shape[-1]))

    def _forward(
        self,
        visit: Visit,
        *,
        keep: bool,
        collector: _Collector | None = None,
        flow: Stat | None = None,
        observer: _Observer | None = None,
    ) -> None:
        """Run the block on every sample; with `keep` its outputs become the next block's inputs."""
        where = self.model.stack.prefix(visit.index)
        calls = self.calls[visit.index]

        def one(sample: int, turns: Turns) -> None:
            if collector:
                collector.begin(sample, turns, whole=keep)
            if observer:
                observer.begin(sample, turns)
            try:
                out = run_block(visit.block, self.hidden[sample], calls[sample])
            except _SeenAll:
                return
            same = out.shape == self.hidden[sample].shape
            if out.shape[:-1] != self.hidden[sample].shape[:-1] or not (same or self.model.shapes.stream):
                got = list(self.hidden[sample].shape)
                raise SparsekitError(f"block returned {list(out.shape)}, got {got}", where=where)
            if flow is not None:
                with turns.turn("flow", sample):
                    flow.update(torch.stack([self.hidden[sample], out]).flatten(1, -2))
            if observer:
                observer.see("", out)
            if keep:
                _refuse_nonfinite(out, where, self.first_sample + sample)
                if same:
                    # In place: tensors that live on between those that come and go keep freed memory from the system.
                    self.hidden[sample].copy_(out)
                else:
                    self.hidden[sample] = out

        # A model's own code may keep things in its modules between calls; transformers' blocks do not.
        own_code = type(visit.block).__module__.startswith("transformers_modules")
        with ranks.together():
            side_by_side(len(calls), one, most=1 if own_code else MAX_LANES)
        self.propagated = self.propagated or keep
        release_freed()


def _join(into: dict[str, dict[str, Stat]], found: Mapping[str, Mapping[str, Stat]]) -> None:
    for name, stats in found.items():
        into[name] |= stats


def _merged(own: dict[str, Stat]) -> dict[str, Stat]:
    """Return the sum of the statistics that the ranks have of one linear; of another rank's one is held at a time."""
    found = ranks.share(lambda: own)
    for source in range(1, ranks.here().size):
        part = ranks.share(lambda: own, source)
        for name, stat in found.items():
            stat.merge(part[name])
    return found


class _Observer:
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
            raise _SeenAll


class _SeenAll(Exception):  # a signal that ends a pass, not an error
    """Every linear has got its input: what the block would still compute is not needed."""


class _Sample(threading.local):
    """What a thread knows of the sample it works on."""

    number: int
    turns: Turns
    whole: bool
    inputs: dict[str, Tensor]  # holding them keeps their addresses unique
    seen: set[str]


class _Collector:
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
        sample = self._sample
        shared = next((other for other, seen in sample.inputs.items() if seen is x), None)
        self._follow(name, shared or name)
        if not shared:
            sample.inputs[name] = x
            rows = x.reshape(-1, x.shape[-1])
            _refuse_nonfinite(rows, name, self._first_sample + sample.number)
            with sample.turns.turn(name, sample.number):
                for stat in self._own(name).values():
                    stat.update(rows)
        sample.seen.add(name)
        if len(sample.seen) == len(self._linears) and not sample.whole:
            raise _SeenAll

    def _follow(self, name: str, leader: str) -> None:
        """Have a linear share the statistic of another, or have its own."""
        if self._leader.setdefault(name, leader) != leader:
            raise SparsekitError("linears that shared an input in one sample do not in the next", where=name)

    def finish(self) -> tuple[dict[str, dict[str, Stat]], list[str]]:
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
                self._stats[name] = _merged(self._own(name))

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


def _refuse_nonfinite_weights(model: LazyModel, block: nn.Module, index: int) -> None:
    """Name the damaged tensor itself: left in, it shows as NaN activations of the linear behind it."""
    for name, parameter in block.named_parameters():
        if all_finite(parameter):
            continue
        bad = ~torch.isfinite(parameter)
        flat = bad.reshape(-1).to(torch.uint8).argmax()
        first = [int(place) for place in torch.unravel_index(flat, bad.shape)]
        kind = "NaN" if bool(torch.isnan(parameter).any()) else "infinite"
        raise NonFinite(
            f"{int(bad.sum())} of {parameter.numel()} weights are {kind} (first at {first})",
            where=f"{model.stack.prefix(index)}.{name}",
            hint="Fetch the model again if it is stored so, or run with --dtype bf16 if --dtype fp16 overflows.",
        )


def _refuse_nonfinite(x: Tensor, where: str, sample: int) -> None:
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
