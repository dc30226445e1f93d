"""Microseconds of one call with a 16 x 16 weight, where nothing but the way to the kernel takes time."""

from __future__ import annotations

import copy
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

from sparsekit.runtime import ops
from sparsekit.runtime.dense import use_streaming
from sparsekit.runtime.modules import SparseLinear

CALLS = 2000


def report(rounds: int) -> None:
    """Print a line for each way to multiply.

    CPU time of one thread and the least of the rounds, so that what else runs on the machine counts little.
    """
    torch.set_num_threads(1)
    plain = torch.nn.Linear(16, 16, bias=False).bfloat16()
    weight = plain.weight.detach().tril()
    plain.weight = torch.nn.Parameter(weight)
    streaming = torch.nn.Sequential(copy.deepcopy(plain))
    use_streaming(streaming)
    siblings = [SparseLinear(copy.deepcopy(plain)) for _ in range(3)]
    sparse = SparseLinear(copy.deepcopy(plain))
    packed: Any = sparse.packed
    x = torch.randn(1, 1, 16).bfloat16()

    def three() -> None:
        shared = x.view(1, 1, 16)
        for layer in siblings:
            layer(shared)

    ways: dict[str, tuple[int, Callable[[], object]]] = {
        "torch.empty": (1, lambda: torch.empty(1, 1, 16)),
        "linear_packed": (1, lambda: ops.linear(x, packed, None, 16)),
        "linear_packed_3, each": (3, lambda: ops.linear_group(x, *(packed, None, 16) * 3)),
        "linear_dense": (1, lambda: ops.linear_dense(x, weight, None)),
        "SparseLinear": (1, lambda: sparse(x)),
        "SparseLinear of 3, each": (3, three),
        "StreamingLinear": (1, lambda: streaming[0](x)),
        "nn.Linear": (1, lambda: plain(x)),
    }
    best = dict.fromkeys(ways, float("inf"))
    for _ in range(rounds):
        for name, (products, way) in ways.items():
            start = time.thread_time()
            for _ in range(CALLS):
                way()
            best[name] = min(best[name], (time.thread_time() - start) / CALLS / products)
    for name, seconds in best.items():
        sys.stdout.write(f"{name:24} {seconds * 1e6:5.2f} us a product\n")
