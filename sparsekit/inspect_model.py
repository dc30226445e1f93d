"""What a model or checkpoint is: its structure, and the zeros its weights really hold.

A checkpoint that sparsekit wrote is compared with its manifest: fine-tuning or merging an adapter turns zeros into
weights again, and nothing else would tell.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from sparsekit.checkpoint.manifest import FILE, Manifest, read_manifest
from sparsekit.checkpoint.safetensors_file import DTYPE_BITS, TensorEntry
from sparsekit.checkpoint.source import SIDECAR, TensorLocation, WeightFiles
from sparsekit.contracts import LinearInfo
from sparsekit.errors import CheckpointError, HeaderError, SparsekitError, TruncatedError
from sparsekit.models.gate_files import read_gate_file
from sparsekit.models.gate_fit import fitting_module
from sparsekit.models.lazy_model import LazyModel
from sparsekit.models.linears import Linear
from sparsekit.models.source import open_model
from sparsekit.pack import unpack
from sparsekit.pack.files import PackedFile
from sparsekit.pack.types import DTYPES
from sparsekit.pack.verify import pruned_claims
from sparsekit.progress import Reporter, track

CHUNK_BYTES = 16 << 20
"""Of a tensor in memory at once."""

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)|^\d+(?=\.)|(?<=\.)\d+$")
_FLOATS = {  # bits that are not the sign, and the least of them that is no finite number
    "F64": (2**63 - 1, 0x7FF << 52),
    "F32": (2**31 - 1, 0xFF << 23),
    "F16": (0x7FFF, 0x7C00),
    "BF16": (0x7FFF, 0x7F80),
    "F8_E5M2": (0x7F, 0x7C),
    "F8_E4M3": (0x7F, 0x7F),  # has no infinity
}
_CONFIG_FACTS = (
    "vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim",
    "max_position_embeddings", "tie_word_embeddings",
)  # fmt: skip


@dataclass(frozen=True)
class Kind:
    """The linears that have one place in every block; experts of a layer are one kind.

    Attributes:
        name: Name inside the block, numbers as `*`.
        count: Number of linears.
        shapes: Different shapes [out, in].
        numel: Weights in all of them.
        zeros: How many of the weights are zero; None if the weights were not read.
        kept: How many weights the manifest says were kept; None for what it does not call pruned.
        forms: How they are stored, `layout/encoding`; empty where all are plain tensors.
        stored_bytes: What they take in the files.
    """

    name: str
    count: int
    shapes: tuple[tuple[int, int], ...]
    numel: int
    zeros: int | None
    kept: int | None
    forms: tuple[str, ...]
    stored_bytes: int

    @property
    def bits_per_weight(self) -> float:
        """Bits in the files for each weight, zeros too."""
        return 8 * self.stored_bytes / self.numel

    @property
    def sparsity(self) -> float | None:
        """Fraction of zeros."""
        return None if self.zeros is None else self.zeros / self.numel


@dataclass(frozen=True)
class Lost:
    """A pruned tensor with more nonzero weights than were kept."""

    tensor: str
    kept: int
    nonzero: int


@dataclass(frozen=True)
class Agreement:
    """Stored zeros against the manifest.

    Attributes:
        pruned: Tensors that the manifest calls pruned.
        missing: Those that the weights no longer hold, by that name and shape.
        lost: Those that have lost zeros; empty if the weights were not read.
    """

    pruned: int
    missing: tuple[str, ...]
    lost: tuple[Lost, ...]

    @property
    def ok(self) -> bool:
        """Whether every recorded zero is still there."""
        return not self.missing and not self.lost

    @property
    def zeros_lost(self) -> int:
        """Number of weights that were zero and are no longer."""
        return sum(entry.nonzero - entry.kept for entry in self.lost)


@dataclass(frozen=True)
class Origin:
    """What the manifest of a checkpoint says about how it was made."""

    run_id: str
    base: str | None
    recipe: Mapping[str, Any]
    tools: Mapping[str, Any]
    layout: str


@dataclass(frozen=True)
class GatesFound:
    """Activation sparsity beside the weights.

    Attributes:
        method: From the manifest; None where it does not say.
        signals: Signals that are thinned out.
        sparsity: Share that is left out on held-out text: of the weights, from the manifest; else the mean over signals
            that the file itself holds, None where it does not.
        protocol: Which tokens are thinned out, in words.
        problem: Why the file cannot be used, None if it can; the rest is then empty.
    """

    method: str | None
    signals: int = 0
    sparsity: float | None = None
    protocol: str = ""
    problem: str | None = None


@dataclass(frozen=True)
class Inspection:
    """A model as it lies on disk.

    Attributes:
        name: What the user called it.
        folder: Where its files are.
        revision: Commit of a Hub model, else None.
        model_type, architecture: Of the configuration.
        config: Sizes from the configuration; only those it has.
        blocks: Number of decoder blocks.
        parameters: Numbers in all tensors, zeros that are not stored too.
        block_weights: Weights of all matrices in the blocks, routers aside.
        dtypes: Bytes per stored dtype.
        total_bytes: Of all tensors.
        files: Weight files.
        kinds: The linears, in the order of a block.
        claim: `sparsity_config` of config.json, None without one.
        origin: From the manifest; None if sparsekit did not write this folder.
        manifest_problem: Why there is a manifest that cannot be used, else None.
        agreement: With the manifest; None without one.
        weights_read: Whether zeros were counted.
        nonfinite: NaN and infinite weights per stored tensor that has any.
        gates: Activation sparsity; None without any.
    """

    name: str
    folder: Path
    revision: str | None
    model_type: str
    architecture: str
    config: Mapping[str, Any]
    blocks: int
    parameters: int
    block_weights: int
    dtypes: Mapping[str, int]
    total_bytes: int
    files: tuple[str, ...]
    kinds: tuple[Kind, ...]
    claim: Mapping[str, Any] | None
    origin: Origin | None
    manifest_problem: str | None
    agreement: Agreement | None
    weights_read: bool
    nonfinite: Mapping[str, int]
    gates: GatesFound | None = None

    @property
    def sparsity(self) -> float | None:
        """Fraction of zeros in all linears of the blocks; None if the weights were not read."""
        zeros = [kind.zeros for kind in self.kinds if kind.zeros is not None]
        return sum(zeros) / sum(kind.numel for kind in self.kinds) if len(zeros) == len(self.kinds) else None

    def to_json(self) -> dict[str, Any]:
        """Return JSON values."""
        document = {**asdict(self), "folder": str(self.folder), "sparsity": self.sparsity}
        for entry, kind in zip(document["kinds"], self.kinds, strict=True):
            entry |= {"sparsity": kind.sparsity, "bits_per_weight": kind.bits_per_weight}
        if self.agreement is not None:
            document["agreement"] |= {"ok": self.agreement.ok, "zeros_lost": self.agreement.zeros_lost}
        return document


def inspect_model(
    name: str,
    reporter: Reporter,
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
    weights: bool = True,
) -> Inspection:
    """Describe a model; weights are read one piece of CHUNK_BYTES at a time.

    Args:
        name: Hub id, local folder, or `.gguf` file.
        reporter: Told about every tensor read.
        revision: Branch, tag or commit of a Hub model.
        trust_remote_code: Allow code of the model to run.
        weights: Count zeros; False reads headers only.

    Raises:
        ModelError, CheckpointError: The model cannot be opened.
    """
    source = open_model(name, reporter, revision=revision, trust_remote_code=trust_remote_code)
    stored = stored_tensors(source.weights)
    # By the names and shapes of its dense tensors a packed checkpoint has the structure of a dense one.
    dense = {name: TensorLocation("", tensor.entry) for name, tensor in stored.items()}
    model = replace(source, weights=replace(source.weights, files=(), tensors=dense)).lazy()
    places = [(linear, keys) for index in range(model.blocks) for linear, keys in _places(model, index)]
    manifest, problem = _manifest(source.folder)
    pruned = _pruned(manifest)
    counted = {key for _, keys in places for key in keys} | (pruned.keys() & stored.keys())
    tallies = _count(stored, sorted(counted), reporter) if weights else {}
    nonzero = {key: tally.nonzero for key, tally in tallies.items()}
    dtypes: dict[str, int] = {}
    for location in source.weights.tensors.values():
        dtypes[location.entry.dtype] = dtypes.get(location.entry.dtype, 0) + location.entry.size_bytes
    return Inspection(
        name=name,
        folder=source.folder,
        revision=source.revision,
        model_type=str(source.config.model_type),
        architecture=type(model.module).__name__,
        config=_config_facts(source.config),
        blocks=model.blocks,
        parameters=sum(tensor.entry.numel for tensor in stored.values()),
        block_weights=model.stack.matrix_weights(),
        dtypes=dict(sorted(dtypes.items(), key=lambda item: -item[1])),
        total_bytes=source.weights.total_bytes,
        files=source.weights.files,
        kinds=_kinds(model, places, nonzero if weights else None, pruned, stored),
        claim=_claim(source.config),
        origin=_origin(manifest) if manifest else None,
        manifest_problem=problem,
        agreement=_agreement(manifest, pruned, stored, nonzero) if manifest else None,
        weights_read=weights,
        nonfinite={key: tally.nonfinite for key, tally in tallies.items() if tally.nonfinite},
        gates=_gates(source.folder, model, manifest),
    )


# --- structure ---------------------------------------------------------------------------------------------
def _places(model: LazyModel, index: int) -> Iterable[tuple[list[Linear], tuple[str, ...]]]:
    """Yield the linears that one parameter of a block holds, with the checkpoint tensors it is stored in."""
    by_parameter: dict[str, list[Linear]] = {}
    for linear in model.stack.linears(index):
        # An expert is named PATH.NUMBER.PARAMETER, and is a slice of PATH's parameter.
        path = linear.name if linear.expert is None else linear.name.rsplit(".", 2)[0]
        by_parameter.setdefault(f"{path}.{linear.parameter}", []).append(linear)
    for name, linears in by_parameter.items():
        empty = linears[0].module.get_parameter(linears[0].parameter).data  # on meta: only names and shapes matter
        yield linears, tuple(sorted(model.to_checkpoint({name: empty})))


def _kinds(
    model: LazyModel,
    places: Sequence[tuple[list[Linear], tuple[str, ...]]],
    nonzero: Mapping[str, int] | None,
    pruned: Mapping[str, int],
    stored: Mapping[str, StoredTensor],
) -> tuple[Kind, ...]:
    infos: dict[str, list[LinearInfo]] = {}
    tensors: dict[str, list[str]] = {}
    for linears, keys in places:
        first = linears[0].info
        kind = _NUMBER.sub("*", first.name.removeprefix(f"{model.stack.prefix(first.block)}."))
        infos.setdefault(kind, []).extend(linear.info for linear in linears)
        tensors.setdefault(kind, []).extend(keys)
    kinds = []
    for kind, members in infos.items():
        numel = sum(info.numel for info in members)
        kept = [pruned[key] for key in tensors[kind] if key in pruned]
        kinds.append(
            Kind(
                name=kind,
                count=len(members),
                shapes=tuple(sorted({(info.out_features, info.in_features) for info in members})),
                numel=numel,
                zeros=None if nonzero is None else numel - sum(nonzero[key] for key in tensors[kind]),
                kept=sum(kept) if kept else None,
                forms=tuple(sorted({form for key in tensors[kind] if (form := stored[key].form)})),
                stored_bytes=sum(stored[key].size_bytes for key in tensors[kind]),
            )
        )
    return tuple(kinds)


def _config_facts(config: Any) -> dict[str, Any]:
    text = config.get_text_config()
    found = {name: getattr(text, name, None) for name in _CONFIG_FACTS}
    return {name: value for name, value in found.items() if isinstance(value, (bool, int))}


def _claim(config: Any) -> Mapping[str, Any] | None:
    claim = getattr(config, "sparsity_config", None)
    return claim if isinstance(claim, dict) else None


# --- manifest ----------------------------------------------------------------------------------------------
def _manifest(folder: Path) -> tuple[Manifest | None, str | None]:
    if not (folder / FILE).is_file():
        return None, None
    try:
        return read_manifest(folder), None
    except CheckpointError as error:  # the model can be described all the same; the reader is told
        return None, str(error)


def _pruned(manifest: Manifest | None) -> dict[str, int]:
    """Return kept weights per pruned tensor."""
    return {name: claim.kept for name, claim in pruned_claims(manifest).items()} if manifest else {}


def _origin(manifest: Manifest) -> Origin:
    base, recipe = manifest.raw.get("base"), manifest.identity.get("recipe")
    label = base.get("label") if isinstance(base, Mapping) else None
    return Origin(
        run_id=manifest.run_id,
        base=label if isinstance(label, str) else None,
        recipe=recipe if isinstance(recipe, Mapping) else {},
        tools=manifest.tools,
        layout=manifest.layout,
    )


def _agreement(
    manifest: Manifest, pruned: Mapping[str, int], stored: Mapping[str, StoredTensor], nonzero: Mapping[str, int]
) -> Agreement:
    missing = [
        name
        for name in pruned
        if name not in stored or (name in manifest.tensors and stored[name].entry.shape != manifest.tensors[name].shape)
    ]
    lost = [
        Lost(name, kept, nonzero[name])
        for name, kept in pruned.items()
        if name not in missing and nonzero.get(name, 0) > kept
    ]
    return Agreement(len(pruned), tuple(missing), tuple(lost))


# --- gates ---------------------------------------------------------------------------------------------------
def _gates(folder: Path, model: LazyModel, manifest: Manifest | None) -> GatesFound | None:
    """Return what lies beside the weights, held to the model as it is when it is loaded."""
    said = manifest.raw.get("activations") if manifest else None
    method = said.get("method") if isinstance(said, Mapping) else None
    known = method if isinstance(method, str) else None
    try:
        file = read_gate_file(folder)
        if file is None:
            return None
        for name, placed in file.gates.items():
            fitting_module(model.module, name, placed, str(folder / SIDECAR))
    except SparsekitError as error:  # the model can be described all the same; the reader is told
        return GatesFound(known, problem=str(error))
    measured = said.get("held_out") if isinstance(said, Mapping) else None
    share = measured.get("sparsity") if isinstance(measured, Mapping) else None
    if not isinstance(share, float) and file.shares:
        share = sum(file.shares.values()) / len(file.shares)
    share = share if isinstance(share, float) else None
    return GatesFound(known, len(file.gates), share, file.protocol)


# --- weights -----------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Tally:
    """Numbers of one stored tensor: those that are not zero, and among them those that are NaN or infinite."""

    nonzero: int
    nonfinite: int


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of the dense model, as it lies in a file.

    Attributes:
        entry: Dtype and shape it has when it is dense; its place in the file if it is stored so.
        file: Holds it.
        form: `layout/encoding` of a packed tensor, None for a plain one.
        size_bytes: What it takes, all parts together.
    """

    entry: TensorEntry
    file: PackedFile
    form: str | None
    size_bytes: int


