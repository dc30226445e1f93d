"""F04, F07, F08: two writers, changed settings, damaged journals and shards."""

from __future__ import annotations

import json
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from sparsekit.checkpoint.journal import Journal
from sparsekit.checkpoint.staging import StagedCheckpoint, is_finished, recover, run_id_of
from sparsekit.errors import Locked, OutputExists, ResumeMismatch, UnsafePath
from sparsekit.fs import sha256_file

from .disk import IDENTITY, files_of, save, shard_tensors

FULL = {
    "recipe": {"name": "wanda-50", "stages": [{"method": "wanda", "sparsity": 0.5, "pattern": "unstructured"}]},
    "model": {"fingerprint": {"model.safetensors": "ab" * 32}, "dtype": "bfloat16"},
    "calibration": {"fingerprint": "cd" * 32, "samples": 128},
    "seed": 0,
    "versions": {"sparsekit": "0.1.0", "torch": "2.13.0"},
}


def interrupt(out: Path, identity: dict[str, object] | None = None, shards: int = 3) -> Path:
    """Write `shards` shards and stop without committing; return the staged folder."""
    with StagedCheckpoint.open(out, identity or IDENTITY, overwrite=False, resume=True) as staged:
        for number in range(shards):
            staged.write_shard(f"block-{number}", f"model-{number}.safetensors", shard_tensors(number), {"kept": 7})
    return staged.folder


def finished(out: Path, shards: int = 3) -> list[bool]:
    with StagedCheckpoint.open(out, IDENTITY, overwrite=False, resume=True) as staged:
        return [staged.finished(f"block-{number}") is not None for number in range(shards)]


# --- F07 -----------------------------------------------------------------------------------------------------
CHANGES = [
    ("recipe.stages.0.sparsity", lambda i: i["recipe"]["stages"][0].update(sparsity=0.6), "0.5 -> 0.6"),
    ("recipe.stages.0.method", lambda i: i["recipe"]["stages"][0].update(method="random"), '"wanda" -> "random"'),
    ("recipe.stages.0.damp", lambda i: i["recipe"]["stages"][0].update(damp=1), "absent -> 1"),
    ("recipe.stages.0.pattern", lambda i: i["recipe"]["stages"][0].pop("pattern"), '"unstructured" -> absent'),
    ("recipe.name", lambda i: i["recipe"].update(name="x"), '"wanda-50" -> "x"'),
    ("model.fingerprint.model.safetensors", lambda i: i["model"].update(fingerprint={"model.safetensors": "x"}), "-> "),
    ("model.dtype", lambda i: i["model"].update(dtype="float16"), '"bfloat16" -> "float16"'),
    ("calibration.fingerprint", lambda i: i["calibration"].update(fingerprint="x"), "-> "),
    ("calibration.samples", lambda i: i["calibration"].update(samples=64), "128 -> 64"),
    ("seed", lambda i: i.update(seed=1), "0 -> 1"),
    ("versions.torch", lambda i: i["versions"].update(torch="2.14.0"), '"2.13.0" -> "2.14.0"'),
    ("versions.sparsekit", lambda i: i["versions"].update(sparsekit="0.2.0"), '"0.1.0" -> "0.2.0"'),
]


