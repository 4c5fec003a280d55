"""Checkpoints of a training: saved so that the same command resumes it exactly, and loaded again."""

import json
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from ldmcli import __version__
from ldmcli.core import console, files, runs
from ldmcli.core.config import Config, config_hash
from ldmcli.core.errors import DivergedError, ModelError
from ldmcli.formats.run_folder import settings_of_weights
from ldmcli.training.best import BestCheckpoint
from ldmcli.training.distributed import Distributed
from ldmcli.training.objective import Objective
from ldmcli.training.progress import Progress
from ldmcli.training.state import TrainState


class Checkpointer:
    """Saves and loads the state of one run. All processes call `resume` and `save`; rank 0 writes."""

    def __init__(
        self, folder: runs.RunFolder, config: Config, dist: Distributed, objective: Objective, state: TrainState
    ):
        self.folder, self.config, self.dist, self.objective, self.state = folder, config, dist, objective, state
        self.best = BestCheckpoint(folder, config.train.keep_best)
        self._saved = -1  # the step that was saved last

    def resume(self, allow: tuple[str, ...]) -> bool:
        """Loads the newest checkpoint; False where there is none. allow: with "data", other training data may be used.

        Raises ModelError where no checkpoint is whole, where one does not fit, or where the data changed.
        """
        path = self.dist.on_rank_0(self._newest)
        if path is None:
            return False
        self.dist.on_all_ranks(lambda: self._load(path, allow))
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

    def _load(self, path: Path, allow: tuple[str, ...]) -> None:
        stored = files.read_json(path / "state.json")
        rows, state, device = self.objective.rows, self.state, self.dist.device
        if stored["data_fingerprint"] != rows.fingerprint and "data" not in allow:
            raise ModelError(
                f"{self.folder.path}: the training data changed since the run was started ({stored['rows']} rows "
                f"then, {len(rows)} now, or other content); restore it, begin anew with "
                "--fresh, or go on all the same with --allow data"
            )
        state.progress = Progress.from_state(stored)
        threads = torch.get_num_threads()
        if self.dist.is_rank_0 and device.type == "cpu" and stored.get("threads", threads) != threads:
            console.warn(
                f"{path.name}: trained with {stored['threads']} threads, now {threads}: the run goes on, but not bit "
                f"for bit as it would have (OMP_NUM_THREADS={stored['threads']} does that)"
            )
        for name, module in state.networks.items():
            tensors, _ = files.load_tensors(path / f"{name}.safetensors")
            module.load_state_dict(tensors)
            moments, _ = files.load_tensors(path / f"optimizer-{name}.safetensors", finite=False)
            state.optimizers[name].load_state_dict({k: v.to(device) for k, v in moments.items()})
        if state.ema:
            averaged, _ = files.load_tensors(path / "ema.safetensors")
            state.ema.load(averaged, state.progress.ema_count)
        if (path / "extra.safetensors").exists():
            self.objective.load_extra_state(files.load_tensors(path / "extra.safetensors")[0])

    def save(self) -> None:
        """Writes a checkpoint and the inference weights. All processes wait for it and share its errors.

        Raises DivergedError where a tensor holds NaN or Inf: the last good checkpoint stands.
        """
        self.dist.on_rank_0(self._write)

    def save_best(self, metrics: dict[str, float]) -> None:
        """Saves where an evaluation at this step is the best so far, and keeps that checkpoint (train.keep_best)."""
        if self.dist.on_rank_0(lambda: self._is_best(metrics)):
            self.save()
            self.dist.on_rank_0(self.best.write)

    def _is_best(self, metrics: dict[str, float]) -> bool:
        if self.best.lacks(metrics):
            console.warn_once("keep_best", f"{self.best.name} was not measured, so no checkpoint is kept for it")
        return self.best.observe(self.state.progress.step, metrics)

    def _write(self) -> None:
        progress = self.state.progress
        if progress.step == self._saved:  # but it may be another one that is the best now
            newest = self.folder.path / "checkpoints" / f"step-{progress.step:08d}"
            runs.rotate_checkpoints(self.folder, newest, self.config.train.keep, self.best.step)
            return
        groups = self._tensors()
        for group in groups.values():
            if not all(bool(t.isfinite().all()) for t in group.values() if t.is_floating_point()):
                raise DivergedError(
                    f"{self.folder.path}: weights or optimiser state hold NaN or Inf; not saved, the "
                    "last good checkpoint stands"
                )
        stored = {
            **asdict(progress),
            "data_fingerprint": self.objective.rows.fingerprint,
            "rows": len(self.objective.rows),
            "batch_size": self.config.train.batch_size,
            "threads": torch.get_num_threads(),
        }
        runs.write_checkpoint(self.folder, progress.step, groups, stored, self.config.train.keep, self.best.step)
        self._write_inference_files()
        self.folder.update(step=progress.step, checkpoint=progress.step)
        self._saved = progress.step

    def _tensors(self) -> dict[str, dict[str, Tensor]]:
        """A checkpoint's tensors, by file."""
        groups = {name: module.state_dict() for name, module in self.state.networks.items()}
        groups |= {f"optimizer-{name}": optimizer.state_dict() for name, optimizer in self.state.optimizers.items()}
        if self.state.ema:
            groups["ema"] = self.state.ema.shadow
        if extra := self.objective.extra_state():
            groups["extra"] = extra
        return groups

    def _write_inference_files(self) -> None:
        state = self.state
        weights = {k: v.detach().cpu() for k, v in state.main.state_dict().items()}
        if state.ema:
            weights |= {k: v.cpu() for k, v in state.ema.shadow.items()}
        metadata = {
            "config_sha256": config_hash(self.config),
            "settings": json.dumps(settings_of_weights(self.config)),
            "step": str(state.progress.step),
            "weights": "ema" if state.ema else "raw",
            "ldm_version": __version__,
        }
        self.objective.save_inference_files(weights, metadata, state.with_ema_weights(self.objective.run_statistics))
