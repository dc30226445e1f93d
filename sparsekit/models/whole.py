"""A model whole in memory, for losses with one linear changed, and for predictions with many.

What lies before the changed block does not depend on the change. So the inputs of the block at work are kept, and
only this block and those behind it run for a loss: on average half of the model.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, Any

from sparsekit.contracts import LinearInfo, WholeModel
from sparsekit.errors import NonFinite, SparsekitError
from sparsekit.lazy import torch
from sparsekit.models.capture import capture, return_template, run_block
from sparsekit.models.lazy_model import LazyModel
from sparsekit.models.linears import Linear

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.utils.hooks import RemovableHandle


class LoadedModel(WholeModel):
    """All of a lazy model, as a copy."""

    def __init__(
        self, model: LazyModel, ids: Tensor, advance: Callable[[], None], dtype: torch.dtype | None = None
    ) -> None:
        """Load the model.

        Args:
            model: What to load; it stays as it is.
            ids: Samples that are asked for, [samples, sequence_length].
            advance: Called whenever the loss of a linear is asked for, for the first time.
            dtype: What it computes in; None is float32, since rounding would be as large as the differences of losses.
        """
        self._model = model.in_dtype(dtype or torch.float32)
        self._ids = ids
        self._advance = advance
        self._changed: set[str] = set()
        self._linears: dict[str, Linear] = {}
        self._model.load_outer()
        for index in range(self._model.blocks):
            self._model.load_block(index)
            self._linears |= {linear.name: linear for linear in self._model.stack.linears(index)}
        self._pass: Callable[[Tensor], Any] | None = None  # makes hidden states into what a block returns
        self._hooks: list[RemovableHandle] = []
        self._at = 0
        self._inputs: list[Tensor] = []  # of block `_at`, per sample; once a loss has been asked for

    def weight(self, linear: LinearInfo) -> Tensor:
        """Return the weight of a linear as it is now, [out, in], read only."""
        return self._linears[linear.name].weight()

    def replace(self, linear: LinearInfo, weight: Tensor) -> None:
        """Give a linear `weight: [out, in]` until it is replaced again; losses, which keep inputs, see dense ones."""
        if self._inputs:
            raise SparsekitError("a weight was replaced after losses of single linears were asked for")
        self._linears[linear.name].replace(weight)

    def tokens(self, sample: int) -> Tensor:
        """Return the ids of a sample, [sequence_length]."""
        return self._ids[sample]

    def logits(self, sample: int) -> Tensor:
        """Return what the model as it is now predicts, [sequence_length, vocabulary]."""
        with torch.no_grad():
            out: Tensor = self._model.module(input_ids=self._ids[sample][None], use_cache=False).logits[0]
        return out

    def omit(self, blocks: Collection[int], silent: Collection[LinearInfo] = ()) -> None:
        """Predict without these blocks, and with zeros as the outputs of the `silent` linears; until asked again."""
        if self._pass is None:
            self._pass = return_template(self._model, self._ids[:1, :8])
        for hook in self._hooks:
            hook.remove()
        modules = {id(module): module for info in silent for module in (self._linears[info.name].module,)}
        self._hooks = [module.register_forward_hook(_zeros) for module in modules.values()]
        for index, block in enumerate(self._model.stack.blocks):
            block.__dict__.pop("forward", None)
            if index in blocks:
                block.__dict__["forward"] = _passed(self._pass)  # shadows the method

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
        if not self._inputs:
            self._embedded, self._calls = capture(self._model, self._ids, lambda: None)
            self._returned = return_template(self._model, self._ids[:1, :8])
            self._inputs = self._embedded
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


def _passed(template: Callable[[Tensor], Any]) -> Callable[..., Any]:
    """Return a forward of a block that hands its input on."""

    def forward(*args: Any, **kwargs: Any) -> Any:
        return template(args[0] if args else kwargs["hidden_states"])

    return forward


def _zeros(module: nn.Module, args: Any, out: Tensor) -> Tensor:
    return torch.zeros_like(out)
