"""Exit codes, messages, signals and speed of the command line."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from sparsekit.cli import options
from sparsekit.cli.app import COMMANDS, GROUPS, guard
from sparsekit.errors import ChecksumError, GateMissed, NonFinite, RecipeSchemaError, SparsekitError

PROGRAM = "from sparsekit.cli.app import main; main()"


def run(
    *arguments: str, env: dict[str, str] | None = None, cwd: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """Run `sparsekit` in a process of its own, as an 80-column terminal would."""
    return subprocess.run(
        [sys.executable, "-c", PROGRAM, *arguments],
        capture_output=True,
        text=True,
        cwd=cwd,
        env={
            **os.environ,
            "COLUMNS": "80",
            "TERM": "dumb",
            "NO_COLOR": "1",
            "HF_HUB_OFFLINE": "1",
            **(env or {}),
        },
    )


# --- help and imports --------------------------------------------------------------------------------------
LIGHT = [
    ["--help"],
    ["recipes"],
    ["recipes", "list", "--json"],
    ["recipes", "show", "wanda-50"],
    ["recipes", "validate", "smoke"],
    ["recipes", "schema"],
    ["methods"],
    ["methods", "wanda"],
    *([name, "--help"] for name, _, _ in (*COMMANDS, *GROUPS)),
]


@pytest.mark.parametrize("arguments", LIGHT, ids=" ".join)
def test_what_computes_nothing_imports_no_torch(arguments: list[str]) -> None:
    script = (
        "import sys\nfrom sparsekit.cli.app import main\n"
        "try: main()\n"
        "finally: print([m for m in ('torch', 'transformers', 'numpy') if m in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr.splitlines()[-1] == "[]"


def test_help_takes_less_than_0_6_seconds() -> None:
    """Processor time, which a busy machine does not stretch as it stretches the clock."""
    run("--help")  # writes the .pyc files
    seconds = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert run("--help").returncode == 0
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert min(seconds) < 0.6


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["recipes"],
        ["methods"],
        ["methods", "wanda"],
        *([name, "--help"] for name, _, _ in COMMANDS),
    ],
    ids=" ".join,
)
def test_pages_fit_80_columns(arguments: list[str]) -> None:
    done = run(*arguments)
    assert done.returncode == 0, done.stderr
    assert max(len(line) for line in done.stdout.splitlines()) <= 80


def test_help_lists_every_command_in_order() -> None:
    lines = run("--help").stdout.splitlines()
    listed = [line.split()[1] for line in lines if line.startswith("│ ") and line[2].isalpha()]
    assert listed == [name for name, _, _ in (*COMMANDS, *GROUPS)]


def test_help_uses_the_words_of_the_project() -> None:
    """docs/design.md: `sparsity`, never ratio or compression; `calibration`; a mask is `keep`."""
    for name, _, _ in (*COMMANDS, *GROUPS):
        text = run(name, "--help").stdout.lower()
        assert not [
            word for word in ("compression", "sparsity ratio", "hessian", "percdamp", "nsamples") if word in text
        ]


# --- exit codes --------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["--version"], 0, "sparsekit "),
        ([], 2, "Usage:"),
        (["recpes"], 2, "Did you mean 'recipes'?"),
        (["recipes", "--nothing"], 2, "No such option"),
        (["recipes", "show"], 2, "Missing argument"),
        (["recipes", "show", "wanda50"], 2, "error: Unknown recipe 'wanda50'. Did you mean 'wanda-50'?"),
        (["recipes", "show", "./absent.yaml"], 2, "error: ./absent.yaml: cannot be read: No such file"),
        (["recipes", "show", "."], 2, "error: .: is not a regular file"),
        (["recipes", "show", "smoke", "--set", "stages.0.sparsty=1"], 2, "did you mean 'sparsity'?"),
        (["recipes", "show", "smoke", "--set", "x"], 2, "error: --set needs KEY=VALUE, got 'x'"),
        (["methods", "wnada"], 2, "error: Unknown method 'wnada'. Did you mean 'wanda'?"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_exit_codes(arguments: list[str], code: int, says: str) -> None:
    done = run(*arguments)
    assert done.returncode == code
    assert says in done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    if done.stderr.startswith("error:"):
        assert done.stdout == ""
        assert done.stderr.count("\n") == 1


def test_errors_as_json() -> None:
    done = run("recipes", "show", "wanda50", "--json")
    assert done.returncode == 2
    assert done.stderr == ""
    error = json.loads(done.stdout)["error"]
    assert error["type"] == "RecipeReferenceError"
    assert error["message"].startswith("Unknown recipe 'wanda50'")
    assert error.keys() == {"type", "message", "where", "hint"}


def test_validate_reports_every_file_and_line(tmp_path: Path) -> None:
    bad = tmp_path / "bad.yaml"
    bad.write_text(
        "sparsekit: 1\nname: bad\ndescription: d\nstages:\n  - {stage: prune, method: wanda, sparsty: 0.5, grop: row}\n"
    )
    lines = [
        "bad.yaml:5:35: stages.0: unknown key 'sparsty'; did you mean 'sparsity'?",
        "bad.yaml:5:49: stages.0: unknown key 'grop'; did you mean 'group'?",
    ]
    done = run("recipes", "validate", "bad.yaml", "smoke", "absent.yaml", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stdout == "ok: smoke\n"
    assert done.stderr.splitlines()[:2] == [f"error: {line}" for line in lines]
    assert done.stderr.splitlines()[2].startswith("error: absent.yaml: cannot be read")
    done = run("recipes", "validate", "bad.yaml", "smoke", "--json", cwd=tmp_path)
    checked = json.loads(done.stdout)["recipes"]
    assert [entry["valid"] for entry in checked] == [False, True]
    assert checked[0]["problems"] == lines


def _command(action: Callable[[], None]) -> typer.Typer:
    app = typer.Typer(pretty_exceptions_enable=False)

    def command(as_json: options.Json = False, silent: options.Quiet = False) -> None:
        action()

    app.command()(guard(command))
    return app


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (RecipeSchemaError("a: x\nb: y"), 2, "error: a: x\nerror: b: y\n"),
        (ChecksumError("differs", where="model.safetensors"), 3, "error: model.safetensors: differs\n"),
        (
            NonFinite("1 row is NaN", hint="Check that sample."),
            4,
            "error: 1 row is NaN. Check that sample.\n",
        ),
        (
            MemoryError(),
            5,
            "error: not enough memory. Close other programs, or use fewer or shorter samples.\n",
        ),
        (
            OSError(28, "No space left on device", "out/x"),
            5,
            "error: out/x: no space left. Free some space, then",
        ),
        (PermissionError(13, "Permission denied", "out/x"), 5, "error: out/x: Permission denied. Check its"),
        (GateMissed("perplexity ratio 1.4, allowed 1.25"), 6, "error: perplexity ratio 1.4, allowed 1.25\n"),
        (KeyboardInterrupt(), 130, "interrupted. Run the same command again to go on.\n"),
        (SparsekitError("\x1b[2Jname"), 70, "error: \\x1b[2Jname\n"),
        (typer.Exit(9), 9, ""),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else None,
)
def test_each_way_of_ending_has_its_code(error: BaseException, code: int, text: str) -> None:
    def action() -> None:
        raise error

    plain = CliRunner().invoke(_command(action))
    assert plain.exit_code == code
    assert plain.stderr.startswith(text)
    if not isinstance(error, typer.Exit):
        document = CliRunner().invoke(_command(action), ["--json"])
        assert document.exit_code == code
        assert set(json.loads(document.stdout)["error"]) == {"type", "message", "where", "hint"}


def test_a_bug_shows_its_traceback_and_ends_with_70() -> None:
    def action() -> None:
        raise ZeroDivisionError("division by zero")

    plain = CliRunner().invoke(_command(action))
    assert plain.exit_code == 70
    assert "Traceback (most recent call last)" in plain.stderr
    assert plain.stderr.splitlines()[-1].startswith("error: this is a bug in sparsekit ")
    document = CliRunner().invoke(_command(action), ["--json"])
    assert document.exit_code == 70
    assert json.loads(document.stdout)["error"]["message"] == "this is a bug: ZeroDivisionError: division by zero"


def test_a_reader_that_goes_away_is_no_error() -> None:
    script = f"{sys.executable} -c '{PROGRAM}' recipes schema | head -c 1"
    done = subprocess.run(
        ["bash", "-c", f"{script}; exit ${{PIPESTATUS[0]}}"], capture_output=True, text=True, check=False
    )
    assert done.stderr == ""
    assert done.returncode in (0, 141)  # 0 where the pipe took all of it before the reader left


def test_results_survive_a_terminal_that_knows_ascii_only(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("sparsekit: 1\nname: r\ndescription: größer\nextends: smoke\n", encoding="utf-8")
    done = run("recipes", "show", "r.yaml", cwd=tmp_path, env={"PYTHONIOENCODING": "ascii"})
    assert done.returncode == 0, done.stderr
    assert "gr\\xf6\\xdfer" in done.stdout


# --- signals -----------------------------------------------------------------------------------------------
_WAITS = """
import sys, time, typer
from sparsekit.cli import app
def wait() -> None:
    try:
        print("ready", flush=True)
        time.sleep(30)
    finally:
        print("put in order", flush=True)
        {after}
