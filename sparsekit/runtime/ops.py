"""Products as torch operators: `sparsekit::linear_packed` for packed weights, `sparsekit::linear_dense` for plain ones.

Their CPU kernels are registered by the first of these that this installation allows:

1. `stable`: through libtorch's stable C interface (torch 2.10 and later);
2. `ctypes`: Python functions that call the library.

`SPARSEKIT_BACKEND` forces one. Where the kernels are missing there is no packed weight: `pack` says so, and a caller
unpacks and multiplies with torch. Fake kernels let torch.compile trace the operators, and both have gradients; that of
a packed product with respect to its input unpacks the weight. `linear_packed_2` and `_3` multiply one input with
several packed weights, which saves the preparation of the input and the waking of threads for all but one.
"""

from __future__ import annotations

import ctypes
import functools
import math
import os
from typing import TYPE_CHECKING, Any

import torch

from sparsekit.errors import KernelError
from sparsekit.runtime import buffers, native

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

PACKED = ("linear_packed", "linear_packed_2", "linear_packed_3")
"""Operators by number of weights."""
SCHEMAS = (
    "linear_packed(Tensor x, Tensor packed, Tensor? bias, int rows) -> Tensor",
    "linear_packed_2(Tensor x, Tensor packed, Tensor? bias, int rows, Tensor packed2, Tensor? bias2, int rows2)"
    " -> (Tensor, Tensor)",
    "linear_packed_3(Tensor x, Tensor packed, Tensor? bias, int rows, Tensor packed2, Tensor? bias2, int rows2,"
    " Tensor packed3, Tensor? bias3, int rows3) -> (Tensor, Tensor, Tensor)",
    "linear_dense(Tensor x, Tensor weight, Tensor? bias) -> Tensor",
)
BACKENDS = ("stable", "ctypes")
_KEPT: list[Any] = []  # registrations end when their Library object is collected


def linear(x: Tensor, packed: Tensor, bias: Tensor | None, rows: int) -> Tensor:
    """Return `x @ weight.T + bias` for a packed weight.

    Args:
        x: [..., cols], bf16, fp16 or fp32.
        packed: A buffer of `buffers.pack` for a weight [rows, cols].
        bias: [rows] of x's dtype, or None.
        rows: Outputs.

    Inside torch.compile `register` must have run before.

    Returns:
        [..., rows] of x's dtype. Sums are fp32; bf16 weights with bf16 inputs are multiplied exactly where the
        processor has bf16 arithmetic, and as fp32 elsewhere.

    Raises:
        KernelsMissing: There are no kernels.
        RuntimeError: Shapes or dtypes do not fit.
    """
    result: Tensor = _call("linear_packed", x, packed, bias, rows)
    return result


