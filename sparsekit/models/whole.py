"""A model whole in memory, in float32, for losses with one linear changed.

What lies before the changed block does not depend on the change. So the inputs of the block at work are kept, and
only this block and those behind it run for a loss: on average half of the model.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from sparsekit.contracts import LinearInfo, WholeModel
from sparsekit.errors import NonFinite
from sparsekit.lazy import torch
from sparsekit.models.capture import capture, return_template, run_block
from sparsekit.models.lazy_model import LazyModel
from sparsekit.models.linears import Linear

if TYPE_CHECKING:
    from torch import Tensor


class LoadedModel(WholeModel):
    """All of a lazy model, as a copy in float32: rounding would be as large as the differences of losses."""

    def __init__(self, model: LazyModel, ids: Tensor, advance: Callable[[], None]) -> None:
        """Load the model.

        Args:
            model: What to load; it stays as it is.
            ids: Samples of which losses are asked for, [samples, sequence_length].
            advance: Called whenever a linear is changed for the first time.
        """
        self._model = model.in_dtype(torch.float32)
        self._ids = ids
        self._advance = advance
        self._changed: set[str] = set()
        self._linears: dict[str, Linear] = {}
        self._model.load_outer()
        for index in range(self._model.blocks):
            self._model.load_block(index)
            self._linears |= {linear.name: linear for linear in self._model.stack.linears(index)}
        self._embedded, self._calls = capture(self._model, ids, lambda: None)
        self._returned = return_template(self._model, ids[:1, :8])
        self._at = 0
        self._inputs = self._embedded  # of block `_at`, per sample

    def weight(self, linear: LinearInfo) -> Tensor:
        """Return the weight of a linear, [out, in] float32, read only."""
        return self._linears[linear.name].weight()

    def loss(self, linear: LinearInfo, weight: Tensor, sample: int) -> float:
        """Return the mean loss of a sample with `weight: [out, in]` in place; the linear's own is back bit for bit."""
        self._seek(linear.block)
        if linear.name not in self._changed:
            self._changed.add(linear.name)
            self._advance()
        target = self._linears[linear.name]
        own = target.weight().clone()
        target.replace(weight)
        try:
            loss = self._loss(sample)
        finally:
            target.replace(own)
        if not torch.isfinite(loss):
            raise NonFinite(f"the loss of sample {sample} is {float(loss)}", where=linear.name)
        return float(loss)

    def _seek(self, block: int) -> None:
        """Make `block` the one whose inputs are at hand."""
        if block < self._at:
            self._at, self._inputs = 0, self._embedded
        while self._at < block:
            module = self._model.stack.blocks[self._at]
            calls = self._calls[self._at]
            self._inputs = [run_block(module, x, call) for x, call in zip(self._inputs, calls, strict=True)]
            self._at += 1

    def _loss(self, sample: int) -> Tensor:
        """Run the model on a sample, the blocks before the one at hand passed over; return nats per token."""
        ids = self._ids[sample]
        passed_over = self._model.stack.blocks[: self._at]
        states = self._returned(self._inputs[sample].clone())

        def stand_in(*args: Any, **kwargs: Any) -> Any:
            return states

        try:
            for block in passed_over:
                block.__dict__["forward"] = stand_in  # shadows the method
            with torch.no_grad():
                logits = self._model.module(input_ids=ids[None], use_cache=False).logits[0]
        finally:
            for block in passed_over:
                del block.__dict__["forward"]
        return torch.nn.functional.cross_entropy(logits[:-1].float(), ids[1:])
