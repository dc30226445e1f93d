"""Packed tensors in safetensors files: what their parts are called, and how a file says what they are.

The parts of tensor `x.weight` are called `x.weight_nz`, `x.weight_bitmask` and so on. The file's metadata carries one
JSON object under `sparsekit_packed`: dense tensor name -> `PackedTensor.facts`. A tensor that stays dense keeps its
name and needs no entry.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsekit.checkpoint.jsonio import parse
from sparsekit.checkpoint.safetensors_file import Header, read_header
from sparsekit.errors import HeaderError
from sparsekit.pack.tensor import SHAPE, form_of, read, require_parts, unpack
from sparsekit.pack.types import Encoding, Layout, PackedTensor

if TYPE_CHECKING:
    from torch import Tensor

METADATA = "sparsekit_packed"
_WEIGHT = "weight"


def packable(key: str, shape: tuple[int, ...]) -> bool:
    """Tell whether a checkpoint tensor can be packed: a matrix called `....weight`."""
    return len(shape) == 2 and key.endswith(f".{_WEIGHT}")


def is_plain(packed: PackedTensor) -> bool:
    """Tell whether a packed tensor is just the dense tensor."""
    return (packed.layout, packed.encoding) == (Layout.DENSE, Encoding.RAW)


def parts(key: str, packed: PackedTensor) -> dict[str, Tensor]:
    """Return file name of each part -> part."""
    stem = key.removesuffix(_WEIGHT)
    return {f"{stem}{suffix}": tensor for suffix, tensor in packed.tensors.items()}


def metadata(facts: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """Return the file metadata that describes packed tensors: dense tensor name -> facts."""
    return {METADATA: json.dumps(facts, sort_keys=True, separators=(",", ":"))} if facts else {}


def described(header: Header) -> dict[str, dict[str, Any]]:
    """Return the entries of a file's metadata, empty for a file without packed tensors.

    Raises:
        HeaderError: The metadata is not what `metadata` writes.
    """
    text = header.metadata.get(METADATA)
    if text is None:
        return {}
    found = parse(text.encode(), where=f"{header.path}: {METADATA}", error=HeaderError)
    if not isinstance(found, dict) or not all(isinstance(entry, dict) for entry in found.values()):
        raise HeaderError(f"{METADATA} is not a mapping of tensor names to entries", where=str(header.path))
    entries: dict[str, Any] = found
    for key in entries:
        if not key.endswith(f".{_WEIGHT}"):
            raise HeaderError(f"{METADATA} names {key!r}; packed tensors are called ....weight", where=str(header.path))
    return entries


class PackedFile:
    """A safetensors file, dense or packed, read by the names of its dense tensors."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.header = read_header(path)
        self.facts = described(self.header)
        self._file: Any = None

    def names(self) -> list[str]:
        """Return the names of the dense tensors, sorted."""
        stems = {key.removesuffix(_WEIGHT) for key in self.facts}
        plain = [name for name in self.header.tensors if not _is_part(name, stems)]
        return sorted({*plain, *self.facts})

    def packed(self, key: str) -> PackedTensor:
        """Return a packed tensor, validated.

        Raises:
            HeaderError, BadIndex, WeightMismatch, PatternViolation: naming file and tensor.
        """
        stem = key.removesuffix(_WEIGHT)
        found = {
            name[len(stem) :]: self._open().get_tensor(name) for name in self.header.tensors if self.is_part(name, stem)
        }
        return read(self.facts[key], found, f"{self.path}: {key}")

    def check_parts(self) -> None:
        """Require that every entry has exactly its parts, and every part an entry; only the header is read.

        Raises:
            HeaderError: naming file and tensor.
        """
        for key, facts in self.facts.items():
            where, stem = f"{self.path}: {key}", key.removesuffix(_WEIGHT)
            names = {name[len(stem) :]: name for name in self.header.tensors if _is_part(name, {stem})}
            require_parts(names, *form_of(facts, where), where)
        for name in self.header.tensors:
            key = f"{name.removesuffix(SHAPE)}{_WEIGHT}"
            if name.endswith(f".{SHAPE}") and key not in self.facts:
                raise HeaderError(f"has parts, but no entry in {METADATA}", where=f"{self.path}: {key}")

    def is_part(self, name: str, stem: str) -> bool:
        """Whether a stored tensor is a part of the packed tensor `<stem>weight`."""
        return _is_part(name, {stem})

    def dense(self, key: str) -> Tensor:
        """Return a tensor as the dense model has it."""
        if key in self.facts:
            return unpack(self.packed(key))
        if key not in self.header.tensors:
            raise HeaderError(f"no tensor {key}", where=str(self.path))
        tensor: Tensor = self._open().get_tensor(key)
        return tensor

    def stored(self, name: str) -> Tensor:
        """Return a tensor of the file as it is stored, a part of a packed one too."""
        tensor: Tensor = self._open().get_tensor(name)
        return tensor

    def _open(self) -> Any:
        from safetensors import safe_open

        if self._file is None:
            self._file = safe_open(self.path, framework="pt")
        return self._file


def _is_part(name: str, stems: set[str]) -> bool:
    owner, _, last = name.rpartition(".")
    return last.startswith(_WEIGHT) and f"{owner}." in stems
