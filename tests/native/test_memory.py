"""No kernel touches a byte outside its buffers: guard pages on both sides, odd addresses, every instruction set."""

from __future__ import annotations

import ctypes
import mmap
import subprocess
import sys

import pytest
import torch

from sparsekit.runtime import native
from sparsekit.runtime.buffers import MemoryLayout
from sparsekit.runtime.native import DType
from tests.native.cases import ISAS, Case, bitmask, case, largest_error, structured

PAGE = mmap.PAGESIZE
_libc = ctypes.CDLL(None, use_errno=True)


class Guarded:
    """`nbytes` bytes with an unmapped page right behind (or right before) them."""

    def __init__(self, nbytes: int, *, at_end: bool, alignment: int = 1) -> None:
        pages = -(-max(nbytes, 1) // PAGE) * PAGE
        self.memory = mmap.mmap(-1, pages + 2 * PAGE)
        base = ctypes.addressof(ctypes.c_char.from_buffer(self.memory))
        for page in (base, base + PAGE + pages):
            assert _libc.mprotect(ctypes.c_void_p(page), PAGE, 0) == 0
        self.address = base + PAGE
        if at_end:
            self.address = (base + PAGE + pages - nbytes) // alignment * alignment
        self.nbytes = nbytes

    @classmethod
    def of(cls, tensor: torch.Tensor, *, at_end: bool, alignment: int = 1) -> Guarded:
        tensor = tensor.contiguous()
        made = cls(tensor.numel() * tensor.element_size(), at_end=at_end, alignment=alignment)
        ctypes.memmove(made.address, tensor.data_ptr(), made.nbytes)
        return made

    def bytes(self) -> bytearray:
        return bytearray(ctypes.string_at(self.address, self.nbytes))


def test_a_guard_page_kills() -> None:
    """The guard works: a read behind it ends the process."""
    code = (
        "import ctypes; from tests.native.test_memory import Guarded; "
        "g = Guarded(10, at_end=True); ctypes.string_at(g.address, 11)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False, timeout=120)
    assert done.returncode < 0


def guarded_product(made: Case, tokens: int, layout: MemoryLayout, at_end: bool) -> None:
    (rows, cols), dtype = made.shape, made.weight.dtype
    lib = native.library()
    mask = Guarded.of(bitmask(made.keep), at_end=at_end)
    values = Guarded.of(made.weight[made.keep].view(torch.uint8), at_end=at_end)  # odd addresses at the end
    source = native.Bitmask(
        mask.address, values.address, None, rows, cols, int(made.keep.sum()), native.dtype_of(dtype)
    )
    plan = ctypes.c_void_p()
    native.check(lib.sk_plan_create(layout, ctypes.byref(source), 1, ctypes.byref(plan)), "plan")
    packed = Guarded(lib.sk_plan_bytes(plan), at_end=at_end, alignment=8)
    native.check(lib.sk_plan_pack(plan, packed.address, packed.nbytes, 1), "pack")
    lib.sk_plan_free(plan)
    dense = Guarded(rows * cols * made.weight.element_size(), at_end=at_end)
    native.check(lib.sk_unpack(packed.address, packed.nbytes, dense.address, 1), "unpack")
    assert bytes(dense.bytes()) == made.weight.contiguous().view(torch.uint8).numpy().tobytes()
    for x_dtype in (torch.bfloat16, torch.float32):
        x = torch.randn(tokens, cols).to(x_dtype)
        bias = torch.zeros(rows)
        xs, bs = (Guarded.of(t.view(torch.uint8), at_end=at_end) for t in (x, bias))
        y = Guarded(tokens * rows * 4, at_end=at_end)
        call = native.Call(
            packed.address, packed.nbytes, xs.address, bs.address, y.address, tokens, cols, rows,
            native.dtype_of(x_dtype), DType.F32, 1,
        )  # fmt: skip
        native.check(lib.sk_linear(ctypes.byref(call)), "linear")
        got = torch.frombuffer(y.bytes(), dtype=torch.float32).reshape(tokens, rows)
        assert largest_error(got, x, made.weight) < 1e-5
    if tokens == 1:
        weight = Guarded.of(made.weight.view(torch.uint8), at_end=at_end)
        call.packed = None
        native.check(lib.sk_dense(ctypes.byref(call), weight.address, rows, cols, native.dtype_of(dtype)), "dense")
        lib.sk_read(weight.address, weight.nbytes, 1)


@pytest.mark.parametrize("isa", ISAS)
def test_guard_pages(isa: str) -> None:
    if isa not in native.isas():
        pytest.skip(f"{isa} does not run here")
    native.use_isa(isa)
    shapes = [(1, 1), (5, 3), (16, 64), (17, 67), (64, 128), (70, 33), (130, 257), (3, 2049)]
    for number, (rows, cols) in enumerate(shapes):
        for at_end in (True, False):
            for dtype, layout in [
                (torch.bfloat16, MemoryLayout.BITMAP),
                (torch.bfloat16, MemoryLayout.SPLIT),
                ((torch.float16, torch.float32)[number % 2], MemoryLayout.BITMAP),
            ]:
                for tokens in (1, 2 + number, 19):
                    guarded_product(case(rows, cols, 0.5, dtype, wild=0.01), tokens, layout, at_end)


@pytest.mark.parametrize("isa", ISAS)
def test_guard_pages_of_structured_layouts(isa: str) -> None:
    if isa not in native.isas():
        pytest.skip(f"{isa} does not run here")
    native.use_isa(isa)
    forms = [("4:64", torch.bfloat16), ("8:64", torch.bfloat16), ("16:64", torch.bfloat16)]
    forms += [("16x4", dtype) for dtype in (torch.bfloat16, torch.float16, torch.float32)]
    for pattern, dtype in forms:
        for rows, cols in [(16, 64), (48, 128)] + ([(1, 64), (19, 192)] if ":" in pattern else [(16, 4), (32, 20)]):
            made = structured(rows, cols, pattern, 0.5, dtype)
            for at_end in (True, False):
                for tokens in (1, 3, 19):
                    layout = MemoryLayout.CHUNK if ":" in pattern else MemoryLayout.BLOCK
                    guarded_product(made, tokens, layout, at_end)
