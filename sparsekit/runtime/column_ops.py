"""Products that pass over inputs or outputs, as torch operators.

`sparsekit::linear_columns` and, for a weight with holes, `linear_columns_packed` pass over small inputs; `linear_rows`
computes the outputs that are asked for.

At decode an input below its threshold counts for nothing, so its column of the weight need not be read. That saves
time only where a column lies in one piece: these operators take weights stored column by column. Which inputs count is
decided in float32 from x as it is, `not |x| <= threshold`, so a NaN counts and a threshold of 0 passes over exact zeros
alone; the result is that of `F.linear(torch.where(x.abs().float() <= threshold, 0, x), weight, bias)` up to rounding.

The kernels are registered as those of `ops` are. Each of up to four tokens has its own mask; a column is read if some
token counts its input. There are no gradients: training has no use for a product that is made for one token.
"""

from __future__ import annotations

import ctypes
import functools
import math
from typing import TYPE_CHECKING, Any

import torch

from sparsekit.errors import KernelError
from sparsekit.runtime import native, ops

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

FEW_TOKENS = 4
"""A product with more tokens is refused: hardly an input is small in all of them."""
SCHEMAS = (
    "linear_columns(Tensor x, Tensor weight, Tensor? bias, Tensor threshold) -> Tensor",
    "linear_columns_packed(Tensor x, Tensor packed, Tensor? bias, Tensor threshold, int rows) -> Tensor",
    "linear_rows(Tensor x, Tensor weight, Tensor? bias, Tensor keep) -> Tensor",
)
_KEPT: list[Any] = []  # registrations end when their Library object is collected


def column_major(weight: Tensor) -> Tensor:
    """Return `weight: [out, in]` with the same values, stored column by column on huge pages."""
    rows, cols = weight.shape
    memory = native.allocate(weight.numel() * weight.element_size())
    return memory.view(weight.dtype).reshape(cols, rows).copy_(weight.detach().t()).t()


def pack_columns(weight: Tensor) -> Tensor:
    """Return a bf16 `weight: [out, in]` in fewer bytes and without its zeros, for `linear_columns_packed`.

    A weight is stored unless all its bits are 0: a negative zero and the bits of a NaN are kept.

    Returns:
        u8 buffer, in memory only: its form may change from one version to the next.

    Raises:
        KernelsMissing: There are no kernels.
        KernelError: Another dtype or not a matrix, or too large.
        MemoryError: No memory.
    """
    if weight.dim() != 2 or weight.dtype != torch.bfloat16:
        raise KernelError(f"weight is {weight.dtype} {list(weight.shape)}, needed a matrix of bfloat16")
    (rows, cols), lib, threads = weight.shape, native.library(), torch.get_num_threads()
    held = weight.detach().t().contiguous()
    plan = ctypes.c_void_p()
    status = lib.sk_columns_plan_create(held.data_ptr(), rows, cols, threads, ctypes.byref(plan))
    native.check(status, "pack_columns")
    try:
        size = lib.sk_columns_plan_bytes(plan)
        packed = native.allocate(size)
        native.check(lib.sk_columns_plan_pack(plan, packed.data_ptr(), size, threads), "pack_columns")
    finally:
        lib.sk_columns_plan_free(plan)
    return packed


def packed_columns_info(packed: Tensor) -> tuple[int, int, int]:
    """Return rows, columns and number of values of a buffer of `pack_columns`.

    Raises:
        KernelError: Not such a buffer.
    """
    if packed.dtype != torch.uint8 or not packed.is_contiguous():
        raise KernelError(f"packed columns are {packed.dtype}, needed contiguous uint8")
    found = (ctypes.c_int64 * 3)()
    native.check(native.library().sk_columns_info(packed.data_ptr(), packed.numel(), found), "packed columns")
    return found[0], found[1], found[2]


def unpack_columns(packed: Tensor) -> Tensor:
    """Return the bf16 weight [out, in] of a buffer of `pack_columns`, bit for bit, stored column by column.

    Raises:
        KernelError: Not such a buffer. Its records are trusted: see `prove_columns`.
    """
    rows, cols, _ = packed_columns_info(packed)
    held = torch.empty((cols, rows), dtype=torch.bfloat16)
    status = native.library().sk_columns_unpack(
        packed.data_ptr(), packed.numel(), held.data_ptr(), torch.get_num_threads()
    )
    native.check(status, "packed columns")
    return held.t()


