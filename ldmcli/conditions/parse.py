"""What people give, as values and inputs of a model's conditions."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from ldmcli.conditions import CONDITIONS, Condition
from ldmcli.core.console import warn_once
from ldmcli.core.errors import UsageError
from ldmcli.data.arrays import batch_of
from ldmcli.networks.conditioners import Conditions

Size = tuple[int, int]  # (height, width) in pixels
Values = dict[str, list]  # by condition


def accepted_options(conditions: Conditions) -> str:
    """What people can give a model, in words."""
    return " and ".join(CONDITIONS[name].option for name in conditions.kinds) or "no condition"


def condition(name: str) -> Condition:
    """The condition of a name. Raises UsageError where there is none."""
    if name not in CONDITIONS:
        raise UsageError(f"{name}: no such condition; there are {', '.join(CONDITIONS)}")
    return CONDITIONS[name]


def conditioner(conditions: Conditions, name: str) -> Any:
    """The network of a condition. Raises UsageError where the model has none."""
    if name not in conditions.entries:
        option = condition(name).option
        raise UsageError(f"{option}: this model was trained without {name}; it takes {accepted_options(conditions)}")
    return conditions.entries[name]


def list_values(values: Mapping[str, Any] | None = None, /, **arguments: Any) -> Values:
    """Raw values by condition, of the arguments that conditions have in Python (prompt, classes, …) and of others by
    name (`values`). Raises UsageError for a name that no condition has, or what can't be a value."""
    names = {one.argument: name for name, one in CONDITIONS.items() if one.argument}
    given = {names[argument]: value for argument, value in arguments.items()} | dict(values or {})
    return {name: condition(name).as_list(value) for name, value in given.items()}


def arguments_of(values: Mapping[str, list]) -> dict[str, Any]:
    """Keywords of `LoadedDiffusion.sample` for values: the inverse of `list_values`."""
    found: dict[str, Any] = {}
    for name, given in values.items():
        if CONDITIONS[name].argument:
            found[CONDITIONS[name].argument] = given
        else:
            found.setdefault("values", {})[name] = given
    return found


def request_values(request: Mapping[str, Any]) -> Values:
    """Values by condition of keywords that `arguments_of` made, and of what else stands beside them."""
    found = {name: list(request[one.argument]) for name, one in CONDITIONS.items() if request.get(one.argument)}
    return found | {name: list(given) for name, given in (request.get("values") or {}).items() if name in CONDITIONS}


def option_values(given: Sequence[str]) -> Values:
    """Raw values of `--given NAME=VALUE`, for conditions without an option of their own. Raises UsageError."""
    found: Values = {}
    for text in given:
        name, equals, value = text.partition("=")
        own = condition(name)
        if not equals or own.argument:
            raise UsageError(f"--given {text}: {f'use {own.option}' if own.argument else f'write {name}=VALUE'}")
        found.setdefault(name, []).append(own.parse_option(value))
    return found


def only_given(conditions: Conditions, values: Values) -> Values:
    """The values that were given. Raises UsageError where the model does not take one."""
    found = {name: given for name, given in values.items() if given}
    for name in found:
        conditioner(conditions, name)
    return found


def parse_conditions(conditions: Conditions, values: Values, size: Size) -> Values:
    """Raw values of a request (`list_values`) as the model takes them, in its order; what was left out has its default.

    size: of the pictures to draw, which class maps are brought to. Raises UsageError for a condition that the model
    does not take or needs, InputError for what is wrong with a layout or map.
    """
    own = dict(conditions.entries.items())
    values = {name: CONDITIONS[name].expand(given, own.get(name)) for name, given in values.items()}
    only_given(conditions, values)
    for name in conditions.kinds:  # after what it never takes: a class for a text model is the mistake, not the prompt
        if not values.get(name):
            values[name] = CONDITIONS[name].default(values, conditions.entries[name])
    for name, given in values.items():
        if given:
            CONDITIONS[name].warn(given, conditions.entries[name])
            values[name] = CONDITIONS[name].parse(given, conditions.entries[name], size)
    return {name: values[name] for name in conditions.kinds}


