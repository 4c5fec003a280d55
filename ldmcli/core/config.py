"""From defaults, preset, recipe, environment, options and `--set` to one configuration that knows each value's origin.

Every source goes through `_value`, so an unknown name or a wrong type fails everywhere in the same words. Environment
variables are LDM_SECTION_KEY, as in LDM_TRAIN_BATCH_SIZE for train.batch_size: no section has an underscore in its
name, so the first one ends it. A variable whose first word is no section (LDM_CACHE) is no setting, and one that only
the other command reads (LDM_LOSS_L1 while `ldm train-ldm` runs) is left alone.
"""

import difflib
import hashlib
import json
import math
import re
import tomllib
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from ldmcli.core import settings
from ldmcli.core.errors import UsageError
from ldmcli.core.presets import PRESETS

KINDS = {
    "autoencoder": settings.AutoencoderConfig,
    "diffusion": settings.DiffusionConfig,
    "classifier": settings.ClassifierConfig,
}
COMMAND_OF = {"autoencoder": "ldm train-ae", "diffusion": "ldm train-ldm", "classifier": "ldm train-classifier"}
_PACKAGE = Path(__file__).resolve().parents[1]
# a wheel carries them inside the package; in a checkout they stand at the top
RECIPES = next((path for path in (_PACKAGE / "recipes", _PACKAGE.parent / "recipes") if path.is_dir()), _PACKAGE)

Config = settings.AutoencoderConfig | settings.DiffusionConfig | settings.ClassifierConfig
Layer = tuple[str, Mapping[str, object]]


@dataclass(frozen=True)
class Resolved:
    """A configuration and where each of its values came from ("default", "preset kl-f4", "--steps", …)."""

    kind: str
    config: Config
    origins: dict[str, str]


def paths(run_kind: str) -> dict[str, Any]:
    """Every setting of a kind, "section.name" to its type, in the order of the settings."""
    found: dict[str, Any] = {}
    for name, section in _sections(KINDS[run_kind]):
        hints = typing.get_type_hints(section)
        found |= {f"{name}.{setting.name}": hints[setting.name] for setting in fields(section)}
    return found


def _sections(config: Any) -> list[tuple[str, Any]]:
    """(name, class) of the sections of a configuration or of its class."""
    return [(section.name, section.type) for section in fields(config)]


def defaults(run_kind: str) -> dict[str, object]:
    """{"section.name": default} of a kind; the two commands differ in some of what they share."""
    return flat(KINDS[run_kind]())


# --- one value -------------------------------------------------------------------------------------------------


def parse_size(value: object) -> object:
    """Pixels as height and width from 64, "64" or "48x64" (height first)."""
    match = re.fullmatch(r"(\d+)(?:\s*[x×]\s*(\d+))?", str(value).strip(), re.IGNORECASE)
    return (int(match[1]), int(match[2] or match[1])) if match else value


def size_of(text: str | None, option: str = "--size") -> tuple[int, int] | None:
    """Height and width from an option's text, None from None; UsageError where it is no size."""
    if text is None:
        return None
    size = parse_size(text)
    if not isinstance(size, tuple) or min(size) < 1:
        raise UsageError(f"{option}: {text!r} is not pixels, as 64 or 48x64")
    return size


def _parse_kinds(value: object) -> object:
    if not isinstance(value, str) or value.startswith("["):
        return value
    return tuple(part.strip() for part in re.split(r"[+,]", value) if part.strip() not in ("", "none"))


# settings that people write in a shorter form than their type
_SHORT_FORMS: dict[str, Callable[[object], object]] = {
    "data.size": lambda value: value if isinstance(value, (list, tuple)) else parse_size(value),
    "condition.kinds": _parse_kinds,
    "train.micro_batch": lambda value: 0 if value == "auto" else value,
}
_WORDS = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}
_TYPE_NAMES = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}


def _toml_value(text: str) -> object:
    return tomllib.loads(f"value = {text}")["value"]


