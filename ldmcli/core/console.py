"""What a command says. stdout carries the result, stderr the conversation; only process 0 of several speaks.

Text that came from data (captions, file names, metadata) passes `clean` on its way to a terminal, and nothing here
interprets markup: a caption `[red]` is printed as it stands.
"""

import io
import json
import os
import re
import shutil
import sys
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]")
_URL_LOGIN = re.compile(r"(://)[^/\s:@]+:[^/\s@]+@")
_SECRET_NAME = re.compile(r"TOKEN|API_?KEY|SECRET|PASSWORD|CREDENTIAL", re.IGNORECASE)


@dataclass
class _State:
    quiet: bool = False
    verbose: bool = False
    json: bool = False
    warned: set[str] = field(default_factory=set)


_state = _State()


def open_streams() -> None:
    """Makes stdout and stderr writable whatever a caller left of them: closed ones lead to the null device (a file
    opened later must not become one of them), and characters that they cannot show are replaced."""
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest number that is free: this one
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))
        elif isinstance(stream, io.TextIOWrapper) and stream.errors != "backslashreplace":
            stream.reconfigure(errors="replace")


def silence(stream) -> None:
    """Nobody reads what goes to a stream any more: the rest, also what is held back in it, leads to nowhere."""
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    except (OSError, ValueError):  # a stream of Python's own, without a file
        pass


def set_verbosity(*, quiet: bool = False, verbose: bool = False, json: bool = False) -> None:
    """Called once a command. `json` sends people's text to stderr so that stdout holds one document."""
    _state.quiet, _state.verbose, _state.json = quiet, verbose, json
    _state.warned.clear()


def is_rank_0() -> bool:
    """True in process 0, and where there is only one."""
    return os.environ.get("RANK", "0") in ("", "0")


def clean(text: object) -> str:
    """`text` without control characters (newline and tab stay) and without marks that turn the writing direction."""
    return _CONTROL.sub("", str(text)).encode("utf-8", "replace").decode("utf-8")


def redact(text: str) -> str:
    """`text` without logins in URLs and without the values of environment variables that hold secrets."""
    text = _URL_LOGIN.sub(r"\1***@", text)
    for name, value in os.environ.items():
        if len(value) >= 8 and _SECRET_NAME.search(name):
            text = text.replace(value, f"<{name}>")
    return text


def _to_stderr(text: str) -> None:
    # a reader of the conversation who went away never stops the work
    try:
        print(clean(text), file=sys.stderr, flush=True)
    except (OSError, ValueError):
        silence(sys.stderr)
        sys.stderr = open(os.devnull, "w", encoding="utf-8")


def out(text: object = "") -> None:
    """The result, on stdout (on stderr with --json, where stdout belongs to the document)."""
    if not is_rank_0():
        return
    if _state.json:
        _to_stderr(str(text))
    else:
        print(clean(text), flush=True)


def say(text: object) -> None:
    """Conversation, on stderr; silent with --quiet."""
    if is_rank_0() and not _state.quiet:
        _to_stderr(str(text))


def say_once(text: object) -> None:
    """As `say`, the first time that this text comes up in this command."""
    if str(text) not in _state.warned:
        _state.warned.add(str(text))
        say(text)


def detail(text: object) -> None:
    """As `say`, only with --verbose."""
    if _state.verbose:
        say(text)


def warn(text: object) -> None:
    """One line on stderr that the user can act on; also with --quiet."""
    if is_rank_0():
        _to_stderr(f"ldm: warning: {_one_line(text)}")


def warn_once(key: str, text: object) -> None:
    """As `warn`, the first time that `key` comes up in this command."""
    if key not in _state.warned:
        _state.warned.add(key)
        warn(text)


def fail(text: object) -> None:
    """The one line of a failure. Every process may fail, so this one isn't kept to process 0."""
    rank = os.environ.get("RANK", "0")
    who = "" if rank in ("", "0") else f"process {rank}: "
    _to_stderr(f"ldm: {who}{redact(_one_line(text))}")


def _one_line(text: object) -> str:
    return " ".join(str(text).split())


def emit_json(document: dict) -> None:
    """The document of --json on stdout; NaN and infinities become null, which every JSON reader takes."""
    if is_rank_0():
        text = json.dumps(_plain(document), ensure_ascii=False, indent=2, default=str)
        try:
            text.encode(getattr(sys.stdout, "encoding", None) or "utf-8")
        except UnicodeEncodeError:  # JSON has a way to say them, so nothing is replaced
            text = json.dumps(_plain(document), indent=2, default=str)
        print(text, flush=True)


def _plain(value):
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return None
    return value


def table(rows: Sequence[Sequence], headers: list[str]) -> str:
    """Plain aligned columns, numbers to the right; each cell on one line."""
    cells = [["" if cell is None else _one_line(clean(cell)) for cell in row] for row in rows]
    columns = range(len(headers))
    numeric = [
        bool(rows) and all(isinstance(row[i], (int, float)) or row[i] in ("", None) for row in rows) for i in columns
    ]
    widths = [max(len(line[i]) for line in [headers, *cells]) for i in columns]

    def line(row):
        pairs = [row[i].rjust(widths[i]) if numeric[i] else row[i].ljust(widths[i]) for i in columns]
        return "  ".join(pairs).rstrip()

    return "\n".join([line(headers), line(["-" * width for width in widths]), *map(line, cells)])


def width() -> int:
    """Columns of the terminal, between 60 and 120; 80 where there is none."""
    return max(60, min(shutil.get_terminal_size((80, 24)).columns, 120))


def key_values(document: dict) -> str:
    """A document as lines for people: `name: value`, lists and inner documents on their line."""
    return "\n".join(f"{key}: {_cell(value)}" for key, value in document.items() if value is not None)


def _cell(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_cell(item)}" for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_cell, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)


class _Lines:
    """Progress for logs: a line each tenth of the way, no control characters."""

    def __init__(self, total: int, label: str):
        self.total, self.label, self.done, self.shown = max(total, 1), label, 0, -1

    def advance(self, n: int = 1, **fields) -> None:
        self.done += n
        tenth = 10 * self.done // self.total
        if tenth > self.shown:
            self.shown = tenth
            say(f"{self.label}: {self.done}/{self.total}{_fields(fields)}")


class _Bar:
    """Progress on a terminal."""

    def __init__(self, bar, task):
        self._bar, self._task = bar, task

    def advance(self, n: int = 1, **fields) -> None:
        self._bar.update(self._task, advance=n, fields=clean(_fields(fields)))


class _Silent:
    def advance(self, n: int = 1, **fields) -> None:
        pass


def _fields(fields: dict) -> str:
    shown = (f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in fields.items())
    return "".join(f"  {text}" for text in shown)


@contextmanager
def progress(total: int, label: str):
    """Yields an object whose `.advance(n=1, **fields)` reports progress: a bar on a terminal, plain lines elsewhere."""
    if _state.quiet or not is_rank_0():
        yield _Silent()
        return
    if not sys.stderr.isatty() or os.environ.get("TERM") == "dumb":
        yield _Lines(total, clean(label))
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[fields]}", markup=False),
    )
    with Progress(*columns, console=Console(stderr=True, markup=False)) as bar:
        yield _Bar(bar, bar.add_task(clean(label), total=total, fields=""))
