"""llama.cpp's matrix-vector products through ggml's C interface, to be timed beside others in this process.

`load(folder, threads)` loads libggml-base and libggml-cpu of any build, for example `site-packages/llama_cpp/lib` of
PyPI's `llama-cpp-python`. Weights lie as llama.cpp's loader puts them: repacked for the processor where its CPU backend
offers that for the type (`plain=True` leaves them as in the file). Every product is a graph of one node, planned once,
on a thread pool that is kept.

torch, our kernels and a ggml built with OpenMP (its default) run on the threads of one OpenMP runtime, so a worker that
still spins after one contender's product is the worker of the next: they do not disturb one another. Two runtimes in
one process would; that is refused.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from ctypes import POINTER, byref, c_bool, c_char_p, c_int, c_int64, c_size_t, c_uint32, c_void_p
from enum import IntEnum
from pathlib import Path
from typing import ClassVar

import torch


class Type(IntEnum):
    """ggml's numbers of the tensor types used here."""

    F32 = 0
    Q4_0 = 2
    Q8_0 = 8
    Q4_K = 12
    BF16 = 30


TOLERANCE = {Type.BF16: 4e-3, Type.Q8_0: 1.5e-2, Type.Q4_0: 1.5e-2, Type.Q4_K: 1.5e-2}
"""Largest relative error against a float64 product of the *dequantised* weight: ggml rounds activations to bf16 or to 8
bits with a scale for 32 or 256 of them."""


class _InitParams(ctypes.Structure):
    _fields_: ClassVar = [("mem_size", c_size_t), ("mem_buffer", c_void_p), ("no_alloc", c_bool)]


class _PoolParams(ctypes.Structure):
    _fields_: ClassVar = [
        ("cpumask", c_bool * 512), ("n_threads", c_int), ("prio", c_int),
        ("poll", c_uint32), ("strict_cpu", c_bool), ("paused", c_bool),
    ]  # fmt: skip


class _Plan(ctypes.Structure):
    _fields_: ClassVar = [
        ("work_size", c_size_t), ("work_data", c_void_p), ("n_threads", c_int), ("threadpool", c_void_p),
        ("abort_callback", c_void_p), ("abort_callback_data", c_void_p), ("use_ref", c_bool),
    ]  # fmt: skip


class _Traits(ctypes.Structure):
    _fields_: ClassVar = [
        ("type_name", c_char_p), ("blck_size", c_int64), ("blck_size_interleave", c_int64), ("type_size", c_size_t),
        ("is_quantized", c_bool), ("to_float", c_void_p), ("from_float_ref", c_void_p),
    ]  # fmt: skip


_Log = ctypes.CFUNCTYPE(None, c_int, c_char_p, c_void_p)
_BASE = {
    "ggml_log_set": (None, [_Log, c_void_p]),
    "ggml_init": (c_void_p, [_InitParams]),
    "ggml_free": (None, [c_void_p]),
    "ggml_new_tensor_1d": (c_void_p, [c_void_p, c_int, c_int64]),
    "ggml_new_tensor_2d": (c_void_p, [c_void_p, c_int, c_int64, c_int64]),
    "ggml_mul_mat": (c_void_p, [c_void_p, c_void_p, c_void_p]),
    "ggml_get_data": (c_void_p, [c_void_p]),
    "ggml_row_size": (c_size_t, [c_int, c_int64]),
    "ggml_tensor_overhead": (c_size_t, []),
    "ggml_graph_overhead_custom": (c_size_t, [c_size_t, c_bool]),
    "ggml_new_graph_custom": (c_void_p, [c_void_p, c_size_t, c_bool]),
    "ggml_build_forward_expand": (None, [c_void_p, c_void_p]),
    "ggml_quantize_chunk": (c_size_t, [c_int, c_void_p, c_void_p, c_int64, c_int64, c_int64, c_void_p]),
    "ggml_get_type_traits": (POINTER(_Traits), [c_int]),
    "ggml_threadpool_params_init": (None, [POINTER(_PoolParams), c_int]),
    "ggml_backend_alloc_ctx_tensors_from_buft": (c_void_p, [c_void_p, c_void_p]),
    "ggml_backend_buffer_free": (None, [c_void_p]),
    "ggml_backend_buft_name": (c_char_p, [c_void_p]),
    "ggml_backend_cpu_buffer_type": (c_void_p, []),
    "ggml_backend_buffer_get_base": (c_void_p, [c_void_p]),
    "ggml_backend_buffer_get_size": (c_size_t, [c_void_p]),
    "ggml_backend_tensor_set": (None, [c_void_p, c_void_p, c_size_t, c_size_t]),
    "ggml_backend_reg_dev_get": (c_void_p, [c_void_p, c_size_t]),
    "ggml_backend_reg_get_proc_address": (c_void_p, [c_void_p, c_char_p]),
    "ggml_backend_dev_supports_op": (c_bool, [c_void_p, c_void_p]),
}
_NODES = 8
_HUGE, _MADV_HUGEPAGE = 2 << 20, 14
_CPU = {
    "ggml_cpu_init": (None, []),
    "ggml_threadpool_new": (c_void_p, [POINTER(_PoolParams)]),
    "ggml_graph_plan": (_Plan, [c_void_p, c_int, c_void_p]),
    "ggml_graph_compute": (c_int, [c_void_p, POINTER(_Plan)]),
    "ggml_backend_cpu_reg": (c_void_p, []),
}


