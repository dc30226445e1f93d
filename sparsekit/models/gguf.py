"""GGUF files: unpacked once into an ordinary safetensors folder, kept in a cache keyed by content.

transformers reads the file; its own save_pretrained refuses such models, so the weights are written here.
Q4 and similar weights are rebuilt from few bits and tie massively: methods must rank, never threshold.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsekit import fs
from sparsekit.checkpoint.lock import start_of
from sparsekit.checkpoint.safetensors_file import RawTensor, encode
from sparsekit.errors import ModelError
from sparsekit.lazy import torch
from sparsekit.models.raw import to_raw
from sparsekit.progress import Reporter

if TYPE_CHECKING:
    from torch import Tensor

_DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


def cache_folder() -> Path:
    """Return where unpacked GGUF models are kept: SPARSEKIT_CACHE, else the user's cache folder."""
    base = os.environ.get("SPARSEKIT_CACHE")
    if base:
        return Path(base)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sparsekit"


def import_gguf(path: Path, dtype: str, reporter: Reporter) -> Path:
    """Return a safetensors folder with the weights, configuration and tokenizer of a GGUF file.

    Args:
        path: The `.gguf` file.
        dtype: bf16, fp16 or fp32, what weights are rounded to.
        reporter: Told that the file is being unpacked.

    Raises:
        ModelError: The file is missing, is not GGUF, or holds an architecture transformers cannot read.
    """
    if not path.is_file():
        raise ModelError(f"{path} does not exist", hint="Check the path.")
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise ModelError(
                "not a GGUF file (its first bytes are not 'GGUF')", where=str(path), hint="Download it again."
            )
    folder = cache_folder() / f"gguf-{fs.sha256_file(path).sha256[:16]}-{dtype}"
    if (folder / "config.json").is_file():  # written last: its presence means the folder is complete
        return folder
    reporter.note(f"unpacking {path.name} to {dtype} safetensors (once)")
    model, tokenizer = _read(path, dtype)
    _remove_leftovers(folder)
    staged = folder.with_name(f"{folder.name}.partial-{os.getpid()}")
    fs.make_folder(staged)
    try:
        fs.write_file(staged / "model.safetensors", encode(_Tensors(_weights(model)), {"format": "pt"}))
        tokenizer.save_pretrained(staged)
        model.generation_config.save_pretrained(staged)
        fs.write_file(staged / "config.json", _config(model, dtype))
        if not (folder / "config.json").is_file():  # else another process was faster, and may be reading it
            fs.remove_tree(folder)
            fs.move(staged, folder)
    finally:
        fs.remove_tree(staged)
    return folder


def _remove_leftovers(folder: Path) -> None:
    """Remove what killed processes left of unpacking the same file."""
    for path in sorted(folder.parent.glob(f"{folder.name}.partial-*")):
        pid = path.name.rpartition("-")[2]
        if pid.isdigit() and (int(pid) == os.getpid() or start_of(int(pid)) is None):
            fs.remove_tree(path)


def _read(path: Path, dtype: str) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    arguments = {"gguf_file": path.name, "trust_remote_code": False}
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # the reader's own progress bar, which nothing turns off
            tokenizer = AutoTokenizer.from_pretrained(path.parent, **arguments)
            model = AutoModelForCausalLM.from_pretrained(
                path.parent,
                dtype=getattr(torch, _DTYPES[dtype]),
                quantization_config=GgufConfig(dequantize=True),
                **arguments,
            )
    except (ValueError, LookupError, TypeError, OSError, RuntimeError, AssertionError, struct.error) as error:
        text = str(error).strip().splitlines()[0][:200] if str(error).strip() else ""
        raise ModelError(
            f"transformers cannot read it: {type(error).__name__}: {text}",
            where=str(path),
            hint="The file may be damaged, or its architecture is not supported by transformers' GGUF reader.",
        ) from error
    return model, tokenizer


def _weights(model: Any) -> dict[str, Tensor]:
    """Return the checkpoint tensors, tied ones once."""
    from transformers.core_model_loading import revert_weight_conversion

    seen: set[int] = set()
    tensors: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        if tensor.data_ptr() in seen:
            continue
        seen.add(tensor.data_ptr())
        tensors[name] = tensor
    reverted: dict[str, Tensor] = revert_weight_conversion(model, tensors)
    return reverted


def _config(model: Any, dtype: str) -> bytes:
    config = model.config.to_diff_dict()
    for key in ("quantization_config", "_name_or_path", "_model_name_or_path"):
        config.pop(key, None)
    config["dtype"] = _DTYPES[dtype]
    config["architectures"] = [type(model).__name__]
    return (json.dumps(config, indent=2, sort_keys=True) + "\n").encode()


class _Tensors(Mapping[str, RawTensor]):
    """Presents tensors as bytes, one at a time, so that no second copy of the model is made."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = tensors

    def __getitem__(self, name: str) -> RawTensor:
        return to_raw(self._tensors[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)