def linear_group(x: Tensor, *members: Any) -> tuple[Tensor, ...]:
    """Return the products of one input with two or three packed weights in one call.

    Args:
        x: [..., cols], bf16, fp16 or fp32.
        members: `packed, bias, rows` of each weight as in `linear`, one after the other.

    Returns:
        A tensor for each weight, as `linear` returns it.

    Raises:
        KernelsMissing: There are no kernels.
        RuntimeError: Shapes or dtypes do not fit.
    """
    results: tuple[Tensor, ...] = _call(PACKED[len(members) // 3 - 1], x, *members)
    return results


def linear_dense(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return `x @ weight.T + bias` by the streaming kernel, which is made for few tokens.

    Args:
        x: [..., cols], bf16, fp16 or fp32.
        weight: [rows, cols], contiguous, of x's dtype.
        bias: [rows] of x's dtype, or None.

    Returns:
        [..., rows] of x's dtype; sums as in `linear`.

    Raises:
        KernelsMissing: There are no kernels.
        RuntimeError: Shapes or dtypes do not fit.
    """
    result: Tensor = _call("linear_dense", x, weight, bias)
    return result


def _call(name: str, *arguments: Any) -> Any:
    if torch.compiler.is_compiling():
        return getattr(torch.ops.sparsekit, name).default(*arguments)
    operator = _operators()[name]
    if torch.is_grad_enabled():
        return operator(*arguments)
    # The gradient's part of the dispatcher is Python and costs more than all the rest of a call: go below it.
    with torch._C._AutoDispatchBelowAutograd():
        return operator(*arguments)


@functools.lru_cache(maxsize=1)
def _operators() -> dict[str, Callable[..., Any]]:
    register()
    names = [schema.partition("(")[0] for schema in SCHEMAS]
    return {name: getattr(torch.ops.sparsekit, name).default for name in names}


@functools.lru_cache(maxsize=1)
def register() -> str:
    """Define and implement the operators once; return the backend in use.

    Raises:
        KernelsMissing: There are no kernels.
        KernelError: `SPARSEKIT_BACKEND` names a backend that does not exist or cannot run here.
    """
    lib = native.library()
    wanted = os.environ.get("SPARSEKIT_BACKEND")
    if wanted and wanted not in BACKENDS:
        raise KernelError(
            f"no backend {wanted!r}", where="SPARSEKIT_BACKEND", hint=f"Use one of {', '.join(BACKENDS)}."
        )
    definition: Any = torch.library.Library("sparsekit", "FRAGMENT")  # type: ignore[no-untyped-call]
    for schema in SCHEMAS:
        definition.define(schema)
    _KEPT.append(definition)
    backend = "stable" if wanted != "ctypes" and _register_stable(lib) else "ctypes"
    if wanted and backend != wanted:
        raise KernelError(
            f"torch {torch.__version__} has no stable operator interface",
            where="SPARSEKIT_BACKEND",
            hint="Unset it, or install torch 2.10 or later.",
        )
    for name in PACKED:
        _implement(definition, name, backend, _packed_ctypes, _packed_fake, _packed_backward, _packed_remember)
    _implement(definition, "linear_dense", backend, _dense_ctypes, _dense_fake, _dense_backward, _dense_remember)
    return backend


def _implement(definition: Any, name: str, backend: str, kernel: Any, fake: Any, backward: Any, remember: Any) -> None:
    if backend == "ctypes":
        definition.impl(name, kernel, "CPU")
    torch.library.register_fake(f"sparsekit::{name}", fake, lib=definition)
    torch.library.register_autograd(f"sparsekit::{name}", backward, setup_context=remember, lib=definition)


def _register_stable(lib: ctypes.CDLL) -> bool:
    """Hand the library the addresses it needs; False if this torch lacks one."""
    path = os.path.join(os.path.dirname(torch.__file__), "lib", "libtorch_cpu.so")
    try:
        libtorch = ctypes.CDLL(path)
        names: list[str] = []
        while (name := lib.sk_torch_symbol(len(names))) is not None:
            names.append(name.decode())
        addresses = [ctypes.cast(getattr(libtorch, name), ctypes.c_void_p) for name in names]
        kinds = ("bfloat16", "float16", "float32", "uint8", "bool")
        numbers = [getattr(libtorch, f"aoti_torch_dtype_{kind}")() for kind in kinds]
    except (OSError, AttributeError):
        return False
    array = (ctypes.c_void_p * len(addresses))(*addresses)
    status = lib.sk_torch_register(array, len(addresses), (ctypes.c_int32 * len(kinds))(*numbers), torch_version())
    return bool(status == 0)


def torch_version() -> int:
    """Return the version of torch as libtorch's stable interface encodes it."""
    major, minor = (int(part) for part in torch.__version__.split(".")[:2])
    return major << 56 | minor << 48


def product(x: Tensor, bias: Tensor | None, shape: tuple[int, int]) -> tuple[native.Call, Tensor, tuple[Any, ...]]:
    """Return a call for a weight of this shape, its result, and what must stay alive while it runs."""
    rows, cols = shape
    dtype = native.dtype_of(x.dtype)
    if x.shape[-1] != cols:
        raise RuntimeError(f"sparsekit: x {list(x.shape)} for a weight {[rows, cols]}")
    if bias is not None and (bias.dtype != x.dtype or bias.shape != (rows,)):
        raise RuntimeError(f"sparsekit: bias must be {x.dtype} [{rows}], got {bias.dtype} {list(bias.shape)}")
    x = x.contiguous()
    bias = None if bias is None else bias.contiguous()
    y = torch.empty((*x.shape[:-1], rows), dtype=x.dtype)
    address = None if bias is None else bias.data_ptr()
    tokens, threads = math.prod(x.shape[:-1]), torch.get_num_threads()
    call = native.Call(None, 0, x.data_ptr(), address, y.data_ptr(), tokens, cols, rows, dtype, dtype, threads)
    return call, y, (x, bias)


def _packed_ctypes(x: Tensor, *members: Any) -> Any:
    prepared = []
    for packed, bias, rows in _each(members):
        found = buffers.info(packed)
        if found.shape[0] != rows:
            raise RuntimeError(f"sparsekit: the packed weight has {found.shape[0]} rows, not {rows}")
        call, y, kept = product(x, bias, found.shape)
        call.packed, call.packed_bytes = packed.data_ptr(), packed.numel()
        x = kept[0]  # contiguous, so that all calls have the same address
        prepared.append((call, y, kept))
    calls = (native.Call * len(prepared))(*(call for call, _, _ in prepared))
    native.check(native.library().sk_linear_group(calls, len(calls)), "linear_packed")
    return _one_or_all([y for _, y, _ in prepared])


def _each(members: tuple[Any, ...]) -> list[tuple[Tensor, Tensor | None, int]]:
    """Return (packed, bias, rows) of each weight."""
    return [members[i : i + 3] for i in range(0, len(members), 3)]


def _one_or_all(results: list[Tensor]) -> Any:
    return results[0] if len(results) == 1 else tuple(results)


def _packed_fake(x: Tensor, *members: Any) -> Any:
    shapes = [(*x.shape[:-1], rows) for _, _, rows in _each(members)]
    return _one_or_all([torch.empty(shape, dtype=x.dtype, device=x.device) for shape in shapes])


def _packed_remember(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    members = _each(inputs[1:])
    ctx.save_for_backward(*(packed for packed, _, _ in members))
    ctx.has_bias = [bias is not None for _, bias, _ in members]


def _packed_backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
    of_x: Tensor | None = None
    of_members: list[Tensor | None] = []
    for packed, has_bias, gradient in zip(ctx.saved_tensors, ctx.has_bias, gradients, strict=True):
        part = gradient @ buffers.unpack(packed).to(gradient.dtype)
        of_x = part if of_x is None else of_x + part
        of_members += [None, _bias_gradient(has_bias, gradient), None]
    return of_x, *of_members


def _bias_gradient(has_bias: bool, gradient: Tensor) -> Tensor | None:
    return gradient.reshape(-1, gradient.shape[-1]).sum(0) if has_bias else None


def _dense_ctypes(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if weight.dim() != 2 or weight.dtype != x.dtype or not weight.is_contiguous():
        raise RuntimeError(f"sparsekit: weight must be a contiguous matrix of {x.dtype}")
    rows, cols = weight.shape
    call, y, _kept = product(x, bias, (rows, cols))
    status = native.library().sk_dense(ctypes.byref(call), weight.data_ptr(), rows, cols, call.x_dtype)
    native.check(status, "linear_dense")
    return y


def _dense_fake(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.empty((*x.shape[:-1], weight.shape[0]), dtype=x.dtype, device=x.device)


def _dense_remember(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor | None], output: Tensor) -> None:
    ctx.save_for_backward(inputs[0], inputs[1])
    ctx.has_bias = inputs[2] is not None


def _dense_backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    x, weight = ctx.saved_tensors
    rows, inputs = gradient.reshape(-1, gradient.shape[-1]), x.reshape(-1, x.shape[-1])
    return gradient @ weight, rows.T @ inputs, _bias_gradient(ctx.has_bias, gradient)