def _scalar(value_type: type, value: object) -> object:
    """`value` (or text) as `kind`; ValueError where it is none."""
    if value_type is bool:
        if isinstance(value, str):
            value = _WORDS.get(value.strip().lower())
        if not isinstance(value, bool):
            raise ValueError
        return value
    if value_type is str:
        if not isinstance(value, str):
            raise ValueError
        value.encode("utf-8")  # UnicodeEncodeError is a ValueError: a name that no TOML file could hold
        if value[:1] in ("'", '"') and value[:1] == value[-1:] and len(value) > 1:
            return _toml_value(value)
        return value
    if isinstance(value, bool):
        raise ValueError
    number = float(value.replace("_", "")) if isinstance(value, str) else value
    if not isinstance(number, (int, float)) or not math.isfinite(number):
        raise ValueError
    if value_type is int:
        if number != int(number):
            raise ValueError
        return int(value) if isinstance(value, str) and re.fullmatch(r"[+-]?\d+", value) else int(number)
    return float(number)


def _coerce(value_type: Any, value: object) -> object:
    """`value` in the type that a setting declares; ValueError where it doesn't fit."""
    if typing.get_origin(value_type) is not tuple:
        return _scalar(value_type, value)
    members = typing.get_args(value_type)
    if isinstance(value, str):
        text = value.strip()
        parts = [part.strip() for part in text.split(",")]
        value = _toml_value(text) if text.startswith("[") else [part for part in parts if part]
    elif not isinstance(value, (list, tuple)):
        value = [value]
    if not isinstance(value, (list, tuple)):
        raise ValueError
    if members[-1] is Ellipsis:
        return tuple(_scalar(members[0], item) for item in value)
    if len(value) != len(members):
        raise ValueError
    return tuple(_scalar(member, item) for member, item in zip(members, value))


def _describe_type(path: str, value_type: Any) -> str:
    if path == "data.size":
        return "pixels, as 64 or 48x64"
    if typing.get_origin(value_type) is not tuple:
        return _TYPE_NAMES[value_type]
    members = typing.get_args(value_type)
    count = "a list" if members[-1] is Ellipsis else f"{len(members)} values"
    return f"{count}, each {_TYPE_NAMES[members[0]]}"


def _value(run_kind: str, path: str, value: object, origin: str) -> object:
    """One setting's value in its type, or the UsageError that says what is wrong with it and where it stands."""
    known = paths(run_kind)
    if path not in known:
        raise UsageError(f"{origin}{' ' if origin == '--set' else ': '}{_unknown(run_kind, path, known)}")
    try:
        return _coerce(known[path], _SHORT_FORMS.get(path, lambda same: same)(value))
    except (ValueError, OverflowError, tomllib.TOMLDecodeError):
        named_option = origin.startswith("--") and origin != "--set"
        where = origin if named_option else f"{origin}{' ' if origin == '--set' else ': '}{path}"
        raise UsageError(f"{where}: {_quoted(value)} is not {_describe_type(path, known[path])}") from None


def _quoted(value: object) -> str:
    return repr(value) if isinstance(value, str) else json.dumps(value, default=str)


def _unknown(run_kind: str, path: str, known: Mapping[str, object]) -> str:
    for other in KINDS:
        if other != run_kind and path in paths(other):
            return f"{path} is a setting of `{COMMAND_OF[other]}`, not of `{COMMAND_OF[run_kind]}`"
    return f"{path}: no such setting{did_you_mean(suggestions(path, known))}"


def suggestions(path: str, known: Iterable[str]) -> list[str]:
    """Settings that `path` may be a slip of, by the whole name and by its last part in any section; at most two."""
    last = path.rpartition(".")[2]

    def likeness(name: str) -> float:
        whole = difflib.SequenceMatcher(None, path, name).ratio()
        by_last = difflib.SequenceMatcher(None, last, name.rpartition(".")[2]).ratio()
        return max(whole, by_last - 0.05)  # a slip in the section weighs more than one in the name

    scored = sorted(((likeness(name), name) for name in known), key=lambda pair: -pair[0])
    return [name for score, name in scored[:2] if score >= 0.75 and score > scored[0][0] - 0.05]


def did_you_mean(names: list[str]) -> str:
    """ "; did you mean a or b?", or nothing."""
    return f"; did you mean {' or '.join(names)}?" if names else ""


# --- layers ----------------------------------------------------------------------------------------------------


def presets() -> dict:
    """Presets by name: objects with `.kind`, `.values` ({"section.name": value}) and `.summary`."""
    return PRESETS