def prove_columns(packed: Tensor) -> None:
    """Look at every record of a buffer of `pack_columns`.

    Raises:
        KernelError: Not such a buffer, or a damaged one.
    """
    packed_columns_info(packed)
    status = native.library().sk_columns_prove(packed.data_ptr(), packed.numel(), torch.get_num_threads())
    native.check(status, "packed columns")


def linear_columns(x: Tensor, weight: Tensor, bias: Tensor | None, threshold: Tensor) -> Tensor:
    """Return `x @ weight.T + bias` without the inputs that are not above their threshold.

    Args:
        x: [..., in] of at most four tokens, bf16, fp16 or fp32.
        weight: [out, in] of x's dtype, stored column by column as `column_major` returns it; finite.
        bias: [out] of x's dtype, or None.
        threshold: float32 [in], or [1] for all inputs.

    Inside torch.compile `register` must have run before.

    Returns:
        [..., out] of x's dtype, rounded once from float32 sums, whose order depends on the kept inputs only.

    Raises:
        KernelsMissing: There are no kernels.
        KernelError: x requires a gradient.
        RuntimeError: Shapes, strides or dtypes do not fit.
    """
    return _call("linear_columns", x, weight, bias, threshold)


def linear_columns_packed(x: Tensor, packed: Tensor, bias: Tensor | None, threshold: Tensor, rows: int) -> Tensor:
    """Return what `linear_columns` does for a packed weight: zero weights are passed over as well.

    Args:
        x: [..., in] of at most four tokens, bf16, fp16 or fp32.
        packed: A buffer of `pack_columns` for a weight [rows, in].
        bias: [rows] of x's dtype, or None.
        threshold: float32 [in], or [1] for all inputs.
        rows: Outputs.

    Returns:
        [..., rows] of x's dtype.

    Raises:
        KernelsMissing: There are no kernels.
        KernelError: x requires a gradient.
        RuntimeError: Shapes or dtypes do not fit, or not such a buffer.
    """
    return _call("linear_columns_packed", x, packed, bias, threshold, rows)


def linear_rows(x: Tensor, weight: Tensor, bias: Tensor | None, keep: Tensor) -> Tensor:
    """Return `x @ weight.T + bias` where `keep` is set and 0 elsewhere; rows that no token keeps are not read.

    Args:
        x: [..., in] of at most four tokens, bf16, fp16 or fp32.
        weight: [out, in] of x's dtype, contiguous.
        bias: [out] of x's dtype, or None; kept outputs get it.
        keep: [..., out] of bool or uint8, contiguous.

    Returns:
        [..., out] of x's dtype.

    Raises:
        KernelsMissing: There are no kernels.
        KernelError: x requires a gradient.
        RuntimeError: Shapes or dtypes do not fit.
    """
    return _call("linear_rows", x, weight, bias, keep)


def _call(name: str, x: Tensor, *arguments: Any) -> Tensor:
    result: Tensor
    if torch.compiler.is_compiling():
        result = getattr(torch.ops.sparsekit, name).default(x, *arguments)
        return result
    if x.requires_grad and torch.is_grad_enabled():
        raise KernelError(f"{name} has no gradient, got an x that requires one", hint="Call it under torch.no_grad().")
    # The gradient's part of the dispatcher is Python and costs more than all the rest of a call: go below it.
    with torch._C._AutoDispatchBelowAutograd():
        result = _operators()[name](x, *arguments)
    return result


@functools.lru_cache(maxsize=1)
def _operators() -> dict[str, Callable[..., Any]]:
    register()
    names = [schema.partition("(")[0] for schema in SCHEMAS]
    return {name: getattr(torch.ops.sparsekit, name).default for name in names}


@functools.lru_cache(maxsize=1)
def register() -> str:
    """Define and implement the operators once; return the backend in use, which is that of `ops`.

    Raises:
        KernelsMissing: There are no kernels.
        KernelError: `SPARSEKIT_BACKEND` names a backend that does not exist or cannot run here.
    """
    backend = ops.register()
    definition: Any = torch.library.Library("sparsekit", "FRAGMENT")  # type: ignore[no-untyped-call]
    for schema in SCHEMAS:
        definition.define(schema)
    _KEPT.append(definition)
    kernels: dict[str, tuple[Callable[..., Tensor], Any]] = {
        "linear_columns": (_columns_ctypes, _of_weight_fake),
        "linear_columns_packed": (_packed_ctypes, _packed_fake),
        "linear_rows": (_rows_ctypes, _of_weight_fake),
    }
    if backend == "stable":
        native.check(native.library().sk_torch_register_columns(ops.torch_version()), "column_ops")
    for name, (kernel, fake) in kernels.items():
        if backend == "ctypes":
            definition.impl(name, kernel, "CPU")
        torch.library.register_fake(f"sparsekit::{name}", fake, lib=definition)
        torch.library.register_autograd(f"sparsekit::{name}", _no_gradient, lib=definition)
    return backend


