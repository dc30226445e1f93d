"""F01-F03, F06, F31: a fault at each call of a save, and proof that this harness would notice a bad writer."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from sparsekit import fs
from sparsekit.checkpoint.journal import Journal
from sparsekit.checkpoint.staging import StagedCheckpoint, recover
from sparsekit.checkpoint.verify import verify
from sparsekit.errors import DiskFull, PermissionRefused, ResourceError

from .disk import (
    IDENTITY,
    MODES,
    OLD,
    POWER,
    FaultDisk,
    ForgetfulDisk,
    Kill,
    Processes,
    Trial,
    files_of,
    prepare,
    run_trial,
    save,
    shard_tensors,
)


@pytest.fixture
def processes(monkeypatch: pytest.MonkeyPatch) -> Processes:
    return Processes(monkeypatch)


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """A folder in memory where there is one: the disk model needs no real disk, and thousands of trials are faster."""
    if not os.access("/dev/shm", os.W_OK):  # noqa: S108
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir="/dev/shm") as name:
        yield Path(name)


def clean_result(root: Path, shards: int, monkeypatch: pytest.MonkeyPatch) -> dict[str, bytes]:
    """Bytes of a save that met no fault."""
    out = prepare(root, over=False)
    monkeypatch.setattr(fs, "FS", FaultDisk(root))
    save(out, shards)
    files = files_of(out)
    assert files is not None
    assert len(files) == shards + 2
    return files


CASES = [(shards, over, True) for shards in (1, 3, 8) for over in (False, True)] + [
    (1, True, False),
    (3, True, False),
]


def calls_to_fail(calls: list[str], shards: int, mode: str) -> list[int]:
    """Numbers of the calls at which `mode` means something, from 1; of eight shards the middle ones are alike."""
    names = {"kill in mid-write": ("write",), "ENOSPC": ("mkdir", "open", "write", "fsync", "rename")}
    wanted = names.get(mode, names["ENOSPC"] if mode == "ENOSPC for good" else ())
    numbers = [number for number, call in enumerate(calls, 1) if not wanted or call.split()[0] in wanted]
    if shards < 8:
        return numbers
    begin, end = calls.index("open model-1.safetensors") + 1, calls.index("open model-7.safetensors") + 1
    return [number for number in numbers if not begin <= number < end]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("shards", "over", "can_exchange"), CASES)
def test_f01_fault_at_every_call(
    shards: int,
    over: bool,
    can_exchange: bool,
    mode: str,
    folder: Path,
    processes: Processes,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    new = clean_result(folder / "clean", shards, monkeypatch)
    root, states = folder / "root", set()

    def attempt(number: int | None) -> Trial:
        out = prepare(root, over=over)
        disk = FaultDisk(root, number, mode, can_exchange=can_exchange)
        return run_trial(out, disk, processes, monkeypatch, lambda: save(out, shards), new)

    calls = attempt(None).calls
    past_the_end = attempt(len(calls) + 1)
    assert (past_the_end.fired, past_the_end.error, past_the_end.state) == (False, None, "new")
    for number in calls_to_fail(calls, shards, mode):
        where = f"call {number}: {calls[number - 1]}"
        trial = attempt(number)
        assert trial.fired, where
        assert trial.state in (("old", "new") if over else ("absent", "new")), where
        states.add(trial.state)
        if trial.state == "new":
            assert [path.name for path in root.iterdir()] == ["out"], f"{where}: leftovers of a finished run"
        before = files_of(root)
        recover(root / "out")
        assert files_of(root) == before, f"{where}: recover is not idempotent"
        processes.new()
        save(root / "out", shards)
        assert files_of(root / "out") == new, f"{where}: the second run differs"
        assert [path.name for path in root.iterdir()] == ["out"], f"{where}: leftovers"
    if mode in ("EIO", "kill", *POWER):  # both sides of the commit were hit
        assert states == ({"old", "new"} if over else {"absent", "new"})


@pytest.mark.parametrize("can_exchange", [True, False])
def test_nothing_half_removed_comes_back(
    can_exchange: bool, folder: Path, processes: Processes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed while removing the old checkpoint; then somebody deletes OUT: half an old one must not take its place."""
    root, removals = folder / "root", 0
    for number in range(1, 500):
        out = prepare(root, over=True)
        disk = FaultDisk(root, number, "kill", can_exchange=can_exchange)
        processes.new()
        monkeypatch.setattr(fs, "FS", disk)
        with suppress(Kill):
            save(out, 1)
        if not disk.fired:
            break
        if files_of(out) not in (None, OLD):
            shutil.rmtree(out)
            removals += 1
        processes.new()
        monkeypatch.setattr(fs, "FS", FaultDisk(root))
        recover(out)
        assert files_of(out) in (None, OLD), disk.calls
    assert removals >= 8