def preset_layer(run_kind: str, name: str, where: str = "--preset") -> Layer:
    """A named preset's values. `where` says who named it, for the message where there is none."""
    known = presets()
    if run_kind == "autoencoder" and f"{name}-ae" in known:  # one name for both stages: "paper", "small"
        name = f"{name}-ae"
    of_kind = [each for each, preset in known.items() if preset.kind == run_kind]
    if name not in known:
        raise UsageError(
            f"{where} {name}: no such preset{did_you_mean(difflib.get_close_matches(name, of_kind))}"
            " (`ldm presets` lists them)"
        )
    if known[name].kind != run_kind:
        other = COMMAND_OF[known[name].kind]
        raise UsageError(f"{where} {name}: a preset of `{other}`, not of `{COMMAND_OF[run_kind]}`")
    return f"preset {name}", dict(known[name].values)


def recipe_path(name: str | Path, where: str = "--recipe") -> Path:
    """The file that --recipe means: a path, or the name of a recipe that comes with the package.

    where: the option that names it, for the message where there is none.
    """
    path = Path(name)
    if path.is_file():
        return path
    shipped = {each.stem: each for each in sorted(RECIPES.glob("*.toml"))}
    if str(name) in shipped:
        return shipped[str(name)]
    hint = did_you_mean(difflib.get_close_matches(path.stem, shipped))
    raise UsageError(f"{where} {name}: no such file or recipe{hint} (`ldm recipes` lists those that come with ldm)")


@dataclass(frozen=True)
class Recipe:
    """A recipe file: the preset that it builds on ("" = none), and {"section.name": value} of what differs."""

    preset: str
    values: dict[str, object]

    @property
    def kind(self) -> str:
        """A name in KINDS: its preset's, or the one that has all its sections; "" where several have."""
        if self.preset in (known := presets()):
            return known[self.preset].kind
        sections = {path.partition(".")[0] for path in self.values}
        kinds = [
            kind for kind in KINDS if kind != "classifier" or kind in sections
        ]  # its others are a diffusion's, too
        fitting = [kind for kind in kinds if sections <= {section.name for section in fields(KINDS[kind])}]
        return fitting[0] if len(fitting) == 1 else ""


def read_recipe(path: Path) -> Recipe:
    """The recipe in a TOML file; UsageError with file and line where it is none."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}: not UTF-8 text (byte {error.start}); a recipe is a TOML file") from None
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}") from None
    document = _document(text, str(path))
    preset = document.pop("preset", "")
    if not isinstance(preset, str):
        raise UsageError(f"{path}: preset: {_quoted(preset)} is not a preset's name (`ldm presets` lists them)")
    return Recipe(preset, _flatten(document, str(path)))


def _document(text: str, name: str) -> dict[str, object]:
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"{name}: {_toml_complaint(error, text)}") from None


def _flatten(document: Mapping[str, object], name: str) -> dict[str, object]:
    found: dict[str, object] = {}
    for section, content in document.items():
        if not isinstance(content, dict):
            raise UsageError(f"{name}: {section}: settings stand in sections, as in [train]")
        found |= {f"{section}.{key}": value for key, value in content.items()}
    return found


def _toml_complaint(error: tomllib.TOMLDecodeError, text: str) -> str:
    message = str(error)
    match = re.search(r"\(at line (\d+), column (\d+)\)", message)
    line = match[1] if match else str(text.count("\n") + 1)
    reason = message.split(" (at ")[0]
    return f"line {line}: not TOML: {reason[:1].lower() + reason[1:]}"


def recipe_layers(run_kind: str, name: str | Path) -> list[Layer]:
    """The layers of a recipe: its preset's values, where it names one (`preset = "kl-f4"`), and its own over them."""
    path = recipe_path(name)
    recipe = read_recipe(path)
    below = [preset_layer(run_kind, recipe.preset, f"{path}: preset")] if recipe.preset else []
    return [*below, (f"recipe {path}", recipe.values)]


def environment_layers(run_kind: str, environ: Mapping[str, str]) -> list[Layer]:
    """LDM_SECTION_KEY variables, each its own origin."""
    found: list[Layer] = []
    sections = {each.name for config_class in KINDS.values() for each in fields(config_class)}
    elsewhere = {path for other in KINDS if other != run_kind for path in paths(other)} - set(paths(run_kind))
    for variable in sorted(environ):
        match = re.fullmatch(r"LDM_([A-Z]+)_([A-Z0-9_]+)", variable)
        if match and match[1].lower() in sections:
            path = f"{match[1].lower()}.{match[2].lower()}"
            if path not in elsewhere:
                found.append((f"environment {variable}", {path: environ[variable]}))
    return found


