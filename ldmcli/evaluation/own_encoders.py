"""Encoders of one's own as networks that measure: what one has to be, where it is found, and what it gives, checked."""

import inspect
import re
import sys
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from ldmcli.core.errors import InputError
from ldmcli.core.files import sha256_file, tensors_hash
from ldmcli.networks.feature_nets import RESIZE

DEFAULT_RULE = "bicubic (antialiased)"
PLACE = re.compile(r"(?P<file>.+\.py|[A-Za-z_][\w.]*):(?P<name>[A-Za-z_]\w*)")
NAME = re.compile(r"[A-Za-z][A-Za-z0-9]*([._-][A-Za-z0-9]+)*")
LONGEST = 40  # characters of a name


class Encoder(Protocol):
    """What `evaluate(features=…)` takes, and `--features FILE.py:NAME` finds.

    name: letters and digits, with single dots, hyphens and underscores between them, at most 40; numbers are called
    after it. dim: values of a feature vector. size: px a side of the pictures that it is given; None: they come as
    they are.

    These may be there, too. rule: how pictures are resized to `size`, a name of `feature_nets.RESIZE` (bicubic,
    antialiased). weights: the file whose SHA-256 stands in every number; without it that of `state_dict()` does, and
    without either that of the file with the code.
    """

    name: str
    dim: int
    size: int | None

    def __call__(self, images: Tensor, /) -> Tensor | np.ndarray:
        """Features (N, dim), floating point and finite, of (N, 3, size, size) float32 in [0, 255], RGB; where size is
        None, of (N, H, W, 3) uint8, all of one size."""
        ...


class CheckedEncoder:
    """An encoder as a network that measures: images → features (N, dim) and no logits (N, 0).

    place: where it is from, as people know it. Raises InputError for an encoder that is none, and for what goes wrong
    in its code or comes out of it, in one line.
    """

    def __init__(self, encoder: Any, place: str, source: Path | None):
        self.encoder, self.place, self.source = encoder, place, source
        for attribute in ("name", "dim", "size"):
            if not hasattr(encoder, attribute):
                raise InputError(f"{place}: an encoder has a {attribute}, and this {_kind(encoder)} has none")
        if not callable(encoder):
            raise InputError(f"{place}: this {_kind(encoder)} cannot be called with images")
        self.name, self.dim, self.size = encoder.name, encoder.dim, encoder.size
        self.rule = getattr(encoder, "rule", DEFAULT_RULE)
        self._check()
        if isinstance(encoder, nn.Module):
            encoder.eval()
        self.path, self.sha256 = self._weights()

    def _check(self) -> None:
        if not isinstance(self.name, str) or not NAME.fullmatch(self.name) or len(self.name) > LONGEST:
            raise InputError(
                f"{self.place}: name = {self.name!r}; letters and digits are needed, with single dots, hyphens or "
                f"underscores between, at most {LONGEST}"
            )
        for attribute, value in (("dim", self.dim), ("size", self.size)):
            absent = attribute == "size" and value is None
            if not absent and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                or_none = ", or None" if attribute == "size" else ""
                raise InputError(f"{self.place}: {attribute} = {value!r}; a whole number from 1 on is needed{or_none}")
        if self.rule not in RESIZE:
            raise InputError(f"{self.place}: rule = {self.rule!r}; choose one of {', '.join(RESIZE)}")

    def _weights(self) -> tuple[Path, str]:
        """(the file whose content is the encoder's, SHA-256): its weights, else its state, else its code."""
        given = getattr(self.encoder, "weights", None)
        if given is not None:
            if not isinstance(given, (str, Path)) or not Path(given).is_file():
                raise InputError(f"{self.place}: weights = {given!r}; the path of a file is needed")
            return Path(given), sha256_file(Path(given))
        state: Any = {}
        if hasattr(self.encoder, "state_dict"):
            with _one_line(self.place, self.source):
                state = self.encoder.state_dict()
        found = state.items() if isinstance(state, Mapping) else ()
        tensors = {name: value.cpu() for name, value in found if isinstance(value, Tensor)}
        if tensors:
            return self.source or Path(self.place), tensors_hash(tensors)
        if self.source is None:
            raise InputError(
                f"{self.place}: nothing says which encoder it is; give it weights = a file, or write it in a file"
            )
        return self.source, sha256_file(self.source)

    @property
    def layer(self) -> str:
        """What the features are, with the code that makes them: another preparation is another feature."""
        code = "" if self.source is None else f", code {sha256_file(self.source)[:12]}"
        return f"{self.place} ({self.dim}{code})"

    def to(self, device: torch.device) -> "CheckedEncoder":
        """The same; a module of torch is moved."""
        if isinstance(self.encoder, nn.Module):
            self.encoder.to(device)
        return self

    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor]:
        with _one_line(self.place, self.source):
            found = self.encoder(images)
        found = torch.from_numpy(found) if isinstance(found, np.ndarray) else found
        if not isinstance(found, Tensor):
            raise InputError(f"{self.place}: gives a {_kind(found)}, not a tensor or an array")
        wanted = (len(images), self.dim)
        if tuple(found.shape) != wanted:
            raise InputError(f"{self.place}: gives features of {tuple(found.shape)}, not {wanted}")
        if not found.is_floating_point():
            raise InputError(f"{self.place}: gives {found.dtype}; features are floating point")
        features = found.detach().float()
        if not bool(features.isfinite().all()):
            raise InputError(f"{self.place}: gives NaN or Inf")
        return features, features.new_zeros(len(images), 0)


