"""What each block is called with: captured once, replayed later, never rebuilt by hand.

Masks, rotary tables and other arguments differ between the blocks of one model (sliding windows, local rotary
bases), so every block keeps its own. They depend on the input ids alone; the blocks behind the first are therefore
passed over during the capture.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sparsekit.errors import UnsupportedFamily
from sparsekit.lazy import torch
from sparsekit.models.lazy_model import LazyModel

if TYPE_CHECKING:
    from torch import Tensor, nn


@dataclass(frozen=True)
class Call:
    """Arguments of one block for one sample, without the hidden states."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class _Captured(Exception):  # a signal that ends the capture pass, not an error
    """Raised when the last block has been reached: nothing behind it is needed."""


def run_block(block: nn.Module, hidden: Tensor, call: Call) -> Tensor:
    """Run a block on `hidden: [1, tokens, hidden]` with its own arguments; return its output hidden states."""
    with torch.no_grad():
        return replay(block, hidden, call)


def replay(block: nn.Module, hidden: Tensor, call: Call) -> Tensor:
    """Run a block as `run_block` does, in whatever gradient mode the caller is."""
    out = block(hidden, *call.args, **call.kwargs)
    # `out[0]` on a bare tensor would silently take batch item 0.
    result: Tensor = out if isinstance(out, torch.Tensor) else out[0]
    return result


def capture(model: LazyModel, samples: Tensor, advance: Callable[[], None]) -> tuple[list[Tensor], list[list[Call]]]:
    """Return the first block's inputs and every block's own arguments.

    Args:
        model: Outer parts and block 0 loaded.
        samples: ids [samples, sequence_length].
        advance: Called after each sample.

    Returns:
        hidden: per sample [1, sequence_length, hidden] (whatever leading shape the architecture uses).
        calls: calls[block][sample].
    """
    hidden: list[Tensor] = []
    calls: list[list[Call]] = [[] for _ in model.stack.blocks]
    pool = _Pool()
    template = return_template(model, samples[:1, :8])

    def stand_in(index: int) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            if args:
                states, rest = args[0], tuple(args[1:])
            else:
                states, rest = kwargs.pop("hidden_states"), ()
            if index == 0:
                hidden.append(states.clone())  # changed in place later; arguments may hold the original
            calls[index].append(Call(pool.share(rest), {k: pool.share(v) for k, v in kwargs.items()}))
            if index == len(calls) - 1:
                raise _Captured
            return template(states)

        return forward

    _with_forwards(model, stand_in, samples, advance)
    return hidden, calls


def _with_forwards(
    model: LazyModel, make: Callable[[int], Callable[..., Any]], samples: Tensor, advance: Callable[[], None]
) -> None:
    """Run the model on each sample with its blocks' forwards replaced."""
    try:
        for index, block in enumerate(model.stack.blocks):
            block.__dict__["forward"] = make(index)  # shadows the method; hooks of the model stay out of it
        for ids in samples:
            try:
                with torch.no_grad():
                    model.module(input_ids=ids[None], use_cache=False)
            except _Captured:
                advance()
            else:
                raise UnsupportedFamily(f"{type(model.module).__name__} did not run its last block")
    finally:
        for block in model.stack.blocks:
            block.__dict__.pop("forward", None)


def return_template(model: LazyModel, ids: Tensor) -> Callable[[Tensor], Any]:
    """Run block 0 for real on a few tokens; return what makes hidden states into what a block returns."""
    seen: list[Any] = []

    def make(index: int) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            seen.append(type(model.stack.blocks[0]).forward(model.stack.blocks[0], *args, **kwargs))
            raise _Captured

        return forward

    _with_forwards(model, make, ids, lambda: None)
    out = seen[0]
    if isinstance(out, torch.Tensor):
        return lambda states: states
    rest = (None,) * (len(out) - 1)
    return lambda states: (states, *rest)


class _Pool:
    """Stores equal tensors once: masks and rotary tables are the same for all samples of one length."""

    def __init__(self) -> None:
        self._seen: dict[tuple[Any, ...], list[Tensor]] = {}

    def share(self, value: Any) -> Any:
        """Return `value` with its tensors replaced by equal ones seen before."""
        if isinstance(value, torch.Tensor):
            known = self._seen.setdefault((value.shape, value.dtype), [])
            for candidate in known:
                if candidate is value or torch.equal(candidate, value):
                    return candidate
            if len(known) < 8:  # arguments that differ per sample are not worth searching for
                known.append(value)
            return value
        if isinstance(value, tuple) and type(value) is tuple:
            return tuple(self.share(item) for item in value)
        return value
