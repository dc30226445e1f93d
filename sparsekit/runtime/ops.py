"""The product with a packed weight as one torch operator, `sparsekit::linear_packed`.

Its CPU kernel is registered by the first of these that this installation allows:

1. `stable`: through libtorch's stable C interface (torch 2.10 and later);
2. `ctypes`: a Python function that calls the library.

`SPARSEKIT_BACKEND` forces one. Where the kernels are missing there is no packed weight: `pack` says so, and a caller
unpacks and multiplies with torch. A fake kernel lets torch.compile trace the operator; its gradient with respect to
the input unpacks the weight.
"""

from __future__ import annotations

import ctypes
import functools
import math
import os
from typing import TYPE_CHECKING, Any

from sparsekit.errors import KernelError
from sparsekit.lazy import torch
from sparsekit.runtime import native

if TYPE_CHECKING:
    from torch import Tensor

SCHEMA = "linear_packed(Tensor x, Tensor packed, Tensor? bias, int rows) -> Tensor"
BACKENDS = ("stable", "ctypes")
_KEPT: list[Any] = []  # registrations end when their Library object is collected


def linear(x: Tensor, packed: Tensor, bias: Tensor | None, rows: int) -> Tensor:
    """Return `x @ weight.T + bias` for a packed weight.

    Args:
        x: [..., cols], bf16, fp16 or fp32.
        packed: A buffer of `native.pack` for a weight [rows, cols].
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
    if not torch.compiler.is_compiling():
        register()
    result: Tensor = torch.ops.sparsekit.linear_packed.default(x, packed, bias, rows)
    return result


@functools.lru_cache(maxsize=1)
def register() -> str:
    """Define and implement the operator once; return the backend in use.

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
    definition.define(SCHEMA)
    _KEPT.append(definition)
    backend = "stable" if wanted != "ctypes" and _register_stable(lib) else "ctypes"
    if wanted and backend != wanted:
        raise KernelError(
            f"torch {torch.__version__} has no stable operator interface",
            where="SPARSEKIT_BACKEND",
            hint="Unset it, or install torch 2.10 or later.",
        )
    if backend == "ctypes":
        definition.impl("linear_packed", _linear_ctypes, "CPU")
    torch.library.register_fake("sparsekit::linear_packed", _fake, lib=definition)
    torch.library.register_autograd("sparsekit::linear_packed", _backward, setup_context=_remember, lib=definition)
    return backend


def _register_stable(lib: ctypes.CDLL) -> bool:
    """Hand the library the addresses it needs; False if this torch lacks one."""
    path = os.path.join(os.path.dirname(torch.__file__), "lib", "libtorch_cpu.so")
    try:
        libtorch = ctypes.CDLL(path)
        names: list[str] = []
        while (name := lib.sk_torch_symbol(len(names))) is not None:
            names.append(name.decode())
        addresses = [ctypes.cast(getattr(libtorch, name), ctypes.c_void_p) for name in names]
        kinds = ("bfloat16", "float16", "float32")
        numbers = [getattr(libtorch, f"aoti_torch_dtype_{kind}")() for kind in kinds]
    except (OSError, AttributeError):
        return False
    major, minor = (int(part) for part in torch.__version__.split(".")[:2])
    array = (ctypes.c_void_p * len(addresses))(*addresses)
    status = lib.sk_torch_register(array, len(addresses), (ctypes.c_int32 * 3)(*numbers), major << 56 | minor << 48)
    return bool(status == 0)


def _linear_ctypes(x: Tensor, packed: Tensor, bias: Tensor | None, rows: int) -> Tensor:
    found = native.info(packed)
    dtype = native.dtype_of(x.dtype)
    if found.shape != (rows, x.shape[-1]):
        raise RuntimeError(f"sparsekit::linear_packed: x {list(x.shape)} and rows {rows} for a weight {found.shape}")
    if bias is not None and (bias.dtype != x.dtype or bias.shape != (rows,)):
        raise RuntimeError(f"sparsekit::linear_packed: bias must be {x.dtype} [{rows}], got {list(bias.shape)}")
    x = x.contiguous()
    bias = None if bias is None else bias.contiguous()
    y = torch.empty((*x.shape[:-1], rows), dtype=x.dtype)
    call = native.Call(
        packed.data_ptr(),
        packed.numel(),
        x.data_ptr(),
        None if bias is None else bias.data_ptr(),
        y.data_ptr(),
        math.prod(x.shape[:-1]),
        x.shape[-1],
        rows,
        dtype,
        dtype,
        torch.get_num_threads(),
    )
    native.check(native.library().sk_linear(ctypes.byref(call)), "linear_packed")
    return y


def _fake(x: Tensor, packed: Tensor, bias: Tensor | None, rows: int) -> Tensor:
    return torch.empty((*x.shape[:-1], rows), dtype=x.dtype, device=x.device)


def _remember(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor | None, int], output: Tensor) -> None:
    ctx.save_for_backward(inputs[1])
    ctx.has_bias = inputs[2] is not None


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, Tensor | None, None]:
    (packed,) = ctx.saved_tensors
    weight = native.unpack(packed).to(gradient.dtype)
    bias = gradient.reshape(-1, gradient.shape[-1]).sum(0) if ctx.has_bias else None
    return gradient @ weight, None, bias, None
