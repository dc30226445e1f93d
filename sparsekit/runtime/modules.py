"""A linear layer that multiplies with its packed weight."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from sparsekit.errors import ShapeMismatch
from sparsekit.runtime import buffers, groups, native, ops
from sparsekit.runtime.repack import pack_dense

DENSE_FROM_TOKENS = 64
"""From so many tokens on, arithmetic limits a product, not the reading of the weight. Where the kernels have no bf16
arithmetic, torch's dense product of the unpacked weight is then the faster one."""


class SparseLinear(nn.Module):
    """`y = x W^T + b` with W packed for this processor's kernels.

    Assigning `weight` packs it; reading `weight` unpacks a copy, which cannot be trained. Until it is assigned,
    `weight` is an ordinary parameter, so that loaders find the layer as they find the dense one. State dicts hold the
    dense weight. Gradients flow to the input.

    x may be bf16, fp16 or fp32, and y has its dtype. `.to(dtype)` moves the bias and changes what `weight` reads as;
    the packed values stay as they are.

    Attributes:
        in_features, out_features: Shape of the weight, [out, in].
        transposed: `weight` is [in, out], as in the Conv1D of GPT-2.
        dtype: Dtype that `weight` has when it is read; the packed values may be narrower where that is exact.
        packed: u8 buffer that the kernels read; None until there is a weight.
        bias: [out] or None.
        followers: Layers whose products it computes as well, see `groups`.
    """

    followers: tuple[weakref.ref[groups.Layer], ...] | None = ()

    def __init__(self, dense: nn.Module, *, transposed: bool = False) -> None:
        """Take the place of `dense`, an nn.Linear or, if `transposed`, a layer with weight [in, out]."""
        super().__init__()
        weight: Any = dense.weight  # a Parameter, which torch types as Tensor
        self.transposed = transposed
        self.out_features, self.in_features = reversed(weight.shape) if transposed else weight.shape
        self.dtype = weight.dtype
        self.register_parameter("weight", weight)
        self.register_parameter("bias", dense.bias)  # type: ignore[arg-type]
        self.register_buffer("packed", None)
        if not weight.is_meta:
            self.weight = weight

    def hold(self, packed: Tensor, dtype: torch.dtype) -> None:
        """Multiply with `packed`, a buffer of `buffers.pack`, from now on.

        Raises:
            ShapeMismatch: It holds a weight of another shape.
        """
        shape = buffers.info(packed).shape
        if shape != (self.out_features, self.in_features):
            raise ShapeMismatch(f"packed weight of {shape} for a layer {self.out_features, self.in_features}")
        self._parameters.pop("weight", None)
        self.packed, self.dtype = packed, dtype

    def dense(self) -> nn.Module:
        """Return the ordinary layer that this one stands for."""
        if self.transposed:
            from transformers.pytorch_utils import Conv1D

            layer: nn.Module = Conv1D(self.out_features, self.in_features)
        else:
            layer = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None, device="meta")
        layer.weight = nn.Parameter(self.weight)
        layer.register_parameter("bias", self.bias)
        return layer

    def __setattr__(self, name: str, value: Any) -> None:
        """Pack what is assigned to `weight`."""
        if name == "weight" and isinstance(value, Tensor) and not value.is_meta:
            weight = value.detach()
            self.hold(pack_dense(weight.T if self.transposed else weight), weight.dtype)
        else:
            super().__setattr__(name, value)

    def __getattr__(self, name: str) -> Any:
        """Unpack `weight`, [out, in] or, if `transposed`, [in, out], at every access."""
        packed = self.__dict__.get("_buffers", {}).get("packed") if name == "weight" else None
        if packed is None:
            return super().__getattr__(name)
        if packed.is_meta:
            weight = torch.empty((self.out_features, self.in_features), dtype=self.dtype, device="meta")
        else:
            weight = buffers.unpack(packed).to(self.dtype)
        return weight.T.contiguous() if self.transposed else weight

    def forward(self, x: Tensor) -> Tensor:
        """Return `x W^T + b` for `x: [..., in]`."""
        if not torch.compiler.is_compiling() and groups.groupable(self, x):
            return groups.product(self, x)
        packed = self.packed
        if packed is None:
            raise RuntimeError("this SparseLinear has no weight yet")
        if x.numel() >= DENSE_FROM_TOKENS * self.in_features and native.isa() != "avx512bf16":
            return nn.functional.linear(x, buffers.unpack(packed).to(x.dtype), self.bias)
        return ops.linear(x, packed, self.bias, self.out_features)

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles know nothing of the layers that follow the original."""
        return {name: value for name, value in self.__dict__.items() if name != "followers"}

    def extra_repr(self) -> str:
        """Describe the layer where modules are printed."""
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SparseLinear:
        """Follow `.to(dtype)`: an empty tensor of our dtype shows what becomes of it."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        """State dicts hold the dense weight: any model of the architecture can load them."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if destination.pop(f"{prefix}packed", None) is not None:
            destination[f"{prefix}weight"] = self.weight

    def _load_from_state_dict(
        self,
        state_dict: Any,
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Pack the weight of a state dict, as the dtype this layer has."""
        name = f"{prefix}weight"
        rest = {key: value for key, value in state_dict.items() if key != name}
        super()._load_from_state_dict(rest, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
        missing_keys[:] = [key for key in missing_keys if key not in (name, f"{prefix}packed")]
        weight = state_dict.get(name)
        shape = (self.in_features, self.out_features) if self.transposed else (self.out_features, self.in_features)
        if weight is None:
            missing_keys.append(name)
        elif tuple(weight.shape) != shape:
            error_msgs.append(f"size mismatch for {name}: {tuple(weight.shape)} in the checkpoint, needed {shape}")
        else:
            self.weight = weight.to(self.dtype)
