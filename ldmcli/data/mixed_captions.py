"""Captions made of columns by templates (`data.captions`), drawn anew at each position of a training."""

from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from itertools import islice
from typing import Any

from ldmcli.core.caption_templates import Field, Template, parse_template
from ldmcli.core.config import did_you_mean, suggestions
from ldmcli.core.errors import InputError
from ldmcli.core.settings import DataSettings
from ldmcli.data.decode import sanitise
from ldmcli.maths import rng
from ldmcli.maths.colour_words import COLOUR_WORDS, MOST, colour_words

COLOURS = "colours"  # no column: what is seen in the picture
COLOURS_SIZE = (64, 64)  # at which it is seen
SAID_BY_ROLE = ("caption", "label")  # whatever their columns are called

RandomKey = tuple[int, int, str]  # seed, position or row, "training" or "validation"


def lacking(rows: Any, templates: Sequence[str]) -> list[str]:
    """Names in templates that rows have no column for."""
    fields = [field.column for text in templates for field in parse_template(text).fields]
    return [name for name in dict.fromkeys(fields) if name != COLOURS and not (rows.has(name) or name in rows.cells)]


def check_templates(rows: Any, templates: Sequence[str]) -> None:
    """Raises InputError, naming the columns that there are, where templates name others."""
    if wrong := lacking(rows, templates):
        there = [*(role for role in SAID_BY_ROLE if rows.has(role)), *rows.cells, COLOURS]
        names = list(dict.fromkeys(name for name in there if name != rows.columns.get("image")))
        raise InputError(
            f"{sanitise(rows.source)}, {rows.split}: data.captions names {sanitise(wrong[0], 60)}, and there is no "
            f"such column; there are {', '.join(sanitise(name, 40) for name in names)}"
            f"{did_you_mean(suggestions(wrong[0], names))}"
        )


class MixedCaptions:
    """Captions of rows by data.captions. Everything is a function of the row and of random keys; getters raise
    InputError for cells that are no text."""

    def __init__(self, rows: Any, data: DataSettings):
        self.rows, self.data = rows, data
        self._colours: dict[int, list[str]] = {}

    @cached_property
    def templates(self) -> tuple[Template, ...]:
        """Those of data.captions, in their order."""
        return tuple(map(parse_template, self.data.captions))

    def drawn(self, i: int, key: RandomKey) -> str:
        """The caption of row i by a template that is drawn by `key`: the next one that says something, where columns
        of the drawn one are empty; "" where all are."""
        seed, position, *purpose = key
        first = rng.key(seed, position, *purpose, "template") % len(self.templates)
        texts = (self._filled(one, i, key) for one in (*self.templates[first:], *self.templates[:first]))
        return next((text for text in texts if text), "")

    def first(self, i: int, key: RandomKey) -> str:
        """The caption of row i by the first template, lists in an order drawn by `key`."""
        return self._filled(self.templates[0], i, key)

    def all_words(self, ids: Iterable[int]) -> Iterator[str]:
        """Texts with every word that captions of rows `ids` may have, for a vocabulary, and as long as captions become.
        Lists go by the longest words first, and colours by turns: no picture is looked at."""
        for i in ids:
            for template in self.templates:
                lists = [(f, sorted(self._words(i, f), key=len, reverse=True)) for f in template.fields]
                for turn in range(max((_turns(field, words, i) for field, words in lists), default=1)):
                    yield template.filled([_part(field, words, turn, i) for field, words in lists])

    def _filled(self, template: Template, i: int, key: RandomKey) -> str:
        seed, position, *purpose = key
        drawn: dict[str, Iterator[str]] = {}
        said: dict[int, str] = {}
        for k, field in enumerate(template.fields):
            if field == Field("caption"):
                said[k] = self.rows.caption(i)
            elif field.column != COLOURS:
                if field.column not in drawn:  # a second mention goes on with other words of the list
                    words = self._words(i, field)
                    order = rng.key(seed, position, *purpose, field.column)
                    drawn[field.column] = iter(_shuffled(words, order))
                said[k] = ", ".join(islice(drawn[field.column], field.most))
        known = {word for text in said.values() for word in text.lower().split()}
        for k, field in enumerate(template.fields):
            if field.column == COLOURS:
                said[k] = _listed([word for word in self._seen(i) if word not in known][: field.most])
        return template.filled([said[k] for k in range(len(template.fields))])

    def _words(self, i: int, field: Field) -> list[str]:
        if field.column == COLOURS:
            return list(COLOUR_WORDS)
        if field == Field("caption"):
            return [self.rows.caption(i)]
        return self.rows.words(i, field.column)

    def _seen(self, i: int) -> list[str]:
        """The colours of row i; kept, but of streams, in which no row comes back."""
        if i in self._colours:
            return self._colours[i]
        found = colour_words(self.rows.pixels(i, COLOURS_SIZE))
        if not self.data.streaming:
            self._colours[i] = found
        return found


def _shuffled(words: list[str], key: int) -> list[str]:
    return [words[k] for k in rng.permutation(key, 0, len(words))] if len(words) > 1 else words


def _turns(field: Field, words: list[str], i: int) -> int:
    """How many texts of `all_words` it takes to have said all words of a list."""
    if field.column == COLOURS:
        return 1 if i else len(words)
    return -(-len(words) // field.most) if field.most else 1


def _part(field: Field, words: list[str], turn: int, i: int) -> str:
    """The words of a list that stand in a text of `all_words`."""
    if field.column == COLOURS:
        return _listed([words[(i + turn + k) % len(words)] for k in range(MOST)][: field.most])
    if field.most is None:
        return ", ".join(words)
    parts = max(-(-len(words) // field.most), 1)
    return ", ".join(words[turn % parts * field.most :][: field.most])


def _listed(words: list[str]) -> str:
    """ "red", "red and white", "red, white and blue"."""
    return " and ".join([", ".join(words[:-1]), words[-1]]) if len(words) > 1 else "".join(words)
