"""Conditions at the start of a training: rows checked, and what is learned of data before networks are built."""

from pathlib import Path
from typing import Any

from ldmcli.conditions import CONDITIONS
from ldmcli.conditions.condition import CheckedRows, FitData, Ranks, Spec
from ldmcli.conditions.dataset import check_columns
from ldmcli.core.errors import UsageError
from ldmcli.core.settings import DiffusionConfig
from ldmcli.networks.autoencoder import Autoencoder
from ldmcli.networks.conditioners import CONDITIONERS

Specs = dict[str, Spec]  # by condition


def check_settings(config: DiffusionConfig) -> None:
    """Raises UsageError where conditions are unknown, named twice or can't be streamed."""
    names, known = config.condition.kinds, [name for name in CONDITIONERS if CONDITIONS[name].user_given]
    for name in names:
        if name not in known:
            raise UsageError(
                f"--condition {name}: choose among none, {', '.join(known)} (joined with +)"
                + ("; --task sr or inpaint brings it along" if name in CONDITIONS else "")
            )
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise UsageError(f"--condition: {twice[0]} is named twice")
    if config.data.captions and "text" not in names:
        raise UsageError("data.captions: only --condition text reads captions; add it, or leave data.captions out")
    streamed = [name for name, one in CONDITIONS.items() if name in names and not one.streamable]
    if streamed and config.data.streaming:
        raise UsageError(
            f"--condition {streamed[0]} with --streaming: boxes and maps of all rows are read beforehand; "
            "leave --streaming away"
        )


def check_sources(config: DiffusionConfig) -> None:
    """Raises InputError for what settings of conditions name on this machine and can't be opened."""
    for name in config.condition.kinds:
        CONDITIONS[name].check_sources(config)


def open_early(config: DiffusionConfig, run: Path, ranks: Ranks) -> None:
    """Opens what conditions may have to download, before data are read for nothing."""
    for name in config.condition.kinds:
        CONDITIONS[name].open_early(config, run, ranks)


def check_rows(
    config: DiffusionConfig, training: Any, validation: Any, ranks: Ranks
) -> tuple[CheckedRows, CheckedRows]:
    """(training rows, validation rows), without those that a condition can't use; `found` by condition. Raises
    InputError where data lack a column, or too much is wrong."""
    for rows in (training, validation):
        check_columns(rows, config.condition.kinds, config.data)
    both = [CheckedRows(training, found={}), CheckedRows(validation, found={})]
    for name in [name for name in CONDITIONS if name in config.condition.kinds]:
        for k, seen in enumerate(both):
            one = CONDITIONS[name].check_rows(seen.rows, config.data, ranks)
            both[k] = CheckedRows(one.rows, [*seen.bad, *one.bad], {**seen.found, name: one.found})
    return both[0], both[1]


def fit_conditions(data: FitData) -> Specs:
    """The spec of each condition, learned from the training rows."""
    return {name: CONDITIONS[name].fit(data) for name in data.config.kinds}


def assumed_specs(config: DiffusionConfig, stage: Autoencoder, known: Specs, notes: list[str] | None = None) -> Specs:
    """Specs as `DiffusionModel` takes them, without data: as `known` says, else assumed, which is noted."""
    specs, notes = dict(known), [] if notes is None else notes
    for name in [name for name in CONDITIONS if name in config.kinds and name not in specs]:
        specs[name], note = CONDITIONS[name].assumed_spec(config, stage)
        notes += [note] if note else []
    return {name: specs[name] for name in config.kinds}


def run_tokenizer(config: DiffusionConfig, run: Path) -> Any:
    """The tokeniser that a condition keeps in a run; None where there is none."""
    found = (CONDITIONS[name].tokenizer(run) for name in config.condition.kinds)
    return next((one for one in found if one is not None), None)


def cost_notes(config: DiffusionConfig) -> list[str]:
    """What the cost of a model leaves out of its conditions."""
    return [note for name in config.kinds for note in CONDITIONS[name].cost_notes(config)]