def stored_tensors(weights: WeightFiles) -> dict[str, StoredTensor]:
    """Return every tensor of the dense model; only headers are read.

    Raises:
        HeaderError: A packed tensor's entry lacks what describes it.
    """
    found: dict[str, StoredTensor] = {}
    for name in weights.files:
        file = PackedFile(weights.path(name))
        for key in file.names():
            found[key] = _packed_tensor(file, key) if key in file.facts else _plain_tensor(file, key)
    return dict(sorted(found.items()))


def _plain_tensor(file: PackedFile, key: str) -> StoredTensor:
    entry = file.header.tensors[key]
    return StoredTensor(entry, file, None, entry.size_bytes)


def _packed_tensor(file: PackedFile, key: str) -> StoredTensor:
    facts = file.facts[key]
    shape, dtype = facts.get("shape"), facts.get("dtype")
    sides = shape if isinstance(shape, list) else []
    if len(sides) != 2 or not all(type(side) is int and side >= 0 for side in sides) or dtype not in DTYPES:
        raise HeaderError(f"shape {shape!r} or dtype {dtype!r} is malformed", where=f"{file.path}: {key}")
    stem = key.removesuffix("weight")
    parts = [entry.size_bytes for name, entry in file.header.tensors.items() if file.is_part(name, stem)]
    entry = TensorEntry(dtype, tuple(reversed(sides) if facts.get("transposed") else sides), 0, 0)
    return StoredTensor(entry, file, f"{facts.get('layout')}/{facts.get('encoding')}", sum(parts))