@pytest.mark.parametrize("twice", [False, True])
@pytest.mark.parametrize("mode", ["kill", "kill in mid-write", POWER[1]])
def test_f06_resume_computes_only_what_is_not_journaled(
    mode: str, twice: bool, folder: Path, processes: Processes, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards = 3
    new = clean_result(folder / "clean", shards, monkeypatch)
    root, resumed = folder / "root", set()
    for number in range(1, 500):
        out = prepare(root, over=False)
        fired = False
        for _ in range(2 if twice else 1):
            processes.new()
            disk = FaultDisk(root, number, mode)
            monkeypatch.setattr(fs, "FS", disk)
            with suppress(Kill):
                save(out, shards)
            fired |= disk.fired
        if not fired:
            break
        processes.new()
        monkeypatch.setattr(fs, "FS", FaultDisk(root))
        recover(out)
        if not out.exists():
            journals = [Journal.load(path) for path in root.glob("out.partial-*.journal")]
            done = {key for journal in journals if journal for key in journal.entries}
            computed: list[int] = []
            save(out, shards, computed)
            assert computed == [shard for shard in range(shards) if f"block-{shard}" not in done]
            resumed.add(len(done))
        assert files_of(out) == new
    assert number > 40
    assert resumed == {0, 1, 2, 3}


@pytest.mark.parametrize("largest", [1, 3, 7, 64])
@pytest.mark.parametrize("interrupted", [False, True])
def test_f02_short_and_interrupted_writes(
    largest: int, interrupted: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    new = clean_result(tmp_path / "clean", 2, monkeypatch)

    class Stingy(fs.FileSystem):
        short = interruptions = 0

        def write(self, fd: int, data: memoryview) -> int:
            Stingy.interruptions += 1
            if interrupted and Stingy.interruptions % 2:
                raise InterruptedError(errno.EINTR, "interrupted")
            Stingy.short += len(data) > largest
            return super().write(fd, data[:largest])

        def fsync(self, fd: int) -> None:
            Stingy.interruptions += 1
            if interrupted and Stingy.interruptions % 3 == 0:
                raise InterruptedError(errno.EINTR, "interrupted")

    monkeypatch.setattr(fs, "FS", Stingy())
    save(tmp_path / "out", 2)
    assert Stingy.short > 20
    assert files_of(tmp_path / "out") == new


CALLS = ("mkdir", "open_shared", "open_exclusive", "write", "fsync", "fsync_dir", "exchange", "rename")


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize(
    ("code", "expected"),
    [
        (errno.EACCES, PermissionRefused),
        (errno.EROFS, PermissionRefused),
        (errno.EPERM, PermissionRefused),
        (errno.EXDEV, ResourceError),
        (errno.EDQUOT, DiskFull),
        (errno.ENOSPC, DiskFull),
    ],
)
def test_f03_typed_error_and_old_checkpoint_intact(
    call: str, code: int, expected: type[ResourceError], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = prepare(tmp_path / "root", over=True)
    broken = fs.FileSystem()
    fired = []

    def refuse(*args: object) -> int:
        fired.append(call)
        raise OSError(code, "injected")

    monkeypatch.setattr(broken, call, refuse)
    monkeypatch.setattr(fs, "FS", broken)
    with pytest.raises(expected) as caught:
        save(out, 1)
    assert fired
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert files_of(out) == OLD
    if expected is DiskFull:
        assert "bytes free" in str(caught.value)


# --- F31: the harness must go red on known bad writers --------------------------------------------------------
def shard_bytes(number: int) -> bytes:
    return b"".join(bytes(tensor.data) for tensor in shard_tensors(number).values())


def in_place(out: Path, shards: int) -> None:
    """Planted fault: shards go straight into OUT, index last."""
    fs.make_folder(out)
    for number in range(shards):
        fs.replace_file(out / f"model-{number}.safetensors", shard_bytes(number))
    for name in OLD:
        if not name.startswith("model-"):
            fs.remove_file(out / name)
    fs.replace_file(out / "index.json", b"{}")


def delete_then_write(out: Path, shards: int) -> None:
    """Planted fault: the old checkpoint goes before the new one is there."""
    fs.remove_tree(out)
    in_place(out, shards)


def delete_sync_write(out: Path, shards: int) -> None:
    """Planted fault: as `delete_then_write`, the removal durable."""
    fs.remove_tree(out)
    fs.sync_folder(out.parent)
    in_place(out, shards)


def broken_states(
    root: Path, writer: object, mode: str, processes: Processes, monkeypatch: pytest.MonkeyPatch
) -> Iterator[str]:
    """Yield OUT's state after a fault at each call of a planted writer over an old checkpoint."""
    assert callable(writer)
    out = prepare(root, over=True)
    monkeypatch.setattr(fs, "FS", FaultDisk(root))
    writer(out, 3)
    new = files_of(out)
    assert new is not None
    for call in range(1, 500):
        out = prepare(root, over=True)
        trial = run_trial(out, FaultDisk(root, call, mode), processes, monkeypatch, lambda out=out: writer(out, 3), new)
        if not trial.fired:
            return
        yield trial.state


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("writer", [in_place, delete_then_write])
def test_f31_bad_writers_are_noticed(
    writer: object, mode: str, folder: Path, processes: Processes, monkeypatch: pytest.MonkeyPatch
) -> None:
    if writer is delete_then_write and mode == POWER[1]:
        writer = delete_sync_write  # a removal whose folder is never fsynced is undone by this power cut
    states = list(broken_states(folder / "root", writer, mode, processes, monkeypatch))
    assert sum(state in ("broken", "absent") for state in states) >= len(states) // 4


@pytest.mark.parametrize("over", [False, True])
@pytest.mark.parametrize("mode", POWER)
def test_f31_missing_fsync_is_noticed(
    mode: str, over: bool, folder: Path, processes: Processes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same save, its fsyncs lost on the way: the power cut must find it, or the model is blind."""
    new = clean_result(folder / "clean", 3, monkeypatch)
    root, bad = folder / "root", 0

    class NoFileSync(FaultDisk):
        def fsync(self, fd: int) -> None:
            self._step("fsync")

    for kind in (NoFileSync, ForgetfulDisk):
        for call in range(1, 500):
            out = prepare(root, over=over)
            trial = run_trial(out, kind(root, call, mode), processes, monkeypatch, lambda out=out: save(out, 3), new)
            if not trial.fired:
                break
            bad += trial.state not in (("old", "new") if over else ("absent", "new"))
    assert bad > 0


def test_f31_the_sound_writer_is_sound_on_the_real_disk(tmp_path: Path) -> None:
    save(tmp_path / "out", 2)
    assert verify(tmp_path / "out", "semantic").ok
    with StagedCheckpoint.open(tmp_path / "new", IDENTITY, overwrite=False, resume=True) as staged:
        assert staged.folder.name == f"new.partial-{staged.run_id}"
