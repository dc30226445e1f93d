"""Benchmarks made by hand, for what is drawn and written from them."""

from __future__ import annotations

from dataclasses import replace

from sparsekit.benchmark.result import Benchmark, Contender, Layer, Round
from sparsekit.runtime.layers import Runtime

ROUND = Round(prefill_seconds=0.5, first_token_seconds=0.51, decode_seconds=1.55)
CONTENDER = Contender(
    name="torch",
    folder="/models/llama",
    dtype="bfloat16",
    runtime=Runtime(0, 225, None),
    streaming_linears=0,
    load_seconds=4.2,
    disk_bytes=16_060_522_240,
    resident_bytes=16_900_000_000,
    model_bytes=16_400_000_000,
    peak_bytes=17_000_000_000,
    prompt_tokens=512,
    new_tokens=32,
    rounds=(ROUND, replace(ROUND, decode_seconds=1.56), replace(ROUND, decode_seconds=1.54)),
)
LAYER = Layer(
    count=32,
    example="model.layers.0.mlp.down_proj",
    rows=128256,
    cols=14336,
    kernel="split bf16",
    isa="avx512bf16",
    pattern="unstructured",
    sparsity=0.5,
    bits_per_weight=6.573,
    nbytes=10_000_000,
    working_set_bytes=260_000_000,
    seconds=0.001,
    roofline_seconds=0.0009,
    torch_seconds=0.0048,
    dense_seconds=0.0023,
)


def contender(name: str, speed: float, size: float) -> Contender:
    """Return a contender that is `speed` times as fast and `size` times as large as the plain one."""
    found = [
        Round(*(seconds / speed for seconds in (r.prefill_seconds, r.first_token_seconds, r.decode_seconds)))
        for r in CONTENDER.rounds
    ]
    packed = name == "packed"
    return replace(
        CONTENDER,
        name=name,
        rounds=tuple(found),
        load_seconds=CONTENDER.load_seconds / speed,
        runtime=Runtime(224 if packed else 0, 225, "avx512bf16" if packed else None),
        disk_bytes=round(CONTENDER.disk_bytes * size),
        resident_bytes=round(size * 16_900_000_000),
        model_bytes=round(size * 16_400_000_000),
    )


def benchmark(speed: float = 3.0, size: float = 0.45, *, streaming: bool = True) -> Benchmark:
    """Return a benchmark whose checkpoint is `speed` times as fast as torch; the tuned dense model is 1.5 times."""
    dense = [contender("torch", 1.0, 1.0), *([contender("streaming", 1.5, 1.0)] if streaming else [])]
    return Benchmark(
        model="/a/rather/long/path/to/models/meta-llama-3.1-8b-instruct-wanda-50",
        baseline="meta-llama/Llama-3.1-8B-Instruct",
        settings={"prompt_tokens": 512, "new_tokens": 32, "rounds": 3, "threads": 64, "seed": 0},
        machine={
            "processor": "Intel(R) Xeon(R) Platinum 8480+ CPU @ 2.00GHz",
            "cores": 112,
            "isa": "avx512bf16",
            "versions": {"sparsekit": "0.1.0", "torch": "2.13.0+cpu", "transformers": "5.23.0", "python": "3.11.7"},
        },
        contenders=(contender("packed", speed, size), *dense),
        layers=(LAYER, replace(LAYER, pattern="2:4"), replace(LAYER, kernel="torch bf16", sparsity=0.0, pattern=None)),
        warnings=("other work is running here (4.1 processes per core): ratios are less certain",),
    )
