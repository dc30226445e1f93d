"""The one block walker: load a block, look at its inputs, let a visitor change it, propagate, release.

Everything that methods share happens here: capturing inputs, hooks, propagation, finite checks. Samples go through a
block one by one (several side by side, in threads), so results cannot depend on a batch size. Of several ranks each
has its own samples, and statistics are merged in the order of the ranks, which is that of the samples.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Literal

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
from sparsekit.observers import Collector, Observer, SeenAll, merged, refuse_nonfinite
from sparsekit.progress import Reporter, track

if TYPE_CHECKING:
    from torch import Tensor, nn

Propagate = Literal["block", "none"]
"""`block`: each block sees the outputs of changed earlier blocks. `none`: dense inputs everywhere."""


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
            refuse_nonfinite(states, "embeddings", self.first_sample + sample)

    def differentiate(
        self, visit: Visit, names: Collection[str], kinds: Mapping[str, type[Stat]]
    ) -> dict[str, dict[str, Stat]]:
        if self.gradients is None:
            raise SparsekitError("statistics of gradients asked for in a walk without probes")
        with ranks.together():
            found = self.gradients.collect(visit.index, names, kinds)
        return {name: merged(stats) for name, stats in found.items()}

    def collect(
        self, visit: Visit, linears: list[Linear], kinds: Mapping[str, type[Stat]]
    ) -> dict[str, dict[str, Stat]]:
        if self.samples is None:
            raise SparsekitError("statistics of inputs asked for in a walk without samples")
        collector = Collector(linears, kinds, self.first_sample)
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
        return merged({"flow": stat})["flow"]

    def inputs(self, kind: type[Stat]) -> Stat:
        stat = self._of_stream(kind)
        for hidden in self.hidden:
            stat.update(hidden.reshape(-1, hidden.shape[-1]))
        return merged({"": stat})[""]

    def observe(self, visit: Visit, paths: Collection[str], kind: type[Stat]) -> dict[str, Stat]:
        observer = Observer({path: self._of_stream(kind) for path in sorted(paths)})
        handles = [
            visit.block.get_submodule(path).register_forward_pre_hook(observer.hook(path)) for path in paths if path
        ]
        try:
            self._forward(visit, keep=False, observer=observer)
        finally:
            for handle in handles:
                handle.remove()
        return merged(observer.stats)

    def watch(self, visit: Visit, inputs: Mapping[str, Stat], outputs: Mapping[str, Stat]) -> dict[str, Stat]:
        observer = Observer({**inputs, **outputs}, all_seen_ends=True)
        handles = tap_inputs([linear for linear in visit.linears if linear.name in inputs], observer.see)
        handles += [visit.block.get_submodule(path).register_forward_hook(observer.behind(path)) for path in outputs]
        try:
            self._forward(visit, keep=False, observer=observer)
        finally:
            for handle in handles:
                handle.remove()
        return merged(observer.stats)

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
        collector: Collector | None = None,
        flow: Stat | None = None,
        observer: Observer | None = None,
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
            except SeenAll:
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
                refuse_nonfinite(out, where, self.first_sample + sample)
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
