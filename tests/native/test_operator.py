"""The torch operator: both backends, compile, gradient, refusals."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from sparsekit.errors import KernelError, KernelsMissing, UnsupportedCPU
from sparsekit.runtime import native, ops
from sparsekit.runtime.buffers import MemoryLayout
from tests.native.cases import case

BACKEND = """
import torch
from sparsekit.runtime import ops
from sparsekit.runtime.buffers import MemoryLayout
from tests.native.cases import case
made = case(64, 48, 0.5, torch.bfloat16)
packed, bias = made.pack(MemoryLayout.SPLIT), torch.randn(64).bfloat16()
print(ops.register())
inputs = [torch.randn(2, 3, 48), torch.randn(48), torch.randn(48, 5).T, torch.randn(0, 48)]
for x in [*inputs, torch.randn(4, 2, 48)[:, 1]]:
    x = x.bfloat16()
    for b in (None, bias):
        y = ops.linear(x, packed, b, 64)
        expected = torch.nn.functional.linear(x.double(), made.weight.double(), None if b is None else b.double())
        assert y.shape == expected.shape and y.dtype == x.dtype
        assert y.numel() == 0 or ((y.double() - expected).abs() <= 2**-8 * expected.abs() + 1e-5).all()
others = [case(rows, 48, 0.5, torch.bfloat16) for rows in (9, 130)]
members = [packed, bias, 64]
for other, layout in zip(others, (MemoryLayout.BITMAP, MemoryLayout.SPLIT)):
    members += [other.pack(layout), None, other.shape[0]]
    for x in inputs:
        for each, y in enumerate(ops.linear_group(x.bfloat16(), *members)):
            assert torch.equal(y, ops.linear(x.bfloat16(), *members[3 * each : 3 * each + 3])) and y.is_contiguous()
narrow = case(5, 44, 0.5, torch.bfloat16)
for bad in (lambda: ops.linear_group(x, *members[:3], packed, None, 63),
            lambda: ops.linear_group(x, *members[:3], narrow.pack(MemoryLayout.SPLIT), None, 5)):
    try:
        bad()
    except Exception as error:
        assert type(error).__name__ in ("RuntimeError", "KernelError"), error
    else:
        raise SystemExit("not refused")
weight = made.weight
for x in [x.bfloat16() for x in inputs]:
    for b in (None, bias):
        y = ops.linear_dense(x, weight, b)
        expected = torch.nn.functional.linear(x.double(), weight.double(), None if b is None else b.double())
        assert y.shape == expected.shape and y.dtype == x.dtype and y.is_contiguous()
        assert y.numel() == 0 or ((y.double() - expected).abs() <= 2**-8 * expected.abs() + 1e-5).all()
for bad in (lambda: ops.linear_dense(x, weight.T, None), lambda: ops.linear_dense(x, weight.float(), None),
            lambda: ops.linear_dense(x, weight, bias[:5]), lambda: ops.linear_dense(x[..., :5], weight, None),
            lambda: ops.linear_dense(x, weight[0], None),
            lambda: ops.linear(x, packed, None, 63), lambda: ops.linear(x[..., :5], packed, None, 64),
            lambda: ops.linear(x, packed, bias[:5], 64), lambda: ops.linear(x, packed[:99], None, 64)):
    try:
        bad()
    except Exception as error:
        assert type(error).__name__ in ("RuntimeError", "KernelError"), error
    else:
        raise SystemExit("not refused")
