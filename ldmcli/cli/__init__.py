"""The command line: the table of commands, and `main`, which turns every ending into one line and an exit code.

Nothing heavy is imported here: a command's module is loaded when the command is used, and torch only by what it calls.
"""

import difflib
import errno
import os
import sys
import tempfile
import time
import traceback
from importlib import import_module
from pathlib import Path

import typer
from typer.exceptions import TyperException

from ldmcli import __version__
from ldmcli.cli.commands import COMMANDS
from ldmcli.cli.helptext import Command, Group
from ldmcli.cli.parsing import plain_name
from ldmcli.core import console, launch
from ldmcli.core.allocator import keep_freed_memory
from ldmcli.core.errors import ExitCode, Interrupted, LdmError, UsageError

_MEMORY_WORDS = ("can't allocate memory", "DefaultCPUAllocator", "CUDA out of memory", "MPS backend out of memory")
_NO_NAMES = (errno.ENAMETOOLONG, errno.ELOOP)
_DISK_FULL = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)


class LazyGroup(Group):
    """Commands by name from `COMMANDS`; a module is imported when one of its commands is used."""

    def list_commands(self, ctx) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx, name: str):
        # what shell completion and listings see: name and summary, no import
        return Command(name, help=COMMANDS[name][1]) if name in COMMANDS else None

    def resolve_command(self, ctx, args: list[str]):
        name = args[0].replace("_", "-")
        if name in COMMANDS:
            return name, load(name), args[1:]
        if ctx.resilient_parsing:
            return None, None, args[1:]
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"; did you mean {near[0]}?" if near else "; `ldm --help` lists them"
        raise UsageError(f"{args[0]}: no such command{hint}")


def load(name: str) -> Command:
    """The command of that name with its options."""
    function = getattr(import_module(f"ldmcli.cli.{COMMANDS[name][0]}"), name.replace("-", "_"))
    app = typer.Typer(add_completion=False, rich_markup_mode=None)
    app.command(name, cls=Command, context_settings={"token_normalize_func": plain_name})(function)
    made = typer.main.get_command(app)
    assert isinstance(made, Command)
    return made


def _show_version(value: bool) -> None:
    if value:
        console.out(f"ldm {__version__}")
        raise typer.Exit()


def command_line() -> LazyGroup:
    """The whole command line as one object."""
    app = typer.Typer(cls=LazyGroup, rich_markup_mode=None, help="Train, use and measure latent diffusion models.")

    @app.callback()
    def ldm(
        version: bool = typer.Option(
            False, "--version", callback=_show_version, is_eager=True, help="Show the version and exit."
        ),
    ) -> None:
        pass

    made = typer.main.get_command(app)
    assert isinstance(made, LazyGroup)
    return made


def main(argv: list[str] | None = None) -> int:
    """Run one command line; returns its exit code (the table in the README) and raises nothing but SystemExit."""
    argv = list(sys.argv[1:] if argv is None else argv)
    console.open_streams()
    keep_freed_memory()
    root = command_line()
    if os.environ.get("_LDM_COMPLETE"):
        root.main(args=argv, prog_name="ldm")
    try:
        code = _run(root, argv)
        sys.stdout.flush()
    except BaseException as error:  # every ending has a code, a bug's and Ctrl-C's, too
        if isinstance(error, SystemExit):
            raise
        code, message = exit_code_and_line(error)
        if launch.report_exit(code, message):
            # after a signal all end by themselves; a failing status would make the launcher end the others
            return ExitCode.OK if isinstance(error, Interrupted) else code
        if message and not getattr(error, "said_by_rank_0", False):
            console.fail(message)
        return code
    launch.report_exit(code)
    return code


def _run(root: LazyGroup, argv: list[str]) -> int:
    if not argv:
        argv, code = ["--help"], ExitCode.USAGE
    else:
        code = ExitCode.OK
    try:
        with root.make_context("ldm", argv, obj={"argv": argv}) as context:
            root.invoke(context)
    except typer.Exit as end:
        return end.exit_code or code
    return code


