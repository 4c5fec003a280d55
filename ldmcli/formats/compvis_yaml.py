"""A configuration of CompVis/latent-diffusion (YAML) as text and numbers that are checked when they are read."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ldmcli.core.errors import ModelError

LARGEST_CONFIG = 2**18  # bytes; the reader in Python, which no nesting can crash, takes seconds for as many


class Section:
    """A mapping of a YAML with its place, for errors."""

    def __init__(self, path: Path, place: str, values: Any):
        if not isinstance(values, dict):
            raise ModelError(f"{path}: {place or 'the file'} is no mapping, as a configuration of CompVis has it")
        self.path, self.place, self.values = path, place, values

    def error(self, key: str, why: str) -> ModelError:
        """The error for a value that cannot be used."""
        return ModelError(f"{self.path}: {self.place}.{key} = {str(self.values.get(key))[:80]!r}: {why}")

    def sub(self, key: str) -> "Section":
        """The mapping below a key."""
        return Section(self.path, f"{self.place}.{key}".lstrip("."), self.values.get(key))

    def whole(self, key: str, default: int | None = None, most: int = 2**20) -> int:
        """A whole number from 1 to `most`."""
        value = self.values.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or not 0 < value <= most:
            raise self.error(key, f"a whole number from 1 to {most:,} is expected")
        return value

    def number(self, key: str, default: float) -> float:
        """A finite number."""
        value = self.values.get(key, default)
        try:
            found = float(value)  # YAML 1.1 takes 1e-4 for text
        except (TypeError, ValueError):
            raise self.error(key, "a number is expected") from None
        if not abs(found) < 1e30:
            raise self.error(key, "a finite number is expected")
        return found

    def wholes(self, key: str, default: Sequence[int] | None = None) -> tuple[int, ...]:
        """A list of positive whole numbers, perhaps empty."""
        value = self.values.get(key, default)
        if (
            not isinstance(value, (list, tuple))
            or len(value) > 16
            or not all(isinstance(n, int) and not isinstance(n, bool) and 0 < n < 2**16 for n in value)
        ):
            raise self.error(key, "a list of positive whole numbers is expected")
        return tuple(value)

    def only(self, **allowed: tuple) -> None:
        """Raises ModelError where a key that is there has another value than those that these networks know."""
        for key, values in allowed.items():
            if key in self.values and self.values[key] not in values:
                known = " or ".join("none" if v is None else str(v).lower() for v in values)
                raise self.error(key, f"these networks know {known}")

    def known(self, *names: str) -> None:
        """Raises ModelError for keys that nobody here knows: they may change what the network is."""
        unknown = sorted(str(key) for key in self.values.keys() - set(names))
        if unknown:
            raise ModelError(f"{self.path}: {self.place}: unknown {', '.join(unknown[:5])}")

    def target(self) -> str:
        """The last part of `target`."""
        return str(self.values.get("target", "")).rpartition(".")[2]


def read_yaml(path: Path) -> Section:
    """The `model` section of a configuration. Raises ModelError for anything that is no plain YAML."""
    import yaml

    try:
        if path.stat().st_size > LARGEST_CONFIG:
            raise ModelError(f"{path}: too large for a configuration")
        text = path.read_text(encoding="utf-8")
        if text.count("&") > 64 or text.count("[") + text.count("{") > 2000:  # anchors of anchors grow without end
            raise ModelError(f"{path}: too many anchors or brackets for a configuration")
        values = yaml.safe_load(text)
    except FileNotFoundError:
        raise ModelError(f"{path}: no such configuration") from None
    except (yaml.YAMLError, UnicodeError, RecursionError, ValueError) as error:
        lines = str(error).strip().splitlines()
        raise ModelError(f"{path}: no plain YAML ({lines[0][:120] if lines else type(error).__name__})") from None
    return Section(path, "", values)
