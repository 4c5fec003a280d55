"""Checkpoints of a training: saved so that the same command resumes it exactly, and loaded again."""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldmcli import __version__
from ldmcli.core import console, files, runs, threads
from ldmcli.core.config import Config, config_hash
from ldmcli.core.errors import DivergedError, LdmError, ModelError
from ldmcli.formats.run_folder import GUIDING, settings_of_weights
from ldmcli.training import sharding
from ldmcli.training.background import Background, Groups, HostCopy, bytes_of
from ldmcli.training.best import BestCheckpoint, metric_to_keep
from ldmcli.training.cost import available_bytes
from ldmcli.training.distributed import Distributed
from ldmcli.training.objective import Objective
from ldmcli.training.progress import Progress
from ldmcli.training.state import TrainState

SHARE_OF_MEMORY = 0.8  # of what is free, that a copy of the tensors may take


class Checkpointer:
    """Saves and loads the state of one run. All processes call `resume` and `save`; rank 0 writes."""

    def __init__(
        self, folder: runs.RunFolder, config: Config, dist: Distributed, objective: Objective, state: TrainState
    ):
        self.folder, self.config, self.dist, self.objective, self.state = folder, config, dist, objective, state
        self.best = BestCheckpoint(folder, metric_to_keep(config, len(objective.rows)))
        self._saved = -1  # the step that was saved last
        self._made_room = False
        self._copy, self._writer = HostCopy(pinned=dist.device.type == "cuda"), Background()

    def resume(self, allow: tuple[str, ...]) -> bool:
        """Loads the newest checkpoint; False where there is none. allow: with "data", other training data may be used.

        Rank 0 reads, hashes each byte once, and sends the others what they need. Raises ModelError where no checkpoint
        is whole, where one does not fit, or where the data changed. Collective.
        """
        path = self.dist.on_rank_0(self._newest)
        if path is None:
            return False
        stored = self.dist.on_rank_0(lambda: files.read_json(path / "state.json"))
        self.dist.on_all_ranks(lambda: self._take_over(stored, path.name, allow))
        self._load(path)
        step, steps = self.state.progress.step, self.config.train.steps
        if self.dist.is_rank_0:
            self.folder.trim_log(step, ended=step >= steps)
            self.best.restore()
            console.say(f"going on from step {step}")
        return True

    def _newest(self) -> Path | None:
        path = runs.newest_checkpoint(self.folder.path, console.warn)
        saved = self.folder.state().get("checkpoint")
        if path is None and saved:
            raise ModelError(
                f"{self.folder.path}: step {saved} was saved, but no checkpoint in it is whole; restore checkpoints/ "
                "from a copy, or begin anew with --fresh"
            )
        if path is None:
            self.folder.trim_log(0)  # what an attempt logged that was ended before its first checkpoint
        return path

    def _take_over(self, stored: dict[str, Any], name: str, allow: tuple[str, ...]) -> None:
        """Progress of the checkpoint `name`, whose state.json is `stored`. Raises ModelError."""
        rows, state = self.objective.rows, self.state
        if stored["data_fingerprint"] != rows.fingerprint and "data" not in allow:
            raise ModelError(
                f"{self.folder.path}: the training data changed since the run was started ({stored['rows']} rows "
                f"then, {len(rows)} now, or other content); restore it, begin anew with "
                "--fresh, or go on all the same with --allow data"
            )
        state.progress = Progress.from_state(stored)
        if self.dist.device.type == "cpu" and self.dist.world_size == 1 and not threads.are_given():
            torch.set_num_threads(stored.get("threads", torch.get_num_threads()))
        count = torch.get_num_threads()
        if self.dist.is_rank_0 and self.dist.device.type == "cpu" and stored.get("threads", count) != count:
            console.warn(
                f"{name}: trained with {stored['threads']} threads, now {count}: the run goes on, but not bit "
                f"for bit as it would have (OMP_NUM_THREADS={stored['threads']} does that)"
            )

    def _load(self, path: Path) -> None:
        state = self.state

        def of_rank_0(name: str, place: Callable[[str, Tensor], Tensor], finite: bool = True) -> dict[str, Tensor]:
            return self.dist.tensors_of_rank_0(lambda: _read(path, name, finite), place)

        for name, module in state.networks.items():
            module.load_state_dict(of_rank_0(name, state.placed(name, "weights")))
            moments = of_rank_0(f"optimizer-{name}", state.placed(name, "optimizer"), finite=False)
            state.optimizers[name].load_state_dict(moments)
        if state.ema:
            averaged = of_rank_0("ema", state.placed(self.objective.main_network, "ema"))
            state.ema.load(averaged, state.progress.ema_count)
        if self.dist.on_rank_0((path / "extra.safetensors").exists):
            self.objective.load_extra_state(of_rank_0("extra", lambda _, tensor: tensor))

    def save(self, *, wait: bool = True) -> None:
        """Writes a checkpoint and the inference weights. All processes share its errors. Collective.

        Without `wait` it returns when the tensors are copied, and a thread writes the copy: `failed` and the next call
        tell how that went. Where memory does not hold a copy it waits all the same. At most one write is under way.
        Raises DivergedError where a tensor holds NaN or Inf: the last good checkpoint stands.
        """
        self.raise_failure()
        step = self.state.progress.step
        if step == self._saved:  # but it may be another one that is the best now
            newest, keep = self.folder.path / "checkpoints" / f"step-{step:08d}", self.config.train.keep
            self.dist.on_rank_0(lambda: runs.rotate_checkpoints(self.folder, newest, keep, self.best.step))
            return
        self._saved = step
        groups = self._tensors()
        if is_cut := self.config.train.shard:
            groups = self._whole(groups)
        self.dist.on_rank_0(lambda: self._save(groups, wait, copied=is_cut))

    def keep_guiding(self) -> None:
        """Writes the weights for use, as they are now, as the run's guiding model. Raises DivergedError where one holds
        NaN or Inf. Collective."""
        self.state.progress.guide_step = self.state.progress.step
        main = self.objective.main_network
        groups = {"guiding": self.state.networks[main].state_dict() | self.state.averages()}
        if self.config.train.shard:
            groups = self._whole(groups)
        self.dist.on_rank_0(lambda: self._write_guiding(groups))

    def _write_guiding(self, groups: Groups) -> None:
        self._require_finite(groups)
        metadata = {"step": str(self.state.progress.step), "ldm_version": __version__}
        files.save_tensors(self.folder.path / GUIDING, groups["guiding"], metadata)

    @property
    def failed(self) -> bool:
        """Whether the write of a checkpoint has failed, on this process: `raise_failure` says how."""
        return self._writer.failed

    def raise_failure(self) -> None:
        """Raises, on all processes, what ended a write. Collective."""
        self.dist.on_rank_0(self._writer.wait)

    def __enter__(self) -> "Checkpointer":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Nothing is under way afterwards. A second Ctrl-C gives up what is; another error lets it be completed."""
        if kind is not None and issubclass(kind, KeyboardInterrupt):
            self._writer.give_up()
        try:
            self._writer.wait()
        except Exception:
            if kind is None:  # else the first error is the one to report
                raise

    def save_best(self, metrics: dict[str, float]) -> None:
        """Saves where an evaluation at this step is the best so far, and keeps that checkpoint (train.keep_best)."""
        if self.dist.on_rank_0(lambda: self._is_best(metrics)):
            self.save()
            self.dist.on_rank_0(self.best.write)

    def _is_best(self, metrics: dict[str, float]) -> bool:
        if self.best.lacks(metrics):
            console.warn_once("keep_best", f"{self.best.name} was not measured, so no checkpoint is kept for it")
        return self.best.observe(self.state.progress.step, metrics)

    def _whole(self, groups: Groups) -> Groups:
        """On rank 0 a copy of tensors that are cut; the others give their parts. Collective."""
        if self.dist.is_rank_0:
            return self._copy.take(groups)
        for group in groups.values():
            for tensor in group.values():
                sharding.whole(tensor)
        return {}

    def _save(self, groups: Groups, wait: bool, copied: bool) -> None:
        contents = self._contents(groups)
        if wait or not (copied or self._has_room(groups)):
            self._write(contents)
            return
        if not copied:
            contents = replace(contents, groups=self._copy.take(groups))
        self._writer.start(lambda: self._write(contents))

    def make_room(self) -> None:
        """Takes the memory of the copies, beside the training and once, where a save will need it."""
        if self._made_room or not self.dist.is_rank_0:
            return
        self._made_room = True
        step, train = self.state.progress.step, self.config.train
        will_come = step // train.save_every < (train.steps - 1) // train.save_every
        if will_come and not self._copy.held:
            groups = self._tensors()
            if self._has_room(groups):
                self._writer.start(lambda: self._copy.reserve(groups))

    def _has_room(self, groups: Groups) -> bool:
        return bytes_of(groups) - self._copy.held < SHARE_OF_MEMORY * available_bytes(torch.device("cpu"))

    def _contents(self, groups: Groups) -> "_Contents":
        """All that this step's checkpoint holds."""
        progress, measure = self.state.progress, self.objective.run_statistics
        stored = {
            **asdict(progress),
            "data_fingerprint": self.objective.rows.fingerprint,
            "rows": len(self.objective.rows),
            "batch_size": self.config.train.batch_size,
            "threads": torch.get_num_threads(),
        }
        try:
            # of models that are cut, nothing is measured with their weights
            statistics = measure() if self.config.train.shard else self.state.with_ema_weights(measure)
        except LdmError:
            self._require_finite(groups)  # with such weights nothing can be measured
            raise
        return _Contents(progress.step, groups, stored, statistics, self.best.step)

    def _write(self, contents: "_Contents") -> None:
        self._require_finite(contents.groups)
        step, keep = contents.step, self.config.train.keep
        writing = (contents.groups, contents.stored, keep, contents.best)
        runs.write_checkpoint(self.folder, step, *writing, check=self._writer.check)
        self._write_inference_files(contents)
        self.folder.update(step=step, checkpoint=step)

    def _require_finite(self, groups: Groups) -> None:
        for group in groups.values():
            if not all(files.is_finite(t) for t in group.values() if t.is_floating_point()):
                raise DivergedError(
                    f"{self.folder.path}: weights or optimiser state hold NaN or Inf; not saved, the "
                    "last good checkpoint stands"
                )

    def _tensors(self) -> Groups:
        """A checkpoint's tensors, by file."""
        groups = {name: module.state_dict() for name, module in self.state.networks.items()}
        groups |= {f"optimizer-{name}": optimizer.state_dict() for name, optimizer in self.state.optimizers.items()}
        if self.state.ema:
            groups["ema"] = self.state.averages()
        if extra := self.objective.extra_state():
            groups["extra"] = extra
        return groups

    def _write_inference_files(self, contents: "_Contents") -> None:
        groups = contents.groups
        metadata = {
            "config_sha256": config_hash(self.config),
            "settings": json.dumps(settings_of_weights(self.config)),
            "step": str(contents.step),
            "weights": "ema" if "ema" in groups else "raw",
            "ldm_version": __version__,
        }
        weights = groups[self.objective.main_network] | groups.get("ema", {})
        self.objective.save_inference_files(weights, metadata, contents.statistics)


@dataclass(frozen=True)
class _Contents:
    """What is written at a step: tensors by file, state.json, stats.json, and the step of the best checkpoint."""

    step: int
    groups: Groups
    stored: dict[str, Any]
    statistics: dict[str, Any]
    best: int | None


def _read(checkpoint: Path, name: str, finite: bool) -> dict[str, Tensor]:
    """Tensors of a file of a checkpoint whose hashes were found right."""
    path = checkpoint / f"{name}.safetensors"
    tensors, _ = files.load_tensors(path, verify=False)
    if finite:
        files.require_finite(tensors, path)
    return tensors
