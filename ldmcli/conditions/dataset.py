"""Rows of a data set as values of conditions, cut and mirrored as the pictures are."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ldmcli.conditions import CONDITIONS
from ldmcli.conditions.condition import View
from ldmcli.core.settings import DataSettings, DiffusionConfig
from ldmcli.data.augment import crop_and_flip
from ldmcli.data.lama_masks import lama_mask
from ldmcli.data.masks import random_mask
from ldmcli.data.mixed_captions import MixedCaptions
from ldmcli.networks.conditioners import Conditions


def check_columns(rows, names: Sequence[str], data: DataSettings) -> None:
    """Raises InputError where the data of a training lack what a condition is made of."""
    for name in names:
        CONDITIONS[name].check_columns(rows, data)


class ConditionDataset:
    """Values of conditions for rows of a data set. Training rows (`training`) are cut, mirrored, degraded and masked
    by (seed, position); others are cut in the middle, degraded and masked by (seed, row)."""

    def __init__(self, rows, config: DiffusionConfig, size: tuple[int, int], *, training: bool):
        self.rows, self.config, self.size, self.training = rows, config, size, training
        self.crop = config.data.crop if training else "center"
        self.given_masks: Callable[[int], np.ndarray] | None = None  # of rows by number
        self._kept: dict[tuple[str, int], Any] = {}
        self._categories: dict[str, np.ndarray] = {}

    def values(self, name: str, ids: Sequence[int], positions: Sequence[int], pixels: np.ndarray | None = None) -> list:
        """Values (`Conditioner.prepare`) of rows `ids` at `positions` of the training. pixels: uint8 (n, H, W, 3),
        the rows cut and mirrored, where the caller has them."""
        condition = CONDITIONS[name]
        if condition.static or not self.training:
            views = [View(int(i), int(at)) for i, at in zip(ids, positions)]
        else:
            crops, mirrored = crop_and_flip(self.rows, self.config, ids, np.asarray(positions))
            views = [View(int(i), int(at), tuple(u), bool(m)) for i, at, u, m in zip(ids, positions, crops, mirrored)]
        if pixels is not None:
            views = [replace(view, seen=seen) for view, seen in zip(views, pixels)]
        return [condition.from_row(self, view) for view in views]

    def foreign_values(self, name: str, ids: Sequence[int]) -> list:
        """`values` for a model that was trained on other data: classes by name."""
        return [CONDITIONS[name].from_foreign_row(self, View(int(i), int(i))) for i in ids]

    @cached_property
    def captions(self) -> MixedCaptions:
        """Captions by the templates of data.captions."""
        return MixedCaptions(self.rows, self.config.data)

    def pixels(self, view: View) -> np.ndarray:
        """uint8 (H, W, 3), cut and mirrored."""
        if view.seen is not None:
            return view.seen
        found = self.rows.pixels(view.row, self.size, self.crop, view.crop)
        return np.ascontiguousarray(found[:, ::-1]) if view.mirrored else found

    def kept(self, name: str, view: View, make: Callable[[], Any], room: bool = False) -> Any:
        """What `make()` gives for a row before it is mirrored, kept where each epoch cuts it alike. room: only as far
        as the memory for pictures goes (`Room`)."""
        key = (name, view.row)
        if key in self._kept:
            return self._kept[key]
        found = make()
        if self.crop == "center" and (not room or self.rows.room.take(found.nbytes)):
            self._kept[key] = found
        return found

    def align_categories(self, conditions: Conditions) -> None:
        """Numbers categories of the rows as a model does, whose data may have had others."""
        for name, conditioner in conditions.entries.items():
            found = CONDITIONS[name].align_categories(self.rows, conditioner)
            if found is not None:
                self._categories[name] = found
                self._kept.clear()

    def categories(self, name: str) -> np.ndarray | None:
        """The model's category of each of the rows', -1 where it has none; None where they are the same."""
        return self._categories.get(name)

    def mask(self, view: View) -> np.ndarray:
        """bool (H, W), True = hole: the row's of `given_masks`, else a random one of the task's kind."""
        if self.given_masks is not None:
            return self.given_masks(view.row)
        (height, width), kind, key = self.size, self.config.task.masks, self.random_key(view)
        if kind == "own":
            return random_mask(height, width, *key, "mask")
        return lama_mask(kind, height, width, *key, "mask")

    def random_key(self, view: View) -> tuple[int, int, str]:
        """What random numbers of a view go by: (seed, position) in training, else (seed, row)."""
        return self.config.train.seed, view.position, "training" if self.training else "validation"


class ConditionInputs:
    """Inputs of training batches: those of static conditions whose values are not drawn prepared once for all rows, the
    rest row by row."""

    def __init__(self, dataset: ConditionDataset, conditions: Conditions):
        self.dataset, self.conditions = dataset, conditions
        self.tables: dict[str, dict[str, Tensor]] = {}
        if not dataset.config.data.streaming:
            everything = range(len(dataset.rows))
            once = [name for name, one in CONDITIONS.items() if one.static and not one.drawn(dataset.config.data)]
            for name in [name for name in once if name in conditions.kinds]:
                self.tables[name] = conditions.conditioners[name].prepare(dataset.values(name, everything, everything))

    def report_unseen(self) -> None:
        """Says what the model will not see of the rows."""
        for name, conditioner in self.conditions.entries.items():
            CONDITIONS[name].report_unseen(self.dataset, self.tables.get(name), conditioner)

    def batch(self, ids: np.ndarray, positions: np.ndarray, pixels: np.ndarray | None) -> dict[str, Tensor]:
        """Inputs of rows `ids` at `positions`, as `Conditions.prepare` gives them. pixels: as `ConditionDataset.values`
        takes them."""
        out: dict[str, Tensor] = {}
        for name in self.conditions.kinds:
            if name in self.tables:
                rows = torch.from_numpy(ids.copy())
                out |= {f"{name}.{part}": table[rows] for part, table in self.tables[name].items()}
            else:
                values = self.dataset.values(name, ids.tolist(), positions.tolist(), pixels)
                out |= self.conditions.prepare_one(name, values)
        return out
