"""The kernel of every layer of a loaded model, and how close it comes to the speed of memory."""

from __future__ import annotations

import functools
import statistics
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from sparsekit.benchmark.result import Layer
from sparsekit.checkpoint.manifest import FILE, read_manifest
from sparsekit.errors import NumericalError
from sparsekit.machine import last_level_cache_bytes
from sparsekit.pack.verify import pruned_claims
from sparsekit.runtime import buffers, native, ops
from sparsekit.runtime.dense import StreamingLinear
from sparsekit.runtime.layers import dense_weight, linears
from sparsekit.runtime.measure import Contender, interleave, replicate
from sparsekit.runtime.modules import SparseLinear

WORKING_SET_BYTES = 256 << 20
_MOST_COPIES = 4096  # of tiny weights, which then stay in the cache
_MOST_GROUPS = 32
_CHECKED_ROWS = 256
_INTEGERS = ("int8", "int4")  # their layout says what the values are
_TOLERANCE = 0.02  # relative, of bf16 outputs; a wrong kernel is off by far more


@dataclass(frozen=True)
class _Linear:
    """One linear layer; `runs` names the contender that the model itself multiplies with."""

    name: str
    module: nn.Module
    shape: tuple[int, int]
    runs: str
    kernel: str
    pattern: str | None
    sparsity: float
    nbytes: int


class KernelTable:
    """Groups the linears of a model by shape, kernel, pattern and sparsity, and times one of each group.

    Args:
        model: A loaded model.
        folder: Its checkpoint; the manifest names patterns.
        threads: Threads to compute with.
    """

    def __init__(self, model: nn.Module, folder: Path, threads: int) -> None:
        self._model = model
        self._folder = folder
        self._threads = threads

    @functools.cached_property
    def groups(self) -> list[list[_Linear]]:
        """Linears that are alike; where nearly every layer has its own sparsity, whole bands of them."""
        linears = _linears(self._model, _patterns(self._folder))
        for band in (0.01, 0.05, 0.1, 1.0):
            found: dict[tuple[object, ...], list[_Linear]] = defaultdict(list)
            for linear in linears:
                found[*linear.shape, linear.kernel, linear.pattern, round(linear.sparsity / band)].append(linear)
            if len(found) <= _MOST_GROUPS:
                break
        return list(found.values())

    @functools.cached_property
    def _total(self) -> int:
        """Bytes of each contender's copies: far beyond the last-level cache."""
        return max(WORKING_SET_BYTES, 2 * (last_level_cache_bytes() or 0))

    @functools.cached_property
    def _stream(self) -> Tensor:
        """Memory whose reading shows the bandwidth; written once, or all its pages would be one."""
        return native.allocate(self._total).fill_(1)

    def measure(self, group: list[_Linear], rounds: int) -> Layer:
        """Time the layer of a group that has the median sparsity.

        Raises:
            NumericalError: A kernel's product is wrong.
        """
        chosen = sorted(group, key=lambda linear: linear.sparsity)[len(group) // 2]
        rows, cols = chosen.shape
        contenders = self._contenders(chosen)
        interleave(list(contenders.values()), rounds)
        ours = contenders[chosen.runs]
        bandwidth = contenders["read"].nbytes / contenders["read"].median
        return Layer(
            count=len(group),
            example=chosen.name,
            rows=rows,
            cols=cols,
            kernel=chosen.kernel,
            isa=None if chosen.runs == "torch" else native.isa(),
            pattern=chosen.pattern,
            sparsity=statistics.fmean(linear.sparsity for linear in group),
            bits_per_weight=8 * statistics.fmean(linear.nbytes for linear in group) / (rows * cols),
            nbytes=chosen.nbytes,
            working_set_bytes=ours.copies * ours.nbytes,
            seconds=ours.median,
            roofline_seconds=chosen.nbytes / bandwidth,
            torch_seconds=contenders["torch"].median,
            dense_seconds=contenders["dense"].median,
        )

    def _contenders(self, linear: _Linear) -> dict[str, Contender]:
        """Return what takes turns: reading memory, torch, the streaming dense kernel, the packed kernel."""
        rows, cols = linear.shape
        weight = dense_weight(linear.module)
        x = torch.randn(1, cols, generator=torch.Generator().manual_seed(0)).to(weight.dtype)
        dense = replicate(weight.view(torch.uint8).reshape(-1), self._total, _MOST_COPIES)
        views = [copy.view(weight.dtype).reshape(rows, cols) for copy in dense]
        lib, stream = native.library(), self._stream

        def read(_: int) -> object:
            return lib.sk_read(stream.data_ptr(), stream.numel(), self._threads)

        size = dense[0].numel()
        found = {
            "read": Contender("read", read, 1, stream.numel(), stream),
            "torch": Contender("torch", lambda i: nn.functional.linear(x, views[i]), len(dense), size, views),
            "dense": Contender("dense", lambda i: ops.linear_dense(x, views[i], None), len(dense), size, views),
        }
        if isinstance(linear.module, SparseLinear) and linear.module.packed is not None:
            packed = replicate(linear.module.packed, self._total, _MOST_COPIES)

            def multiply(i: int) -> Tensor:
                return ops.linear(x, packed[i], None, rows)

            found["packed"] = Contender("packed", multiply, len(packed), packed[0].numel(), packed)
        _check(found, x, weight, linear.name)
        return found


def _check(found: Mapping[str, Contender], x: Tensor, weight: Tensor, name: str) -> None:
    """Hold every product to float64 before its speed is of interest."""
    rows = min(_CHECKED_ROWS, weight.shape[0])
    expected = x.double() @ weight[:rows].double().T
    for contender in found.values():
        result = contender.run(0)
        if not isinstance(result, Tensor):
            continue
        error = float((result[:, :rows].double() - expected).norm())
        if not error <= _TOLERANCE * float(expected.norm()):
            raise NumericalError(
                f"the {contender.name} product is off by {error:.3g}, its norm is {float(expected.norm()):.3g}",
                where=name,
                hint="Check the file with sparsekit verify; SPARSEKIT_ISA=portable forces the plain kernels.",
            )


def _linears(model: nn.Module, patterns: Mapping[str, str]) -> list[_Linear]:
    return [_linear(name, module, patterns.get(name)) for name, module in linears(model)]


def _linear(name: str, module: nn.Module, pattern: str | None) -> _Linear:
    if isinstance(module, SparseLinear) and module.packed is not None:
        info = buffers.info(module.packed)
        kernel = info.layout.name.lower()
        if kernel not in _INTEGERS:
            kernel += f" {info.dtype.name.lower()}"
        sparsity = 1 - info.nnz / max(info.shape[0] * info.shape[1], 1)
        return _Linear(name, module, info.shape, "packed", kernel, pattern, sparsity, module.packed.numel())
    weight = dense_weight(module)
    runs = "dense" if isinstance(module, StreamingLinear) else "torch"
    kernel = f"{runs} {native.dtype_of(weight.dtype).name.lower()}"
    sparsity = 1 - int(weight.count_nonzero()) / max(weight.numel(), 1)
    rows, cols = weight.shape
    return _Linear(name, module, (rows, cols), runs, kernel, pattern, sparsity, weight.numel() * weight.element_size())


def _patterns(folder: Path) -> dict[str, str]:
    """Return pruned linear -> pattern as the manifest says; empty without one."""
    if not (folder / FILE).is_file():
        return {}
    claims = pruned_claims(read_manifest(folder))
    return {name.removesuffix(".weight"): claim.pattern for name, claim in claims.items()}