def _count(stored: Mapping[str, StoredTensor], names: Sequence[str], reporter: Reporter) -> dict[str, Tally]:
    """Return the tally of each checkpoint tensor."""
    counts = {}
    for name in track(names, reporter, "count zeros", len(names), "tensor"):
        tensor = stored[name]
        if tensor.form is None:
            counts[name] = tally(tensor.file.path, tensor.entry, where=name)
        else:
            weight = unpack(tensor.file.packed(name))
            nonfinite = weight.numel() - int(weight.isfinite().count_nonzero())
            counts[name] = Tally(int(weight.count_nonzero()), nonfinite)
    return counts


def tally(path: Path, entry: TensorEntry, *, where: str) -> Tally:
    """Count the numbers of a stored tensor; -0.0 is zero. At most CHUNK_BYTES of it are in memory.

    Raises:
        CheckpointError: A dtype whose numbers do not fill bytes, or a file that ends too early.
    """
    bits = DTYPE_BITS[entry.dtype]
    if bits % 8:
        raise CheckpointError(f"zeros of dtype {entry.dtype} cannot be counted", where=where, hint="Use --no-weights.")
    unsigned = np.dtype(f"<u{bits // 8}")
    magnitude, infinity = _FLOATS.get(entry.dtype, (2**bits - 1, None))
    nonzero = nonfinite = 0
    with path.open("rb") as handle:
        handle.seek(entry.start)
        left = entry.size_bytes
        while left:
            data = handle.read(min(CHUNK_BYTES, left))
            if not data:
                raise TruncatedError(f"ends {left:,} bytes before tensor {where} does", where=str(path))
            left -= len(data)
            values = np.frombuffer(data, unsigned) & unsigned.type(magnitude)
            nonzero += int(np.count_nonzero(values))
            if infinity is not None:
                nonfinite += int(np.count_nonzero(values >= unsigned.type(infinity)))
    return Tally(nonzero, nonfinite)
