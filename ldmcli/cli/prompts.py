"""Prompt files (`--prompts`): a prompt a line, as text or as JSON; from a file or from stdin."""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ldmcli.core import console
from ldmcli.core.errors import InputError

PROMPT_KEYS, CLASS_KEYS, COUNT_KEYS = ("prompt", "text", "caption"), ("class", "label"), ("n", "count")
QUOTES = {'"': '"', "'": "'", "“": "”", "„": "“", "«": "»"}
MOST = 100_000  # images of one line


@dataclass(frozen=True)
class PromptFile:
    """The requests of a file, an entry an image. Of both lists one may be empty, otherwise they are equally long."""

    prompts: tuple[str, ...]
    classes: tuple[str, ...]


def read_prompts(path: Path) -> PromptFile:
    """The prompts of a UTF-8 text file, `-` for stdin; blank lines and lines that begin with # are passed over.

    A line is a prompt, which may stand in quotes, or an object {"prompt": …, "class": …, "n": …}: n images (1) of that
    prompt, that class, or both. A whole file may be a JSON list of these. Raises InputError, naming the line.
    """
    name = "--prompts (stdin)" if str(path) == "-" else f"--prompts {path}"
    found: list[tuple[str | None, str | None]] = []
    comments = 0
    unread: set[str] = set()
    for where, value in _values(_text(path, name), name):
        if value is None:
            comments += 1
            continue
        prompt, class_name, n = _entry(value, f"{name}, {where}", unread)
        found += [(prompt, class_name)] * n
    if not found:
        raise InputError(f"{name}: no prompt in it; write one a line")
    for k, what in enumerate((PROMPT_KEYS[0], CLASS_KEYS[0])):
        lacking = [one for one in found if one[k] is None]
        if lacking and len(lacking) < len(found):
            raise InputError(
                f"{name}: {len(lacking)} of {len(found)} entries have no {what}, though others have one "
                f"(the first: {lacking[0][1 - k]!r}); give one to all, or to none"
            )
    if unread:
        console.warn(f"{name}: keys that are not read: {', '.join(sorted(unread))}; a line takes prompt, class and n")
    if comments:
        console.say(f"{name}: {len(found)} prompts; {comments} lines that begin with # are comments")
    return PromptFile(*(tuple(str(one[k]) for one in found if one[k] is not None) for k in (0, 1)))


def _text(path: Path, name: str) -> str:
    try:
        if str(path) != "-":
            content = path.read_bytes()
        elif sys.stdin is None:
            raise InputError(f"{name}: stdin is closed")
        else:
            content = sys.stdin.buffer.read()
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{name}: not UTF-8 text (byte {error.start}); save it as UTF-8") from None
    except OSError as error:
        raise InputError(f"{name}: {error.strerror}") from None


def _values(text: str, name: str):
    """("line 3", value) of each entry: a text, an object, or None for a comment."""
    if text.lstrip().startswith("["):
        try:
            found = json.loads(text)
        except (json.JSONDecodeError, RecursionError):
            found = None  # prompts that begin with a bracket
        if isinstance(found, list) and all(isinstance(one, (str, dict)) for one in found):
            yield from ((f"entry {k + 1}", one) for k, one in enumerate(found))
            return
    for k, line in enumerate(text.replace("\r\n", "\n").replace("\r", "\n").split("\n")):
        line, where = line.strip(), f"line {k + 1}"
        if line.startswith("#"):
            yield where, None
        elif line:
            yield where, _line(line, f"{name}, {where}")


def _line(line: str, where: str) -> Any:
    if line.startswith('{"'):
        try:
            return json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            why = error.msg if isinstance(error, json.JSONDecodeError) else "nested too deeply"
            raise InputError(f'{where}: not JSON ({why}); a line is a prompt, or {{"prompt": "…", "n": 2}}') from None
    if line[0] in QUOTES and len(line) > 1 and line.endswith(QUOTES[line[0]]):
        inside = line[1:-1]
        if line[0] == '"' and "\\" in inside:
            try:
                return str(json.loads(line))
            except json.JSONDecodeError:
                return line
        if not {line[0], QUOTES[line[0]]} & set(inside):
            return inside
    return line


def _entry(value: Any, where: str, unread: set[str]) -> tuple[str | None, str | None, int]:
    """(prompt, class, how many) of a line. Adds keys that mean nothing here to `unread`."""
    if isinstance(value, str):
        return value, None, 1
    keys = (PROMPT_KEYS, CLASS_KEYS, COUNT_KEYS)
    unread |= {key for key in value if not any(key in known for known in keys)}
    prompt, class_name, n = (next((value[key] for key in known if value.get(key) is not None), None) for known in keys)
    if prompt is None and class_name is None:
        raise InputError(f'{where}: neither "prompt" nor "class" in it')
    if prompt is not None and not isinstance(prompt, str):
        raise InputError(f"{where}: the prompt is {json.dumps(prompt)}; it must be text")
    if class_name is not None and (isinstance(class_name, bool) or not isinstance(class_name, (str, int))):
        raise InputError(f"{where}: the class is {json.dumps(class_name)}; it must be a name")
    n = 1 if n is None else n
    if isinstance(n, bool) or not isinstance(n, int) or not 1 <= n <= MOST:
        raise InputError(f"{where}: n is {json.dumps(n)}; it must be a whole number from 1 to {MOST:,}")
    return prompt, None if class_name is None else str(class_name), n
