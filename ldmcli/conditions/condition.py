"""The base of conditions: all that the program around the networks must know of one of them."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from ldmcli.core import files
from ldmcli.core.errors import InputError, UsageError
from ldmcli.core.settings import DataSettings, DiffusionConfig
from ldmcli.data.arrays import numeric_rows
from ldmcli.data.rows import ROLES
from ldmcli.networks.autoencoder import Autoencoder
from ldmcli.networks.conditioning import Conditioner

if TYPE_CHECKING:
    from ldmcli.conditions.dataset import ConditionDataset

Size = tuple[int, int]  # (height, width) in pixels
Spec = dict[str, Any]  # what a conditioner is built with, beside settings; JSON


class Ranks(Protocol):
    """The processes of a training (`training.distributed`)."""

    rank: int
    world_size: int

    def on_rank_0(self, function: Callable[[], Any]) -> Any: ...

    def on_all_ranks(self, function: Callable[[], Any]) -> Any: ...

    def gather(self, value: Any) -> list[Any]: ...


@dataclass(frozen=True)
class View:
    """A row as it is seen at one position of the training. crop: where it is cut, shares of the room that there is;
    seen: uint8 (H, W, 3), cut and mirrored, where that is at hand."""

    row: int
    position: int
    crop: tuple[float, float] = (0.5, 0.5)
    mirrored: bool = False
    seen: np.ndarray | None = None


@dataclass(frozen=True)
class CheckedRows:
    """Rows that can be used. bad: errors of those left out; found: what `Condition.fit` wants to know of the others."""

    rows: Any
    bad: list[Exception] = field(default_factory=list)
    found: Any = None


@dataclass(frozen=True)
class FitData:
    """What a spec is learned from: training rows, settings, the first stage, and what `check_rows` found by condition.
    The run's folder takes files (a tokeniser); init_from: the run that this one begins with."""

    rows: Any
    config: DiffusionConfig
    size: Size
    stage: Autoencoder
    run: Path
    init_from: Path | None = None
    found: dict[str, Any] = field(default_factory=dict)

    def earlier(self, name: str) -> Spec | None:
        """The condition's spec in the run that this one begins with."""
        if not self.init_from:
            return None
        return files.read_json(self.init_from / "stats.json").get("conditions", {}).get(name)


