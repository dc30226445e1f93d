"""Tables, units and progress."""

from __future__ import annotations

import io
import os
import pty
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparsekit.cli.render import (
    LineReporter,
    emit_json,
    printable,
    table,
)
from sparsekit.progress import track
from sparsekit.units import bytes_text, count_text, seconds_text


def test_table() -> None:
    assert table(["hub", ""], []).splitlines() == ["hub", "---  -"]
    text = table(["layer", "kept"], [["a.b", "10"], ["c", "2,000"]], right={1})
    assert text.splitlines() == ["layer   kept", "-----  -----", "a.b       10", "c      2,000"]


@given(
    st.lists(st.lists(st.text("ab c\x1b\n", max_size=90), min_size=3, max_size=3), max_size=4),
    st.integers(40, 100),
)
def test_tables_keep_the_width_and_every_letter(rows: list[list[str]], width: int) -> None:
    text = table(["one", "two", "three"], rows, width=width)
    assert max(len(line) for line in text.splitlines()) <= width
    body = "".join(text.splitlines()[2:])
    assert body.count("a") == sum(cell.count("a") for row in rows for cell in row)
    assert "\x1b" not in text


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.00 kB"),
        (999_600, "1.00 MB"),
        (2_204_000_000, "2.20 GB"),
        (5e16, "50.0 PB"),
    ],
)
def test_bytes(count: float, text: str) -> None:
    assert bytes_text(count) == text


@pytest.mark.parametrize(("count", "text"), [(7, "7"), (134_515_008, "135 M"), (12_300, "12.3 k"), (7e9, "7.00 G")])
def test_counts(count: float, text: str) -> None:
    assert count_text(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.04, "0.0 s"),
        (9.94, "9.9 s"),
        (9.96, "10 s"),
        (59.6, "1 min 0 s"),
        (200, "3 min 20 s"),
        (7500, "2 h 5 min"),
    ],
)
def test_seconds(seconds: float, text: str) -> None:
    assert seconds_text(seconds) == text


def test_control_characters_of_names_do_not_reach_the_terminal() -> None:
    assert printable("a\x1b[31mb\r\x07\x9b\ud800\n\tc") == "a\\x1b[31mb\\r\\x07\\x9b\\ud800\n\tc"


def test_json_documents_hold_no_nan(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="Out of range float"):
        emit_json({"a": float("nan")})
    assert capsys.readouterr().out == ""


class _Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_lines_come_at_tenths_but_not_faster_than_one_a_second() -> None:
    clock, stream = _Clock(), io.StringIO()
    lines = LineReporter(stream, clock)
    for _ in track(range(100), lines, "prune", 100, "blocks"):
        clock.now += 0.5
    assert stream.getvalue().splitlines() == [
        "prune: 100 blocks",
        *(f"prune: {n} of 100 blocks ({n} %), {seconds_text((100 - n) / 2)} left" for n in range(10, 100, 10)),
        "prune: 100 blocks in 50 s",
    ]
    stream.truncate(0)
    stream.seek(0)
    for _ in track(range(100), lines, "quick", 100, "files"):
        clock.now += 0.001
    assert stream.getvalue().splitlines() == ["quick: 100 files", "quick: 100 files in 0.1 s"]


def test_lines_come_every_ten_seconds_at_least() -> None:
    clock, stream = _Clock(), io.StringIO()
    lines = LineReporter(stream, clock)
    for _ in track(range(6), lines, "read", None, "documents"):
        clock.now += 4
    assert stream.getvalue().splitlines() == [
        "read",
        "read: 3 documents",
        "read: 6 documents",
        "read: 6 documents in 24 s",
    ]


def test_an_interrupted_step_says_how_far_it_came() -> None:
    stream = io.StringIO()
    steps = track(range(9), LineReporter(stream, _Clock()), "prune", 9, "blocks")
    next(steps)
    next(steps)
    steps.close()
    assert stream.getvalue().splitlines()[-1] == "prune: 1 of 9 blocks in 0.0 s"


_SCRIPT = """
import time
from sparsekit.cli import render
from sparsekit.progress import track
from sparsekit.units import bytes_text, count_text, seconds_text
with render.reporter(quiet={quiet}) as reporter:
    for item in track(range(4), reporter, "prune", 4, "blocks"):
        time.sleep(0.01)
    reporter.note("a [bold]note[/bold]")
"""


def _on_a_terminal(quiet: bool, **env: str) -> str:
    """Run the script with standard error on a pseudo-terminal; return what it wrote there."""
    leader, follower = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", _SCRIPT.format(quiet=quiet)],
        stderr=follower,
        stdout=subprocess.PIPE,
        env={**os.environ, "TERM": "xterm", "COLUMNS": "80", **env},
    )
    os.close(follower)
    written = b""
    while True:
        try:
            chunk = os.read(leader, 65536)
        except OSError:  # Linux: the other end is closed
            break
        if not chunk:
            break
        written += chunk
    out, _ = process.communicate(timeout=20)
    os.close(leader)
    assert (process.returncode, out) == (0, b"")
    return written.decode()


def test_a_terminal_gets_bars() -> None:
    text = _on_a_terminal(quiet=False)
    assert "4 of 4 blocks" in text
    assert "━" in text
    assert "a [bold]note[/bold]" in text


def test_a_dumb_terminal_gets_lines_and_quiet_gets_nothing() -> None:
    assert _on_a_terminal(quiet=False, TERM="dumb").split("\r\n")[0] == "prune: 4 blocks"
    assert _on_a_terminal(quiet=True) == ""
