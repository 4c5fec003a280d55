"""Several splits as one set of rows (`--split all`)."""

import hashlib
from collections.abc import Callable

import numpy as np

from ldmcli.data.rows import Rows


class JoinedRows:
    """The rows of several splits, one after the other, for the split that is all of a data set."""

    _OF_A_ROW = frozenset(
        "name image shape pixels caption label objects all_objects map cell words map_pixels boxes content_hash".split()
    )

    def __init__(self, parts: list[Rows]):
        self._parts, first = parts, parts[0]
        self._ends = np.cumsum([len(part) for part in parts])
        self.source, self.split, self.columns = first.source, "all", first.columns
        self.notes = list(dict.fromkeys(note for part in parts for note in part.notes))
        self.class_names, self.category_names = first.class_names, first.category_names
        self.cells = [name for name in first.cells if all(name in part.cells for part in parts)]
        self.room, self.validation_is_train = first.room, False
        self.fingerprint = hashlib.sha256("".join(part.fingerprint for part in parts).encode()).hexdigest()

    def __len__(self) -> int:
        return int(self._ends[-1])

    @property
    def boxes_are_shares(self) -> bool:
        """As of `Rows`; the same for every split."""
        return self._parts[0].boxes_are_shares

    @boxes_are_shares.setter
    def boxes_are_shares(self, value: bool) -> None:
        for part in self._parts:
            part.boxes_are_shares = value

    def has(self, role: str) -> bool:
        """As of `Rows`: whether the rows of every split do."""
        return all(part.has(role) for part in self._parts)

    def __getattr__(self, name: str) -> Callable:
        if name not in self._OF_A_ROW:
            raise AttributeError(name)

        def of_row(i: int, *args, **more):
            k = int(np.searchsorted(self._ends, i, side="right"))
            part = self._parts[k]
            return getattr(part, name)(i - int(self._ends[k]) + len(part), *args, **more)

        return of_row
