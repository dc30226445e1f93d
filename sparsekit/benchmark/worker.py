"""The child process of one contender: loads a model once, then measures whenever it is asked.

    python -m sparsekit.benchmark.worker

Questions and answers are JSON, one document a line: `{"task": name, ...}` in, `{"result": ...}` or `{"error": ...}`
out. What libraries print goes to standard error. The process ends with its standard input.
"""

from __future__ import annotations

import inspect
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, GenerationConfig
from transformers.generation.streamers import BaseStreamer

from sparsekit.benchmark.layers import KernelTable
from sparsekit.describe import peak_memory_bytes
from sparsekit.errors import ModelError, SparsekitError
from sparsekit.machine import resident_bytes
from sparsekit.models.source import open_model
from sparsekit.progress import Silent
from sparsekit.runtime.dense import use_streaming
from sparsekit.runtime.layers import describe_runtime


class Bench:
    """The tasks, one method each."""

    def __init__(self) -> None:
        self._model: Any = None
        self._folder = Path()
        self._threads = 1
        self._libraries_bytes: int | None = None

    def load(self, folder: str, kind: str, threads: int, trust_remote_code: bool) -> dict[str, Any]:
        """Load a model.

        Args:
            folder: Checkpoint.
            kind: `packed`, `torch` or `streaming`.
            threads: Threads to compute with.
            trust_remote_code: Allow code of the model to run.
        """
        torch.set_num_threads(threads)
        torch.set_grad_enabled(False)
        source = open_model(folder, Silent(), trust_remote_code=trust_remote_code)
        with torch.device("meta"):  # imports the architecture's code, which is not the loading of weights
            AutoModelForCausalLM.from_config(source.config, trust_remote_code=trust_remote_code)
        self._libraries_bytes = resident_bytes()
        start = time.perf_counter()
        source = open_model(folder, Silent(), trust_remote_code=trust_remote_code)
        self._model = source.load(packed=kind == "packed")
        streaming = use_streaming(self._model) if kind == "streaming" else 0
        seconds = time.perf_counter() - start
        # No end of text: exactly as many tokens as asked for, each the likeliest.
        self._model.generation_config = GenerationConfig(do_sample=False, use_cache=True)
        self._folder, self._threads = source.folder, threads
        return {
            "load_seconds": seconds,
            "dtype": str(source.dtype).removeprefix("torch."),
            "runtime": asdict(describe_runtime(self._model)),
            "streaming_linears": streaming,
        }

    def round(self, prompt: list[int], new_tokens: int) -> dict[str, float]:
        """Measure one round.

        Args:
            prompt: Token ids.
            new_tokens: At least 2.
        """
        ids = torch.tensor([prompt])
        # generate asks for the last token's logits too; the others are of no use
        last = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(self._model.forward).parameters else {}
        start = time.perf_counter()
        self._model(ids, use_cache=True, **last)
        prefill = time.perf_counter() - start
        clock = _Clock()
        start = time.perf_counter()
        self._model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, streamer=clock)
        _, first, *rest = clock.times  # the prompt comes first
        if len(rest) != new_tokens - 1:
            raise ModelError(f"made {len(rest) + 1} of {new_tokens} tokens", where=self._model.config.model_type)
        return {
            "prefill_seconds": prefill,
            "first_token_seconds": first - start,
            "decode_seconds": rest[-1] - first,
        }

    def memory(self) -> dict[str, int | None]:
        """Return resident bytes: now, by how much the model raised them, and the most there were."""
        now = resident_bytes()
        grown = None if now is None or self._libraries_bytes is None else now - self._libraries_bytes
        return {"resident_bytes": now, "model_bytes": grown, "peak_bytes": peak_memory_bytes()}

    @cached_property
    def _table(self) -> KernelTable:
        """Made when it is asked for: it unpacks layers, which would count as memory of the model."""
        return KernelTable(self._model, self._folder, self._threads)

    def groups(self) -> int:
        """Return how many groups of layers there are to time."""
        return len(self._table.groups)

    def layer(self, group: int, rounds: int) -> dict[str, Any]:
        """Time one group of layers."""
        return asdict(self._table.measure(self._table.groups[group], rounds))


class _Clock(BaseStreamer):  # type: ignore[misc]
    """Notes when the prompt and each token came."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


def main() -> None:
    """Answer questions until standard input ends."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print must not look like an answer
    bench = Bench()
    for line in sys.stdin:
        question = json.loads(line)
        task: Callable[..., Any] = getattr(bench, question.pop("task"))
        try:
            answer = {"result": task(**question)}
        except SparsekitError as error:
            described = {"message": error.message, "where": error.where, "hint": error.hint}
            answer = {"error": {"type": type(error).__name__, **described}}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
