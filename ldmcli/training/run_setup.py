"""Before the first step: who may write in the folder, whether the settings fit the run there, and its first files."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ldmcli import __version__
from ldmcli.core import console, files, runs
from ldmcli.core.config import Config, Resolved, flat, from_toml, to_toml
from ldmcli.core.errors import ModelError, UsageError
from ldmcli.data.streaming import rows_in_an_epoch
from ldmcli.training.best import metric_to_keep
from ldmcli.training.data import data_summary
from ldmcli.training.distributed import Distributed
from ldmcli.training.objective import Objective

# settings, or beginnings of their names, that say how long, how often and where a run trains, not what it learns
CHANGEABLE_ON_RESUME = (
    "train.steps",
    "train.micro_batch",
    "train.lr",
    "train.adam_lr",
    "train.schedule",
    "train.warmup",
    "train.cooldown",
    "train.cycle_",
    "train.max_bad_steps",
    "train.spike",
    "train.save_every",
    "train.keep",
    "train.sample_every",
    "train.eval_",
    "train.evaluations",
    "train.log_every",
    "train.max_hours",
    "train.max_minutes",
    "train.track",
    "train.compile",
    "train.shard",
    "train.checkpointing",
    "train.tf32",
    "train.deterministic",
    "train.gradient_timeout",
    "sample.",
    "data.workers",
    "data.cache",
    "data.skip_bad",
    "data.max_pixels",
    "train.ema_decay",
)

# … and those that begin so, but choose what is learned from
NOT_CHANGEABLE = ("data.cache_views",)


@dataclass
class RunOptions:
    """What a command says beside the configuration."""

    fresh: bool = False
    allow: tuple[str, ...] = ()  # settings that may differ from those the run was started with
    command_line: list[str] = field(default_factory=list)
    autoencoder: str = ""  # train-ldm, train-classifier
    model: str = ""  # train-classifier: a diffusion run whose latent scale is taken over
    init_from: str = ""  # train-ldm: a run whose weights are the start


def claim_run_folder(
    run: runs.RunFolder, run_kind: str, resolved: Resolved, options: RunOptions
) -> dict[str, Any] | None:
    """Locks the folder for this command; returns run.json's content when the run is finished, else None.

    Raises UsageError where the folder holds something else, ModelError where the run in it has other settings.
    """
    path = run.path
    foreign = (
        path.is_dir()
        and not runs.is_run(path)
        and any(p.name not in ("tokenizer", "checkpoints") and not p.name.startswith(".") for p in path.iterdir())
    )
    if foreign:
        raise UsageError(f"{path}: holds files but is no run folder; choose an empty or new folder with --out")
    run.acquire()
    if options.fresh:
        run.clear()
    runs.sweep_unfinished(run, console.warn)
    if not runs.is_run(path):
        return None
    state = run.state()
    if state.get("kind") != run_kind:
        raise UsageError(
            f"{path}: holds a run of kind {state.get('kind')}; choose another --out or begin anew with --fresh"
        )
    _compare_settings(run_kind, path, resolved, options)
    if state.get("state") == "finished" and state.get("step", 0) >= resolved.config.train.steps:
        console.say(
            f"{path}: finished at step {state['step']}; nothing to do (more --steps go on, --fresh begins anew)"
        )
        return state
    return None


def _compare_settings(run_kind: str, path: Path, resolved: Resolved, options: RunOptions) -> None:
    """Refuses to go on with settings that change what is learned; says what harmless ones changed."""
    if not (path / "config.toml").exists():
        return
    old = flat(from_toml(run_kind, (path / "config.toml").read_text(encoding="utf-8"), str(path / "config.toml")))
    changed = {k: (old.get(k), v) for k, v in flat(resolved.config).items() if old.get(k) != v}
    harmless = {k for k in changed if k.startswith(CHANGEABLE_ON_RESUME) and k not in NOT_CHANGEABLE}
    grave = {k: v for k, v in changed.items() if k not in harmless and k not in options.allow}
    if grave:
        table = "; ".join(f"{k}: {a} -> {b}" for k, (a, b) in grave.items())
        raise ModelError(
            f"{path}: was started with other settings ({table}); choose another --out, begin anew with "
            f"--fresh, or go on all the same with {' '.join('--allow ' + k for k in grave)}"
        )
    for name, (before, now) in changed.items():
        console.say(f"{name}: {before} -> {now}")


def write_run_files(
    folder: runs.RunFolder, config: Config, options: RunOptions, dist: Distributed, objective: Objective, step: int
) -> None:
    """Writes run.json, config.toml and, as far as known, stats.json. Raises ResourceError where the disk is full."""
    keeps_best = bool(metric_to_keep(config, len(objective.rows)))
    weights_bytes = sum(p.numel() * 4 for network in objective.networks.values() for p in network.parameters())
    files.require_space(folder.path, weights_bytes * 4 * (config.train.keep + 1 + keeps_best))
    begun_from = {"begun_from": runs.origin(Path(options.init_from))} if options.init_from and not step else {}
    # first of all: without run.json the folder would be taken for somebody else's after a kill
    folder.update(
        kind=objective.kind,
        state="running",
        step=step,
        version=__version__,
        command=console.redact(" ".join(options.command_line)),
        seed=config.train.seed,
        parents=objective.parents(),
        **begun_from,
        machine=runs.machine(dist.gpu_name, dist.world_size),
        reason="",
        exit_code=None,
        weights="ema" if config.train.ema else "raw",
        data=data_summary(objective.rows, objective.validation, objective.bad, config.data.captions),
    )
    folder.begun = True
    files.write_text(folder.path / "config.toml", to_toml(config))
    if (statistics := objective.initial_statistics()) is not None:
        # written at once: a vocabulary learned twice need not come out the same
        files.write_json(folder.path / "stats.json", statistics)


def log_start(folder: runs.RunFolder, steps: int, dist: Distributed, objective: Objective, step: int) -> None:
    """Says what is trained, on which data and machine, and from which step of how many."""
    console.say(objective.describe())
    console.say(
        f"{rows_in_an_epoch(objective.rows):,} rows to train on, {len(objective.validation):,} to validate; "
        f"{dist.device.type}, {dist.world_size} process(es), "
        f"{dist.precision}; "
        f"step {step:,} of {steps:,} -> {folder.path}"
    )
    if note := objective.validation_note():
        console.say(note)
