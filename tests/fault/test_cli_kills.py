"""Runs that are killed, stopped or doubled, in processes of their own; whatever happens, the result is the same."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.support import tiny

from .command import (
    PROGRAM,
    Ended,
    Nursery,
    check_refusal,
    content,
    identity,
    leftovers,
    prune_arguments,
    settings,
    wait_for,
)

KILLS = 10
TEXT = "the quick brown fox jumps over the lazy dog. " * 80


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Enough blocks that a run can be met in the middle of it, and the text beside it."""
    folder = tmp_path_factory.mktemp("source")
    (folder / "text.txt").write_text(TEXT)
    return tiny.save("llama", folder / "llama", dtype=torch.bfloat16, num_hidden_layers=8)


@pytest.fixture(scope="module")
def nursery(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nursery]:
    with Nursery(tmp_path_factory.mktemp("nursery")) as started:
        yield started


@pytest.fixture(scope="module")
def reference(model: Path, nursery: Nursery, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float]:
    """An uninterrupted run, and how long it took."""
    out = tmp_path_factory.mktemp("reference") / "out"
    began = time.monotonic()
    assert nursery.run(wanda(model, out)).code == 0
    return out, time.monotonic() - began


def wanda(model: Path, out: Path, *more: str) -> list[str]:
    text = settings(f"calibration.source={model.parent / 'text.txt'}", "calibration.samples=12")
    return prune_arguments(model, out, *text, "-q", *more, recipe="wanda-50")


def begun(out: Path, blocks: int = 3) -> bool:
    """Whether a run has written some blocks, all but the last of them journaled."""
    return len(list(out.parent.glob(f"{out.name}.partial-*/model-*.safetensors"))) >= blocks


def interrupt(nursery: Nursery, arguments: list[str], out: Path, number: signal.Signals) -> Ended:
    """Start a command, send it a signal when it has finished a block."""
    child = nursery.start(arguments)
    wait_for(lambda: begun(out))
    os.kill(child.pid, number)
    return nursery.collect(child)


