"""The command line: its commands, and how each way of ending becomes an exit code.

Exit codes: 0 done, 2 usage or recipe, 3 model, data or checkpoint, 4 numbers, 5 resources, 6 quality gate
missed, 70 a bug, 130 interrupted, 141 the reader of the output went away.
"""

from __future__ import annotations

import errno
import functools
import importlib
import importlib.util
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable
from types import FrameType
from typing import Annotated, Any, NoReturn, get_type_hints

import typer

from sparsekit import __version__, farewell, ranks
from sparsekit.cli import options, render
from sparsekit.errors import (
    DiskFull,
    Interrupted,
    OutOfMemory,
    PermissionRefused,
    ResourceError,
    SparsekitError,
    UsageError,
)

# Decoding is hundreds of products of microseconds: waking threads that sleep between them takes longer than they do.
_DECODING = {"bench", "generate"}
_SPREAD = {"prune"}  # commands that several processes do together

EXIT_BUG = 70
EXIT_INTERRUPTED = 130
EXIT_PIPE = 141
_ALLOCATION = "DefaultCPUAllocator"  # torch has no exception of its own for memory that is not on a GPU

# command, module, function: in the order of the help page; a module imports what is heavy inside its function
COMMANDS = (
    ("prune", "sparsekit.cli.prune", "prune"),
    ("eval", "sparsekit.cli.eval", "evaluate"),
    ("bench", "sparsekit.cli.bench", "bench"),
    ("generate", "sparsekit.cli.generate", "generate"),
    ("inspect", "sparsekit.cli.inspect", "inspect"),
    ("verify", "sparsekit.cli.verify", "verify"),
    ("convert", "sparsekit.cli.convert", "convert"),
    ("methods", "sparsekit.cli.methods", "methods"),
    ("doctor", "sparsekit.cli.doctor", "doctor"),
)
GROUPS = (("recipes", "sparsekit.cli.recipes", "commands"),)


def main() -> None:
    """Entry point of the `sparsekit` command."""
    if not set(sys.argv[1:2]) & _DECODING:
        # Read when torch is loaded. Its threads would otherwise spin at the end of every short operation until the last
        # is done, which on a machine with other work takes ten times the processor time.
        os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    _stop_on_signals()
    _open_streams()
    farewell.hush()
    try:
        code = build()(prog_name="sparsekit", standalone_mode=False)
    except typer.TyperException as error:  # what typer itself refuses, before a command runs
        code = _report_usage(error)
    except typer.Abort:
        code = EXIT_INTERRUPTED
    sys.exit(farewell.leave(code if isinstance(code, int) else 0))


