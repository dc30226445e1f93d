"""Driving a benchmark: one worker process per contender, loaded one after the other, measured in turns."""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparsekit.benchmark.baseline import find_baseline, require_same_vocabulary
from sparsekit.benchmark.process import ANSWER_SECONDS, Worker
from sparsekit.benchmark.result import Benchmark, Contender, Layer, Round, noise
from sparsekit.describe import tools
from sparsekit.errors import UsageError
from sparsekit.lazy import torch
from sparsekit.machine import cpuinfo, last_level_cache_bytes, load_per_core, usable_cores
from sparsekit.models.source import ModelSource, open_model
from sparsekit.plan import BASE_MEMORY_BYTES, available_memory_bytes, require_memory
from sparsekit.progress import Reporter, track
from sparsekit.runtime import native
from sparsekit.runtime.layers import Runtime

_BUSY = 0.5  # waiting processes per core
_CHUNK = 16 << 20


@dataclass(frozen=True)
class BenchRequest:
    """What to measure.

    Attributes:
        model: Checkpoint folder, packed or dense.
        baseline: Dense model; None: the one the checkpoint was made from, if it is on this disk.
        prompt_tokens, new_tokens: Random prompt, greedy answer, in every round.
        rounds: That count; one more is dropped.
        threads: For every contender; None: torch's own choice.
        streaming: Measure the baseline with the streaming dense kernel too.
        seed: Of the prompt.
        trust_remote_code: Allow code of the models to run.
        answer_seconds: A worker that is silent for longer is ended.
    """

    model: str
    baseline: str | None = None
    prompt_tokens: int = 128
    new_tokens: int = 32
    rounds: int = 5
    threads: int | None = None
    streaming: bool = True
    seed: int = 0
    trust_remote_code: bool = False
    answer_seconds: float = ANSWER_SECONDS


def bench(request: BenchRequest, reporter: Reporter) -> Benchmark:
    """Measure a checkpoint beside its baseline.

    Raises:
        UsageError: No baseline, or more tokens than the models read.
        ModelError: A model cannot be opened, or the two have different vocabularies.
        OutOfMemory: The models do not fit side by side.
        WorkerLost: A contender died or hangs.
    """
    busy = load_per_core()  # before anything of ours runs
    trust = request.trust_remote_code
    ours = open_model(request.model, reporter, trust_remote_code=trust)
    baseline = open_model(find_baseline(ours, request.baseline), reporter, trust_remote_code=trust)
    require_same_vocabulary(ours, baseline)
    _require_room(request, ours, baseline)
    threads = request.threads or torch.get_num_threads()
    sources = {"packed": ours, "torch": baseline}
    kernels = native.available()
    if request.streaming and kernels:
        sources["streaming"] = baseline
    _require_memory(list(sources.values()), kernels)
    _warm({*_files(ours), *_files(baseline)}, reporter)
    prompt = torch.randint(
        ours.config.get_text_config().vocab_size,
        (request.prompt_tokens,),
        generator=torch.Generator().manual_seed(request.seed),
    ).tolist()
    contenders, layers = _measure(request, sources, threads, prompt, reporter)
    return Benchmark(
        model=request.model,
        baseline=baseline.name,
        settings={
            "prompt_tokens": request.prompt_tokens,
            "new_tokens": request.new_tokens,
            "rounds": request.rounds,
            "threads": threads,
            "seed": request.seed,
        },
        machine=_machine(busy),
        contenders=contenders,
        layers=layers,
        warnings=tuple(_warnings(ours, contenders, busy)),
    )


