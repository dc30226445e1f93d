"""A linear layer that multiplies with its packed weight."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from sparsekit.pack.bits import pack_mask
from sparsekit.pack.types import as_bits
from sparsekit.runtime import native, ops

DENSE_FROM_TOKENS = 64
"""From so many tokens on, arithmetic limits a product, not the reading of the weight. Where the kernels have no bf16
arithmetic, torch's dense product of the unpacked weight is then the faster one."""


class SparseLinear(nn.Module):
    """`y = x W^T + b` with W packed for this processor's kernels.

    Assigning `weight` packs it; reading `weight` unpacks it, bit for bit. Until it is assigned, `weight` is an ordinary
    parameter, so that loaders find the layer as they find `nn.Linear`.

    Attributes:
        in_features, out_features: Shape of the weight, [out, in].
        packed: u8 buffer that the kernels read; None until there is a weight.
        bias: [out] or None.
    """

    def __init__(self, dense: nn.Linear) -> None:
        super().__init__()
        self.in_features = dense.in_features
        self.out_features = dense.out_features
        weight: Any = dense.weight  # a Parameter, which torch types as Tensor
        self.register_parameter("weight", weight)
        self.register_parameter("bias", dense.bias)
        self.packed: Tensor | None = None

    def __setattr__(self, name: str, value: Any) -> None:
        """Pack what is assigned to `weight`."""
        if name == "weight" and isinstance(value, Tensor) and not value.is_meta:
            self._pack(value.detach())
        else:
            super().__setattr__(name, value)

    def __getattr__(self, name: str) -> Any:
        """Unpack `weight`, [out, in], at every access."""
        if name == "weight" and self.__dict__.get("packed") is not None:
            return native.unpack(self.__dict__["packed"])
        return super().__getattr__(name)

    def _pack(self, weight: Tensor) -> None:
        keep = as_bits(weight.contiguous()) != 0
        layout = native.best_layout(weight.dtype, int(keep.sum()) / max(keep.numel(), 1))
        self.packed = native.pack(pack_mask(keep), weight[keep], (self.out_features, self.in_features), layout)
        self._parameters.pop("weight", None)

    def forward(self, x: Tensor) -> Tensor:
        """Return `x W^T + b` for `x: [..., in]`."""
        if x.numel() >= DENSE_FROM_TOKENS * self.in_features and native.isa() != "avx512bf16":
            return nn.functional.linear(x, self.weight.to(x.dtype), self.bias)
        packed = self.packed
        if packed is None:
            raise RuntimeError("this SparseLinear has no weight yet")
        return ops.linear(x, packed, self.bias, self.out_features)

    def extra_repr(self) -> str:
        """Describe the layer where modules are printed."""
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        """State dicts hold the dense weight: any model of the architecture can load them."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.packed is not None:
            destination[f"{prefix}weight"] = self.weight

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *arguments: Any) -> None:
        """Pack the weight of a state dict."""
        weight = state_dict.pop(f"{prefix}weight", None)
        if weight is not None:
            self.weight = weight
        super()._load_from_state_dict(state_dict, prefix, *arguments)
