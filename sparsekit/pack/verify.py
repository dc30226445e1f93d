"""Packed checkpoints against their manifest: what it says of packed tensors, and the proof that it is so.

`checkpoint.verify` sees the parts of packed tensors as plain tensors: names, sizes, hashes. What they mean together is
checked here, at level `semantic` alone, which needs torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sparsekit.checkpoint import jsonio
from sparsekit.checkpoint import verify as checks
from sparsekit.checkpoint.manifest import FILE, LIMIT_BYTES, Manifest, read_manifest
from sparsekit.checkpoint.verify import Level, Problem, VerifyReport
from sparsekit.errors import CheckpointError, IndexMismatch, SparsekitError
from sparsekit.pack.files import PackedFile
from sparsekit.pack.tensor import unpack
from sparsekit.pack.types import Layout, PackedTensor


@dataclass(frozen=True)
class Claim:
    """What the manifest says of one pruned tensor, by the name it has in the dense model.

    Attributes:
        kept: Number of kept weights.
        pattern: Pattern of the mask, as text.
        method: What pruned it; None where nobody knows.
        transposed: The dense tensor is [in, out].
    """

    kept: int
    pattern: str
    method: str | None
    transposed: bool


def packed_claims(manifest: Mapping[str, Any]) -> dict[str, Claim]:
    """Return the claims of a manifest's section `packed`, empty for a dense checkpoint.

    Args:
        manifest: The JSON of sparsekit.json.

    Raises:
        CheckpointError: The section is not what sparsekit writes.
    """
    section = manifest.get("packed", {})
    if not isinstance(section, dict):
        raise CheckpointError("packed is not a JSON object", where=FILE)
    claims = {}
    for name, entry in section.items():
        found = entry if isinstance(entry, dict) else {}
        kept, pattern, method = found.get("kept"), found.get("pattern"), found.get("method")
        transposed = found.get("transposed", False)
        if (
            type(kept) is not int
            or not isinstance(pattern, str)
            or not isinstance(method, str | None)
            or not isinstance(transposed, bool)
        ):
            raise CheckpointError(f"packed.{name}: kept, pattern, method or transposed is malformed", where=FILE)
        claims[name] = Claim(kept, pattern, method, transposed)
    return claims


def pruned_claims(manifest: Manifest) -> dict[str, Claim]:
    """Return what the manifest says of every pruned tensor, packed or dense.

    Raises:
        CheckpointError: As `packed_claims`.
    """
    dense = {
        name: Claim(facts.kept, facts.pattern or "unstructured", facts.method, facts.transposed)
        for name, facts in manifest.tensors.items()
        if facts.kept is not None
    }
    return dense | packed_claims(manifest.raw)


def verify(folder: Path, level: Level = "full") -> VerifyReport:
    """Check a checkpoint folder, dense or packed, against its manifest.

    Args:
        folder: What `sparsekit prune` or `sparsekit convert` wrote.
        level: `structure`, `full`, or `semantic`, which also reads and validates every packed tensor.

    Raises:
        CheckpointError: There is no readable manifest.
    """
    report = checks.verify(folder, level)
    manifest = read_manifest(folder)
    if level != "semantic" or (manifest.layout != "packed" and "packed" not in manifest.raw):
        return report
    return replace(report, problems=(*report.problems, *packed_problems(folder, manifest)))


def packed_problems(folder: Path, manifest: Manifest) -> Iterator[Problem]:
    """Yield what is wrong with the packed tensors of a folder; one tensor is in memory at a time."""
    try:
        claims = packed_claims(manifest.raw)
    except CheckpointError as error:
        yield Problem(FILE, error.message)
        return
    seen: set[str] = set()
    for path in sorted(folder.glob("*.safetensors")):
        try:
            file = PackedFile(path)
        except SparsekitError as error:
            yield Problem(path.name, error.message)
            continue
        try:
            file.check_parts()
        except SparsekitError as error:
            yield Problem(str(error.where).removeprefix(f"{folder}/"), error.message)
        for name in sorted(file.facts):
            seen.add(name)
            try:
                packed = file.packed(name)
            except SparsekitError as error:
                yield Problem(f"{path.name}: {name}", error.message)
                continue
            message = disagreement(packed, claims.get(name))
            if message:
                yield Problem(f"{path.name}: {name}", message)
    for name in sorted(set(claims) - seen):
        yield Problem(name, "packed in the manifest, but in no file")


def require_claims(folder: Path, facts: Mapping[str, Mapping[str, Any]]) -> None:
    """Require that a folder's manifest, if it has one, says of its packed tensors what their files say.

    Args:
        folder: Holds the files.
        facts: Dense tensor name -> entry of a file's metadata.

    Raises:
        CheckpointError: The manifest cannot be read.
        IndexMismatch: It disagrees, naming the tensor.
    """
    path = folder / FILE
    if not path.is_file():
        return
    _, raw = jsonio.read(path, limit_bytes=LIMIT_BYTES)
    if not isinstance(raw, dict):
        raise CheckpointError("not a JSON object", where=str(path))
    claims = packed_claims(raw)
    for name in sorted({*facts, *claims}):
        entry = facts.get(name)
        message = (
            "packed in the manifest, but in no file" if entry is None else _entry_disagrees(entry, claims.get(name))
        )
        if message:
            raise IndexMismatch(message, where=f"{folder}: {name}", hint=f"See: sparsekit verify {folder}")


def _entry_disagrees(entry: Mapping[str, Any], claim: Claim | None) -> str | None:
    """Say how a file's entry and the manifest disagree, None if they do not."""
    if claim is None:
        return "packed in the file, but not in the manifest"
    pattern, transposed, nnz = entry.get("pattern"), entry.get("transposed", False), entry.get("nnz")
    if (pattern, transposed) != (claim.pattern, claim.transposed):
        return (
            f"pattern {pattern}, transposed {transposed} in the file; "
            f"{claim.pattern}, {claim.transposed} in the manifest"
        )
    if entry.get("layout") != Layout.DENSE and nnz != claim.kept:
        return f"{nnz} weights kept in the file, {claim.kept:,} in the manifest"
    return None


def disagreement(packed: PackedTensor, claim: Claim | None) -> str | None:
    """Say how a validated tensor and the manifest disagree, None if they do not.

    The layout `dense` stores every weight and no mask; its zeros are held against the claim instead.
    """
    if (message := _entry_disagrees(packed.facts(), claim)) is not None or claim is None:
        return message
    if packed.layout is Layout.DENSE:
        nonzero = int(unpack(packed).count_nonzero())
        if not nonzero <= claim.kept <= packed.nnz:
            return f"{nonzero:,} weights are not zero in the file, {claim.kept:,} kept by the manifest"
    return None
