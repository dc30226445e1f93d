"""`sparsekit bench` for real, on tiny models: what is measured, what is refused, and that no process outlives it."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from sparsekit.benchmark.process import Worker
from sparsekit.benchmark.result import METRICS
from sparsekit.benchmark.session import BenchRequest, bench
from sparsekit.errors import ModelError, UsageError, WorkerLost
from sparsekit.progress import Silent
from tests.fault.command import PROGRAM, check_refusal, invoke
from tests.runtime.support import prune
from tests.support import tiny

QUICK = ("--prompt-tokens", "8", "--new-tokens", "4", "--rounds", "1", "--threads", "1")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    source = tiny.save("llama", folder / "source", hidden_size=64, intermediate_size=128)
    return source, prune(source, folder / "packed", "auto"), prune(source, folder / "dense", "dense")


# --- measuring ---------------------------------------------------------------------------------------------
def test_a_packed_checkpoint_beside_the_model_it_was_made_from(models, tmp_path):
    source, packed, _ = models
    ended = invoke("bench", packed, *QUICK, "--rounds", 2, "--save", tmp_path / "b.json", "--plot", tmp_path / "b.svg")
    assert ended.code == 0, ended.err
    assert max(map(len, ended.out.splitlines())) <= 80
    assert "21 of 22 linears packed" in " ".join(ended.out.split())  # a long path wraps
    assert (tmp_path / "b.svg").stat().st_size > 1000
    document = json.loads((tmp_path / "b.json").read_text())
    assert document["baseline"] == str(source)  # from the report, for no --baseline was given
    assert [contender["name"] for contender in document["contenders"]] == ["packed", "torch", "streaming"]
    for contender in document["contenders"]:
        assert len(contender["rounds"]) == 2
        assert all(contender[metric.key] > 0 for metric in METRICS)
        assert contender["peak_bytes"] >= contender["resident_bytes"] > contender["model_bytes"]
    ours, torch, streaming = document["contenders"]
    assert ours["runtime"]["packed"] == 21
    assert torch["runtime"]["packed"] == torch["streaming_linears"] == 0
    assert streaming["streaming_linears"] == 22
    assert torch["disk_bytes"] == (source / "model.safetensors").stat().st_size
    assert document["machine"]["versions"]["torch"]
    assert document["machine"]["isa"] == ours["runtime"]["isa"]
    layers = document["layers"]
    assert sum(layer["count"] for layer in layers) == 22
    assert {layer["sparsity"] for layer in layers if layer["pattern"]} == {0.5}
    head = next(layer for layer in layers if layer["example"] == "lm_head")
    assert (head["rows"], head["cols"], head["bits_per_weight"]) == (tiny.VOCAB, 64, 32)
    assert all(layer["bits_per_weight"] < 32 for layer in layers if layer is not head)
    assert all(layer["seconds"] > 0 and layer["roofline_seconds"] > 0 for layer in layers)


def test_a_dense_checkpoint_is_measured_and_called_dense(models):
    source, _, dense = models
    ended = invoke("bench", dense, "--baseline", source, *QUICK, "--no-streaming", "--json")
    assert ended.code == 0, ended.err
    document = json.loads(ended.out)
    assert [contender["name"] for contender in document["contenders"]] == ["packed", "torch"]
    assert document["contenders"][0]["runtime"] == {
        "packed": 0,
        "linears": 22,
        "isa": None,
        "signals": 0,
        "skipping": 0,
    }
    assert any("no packed layer was found" in text for text in document["warnings"])


# --- refusals ----------------------------------------------------------------------------------------------
def test_bad_input(models, tmp_path):
    source, packed, _ = models
    check_refusal(invoke("bench", tmp_path / "nowhere"), 3, "does not exist")
    check_refusal(invoke("bench", source), 2, "not recorded", "--baseline MODEL")
    check_refusal(invoke("bench", packed, "--prompt-tokens", 64), 2, "reads 64", "--prompt-tokens")
    check_refusal(invoke("bench", packed, "--plot", tmp_path / "x.pdf"), 2, ".png or .svg")
    other = tiny.save("llama", tmp_path / "other", vocab_size=100)
    check_refusal(invoke("bench", packed, "--baseline", other, *QUICK), 3, "100 tokens", "96", "not the model")


def test_a_recorded_baseline_that_is_gone_or_changed(models, tmp_path):
    _, packed, _ = models
    moved = tmp_path / "moved"
    shutil.copytree(packed, moved)
    report = json.loads((moved / "report.json").read_text())
    for name in (tmp_path / "gone", packed):
        report["model"]["name"] = str(name)
        (moved / "report.json").write_text(json.dumps(report))
        with pytest.raises(UsageError, match=r"made from .* not here, or not as it was then.*--baseline MODEL"):
            bench(BenchRequest(str(moved)), Silent())


# --- processes ---------------------------------------------------------------------------------------------
def test_a_worker_that_hangs_or_is_killed_is_an_error():
    with Worker("slow", {}, answer_seconds=0.05) as slow, pytest.raises(WorkerLost, match=r"slow, load.*within 0.05 s"):
        slow.ask("load")
    assert gone(slow.pid)
    with Worker("killed", {}) as killed:
        os.kill(killed.pid, signal.SIGKILL)
        with pytest.raises(WorkerLost, match=r"killed by SIGKILL.*memory"):
            killed.ask("load")


def test_errors_and_last_words_of_a_worker(tmp_path):
    with Worker("broken", {}) as worker:
        with pytest.raises(ModelError, match="does not exist"):
            worker.ask("load", folder=str(tmp_path / "nowhere"), kind="torch", threads=1, trust_remote_code=False)
        with pytest.raises(WorkerLost, match=r"broken, nonsense: ended with exit code 1; its last words: .*nonsense"):
            worker.ask("nonsense")
    assert gone(worker.pid)


def gone(pid):
    return not Path(f"/proc/{pid}").exists()


def children(pid):
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


class Killer(Silent):
    """Kills a worker when the first round is over."""

    workers = ()

    def advance(self, task, amount=1):
        if task == "measure" and not self.workers:
            self.workers = children(os.getpid())
            os.kill(self.workers[-1], signal.SIGKILL)


def test_a_worker_that_dies_ends_the_others(models):
    source, packed, _ = models
    killer = Killer()
    request = BenchRequest(str(packed), str(source), prompt_tokens=8, new_tokens=4, rounds=100_000, streaming=False)
    with pytest.raises(WorkerLost, match="round: was killed by SIGKILL"):
        bench(request, killer)
    assert len(killer.workers) == 2
    assert all(gone(pid) for pid in killer.workers)


def test_nothing_outlives_an_interrupted_command(models):
    source, packed, _ = models
    words = ["bench", str(packed), "--baseline", str(source), "--rounds", "100000", *QUICK[:4], "--no-streaming"]
    parent = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    while "measure:" not in parent.stderr.readline():  # both are loaded and at work
        assert parent.poll() is None
    workers = children(parent.pid)
    assert len(workers) == 2
    os.kill(parent.pid, signal.SIGINT)
    out, err = parent.communicate(timeout=60)
    assert parent.returncode == 130, err
    assert out == ""
    assert "Traceback" not in err
    assert "interrupted" in err
    assert all(gone(pid) for pid in workers)
