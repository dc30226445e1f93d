"""Gradients of the loss with respect to the weights, sample by sample, with one block of the model in memory.

The chain rule is cut between the blocks. A pass forwards keeps what enters each block. A pass backwards, in which each
block runs again on what entered it, keeps the gradient with respect to what leaves it. With the two, a block's weights
have their gradients from that block alone. All of it takes about twice the time of one backward pass.
"""

from __future__ import annotations

import threading
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

from sparsekit.contracts import Stat
from sparsekit.errors import NonFinite
from sparsekit.finite import all_finite
from sparsekit.lanes import MAX_LANES, Turns, side_by_side
from sparsekit.lazy import torch
from sparsekit.memory import release_freed
from sparsekit.models.capture import Call, capture, replay, return_template, run_block
from sparsekit.models.lazy_model import LazyModel
from sparsekit.progress import Reporter

if TYPE_CHECKING:
    from torch import Tensor


class BlockGradients:
    """Gradients of each sample's mean next-token loss, in float32, of the model as it was when this was made."""

    def __init__(self, model: LazyModel, ids: Tensor, reporter: Reporter, task: str) -> None:
        """Note what to differentiate; nothing is loaded before gradients are asked for.

        Args:
            model: Source of the blocks; what is redirected later does not count.
            ids: Samples, [samples, sequence_length], without padding; none at all give empty statistics.
            reporter: Told about the two passes.
            task: Name of the step in the progress display.
        """
        self._model = model.in_dtype(torch.float32)
        self._ids = ids
        self._reporter = reporter
        self._task = f"{task}: gradients of {ids.shape[0]} x {ids.shape[1]} tokens"
        self._calls: list[list[Call]] = []
        self._entered: dict[int, list[Tensor]] = {}  # block -> what enters it, per sample
        self._left: dict[int, list[Tensor]] = {}  # block -> the gradient with respect to what leaves it

    def collect(
        self, index: int, names: Collection[str], kinds: Mapping[str, type[Stat]]
    ) -> dict[str, dict[str, Stat]]:
        """Return {linear name: {statistic name: statistic}} of the gradients of a block's linears.

        Blocks are asked for in the order of the model, each once. An expert that no token of a sample was sent to has
        a gradient of zero there.

        Args:
            index: Number of the block.
            names: Linears of that block.
            kinds: Statistics of gradients.

        Raises:
            NonFinite: naming sample and linear.
        """
        if not self._calls and len(self._ids):
            self._differentiate(index)
        block = self._model.load_block(index)
        linears = [linear for linear in self._model.stack.linears(index) if linear.name in names]
        stats = {linear.name: {key: kind(linear.info.in_features) for key, kind in kinds.items()} for linear in linears}
        # Experts of one layer share a parameter, which is differentiated once.
        parameters = {id(x): x for x in (linear.module.get_parameter(linear.parameter) for linear in linears)}
        for parameter in parameters.values():
            parameter.requires_grad_(True)
        entered, left = self._entered.pop(index, []), self._left.pop(index, [])

        def one(sample: int, turns: Turns) -> None:
            with torch.enable_grad():
                out = replay(block, entered[sample].clone(), self._calls[index][sample])
            found = torch.autograd.grad(
                out, [*parameters.values()], left[sample], allow_unused=True, materialize_grads=True
            )
            gradients = dict(zip(parameters, found, strict=True))
            with turns.turn("grad", sample):
                for linear in linears:
                    gradient = linear.view(gradients[id(linear.module.get_parameter(linear.parameter))])
                    _refuse_nonfinite(gradient, linear.name, sample)
                    for stat in stats[linear.name].values():
                        stat.update(gradient)

        self._run(one)
        self._model.release_block(index)
        if self._calls:
            self._calls[index] = []
        release_freed()
        return stats

    def _differentiate(self, first: int) -> None:
        """Keep what the blocks from `first` on need for their gradients."""
        model, blocks = self._model, self._model.blocks
        self._reporter.start(self._task, 2 * blocks - first, "blocks")
        model.load_outer()
        model.load_block(0)
        states, self._calls = capture(model, self._ids, lambda: None)
        returned = return_template(model, self._ids[:1, :8])
        for index in range(blocks):
            self._entered[index] = states
            states = self._forward(index, states)
            if index < first:
                del self._entered[index]
        self._left[blocks - 1] = self._behind(states, returned)
        model.release_outer()
        for index in range(blocks - 1, first, -1):
            self._left[index - 1] = self._backward(index)
        self._reporter.finish(self._task)

    def _forward(self, index: int, states: list[Tensor]) -> list[Tensor]:
        """Return what leaves a block."""
        block = self._model.load_block(index)
        out = list(states)

        def one(sample: int, turns: Turns) -> None:
            out[sample] = run_block(block, states[sample].clone(), self._calls[index][sample])

        self._run(one)
        self._release(index)
        return out

    def _behind(self, states: list[Tensor], returned: Any) -> list[Tensor]:
        """Return the gradients of the losses with respect to what leaves the last block."""
        lane = threading.local()
        out = list(states)

        def stand_in(*args: Any, **kwargs: Any) -> Any:
            return returned(lane.states)

        def one(sample: int, turns: Turns) -> None:
            ids, last = self._ids[sample], states[sample].requires_grad_()
            with torch.enable_grad():
                lane.states = last.clone()
                logits = self._model.module(input_ids=ids[None], use_cache=False).logits[0]
                loss = torch.nn.functional.cross_entropy(logits[:-1].float(), ids[1:])
            if not torch.isfinite(loss):
                raise NonFinite(f"the loss of sample {sample} is {float(loss.detach())}")
            (out[sample],) = torch.autograd.grad(loss, last)

        try:
            for block in self._model.stack.blocks:
                block.__dict__["forward"] = stand_in  # shadows the method
            self._run(one)
        finally:
            for block in self._model.stack.blocks:
                block.__dict__.pop("forward", None)
        return out

    def _backward(self, index: int) -> list[Tensor]:
        """Return the gradients with respect to what enters a block, from those of what leaves it."""
        block = self._model.load_block(index)
        out = list(self._left[index])

        def one(sample: int, turns: Turns) -> None:
            entered = self._entered[index][sample].detach().requires_grad_()
            with torch.enable_grad():
                left = replay(block, entered.clone(), self._calls[index][sample])
            (out[sample],) = torch.autograd.grad(left, entered, self._left[index][sample])
            _refuse_nonfinite(out[sample], self._model.stack.prefix(index), sample)

        self._run(one)
        self._release(index)
        return out

    def _run(self, one: Any) -> None:
        own_code = type(self._model.module).__module__.startswith("transformers_modules")
        side_by_side(len(self._ids), one, most=1 if own_code else MAX_LANES)

    def _release(self, index: int) -> None:
        self._model.release_block(index)
        self._reporter.advance(self._task)
        release_freed()


def _refuse_nonfinite(gradient: Tensor, where: str, sample: int) -> None:
    if not all_finite(gradient):
        raise NonFinite(
            f"the gradient of sample {sample} is not finite", where=where, hint="Check the model and that sample."
        )
