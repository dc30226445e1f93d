"""What a benchmark found, and the comparison drawn from it."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from sparsekit import fs
from sparsekit.runtime.layers import Runtime
from sparsekit.units import bytes_text

SCHEMA = 1
_EQUAL = 0.005  # a smaller difference than what is printed decides nothing
_NOISY = 0.25  # spread between rounds from which on ratios deserve a warning


@dataclass(frozen=True)
class Round:
    """One round of one contender.

    Attributes:
        prefill_seconds: One forward pass over the prompt, logits of its last token only.
        first_token_seconds: From the call of generate to its first token.
        decode_seconds: From the first token to the last.
    """

    prefill_seconds: float
    first_token_seconds: float
    decode_seconds: float


@dataclass(frozen=True)
class Contender:
    """One way of running the model, measured.

    Attributes:
        name: `packed` (the checkpoint through this runtime), `torch` (the baseline in torch eager), `streaming` (the
            baseline with the streaming dense kernel in its linears).
        folder: What was loaded.
        dtype: Dtype of the activations.
        runtime: What multiplies.
        streaming_linears: Linears with the streaming dense kernel.
        load_seconds: To open and load, libraries imported and weight files in the page cache before.
        disk_bytes: Of the weight files.
        resident_bytes: Of the process after generation, mapped weights included.
        model_bytes: By how much that grew since the libraries were imported.
        peak_bytes: Largest resident size of the process.
        prompt_tokens, new_tokens: In every round.
        rounds: Without the dropped first one.
    """

    name: str
    folder: str
    dtype: str
    runtime: Runtime
    streaming_linears: int
    load_seconds: float
    disk_bytes: int
    resident_bytes: int | None
    model_bytes: int | None
    peak_bytes: int
    prompt_tokens: int
    new_tokens: int
    rounds: tuple[Round, ...]

    @property
    def prefill_tokens_per_second(self) -> float:
        """Prompt tokens per second, median of the rounds."""
        return self.prompt_tokens / statistics.median(found.prefill_seconds for found in self.rounds)

    @property
    def decode_tokens_per_second(self) -> float:
        """New tokens per second after the first, median of the rounds."""
        return (self.new_tokens - 1) / statistics.median(found.decode_seconds for found in self.rounds)

    @property
    def first_token_seconds(self) -> float:
        """Time to the first token, median of the rounds."""
        return statistics.median(found.first_token_seconds for found in self.rounds)

    @property
    def spread(self) -> float:
        """How far decoding varied: slowest over fastest round, less one."""
        seconds = [found.decode_seconds for found in self.rounds]
        return max(seconds) / min(seconds) - 1

    def to_json(self) -> dict[str, Any]:
        """Return fields and medians."""
        return {**asdict(self), **{metric.key: metric.of(self) for metric in METRICS}}


@dataclass(frozen=True)
class Metric:
    """A row of the comparison.

    Attributes:
        key: Its name in the JSON document.
        label: Its name in the table.
        kind: `speed` (more is better), `seconds` or `bytes` (less is better).
        of: Reads it off a contender; None: not known on this system.
        text: Writes it.
    """

    key: str
    label: str
    kind: Literal["speed", "seconds", "bytes"]
    of: Callable[[Contender], float | None]
    text: Callable[[float], str]

    def quotient_text(self, quotient: float) -> str:
        """Write a quotient of `Benchmark.quotient`: times as fast, or the share of bytes."""
        return f"{quotient:.0%}" if self.kind == "bytes" else f"{quotient:.2f}x"


def _seconds(value: float) -> str:
    return f"{1e3 * value:.3g} ms" if value < 0.9995 else f"{value:.2f} s"


def _speed(value: float) -> str:
    return f"{value:,.0f}" if value >= 99.5 else f"{value:.1f}"


METRICS = (
    Metric("decode_tokens_per_second", "decode, tokens/s", "speed", lambda c: c.decode_tokens_per_second, _speed),
    Metric("prefill_tokens_per_second", "prefill, tokens/s", "speed", lambda c: c.prefill_tokens_per_second, _speed),
    Metric("first_token_seconds", "time to first token", "seconds", lambda c: c.first_token_seconds, _seconds),
    Metric("load_seconds", "load", "seconds", lambda c: c.load_seconds, _seconds),
    Metric("disk_bytes", "weights on disk", "bytes", lambda c: c.disk_bytes, bytes_text),
    Metric("resident_bytes", "resident memory", "bytes", lambda c: c.resident_bytes, bytes_text),
    Metric("model_bytes", "  of it the model", "bytes", lambda c: c.model_bytes, bytes_text),
)


@dataclass(frozen=True)
class Layer:
    """Layers of one shape and kernel, timed at batch 1 on copies of one of them beyond the last-level cache.

    Attributes:
        count: Number of layers.
        example: Name of the layer that was timed.
        rows, cols: Outputs, inputs.
        kernel: Layout in memory and dtype of the values, or what multiplies the dense weight.
        isa: Instruction set of the kernel; None: torch chooses.
        pattern: From the manifest; None: dense, or not recorded.
        sparsity: Mean share of zeros.
        bits_per_weight: Mean, in memory.
        nbytes: Bytes of the timed weight in memory.
        working_set_bytes: Of all its copies.
        seconds: Of one product.
        roofline_seconds: Reading as many bytes takes that long at the bandwidth measured in the same rounds.
        torch_seconds: `torch.nn.functional.linear` with the dense weight.
        dense_seconds: The streaming dense kernel.
    """

    count: int
    example: str
    rows: int
    cols: int
    kernel: str
    isa: str | None
    pattern: str | None
    sparsity: float
    bits_per_weight: float
    nbytes: int
    working_set_bytes: int
    seconds: float
    roofline_seconds: float
    torch_seconds: float
    dense_seconds: float

    @property
    def bytes_per_second(self) -> float:
        """Speed at which the weight was read."""
        return self.nbytes / self.seconds

    @property
    def roofline_share(self) -> float:
        """Share of the read bandwidth; above 1 is drift of the machine."""
        return self.roofline_seconds / self.seconds

    def to_json(self) -> dict[str, Any]:
        """Return fields and quotients."""
        return {
            **asdict(self),
            "gb_per_second": self.bytes_per_second / 1e9,
            "roofline_share": self.roofline_share,
            "times_torch": self.torch_seconds / self.seconds,
            "times_dense": self.dense_seconds / self.seconds,
        }


@dataclass(frozen=True)
class Benchmark:
    """Everything that was measured.

    Attributes:
        model, baseline: What the user called them.
        settings: Tokens, rounds, threads, seed.
        machine: Processor, load, instruction set, versions.
        contenders: The checkpoint first.
        layers: Empty without kernels.
        warnings: What makes the figures less certain, and what is missing.
    """

    model: str
    baseline: str
    settings: Mapping[str, int]
    machine: Mapping[str, Any]
    contenders: tuple[Contender, ...]
    layers: tuple[Layer, ...]
    warnings: tuple[str, ...]

    @property
    def ours(self) -> Contender:
        """The checkpoint that was benchmarked."""
        return self.contenders[0]

    def quotient(self, metric: Metric, other: Contender) -> float | None:
        """Return how many times as fast the checkpoint is; for bytes, its size as a share of the other's."""
        mine, theirs = metric.of(self.ours), metric.of(other)
        if mine is None or theirs is None or not mine or not theirs:
            return None
        return theirs / mine if metric.kind == "seconds" else mine / theirs

    def dense_is_better(self) -> list[tuple[Metric, Contender]]:
        """Return in what, and which dense contender, is better than the checkpoint."""
        found = []
        for metric in METRICS:
            if metric.key == "model_bytes":
                continue  # a part of resident_bytes
            for other in self.contenders[1:]:
                quotient = self.quotient(metric, other)
                gain = None if quotient is None else 1 / quotient if metric.kind == "bytes" else quotient
                if gain is not None and gain < 1 - _EQUAL:
                    found.append((metric, other))
        return found

    def to_json(self) -> dict[str, Any]:
        """Return the document that `--json` prints."""
        return {
            "schema": SCHEMA,
            "model": self.model,
            "baseline": self.baseline,
            "settings": dict(self.settings),
            "machine": dict(self.machine),
            "contenders": [contender.to_json() for contender in self.contenders],
            "quotients": {
                other.name: {metric.key: self.quotient(metric, other) for metric in METRICS}
                for other in self.contenders[1:]
            },
            "dense_is_better": [{"metric": m.key, "contender": c.name} for m, c in self.dense_is_better()],
            "layers": [layer.to_json() for layer in self.layers],
            "warnings": list(self.warnings),
        }


def noise(contenders: tuple[Contender, ...]) -> list[str]:
    """Return a warning where rounds differ so much that ratios are uncertain."""
    worst = max(contenders, key=lambda contender: contender.spread)
    if worst.spread < _NOISY:
        return []
    return [f"decoding varied by {worst.spread:.0%} between rounds ({worst.name}): take ratios with care"]


def write(found: Benchmark, path: Path) -> None:
    """Write the JSON document, replacing a file of that name.

    Raises:
        ResourceError: The file cannot be written.
    """
    fs.replace_file(path, (json.dumps(found.to_json(), indent=2) + "\n").encode())