def set_layers(assignments: Iterable[str]) -> list[Layer]:
    """`--set section.name=value`, in the order given."""
    found: list[Layer] = []
    for text in assignments:
        path, equals, value = text.partition("=")
        if not equals:
            raise UsageError(f"--set {text}: write it as section.name=value, as in --set train.lr=1e-3")
        found.append(("--set", {path.strip().replace("-", "_"): value.strip()}))
    return found


def gather(
    run_kind: str,
    *,
    preset: str = "",
    recipe: str | Path = "",
    environ: Mapping[str, str] | None = None,
    named: Iterable[Layer] = (),
    assignments: Iterable[str] = (),
) -> list[Layer]:
    """All layers in their order: preset < recipe < environment < named options < --set.

    A recipe may build on a preset of its own; with --preset beside it, UsageError, since one of the two would be lost.
    """
    from_recipe = recipe_layers(run_kind, recipe) if recipe else []
    if preset and len(from_recipe) > 1:
        raise UsageError(f"--preset {preset}: {from_recipe[-1][0]} builds on {from_recipe[0][0]}; give one of the two")
    return [
        *([preset_layer(run_kind, preset)] if preset else []),
        *from_recipe,
        *environment_layers(run_kind, environ or {}),
        *named,
        *set_layers(assignments),
    ]


def resolve(run_kind: str, layers: Iterable[Layer]) -> Resolved:
    """Apply (origin, {path: value or text}) layers over the defaults, later ones over earlier ones.

    Checks between fields run once, on the result, so that a preset and a recipe may each be incomplete.
    """
    known = paths(run_kind)
    values = defaults(run_kind)
    origins = dict.fromkeys(known, "default")
    for origin, layer in layers:
        for path, value in layer.items():
            values[path] = _value(run_kind, path, value, origin)
            origins[path] = origin
    return Resolved(run_kind, _build(run_kind, values, origins), origins)


def _build(run_kind: str, values: Mapping[str, object], origins: Mapping[str, str]) -> Config:
    config_class, known = KINDS[run_kind], paths(run_kind)
    try:
        return config_class(
            **{
                name: section(
                    **{
                        setting.name: _coerce(known[path := f"{name}.{setting.name}"], values[path])
                        for setting in fields(section)
                    }
                )
                for name, section in _sections(config_class)
            }
        )
    except UsageError as error:
        named = [path for path in re.findall(r"[a-z]+\.[a-z_0-9]+", str(error)) if path in known]
        where = list(dict.fromkeys(origins[path] for path in named if origins[path] != "default"))
        raise UsageError(f"{error} (from {', '.join(where)})" if where else str(error)) from None


# --- out again -------------------------------------------------------------------------------------------------


def flat(config: Config) -> dict[str, object]:
    """{"section.name": value} of a configuration."""
    return {
        f"{name}.{setting.name}": getattr(getattr(config, name), setting.name)
        for name, section in _sections(config)
        for setting in fields(section)
    }


def _literal(value: object) -> str:
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(_literal, value)) + "]"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return repr(value)


def to_toml(config: Config, header: str = "") -> str:
    """The whole configuration as TOML; `from_toml` gives an equal one back. `header` becomes comment lines."""
    hints = paths(kind_of(config))
    lines = [f"# {line}".rstrip() for line in header.splitlines()]
    section = ""
    for path, value in flat(config).items():
        if path.partition(".")[0] != section:
            section = path.partition(".")[0]
            lines += ["", f"[{section}]"]
        lines.append(f"{path.partition('.')[2]} = {_literal(_coerce(hints[path], value))}")
    return "\n".join(lines).lstrip("\n") + "\n"


def from_toml(run_kind: str, text: str, name: str = "config.toml") -> Config:
    """The configuration that `to_toml` wrote, or any recipe's text over the defaults."""
    return resolve(run_kind, [(name, _flatten(_document(text, name), name))]).config


def kind_of(config: Config) -> str:
    return next(kind for kind, config_class in KINDS.items() if isinstance(config, config_class))


def config_hash(config: Config) -> str:
    """SHA-256 (hex) of the configuration's TOML; equal configurations have equal hashes."""
    return hashlib.sha256(to_toml(config).encode()).hexdigest()


def describe(resolved: Resolved) -> list[tuple[str, str, str]]:
    """(setting, value as TOML, origin) of each setting, for `--plan`."""
    return [(path, _literal(value), resolved.origins[path]) for path, value in flat(resolved.config).items()]
