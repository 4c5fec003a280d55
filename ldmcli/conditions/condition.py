"""The base of conditions: all that the program around the networks must know of one of them."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from ldmcli.core.errors import UsageError
from ldmcli.data.arrays import numeric_rows
from ldmcli.networks.conditioning import Conditioner

Size = tuple[int, int]  # (height, width) in pixels


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
    sized = False  # whether values have the size of the picture, so that parsing asks for it
    whole = False  # whether a value speaks of the picture as a whole, so that no window of that can be drawn alone

    def as_list(self, given: Any) -> list:
        """Raw values from Python: one, or several, as a list. Raises UsageError for what can't be one."""
        return as_list(given)

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


def as_list(given: Any) -> list:
    """Several things as a list; one thing (a dict, a text, a picture, an array or rows of numbers) as a list of it."""
    if given is None:
        return []
    if numeric_rows(given):
        given = np.asarray(given)
    if isinstance(given, np.ndarray) or hasattr(given, "detach"):
        return list(np.asarray(given)) if given.ndim > 2 else [np.asarray(given)]
    return list(given) if isinstance(given, Sequence) and not isinstance(given, (str, bytes)) else [given]