def test_killed_at_random_moments_and_run_again(
    model: Path, reference: tuple[Path, float], nursery: Nursery, tmp_path: Path
) -> None:
    """Each moment is drawn; kills pile up on one output until a run gets through, then it begins anew."""
    wanted, seconds = reference
    moments = random.Random(26)
    killed = resumed = 0
    out = tmp_path / "out"
    while killed < KILLS:
        began_with = len(list(tmp_path.glob("out.partial-*/model-*.safetensors")))
        child = nursery.start(wanda(model, out))
        time.sleep(moments.uniform(0.1, 1.1) * seconds)
        os.kill(child.pid, signal.SIGKILL)  # until it is collected its id is its own, even if it has ended
        ended = nursery.collect(child)
        assert ended.code in (0, -signal.SIGKILL), ended.err
        killed += ended.code != 0
        resumed += bool(began_with)
        if ended.code == 0:
            assert content(out).keys() == content(wanted).keys()
            assert identity(out) == identity(wanted)
            shutil.rmtree(out)
    ended = nursery.run(wanda(model, out))
    assert ended.code == 0, ended.err
    assert identity(out) == identity(wanted)
    assert leftovers(out) == ["out"]
    assert resumed, "no kill left anything to go on with"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stopped_by_the_user(
    number: signal.Signals, model: Path, reference: tuple[Path, float], nursery: Nursery, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    ended = interrupt(nursery, wanda(model, out), out, number)
    assert ended.code == 130
    assert ended.out == ""
    assert ended.err == "interrupted. Run the same command again to go on.\n"
    assert not out.exists()
    left = leftovers(out)
    assert len(left) == 2, left  # the finished blocks and their journal; the lock is released
    # The last one may be written, but not journaled.
    finished = sorted(tmp_path.glob("out.partial-*/model-*.safetensors"))[:-1]
    written = {path.name: path.stat().st_mtime_ns for path in finished}
    assert written
    ended = nursery.run([*wanda(model, out), "--json"])
    assert ended.code == 0, ended.err
    assert {name: (out / name).stat().st_mtime_ns for name in written} == written  # not computed again
    assert identity(out) == identity(reference[0])
    assert leftovers(out) == ["out"]


def test_stopped_as_json(model: Path, nursery: Nursery, tmp_path: Path) -> None:
    out = tmp_path / "out"
    ended = interrupt(nursery, wanda(model, out, "--json"), out, signal.SIGINT)
    assert ended.code == 130
    assert '"type": "Interrupted"' in ended.out
    assert ended.err == ""


def test_a_real_process_is_stopped(
    model: Path, reference: tuple[Path, float], nursery: Nursery, tmp_path: Path
) -> None:
    """The same without the nursery: the program as it is installed."""
    out = tmp_path / "out"
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, *wanda(model, out)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    wait_for(lambda: begun(out))
    process.send_signal(signal.SIGTERM)
    printed, said = process.communicate(timeout=60)
    assert (process.returncode, printed, said) == (130, "", "interrupted. Run the same command again to go on.\n")
    assert nursery.run(wanda(model, out)).code == 0
    assert identity(out) == identity(reference[0])


def test_two_runs_for_one_output(model: Path, reference: tuple[Path, float], nursery: Nursery, tmp_path: Path) -> None:
    """The second is told who writes there; the first does not notice."""
    out = tmp_path / "out"
    child = nursery.start(wanda(model, out))
    wait_for(lambda: begun(out))
    os.kill(child.pid, signal.SIGSTOP)  # so that it is there as long as the others need
    try:
        for more in ((), ("--no-resume",), ("--overwrite",)):
            says = [str(out), f"process {child.pid} is writing it", "Wait for it"]
            check_refusal(nursery.run(wanda(model, out, *more)), 5, *says)
    finally:
        os.kill(child.pid, signal.SIGCONT)
    assert nursery.collect(child).code == 0
    assert identity(out) == identity(reference[0])


@pytest.mark.parametrize("hash_seed", ["0", "1"])
def test_hash_seed_threads_and_interruptions_change_nothing(
    hash_seed: str, model: Path, reference: tuple[Path, float], tmp_path: Path
) -> None:
    with Nursery(tmp_path, PYTHONHASHSEED=hash_seed) as nursery:
        for threads in (1, 2):
            nursery.threads = threads
            whole = tmp_path / f"whole-{threads}"
            assert nursery.run(wanda(model, whole)).code == 0
            assert identity(whole) == identity(reference[0])
            broken = tmp_path / f"broken-{threads}"
            assert interrupt(nursery, wanda(model, broken), broken, signal.SIGKILL).code == -signal.SIGKILL
            assert nursery.run(wanda(model, broken)).code == 0
            assert identity(broken) == identity(reference[0])


def test_killed_in_a_null(model: Path, nursery: Nursery, tmp_path: Path) -> None:
    """The null goes on with its blocks, and its folders go with the next run that ends, whatever that run is."""
    out = tmp_path / "out"
    arguments = [word for word in wanda(model, out, "--nulls", "random") if word != "--no-evaluate"]

    def killed_in_the_null() -> None:
        child = nursery.start(arguments)
        wait_for(lambda: begun(tmp_path / "out.null-random"))
        os.kill(child.pid, signal.SIGKILL)
        assert nursery.collect(child).code == -signal.SIGKILL

    killed_in_the_null()
    assert any(name.startswith("out.null-random") for name in leftovers(out))
    ended = nursery.run(arguments)
    assert ended.code == 0, ended.err
    assert "; random " in ended.out
    assert leftovers(out) == ["out"]
    shutil.rmtree(out)
    killed_in_the_null()
    assert nursery.run(wanda(model, out, "--no-resume")).code == 0
    assert leftovers(out) == ["out"]
