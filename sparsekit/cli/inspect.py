"""`sparsekit inspect`: what a model is made of, and how many zeros it really holds."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from sparsekit.cli import render
from sparsekit.cli.options import Json, Quiet, Revision, TrustRemoteCode
from sparsekit.units import bytes_text, count_text

if TYPE_CHECKING:
    from sparsekit.inspect_model import GatesFound, Inspection, Kind

_SHOWN = 5  # tensors that lost zeros


def inspect(
    model: Annotated[str, typer.Argument(metavar="DIR|MODEL", help="Checkpoint, local model, .gguf file or Hub id.")],
    weights: Annotated[
        bool, typer.Option("--weights/--no-weights", help="Count zeros, or read headers only (faster).")
    ] = True,
    revision: Revision = None,
    trust_remote_code: TrustRemoteCode = False,
    quiet: Quiet = False,
    json: Json = False,
) -> None:
    """Show structure, target linears and stored zeros of a model or checkpoint."""
    from sparsekit.inspect_model import inspect_model

    with render.reporter(quiet=quiet) as reporter:
        found = inspect_model(model, reporter, revision=revision, trust_remote_code=trust_remote_code, weights=weights)
    if json:
        render.emit_json(found.to_json())
        return
    render.emit(_facts(found))
    render.emit("\n" + _linears(found))
    if origin := _origin(found):
        render.emit("\n" + origin)


def _facts(found: Inspection) -> str:
    stored = ", ".join(f"{name} {bytes_text(count)}" for name, count in found.dtypes.items())
    rows = [
        ("model", found.name),
        ("folder", str(found.folder) if str(found.folder) != found.name else ""),
        ("revision", found.revision or ""),
        ("architecture", f"{found.architecture} ({found.model_type})"),
        ("blocks", f"{found.blocks}"),
        (
            "parameters",
            f"{count_text(found.parameters)} stored, {_share(found.block_weights, found.parameters)}",
        ),
        ("files", f"{len(found.files)} safetensors, {bytes_text(found.total_bytes)} ({stored})"),
        ("sizes", ", ".join(f"{name} {_value(value)}" for name, value in found.config.items())),
    ]
    return render.pairs(rows)


def _linears(found: Inspection) -> str:
    packed = any(kind.forms for kind in found.kinds)
    # A line is 80 wide; that packed zeros are as recorded stands below the table.
    compared = not packed and any(kind.kept is not None for kind in found.kinds)
    header = ["linear", "count", "out x in", "weights", "zeros", *(["recorded"] if compared else [])]
    header += ["stored", "bits"] if packed else []
    rows = [
        [*_kind(kind), *([_recorded(kind)] if compared else []), *(_stored(kind) if packed else [])]
        for kind in found.kinds
    ]
    numel = sum(kind.numel for kind in found.kinds)
    total = ["all", f"{sum(kind.count for kind in found.kinds)}", "", count_text(numel), _ratio(found.sparsity)]
    total += [""] if compared else []
    if packed:
        total += ["", f"{8 * sum(kind.stored_bytes for kind in found.kinds) / numel:.2f}" if numel else "-"]
    right = [number for number, name in enumerate(header) if name not in ("linear", "out x in", "stored")]
    return render.table(header, [*rows, total], right=right)


def _kind(kind: Kind) -> list[str]:
    shapes = [f"{rows} x {columns}" for rows, columns in kind.shapes]
    shape = ", ".join(shapes[:3]) + (f" and {len(shapes) - 3} more" if len(shapes) > 3 else "")
    return [kind.name, f"{kind.count}", shape, count_text(kind.numel), _ratio(kind.sparsity)]


def _stored(kind: Kind) -> list[str]:
    """Return layout and encoding, and bits in the files for each weight."""
    return [", ".join(kind.forms) or "dense", f"{kind.bits_per_weight:.2f}"]


def _recorded(kind: Kind) -> str:
    return "-" if kind.kept is None else _ratio(1 - kind.kept / kind.numel)


def _origin(found: Inspection) -> str:
    """Return what the manifest says, and whether the weights still agree with it."""
    rows: list[tuple[str, str]] = []
    if found.origin is not None:
        origin = found.origin
        recipe = f"recipe {origin.recipe.get('name', 'without a name')}"
        tool = f"sparsekit {origin.tools.get('sparsekit', 'of unknown version')}"
        rows.append(("made by", f"{tool}, {recipe}{f' from {origin.base}' if origin.base else ''}"))
        rows.append(("run", origin.run_id))
        rows.append(("zeros", _agreement(found)))
    elif found.manifest_problem is not None:
        rows.append(("manifest", f"unusable: {found.manifest_problem}"))
    elif found.claim is not None:
        claim = ", ".join(f"{key} {value}" for key, value in sorted(found.claim.items()))
        stored = f"; stored zeros: {_ratio(found.sparsity)}" if found.weights_read else ""
        rows.append(("claim", f"config.json says {claim}{stored}; there is no manifest to compare with"))
    if found.nonfinite:
        name, count = next(iter(found.nonfinite.items()))
        rows.append(("damaged", f"{len(found.nonfinite)} tensors hold NaN or infinity, first {name} ({count:,})"))
    if found.gates is not None:
        rows.append(("activations", _gates(found.gates)))
    return render.pairs(rows)


def _gates(gates: GatesFound) -> str:
    """Return what is skipped at run time, or why the file that says so cannot be used."""
    if gates.problem is not None:
        return f"unusable: {gates.problem}"
    share = "" if gates.sparsity is None else f", {gates.sparsity:.4f} left out on held-out text"
    return f"{gates.method or 'an unknown method'} thins out {gates.signals} signals{share}: {gates.protocol}"


def _agreement(found: Inspection) -> str:
    agreement = found.agreement
    if agreement is None:
        return "nothing recorded"
    if agreement.missing:
        return (
            f"{len(agreement.missing)} of {agreement.pruned} pruned tensors are missing or have another shape, "
            f"first {agreement.missing[0]}"
        )
    if not agreement.pruned:
        return "no tensor is recorded as pruned"
    if not found.weights_read:
        return "not compared (--no-weights)"
    if agreement.ok:
        return f"as recorded in all {agreement.pruned} pruned tensors"
    shown = "; ".join(f"{e.tensor}: {e.nonzero:,} nonzero, {e.kept:,} kept" for e in agreement.lost[:_SHOWN])
    more = f"; and {len(agreement.lost) - _SHOWN} more" if len(agreement.lost) > _SHOWN else ""
    return (
        f"LOST: {agreement.zeros_lost:,} zeros in {len(agreement.lost)} of {agreement.pruned} pruned tensors are "
        f"weights again (fine-tuned, or an adapter merged?). {shown}{more}"
    )


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.1%} of them in matrices of the blocks"


def _ratio(share: float | None) -> str:
    return "-" if share is None else f"{share:.4f}"


def _value(value: object) -> str:
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else f"{value}"
