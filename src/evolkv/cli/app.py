"""The program: its commands, its global flags, and how failures leave it."""

from __future__ import annotations

import _thread
import contextlib
import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterator, Sequence
from itertools import takewhile
from typing import Annotated, Any

import typer

from evolkv.cli import console
from evolkv.cli.arguments import GLOBAL_FLAGS, for_typer, takes_several
from evolkv.cli.certify import certify
from evolkv.cli.command import Command, Group, instead_of
from evolkv.cli.compare import compare
from evolkv.cli.demo import demo
from evolkv.cli.doctor import doctor
from evolkv.cli.evaluate import evaluate
from evolkv.cli.generate import generate
from evolkv.cli.listing import app as listing
from evolkv.cli.plan import plan
from evolkv.cli.profile import app as profile
from evolkv.cli.report import report
from evolkv.cli.search import search
from evolkv.errors import EvolKVError, RunError, UsageError
from evolkv.json_files import check_characters
from evolkv.version import __version__

INTERRUPTED, TERMINATED = 130, 143
BROKEN_PIPE = 141
#: Set by a shell that asks how a line may go on.
_COMPLETE = "_EVOLKV_COMPLETE"
# Typer carries a copy of click or imports it, depending on its version; its errors know which.
_ClickException: type = next(base for base in typer.BadParameter.__mro__ if base.__name__ == "ClickException")

app = typer.Typer(
    name="evolkv",
    cls=Group,
    rich_markup_mode="rich",
    help="Evolve how much KV cache each layer and head of a language model needs, and run it with exactly that.",
    epilog="Start with: evolkv demo",
)


def _print_version(wanted: bool) -> None:
    if wanted:
        console.OUT.print(f"evolkv {__version__}")
        raise typer.Exit


@app.callback()
def _globals(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks and warnings.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress and no warnings.")] = False,
    log_json: Annotated[
        bool, typer.Option("--log-json", help="Progress, warnings and errors as lines of JSON, for machines.")
    ] = False,
) -> None:
    console.settings.debug = debug
    console.settings.quiet = quiet
    console.settings.log_json = log_json


app.command(cls=Command)(demo)
app.command(cls=Command)(search)
app.command(cls=Command)(plan)
app.command("eval", cls=Command)(evaluate)
app.command(cls=Command)(compare)
app.command(cls=Command)(certify)
app.command(cls=Command)(generate)
app.command(cls=Command)(report)
app.command(cls=Command)(doctor)
app.add_typer(profile, name="profile")
app.add_typer(listing, name="list")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program.

    Args:
        argv: the arguments, without the program's name. Default: those of the process.

    Returns:
        The exit code: 0 if all went well, 1 for a failed run, 2 for bad usage or input, 130 if interrupted, 143 if
        terminated, which ends the work as an interrupt does.
    """
    with terminate_as_interrupt() as terminated:
        code = _run(argv)
    return TERMINATED if terminated and code == INTERRUPTED else code


def _run(argv: Sequence[str] | None) -> int:
    console.prepare()
    console.show_warnings()
    given = for_typer(list(sys.argv[1:] if argv is None else argv))
    # Bad usage is said as JSON too, and may come up before Typer has read the flags.
    console.settings.log_json = "--log-json" in takewhile(GLOBAL_FLAGS.__contains__, given)
    for each in given:
        try:
            # Studies, results and profiles name files, and hold text alone.
            check_characters(each)
        except UsageError:
            return _fail(2, f"the argument {each!a} is not UTF-8; rename the file, or give it a link with such a name")
    try:
        # Typer would turn an interrupt into a bare exit code before anything could be said about it.
        command = typer.main.get_command(app)
        if _COMPLETE in os.environ:
            command.main(given, prog_name="evolkv")
        with no_interrupt_lost(), command.make_context("evolkv", given or ["--help"]) as context:
            code = context.command.invoke(context)
        sys.stdout.flush()
    except typer.Exit as leave:
        return leave.exit_code
    except (KeyboardInterrupt, typer.Abort):
        return _fail(INTERRUPTED, "interrupted")
    except BrokenPipeError:
        # Whoever read the output has had enough.
        _discard_output()
        return BROKEN_PIPE
    except Exception as error:
        if isinstance(error, _ClickException):
            return _fail(2, _usage(error))
        if console.settings.debug:
            console.trace(traceback.format_exc())
        if isinstance(error, RunError):
            return _fail(1, str(error))
        if isinstance(error, EvolKVError):
            return _fail(2, str(error))
        if isinstance(error, OSError):
            # Of what is written only standard output has no name.
            _discard_output()
            return _fail(1, f"{error.filename or 'the output'}: {error.strerror or error}")
        hint = "" if console.settings.debug else " (--debug shows where)"
        return _fail(1, f"unexpected {type(error).__name__}: {error}{hint}")
    return code if isinstance(code, int) else 0


@contextlib.contextmanager
def terminate_as_interrupt() -> Iterator[list[int]]:
    """Have SIGTERM raise KeyboardInterrupt, as Ctrl-C does: schedulers and ``kill`` send it to end a program.

    Yields:
        The signals that came, in a list that grows.
    """
    signals: list[int] = []

    def interrupt(number: int, frame: Any) -> None:
        signals.append(number)
        raise KeyboardInterrupt

    # Python lets no other thread handle signals.
    if threading.current_thread() is not threading.main_thread():
        yield signals
        return
    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield signals
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def no_interrupt_lost() -> Iterator[None]:
    """Sends Ctrl-C again where Python drops it, as all that is raised while an object is collected."""
    report = sys.unraisablehook

    def send_again(unraisable: Any) -> None:
        if isinstance(unraisable.exc_value, KeyboardInterrupt):
            # From a thread and later: sent from here it would be raised here, and dropped as well.
            threading.Timer(0.05, _thread.interrupt_main).start()
        else:
            report(unraisable)

    sys.unraisablehook = send_again
    try:
        yield
    finally:
        sys.unraisablehook = report


def _discard_output() -> None:
    """Have what is still to be written go nowhere, so that it does not fail again at exit."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _fail(code: int, message: str) -> int:
    if code == INTERRUPTED:
        console.say(f"evolkv: {message}")
    else:
        console.fail(message, code)
    return code


def _usage(error: Exception) -> str:
    """Return Typer's message, with the right word for an option of another program and the place where help is."""
    message = " ".join(error.format_message().split()).rstrip(".")  # type: ignore[attr-defined]
    context = getattr(error, "ctx", None)
    command = context.command_path if context else "evolkv"
    option = getattr(error, "option_name", None)
    if option and (instead := instead_of(option, context.command) if context else ""):
        message = f"no such option {option}{instead}"
    if context and message == "Missing argument 'MODEL'" and (several := takes_several(str(context.command.name))):
        message += f"; give it first: options such as {several} take every value behind them"
    return f"{message[:1].lower()}{message[1:]} (see '{command} --help')"
