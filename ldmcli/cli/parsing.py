"""How options are declared and read: what an option knows beside its name, and what a command is given.

An option that sets a configuration value carries its path (`.path`), so that a command needs no list of its own:
`ParsedOptions.layers()` turns what the user gave into layers for `core.config`.
"""

import copy
import difflib
import inspect
import os
import re
import sys
import warnings
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, get_args

import typer

from ldmcli.core import config, console
from ldmcli.core.errors import UsageError

DATA, MODEL, TRAINING = "Data", "Model", "Training"
SAMPLING, OUTPUT, MACHINE = "Sampling", "Output", "Machine"

# names that hands know from diffusers, beside ours; `_` has become `-` by then
ALIASES = {
    "max-train-steps": "steps",
    "output-dir": "out",
    "report-to": "track",
    "learning-rate": "lr",
    "checkpointing-steps": "save-every",
    "checkpoints-total-limit": "keep",
    "train-data-dir": "data",
    "dataset-name": "data",
}
Text = str | None  # None: not given. Numbers that set a setting stay text here; core.config reads them
Flag = bool | None


def plain_name(token: str) -> str:
    """An option's name as declared: `_` is taken as `-`, names of others as ours."""
    token = token.replace("_", "-")
    return ALIASES.get(token, token)


def option(
    kind: Any,
    names: str,
    unit: str | Collection[str],
    help: str,
    *,
    panel: str,
    default: str | None = None,
    value: object = None,
    metavar: str = "",
    path: str = "",
    **more: Any,
) -> Any:
    """An annotated type: `kind` with a Typer option that also knows its setting (`.path`), the words to choose from
    (`.choices`) and its Python default (`.value`).

    names: as declared, with blanks between. unit: what help shows for the value, or the words to choose from; of a
    table an entry that is added later counts, too. default: what help says about it; None says nothing.
    """
    choices = () if isinstance(unit, str) else unit
    if choices:
        more["autocompletion"] = lambda: list(choices)
        metavar = metavar or "|".join(choices)
    info: Any = typer.Option(
        *names.split(),
        help=help,
        rich_help_panel=panel,
        metavar=metavar or (unit if isinstance(unit, str) else "") or None,
        show_default=default if default is not None else False,
        **more,
    )
    info.path, info.choices, info.value = path, choices, value
    return Annotated[kind, info]


def setting(path: str, unit: str | Collection[str], help: str, *, names: str = "", **more: Any) -> Any:
    """An option that sets `path`, by default named after it; help shows the setting's own default unless `default`
    words it."""
    return option(Text, names or f"--{_dashed(path)}", unit, help, path=path, **more)


def switch(path: str, help: str, *, names: str = "", **more: Any) -> Any:
    """A setting that is on or off."""
    name = _dashed(path)
    return option(Flag, names or f"--{name}/--no-{name}", "", help, path=path, **more)


def flag(names: str, help: str, *, value: bool = False, **more: Any) -> Any:
    """An option that is on or off and sets no setting."""
    return option(bool, names, "", help, value=value, **more)


def _dashed(path: str) -> str:
    return path.partition(".")[2].replace("_", "-")


def argument(kind: Any, metavar: str, help: str, *, default: str | None = None, required: bool = True) -> Any:
    """An annotated type: `kind` as a positional argument; `default` is what help says where it may be left out."""
    info: Any = typer.Argument(help=help, metavar=metavar, show_default=default if default is not None else False)
    info.path, info.choices, info.value = "", (), inspect.Parameter.empty if required else None
    return Annotated[kind, info]


def apply_global_options(values: dict) -> None:
    """What options of every command ask for before it runs."""
    if values.get("quiet") and values.get("verbose"):
        raise UsageError("--quiet and --verbose exclude each other")
    console.set_verbosity(
        quiet=bool(values.get("quiet")), verbose=bool(values.get("verbose")), json=bool(values.get("json"))
    )
    if not values.get("verbose") and not sys.warnoptions:
        warnings.simplefilter("ignore")  # what libraries tell programmers; ours come through the console
    if values.get("offline"):
        os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", TRANSFORMERS_OFFLINE="1")


def info_of(alias: Any) -> Any:
    """The Typer option or argument object that an `Annotated` alias carries."""
    return alias.__metadata__[0]


def long_name(info: Any) -> str:
    """The name that messages use: the first long one, without a `--no-…` twin."""
    names = [name for name in (info.default, *(info.param_decls or ())) if isinstance(name, str)]
    return next((name for name in names if name.startswith("--")), names[0]).partition("/")[0]