def exit_code_and_line(error: BaseException) -> tuple[int, str]:
    """Exit code and line (without "ldm: ") of a failure. An empty line: nothing to say."""
    if isinstance(error, LdmError):
        return error.code, str(error)
    if isinstance(error, TyperException):
        return ExitCode.USAGE, _usage_line(error)
    if isinstance(error, (KeyboardInterrupt, typer.Abort)):
        return ExitCode.SIGINT, "interrupted"
    if isinstance(error, BrokenPipeError):
        console.silence(sys.stdout)  # its reader has what it wanted (`| head`)
        return ExitCode.OK, ""
    if isinstance(error, OSError) and error.errno in _DISK_FULL:
        if not error.filename:
            console.silence(sys.stdout)  # which may be what is full; the interpreter would try it again as it ends
        where = f"{error.filename}: " if error.filename else ""
        return ExitCode.RESOURCE, f"{where}the disk is full ({error.strerror}); make room and run the command again"
    if isinstance(error, PermissionError) and error.filename:
        return _permission(error)
    if isinstance(error, OSError) and error.errno in _NO_NAMES:
        named = os.fsdecode(error.filename or "")
        shown = f"{named[:60]}…" if len(named) > 80 else named
        return ExitCode.USAGE, f"{shown or 'a name'}: no name of a file or folder ({error.strerror})"
    if _out_of_memory(error):
        return ExitCode.RESOURCE, f"out of memory: {_first_line(error)}; lower --micro-batch or --batch-size, or --size"
    return ExitCode.FAULT, _fault(error)


def _permission(error: PermissionError) -> tuple[int, str]:
    """A file that exists and can't be read is input (3); a place that can't be written was chosen by an option (2)."""
    path = Path(os.fsdecode(error.filename))
    if path.is_file() and not os.access(path, os.R_OK):
        return ExitCode.INPUT, f"{path}: no permission to read it"
    return ExitCode.USAGE, f"{path}: no permission to write there; choose another --out"


def _out_of_memory(error: BaseException) -> bool:
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and any(word in str(error) for word in _MEMORY_WORDS)


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__


def _fault(error: BaseException) -> str:
    text = console.redact("".join(traceback.format_exception(error)))
    where = f"ldm-fault-{time.strftime('%Y%m%d-%H%M%S')}-"
    try:
        handle, path = tempfile.mkstemp(prefix=where, suffix=".txt")
        with os.fdopen(handle, "w", encoding="utf-8", errors="replace") as file:
            file.write(f"ldm {__version__}, Python {sys.version.split()[0]}\n{text}")
    except OSError:
        path = "nowhere: no temporary folder can be written"
    return f"a fault of ldm, not of yours: {type(error).__name__}: {_first_line(error)}; traceback in {path}"


# --- wording of what the parser found --------------------------------------------------------------------------

_EXPECTED = {
    "int_parsing": "is not a whole number",
    "int_from_float": "is not a whole number",
    "float_parsing": "is not a number",
    "bool_parsing": "is neither true nor false",
}


def _usage_line(error: TyperException) -> str:
    context = getattr(error, "ctx", None)
    page = "`ldm --help`" if context is None or context.parent is None else f"`ldm {context.info_name} --help`"
    option, param = getattr(error, "option_name", None), getattr(error, "param", None)
    if hasattr(error, "possibilities"):
        near = list(error.possibilities or [])
        return f"no such option {option}; {f'did you mean {near[0]}?' if near else f'see {page}'}"
    if option:
        return f"{option} {'takes no value' if 'does not take' in error.message else 'needs a value'}"
    if type(error).__name__ == "MissingParameter" and param is not None:
        return f"{param.metavar or param.name.upper()} is missing; see {page}"
    if param is not None:
        return _bad_value(error, param)
    if "unexpected extra argument" in error.message:
        extra = error.message[error.message.rindex("(") + 1 :].rstrip(")")
        return f"unexpected argument {extra!r}; see {page}"
    return error.format_message()


def _bad_value(error: TyperException, param) -> str:
    name = param.opts[0] if param.opts else param.name
    details: list[dict] = getattr(error.__cause__, "errors", list)()
    if not details:
        return f"{name}: {error.message}"
    first = details[0]
    if first["type"] in _EXPECTED:
        return f"{name}: {first['input']!r} {_EXPECTED[first['type']]}"
    limits = first.get("ctx", {})
    words = {"ge": "at least", "gt": "greater than", "le": "at most", "lt": "below"}
    limit = next((f"must be {words[key]} {limits[key]:g}" for key in words if key in limits), first["msg"])
    return f"{name} {first['input']}: {limit}"