def _measure(
    request: BenchRequest, sources: dict[str, ModelSource], threads: int, prompt: list[int], reporter: Reporter
) -> tuple[tuple[Contender, ...], tuple[Layer, ...]]:
    """Run all contenders in processes of their own; whatever happens, they end here."""
    # Every worker computes with as many threads as it is told, from the first import on; nothing asks the Hub.
    environment = {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
    with ExitStack() as stack:
        workers: dict[str, Worker] = {}
        loaded: dict[str, dict[str, Any]] = {}
        for name in track(sources, reporter, "load", len(sources), "models"):
            workers[name] = stack.enter_context(Worker(name, environment, request.answer_seconds))
            folder = str(sources[name].folder.resolve())
            options = {"threads": threads, "trust_remote_code": request.trust_remote_code}
            loaded[name] = workers[name].ask("load", folder=folder, kind=name, **options)
        names = list(workers)
        rounds: dict[str, list[Round]] = {name: [] for name in names}
        for number in track(range(request.rounds + 1), reporter, "measure", request.rounds + 1, "rounds"):
            first = number % len(names)  # everybody begins a round now and then
            for name in names[first:] + names[:first]:
                answer = workers[name].ask("round", prompt=prompt, new_tokens=request.new_tokens)
                rounds[name].append(Round(**answer))
        memory = {name: worker.ask("memory") for name, worker in workers.items()}
        for name in names[1:]:
            workers[name].close()
        layers = _layers(workers["packed"], request.rounds, reporter) if native.available() else ()
    return tuple(
        Contender(
            name=name,
            folder=str(sources[name].folder),
            disk_bytes=sum(file.stat().st_size for file in _files(sources[name])),
            prompt_tokens=len(prompt),
            new_tokens=request.new_tokens,
            rounds=tuple(rounds[name][1:]),
            **{**loaded[name], "runtime": Runtime(**loaded[name]["runtime"])},
            **memory[name],
        )
        for name in names
    ), layers


def _layers(worker: Worker, rounds: int, reporter: Reporter) -> tuple[Layer, ...]:
    count = worker.ask("groups")
    groups = track(range(count), reporter, "kernels", count, "kinds of layers")
    return tuple(Layer(**worker.ask("layer", group=group, rounds=rounds)) for group in groups)


def _require_room(request: BenchRequest, *sources: ModelSource) -> None:
    asked = request.prompt_tokens + request.new_tokens
    for source in sources:
        if asked > source.max_length:
            raise UsageError(
                f"{request.prompt_tokens} prompt and {request.new_tokens} new tokens are {asked:,}, "
                f"{source.name} reads {source.max_length:,}",
                hint="Lower --prompt-tokens or --new-tokens.",
            )


def _require_memory(sources: Sequence[ModelSource], kernels: bool) -> None:
    """Refuse models that do not fit side by side: then the disk would be measured."""
    from sparsekit.benchmark.layers import WORKING_SET_BYTES

    need = sum(BASE_MEMORY_BYTES + source.weights.total_bytes for source in sources)
    need += 3 * WORKING_SET_BYTES if kernels else 0
    require_memory(need, f"benchmarking {len(sources)} models side by side", "Leave one out with --no-streaming.")


def _files(source: ModelSource) -> list[Path]:
    return [source.weights.path(file) for file in source.weights.files]


def _warm(files: Collection[Path], reporter: Reporter) -> None:
    """Read the weight files once, so that what is timed later is loading and not whose file the disk has seen last."""
    total = sum(file.stat().st_size for file in files)
    if total > (available_memory_bytes() or 0) // 2:
        return
    for path in track(sorted(files), reporter, "read", len(files), "weight files"):
        with path.open("rb", buffering=0) as file:
            while file.read(_CHUNK):
                pass


def _machine(busy: float | None) -> dict[str, Any]:
    """Return what the figures depend on; figures of machines that differ in it cannot be compared."""
    return {
        "processor": cpuinfo("model name"),
        "cores": usable_cores(),
        "last_level_cache_bytes": last_level_cache_bytes(),
        "load_per_core": busy,
        "isa": native.isa() if native.available() else None,
        "versions": tools(),
        "environment": {
            name: os.environ[name]
            for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "SPARSEKIT_ISA", "SPARSEKIT_RUNTIME", "SPARSEKIT_BACKEND")
            if name in os.environ
        },
    }


def _warnings(ours: ModelSource, contenders: tuple[Contender, ...], busy: float | None) -> list[str]:
    found = []
    if busy is not None and busy > _BUSY:
        found.append(f"other work is running here ({busy:.1f} processes per core): ratios are less certain")
    found += noise(contenders)
    if (reason := native.missing_reason()) is not None:
        found.append(f"no kernels, so no packed layers, no tuned dense model and no kernel table: {reason}")
    elif not contenders[0].runtime.packed:
        why = "they are unpacked (SPARSEKIT_RUNTIME)" if ours.packed else "the checkpoint is dense"
        found.append(f"no packed layer was found in {ours.name}: {why}")
    return found
