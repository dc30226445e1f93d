"""What a conversion reads: sparsekit checkpoints, plain folders, old compressed-tensors folders."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsekit.checkpoint import jsonio
from sparsekit.checkpoint.manifest import FILE, Manifest, read_manifest
from sparsekit.checkpoint.safetensors_file import DTYPE_BITS, RawTensor
from sparsekit.checkpoint.shapes import PLAIN, Shapes, read_shapes
from sparsekit.checkpoint.source import SIDECAR, WeightFiles, is_ours, open_weights
from sparsekit.errors import ChecksumError, HeaderError, ModelError, WeightMismatch
from sparsekit.fs import sha256_file
from sparsekit.models.raw import read_raw
from sparsekit.pack import Layout, compressed_tensors, files, keep_of, unpack, unpack_keep
from sparsekit.pack.types import DTYPES, as_bits
from sparsekit.pack.verify import Claim, disagreement, pruned_claims
from sparsekit.pattern import NM, Block, Unstructured, parse_pattern
from sparsekit.progress import Reporter, track

if TYPE_CHECKING:
    from torch import Tensor

CONFIG_LIMIT_BYTES = 1 << 24
LEAST_ZEROS = 1 / 16
"""In a folder without a manifest, a matrix with fewer zeros is not taken for pruned: a bitmask would not pay."""
_GUESSED = (NM(1, 4), NM(2, 4), NM(4, 8))
_CONV1D = {"gpt2", "openai-gpt"}  # their linears are stored [in, out]
_CONV1D_NAMES = ("c_attn.weight", "c_proj.weight", "c_fc.weight")
_NOT_SIDE_FILES = (
    "*.safetensors", "*.safetensors.index.json", "*.bin", "*.bin.index.json", "*.pt", "*.pth", "*.ckpt", "*.gguf",
    "*.h5", "*.msgpack", "*.onnx", "config.json", FILE, ".*",
)  # fmt: skip


@dataclass
class ConvertSource:
    """A folder that is to be converted; headers are checked, no weight is read.

    Attributes:
        folder: Where it is.
        config: Content of config.json.
        weights: The checked weight files.
        manifest: What sparsekit wrote about it, None for a folder of others.
        shards: Names of the dense tensors, by input shard.
        shapes: In what they differ from the rest of the configuration's.
    """

    folder: Path
    config: dict[str, Any]
    weights: WeightFiles
    manifest: Manifest | None
    shards: list[list[str]] = field(default_factory=list)
    shapes: Shapes = PLAIN
    _old_kind: str | None = None
    _old: dict[str, dict[str, str]] = field(default_factory=dict)
    _files: dict[str, files.PackedFile] = field(default_factory=dict)
    _owner: dict[str, files.PackedFile] = field(default_factory=dict)

    @property
    def recipe(self) -> Any:
        """The recipe the checkpoint was made with, None where nobody knows."""
        return self.manifest.identity.get("recipe") if self.manifest else None

    @property
    def dense_bytes(self) -> int:
        """Bytes of all tensors once they are dense."""
        return sum(math.prod(self.shape(name)) * DTYPE_BITS[self._dtype(name)] // 8 for name in self._owner)

    def identity(self) -> dict[str, str]:
        """Return the sha256 of config, weights and gates; reads every file.

        Raises:
            ChecksumError: A file is not the one in the manifest.
        """
        found = {name: record.sha256 for name, record in self.weights.fingerprints().items()}
        if self.gated:
            found[SIDECAR] = sha256_file(self.folder / SIDECAR).sha256
        for name, sha256 in found.items() if self.manifest else ():
            recorded = self.manifest.files.get(name) if self.manifest else None
            if recorded is None or recorded.sha256 != sha256:
                raise ChecksumError(
                    "is not the file that the manifest recorded" if recorded else "is not in the manifest",
                    where=str(self.folder / name),
                    hint=f"See: sparsekit verify {self.folder}. If it was changed on purpose, remove {FILE} first.",
                )
        found["config.json"] = sha256_file(self.folder / "config.json").sha256
        return dict(sorted(found.items()))

    @property
    def gated(self) -> bool:
        """Whether a file of gates lies beside the weights."""
        return (self.folder / SIDECAR).is_file()

    def coded(self, name: str) -> bool:
        """Whether the tensor is stored in parts."""
        return name in self._old or name in self._owner[name].facts

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of the dense tensor; of an old format's tensor only its rank is right."""
        if name in self._old:
            rows, width = self.weights.tensors[self._old[name]["bitmask"]].entry.shape
            return (rows, 8 * width)
        facts = self._owner[name].facts.get(name)
        if facts is None:
            return self.weights.tensors[name].entry.shape
        shape = facts.get("shape")
        if not isinstance(shape, list) or not all(type(size) is int and size >= 0 for size in shape):
            raise HeaderError(f"shape is {shape!r}, needed [rows, cols]", where=f"{self._owner[name].path}: {name}")
        return tuple(reversed(shape)) if facts.get("transposed") else tuple(shape)

    def raw(self, name: str) -> RawTensor:
        """Return a tensor that is stored whole, byte for byte."""
        location = self.weights.tensors[name]
        return read_raw(self.weights.path(location.file), location.entry)

    def load(self, name: str, claim: Claim | None) -> tuple[Tensor, Tensor | None]:
        """Return a dense tensor and its mask; None for what nobody calls pruned.

        Raises:
            SparsekitError: The parts are damaged, or disagree with `claim`.
        """
        where = f"{self._owner[name].path}: {name}"
        if name in self._old:
            parts = {part: self._tensor(stored) for part, stored in self._old[name].items()}
            return compressed_tensors.decode(str(self._old_kind), parts, where)
        if not self.coded(name):
            weight = self._tensor(name)
            packable = claim is not None and files.packable(name, tuple(weight.shape))
            return weight, mask_of(weight, claim, where) if claim and packable else None
        packed = self._owner[name].packed(name)
        if self.manifest is not None and (message := disagreement(packed, claim)):
            raise WeightMismatch(message, where=where, hint=f"See: sparsekit verify {self.folder} --level semantic")
        weight = unpack(packed)
        if claim is None:
            return weight, None
        return weight, mask_of(weight, claim, where) if packed.layout is Layout.DENSE else unpack_keep(packed)

    def claims(self, reporter: Reporter) -> dict[str, Claim]:
        """Return what is known of every pruned tensor: from the manifest, from the parts, or from the zero bits.

        Args:
            reporter: Told about every tensor whose zeros are counted.
        """
        if self.manifest is not None:
            return pruned_claims(self.manifest)
        claims: dict[str, Claim] = {}
        for name, parts in self._old.items():
            kept = self.weights.tensors[parts["compressed"]].entry.numel if "compressed" in parts else 0
            pattern = "2:4" if self._old_kind == compressed_tensors.BITMASK_24 else "unstructured"
            claims[name] = Claim(kept, pattern, None, False)
        for name, file in self._owner.items():
            if name in file.facts:
                packed = file.packed(name)
                kept = packed.nnz
                if packed.layout is Layout.DENSE:
                    kept = int(as_bits(unpack(packed)).count_nonzero())
                claims[name] = Claim(kept, str(packed.pattern), None, packed.transposed)
        return claims or self._scan(reporter)

    def claims_of(self, out: Path) -> dict[str, Claim]:
        """Return the claims of a finished conversion."""
        return pruned_claims(read_manifest(out))

    def side_files(self) -> list[Path]:
        """Return the files that go along unchanged: tokenizer, generation settings, report, licence."""
        return [
            path
            for path in sorted(self.folder.iterdir())
            if path.is_file() and not any(fnmatch.fnmatch(path.name, pattern) for pattern in _NOT_SIDE_FILES)
        ]

    def _scan(self, reporter: Reporter) -> dict[str, Claim]:
        """Look for matrices with many zeros, and for the one N:M pattern that all of them obey."""
        names = [name for name in self._owner if files.packable(name, self.shape(name)) and self._dtype(name) in DTYPES]
        found: dict[str, dict[str, int]] = {}
        legal = list(_GUESSED)
        for name in track(names, reporter, "count zeros", len(names), "tensor"):
            weight = self._tensor(name)
            weight = weight.T if self._transposed(name) else weight
            bits = as_bits(weight.contiguous()) != 0
            kept = int(bits.count_nonzero())
            if kept > (1 - LEAST_ZEROS) * weight.numel():
                continue
            legal = [pattern for pattern in legal if _obeys(bits, kept, pattern)]
            found[name] = {str(pattern): int(keep_of(weight, pattern).count_nonzero()) for pattern in legal}
            found[name]["unstructured"] = kept
        pattern = str(legal[0]) if legal else "unstructured"
        return {name: Claim(kept[pattern], pattern, None, self._transposed(name)) for name, kept in found.items()}

    def _transposed(self, name: str) -> bool:
        return self.config.get("model_type") in _CONV1D and name.endswith(_CONV1D_NAMES)

    def _dtype(self, name: str) -> str:
        if name in self._old:
            return self.weights.tensors[self._old[name]["compressed"]].entry.dtype
        facts = self._owner[name].facts.get(name)
        dtype = self.weights.tensors[name].entry.dtype if facts is None else facts.get("dtype")
        if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
            raise HeaderError(f"dtype is {dtype!r}", where=f"{self._owner[name].path}: {name}")
        return dtype

    def _tensor(self, stored: str) -> Tensor:
        return self._files[self.weights.tensors[stored].file].stored(stored)


