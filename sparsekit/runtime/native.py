"""The compiled CPU kernels through their C interface: loading, instruction set, threads, structures, gram matrices.

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
from ctypes import POINTER, c_char_p, c_int, c_int32, c_int64, c_uint64, c_void_p
from enum import IntEnum
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from sparsekit.errors import BadIndex, KernelError, KernelsMissing, UnsupportedCPU
from sparsekit.lazy import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor


LIBRARY = Path(__file__).parent / "_lib" / "libsparsekit_kernels.so"
ABI_VERSION = 6
_HUGE = 2 << 20


class DType(IntEnum):
    """Value types, as the C interface numbers them; I8 of the integers of INT8 and INT4 only."""

    BF16 = 0
    F16 = 1
    F32 = 2
    I8 = 3


class Bitmask(ctypes.Structure):
    """A weight and its mask, `sk_bitmask` of the C interface."""

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


class Info(ctypes.Structure):
    """What a packed buffer holds, `sk_info` of the C interface."""

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


UNSUPPORTED = 5
"""Status of what the library can do, but not here."""
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
    "sk_plan_create": (c_int, (c_int, POINTER(Bitmask), c_int, POINTER(c_void_p))),
    "sk_plan_bytes": (c_int64, (c_void_p,)),
    "sk_plan_pack": (c_int, (c_void_p, c_void_p, c_int64, c_int)),
    "sk_plan_free": (None, (c_void_p,)),
    "sk_packed_info": (c_int, (c_void_p, c_int64, POINTER(Info))),
    "sk_unpack": (c_int, (c_void_p, c_int64, c_void_p, c_int)),
    "sk_plan_from_disk": (c_int, (c_void_p, c_int, POINTER(c_void_p))),
    "sk_disk_read": (c_int, (c_void_p, c_void_p, c_void_p, c_int)),
    "sk_dequantize": (c_int, (POINTER(Bitmask), c_void_p, c_void_p, c_int)),
    "sk_expand": (c_int, (POINTER(Bitmask), c_void_p, c_int)),
    "sk_dense_mask": (c_int64, (c_void_p, c_int64, c_int64, c_int64, c_void_p, c_int)),
    "sk_compact": (c_int, (c_void_p, POINTER(Bitmask), c_void_p, c_int)),
    "sk_linear": (c_int, (POINTER(Call),)),
    "sk_linear_group": (c_int, (POINTER(Call), c_int)),
    "sk_dense": (c_int, (POINTER(Call), c_void_p, c_int64, c_int64, c_int32)),
    "sk_columns": (c_int, (POINTER(Call), c_void_p, c_int64, c_int64, c_int32, c_void_p, c_int64)),
    "sk_columns_plan_create": (c_int, (c_void_p, c_int64, c_int64, c_int, POINTER(c_void_p))),
    "sk_columns_plan_bytes": (c_int64, (c_void_p,)),
    "sk_columns_plan_pack": (c_int, (c_void_p, c_void_p, c_int64, c_int)),
    "sk_columns_plan_free": (None, (c_void_p,)),
    "sk_columns_prove": (c_int, (c_void_p, c_int64, c_int)),
    "sk_columns_unpack": (c_int, (c_void_p, c_int64, c_void_p, c_int)),
    "sk_columns_info": (c_int, (c_void_p, c_int64, POINTER(c_int64))),
    "sk_columns_packed": (c_int, (POINTER(Call), c_void_p, c_int64)),
    "sk_rows": (c_int, (POINTER(Call), c_void_p, c_int64, c_int64, c_int32, c_void_p, c_int64)),
    "sk_gram": (c_int, (c_void_p, c_int64, c_int64, c_int64, c_void_p, c_int)),
    "sk_read": (c_uint64, (c_void_p, c_int64, c_int)),
    "sk_torch_symbol": (c_char_p, (c_int,)),
    "sk_torch_register": (c_int, (POINTER(c_void_p), c_int, POINTER(c_int32), c_uint64)),
    "sk_torch_register_columns": (c_int, (c_uint64,)),
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
        return dtypes()[dtype]
    except KeyError:
        raise KernelError(f"dtype {dtype}, needed bfloat16, float16 or float32") from None


@functools.lru_cache(maxsize=1)
def dtypes() -> dict[torch.dtype, DType]:
    """Return the kernels' number of each torch dtype they know."""
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
    if status == UNSUPPORTED:
        return False
    check(status, "gram")
    return True
