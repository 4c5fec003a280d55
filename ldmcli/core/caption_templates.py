"""Templates of captions: text with columns of a data set in braces, as in "a {colours} {name}, {keywords:3}".

A template is pieces between commas, colons, semicolons and full stops. A piece all of whose columns are empty falls
away with the sign before it; elsewhere an empty column leaves no trace.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from string import Formatter

from ldmcli.core.errors import UsageError

_SEPARATOR = re.compile(r"\s*[,;:.]\s+")
_ARTICLE = re.compile(r"(?:^|\s)[Aa]\s+$")
_VOWEL = re.compile(r"(?!uni|use|usu|eu|one\b|once\b|uku|ute)[aeiou]", re.IGNORECASE)
_EMPTY_BRACKETS = re.compile(r"\s*\(\s*\)|\s*\[\s*\]")


@dataclass(frozen=True)
class Field:
    """A column in a template. most: how many of a list are taken at most; None = `:N` was not written."""

    column: str
    most: int | None = None


@dataclass(frozen=True)
class Piece:
    """Literal text and fields in their order. sign: what stands between the piece and the one before it."""

    sign: str
    parts: tuple[str | Field, ...]


@dataclass(frozen=True)
class Template:
    """A template as it was written, and its pieces."""

    text: str
    pieces: tuple[Piece, ...]

    @cached_property
    def fields(self) -> tuple[Field, ...]:
        """Columns in it, in their order."""
        return tuple(field for piece in self.pieces for field in piece.parts if isinstance(field, Field))

    def filled(self, values: Sequence[str]) -> str:
        """The text with a value in place of each of `fields`; "" where all are empty."""
        if self.fields and not any(value.strip() for value in values):
            return ""
        text, rest = "", iter(values)
        for piece in self.pieces:
            parts = [part if isinstance(part, str) else next(rest) for part in piece.parts]
            own = [value for value, part in zip(parts, piece.parts) if isinstance(part, Field)]
            words = _joined(parts) if not own or any(value.strip() for value in own) else ""
            text += (piece.sign if text and words else "") + words
        return text


def parse_template(text: str) -> Template:
    """The template in `text`. Raises UsageError for braces that do not match, and for what is no column and number."""
    pieces: list[Piece] = []
    sign = ""
    parts: list[str | Field] = []
    for part in _parts(text):
        if isinstance(part, Field):
            parts.append(part)
            continue
        literals, signs = _SEPARATOR.split(part), _SEPARATOR.findall(part)
        for k, literal in enumerate(literals):
            if k:
                pieces.append(Piece(sign, tuple(parts)))
                sign, parts = signs[k - 1].strip() + " ", []
            parts += [literal] if literal else []
    pieces.append(Piece(sign, tuple(parts)))
    return Template(text, tuple(piece for piece in pieces if piece.parts))


def _parts(text: str) -> list[str | Field]:
    found: list[str | Field] = []
    try:
        parsed = list(Formatter().parse(text))
    except ValueError as error:
        raise UsageError(f"data.captions: {text!r}: {error}; columns stand in braces, as in {{name}}") from None
    for literal, column, count, conversion in parsed:
        if literal and found and isinstance(found[-1], str):
            found[-1] += literal
        elif literal:
            found.append(literal)
        if column is None:
            continue
        known = not count or re.fullmatch(r"[1-9]\d{0,3}", count)
        if not column.strip() or conversion or not known:
            raise UsageError(
                f"data.captions: {text!r}: braces hold the name of a column, or name:N for at most N of a list"
            )
        found.append(Field(column.strip(), int(count) if count else None))
    if not any(isinstance(part, Field) or part.strip() for part in found):
        raise UsageError("data.captions: an empty template; leave it out")
    return found


def _joined(parts: list[str]) -> str:
    """Parts as one text: "a" is "an" before a vowel, where the two come from different parts; blanks are merged."""
    text, article = "", False
    for part in parts:
        if article and part.strip():
            text = text.rstrip() + "n " if _VOWEL.match(part.lstrip()) else text
        text += part
        article = bool(_ARTICLE.search(text)) if part.strip() else article
    return " ".join(_EMPTY_BRACKETS.sub("", text).split())