def open_source(folder: Path) -> ConvertSource:
    """Open a folder that is to be converted.

    Raises:
        CheckpointError: No model, a damaged header, or a manifest that cannot be read.
        UnsafeFormat: marlin-24, or a sparse format nobody knows.
        ModelError: Quantised in another way.
    """
    weights = open_weights(folder)
    path = folder / "config.json"
    if not path.is_file():
        raise ModelError("no config.json", where=str(folder), hint="Need a Hugging Face model folder.")
    _, config = jsonio.read(path, limit_bytes=CONFIG_LIMIT_BYTES)
    if not isinstance(config, dict):
        raise ModelError("need a JSON object", where=str(path), hint="Fetch this file of the model again.")
    kind = _old_kind(config, str(path))
    manifest = read_manifest(folder) if (folder / FILE).is_file() else None
    if manifest is None and is_ours(weights.files) and "quantization_config" not in config:
        raise ModelError("the weights are packed or narrow, config.json does not say so", where=str(path))
    groups = compressed_tensors.groups(weights.tensors)
    if bool(groups) != (kind is not None):
        stored = f"holds {len(groups)} bitmasks" if groups else "holds no bitmask"
        raise HeaderError(f"names the sparse format {kind}, but the folder {stored}", where=str(path))
    shapes = read_shapes(config.get("quantization_config"))
    source = ConvertSource(folder, config, weights, manifest, shapes=shapes, _old_kind=kind, _old=groups)
    parts = {stored: name for name, group in groups.items() for stored in group.values()}
    for file in weights.files:
        opened = source._files.setdefault(file, files.PackedFile(weights.path(file)))
        names = [name for name in opened.names() if name not in parts]
        names += [name for name, group in groups.items() if weights.tensors[group["bitmask"]].file == file]
        source._owner.update({name: opened for name in names})
        if names:
            source.shards.append(sorted(names))
    for name in groups:
        if missing := sorted({"compressed", "shape"} - set(groups[name])):
            raise HeaderError(f"{missing[0]} is missing", where=f"{source._owner[name].path}: {name}")
    return source