def warn_of_values(conditions: Conditions, values: Mapping[str, Sequence]) -> None:
    """Says what a model does not see of values that people gave."""
    for name, given in values.items():
        CONDITIONS[name].warn(given, conditions.entries[name])


def parse_unsized(conditions: Conditions, values: Values) -> Values:
    """Raw values as the model takes them, but those that need the size of a picture: they stay raw."""
    return {
        name: given if CONDITIONS[name].sized else CONDITIONS[name].parse(given, conditions.entries[name])
        for name, given in values.items()
    }


def parse_sized(conditions: Conditions, values: Mapping[str, Sequence], size: Size) -> dict[str, Sequence]:
    """What `parse_unsized` left raw, for pictures of `size`."""
    return {
        name: CONDITIONS[name].parse(list(given), conditioner(conditions, name), size)
        if CONDITIONS[name].sized
        else given
        for name, given in values.items()
    }


def parse_each(conditions: Conditions, values: Values, size: Size) -> dict[str, Any]:
    """The one value of each condition that belongs to a picture of `size`, as the model takes it. Raises UsageError
    for a condition that the model does not take, InputError for a layout or map that is wrong."""
    return {
        name: CONDITIONS[name].parse_one(given[0], conditioner(conditions, name), size)
        for name, given in values.items()
        if given
    }


def embed_inputs(conditions: Conditions, values: Values, tokens: Any = None) -> dict[str, Tensor]:
    """Inputs for `DiffusionModel.embed` of raw values, equally many or one of each, and of token ids (n, L) instead of
    a prompt or layout. Raises UsageError, or InputError for a layout or map that is wrong."""
    values = {name: given for name, given in values.items() if given}
    if not values and tokens is None:
        raise UsageError(f"embed: nothing is given; this model takes {accepted_options(conditions)}")
    inputs: dict[str, Tensor] = {}
    for name, given in only_given(conditions, values).items():
        inputs |= conditions.prepare_one(name, CONDITIONS[name].parse(given, conditions.entries[name]))
    if tokens is not None:
        readers = [name for name, one in CONDITIONS.items() if one.takes_ids]
        name = next((name for name in readers if name in conditions.entries and name not in values), readers[-1])
        found = CONDITIONS[name].inputs_of_ids(tokens, conditioner(conditions, name))
        inputs |= {f"{name}.{part}": tensor for part, tensor in found.items()}
    n = max(len(tensor) for tensor in inputs.values())
    return {name: batch_of(tensor, n, CONDITIONS[name.partition(".")[0]].option) for name, tensor in inputs.items()}


def inputs_size(conditions: Conditions, inputs: dict[str, Tensor]) -> Size | None:
    """(height, width) px of the pictures that inputs speak of; None where they fit any."""
    for name in conditions.kinds:
        own = {key.partition(".")[2]: tensor for key, tensor in inputs.items() if key.startswith(f"{name}.")}
        if own and (size := CONDITIONS[name].input_size(own)):
            return size
    return None


def centred(values: Mapping[str, list], size: Size | None, inside: Size | None) -> Values:
    """Values for pictures of `inside` px as they are for ones of `size` px with those in their middle."""
    if size is None:
        return dict(values)
    return {name: [CONDITIONS[name].centred(one, size, inside) for one in given] for name, given in values.items()}


def on_padded(values: Mapping[str, Sequence], size: Size, unit: int) -> Values:
    """Values for pictures of `size` px as they are for ones padded to multiples of `unit`."""
    return {name: [CONDITIONS[name].padded(one, size, unit) for one in given] for name, given in values.items()}


def check_missing(conditions: Conditions, missing: Sequence[str], drop: float) -> None:
    """Raises UsageError where an edit lacks values for a condition that has no null, or a class map: nobody
    wants an image of none of its classes. Says so where training never left the condition out (drop = 0)."""
    for name in missing:
        CONDITIONS[name].check_left_out(conditions.entries[name])
    if missing and not drop:
        names = ", ".join(CONDITIONS[name].option for name in missing)
        warn_once(
            "told-nothing",
            f"{names} not given, and this model was trained without leaving it out: results are better with it",
        )
