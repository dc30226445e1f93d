"""Files in which a reshaper keeps what it has made of each block, between deciding and writing."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from sparsekit import fs
from sparsekit.checkpoint.jsonio import JSON
from sparsekit.checkpoint.safetensors_file import encode, read_header
from sparsekit.errors import ChecksumError
from sparsekit.models.raw import read_tensor, to_raw

if TYPE_CHECKING:
    from torch import Tensor


def write_block(folder: Path, block: int, tensors: Mapping[str, Tensor]) -> str:
    """Write the file of a block; return its sha256."""
    fs.make_folder(folder)
    data = encode({name: to_raw(tensor) for name, tensor in tensors.items()}, {})
    return fs.replace_file(_path(folder, block), data).sha256


def read_block(folder: Path, block: int, files: Mapping[str, JSON]) -> dict[str, Tensor]:
    """Return the tensors of a block.

    Args:
        folder: Where the files are.
        block: Number of the block.
        files: The sha256 of every file, by the number of the block.

    Raises:
        ChecksumError: The file is another one now.
        ResourceError: It cannot be read.
    """
    path = _path(folder, block)
    if fs.sha256_file(path).sha256 != files[str(block)]:
        raise ChecksumError("not what was written", where=str(path), hint="Run with --no-resume.")
    return {name: read_tensor(path, name) for name in read_header(path).tensors}


def _path(folder: Path, block: int) -> Path:
    return folder / f"{block}.safetensors"
