"""fs.py on its own: what a file is like afterwards, and what is said when it cannot be written."""

from __future__ import annotations

import errno
import hashlib
import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsekit import fs
from sparsekit.errors import DiskFull, PermissionRefused, ResourceError, UnsafePath


@given(st.lists(st.binary(max_size=50), max_size=8))
@settings(max_examples=60, deadline=None)
def test_write_file_writes_the_chunks(tmp_path_factory: pytest.TempPathFactory, chunks: list[bytes]) -> None:
    path = tmp_path_factory.mktemp("fs") / "file"
    whole = b"".join(chunks)
    record = fs.write_file(path, iter(chunks))
    assert path.read_bytes() == whole
    assert record == fs.FileRecord(len(whole), hashlib.sha256(whole).hexdigest()) == fs.sha256_file(path)
    assert fs.copy_file(path, path.with_name("copy")) == record


def test_write_file_takes_buffers_of_any_kind(tmp_path: Path) -> None:
    import array

    numbers = array.array("f", [1.0, 2.0])
    assert fs.write_file(tmp_path / "a", memoryview(numbers)).size_bytes == 8
    assert fs.write_file(tmp_path / "b", [bytearray(b"x"), memoryview(b"yz")[1:], b""]).size_bytes == 2
    assert (tmp_path / "b").read_bytes() == b"xz"


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o002, 0o664), (0o077, 0o600)])
def test_mode_follows_the_umask(umask: int, mode: int, tmp_path: Path) -> None:
    before = os.umask(umask)
    try:
        fs.write_file(tmp_path / "a", b"")
        fs.replace_file(tmp_path / "b", b"")
    finally:
        os.umask(before)
    assert [(tmp_path / name).stat().st_mode & 0o777 for name in "ab"] == [mode, mode]


def test_write_file_does_not_replace_or_follow(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("old")
    (tmp_path / "link").symlink_to("target")
    for name in ("a", "link"):
        with pytest.raises(ResourceError, match="file exists"):
            fs.write_file(tmp_path / name, b"new")
    assert (tmp_path / "a").read_text() == "old"
    assert not (tmp_path / "target").exists()


def test_an_error_in_the_chunks_leaves_no_file(tmp_path: Path) -> None:
    def chunks() -> object:
        yield b"some"
        raise RuntimeError("the tensor could not be read")

    with pytest.raises(RuntimeError):
        fs.write_file(tmp_path / "a", chunks())  # type: ignore[arg-type]
    with pytest.raises(RuntimeError):
        fs.replace_file(tmp_path / "a", chunks())  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("call", ["write", "fsync", "close", "rename"])
def test_a_failed_replace_keeps_the_old_file(call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").write_text("old")
    disk = fs.FileSystem()

    def fail(*args: object) -> int:
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(disk, call, fail)
    monkeypatch.setattr(fs, "FS", disk)
    with pytest.raises(DiskFull, match="no space left"):
        fs.replace_file(tmp_path / "a", b"new")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert (tmp_path / "a").read_text() == "old"


def test_a_failed_append_is_cut_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "journal"
    path.write_bytes(b"one\n")
    disk = fs.FileSystem()
    real, calls = disk.write, []

    def tear(fd: int, data: memoryview) -> int:
        calls.append(len(data))
        if len(calls) == 2:
            raise OSError(errno.ENOSPC, "full")
        return real(fd, data[:2])

    monkeypatch.setattr(disk, "write", tear)
    monkeypatch.setattr(fs, "FS", disk)
    with pytest.raises(DiskFull):
        fs.append_line(path, b"three")
    assert path.read_bytes() == b"one\n"
    fs.append_line(path, b"two")
    assert path.read_bytes() == b"one\ntwo\n"


def test_a_disk_that_takes_nothing_is_an_error_not_a_loop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = fs.FileSystem()
    monkeypatch.setattr(disk, "write", lambda fd, data: 0)
    monkeypatch.setattr(fs, "FS", disk)
    with pytest.raises(ResourceError, match="accepts no bytes"):
        fs.write_file(tmp_path / "a", b"x")


def test_errors_name_path_needed_and_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = fs.FileSystem()
    monkeypatch.setattr(disk, "free_bytes", lambda path: 1234)
    monkeypatch.setattr(fs, "FS", disk)
    with pytest.raises(DiskFull) as caught:
        fs.require_space(tmp_path / "not/there", 5000, "shard model.safetensors")
    assert str(caught.value) == (
        f"{tmp_path}/not/there: shard model.safetensors needs 5,000 bytes, 1,234 bytes are free. "
        "Free at least 3,766 bytes, or choose another disk."
    )
    fs.require_space(tmp_path, 1234, "x")

    def full(fd: int, data: memoryview) -> int:
        raise OSError(errno.EDQUOT, "quota")

    monkeypatch.setattr(disk, "write", full)
    with pytest.raises(DiskFull, match=r"a: disk quota exceeded; 3 bytes needed, 1,234 bytes free\. Free some space"):
        fs.write_file(tmp_path / "a", b"abc")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_really_full_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = fs.FileSystem()
    monkeypatch.setattr(disk, "open_exclusive", lambda path: os.open("/dev/full", os.O_WRONLY))
    monkeypatch.setattr(fs, "FS", disk)
    with pytest.raises(DiskFull):
        fs.write_file(tmp_path / "a", b"x")


def test_permission_is_typed(tmp_path: Path) -> None:
    if os.geteuid() == 0:
        place = Path("/proc/self/x")  # root may write anywhere else
        with pytest.raises(ResourceError):
            fs.write_file(place, b"")
        return
    (tmp_path / "closed").mkdir(mode=0o500)
    with pytest.raises(PermissionRefused, match="closed"):
        fs.write_file(tmp_path / "closed/a", b"")


def test_remove_tree_does_not_follow_links(tmp_path: Path) -> None:
    (tmp_path / "keep").mkdir()
    (tmp_path / "keep/file").write_text("x")
    (tmp_path / "tree/sub").mkdir(parents=True)
    (tmp_path / "tree/sub/link").symlink_to(tmp_path / "keep")
    (tmp_path / "tree/broken").symlink_to("nowhere")
    (tmp_path / "tree/file").write_text("x")
    assert fs.list_files(tmp_path / "tree") == ["broken", "file", "sub/link"]
    fs.remove_tree(tmp_path / "tree")
    fs.remove_tree(tmp_path / "tree")
    fs.remove_file(tmp_path / "tree")
    assert fs.list_files(tmp_path) == ["keep/file"]


def test_exchange(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).write_text(name)
    assert fs.exchange(tmp_path / "a", tmp_path / "b")
    assert fs.list_files(tmp_path) == ["a/b", "b/a"]
    with pytest.raises(ResourceError, match="no such file"):
        fs.exchange(tmp_path / "a", tmp_path / "c")


@given(st.text(max_size=40))
@settings(max_examples=400, deadline=None)
def test_no_name_leaves_its_folder(name: str) -> None:
    folder = Path("/nowhere/folder")
    try:
        path = fs.safe_join(folder, name)
    except UnsafePath:
        return
    assert os.path.normpath(path).startswith(f"{folder}/")
    from pathlib import PureWindowsPath

    windows = PureWindowsPath("C:\\folder") / name
    assert windows.parts[:2] == ("C:\\", "folder")
    assert not windows.is_reserved()


@given(st.text(alphabet="./\\:aC\0 ~", max_size=12))
@settings(max_examples=400, deadline=None)
def test_no_dangerous_name_leaves_its_folder(name: str) -> None:
    test_no_name_leaves_its_folder.hypothesis.inner_test(name)  # type: ignore[attr-defined]
