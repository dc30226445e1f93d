"""Quantising and measuring a GGUF file with llama.cpp; run by a Python that has PyPI's llama-cpp-python.

    llamacpp_job.py quantise SOURCE TARGET Q8_0|Q4_K_M
    llamacpp_job.py measure FILE PROMPT_TOKENS NEW_TOKENS THREADS ROUNDS [LOGITS]

`measure` prints one JSON document: seconds to load (with the first token, since the file is mapped), prompt tokens a
second, new tokens a second (medians of the rounds), resident bytes. LOGITS takes the float32 logits after the prompt.
"""

from __future__ import annotations

import ctypes
import json
import sys
from pathlib import Path
from statistics import median
from time import perf_counter

import llama_cpp.llama_cpp as llama
from prompt import VOCABULARY, prompt


def quantise(source: str, target: str, kind: str) -> None:
    """Write SOURCE in another file type."""
    params = llama.llama_model_quantize_default_params()
    params.ftype = getattr(llama, f"LLAMA_FTYPE_MOSTLY_{kind}")
    if llama.llama_model_quantize(source.encode(), target.encode(), ctypes.byref(params)):
        sys.exit(f"error: llama.cpp could not write {target} as {kind}")


class Model:
    """A model with its context.

    Raises:
        SystemExit: The file cannot be loaded.
    """

    def __init__(self, path: str, length: int, threads: int) -> None:
        self.model = llama.llama_model_load_from_file(path.encode(), llama.llama_model_default_params())
        if not self.model:
            sys.exit(f"error: llama.cpp cannot load {path}")
        params = llama.llama_context_default_params()
        params.n_ctx, params.n_threads, params.n_threads_batch = length, threads, threads
        self.context = llama.llama_init_from_model(self.model, params)

    def feed(self, tokens: list[int]) -> None:
        """Run tokens at the next positions."""
        ids = (llama.llama_token * len(tokens))(*tokens)
        if code := llama.llama_decode(self.context, llama.llama_batch_get_one(ids, len(tokens))):
            sys.exit(f"error: llama_decode returned {code}")
        llama.llama_synchronize(self.context)

    def forget(self) -> None:
        """Clear the cache of keys and values."""
        llama.llama_memory_clear(llama.llama_get_memory(self.context), True)

    def logits(self) -> list[float]:
        """Return the logits of the last position."""
        return llama.llama_get_logits_ith(self.context, -1)[:VOCABULARY]


def measure(path: str, prompt_tokens: int, new_tokens: int, threads: int, rounds: int, logits: str | None) -> None:
    """Measure one file and print the result."""
    start = perf_counter()
    model = Model(path, prompt_tokens + new_tokens + 1, threads)
    model.feed([1])
    load = perf_counter() - start
    prefill, decode = [], []
    for _ in range(rounds):
        model.forget()
        start = perf_counter()
        model.feed(prompt(prompt_tokens))
        prefill.append(prompt_tokens / (perf_counter() - start))
        values = model.logits()
        start = perf_counter()
        for i in range(new_tokens):
            model.feed([(31 * i + 5) % VOCABULARY])
        decode.append(new_tokens / (perf_counter() - start))
    if logits:
        Path(logits).write_bytes(bytes((ctypes.c_float * VOCABULARY)(*values)))
    status = Path("/proc/self/status").read_text().splitlines()
    resident = next(int(line.split()[1]) << 10 for line in status if line.startswith("VmRSS"))
    found = {"load_seconds": load, "prefill_tokens_per_second": median(prefill)}
    found |= {"decode_tokens_per_second": median(decode), "resident_bytes": resident}
    print(json.dumps(found))


def main() -> None:
    """Run one of the two commands."""
    callback = llama.llama_log_callback(lambda level, text, data: None)
    llama.llama_log_set(callback, ctypes.c_void_p())
    llama.llama_backend_init()
    command, *rest = sys.argv[1:]
    if command == "quantise":
        quantise(*rest)
    else:
        path, *numbers = rest[:5]
        measure(path, *map(int, numbers), rest[5] if len(rest) > 5 else None)


if __name__ == "__main__":
    main()
