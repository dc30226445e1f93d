"""From what leaves the last block to losses: final norm and head, with no block in memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from sparsekit.lazy import torch
from sparsekit.models.capture import return_template
from sparsekit.models.lazy_model import LazyModel

if TYPE_CHECKING:
    from torch import Tensor


def losses_behind(model: LazyModel, samples: Tensor, hidden: Sequence[Tensor], prompt: int = 0) -> Tensor:
    """Return the mean loss of each sample, in nats per predicted token, [samples] float64.

    Args:
        model: Nothing of it needs to be loaded.
        samples: ids [samples, sequence_length].
        hidden: What leaves the last block, [..., sequence_length, hidden] per sample.
        prompt: Leading tokens that predict nothing that counts.
    """
    if not len(samples):  # of fewer samples than ranks
        return torch.zeros(0, dtype=torch.float64)
    model.load_outer()
    model.load_block(0)
    template = return_template(model, samples[:1, :8])
    model.release_block(0)
    blocks = model.stack.blocks
    losses = torch.zeros(len(samples), dtype=torch.float64)
    try:
        for index, (ids, states) in enumerate(zip(samples, hidden, strict=True)):
            for block in blocks:
                block.__dict__["forward"] = _returning(template(states.clone()))  # shadows the method
            with torch.no_grad():
                logits = model.module(input_ids=ids[None], use_cache=False).logits[0, prompt:-1]
            losses[index] = torch.nn.functional.cross_entropy(logits.float(), ids[1 + prompt :]).double()
    finally:
        for block in blocks:
            block.__dict__.pop("forward", None)
        model.release_outer()
    return losses


def _returning(value: Any) -> Callable[..., Any]:
    def forward(*args: Any, **kwargs: Any) -> Any:
        return value

    return forward