@dataclass(frozen=True)
class ParsedOptions:
    """What the user gave: values by parameter name (as attributes, too), and the command line itself."""

    values: dict[str, Any]
    options: dict[str, Any]  # parameter name → Annotated alias
    command: str
    argv: list[str]

    def __getattr__(self, name: str) -> Any:
        try:
            return self.values[name]
        except KeyError:
            raise AttributeError(name) from None

    def layers(self, section: str = "") -> list[config.Layer]:
        """The options that set settings (of one section, where named), each a layer with its own name as origin."""
        found: list[config.Layer] = []
        for name, alias in self.options.items():
            path = getattr(info_of(alias), "path", "")
            value = self.values[name]
            if path and path.startswith(section) and value not in (None, [], ()):
                found.append((long_name(info_of(alias)), {path: value}))
        return found

    def check_choices(self) -> None:
        """UsageError, with a suggestion, where an option takes one of a few words and was given another."""
        for name, alias in self.options.items():
            choices = getattr(info_of(alias), "choices", ())
            value = self.values[name]
            if choices and value is not None and value not in choices:
                hint = config.did_you_mean(difflib.get_close_matches(value, choices, n=1))
                raise UsageError(f"{long_name(info_of(alias))}: {value!r} is not one of {', '.join(choices)}{hint}")

    def check_folders(self) -> None:
        """UsageError where an option that names a file, a folder, a run or a data set was given an empty text, as by a
        shell's variable that is not set: it would stand for the current folder, or for what is chosen unasked."""
        named = {
            name
            for alias in self.options.values()
            if _names_a_place(alias)
            for name in (info_of(alias).default, *(info_of(alias).param_decls or ()))
            if isinstance(name, str)
        }
        for before, token in zip(["", *self.argv], self.argv):
            flag, sign, value = token.partition("=")
            empty = before if token == "" else flag if sign and not value else ""
            if empty.startswith("-") and {empty, f"--{plain_name(empty.lstrip('-'))}"} & named:
                raise UsageError(f"{empty}: needs a value; it was given an empty text")


def _names_a_place(alias: Any) -> bool:
    words = set(re.findall("[A-Z]+", info_of(alias).metavar or ""))
    kinds = (alias.__origin__, *get_args(alias.__origin__))
    return Path in kinds or bool(words & {"RUN", "DIR", "FILE", "FOLDER"}) or info_of(alias).path == "data.source"


def _in_help(value: object) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, tuple):
        return ",".join(map(str, value)) or "none"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _with_default(alias: Any, defaults: dict[str, object]) -> Any:
    """The alias with the default of its setting in its help, where it words none itself."""
    info = info_of(alias)
    if not info.path or isinstance(info.show_default, str):
        return alias
    info = copy.copy(info)
    info.show_default = _in_help(defaults[info.path])
    return Annotated[alias.__origin__, info]


def command(*groups: dict[str, Any], kind: str = "diffusion") -> Callable:
    """Give a command `f(given)` the options and arguments of `groups`; `kind` says whose defaults help shows."""
    options: dict[str, Any] = {}
    for group in groups:
        options |= group
    options = {name: _with_default(alias, config.defaults(kind)) for name, alias in options.items()}

    def decorate(function: Callable) -> Callable:
        def run(ctx: typer.Context, **values: Any) -> Any:
            apply_global_options(values)
            given = ParsedOptions(values, options, ctx.info_name or "", list((ctx.obj or {}).get("argv", ())))
            given.check_choices()
            given.check_folders()
            return function(given)

        seen: Any = run  # Typer reads options from the signature
        seen.__signature__ = _signature(options)
        seen.__annotations__ = {"ctx": typer.Context, **options}
        seen.__name__, seen.__doc__, seen.__module__ = function.__name__, function.__doc__, function.__module__
        seen.options = options
        return seen

    return decorate


def _signature(options: dict[str, Any]) -> inspect.Signature:
    context = inspect.Parameter("ctx", inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=typer.Context)
    return inspect.Signature(
        [
            context,
            *(
                inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, annotation=alias, default=info_of(alias).value)
                for name, alias in options.items()
            ),
        ]
    )


def guidance_of(text: str | None) -> float | dict[str, float] | None:
    """One scale, or a scale a condition: "3" or "text=3,map=1.5". Raises UsageError."""
    if text is None:
        return None
    try:
        if "=" not in text:
            scales = {"": float(text)}
        else:
            pairs = [part.partition("=") for part in text.split(",")]
            scales = {name.strip(): float(scale) for name, _, scale in pairs}
    except ValueError:
        scales = {"": -1.0}
    if not all(0 <= scale < float("inf") for scale in scales.values()):
        raise UsageError(f"--guidance: {text!r} is no scale from 0 on, nor scales by condition as text=3,map=1.5")
    return scales.get("", scales)


def interval_of(text: str | None) -> tuple[float, float] | None:
    """Two rising shares, "0.2,0.8". Raises UsageError."""
    if text is None:
        return None
    try:
        low, high = (float(part) for part in text.split(","))
    except ValueError:
        low, high = 1.0, 0.0
    if not 0 <= low < high <= 1:
        raise UsageError(f"--guidance-interval: {text!r} is not two shares, as 0.2,0.8")
    return low, high
