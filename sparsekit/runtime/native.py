"""The compiled CPU kernels through their C interface: loading, instruction set, threads, packing, products.

Importing this module loads nothing. `library()` loads the shared library once and raises `KernelsMissing` with the
reason where there is none; `SPARSEKIT_ISA` forces an instruction set, `SPARSEKIT_KERNELS` another file (a build with
sanitisers). Addresses and sizes are trusted here: callers
own the buffers and pass contiguous ones.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import mmap
import os
from ctypes import POINTER, byref, c_char_p, c_int, c_int32, c_int64, c_uint64, c_void_p
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from sparsekit.errors import BadIndex, KernelError, KernelsMissing, UnsupportedCPU
from sparsekit.lazy import torch
from sparsekit.pattern import NM, Block

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from sparsekit.pattern import Pattern

LIBRARY = Path(__file__).parent / "_lib" / "libsparsekit_kernels.so"
ABI_VERSION = 3
_HUGE = 2 << 20


class DType(IntEnum):
    """Value types, as the C interface numbers them; I8 of the integers of INT8 and INT4 only."""

    BF16 = 0
    F16 = 1
    F32 = 2
    I8 = 3


class MemoryLayout(IntEnum):
    """Layouts in memory.

    BITMAP and SPLIT (bf16 only) hold any mask and lose no bit; INT8 and INT4 hold integers with a scale for 64 columns
    of a row. CHUNK holds 4:64, 8:64 and 16:64 in bf16, BLOCK whole blocks of RxC with 16 dividing R and 4 dividing C;
    these two lose no bit either, and pass over what is missing, so an infinity there does not become a NaN.
    """

    BITMAP = 1
    SPLIT = 2
    INT8 = 3
    INT4 = 4
    CHUNK = 5
    BLOCK = 6


class _Bitmask(ctypes.Structure):
    _fields_: ClassVar[Sequence[tuple[str, type]]] = [
        ("mask", c_void_p),
        ("values", c_void_p),
        ("row_offsets", c_void_p),
        ("rows", c_int64),
        ("cols", c_int64),
        ("nnz", c_int64),
        ("dtype", c_int32),
        ("weight_dtype", c_int32),
        ("scales", c_void_p),
    ]


class _Info(ctypes.Structure):
    _fields_: ClassVar[Sequence[tuple[str, type]]] = [
        *((name, c_int64) for name in ("rows", "cols", "nnz", "bytes", "patches")),
        *((name, c_int32) for name in ("layout", "dtype", "panels3", "panels4", "panels8")),
    ]


class Call(ctypes.Structure):
    """One product, `sk_call` of the C interface; strides in elements."""

    _fields_: ClassVar[Sequence[tuple[str, type]]] = [
        ("packed", c_void_p),
        ("packed_bytes", c_int64),
        ("x", c_void_p),
        ("bias", c_void_p),
        ("y", c_void_p),
        *((name, c_int64) for name in ("tokens", "x_stride", "y_stride")),
        *((name, c_int32) for name in ("x_dtype", "y_dtype", "threads")),
    ]


@dataclass(frozen=True)
class PackedInfo:
    """What a packed buffer holds.

    Attributes:
        layout: Its layout in memory.
        dtype: Dtype of the weight, as `unpack` returns it.
        shape: (rows, cols) of the weight.
        nnz: Number of values.
        nbytes: Size of the buffer.
        patches: Values outside their panel's dictionary (SPLIT).
        widths: Number of 16-row panels with 3-bit codes, 4-bit codes, whole high bytes (SPLIT).
    """

    layout: MemoryLayout
    dtype: DType
    shape: tuple[int, int]
    nnz: int
    nbytes: int
    patches: int
    widths: tuple[int, int, int]


_UNSUPPORTED = 5
_STATUS = {1: "bad argument", 2: "bad mask", 3: "not a packed weight", 4: "out of memory", 5: "unsupported"}
_SIGNATURES: dict[str, tuple[type | None, tuple[type, ...]]] = {
    "sk_abi_version": (c_int, ()),
    "sk_build_id": (c_char_p, ()),
    "sk_isa_name": (c_char_p, (c_int,)),
    "sk_isa_supported": (c_int, (c_char_p,)),
    "sk_isa_use": (c_int, (c_char_p,)),
    "sk_isa_current": (c_char_p, ()),
    "sk_use_own_pool": (None, ()),
    "sk_use_openmp": (None, (c_void_p, c_void_p, c_void_p)),
    "sk_plan_create": (c_int, (c_int, POINTER(_Bitmask), c_int, POINTER(c_void_p))),
    "sk_plan_bytes": (c_int64, (c_void_p,)),
    "sk_plan_pack": (c_int, (c_void_p, c_void_p, c_int64, c_int)),
    "sk_plan_free": (None, (c_void_p,)),
    "sk_packed_info": (c_int, (c_void_p, c_int64, POINTER(_Info))),
    "sk_unpack": (c_int, (c_void_p, c_int64, c_void_p, c_int)),
    "sk_plan_from_disk": (c_int, (c_void_p, c_int, POINTER(c_void_p))),
    "sk_disk_read": (c_int, (c_void_p, c_void_p, c_void_p, c_int)),
    "sk_dequantize": (c_int, (POINTER(_Bitmask), c_void_p, c_void_p, c_int)),
    "sk_expand": (c_int, (POINTER(_Bitmask), c_void_p, c_int)),
    "sk_dense_mask": (c_int64, (c_void_p, c_int64, c_int64, c_int64, c_void_p, c_int)),
    "sk_compact": (c_int, (c_void_p, POINTER(_Bitmask), c_void_p, c_int)),
    "sk_linear": (c_int, (POINTER(Call),)),
    "sk_linear_group": (c_int, (POINTER(Call), c_int)),
    "sk_dense": (c_int, (POINTER(Call), c_void_p, c_int64, c_int64, c_int32)),
    "sk_gram": (c_int, (c_void_p, c_int64, c_int64, c_int64, c_void_p, c_int)),
    "sk_read": (c_uint64, (c_void_p, c_int64, c_int)),
    "sk_torch_symbol": (c_char_p, (c_int,)),
    "sk_torch_register": (c_int, (POINTER(c_void_p), c_int, POINTER(c_int32), c_uint64)),
}


def load(path: Path) -> ctypes.CDLL:
    """Load a kernel library and declare its functions.

    Raises:
        KernelsMissing: No such file, not loadable here, or of another version of the interface.
    """
    if not path.exists():
        raise KernelsMissing(
            "the CPU kernels are not compiled",
            where=str(path),
            hint="Install a C++ compiler, then: pip install --force-reinstall --no-deps sparsekit",
        )
    try:
        lib = ctypes.CDLL(str(path))
    except OSError as error:
        raise KernelsMissing(f"the CPU kernels cannot be loaded: {error}", where=str(path)) from error
    for name, (result, arguments) in _SIGNATURES.items():
        function = getattr(lib, name, None)
        if function is None:
            raise KernelsMissing(f"the library has no function {name}", where=str(path), hint="Install it again.")
        function.restype = result
        function.argtypes = arguments
    if lib.sk_abi_version() != ABI_VERSION:
        got = lib.sk_abi_version()
        raise KernelsMissing(
            f"interface version {got}, needed {ABI_VERSION}", where=str(path), hint="Install it again."
        )
    return lib


@functools.lru_cache(maxsize=1)
def library() -> ctypes.CDLL:
    """Return the kernel library, loaded once, with instruction set and threads chosen.

    Raises:
        KernelsMissing: The package was installed without kernels, or they do not load here.
        UnsupportedCPU: `SPARSEKIT_ISA` names an instruction set this processor or library lacks.
    """
    lib = load(Path(os.environ.get("SPARSEKIT_KERNELS", LIBRARY)))
    wanted = os.environ.get("SPARSEKIT_ISA")
    if wanted:
        _use_isa(lib, wanted)
    _share_threads(lib)
    return lib


def available() -> bool:
    """Return whether the kernels are installed and load."""
    return missing_reason() is None


def missing_reason() -> str | None:
    """Return why there are no kernels, None where there are."""
    try:
        library()
    except KernelsMissing as error:
        return str(error)
    return None


def describe() -> dict[str, object]:
    """Return what `doctor` shows: the instruction set in use and those that run here, or why there are no kernels."""
    try:
        library()
    except (KernelsMissing, UnsupportedCPU) as error:
        return {"instruction_set": None, "why": str(error)}
    fallback = " (this processor has none of the others: products are slow)" if isas() == ["portable"] else ""
    return {"instruction_set": f"{isa()}{fallback}", "runnable": isas()}


def _use_isa(lib: ctypes.CDLL, name: str) -> None:
    known = _isas(lib)
    if lib.sk_isa_use(name.encode()):
        runnable = [each for each in known if lib.sk_isa_supported(each.encode())]
        raise UnsupportedCPU(
            f"instruction set {name!r} cannot run here",
            where="SPARSEKIT_ISA",
            hint=f"Use one of {', '.join(runnable)}, or unset it.",
        )


def _isas(lib: ctypes.CDLL) -> list[str]:
    names: list[str] = []
    while (name := lib.sk_isa_name(len(names))) is not None:
        names.append(name.decode())
    return names


def isas() -> list[str]:
    """Return the instruction sets that are compiled in and run here, slowest first."""
    lib = library()
    return [name for name in _isas(lib) if lib.sk_isa_supported(name.encode())]


def isa() -> str:
    """Return the instruction set in use."""
    current: bytes = library().sk_isa_current()
    return current.decode()


def use_isa(name: str | None) -> None:
    """Force an instruction set for all later products; None chooses the best.

    Raises:
        UnsupportedCPU: It cannot run here.
    """
    lib = library()
    if name is None:
        lib.sk_isa_use(None)
    else:
        _use_isa(lib, name)


def _share_threads(lib: ctypes.CDLL) -> None:
    """Run on the threads torch has: a second pool beside them would fight for the same cores.

    torch's own parallel loops run on the OpenMP runtime it has loaded; its entry points are enough to run there too.
    """
    torch.get_num_threads()  # loads torch, and with it the runtime
    process = ctypes.CDLL(None)
    names = ("GOMP_parallel", "omp_get_thread_num", "omp_get_num_threads")
    try:
        addresses = [ctypes.cast(getattr(process, name), c_void_p).value for name in names]
    except AttributeError:
        return  # a torch without OpenMP: the library's own pool
    lib.sk_use_openmp(*addresses)


def check(status: int, what: str) -> None:
    """Raise the typed error for a status of the library.

    Raises:
        BadIndex: Mask, offsets and values disagree.
        MemoryError: No memory for scratch.
        KernelError: Anything else.
    """
    if status == 0:
        return
    if status == 2:
        raise BadIndex(
            "bitmask, row offsets and number of values disagree, a padding bit is set, or the mask lacks the structure "
            "of the layout",
            where=what,
        )
    if status == 4:
        raise MemoryError(f"{what}: no memory for the kernels")
    raise KernelError(f"the kernels refused the call: {_STATUS.get(status, status)}", where=what)


def dtype_of(dtype: torch.dtype) -> DType:
    """Return the kernels' number of a torch dtype.

    Raises:
        KernelError: Not bf16, fp16 or fp32.
    """
    try:
        return _dtypes()[dtype]
    except KeyError:
        raise KernelError(f"dtype {dtype}, needed bfloat16, float16 or float32") from None


@functools.lru_cache(maxsize=1)
def _dtypes() -> dict[torch.dtype, DType]:
    return {torch.bfloat16: DType.BF16, torch.float16: DType.F16, torch.float32: DType.F32}


def allocate(nbytes: int) -> Tensor:
    """Return an uninitialised u8 tensor [nbytes], on huge pages where it is large.

    Streaming a weight through 4 KB pages costs a fifth of the bandwidth. Only whole huge pages are asked for, so
    nothing is resident beyond the size.
    """
    if nbytes < _HUGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(nbytes, dtype=torch.uint8)
    private = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS  # Python's default is shared memory, which gets no huge pages
    memory = mmap.mmap(-1, nbytes + _HUGE, flags=private)
    start = -ctypes.addressof(ctypes.c_char.from_buffer(memory)) % _HUGE
    with contextlib.suppress(OSError):  # a kernel without them: ordinary pages do
        memory.madvise(mmap.MADV_HUGEPAGE, start, nbytes // _HUGE * _HUGE)
    return torch.frombuffer(memory, dtype=torch.uint8, count=nbytes, offset=start)


def pack(
    mask: Tensor,
    values: Tensor,
    shape: tuple[int, int],
    layout: MemoryLayout,
    *,
    row_offsets: Tensor | None = None,
    where: str = "weight",
    threads: int | None = None,
) -> Tensor:
    """Pack one weight for the kernels.

    Args:
        mask: u8 [rows, ceil(cols / 8)], as `weight_bitmask` on disk.
        values: [nnz] row-major, bf16, fp16 or fp32 (SPLIT, CHUNK: bf16).
        shape: (rows, cols).
        layout: Layout in memory.
        row_offsets: i64 [rows], checked against the mask when given.
        where: Name of the weight, for messages.
        threads: Threads to pack with; default: torch's.

    Returns:
        One u8 tensor with everything in it.

    Raises:
        BadIndex: Mask, offsets and values disagree, or the mask lacks the structure of CHUNK or BLOCK.
        KernelError: A dtype or layout that does not exist.
        KernelsMissing: There are no kernels.
    """
    source = _source(mask, values, shape, row_offsets, where)
    source.dtype = source.weight_dtype = dtype_of(values.dtype)
    return _pack(source, layout, where, threads)


def pack_codes(
    mask: Tensor,
    codes: Tensor,
    scales: Tensor,
    shape: tuple[int, int],
    layout: MemoryLayout,
    dtype: torch.dtype,
    *,
    row_offsets: Tensor | None = None,
    where: str = "weight",
    threads: int | None = None,
) -> Tensor:
    """Pack one weight of small integers for the kernels; weight = integer x scale, in float32, rounded to `dtype`.

    A product with few tokens quantises its input too, to 8 bits in groups of 64 columns: x is off by at most the
    largest |x| of its group / 254. One with more tokens multiplies the rounded weights with x as it is.

    Args:
        mask: u8 [rows, ceil(cols / 8)], as `weight_bitmask` on disk.
        codes: i8 [nnz] row-major; INT8 takes -127..127, INT4 -8..8.
        scales: fp16 [rows, ceil(cols / 64)], finite and not negative.
        shape: (rows, cols).
        layout: INT8 or INT4.
        dtype: Of the weight: bf16, fp16 or fp32.
        row_offsets: i64 [rows], checked against the mask when given.
        where: Name of the weight, for messages.
        threads: Threads to pack with; default: torch's.

    Returns:
        One u8 tensor with everything in it.

    Raises:
        BadIndex: Mask, offsets, scales and integers disagree.
        KernelError: A dtype or layout that does not exist, or an integer or scale out of range.
        KernelsMissing: There are no kernels.
    """
    if codes.dtype != torch.int8 or scales.dtype != torch.float16:
        raise KernelError(f"integers are {codes.dtype}, scales {scales.dtype}; needed int8, float16", where=where)
    groups = (shape[1] + 63) // 64
    if scales.shape != (shape[0], groups):
        raise BadIndex(f"scales {list(scales.shape)}, needed {[shape[0], groups]}", where=where)
    source = _source(mask, codes, shape, row_offsets, where)
    held = scales.contiguous()
    source.dtype, source.weight_dtype, source.scales = DType.I8, dtype_of(dtype), held.data_ptr()
    return _pack(source, layout, where, threads)


def _source(mask: Tensor, values: Tensor, shape: tuple[int, int], row_offsets: Tensor | None, where: str) -> _Bitmask:
    """Return what both ways to pack have in common; it keeps its tensors alive."""
    rows, cols = shape
    if mask.numel() != rows * ((cols + 7) // 8) or (row_offsets is not None and row_offsets.numel() != rows):
        raise BadIndex(f"mask of {mask.numel()} bytes does not fit {rows} x {cols}", where=where)
    held = [mask.contiguous(), values.contiguous(), None if row_offsets is None else row_offsets.contiguous()]
    addresses = [None if part is None else part.data_ptr() for part in held]
    source = _Bitmask(*addresses, rows, cols, values.numel())
    source.held = held
    return source


def _pack(source: _Bitmask, layout: MemoryLayout, where: str, threads: int | None) -> Tensor:
    lib = library()
    count = threads or torch.get_num_threads()
    plan = c_void_p()
    check(lib.sk_plan_create(layout, byref(source), count, byref(plan)), where)
    return _carry_out(plan, where, count)


def pack_split(disk: ctypes.Structure, where: str, threads: int) -> Tensor | None:
    """Pack a tensor of the form bitmask/split as it lies on disk, proving it, without decoding its values.

    Args:
        disk: `sk_disk` of the C interface; what it points to outlives the call.
        where: Name of the weight, for messages.
        threads: Threads to pack with.

    Returns:
        The buffer in the layout SPLIT; None where the instruction set has no fast way.

    Raises:
        BadIndex: A length, index, count or padding bit is wrong.
    """
    plan = c_void_p()
    status = library().sk_plan_from_disk(byref(disk), threads, byref(plan))
    if status == _UNSUPPORTED:
        return None
    check(status, where)
    return _carry_out(plan, where, threads)


def _carry_out(plan: c_void_p, where: str, threads: int) -> Tensor:
    lib = library()
    try:
        size = lib.sk_plan_bytes(plan)
        out = allocate(size)
        check(lib.sk_plan_pack(plan, out.data_ptr(), size, threads), where)
    finally:
        lib.sk_plan_free(plan)
    return out


def pack_best(
    mask: Tensor,
    values: Tensor,
    shape: tuple[int, int],
    pattern: Pattern | None = None,
    *,
    where: str = "weight",
    threads: int | None = None,
) -> Tensor:
    """Pack one weight in the layout that multiplies fastest; arguments as `pack`, `best_layout`.

    A pattern says what pruning aimed at. Where the mask lacks its structure after all (a zero among the kept weights
    that counts as removed), the layout is one that holds any mask.
    """
    density = values.numel() / max(shape[0] * shape[1], 1)
    any_mask, layout = best_layout(values.dtype, density), best_layout(values.dtype, density, pattern)
    if layout is not any_mask:
        with contextlib.suppress(BadIndex):
            return pack(mask, values, shape, layout, where=where, threads=threads)
    return pack(mask, values, shape, any_mask, where=where, threads=threads)


def best_layout(dtype: torch.dtype, density: float, pattern: Pattern | None = None) -> MemoryLayout:
    """Return the layout in memory that multiplies fastest here.

    SPLIT moves fewer bytes, BITMAP decodes faster. One core decodes SPLIT at 50 weights a nanosecond with AVX-512,
    so down to a fifth of the weights memory is the limit and bytes decide; without AVX-512 decoding is the limit at
    every density.

    N:M patterns go the same way, as a mask takes no more bytes than indices do: 2:4 is 6.5 bits a weight in SPLIT, 9
    with indices; 16:64 is 3.8 in SPLIT, 6 in CHUNK. Below that decoding limits SPLIT, and CHUNK has nothing to decode.
    Blocks stay whole, which also spares the multiplications when there are many tokens. One core, 4096 x 4096, bf16,
    times as fast as dense at one token, and microseconds for 16 tokens at 2048 x 2048:

    | AVX-512 BF16 | SPLIT | BITMAP | CHUNK or BLOCK | 16 tokens, same order |
    |---|---|---|---|---|
    | 2:4 | 2.05 | 1.59 | | |
    | 16:64 | 2.74 | 2.56 | 2.69 | 458 441 241 |
    | 8:64 / 4:64 | 2.82 / 2.92 | 2.90 / 3.04 | 5.40 / 10.1 | 459 428 145 (8:64) |
    | 16x4 at 50 / 80 % | 2.06 / 2.02 | 1.57 / 2.82 | 1.98 / 4.87 | 523 556 226 / 576 435 107 |

    With AVX2: 8:64 BITMAP 1.18, CHUNK 1.36; 16x4 at 50 % BITMAP 1.15, BLOCK 1.74.

    Args:
        dtype: Of the values; SPLIT and CHUNK exist for bf16 only.
        density: Share of kept weights.
        pattern: What the mask obeys; default: nothing.
    """
    if isinstance(pattern, Block) and pattern.rows % 16 == 0 and pattern.cols % 4 == 0:
        return MemoryLayout.BLOCK
    if dtype == torch.bfloat16 and isinstance(pattern, NM) and pattern.of == 64 and pattern.keep in {4, 8}:
        return MemoryLayout.CHUNK
    split = dtype == torch.bfloat16 and density >= 0.2 and isa().startswith("avx512")
    return MemoryLayout.SPLIT if split else MemoryLayout.BITMAP


def add_gram(sums: Tensor, x: Tensor) -> bool:
    """Add X^T X of the inputs `x: [tokens, cols]` to `sums: [cols, cols]` float64, on and above the diagonal.

    What stands below the diagonal has no meaning afterwards. Products are exact, sums of up to 512 tokens are float32.

    Returns:
        False if nothing was done: inputs of another dtype than bf16, no kernels, or a processor that multiplies bf16 no
        faster than floats.
    """
    if x.dtype != torch.bfloat16 or not available():
        return False
    rows = x.contiguous()
    tokens, cols = rows.shape
    status = library().sk_gram(rows.data_ptr(), tokens, cols, cols, sums.data_ptr(), torch.get_num_threads())
    if status == _UNSUPPORTED:
        return False
    check(status, "gram")
    return True


def info(packed: Tensor) -> PackedInfo:
    """Return what a packed buffer holds.

    Raises:
        KernelError: Not a packed buffer.
    """
    found = _Info()
    check(library().sk_packed_info(packed.data_ptr(), packed.numel(), byref(found)), "packed weight")
    return PackedInfo(
        MemoryLayout(found.layout),
        DType(found.dtype),
        (found.rows, found.cols),
        found.nnz,
        found.bytes,
        found.patches,
        (found.panels3, found.panels4, found.panels8),
    )


def unpack(packed: Tensor) -> Tensor:
    """Return the dense weight [rows, cols] of a packed buffer, bit for bit, with +0 in the holes."""
    found = info(packed)
    dtype = next(key for key, number in _dtypes().items() if number == found.dtype)
    dense = torch.empty(found.shape, dtype=dtype)
    status = library().sk_unpack(packed.data_ptr(), packed.numel(), dense.data_ptr(), torch.get_num_threads())
    check(status, "packed weight")
    return dense