built = typer.Typer(); built.command()(app.guard(wait))
app.build = lambda: built
app.main()
"""


def _waiting(after: str, **popen: object) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", _WAITS.format(after=after)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **popen,  # type: ignore[call-overload]
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_lets_work_finish(number: signal.Signals) -> None:
    process = _waiting("pass")
    process.send_signal(number)
    out, err = process.communicate(timeout=20)
    assert process.returncode == 130
    assert out == "put in order\n"
    assert err == "interrupted. Run the same command again to go on.\n"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_second_signal_ends_at_once(number: signal.Signals) -> None:
    process = _waiting("time.sleep(30)")
    process.send_signal(signal.SIGINT)
    assert process.stdout is not None
    assert process.stdout.readline() == "put in order\n"
    began = time.monotonic()
    process.send_signal(number)
    out, err = process.communicate(timeout=20)
    assert (process.returncode, out, err) == (130, "", "")
    assert time.monotonic() - began < 10


def test_a_signal_that_the_parent_ignores_stays_ignored() -> None:
    process = _waiting("pass", preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN))
    process.send_signal(signal.SIGINT)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(timeout=0.5)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=20)
    assert process.returncode == 130


# --- commands of this file's neighbours --------------------------------------------------------------------
def test_recipes_and_methods_as_json() -> None:
    recipes = json.loads(run("recipes", "list", "--json").stdout)["recipes"]
    assert {"wanda-50", "smoke"} <= {entry["name"] for entry in recipes}
    assert json.loads(run("recipes", "show", "wanda-50", "--json").stdout)["stages"][0]["group"] == "row"
    wanda = json.loads(run("methods", "wanda", "--json").stdout)["methods"]
    assert [entry["room"] for entry in wanda] == ["pruners"]
    assert wanda[0]["needs"] == ["sumsq"]
    assert wanda[0]["paper"].startswith("Sun et al. 2023")
    assert wanda[0]["paper"].endswith("algorithm 1.")
    assert wanda[0]["options"] == [{"key": "group", "accepts": "one of row, linear", "default": "row"}]


def test_methods_lists_every_method_of_every_room() -> None:
    from sparsekit import registry

    listed = json.loads(run("methods", "--json").stdout)["methods"]
    for room in registry.ROOMS:
        assert [entry["name"] for entry in listed if entry["room"] == room] == list(registry.names(room))
    assert all(entry["summary"] and entry["source"] for entry in listed)


def test_doctor(tmp_path: Path) -> None:
    done = run("doctor", "--json", env={"HF_HOME": str(tmp_path / "hf")})
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["problems"] == []
    assert found["hub"]["offline"] is True
    assert found["hub"]["cache"] == str(tmp_path / "hf" / "hub")
    assert found["versions"]["python"] == ".".join(map(str, sys.version_info[:3]))
    assert found["machine"]["usable_cores"] >= 1
    assert found["machine"]["memory_bytes"] > 2**20
    assert found["torch"]["imports"] is True
    assert found["kernels"]["instruction_set"] in found["kernels"]["runnable"]


def test_doctor_says_why_packed_layers_cannot_run(tmp_path: Path) -> None:
    missing = run("doctor", env={"SPARSEKIT_KERNELS": str(tmp_path / "none.so")})
    assert missing.returncode == 5
    assert "packed layers cannot run:" in " ".join(missing.stdout.split())
    forced = run("doctor", "--json", env={"SPARSEKIT_ISA": "mmx"})
    assert forced.returncode == 5
    assert "instruction set 'mmx' cannot run here" in json.loads(forced.stdout)["problems"][0]


def test_doctor_finds_what_is_broken(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way of a folder")
    done = run("doctor", env={"HF_HOME": str(tmp_path / "file" / "hf")})
    assert done.returncode == 5
    assert f"problem: {tmp_path}/file/hf/hub is not writable; set HF_HOME to a folder that is" in done.stdout
