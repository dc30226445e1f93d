"""A model that reads tokens one after the other and can forget the last ones."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

from sparsekit.errors import UnsupportedFamily
from sparsekit.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

_KEEP_ALL = ("DynamicLayer", "DynamicSlidingWindowLayer")
"""Layers of a transformers cache that hold keys and values of every token, or would but for a window."""


class CachedModel:
    """A causal language model, batch 1, with a key-value cache that can be cropped to any length.

    Sliding windows are a matter of the mask here: the cache keeps all keys, so that what is behind the window comes
    back when tokens are forgotten. It costs the memory that the window would have saved.
    """

    def __init__(self, model: Any) -> None:
        """Take a transformers model.

        Raises:
            UnsupportedFamily: It keeps more or less than keys and values of every token, so it cannot forget.
        """
        from transformers import DynamicCache

        require_croppable(model)
        self.model = model
        self.cache = DynamicCache()  # without a configuration: no layer has a window
        parameters = inspect.signature(model.forward).parameters
        self._positions = "position_ids" in parameters
        self._last_only = {"logits_to_keep": 1} if "logits_to_keep" in parameters else {}

    @property
    def lengths(self) -> list[int]:
        """Tokens held by each layer of the cache; layers that were skipped while drafting hold fewer."""
        return [int(layer.get_seq_length()) for layer in self.cache.layers]

    def prefill(self, ids: Tensor) -> Tensor:
        """Read `ids: [tokens]` into the empty cache; return the last one's logits, [vocabulary], float32.

        Raises:
            UnsupportedFamily: The model's code did not put all tokens into the cache.
        """
        logits = self._forward(ids, 0, self._last_only)
        if set(self.lengths) != {len(ids)}:
            raise UnsupportedFamily(
                f"{type(self.model).__name__} keeps {sorted(set(self.lengths))} tokens of {len(ids)} in the layers of "
                "its cache: what is drafted could not be taken back",
                hint="Generate without drafting.",
            )
        return logits[-1]

    def read(self, tokens: Tensor, start: int) -> Tensor:
        """Forget everything from position `start` on and read `tokens: [n]` there; return logits [n, vocabulary]."""
        self.forget(start)
        return self._forward(tokens, start, {})

    def forget(self, length: int) -> None:
        """Crop every layer of the cache to `length` tokens; those that hold fewer stay as they are."""
        for layer, held in zip(self.cache.layers, self.lengths, strict=True):
            if held > length:
                layer.crop(length - held)  # a negative number: so many less

    def _forward(self, tokens: Tensor, start: int, extra: dict[str, Any]) -> Tensor:
        end = start + len(tokens)
        positions = {"position_ids": torch.arange(start, end, device=tokens.device)[None]} if self._positions else {}
        out = self.model(
            input_ids=tokens[None],
            attention_mask=torch.ones(1, end, dtype=torch.long, device=tokens.device),
            past_key_values=self.cache,
            use_cache=True,
            **positions,
            **extra,
        )
        logits: Tensor = out.logits[0]
        return logits.float()


def require_croppable(model: Any) -> None:
    """Refuse a model whose cache cannot take back tokens.

    Raises:
        UnsupportedFamily: says what it keeps instead of keys and values.
    """
    from transformers import DynamicCache

    config = model.config.get_text_config(decoder=True)
    others = {type(layer).__name__ for layer in DynamicCache(config=config).layers} - set(_KEEP_ALL)
    if getattr(model, "_is_stateful", False) or any(name.startswith("Linear") for name in others):
        why = "a recurrent state, which holds all tokens in one"
    elif "chunked_attention" in (getattr(config, "layer_types", None) or ()):
        why = "attention in chunks"
    elif others:
        why = f"a cache of its own ({', '.join(sorted(others))})"
    else:
        return
    raise UnsupportedFamily(
        f"{type(model).__name__} has {why}: tokens that were drafted could not be taken back",
        hint="Generate without drafting.",
    )
