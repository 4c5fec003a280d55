"""Write the pages that the code itself tells: docs/settings.md, docs/commands.md and docs/commands/NAME.md.

    python docs/generate.py            writes them
    python docs/generate.py --check    ends with 1 where one of them is not what would be written

A setting's meaning is the comment beside or above its field in `ldmcli/core/settings.py` (or
`train_settings.py`), else the help of the option that sets it. A command's page is its `--help` at 80 columns.
"""

import argparse
import contextlib
import dataclasses
import inspect
import io
import os
import re
import sys
import textwrap
import tokenize
import typing
from pathlib import Path

DOCS = Path(__file__).resolve().parent
WIDTH = 120
HEADING_WORDS = 5  # a comment on a line of its own of at most so many words heads the fields below it
STAGES = {"autoencoder": "train-ae", "diffusion": "train-ldm", "classifier": "train-classifier"}
TYPES = {str: "text", int: "whole number", float: "number", bool: "true or false"}
NOTE = "<!-- Written by docs/generate.py; do not edit. -->"


def main(argv: list[str] | None = None) -> int:
    """Write all pages, or compare them; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="compare only")
    check = parser.parse_args(argv).check
    written = pages()
    stale = [name for name, text in written.items() if read(DOCS / name) != text]
    left = [path for path in sorted((DOCS / "commands").glob("*.md")) if f"commands/{path.name}" not in written]
    if check:
        for name in [*stale, *(str(path.relative_to(DOCS)) for path in left)]:
            print(f"docs/{name} is stale: run `python docs/generate.py`", file=sys.stderr)
        return int(bool(stale or left))
    for name in stale:
        (DOCS / name).parent.mkdir(exist_ok=True)
        (DOCS / name).write_text(written[name], encoding="utf-8")
    for path in left:
        path.unlink()
    return 0


def read(path: Path) -> str:
    """The text of a file; "" where there is none."""
    return path.read_text(encoding="utf-8") if path.is_file() else ""


def pages() -> dict[str, str]:
    """Text by file name below docs/."""
    from ldmcli.cli import COMMANDS

    found = {"settings.md": settings_page(), "commands.md": commands_page()}
    return found | {f"commands/{name}.md": command_page(name) for name in COMMANDS}


# --- settings -----------------------------------------------------------------------------------------------------

SETTINGS_HEAD = """\
# Settings

Every setting of `ldm train-ae`, `ldm train-ldm` and `ldm train-classifier`, with its default. `--plan` shows the values
that a command would use and where each comes from. In order, the later wins:

1. the defaults below,
2. `--preset NAME` (`ldm presets` lists them),
3. `--recipe FILE` (`ldm recipes` lists those that come along; a run's own `config.toml` is one, too),
4. the environment: `LDM_TRAIN_LR=1e-3` sets `train.lr`,
5. the option that is named beside a setting,
6. `--set section.name=value`, repeatable.

In a recipe a setting stands under its section, as in `[train]` and `lr = 1e-3`. Lists are written `[1, 2]` there, and
`1,2` on the command line. An unknown name is refused, with the nearest known one."""


def settings_page() -> str:
    """Sections in the order of the configurations, each with all of its settings."""
    from ldmcli.core import config

    configs = config.KINDS
    shown = {stage: {path: value for path, value, _ in config.describe(config.resolve(stage, []))} for stage in configs}
    sections: dict[str, type] = {}
    for each in configs.values():
        sections |= {field.name: field.type for field in dataclasses.fields(each)}
    options, rows = setting_options(), [NOTE, "", SETTINGS_HEAD]
    for section, cls in sections.items():
        read_by = [STAGES[stage] for stage, each in configs.items() if section in each.__dataclass_fields__]
        rows += ["", f"## {section}", "", *wrapped(f"{inspect.getdoc(cls)} Read by {and_list(read_by)}.")]
        headings, meanings = comments(cls)
        types = typing.get_type_hints(cls)
        for k, field in enumerate(dataclasses.fields(cls)):
            if field.name in headings:
                rows += ["", f"### {section}: {headings[field.name]}"]
            if field.name in headings or not k:
                rows.append("")
            path = f"{section}.{field.name}"
            values = {STAGES[stage]: of[path] for stage, of in shown.items() if path in of}
            name, help_text = options.get(path, ("", ""))
            meaning = meanings.get(field.name) or lowered(help_text.rstrip("."))
            rows += setting_lines(path, type_name(types[field.name]), values, name, meaning)
    return "\n".join(rows) + "\n"


def setting_lines(path: str, kind: str, values: dict[str, str], option: str, meaning: str) -> list[str]:
    """One item of a list: name and default, type and option, meaning."""
    default = next(iter(values.values()))
    if len(set(values.values())) > 1:
        default = ", ".join(f"{value} in {stage}" for stage, value in values.items())
        first = f"`{path}`: {default}"
    else:
        first = f"`{path}` = `{default}`"
    facts = ", ".join([kind, *([f"`{option}`"] if option else [])])
    return wrapped(f"- {first} ({facts})" + (f": {meaning}" if meaning else ""), indent=2)


def comments(cls: type) -> tuple[dict[str, str], dict[str, str]]:
    """Headings and meanings by the name of the field that they stand above or beside."""
    source = textwrap.dedent(inspect.getsource(cls))
    names = {field.name for field in dataclasses.fields(cls)}
    lines = source.splitlines()
    headings: dict[str, str] = {}
    meanings: dict[str, str] = {}
    above: list[str] = []
    found = {
        token.start[0]: token.string.lstrip("#").strip(" -")
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT
    }
    for number, line in enumerate(lines, start=1):
        if line.lstrip().startswith("#"):
            above.append(found[number])
            continue
        field = re.match(r" {4}(\w+):", line)
        if field and field[1] in names:
            if len(above) == 1 and len(above[0].split()) <= HEADING_WORDS:
                headings[field[1]], above = above[0], []
            text = " ".join([*above, *([found[number]] if number in found else [])])
            if text:
                meanings[field[1]] = text
        above = []
    return headings, meanings


def setting_options() -> dict[str, tuple[str, str]]:
    """The option that sets a setting, and its help, by the setting's path."""
    from ldmcli.cli import options
    from ldmcli.cli.parsing import long_name

    found = {}
    for alias in vars(options).values():
        info = (getattr(alias, "__metadata__", None) or [None])[0]
        path = getattr(info, "path", "")
        if path and not info.hidden:
            found[path] = (long_name(info), info.help or "")
    return found


def type_name(kind: object) -> str:
    """The type of a field in words."""
    if kind in TYPES:
        return TYPES[kind]
    parts = typing.get_args(kind)
    if parts and parts[-1] is Ellipsis:
        return f"list of {TYPES[parts[0]]}{'' if parts[0] is str else 's'}"
    return " and ".join(TYPES[part] for part in parts)


# --- commands -----------------------------------------------------------------------------------------------------

COMMANDS_HEAD = """\
# Commands

Each page is what `ldm COMMAND --help` prints. Long options may be written with `_` for `-`, and the usual names of
diffusers' scripts are understood (`--train_batch_size`, `--max_train_steps`, `--output_dir`, `--learning_rate`, …). How
commands end is on the page about [reliability](reliability.md#how-commands-end)."""


def commands_page() -> str:
    """All commands by panel."""
    from ldmcli.cli import COMMANDS

    rows, last = [NOTE, "", COMMANDS_HEAD], ""
    for name, (_, summary, panel) in COMMANDS.items():
        if panel != last:
            rows += ["", f"## {panel}", "", "| command | does |", "|---|---|"]
            last = panel
        rows.append(f"| [`ldm {name}`](commands/{name}.md) | {summary} |")
    return "\n".join(rows) + "\n"


def command_page(name: str) -> str:
    """The help of one command."""
    from ldmcli.cli import main as ldm

    out, before = io.StringIO(), os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = "80"
    try:
        with contextlib.redirect_stdout(out):
            ldm([name, "--help"])
    finally:
        os.environ.pop("COLUMNS")
        if before is not None:
            os.environ["COLUMNS"] = before
    return f"{NOTE}\n\n# ldm {name}\n\n```text\n{out.getvalue().strip()}\n```\n\nAll [commands](../commands.md).\n"


# --- words --------------------------------------------------------------------------------------------------------


def lowered(text: str) -> str:
    """The text as the second half of a sentence."""
    return text[:1].lower() + text[1:]


def wrapped(text: str, indent: int = 0) -> list[str]:
    """Lines of at most `WIDTH` characters; those after the first are indented. Code spans are not cut."""
    kept = re.sub(r"`[^`]*`", lambda span: span[0].replace(" ", "\0"), " ".join(text.split()))
    lines = textwrap.wrap(kept, WIDTH, subsequent_indent=" " * indent, break_long_words=False, break_on_hyphens=False)
    return [line.replace("\0", " ") for line in lines]


def and_list(names: list[str]) -> str:
    """`a` and `b`, as commands."""
    return " and ".join(f"`ldm {name}`" for name in names)


if __name__ == "__main__":
    sys.exit(main())