def _openmp_runtimes() -> list[str]:
    """Return the files of the OpenMP runtimes that are loaded."""
    maps = Path("/proc/self/maps").read_text().splitlines()
    files = {line.split()[-1] for line in maps if "omp" in line and ".so" in line}
    return sorted(file for file in files if Path(file).name.startswith(("libgomp", "libomp", "libiomp")))


class Ggml:
    """The library with a thread pool.

    Args:
        folder: Where libggml-base.so and libggml-cpu.so lie.
        threads: Of every product, the caller's included.

    Raises:
        SystemExit: No such library, or it brings a second OpenMP runtime.
    """

    def __init__(self, folder: Path, threads: int) -> None:
        self.threads = threads
        try:
            self.base = ctypes.CDLL(str(folder / "libggml-base.so"))
            self.cpu = ctypes.CDLL(str(folder / "libggml-cpu.so"))
        except OSError as problem:
            raise SystemExit(f"error: no ggml in {folder}: {problem}") from None
        if len(found := _openmp_runtimes()) > 1:
            raise SystemExit(f"error: {len(found)} OpenMP runtimes in one process would disturb the timing: {found}")
        for library, functions in ((self.base, _BASE), (self.cpu, _CPU)):
            for name, (result, arguments) in functions.items():
                function = getattr(library, name)
                function.restype, function.argtypes = result, arguments
        self._quiet = _Log(lambda level, text, data: None)
        self.base.ggml_log_set(self._quiet, None)
        self.cpu.ggml_cpu_init()
        params = _PoolParams()
        self.base.ggml_threadpool_params_init(byref(params), threads)
        self.pool = self.cpu.ggml_threadpool_new(byref(params))
        self.libc = ctypes.CDLL(None, use_errno=True)
        self.libc.madvise.argtypes = [c_void_p, c_size_t, c_int]

    def quantise(self, weight: torch.Tensor, kind: Type) -> torch.Tensor:
        """Return the bytes, u8, of a weight [rows, cols] in a type."""
        rows, cols = weight.shape
        values = weight.float().contiguous()
        out = torch.empty(rows * self.base.ggml_row_size(kind, cols), dtype=torch.uint8)
        self.base.ggml_quantize_chunk(kind, values.data_ptr(), out.data_ptr(), 0, rows, cols, None)
        return out

    def dequantise(self, data: torch.Tensor, shape: tuple[int, int], kind: Type) -> torch.Tensor:
        """Return the float32 weight [rows, cols] that the bytes stand for."""
        out = torch.empty(shape, dtype=torch.float32)
        to_float = ctypes.CFUNCTYPE(None, c_void_p, c_void_p, c_int64)(self.base.ggml_get_type_traits(kind)[0].to_float)
        to_float(data.data_ptr(), out.data_ptr(), out.numel())
        return out

    def repacking(self) -> list[int]:
        """Return the buffer types in which the CPU backend keeps weights in an order of its own."""
        register = self.cpu.ggml_backend_cpu_reg()
        address = self.base.ggml_backend_reg_get_proc_address(register, b"ggml_backend_dev_get_extra_bufts")
        found = ctypes.CFUNCTYPE(POINTER(c_void_p), c_void_p)(address)(self.device) if address else None
        types: list[int] = []
        while found and found[len(types)]:
            types.append(found[len(types)])
        return types

    @property
    def device(self) -> int:
        """The CPU as a device of the library."""
        return int(self.base.ggml_backend_reg_dev_get(self.cpu.ggml_backend_cpu_reg(), 0))


@functools.cache
def load(folder: Path, threads: int) -> Ggml:
    """Return the library, loaded once for each number of threads."""
    return Ggml(folder, threads)