def _no_gradient(ctx: Any, gradient: Tensor) -> None:
    raise RuntimeError("sparsekit: products that pass over inputs have no gradient")


def _columns_ctypes(x: Tensor, weight: Tensor, bias: Tensor | None, threshold: Tensor) -> Tensor:
    if weight.dim() != 2 or weight.dtype != x.dtype:
        raise RuntimeError(f"sparsekit: weight is {weight.dtype} {list(weight.shape)}, needed a matrix of {x.dtype}")
    rows, cols = weight.shape
    if not weight.t().is_contiguous():
        raise RuntimeError(f"sparsekit: weight must be column-major, strides {weight.stride()}, needed (1, {rows})")
    call, y, _kept = _few(x, bias, (rows, cols))
    _check_threshold(threshold, cols)
    status = native.library().sk_columns(
        ctypes.byref(call), weight.data_ptr(), rows, cols, call.x_dtype, threshold.data_ptr(), threshold.numel()
    )
    native.check(status, "linear_columns")
    return y


def _packed_ctypes(x: Tensor, packed: Tensor, bias: Tensor | None, threshold: Tensor, rows: int) -> Tensor:
    found, cols, _ = packed_columns_info(packed)
    if found != rows:
        raise RuntimeError(f"sparsekit: the packed weight has {found} rows, not {rows}")
    call, y, _kept = _few(x, bias, (rows, cols))
    _check_threshold(threshold, cols)
    call.packed, call.packed_bytes = packed.data_ptr(), packed.numel()
    status = native.library().sk_columns_packed(ctypes.byref(call), threshold.data_ptr(), threshold.numel())
    native.check(status, "linear_columns_packed")
    return y


def _rows_ctypes(x: Tensor, weight: Tensor, bias: Tensor | None, keep: Tensor) -> Tensor:
    if weight.dim() != 2 or weight.dtype != x.dtype or not weight.is_contiguous():
        raise RuntimeError(f"sparsekit: weight must be a contiguous matrix of {x.dtype}")
    rows, cols = weight.shape
    call, y, _kept = _few(x, bias, (rows, cols))
    needed = (*x.shape[:-1], rows)
    if keep.dtype not in {torch.bool, torch.uint8} or keep.shape != needed or not keep.is_contiguous():
        got = f"{keep.dtype} {list(keep.shape)}"
        raise RuntimeError(f"sparsekit: keep is {got}, needed contiguous bool or uint8 {list(needed)}")
    status = native.library().sk_rows(
        ctypes.byref(call), weight.data_ptr(), rows, cols, call.x_dtype, keep.data_ptr(), rows
    )
    native.check(status, "linear_rows")
    return y


def _few(x: Tensor, bias: Tensor | None, shape: tuple[int, int]) -> tuple[native.Call, Tensor, tuple[Any, ...]]:
    """Return what `ops.product` does, for at most `FEW_TOKENS`."""
    tokens = math.prod(x.shape[:-1])
    if tokens > FEW_TOKENS:
        raise RuntimeError(f"sparsekit: x has {tokens} tokens, needed {FEW_TOKENS} at most")
    return ops.product(x, bias, shape)


def _check_threshold(threshold: Tensor, cols: int) -> None:
    fits = threshold.dtype == torch.float32 and threshold.dim() == 1 and threshold.is_contiguous()
    if not fits or threshold.numel() not in {1, cols}:
        got = f"{threshold.dtype} {list(threshold.shape)}"
        raise RuntimeError(f"sparsekit: threshold is {got}, needed contiguous float32 [1] or [{cols}]")


def _packed_fake(x: Tensor, packed: Tensor, bias: Tensor | None, threshold: Tensor, rows: int) -> Tensor:
    return torch.empty((*x.shape[:-1], rows), dtype=x.dtype, device=x.device)


def _of_weight_fake(x: Tensor, weight: Tensor, bias: Tensor | None, choice: Tensor) -> Tensor:
    return torch.empty((*x.shape[:-1], weight.shape[0]), dtype=x.dtype, device=x.device)