class Condition:
    """One condition y of a model (Sec. 3.3): where its values come from and how they are said, shown and kept.

    A *value* is what rows or people give (a caption, a layout, a class map). The conditioner, a network, prepares
    values as tensors (*inputs*) and embeds those: τ_θ(y). Models are trained with one by `--condition NAME`.
    """

    name = ""  # in settings, in stats.json and in keys of weights: `conditions.entries.NAME.`
    conditioner: type[Conditioner]  # τ_θ
    option = "--given"  # what people give it with on the command line
    argument = ""  # its keyword of `LoadedDiffusion.sample`; "" = an entry of `values`
    column = ""  # the role of the column of a data set that it is made of
    user_given = True  # `--condition` names it; else a task brings it along
    pipeline_tag = ""  # of the hub, for models with it
    example_call = example_option = ""  # in Python and on the command line, for model cards
    metadata_key = ""  # inside of samples; "" = the name
    short = True  # whether `described` fits above a picture
    spatial = False  # can be shown as a picture
    static = False  # neither crops nor flips change it, so that all rows are prepared once
    streamable = True  # --streaming: nothing has to be known of all rows beforehand
    image_sized = False  # whether inputs are as large as the picture
    sized = False  # whether values have the size of the picture, so that parsing needs it
    whole = False  # whether a value describes the picture as a whole, so that no window of it can be sampled alone

    # rows of a data set

    @property
    def from_pixels(self) -> bool:
        """Whether values are made of the pictures themselves."""
        return self.column == "image"

    def available(self, rows: Any, data: DataSettings) -> bool:
        """Whether rows have the column that values are made of."""
        return not self.column or rows.has(self.column)

    def check_columns(self, rows: Any, data: DataSettings) -> None:
        """Raises InputError where the data of a training lack what values are made of."""
        if not self.available(rows, data):
            article = "an" if self.column[0] in "aeiou" else "a"
            raise InputError(
                f"{rows.source}: --condition {self.name} needs {article} {self.column} column, and there is none "
                f"(found: {', '.join(f'{k} = {v}' for k, v in rows.columns.items() if v)}); "
                + (f"name it with --{self.column}-column or " if self.column in ROLES else "add it to the data or ")
                + "train with --condition none"
            )

    def drawn(self, data: DataSettings) -> bool:
        """Whether a training row has other values each time that it is seen, though neither crops nor flips matter."""
        return False

    def check_sources(self, config: DiffusionConfig) -> None:
        """Raises InputError for what settings name on this machine and can't be opened."""

    def open_early(self, config: DiffusionConfig, run: Path, ranks: Ranks) -> None:
        """Opens what may have to be downloaded, before data are read for nothing."""

    def validate(self, rows: Any) -> None:
        """Finds out what must be known of all rows before `from_row`. Raises InputError."""

    def check_rows(self, rows: Any, data: DataSettings, ranks: Ranks) -> CheckedRows:
        """The rows of a training that can be used, each looked at by one process. Raises InputError."""
        return CheckedRows(rows)

    def from_row(self, dataset: "ConditionDataset", view: View) -> Any:
        """The value of a row."""
        raise NotImplementedError

    def from_foreign_row(self, dataset: "ConditionDataset", view: View) -> Any:
        """The value of a row for a model that was trained on other data, where numbers may mean other things."""
        return self.from_row(dataset, view)

    def align_categories(self, rows: Any, conditioner: Any) -> np.ndarray | None:
        """The model's number of each category of the rows, -1 = it has none; None where there is nothing to align."""
        return None

    def report_unseen(self, dataset: "ConditionDataset", inputs: dict[str, Any] | None, conditioner: Any) -> None:
        """Says what the model will not see of the rows. inputs: of all of them; None where they are drawn."""

    # what is learned of data before the network is built

    def names_of(self, spec: Spec) -> list[str]:
        """Names of classes or categories."""
        return list(spec.get("names") or [])

    def cost_notes(self, config: DiffusionConfig) -> list[str]:
        """What the cost of a model leaves out."""
        return []

    def tokenizer(self, run: Path) -> Any:
        """The tokeniser that `fit` wrote into a run; None where the condition has none."""
        return None

    def fit(self, data: FitData) -> Spec:
        """The spec, from training rows."""
        return self.assumed_spec(data.config, data.stage)[0]

    def assumed_spec(self, config: DiffusionConfig, stage: Autoencoder) -> tuple[Spec, str]:
        """(spec, what to say of it) without data, for the costs of a model."""
        return {}, ""

    # what people give

    def as_list(self, given: Any) -> list:
        """Raw values from Python: one, or several, as a list. Raises UsageError for what can't be one."""
        if given is None:
            return []
        return list(given) if isinstance(given, (list, tuple)) else [given]

    def expand(self, values: list, conditioner: Any) -> list:
        """Values with such as stand for several replaced. conditioner: None where the model has none."""
        return values

    def parse(self, values: list, conditioner: Any, size: Size | None = None) -> list:
        """Raw values from people as `Conditioner.prepare` takes them, for pictures of `size`. Raises InputError."""
        return values

    def parse_one(self, value: Any, conditioner: Any, size: Size) -> Any:
        """`parse` of the one value that belongs to a picture."""
        return self.parse([value], conditioner, size)[0]

    def warn(self, values: Sequence, conditioner: Any) -> None:
        """Says what is lost of values that people gave."""

    def default(self, values: dict[str, list], conditioner: Any) -> list:
        """What stands for the condition in samples where nobody gave it, beside the other `values`. Raises UsageError
        where it is needed."""
        raise UsageError(f"{self.option}: {self.missing}")

    @property
    def missing(self) -> str:
        """What to say where it was needed and not given."""
        return f"this model is conditioned on {self.name}; give one with {self.option} {self.name}=VALUE"

    def check_left_out(self, conditioner: Any) -> None:
        """Raises UsageError where an edit can't do without the condition: there is no null, or nobody wants it."""

    def inputs_of_ids(self, ids: Any, conditioner: Any) -> dict[str, Any]:
        """Inputs of token ids (n, L), instead of values. Raises UsageError for ids that the transformer lacks."""
        raise UsageError(f"tokens: {self.name} is not told by token ids")

    takes_ids = False  # whether `inputs_of_ids` knows how

    def centred(self, value: Any, size: Size, inside: Size | None) -> Any:
        """A value for a picture of `inside` px as it is for one of `size` px with that in its middle."""
        return value

    def padded(self, value: Any, size: Size, unit: int) -> Any:
        """A value for a picture of `size` px as it is for one padded to multiples of `unit`, below and right."""
        return value

    def window(self, value: Any, window: tuple[slice, slice]) -> Any:
        """The part of a value that belongs to a window of the picture."""
        return value

    def input_size(self, inputs: dict[str, Any]) -> Size | None:
        """(height, width) px of the pictures that inputs speak of; None where they fit any."""
        return None

    # what is shown and kept

    def described(self, value: Any, names: Sequence[str]) -> str:
        """A value in a few words, for captions of pictures."""
        return f"{self.name} {value}"

    def picture(self, value: Any, size: Size, names: Sequence[str]) -> np.ndarray:
        """A value of a spatial condition as uint8 (H, W, 3) of `size`."""
        raise NotImplementedError

    def beside(self, sample: np.ndarray, value: Any, names: Sequence[str]) -> np.ndarray:
        """What stands beside a sample, uint8 (H, W, 3), to show what it was to be."""
        return self.picture(value, (sample.shape[0], sample.shape[1]), names)

    def metadata(self, value: Any) -> Any:
        """A value as JSON, inside of samples."""
        return value

    def arrays(self, value: Any) -> list[np.ndarray]:
        """What makes a value of a spatial condition another one."""
        return [np.asarray(value)]

    def preview_values(self, dataset: "ConditionDataset", ids: Sequence[int], spec: Spec) -> list:
        """Values that previews of a training show: those of validation rows `ids`."""
        return dataset.values(self.name, ids, ids)

    def parse_option(self, text: str) -> Any:
        """The raw value of `--given NAME=TEXT`: JSON, or text."""
        try:
            return json.loads(text)
        except ValueError:
            return text


def as_list(given: Any) -> list:
    """Several things as a list; one thing (a dict, a text, a picture, an array or rows of numbers) as a list of it."""
    if given is None:
        return []
    if numeric_rows(given):
        given = np.asarray(given)
    if isinstance(given, np.ndarray) or hasattr(given, "detach"):
        return list(np.asarray(given)) if given.ndim > 2 else [np.asarray(given)]
    return list(given) if isinstance(given, Sequence) and not isinstance(given, (str, bytes)) else [given]