class Product:
    """y = W x, batch 1, with some copies of one W.

    Args:
        ggml: The library.
        data: W in the type's bytes.
        shape: [rows, cols] of W.
        kind: Type of W.
        copies: How many.
        plain: Leave W in the order of the file; else repack it where the library can.

    Attributes:
        layout: Name of the buffer type that holds W; "CPU" is the order of the file.
        copies, nbytes: How many, and the size of one.
    """

    def __init__(
        self, ggml: Ggml, data: torch.Tensor, shape: tuple[int, int], kind: Type, copies: int, plain: bool = False
    ) -> None:
        self.ggml, self.kind, (self.rows, self.cols) = ggml, kind, shape
        base, self.nbytes, self.copies = ggml.base, data.numel(), copies
        room = base.ggml_tensor_overhead() + base.ggml_graph_overhead_custom(_NODES, False) + 4 * self.rows + 256
        self.context = base.ggml_init(_InitParams((copies + 1) * room + 8 * self.cols, None, False))
        self._x = base.ggml_new_tensor_1d(self.context, Type.F32, self.cols)
        place = base.ggml_backend_cpu_buffer_type() if plain else self._repacking()
        self.layout = base.ggml_backend_buft_name(place).decode()
        self._tensors, self._buffer, weights = self._allocate(place, copies)
        for weight in weights:
            base.ggml_backend_tensor_set(weight, data.data_ptr(), 0, data.numel())
        self._calls = [self._plan(base.ggml_mul_mat(self.context, weight, self._x)) for weight in weights]

    def _allocate(self, place: int, copies: int) -> tuple[int, int, list[int]]:
        """Return a context, a buffer on huge pages, and tensors in it."""
        base = self.ggml.base
        context = base.ggml_init(_InitParams(copies * base.ggml_tensor_overhead(), None, True))
        tensors = [base.ggml_new_tensor_2d(context, self.kind, self.cols, self.rows) for _ in range(copies)]
        buffer = base.ggml_backend_alloc_ctx_tensors_from_buft(context, place)
        if not buffer:
            raise SystemExit(f"error: ggml could not allocate {copies} x {self.nbytes} bytes")
        start = base.ggml_backend_buffer_get_base(buffer)
        first = -(-start // _HUGE) * _HUGE
        length = (start + base.ggml_backend_buffer_get_size(buffer) - first) // _HUGE * _HUGE
        if length > 0:
            self.ggml.libc.madvise(first, length, _MADV_HUGEPAGE)
        return context, buffer, tensors

    def _repacking(self) -> int:
        """Return the first buffer type that has a kernel for this product, as llama.cpp's loader does."""
        base = self.ggml.base
        for place in self.ggml.repacking():
            context, buffer, (weight,) = self._allocate(place, 1)
            fits = base.ggml_backend_dev_supports_op(self.ggml.device, base.ggml_mul_mat(self.context, weight, self._x))
            base.ggml_backend_buffer_free(buffer)
            base.ggml_free(context)
            if fits:
                return place
        return int(base.ggml_backend_cpu_buffer_type())

    def _plan(self, y: int) -> tuple[int, _Plan, int, object]:
        base, cpu = self.ggml.base, self.ggml.cpu
        graph = base.ggml_new_graph_custom(self.context, _NODES, False)
        base.ggml_build_forward_expand(graph, y)
        plan = cpu.ggml_graph_plan(graph, self.ggml.threads, self.ggml.pool)
        work = torch.empty(plan.work_size + 64, dtype=torch.uint8)
        plan.work_data = work.data_ptr()
        return graph, plan, base.ggml_get_data(y), work

    def set(self, x: torch.Tensor) -> None:
        """Take x: [cols]."""
        values = x.float().contiguous()
        ctypes.memmove(self.ggml.base.ggml_get_data(self._x), values.data_ptr(), 4 * self.cols)

    def run(self, i: int) -> None:
        """Multiply with copy i."""
        graph, plan, _, _ = self._calls[i]
        self.ggml.cpu.ggml_graph_compute(graph, byref(plan))

    def result(self, i: int) -> torch.Tensor:
        """Return y, float32 [rows], of the last product with copy i."""
        out = torch.empty(self.rows)
        ctypes.memmove(out.data_ptr(), self._calls[i][2], 4 * self.rows)
        return out

    def __del__(self) -> None:
        self.ggml.base.ggml_backend_buffer_free(self._buffer)
        self.ggml.base.ggml_free(self._tensors)
        self.ggml.base.ggml_free(self.context)


def products(
    ggml: Ggml, weight: torch.Tensor, x: torch.Tensor, total: int, kinds: Sequence[Type] = tuple(TOLERANCE)
) -> dict[str, Product]:
    """Return checked products of a dense weight in several types, each in every layout the library has for it.

    Args:
        ggml: The library.
        weight: [rows, cols].
        x: [1, cols].
        total: Bytes that the copies of each together exceed.
        kinds: The types.

    Returns:
        By name, for example "llama.cpp q4_k"; " plain" follows where W is not repacked though it could be.

    Raises:
        SystemExit: A result is wrong.
    """
    rows, cols = weight.shape
    found: dict[str, Product] = {}
    for kind in kinds:
        data = ggml.quantise(weight, kind)
        expected = ggml.dequantise(data, (rows, cols), kind).double() @ x[0].double()
        copies = max(2, -(-total // data.numel()))
        for plain in (False, True):
            product = Product(ggml, data, (rows, cols), kind, copies, plain)
            name = f"llama.cpp {kind.name.lower()}{' plain' if plain else ''}"
            if plain and product.layout == found[name.removesuffix(" plain")].layout:
                continue
            product.set(x[0])
            for i in (0, copies - 1):
                product.run(i)
                error = (product.result(i).double() - expected).norm() / expected.norm()
                if not error < TOLERANCE[kind]:
                    raise SystemExit(f"error: {name} {rows}x{cols}: relative error {error:.1e}")
            found[name] = product
    return found