"""


@pytest.mark.parametrize("backend", ops.BACKENDS)
def test_backend(backend: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", BACKEND],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        env={**os.environ, "SPARSEKIT_BACKEND": backend},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [backend]


def test_compile_traces_the_operator_whole() -> None:
    made = case(64, 48, 0.5, torch.bfloat16)
    packed = made.pack(MemoryLayout.SPLIT)
    ops.register()
    compiled = torch.compile(lambda x: ops.linear(x, packed, None, 64) * 2, fullgraph=True, backend="aot_eager")
    for tokens in (1, 5):
        x = torch.randn(tokens, 48).bfloat16()
        assert torch.equal(compiled(x), ops.linear(x, packed, None, 64) * 2)


def test_operator_passes_torch_opcheck() -> None:
    made = case(64, 48, 0.5, torch.bfloat16)
    ops.register()
    torch.library.opcheck(
        torch.ops.sparsekit.linear_packed.default,
        (torch.randn(3, 48), made.pack(MemoryLayout.SPLIT), torch.randn(64), 64),
    )


def test_group_operators_pass_torch_opcheck() -> None:
    ops.register()
    layouts = (MemoryLayout.SPLIT, MemoryLayout.BITMAP, MemoryLayout.SPLIT)
    packed = [
        case(rows, 48, 0.5, torch.bfloat16).pack(layout) for rows, layout in zip((64, 70, 5), layouts, strict=True)
    ]
    x, bias = torch.randn(2, 2, 48), torch.randn(64)
    members = [packed[0], bias, 64, packed[1], None, 70, packed[2], None, 5]
    torch.library.opcheck(torch.ops.sparsekit.linear_packed_2.default, (x, *members[:6]))
    torch.library.opcheck(torch.ops.sparsekit.linear_packed_3.default, (x, *members))


def test_dense_operator_passes_torch_opcheck() -> None:
    ops.register()
    weight, bias = torch.randn(64, 48, requires_grad=True), torch.randn(64, requires_grad=True)
    x = torch.randn(2, 3, 48, requires_grad=True)
    torch.library.opcheck(torch.ops.sparsekit.linear_dense.default, (x, weight, bias))
    torch.library.opcheck(torch.ops.sparsekit.linear_dense.default, (x, weight, None))


def test_gradient_of_the_input() -> None:
    made = case(64, 48, 0.5, torch.bfloat16)
    packed = made.pack(MemoryLayout.BITMAP)
    bias = torch.randn(64, requires_grad=True)
    x = torch.randn(3, 48, requires_grad=True)
    ops.linear(x, packed, bias, 64).square().sum().backward()
    got = x.grad, bias.grad
    x.grad = bias.grad = None
    F.linear(x, made.weight.float(), bias).square().sum().backward()
    torch.testing.assert_close(got, (x.grad, bias.grad), rtol=1e-4, atol=1e-5)


def test_gradient_of_a_group() -> None:
    made = [case(rows, 48, 0.5, torch.bfloat16) for rows in (64, 9)]
    bias, x = torch.randn(64, requires_grad=True), torch.randn(2, 3, 48, requires_grad=True)
    packed = [each.pack(MemoryLayout.SPLIT) for each in made]
    first, second = ops.linear_group(x, packed[0], bias, 64, packed[1], None, 9)
    got = torch.autograd.grad(first.square().sum() + second.square().sum(), (x, bias))
    first, second = F.linear(x, made[0].weight.float(), bias), F.linear(x, made[1].weight.float())
    expected = torch.autograd.grad(first.square().sum() + second.square().sum(), (x, bias))
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_forced_instruction_set_that_does_not_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UnsupportedCPU, match=r"'sse9' cannot run here. Use one of portable"):
        native.use_isa("sse9")
    monkeypatch.setenv("SPARSEKIT_ISA", "sse9")
    native.library.cache_clear()
    with pytest.raises(UnsupportedCPU, match="SPARSEKIT_ISA"):
        native.library()
    monkeypatch.setenv("SPARSEKIT_ISA", "portable")
    native.library.cache_clear()
    assert native.isa() == "portable"
    monkeypatch.undo()
    native.library.cache_clear()


def test_missing_and_foreign_libraries(tmp_path: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    missing = tmp_path / "no.so"  # type: ignore[operator]
    with pytest.raises(KernelsMissing, match="not compiled"):
        native.load(missing)
    missing.write_bytes(b"not a library")
    with pytest.raises(KernelsMissing, match="cannot be loaded"):
        native.load(missing)
    monkeypatch.setattr(native, "LIBRARY", missing)
    native.library.cache_clear()
    assert native.available() is False
    assert str(missing) in str(native.missing_reason())
    monkeypatch.undo()
    native.library.cache_clear()
    assert native.available() is True


def test_unknown_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPARSEKIT_BACKEND", "cuda9")
    with pytest.raises(KernelError, match="no backend 'cuda9'"):
        ops.register.__wrapped__()