def _old_kind(config: Mapping[str, Any], where: str) -> str | None:
    """Return the compressed-tensors format to decode; refuse any other quantisation."""
    quantization = config.get("quantization_config") or config.get("compression_config")
    if not quantization:
        return None
    method = quantization.get("quant_method", "compressed-tensors") if isinstance(quantization, dict) else quantization
    if method == "sparsekit":
        return None
    kind = compressed_tensors.sparse_format(config, where)
    if method != "compressed-tensors" or kind is None or quantization.get("config_groups"):
        also = "quantised" if kind is None else f"{kind} and quantised"
        raise ModelError(
            f"the checkpoint is {also} ({method})", where=where, hint="Convert the unquantised checkpoint."
        )
    return kind


def mask_of(weight: Tensor, claim: Claim, where: str) -> Tensor:
    """Return the mask of a dense pruned weight that has exactly `claim.kept` weights.

    A kept weight that is zero has the bits of a removed one. Where such weights are missing from the count, the
    first zeros in row order count as kept, which changes no bit.

    Args:
        weight: [out, in], or [in, out] if `claim.transposed`.
        claim: What is known of it.
        where: File and tensor for messages.

    Raises:
        WeightMismatch: More weights than `claim.kept` are not zero, or the pattern is broken.
        SparsekitError: The pattern does not fit the shape.
    """
    pattern = parse_pattern(claim.pattern)
    oriented = weight.T if claim.transposed else weight
    pattern.check(*oriented.shape, where=where)
    keep = keep_of(oriented, pattern)
    found = int(keep.count_nonzero())
    if found > claim.kept:
        raise WeightMismatch(
            f"{found:,} weights have to be kept under {pattern}, only {claim.kept:,} are by the manifest",
            where=where,
            hint=f"It was changed after pruning; remove {FILE} to convert it as it is.",
        )
    if isinstance(pattern, Block):
        grid = _fill(keep[:: pattern.rows, :: pattern.cols], (claim.kept - found) // pattern.unit)
        keep = grid.repeat_interleave(pattern.rows, 0).repeat_interleave(pattern.cols, 1)
    elif isinstance(pattern, Unstructured):
        keep = _fill(keep, claim.kept - found)
    if (kept := int(keep.count_nonzero())) != claim.kept:
        raise WeightMismatch(f"{kept:,} kept weights under {pattern}, {claim.kept:,} by the manifest", where=where)
    return keep.T if claim.transposed else keep


def _fill(keep: Tensor, count: int) -> Tensor:
    """Return `keep` with its first `count` False entries set."""
    flat = keep.reshape(-1).clone()
    flat[(~flat).nonzero()[:count, 0]] = True
    return flat.reshape(keep.shape)


def _obeys(bits: Tensor, kept: int, pattern: NM) -> bool:
    """Whether nonzero bits obey a pattern and nearly fill it, so that it is no accident."""
    if bits.shape[1] % pattern.of or kept < 0.9 * bits.numel() * pattern.keep / pattern.of:
        return False
    return int(bits.reshape(-1, pattern.of).sum(dim=1).max()) <= pattern.keep
