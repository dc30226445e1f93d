"""Packed weights: dense <-> packed, and the proof that a packed tensor is sound. docs/format.md has the bytes."""

from __future__ import annotations

from sparsekit.pack.choose import choose
from sparsekit.pack.support import keep_of
from sparsekit.pack.tensor import pack, prove, read, unpack, unpack_keep, validate
from sparsekit.pack.types import Encoding, Layout, PackedTensor

__all__ = [
    "Encoding",
    "Layout",
    "PackedTensor",
    "choose",
    "keep_of",
    "pack",
    "prove",
    "read",
    "unpack",
    "unpack_keep",
    "validate",
]
