"""Before and after a training: who may write in the folder, whether the settings fit the run there, how it ended."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ldmcli.core import console, runs
from ldmcli.core.config import Resolved, flat, from_toml
from ldmcli.core.errors import Interrupted, LdmError, ModelError, UsageError
from ldmcli.core.settings import TrainSettings
from ldmcli.training.distributed import Distributed

# settings that may change when a run goes on: they say how long, how often and where, not what is learned
CHANGEABLE_ON_RESUME = (
    "train.steps",
    "train.micro_batch",
    "train.lr",
    "train.adam_lr",
    "train.warmup",
    "train.cooldown",
    "train.max_bad_steps",
    "train.spike",
    "train.save_every",
    "train.keep",
    "train.sample_every",
    "train.eval_every",
    "train.log_every",
    "train.eval_images",
    "train.eval_frechet",
    "train.max_hours",
    "train.max_minutes",
    "train.track",
    "train.compile",
    "train.gradient_timeout",
    "sample.",
    "data.workers",
    "data.cache",
    "data.skip_bad",
    "data.max_pixels",
    "train.ema_decay",
)


@dataclass
class RunOptions:
    """What a command says beside the configuration."""

    fresh: bool = False
    allow: tuple[str, ...] = ()  # settings that may differ from those the run was started with
    command_line: list[str] = field(default_factory=list)
    autoencoder: str = ""  # train-ldm
    init_from: str = ""  # train-ldm: a run whose weights are the start


def claim_run_folder(run: runs.RunFolder, kind: str, resolved: Resolved, options: RunOptions) -> dict[str, Any] | None:
    """Takes the folder; returns run.json when there is nothing left to do, else None."""
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
    if state.get("kind") != kind:
        raise UsageError(
            f"{path}: holds a run of kind {state.get('kind')}; choose another --out or begin anew with --fresh"
        )
    _compare_settings(kind, path, resolved, options)
    if state.get("state") == "finished" and state.get("step", 0) >= resolved.config.train.steps:
        console.say(
            f"{path}: finished at step {state['step']}; nothing to do (more --steps go on, --fresh begins anew)"
        )
        return state
    return None


def _compare_settings(kind: str, path: Path, resolved: Resolved, options: RunOptions) -> None:
    """Refuses to go on with settings that change what is learned; says what harmless ones changed."""
    if not (path / "config.toml").exists():
        return
    old = flat(from_toml(kind, (path / "config.toml").read_text(encoding="utf-8"), str(path / "config.toml")))
    changed = {k: (old.get(k), v) for k, v in flat(resolved.config).items() if old.get(k) != v}
    grave = {k: v for k, v in changed.items() if not k.startswith(CHANGEABLE_ON_RESUME) and k not in options.allow}
    if grave:
        table = "; ".join(f"{k}: {a} -> {b}" for k, (a, b) in grave.items())
        raise ModelError(
            f"{path}: was started with other settings ({table}); choose another --out, begin anew with "
            f"--fresh, or go on all the same with {' '.join('--allow ' + k for k in grave)}"
        )
    for name, (before, now) in changed.items():
        console.say(f"{name}: {before} -> {now}")


def out_of_memory(error: BaseException) -> bool:
    words = ("out of memory", "can't allocate memory", "not enough memory")
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or any(w in str(error).lower() for w in words)


def out_of_resources(error: BaseException, dist: Distributed, settings: TrainSettings) -> str:
    """What to say of an error that means that memory ran out or that another process is gone; else ""."""
    if out_of_memory(error):
        return "memory ran out; lower --micro-batch (the global batch stays), or --size, or the model's channels"
    said = str(error).lower()
    if dist.world_size == 1 or not isinstance(error, RuntimeError):
        return ""
    if "timed out" in said:
        return (
            f"another process did not come to the backward pass within {settings.gradient_timeout:g} s "
            "(train.gradient_timeout); find what held it up, or raise that"
        )
    if any(words in said for words in ("connection closed", "connection reset", "broken pipe")):
        return "another process of this training ended; what it said tells why, and the same command goes on"
    return ""


def record_failure(run: runs.RunFolder, error: BaseException, dist: Distributed) -> None:
    """Says in run.json how a training ended; a command that was refused leaves what an earlier one said."""
    if not (dist.is_rank_0 and run.begun):
        return
    code = int(getattr(error, "code", 1))
    state = "interrupted" if isinstance(error, Interrupted) else "diverged" if code == 5 else "failed"
    try:
        run.update(state=state, reason=console.clean(str(error)), exit_code=code)
    except LdmError:
        pass  # the disk is full: the first error is the one to tell