def is_place(given: str) -> bool:
    """Whether it has the form FILE.py:NAME or package.module:NAME."""
    return PLACE.fullmatch(given) is not None


def find_encoder(given: str) -> CheckedEncoder:
    """The encoder at FILE.py:NAME or package.module:NAME: what NAME is, or what it gives when called without arguments.

    Raises InputError where there is none, and for what goes wrong in its code.
    """
    match = PLACE.fullmatch(given)
    assert match is not None
    where, name = match["file"], match["name"]
    place = f"{Path(where).name if where.endswith('.py') else where}:{name}"
    module = _module_of_file(Path(where)) if where.endswith(".py") else _module_by_name(where)
    source = source_of(module)
    if not hasattr(module, name):
        raise InputError(f"{where}: has no {name}")
    found = getattr(module, name)
    if inspect.isclass(found) or (callable(found) and not hasattr(found, "dim")):
        with _one_line(place, source):
            found = found()
    return CheckedEncoder(found, place, source)


def own_encoder(encoder: Any) -> CheckedEncoder:
    """An encoder that is at hand. Raises InputError for anything else."""
    kind = encoder if inspect.isfunction(encoder) else type(encoder)
    of_torch = str(getattr(kind, "__module__", "")).partition(".")[0] == "torch"
    return CheckedEncoder(encoder, getattr(kind, "__qualname__", "encoder"), None if of_torch else source_of(kind))


def source_of(thing: Any) -> Path | None:
    """The file with its code, None where there is none."""
    try:
        found = inspect.getsourcefile(thing)
    except (TypeError, OSError):
        return None
    return Path(found) if found and Path(found).is_file() else None


def _kind(thing: Any) -> str:
    return type(thing).__name__


def _module_of_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    spec = spec_from_file_location(f"ldm_encoder_{path.stem}", path.resolve())
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    sys.modules[spec.name] = module  # as dataclasses and pickles of the file's classes need it
    with _importing(path.resolve().parent), _one_line(path.name, path.resolve()):
        spec.loader.exec_module(module)
    return module


def _module_by_name(name: str) -> ModuleType:
    with _importing(Path.cwd()), _one_line(name, None):
        return import_module(name)


@contextmanager
def _importing(folder: Path) -> Iterator[None]:
    """Modules of the folder can be imported, as where Python is started there."""
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        if str(folder) in sys.path:
            sys.path.remove(str(folder))


@contextmanager
def _one_line(place: str, source: Path | None) -> Iterator[None]:
    """What goes wrong in an encoder's code becomes an InputError that names the line of its file."""
    try:
        yield
    except (Exception, SystemExit) as error:
        reason = (str(error).strip().splitlines() or [""])[0]
        said = f"{type(error).__name__}: {reason}" if reason else type(error).__name__
        raise InputError(f"{place}: {said}{_line_of(error, source)}") from error


def _line_of(error: BaseException, source: Path | None) -> str:
    """Where in an encoder's code it happened, in brackets; "" where it was not there."""
    if isinstance(error, SyntaxError):
        return ""  # the message has the line
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if frame.filename != __file__ and not frame.filename.startswith("<")
    ]
    own = [frame for frame in frames if source is not None and Path(frame.filename) == source] or frames
    return f" ({Path(own[-1].filename).name}, line {own[-1].lineno}, in {own[-1].name})" if own else ""
