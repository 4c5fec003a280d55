"""Classes of pictures: class-conditional generation (Sec. 4.3.1, Tab. 3)."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ldmcli.conditions.condition import Condition, FitData, Spec, View
from ldmcli.core.errors import UsageError
from ldmcli.core.settings import DiffusionConfig
from ldmcli.networks.autoencoder import Autoencoder
from ldmcli.networks.conditioners import ClassConditioner, Conditions
from ldmcli.networks.names import place_of

if TYPE_CHECKING:
    from ldmcli.conditions.dataset import ConditionDataset

ASSUMED_CLASSES = 1000  # ImageNet
ALL = "all"  # stands for every class


class Class(Condition):
    """The class of a picture, by index or name. τ_θ is a table with a row a class; the null is a class of its own."""

    name, conditioner = "class", ClassConditioner
    option, argument = "--class", "classes"
    column = "label"
    static = True
    missing = "this model takes a class beside the prompt"

    def from_row(self, dataset: "ConditionDataset", view: View) -> int:
        """The index of the row's class."""
        return dataset.rows.label(view.row)

    def from_foreign_row(self, dataset: "ConditionDataset", view: View) -> int | str:
        """The row's class by name where classes have names: the data's order need not be the model's."""
        label, names = dataset.rows.label(view.row), dataset.rows.class_names
        return names[label] if names else label

    def names_of(self, spec: Spec) -> list[str]:
        """Names of the classes."""
        return list(spec.get("class_names") or [])

    def preview_values(self, dataset: "ConditionDataset", ids: Sequence[int], spec: Spec) -> list[int]:
        """The classes one after the other of a model with no other condition, else those of the rows."""
        if dataset.config.kinds != (self.name,):
            return super().preview_values(dataset, ids, spec)
        return [k % len(self.names_of(spec)) for k in range(max(len(ids), 1))]

    def described(self, value: Any, names: Sequence[str]) -> str:
        """The name of the class."""
        k = place_of(value, names) if isinstance(value, str) else int(value)
        return names[k] if k is not None and k < len(names) else str(value)

    def fit(self, data: FitData) -> Spec:
        """The names of the classes."""
        return ClassConditioner.learn(data.config.condition, [], data.rows, data.run)

    def assumed_spec(self, config: DiffusionConfig, stage: Autoencoder) -> tuple[Spec, str]:
        """As many classes as ImageNet has."""
        names = [str(k) for k in range(ASSUMED_CLASSES)]
        return {"class_names": names}, f"class: {ASSUMED_CLASSES:,} classes assumed; the data say how many there are"

    def as_list(self, given: Any) -> list[int | str]:
        """Classes from Python: a name or index, or several: a list, an array, a tensor of whole numbers. Raises
        UsageError."""
        found = given.tolist() if hasattr(given, "tolist") else given
        found = [] if found is None else [found] if isinstance(found, (str, int, float)) else list(found)
        return [_label(one.item() if hasattr(one, "item") else one) for one in found]

    def expand(self, values: list, conditioner: ClassConditioner | None) -> list:
        """Every class for "all"."""
        if values != [ALL]:
            return values
        return [] if conditioner is None else list(range(len(conditioner.names)))

    def default(self, values: dict[str, list], conditioner: ClassConditioner) -> list[int]:
        """All classes, unless a prompt was given. Else raises UsageError."""
        if values.get("text"):
            raise UsageError(f"{self.option}: {self.missing}")
        return list(range(len(conditioner.names)))

    def check_left_out(self, conditioner: ClassConditioner) -> None:
        """Raises UsageError where the model has no null class."""
        if not conditioner.has_null:
            raise UsageError("--class: this model has no class that means none; name one with --class")


def class_names(conditions: Conditions) -> list[str]:
    """Names of the classes of a class-conditional model, else []."""
    return list(conditions.conditioners[Class.name].names) if Class.name in conditions.kinds else []


def _label(one: Any) -> int | str:
    if isinstance(one, bool) or not isinstance(one, (int, str)):
        raise UsageError(f"classes: {one!r} is neither the name of a class nor a whole number")
    return one
