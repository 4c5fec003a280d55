"""Help pages: plain text in groups, each option with its unit and default, an example at the end; 80 columns."""

import re
import shutil
import sys
import textwrap

from typer.core import TyperCommand, TyperGroup

from ldmcli.cli.commands import COMMANDS, example_line

PANELS = ("Arguments", "Data", "Model", "Training", "Sampling", "Output", "Machine")
_INDENT = 27


def _width() -> int:
    return max(50, min(shutil.get_terminal_size((80, 24)).columns, 100))


def _heading(text: str) -> str:
    return f"\033[1m{text}\033[0m" if sys.stdout.isatty() else text


def _wrap(text: str, indent: int) -> list[str]:
    # a short [default: …] stays on one line
    text = re.sub(r"\[default: [^\]]{1,30}\]$", lambda match: match[0].replace(" ", "\0"), text)
    lines = textwrap.wrap(text, _width() - indent - 1, break_on_hyphens=False, break_long_words=False)
    return [line.replace("\0", " ") for line in lines] or [""]


def _row(name: str, text: str, indent: int = _INDENT) -> str:
    lines = _wrap(text, indent)
    first = f"  {name}"
    if len(first) > indent - 2:
        lines = ["", *lines]
    head = first.ljust(indent) + lines[0]
    return "\n".join([head.rstrip(), *(" " * indent + line for line in lines[1:])])


def _option_row(param) -> str:
    short = [name for name in param.opts if not name.startswith("--")]
    long = [name for name in param.opts if name.startswith("--")]
    name = ", ".join(short + long)
    if param.secondary_opts:
        name += f"/{param.secondary_opts[0]}"
    if param.metavar and not param.is_flag:
        name += f" {param.metavar}"
    default = param.show_default
    text = f"{param.help or ''} [default: {default}]" if isinstance(default, str) else param.help or ""
    return _row(name if short else f"    {name}", text, _INDENT + 3)


def _argument_row(param) -> str:
    name = param.metavar or param.name.upper()
    default = f" [default: {param.show_default}]" if isinstance(param.show_default, str) else ""
    return _row(name, f"{param.help or ''}{default}", _INDENT + 3)


class Command(TyperCommand):
    """A command whose help has panels."""

    def format_help(self, ctx, formatter) -> None:
        names = (
            (param.metavar or param.name.upper(), param.required)
            for param in self.params
            if param.param_type_name == "argument"
        )
        usage = " ".join(name if required else f"[{name}]" for name, required in names)
        lines = [f"Usage: {ctx.command_path} {usage + ' ' if usage else ''}[OPTIONS]", ""]
        for paragraph in (self.help or "").split("\n\n"):
            lines += [*_wrap(" ".join(paragraph.split()), 0), ""]
        panels: dict[str, list[str]] = {}
        for param in self.get_params(ctx):
            if getattr(param, "hidden", False):
                continue
            argument = param.param_type_name == "argument"
            panel = "Arguments" if argument else getattr(param, "rich_help_panel", "") or "Output"
            panels.setdefault(panel, []).append(_argument_row(param) if argument else _option_row(param))
        for panel in sorted(panels, key=PANELS.index):
            lines += [_heading(panel), *panels[panel], ""]
        lines += [_heading("Example"), *(f"  {line}" for line in _continued(example_line(str(self.name))))]
        formatter.write("\n".join(lines) + "\n")


def _continued(line: str) -> list[str]:
    """A command line over several lines, each but the last ending in a backslash, so that it can be pasted."""
    # an option stays with its value
    pieces = re.findall(r'-\S+ "[^"]*"|-\S+ [^-\s]\S*|"[^"]*"|\S+', line)
    rows, row = [], ""
    for piece in pieces:
        if row and len(row) + len(piece) + 1 > _width() - 6:
            rows.append(row + " \\")
            row = "   "
        row = f"{row} {piece}" if row else piece
    return [*rows, row]


class Group(TyperGroup):
    """The top page: commands by panel, from the table alone."""

    def format_help(self, ctx, formatter) -> None:
        lines = ["Usage: ldm COMMAND [OPTIONS]", "", *_wrap(self.help or "", 0), ""]
        panels: dict[str, list[str]] = {}
        indent = max(map(len, COMMANDS)) + 4
        for name, (_, summary, panel) in COMMANDS.items():
            panels.setdefault(panel, []).append(_row(name, summary, indent))
        for panel, rows in panels.items():
            lines += [_heading(panel), *rows, ""]
        rows = [
            _row(", ".join(reversed(param.opts)), getattr(param, "help", "") or "", _INDENT)
            for param in self.get_params(ctx)
            if not getattr(param, "hidden", False)
        ]
        lines += [_heading("Options"), *rows, "", "`ldm COMMAND --help` shows a command's options and an example."]
        formatter.write("\n".join(lines) + "\n")
