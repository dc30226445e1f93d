"""Gates as a file beside the weights: `sparsekit_activation.safetensors`, see docs/format.md.

The file holds numbers, never a method: a rule for every signal with its thresholds, counts or deviations, and what the
weights were that they belong to. Whatever it says is checked before a gate is made of it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from sparsekit import fs
from sparsekit.checkpoint import jsonio
from sparsekit.checkpoint.manifest import FILE
from sparsekit.checkpoint.safetensors_file import encode, read_header
from sparsekit.checkpoint.shapes import METHOD
from sparsekit.checkpoint.source import SIDECAR
from sparsekit.checkpoint.staging import StagedCheckpoint
from sparsekit.contracts import Remainder
from sparsekit.errors import CheckpointError, ChecksumError, VersionError
from sparsekit.lazy import torch
from sparsekit.models.gates import Gate, Gaussian, OfPrompt, Placed, Threshold, TopK
from sparsekit.models.raw import read_tensor, to_raw

if TYPE_CHECKING:
    from torch import Tensor

VERSION = 1
CONFIG_KEY = "activations"
"""Under which a `quantization_config` of ours names the file."""
_KEY = "sparsekit_activation"
_HINT = "Copy the file again, or calibrate again."
_MANIFEST_BYTES = 1 << 28


@dataclass(frozen=True)
class GateFile:
    """What the file holds.

    Attributes:
        gates: Name of a signal -> its gate.
        dense_tokens: First tokens of a text that stay dense.
        prefill: Whether prompts are thinned out in generation.
        weights: Name of a weight file -> its size in bytes; those that the gates belong to.
        shares: Name of a signal -> share of it that is left out on held-out text.
    """

    gates: Mapping[str, Placed]
    dense_tokens: int
    prefill: Literal["dense", "sparse"]
    weights: Mapping[str, int]
    shares: Mapping[str, float] = field(default_factory=dict)

    @property
    def by_prompt(self) -> bool:
        """Whether neurons are chosen by the prompt, and not entries at every token."""
        return any(isinstance(placed.gate, OfPrompt) for placed in self.gates.values())

    @property
    def protocol(self) -> str:
        """Which tokens are thinned out, in words."""
        return protocol(self.dense_tokens, self.prefill, by_prompt=self.by_prompt)


def prompt_of(tokens: int) -> int:
    """Return how many leading tokens of a text that is scored are its prompt, where neurons are chosen by one."""
    return tokens // 2


def protocol(dense_tokens: int, prefill: str, *, by_prompt: bool) -> str:
    """Return which tokens are thinned out, in words; published figures differ mostly in that."""
    if by_prompt:
        return (
            "the second half of a text, by what its first half has used; perplexity is that of the second half; in "
            "generation the prompt is dense, and each prompt chooses anew"
        )
    kept = "token" if dense_tokens == 1 else f"{dense_tokens} tokens"
    first = f"all but the first {kept} of a text" if dense_tokens else "all tokens"
    return f"{first}; in generation the prompt is {prefill}"


def gate_file_bytes(content: GateFile) -> bytes:
    """Return the bytes of the file."""
    tensors: dict[str, Tensor] = {}
    sites: dict[str, Any] = {}
    for name, placed in content.gates.items():
        facts: dict[str, Any] = {"signal": placed.kind, "share": content.shares.get(name)}
        match placed.gate:
            case Threshold(t):
                facts["rule"] = "threshold"
                tensors[f"{name}.act_threshold"] = t
            case TopK(count, w):
                facts |= {"rule": "top_k", "count": count}
                tensors[f"{name}.act_importance"] = w
            case Gaussian(deviations):
                facts |= {"rule": "gaussian", "deviations": deviations}
            case OfPrompt(count):
                facts |= {"rule": "prompt", "count": count}
        if placed.remainder is not None:
            facts["remainder"] = placed.remainder.sparsity
            tensors[f"{name}.act_left"] = placed.remainder.left.contiguous()
            tensors[f"{name}.act_right"] = placed.remainder.right.contiguous()
        sites[name] = facts
    said = {
        "version": VERSION,
        "dense_tokens": content.dense_tokens,
        "prefill": content.prefill,
        "weights": dict(content.weights),
        "sites": sites,
    }
    metadata = {_KEY: json.dumps(said, sort_keys=True, separators=(",", ":"))}
    return b"".join(encode({name: to_raw(tensor) for name, tensor in tensors.items()}, metadata))


def read_gate_file(folder: Path) -> GateFile | None:
    """Return the gates of a model folder, None where it has none.

    Raises:
        CheckpointError: The file is damaged, or belongs to other weights.
        VersionError: A newer sparsekit wrote it.
    """
    path = folder / SIDECAR
    if not path.is_file():
        _require_unnamed(folder)
        return None
    header = read_header(path)
    said = _said(header.metadata.get(_KEY), path)
    reader = _Reader(path, set(header.tensors))
    gates = {name: reader.placed(name, facts) for name, facts in said["sites"].items()}
    if stray := sorted(reader.unread):
        raise CheckpointError("a tensor that no signal of the file has", where=f"{path}: {stray[0]}", hint=_HINT)
    found = GateFile(
        gates,
        said["dense_tokens"],
        said["prefill"],
        said["weights"],
        {name: facts["share"] for name, facts in said["sites"].items() if facts.get("share") is not None},
    )
    if found.by_prompt and (found.prefill == "sparse" or not all(_by_prompt(each) for each in gates.values())):
        why = "the prompt is not dense" if found.prefill == "sparse" else "other rules stand beside it"
        raise CheckpointError(f"neurons are chosen by the prompt, but {why}", where=str(path), hint=_HINT)
    _require_weights(found, folder)
    return found


def _by_prompt(placed: Placed) -> bool:
    return isinstance(placed.gate, OfPrompt)


def write_gates(staged: StagedCheckpoint, content: GateFile) -> None:
    """Write the file beside the weights of a staged checkpoint that has its config.json.

    Where transformers asks sparsekit to load the weights, config.json says that the file belongs to them: a loader that
    fetches single files by name would else not know of it.
    """
    record = staged.write_file(SIDECAR, gate_file_bytes(content))
    config = json.loads((staged.folder / "config.json").read_text(encoding="utf-8"))
    entry = config.get("quantization_config")
    if isinstance(entry, dict) and entry.get("quant_method") == METHOD:
        entry[CONFIG_KEY] = {"file": SIDECAR, "sha256": record.sha256}
        staged.write_file("config.json", (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode())


def require_gates(said: object, folder: Path) -> None:
    """Require that the file is there which config.json says belongs to the weights, and is that very file.

    Args:
        said: What stands under `CONFIG_KEY` in its quantization_config.
        folder: Where the weights are.

    Raises:
        CheckpointError: It is not, or the entry is malformed.
    """
    path, where = folder / SIDECAR, f"config.json: quantization_config.{CONFIG_KEY}"
    wanted = said.get("sha256") if isinstance(said, Mapping) and said.get("file") == SIDECAR else None
    if not isinstance(wanted, str):
        raise CheckpointError(f"{said!r}, needed file: {SIDECAR} and its sha256", where=where, hint=_HINT)
    if not path.is_file():
        raise CheckpointError(
            "is not there; by config.json it holds the gates of this checkpoint",
            where=str(path),
            hint=f"Fetch it again; to run dense, take {CONFIG_KEY} out of quantization_config.",
        )
    found = fs.sha256_file(path).sha256
    if found != wanted:
        raise ChecksumError(f"sha256 {found[:12]}..., by config.json {wanted[:12]}...", where=str(path), hint=_HINT)


def weight_sizes(folder: Path) -> dict[str, int]:
    """Return the weight files of a folder that was written by sparsekit, name -> bytes."""
    return {path.name: path.stat().st_size for path in sorted(folder.glob("*model*.safetensors"))}


def _require_unnamed(folder: Path) -> None:
    """Refuse a checkpoint that had gates and has lost them: it would run dense, and nothing would tell."""
    manifest = folder / FILE
    try:
        said = jsonio.read(manifest, limit_bytes=_MANIFEST_BYTES)[1] if manifest.is_file() else None
    except CheckpointError:
        return  # verify tells; a model has always been loaded without it
    if isinstance(said, Mapping) and said.get("activations"):
        raise CheckpointError(
            f"is not there; by {FILE} it holds the gates of this checkpoint",
            where=str(folder / SIDECAR),
            hint=f"Copy it again; to run dense, remove {FILE} too.",
        )


def _said(text: str | None, path: Path) -> dict[str, Any]:
    """Return what the header says, with the keys that everything relies on."""
    try:
        said: Any = jsonio.parse((text or "null").encode(), where=str(path))
    except CheckpointError:
        said = None
    if not isinstance(said, dict) or type(said.get("version")) is not int:
        raise CheckpointError("its header does not describe any signals", where=str(path), hint=_HINT)
    if said["version"] > VERSION:
        raise VersionError(
            f"activation file version {said['version']}, this sparsekit reads {VERSION}",
            where=str(path),
            hint="Upgrade: pip install --upgrade sparsekit",
        )
    weights, sites = said.get("weights"), said.get("sites")
    if (
        type(said.get("dense_tokens")) is not int
        or said["dense_tokens"] < 0
        or said.get("prefill") not in ("dense", "sparse")
        or not isinstance(weights, dict)
        or not weights
        or not all(type(size) is int and Path(name).name == name for name, size in weights.items())
        or not isinstance(sites, dict)
        or not sites
        or not all(isinstance(facts, dict) for facts in sites.values())
    ):
        raise CheckpointError(
            "dense_tokens, prefill, weights or sites in its header are malformed", where=str(path), hint=_HINT
        )
    return said


def _require_weights(found: GateFile, folder: Path) -> None:
    """Refuse thresholds beside other weights than those they were calibrated for, as far as sizes tell."""
    for name, size in found.weights.items():
        path = folder / name
        actual = path.stat().st_size if path.is_file() else None
        if actual != size:
            got = "is not there" if actual is None else f"has {actual:,} bytes"
            raise CheckpointError(
                f"belongs to {name} of {size:,} bytes, which {got}",
                where=str(folder / SIDECAR),
                hint=f"The weights were changed: calibrate again; to run dense, delete this file and {FILE}.",
            )


class _Reader:
    """Makes gates of the file's tensors; `unread` are those nobody has asked for."""

    def __init__(self, path: Path, names: set[str]) -> None:
        self.path = path
        self.unread = names

    def placed(self, name: str, facts: Mapping[str, Any]) -> Placed:
        """Return the gate of a signal."""
        kind = facts.get("signal")
        if kind not in ("input", "gate", "neurons"):
            raise self.wrong(name, f"signal {kind!r}, needed input, gate or neurons")
        if (kind == "neurons") != (facts.get("rule") == "prompt"):
            raise self.wrong(name, f"rule {facts.get('rule')!r} at signal {kind}; rule prompt and neurons go together")
        if facts.get("share") is not None and self.number(name, facts, "share") > 1:
            raise self.wrong(name, f"share {facts['share']!r}, needed 0 to 1")
        remainder = None
        if "remainder" in facts:
            left, right = self.tensor(f"{name}.act_left", 2), self.tensor(f"{name}.act_right", 2)
            share = self.number(name, facts, "remainder")
            if left.shape[1] != right.shape[0] or kind != "input":
                raise self.wrong(name, f"left {list(left.shape)} and right {list(right.shape)} do not fit")
            if not (left.is_floating_point() and bool(left.isfinite().all() and right.isfinite().all())):
                raise self.wrong(name, "its remainder is not made of finite numbers")
            remainder = Remainder(share, left, right)
        return Placed(kind, self.gate(name, facts), remainder)

    def gate(self, name: str, facts: Mapping[str, Any]) -> Gate:
        rule = facts.get("rule")
        if rule == "threshold":
            return Threshold(self.sizes(f"{name}.act_threshold"))  # of experts a row each
        if rule == "top_k":
            return TopK(self.count(name, facts), self.sizes(f"{name}.act_importance"))
        if rule == "prompt":
            return OfPrompt(self.count(name, facts))
        if rule == "gaussian":
            return Gaussian(self.number(name, facts, "deviations"))
        raise self.wrong(name, f"rule {rule!r}, needed threshold, top_k, gaussian or prompt")

    def count(self, name: str, facts: Mapping[str, Any]) -> int:
        count = facts.get("count")
        if type(count) is not int or count < 1:
            raise self.wrong(name, f"count {count!r}, needed a whole number above 0")
        return count

    def number(self, name: str, facts: Mapping[str, Any], key: str) -> float:
        value = facts.get(key)
        if not isinstance(value, float | int) or isinstance(value, bool) or not 0 <= value < math.inf:
            raise self.wrong(name, f"{key} {value!r}, needed a number of at least 0")
        return float(value)

    def sizes(self, name: str) -> Tensor:
        """Return float32 that are not negative, a vector or one for each expert; infinite drops an entry always."""
        found = self.tensor(name, 1, 2)
        if found.dtype != torch.float32:
            raise self.wrong(name, f"{found.dtype}, needed float32")
        if bad := int((~(found >= 0)).sum()):
            raise self.wrong(name, f"{bad} of {found.numel()} values are NaN or negative")
        return found

    def tensor(self, name: str, *dimensions: int) -> Tensor:
        if name not in self.unread:
            raise self.wrong(name, "the tensor is not there")
        self.unread.discard(name)
        found = read_tensor(self.path, name)
        if found.dim() not in dimensions or not found.numel():
            needed = " or ".join(map(str, dimensions))
            raise self.wrong(name, f"shape {list(found.shape)}, needed {needed} dimensions")
        return found

    def wrong(self, name: str, message: str) -> CheckpointError:
        return CheckpointError(message, where=f"{self.path}: {name}", hint=_HINT)