@pytest.mark.parametrize(("field", "change", "text"), CHANGES, ids=[field for field, _, _ in CHANGES])
def test_f07_changed_identity_is_refused_by_name(
    field: str, change: Callable[[dict[str, object]], object], text: str, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    staged = interrupt(out, FULL)
    before = files_of(tmp_path)
    identity = json.loads(json.dumps(FULL))
    change(identity)
    with pytest.raises(ResumeMismatch) as caught:
        StagedCheckpoint.open(out, identity, overwrite=False, resume=True)
    assert f"{field}: " in str(caught.value)
    assert text in str(caught.value)
    assert "--no-resume" in str(caught.value)
    assert caught.value.message.count(" -> ") == 1  # nothing but the one difference
    assert files_of(tmp_path) == before
    with StagedCheckpoint.open(out, identity, overwrite=False, resume=False) as fresh:
        assert not staged.exists()
        assert fresh.run_id != staged.name[-16:]
        assert fresh.finished("block-0") is None


def test_f07_every_difference_is_listed(tmp_path: Path) -> None:
    interrupt(tmp_path / "out", FULL)
    with pytest.raises(ResumeMismatch) as caught:
        StagedCheckpoint.open(tmp_path / "out", {**FULL, "seed": 5, "extra": []}, overwrite=False, resume=True)
    assert "extra: absent -> []; seed: 0 -> 5" in str(caught.value)


def test_no_resume_discards_the_same_run_too(tmp_path: Path) -> None:
    interrupt(tmp_path / "out")
    with StagedCheckpoint.open(tmp_path / "out", IDENTITY, overwrite=False, resume=False) as staged:
        assert [staged.finished(f"block-{number}") for number in range(3)] == [None] * 3


# --- F08 -----------------------------------------------------------------------------------------------------
def test_f08_finished_returns_what_was_written(tmp_path: Path) -> None:
    interrupt(tmp_path / "out")
    with StagedCheckpoint.open(tmp_path / "out", IDENTITY, overwrite=False, resume=True) as staged:
        entry = staged.finished("block-1")
        assert entry is not None
        assert (entry.file, entry.facts) == ("model-1.safetensors", {"kept": 7})
        assert entry.tensors["block.1.weight"]["shape"] == [4, 8]
        assert staged.finished("block-9") is None


def damage_flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def damage_truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def damage_extend(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0")


def damage_remove(path: Path) -> None:
    path.unlink()


def damage_swap(path: Path) -> None:
    other = path.with_name("model-2.safetensors")
    path.rename(path.with_name("x"))
    other.rename(path)
    path.with_name("x").rename(other)


def damage_link(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize(
    ("damage", "left"),
    [
        (damage_flip, [True, False, True]),
        (damage_truncate, [True, False, True]),
        (damage_extend, [True, False, True]),
        (damage_remove, [True, False, True]),
        (damage_swap, [True, False, False]),
        (damage_link, [True, False, True]),
    ],
)
def test_f08_damaged_shard_is_computed_again(damage: Callable[[Path], None], left: list[bool], tmp_path: Path) -> None:
    save(tmp_path / "clean", 3)
    out = tmp_path / "out"
    folder = interrupt(out)
    damage(folder / "model-1.safetensors")
    assert finished(out) == left
    if damage is damage_link:
        (folder / "model-1.safetensors").rmdir()
    save(out, 3)
    assert files_of(out) == files_of(tmp_path / "clean")


def test_f08_shard_of_another_run(tmp_path: Path) -> None:
    """A shard with the right name and tensors, journaled by hand, but written by another run."""
    out = tmp_path / "out"
    folder = interrupt(out)
    other = interrupt(tmp_path / "other", {**IDENTITY, "seed": 9})
    shutil.copy(other / "model-1.safetensors", folder / "model-1.safetensors")
    assert finished(out) == [True, False, True]
    journal = Journal.load(tmp_path / f"{folder.name}.journal")
    assert journal is not None
    record = sha256_file(folder / "model-1.safetensors")
    entry = journal.entries["block-1"]
    journal.add(type(entry)(entry.key, entry.file, record.size_bytes, record.sha256, entry.tensors, entry.facts))
    assert finished(out) == [True, False, True]


def test_f08_every_truncation_of_the_journal(tmp_path: Path) -> None:
    """However the journal is cut, what is trusted is a prefix of what was written, and the run ends the same."""
    save(tmp_path / "clean", 3)
    out = tmp_path / "out"
    folder = interrupt(out)
    path = tmp_path / f"{folder.name}.journal"
    data = path.read_bytes()
    lines = [len(line) for line in data.splitlines(keepends=True)]
    for size in range(0, len(data), 11):
        path.write_bytes(data[:size])
        journal = Journal.load(path)
        whole = sum(size >= sum(lines[: count + 1]) for count in range(4))
        assert (len(journal.entries) + 1 if journal else 0) == whole
    for size in (0, lines[0] - 1, lines[0] + 5, sum(lines[:2]), len(data) - 1):
        shutil.rmtree(out, ignore_errors=True)
        folder = interrupt(out)
        path.write_bytes(data[:size])
        save(out, 3)
        assert files_of(out) == files_of(tmp_path / "clean")


def test_f08_every_flipped_byte_of_the_journal_ends_the_trust(tmp_path: Path) -> None:
    folder = interrupt(tmp_path / "out")
    path = tmp_path / f"{folder.name}.journal"
    data = path.read_bytes()
    good = Journal.load(path)
    assert good is not None
    lines = data.splitlines(keepends=True)
    for position in range(0, len(data), 5):
        bad = bytearray(data)
        bad[position] ^= 1 << position % 8
        path.write_bytes(bad)
        hit = next(count for count in range(4) if position < sum(map(len, lines[: count + 1])))
        journal = Journal.load(path)
        assert (len(journal.entries) + 1 if journal else 0) == hit


def test_f08_lines_swapped_or_dropped_end_the_trust(tmp_path: Path) -> None:
    folder = interrupt(tmp_path / "out")
    path = tmp_path / f"{folder.name}.journal"
    first, one, two, three = path.read_bytes().splitlines(keepends=True)
    for lines, left in (((one, three, two), 1), ((two, three), 0), ((one, three), 1), ((one, two, two), 2)):
        path.write_bytes(first + b"".join(lines))
        journal = Journal.load(path)
        assert journal is not None
        assert len(journal.entries) == left
    path.write_bytes(first + one + three)
    assert finished(tmp_path / "out") == [True, False, False]
    interrupt(tmp_path / "out")  # new lines continue the chain after the repair
    assert finished(tmp_path / "out") == [True] * 3


def test_f08_journal_of_another_run_is_not_taken(tmp_path: Path) -> None:
    folder = interrupt(tmp_path / "out")
    other = interrupt(tmp_path / "other", {**IDENTITY, "seed": 9})
    shutil.copy(tmp_path / f"{other.name}.journal", tmp_path / f"{folder.name}.journal")
    assert finished(tmp_path / "out") == [False] * 3


def test_f14_journal_names_a_file_outside(tmp_path: Path) -> None:
    folder = interrupt(tmp_path / "out")
    journal = Journal.load(tmp_path / f"{folder.name}.journal")
    assert journal is not None
    entry = journal.entries["block-1"]
    journal.add(type(entry)(entry.key, "../secret", entry.size_bytes, entry.sha256, entry.tensors, entry.facts))
    with (
        StagedCheckpoint.open(tmp_path / "out", IDENTITY, overwrite=False, resume=True) as staged,
        pytest.raises(UnsafePath),
    ):
        staged.finished("block-1")


# --- what may be there already ---------------------------------------------------------------------------------
def test_existing_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    out.write_text("a file")
    with pytest.raises(OutputExists, match="is a file"):
        StagedCheckpoint.open(out, IDENTITY, overwrite=True, resume=True)
    out.unlink()
    out.mkdir()
    save(out, 1)  # an empty folder is fine
    assert is_finished(out, IDENTITY)
    assert not is_finished(out, {**IDENTITY, "seed": 1})
    with pytest.raises(OutputExists, match="--overwrite"):
        StagedCheckpoint.open(out, IDENTITY, overwrite=False, resume=True)
    (out / "inner").mkdir()
    monkeypatch.chdir(out / "inner")
    with pytest.raises(OutputExists, match="current folder"):
        StagedCheckpoint.open(out, IDENTITY, overwrite=True, resume=True)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_output_that_appears_during_the_run_is_not_replaced(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with StagedCheckpoint.open(out, IDENTITY, overwrite=False, resume=True) as staged:
        staged.write_shard("block-0", "model-0.safetensors", shard_tensors(0), {})
        out.mkdir()
        (out / "mine.txt").write_text("mine")
        with pytest.raises(OutputExists):
            staged.commit({})
    assert files_of(out) == {"mine.txt": b"mine"}


def test_neighbours_with_similar_names_are_left_alone(tmp_path: Path) -> None:
    names = [
        "out.partial-x",
        "out2.partial-0123456789abcdef",
        "out.old-0123",
        "out.old",
        "my-out.trash-0123456789abcdef",
        "out.partial-0123456789ABCDEF",
        "out.trash-0123456789abcdef.txt",
    ]
    for name in names:
        (tmp_path / name).mkdir()
    recover(tmp_path / "out")
    save(tmp_path / "out", 1)
    save(tmp_path / "out", 1)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*names, "out"])


# --- F04 -----------------------------------------------------------------------------------------------------
RACER = """
import sys, time
from pathlib import Path
from sparsekit.errors import SparsekitError
from tests.fault.disk import IDENTITY, save
out, start, overwrite = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
print("ready", flush=True)
while not start.exists():
    time.sleep(0.0005)
from sparsekit.checkpoint.staging import StagedCheckpoint
from tests.fault.disk import shard_tensors
try:
    with StagedCheckpoint.open(out, IDENTITY, overwrite=overwrite == "True", resume=True) as staged:
        for number in range(3):
            if staged.finished(f"block-{number}") is None:
                staged.write_shard(f"block-{number}", f"model-{number}.safetensors", shard_tensors(number), {})
                time.sleep(0.02)
        staged.write_file("config.json", b'{"model_type": "llama"}')
        staged.commit({"tools": {"sparsekit": "0"}})
    print("won")
except SparsekitError as error:
    print(type(error).__name__)
"""
HOLDER = """
import sys, time
from pathlib import Path
from sparsekit.checkpoint.staging import StagedCheckpoint
from tests.fault.disk import IDENTITY, shard_tensors
staged = StagedCheckpoint.open(Path(sys.argv[1]), IDENTITY, overwrite=False, resume=True)
staged.write_shard("block-0", "model-0.safetensors", shard_tensors(0), {})
print("ready", flush=True)
time.sleep(60)
"""


def start(code: str, *arguments: object) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2],
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize("stale_lock", [False, True])
@pytest.mark.parametrize("overwrite", [False, True])
def test_f04_of_racing_processes_one_wins(overwrite: bool, stale_lock: bool, tmp_path: Path) -> None:
    save(tmp_path / "clean", 3)
    for trial in range(2):
        out = tmp_path / f"out{trial}"
        if stale_lock:
            (tmp_path / f"out{trial}.partial.lock").write_text(
                json.dumps({"host": socket.gethostname(), "pid": 1, "start": "long ago"})
            )
        go = tmp_path / f"go{trial}"
        racers = [start(RACER, out, go, overwrite) for _ in range(3)]
        go.touch()
        results = sorted(racer.communicate(timeout=60)[0].strip() for racer in racers)
        assert results.count("won") >= 1
        assert set(results) <= {"won", "Locked", "OutputExists"}
        if not overwrite:
            assert results.count("won") == 1
        assert files_of(out) == files_of(tmp_path / "clean")
        assert not list(tmp_path.glob("out*.*"))


def test_f04_live_holder_refuses_and_a_killed_one_is_taken_over(tmp_path: Path) -> None:
    out = tmp_path / "out"
    holder = start(HOLDER, out)
    for attempt in range(2):
        with pytest.raises(Locked, match=f"process {holder.pid} is writing it"):
            StagedCheckpoint.open(out, IDENTITY, overwrite=False, resume=attempt == 0)
    with pytest.raises(Locked):
        recover(out)
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    time.sleep(0.01)
    assert finished(out, 1) == [True]
    assert not (tmp_path / "out.partial.lock").exists()


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff", b'{"pid": 1}'[:5]])
def test_f04_torn_lock_is_taken_over(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "out.partial.lock").write_bytes(content)
    save(tmp_path / "out", 1)


def test_f04_same_process_twice_and_another_machine(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with StagedCheckpoint.open(out, IDENTITY, overwrite=False, resume=True), pytest.raises(Locked):
        StagedCheckpoint.open(out, {**IDENTITY, "seed": 3}, overwrite=False, resume=False)
    (tmp_path / "out.partial.lock").write_text('{"host": "elsewhere", "pid": 1, "start": "x"}')
    with pytest.raises(Locked, match="elsewhere"):
        StagedCheckpoint.open(out, IDENTITY, overwrite=False, resume=True)


def test_run_id_is_the_hash_of_the_identity() -> None:
    assert run_id_of({"b": 1, "a": [1, {"c": None}]}) == run_id_of({"a": [1, {"c": None}], "b": 1})
    assert run_id_of({"a": 1}) != run_id_of({"a": 1.0})
    assert run_id_of({}) == "44136fa355b3678a"
