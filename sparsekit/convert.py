"""Converting a checkpoint into another form, every bit kept: dense, packed, or from old compressed-tensors folders.

One shard is read, converted, written and journalled at a time, so a killed conversion goes on where it stopped and
memory holds one shard. What was pruned comes from the manifest; in a folder without one the zero bits say it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sparsekit import fs
from sparsekit.checkpoint.safetensors_file import RawTensor, read_header
from sparsekit.checkpoint.shapes import config_entries
from sparsekit.checkpoint.source import INDEX, PACKED_INDEX, PACKED_STEM, SIDECAR
from sparsekit.checkpoint.staging import StagedCheckpoint, is_finished, recover
from sparsekit.convert_source import ConvertSource, open_source
from sparsekit.describe import tools, weights_bytes
from sparsekit.errors import ModelError, OutputExists, UsageError
from sparsekit.lazy import require_address_space
from sparsekit.models.gate_files import read_gate_file, weight_sizes, write_gates
from sparsekit.models.raw import to_raw
from sparsekit.pack import Encoding, Layout, files
from sparsekit.pack.types import DTYPES
from sparsekit.pack.verify import Claim
from sparsekit.progress import Reporter, track
from sparsekit.prune import Form, pack_changed

TARGETS = ("dense", "auto", "bitmask", "nm", "block")
LOSSY = ("int8", "int4")
VALUES = ("auto", "raw", "split", *LOSSY)


@dataclass(frozen=True)
class Conversion:
    """What a conversion did.

    Attributes:
        out: The committed checkpoint.
        forms: `layout/encoding` -> number of packed tensors; empty for a dense result.
        pruned: Number of tensors known to be pruned.
        source_bytes, output_bytes: Of the weight files.
        already_finished: The result was there, made by exactly this conversion; nothing was done.
    """

    out: Path
    forms: Mapping[str, int]
    pruned: int
    source_bytes: int
    output_bytes: int
    already_finished: bool = False


def convert(
    folder: Path,
    to: str,
    out: Path,
    reporter: Reporter,
    *,
    values: str = "auto",
    overwrite: bool = False,
    resume: bool = True,
) -> Conversion:
    """Write the model in `folder` to `out` in another form.

    Args:
        folder: A checkpoint of sparsekit, dense or packed; a plain Hugging Face folder; or an old compressed-tensors
            folder in `sparse-bitmask` or `sparse-24-bitmask`.
        to: `dense`, `auto` (the smallest per tensor), or the layout `bitmask`, `nm`, `block`.
        out: Output folder.
        reporter: Told about every shard.
        values: `auto` (the smallest without loss), `raw`, `split`; `int8` and `int4` lose bits.
        overwrite: Replace a non-empty `out`.
        resume: Go on with an interrupted conversion; False discards it.

    Raises:
        UsageError: A form that does not exist for these weights, values for a dense result, or lossy values for weights
            that gates belong to.
        CheckpointError, KernelError, MaskError: The source is damaged or disagrees with its manifest.
        UnsafeFormat: marlin-24, or a format nobody knows.
        ModelError: Another quantisation, or nothing that could be packed.
        OutputExists: `out` is not empty, or holds the source.
    """
    if to not in TARGETS or values not in VALUES:
        raise UsageError(f"--to {to} --values {values}: choose of {', '.join(TARGETS)}; {', '.join(VALUES)}")
    if to == "dense" and values != "auto":
        raise UsageError(f"--values {values} is about packed weights, --to is dense", hint="Leave --values out.")
    require_address_space()
    _refuse_source(folder, out)
    source = open_source(folder)
    gates = read_gate_file(folder)
    if gates is not None and values in LOSSY:
        raise UsageError(
            f"--values {values} changes the weights that the activation sparsity of this checkpoint was calibrated for",
            where=str(folder / SIDECAR),
            hint="Use --values auto; or remove that file and sparsekit.json to convert the weights alone.",
        )
    form = None if to == "dense" else _form(to, values)
    fs.require_space(out, source.dense_bytes if form is None else source.weights.total_bytes, "the checkpoint")
    identity = {
        "recipe": source.recipe,
        "conversion": {"to": to, "values": values},
        "model": source.identity(),
        "versions": {name: version for name, version in tools().items() if name != "python"},
    }
    already = is_finished(out, identity)
    if already:
        recover(out)  # a conversion killed right after its commit left its journal
        return _outcome(source, out, _written_facts(out), already=True)
    with StagedCheckpoint.open(out, identity, overwrite=overwrite, resume=resume) as staged:
        claims = source.claims(reporter)
        facts = _write_shards(source, claims, form, staged, reporter)
        if form is not None and not facts:
            staged.discard()
            raise ModelError(
                "nothing can be packed: no weight matrix has enough zeros", where=str(folder), hint="Prune it first."
            )
        _write_files(source, staged, facts, packed=form is not None)
        if gates is not None:
            write_gates(staged, replace(gates, weights=weight_sizes(staged.folder)))
        given = _manifest(source, claims, facts, staged, packed=form is not None)
        volatile = set(source.manifest.volatile) if source.manifest else set()
        present = set(fs.list_files(staged.folder))
        committed = staged.commit(given, volatile=sorted(volatile & present))
    return _outcome(source, committed, facts, pruned=len(claims))


def _form(to: str, values: str) -> Form:
    return Form(None if to == "auto" else Layout(to), None if values == "auto" else Encoding(values))


def _refuse_source(folder: Path, out: Path) -> None:
    """Refuse an output that is the source, holds it or lies in it, whatever --overwrite says."""
    place, origin = Path(os.path.realpath(out)), Path(os.path.realpath(folder))
    if origin.is_relative_to(place) or place.is_relative_to(origin):
        raise OutputExists(
            f"and the folder that is to be converted ({origin}) lie in one another",
            where=str(out),
            hint="Choose another output with -o.",
        )


def _write_shards(
    source: ConvertSource,
    claims: Mapping[str, Claim],
    form: Form | None,
    staged: StagedCheckpoint,
    reporter: Reporter,
) -> dict[str, dict[str, Any]]:
    """Convert every shard that is not there yet; return the facts of all packed tensors."""
    stem = PACKED_STEM if form is not None or not source.shapes.plain else "model"
    count = len(source.shards)
    facts: dict[str, dict[str, Any]] = {}
    shared: dict[str, Form] = {}
    for number, names in enumerate(track(source.shards, reporter, "convert", count, "shard"), start=1):
        key = f"shard-{number}"
        entry = staged.finished(key)
        if entry is None:
            written, packed = _convert_shard(source, names, claims, form, shared)
            remembered = {kind: [each.layout, each.encoding] for kind, each in shared.items()}
            entry = staged.write_shard(
                key,
                f"{stem}-{number:05d}-of-{count:05d}.safetensors",
                written,
                {"packed": packed, "shared": remembered},
                files.metadata(packed),
            )
        found: Any = entry.facts
        facts.update(found["packed"])
        for kind, (layout, encoding) in found["shared"].items():
            shared[kind] = Form(Layout(layout), Encoding(encoding))
    return facts


def _convert_shard(
    source: ConvertSource,
    names: list[str],
    claims: Mapping[str, Claim],
    form: Form | None,
    shared: dict[str, Form],
) -> tuple[dict[str, RawTensor], dict[str, dict[str, Any]]]:
    """Return the tensors of an output shard and the facts of those that are packed; one is dense at a time."""
    written: dict[str, RawTensor] = {}
    packed: dict[str, dict[str, Any]] = {}
    for name in names:
        claim = claims.get(name)
        can_pack = claim is not None and form is not None and files.packable(name, source.shape(name))
        if not source.coded(name) and not can_pack:
            written[name] = source.raw(name)
            continue
        weight, keep = source.load(name, claim)
        dense = to_raw(weight)
        if form is None or claim is None or keep is None or dense.dtype not in DTYPES or not can_pack:
            written[name] = dense
            continue
        one = {name: dense}
        about = {name: {"pattern": claim.pattern, "transposed": claim.transposed}}
        packed |= pack_changed(one, {name: weight}, {name: keep}, about, form, shared)
        written |= one
    return written, packed


def _write_files(
    source: ConvertSource, staged: StagedCheckpoint, facts: Mapping[str, Mapping[str, Any]], *, packed: bool
) -> None:
    """Write index and configuration, and copy what else the folder holds."""
    weight_map: dict[str, str] = {}
    total = 0
    for path in sorted(staged.folder.glob("*.safetensors")):
        for name, entry in read_header(path).tensors.items():
            weight_map[name] = path.name
            total += entry.size_bytes
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    config = {key: value for key, value in source.config.items() if key not in _QUANTIZATION}
    patterns = {str(entry["pattern"]) for entry in facts.values()}
    pattern = patterns.pop() if len(patterns) == 1 else "unstructured"
    entries = config_entries(source.shapes, pattern if packed else None)
    config |= entries
    staged.write_file(PACKED_INDEX if entries else INDEX, _json(index))
    staged.write_file("config.json", _json(config))
    for path in source.side_files():
        staged.copy_file(path, path.name)


_QUANTIZATION = ("quantization_config", "compression_config")


def _json(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def _manifest(
    source: ConvertSource,
    claims: Mapping[str, Claim],
    facts: Mapping[str, Mapping[str, Any]],
    staged: StagedCheckpoint,
    *,
    packed: bool,
) -> dict[str, Any]:
    """Return what the manifest says of the tensors, carried over from the source's."""
    said = {
        name: {
            "kept": claim.kept,
            "pattern": claim.pattern,
            "method": claim.method,
            "transposed": claim.transposed,
        }
        for name, claim in claims.items()
    }
    given: dict[str, Any] = {
        "layout": "packed" if packed else "dense",
        "tools": tools(),
        "tensors": {name: about for name, about in said.items() if name not in facts},
        "packed": {name: {**entry, **said[name]} for name, entry in facts.items()},
        "base": {"label": source.folder.resolve().name},
    }
    if source.manifest is not None:
        given["base"] = source.manifest.raw.get("base", given["base"])
        if "activations" in source.manifest.raw:
            given["activations"] = source.manifest.raw["activations"]
        given["converted_from"] = {
            "run_id": source.manifest.run_id,
            "identity_sha256": source.manifest.identity_sha256,
        }
    return given


def _written_facts(out: Path) -> dict[str, dict[str, Any]]:
    """Return the facts of all packed tensors of a finished folder."""
    return {
        name: entry
        for path in sorted(out.glob("*.safetensors"))
        for name, entry in files.described(read_header(path)).items()
    }


def _outcome(
    source: ConvertSource,
    out: Path,
    facts: Mapping[str, Mapping[str, Any]],
    *,
    pruned: int | None = None,
    already: bool = False,
) -> Conversion:
    forms: dict[str, int] = {}
    for entry in facts.values():
        form = f"{entry['layout']}/{entry['encoding']}"
        forms[form] = forms.get(form, 0) + 1
    before = sum(source.weights.path(file).stat().st_size for file in source.weights.files)
    if pruned is None:
        pruned = len(source.claims_of(out))
    return Conversion(out, dict(sorted(forms.items())), pruned, before, weights_bytes(out), already)