def _open_streams() -> None:
    """Replace streams that the caller closed, and let no character end a command."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115 - open to the end
        stream = getattr(sys, name)
        if hasattr(stream, "reconfigure"):  # a C locale must not turn a result into a traceback
            stream.reconfigure(errors="backslashreplace")


def _report_usage(error: typer.TyperException) -> int:
    """Say on one line what is wrong with the command line; return the exit code."""
    text = error.format_message()
    context = getattr(error, "ctx", None)
    if context is None or not text:  # an empty message: the help page was the answer
        return error.exit_code
    hint = f"See: {context.command_path} --help"
    render.show_error(UsageError(" ".join(text.split()), hint=hint), as_json="--json" in sys.argv[1:])
    return error.exit_code


@functools.cache
def build() -> typer.Typer:
    """Return the application with every command registered."""
    app = typer.Typer(
        help="Prune Hugging Face language models without training, and see what it costs.",
        epilog="Start with: sparsekit prune MODEL --recipe wanda-50",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["--help", "-h"]},
    )
    app.callback()(_common)
    for name, module, function in COMMANDS:
        if importlib.util.find_spec(module):
            app.command(name)(guard(getattr(importlib.import_module(module), function)))
    for name, module, function in GROUPS:
        group = typer.Typer(no_args_is_help=False)
        getattr(importlib.import_module(module), function)(group, guard)
        app.add_typer(group, name=name)
    return app


def _common(
    version: Annotated[
        bool,
        typer.Option("--version", help="Print the version.", callback=lambda on: _version(on), is_eager=True),
    ] = False,
) -> None:
    """Options of no command."""


def _version(wanted: bool) -> None:
    if wanted:
        render.emit(f"sparsekit {__version__}")
        raise typer.Exit


def guard(command: Callable[..., None]) -> Callable[..., None]:
    """Return the command with every way of ending turned into its message and exit code."""
    hints = get_type_hints(command, include_extras=True)
    names = {kind: [name for name, hint in hints.items() if hint == kind] for kind in _SHARED}

    @functools.wraps(command)
    def run(**given: Any) -> None:
        chosen = {kind: any(given[name] for name in names[kind]) for kind in _SHARED}
        loudness = next((given[name] for name in names[options.Verbose]), 0)
        _prepare(quiet=chosen[options.Quiet], verbose=loudness)
        try:
            _require_folder()
            _require_one_process(command)
            command(**given)
            sys.stdout.flush()
        except typer.Exit:
            raise
        except BrokenPipeError:
            _discard_output()
            raise typer.Exit(EXIT_PIPE) from None
        except BaseException as error:
            ended = farewell.cause(_expected(error) or error)
            raise typer.Exit(_report_somewhere(ended, as_json=chosen[options.Json])) from None

    return run


def _report_somewhere(error: BaseException, *, as_json: bool) -> int:
    """Report on standard error what standard output, full or broken itself, does not take."""
    if not as_json:
        return _report(error, as_json=False)
    try:
        code = _report(error, as_json=True)
        sys.stdout.flush()
    except OSError:
        _discard_output()
        return _report(error, as_json=False)
    return code


_SHARED: tuple[Any, ...] = (options.Json, options.Quiet, options.Verbose)


def _report(error: BaseException, *, as_json: bool) -> int:
    """Say what ended the command; return the exit code."""
    if isinstance(error, KeyboardInterrupt):
        error = Interrupted("interrupted", hint="Run the same command again to go on.")
    if (expected := _expected(error)) is not None:
        render.show_error(expected, as_json=as_json)
        return expected.exit_code
    if not isinstance(error, Exception) or isinstance(error, typer.Abort | typer.TyperException):
        raise error
    import traceback

    summary = f"{type(error).__name__}: {error}"
    hint = "Please report it with the traceback above."
    traceback.print_exception(error)
    if as_json:
        render.emit_json(render.error_document("Bug", f"this is a bug: {summary}", None, hint))
    else:
        print(f"error: this is a bug in sparsekit {__version__}: {summary}. {hint}", file=sys.stderr)
    return EXIT_BUG


def _expected(error: BaseException) -> SparsekitError | None:
    """Return the error as one of ours, None if nobody foresaw it."""
    if isinstance(error, SparsekitError):
        return error
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and _ALLOCATION in str(error)):
        return OutOfMemory("not enough memory", hint="Close other programs, or use fewer or shorter samples.")
    if isinstance(error, OSError):
        where = str(error.filename) if error.filename else None
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return DiskFull("no space left", where=where, hint="Free some space, then run the same command again.")
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            return PermissionRefused(str(error.strerror), where=where, hint="Check its permissions.")
        if error.errno == errno.ENOMEM:
            return _expected(MemoryError())
        if error.errno in (errno.EIO, errno.EMFILE, errno.ENFILE, errno.ESTALE):
            return ResourceError(str(error.strerror), where=where, hint="Check disk and limits, then try again.")
    return None


def _require_folder() -> None:
    """Everything relative, and the default output, is in the current folder, which may have been removed."""
    try:
        os.getcwd()
    except FileNotFoundError as error:
        raise ResourceError("the current folder no longer exists", hint="Change to one that does: cd") from error


def _require_one_process(command: Callable[..., None]) -> None:
    """Refuse what every process of a launcher would do once more."""
    if (size := ranks.launched().size) > 1 and command.__name__ not in _SPREAD:
        raise UsageError(
            f"{command.__name__} runs in one process, a launcher has started {size}",
            hint="Start it without torchrun or accelerate launch.",
        )


def _prepare(*, quiet: bool, verbose: int) -> None:
    """Set logging, and keep libraries from writing over progress and results."""
    level = logging.ERROR if quiet else (logging.WARNING, logging.INFO, logging.DEBUG)[min(verbose, 2)]
    logging.basicConfig(stream=sys.stderr, format="%(levelname)s %(name)s: %(message)s", force=True)
    logging.getLogger("sparsekit").setLevel(level)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "warning" if verbose else "error")
    logging.getLogger("transformers").setLevel(logging.WARNING if verbose else logging.ERROR)  # if loaded already
    if quiet or not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")


def _discard_output() -> None:
    """Send what is still buffered nowhere, so that nothing complains at exit."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)


def _stop_on_signals() -> None:
    """First SIGINT or SIGTERM: KeyboardInterrupt, so that work stops in order. Second: exit at once."""
    if threading.current_thread() is not threading.main_thread():
        return

    def second(number: int, frame: FrameType | None) -> NoReturn:
        if sys.stderr.isatty():
            os.write(2, b"\x1b[?25h\n")  # a progress bar may have hidden the cursor
        os._exit(EXIT_INTERRUPTED)

    def first(number: int, frame: FrameType | None) -> NoReturn:
        for known in watched:
            signal.signal(known, second)
        raise KeyboardInterrupt

    # a signal that the parent ignores (nohup, a job in the background) stays ignored
    watched = [known for known in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(known) is not signal.SIG_IGN]
    for known in watched:
        signal.signal(known, first)
