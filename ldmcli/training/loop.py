"""The one training loop. What is trained is an objective's business; here are steps, rates, checkpoints and signals.

Everything random is a function of (seed, position), the rate a function of the step, so a checkpoint is weights,
optimiser state, average and step: the same command goes on exactly where it was.
"""

import json
import math
import time
from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldmcli import __version__
from ldmcli.core import console, files, runs
from ldmcli.core.config import Resolved, config_hash, flat, to_toml
from ldmcli.core.durations import format_duration
from ldmcli.core.errors import DivergedError, Interrupted, LdmError, ModelError, ResourceError
from ldmcli.core.signals import StopRequest
from ldmcli.data.batches import Prefetcher, micro_batches, rank_slice
from ldmcli.formats.run_folder import settings_of_weights
from ldmcli.training.autoencoder import AutoencoderObjective
from ldmcli.training.data import data_facts
from ldmcli.training.diffusion import DiffusionObjective
from ldmcli.training.distributed import Distributed
from ldmcli.training.lr_schedule import cooldown_factor, warmup_factor
from ldmcli.training.micro_batch import choose, that_fits
from ldmcli.training.optimizer import Ema, Updater
from ldmcli.training.progress import Progress
from ldmcli.training.run_setup import RunOptions, claim_run_folder, out_of_resources, record_failure
from ldmcli.training.throughput import ThroughputMeter, peak_memory_bytes
from ldmcli.training.trackers import open_trackers

_CHECK_EVERY = 500  # steps between comparisons of the weights of all processes
_FP16_SCALE, _FP16_GROWTH = 2.0**15, 2000


def train(kind: str, resolved: Resolved, out: Path, options: RunOptions) -> dict[str, Any]:
    """Trains (or goes on training) the run in `out`; returns run.json's content.

    Raises Interrupted after a signal (state saved), DivergedError, ResourceError, ModelError, InputError, UsageError.
    """
    dist = Distributed(resolved.config.train)
    run = runs.RunFolder(out)
    with StopRequest() as request:
        try:
            done = dist.on_rank_0(lambda: claim_run_folder(run, kind, resolved, options))
            if done:
                return done
            return Training(kind, resolved, run, dist, options, request).run_to_end()
        except LdmError as error:
            record_failure(run, error, dist)
            raise
        except KeyboardInterrupt:
            text = "stopped at once by a second Ctrl-C; the same command goes on from the newest checkpoint"
            record_failure(run, Interrupted(text, 2), dist)
            raise
        except Exception as error:
            text = out_of_resources(error, dist, resolved.config.train)
            if not text:
                record_failure(run, error, dist)
                raise
            record_failure(run, ResourceError(text), dist)
            raise ResourceError(f"{out}: {text}") from error
        finally:
            if dist.is_rank_0:
                run.release()
            if dist.world_size > 1 and torch.distributed.is_initialized():
                torch.distributed.destroy_process_group()


class Training:
    """One process's part of a run, from opening the data to the last file."""

    def __init__(
        self,
        kind: str,
        resolved: Resolved,
        run: runs.RunFolder,
        dist: Distributed,
        options: RunOptions,
        request: StopRequest,
    ):
        self.config, self.run, self.dist = resolved.config, run, dist
        self.options, self.request = options, request
        self.settings = self.config.train
        self.started = time.monotonic()
        self.progress = Progress(loss_scale=_FP16_SCALE if dist.dtype == torch.float16 else 1.0)
        self.objective = self._objective(kind)
        self._prepare()
        self.resumed = self._resume()
        self._fix_precision()
        self.progress.micro_batch = choose(self.objective, dist, self.settings, self.progress.micro_batch)
        self.flops = 0.0
        self.trackers = self._trackers()

    def _objective(self, kind: str):
        if kind == "autoencoder":
            return AutoencoderObjective(self.config, self.run.path, self.dist)
        return DiffusionObjective(
            self.config,
            self.run.path,
            self.dist,
            self.options.autoencoder,
            init_from=self.options.init_from,
            check=self._raise_if_stopped,
        )

    def _raise_if_stopped(self) -> None:
        if self.request.stop:
            raise Interrupted(f"{self.run.path}: stopped before step 1; the same command goes on", self.request.stop)

    def _prepare(self) -> None:
        dist, objective = self.dist, self.objective
        self.wrapped, self.updaters = {}, {}
        dist.all_reduce_max([0.0])  # wrapping compares weights: nobody begins before the others are here
        self.trained: dict[str, list[torch.nn.Parameter]] = {}  # without what a network keeps frozen
        for name, module in objective.networks.items():
            module.to(dist.device).train()
            self.trained[name] = [p for p in module.parameters() if p.requires_grad]
            used = torch.compile(module) if self.settings.compile else module
            self.wrapped[name] = dist.accelerator.prepare_model(used) if dist.world_size > 1 else used
            self.updaters[name] = Updater(module.named_parameters(), self.settings, objective.learning_rate(name))
        main = objective.networks[objective.main]
        averaged = [
            (n, p)
            for n, p in main.named_parameters()
            if self.settings.ema_scope == "all" or n.startswith("unet.") or objective.kind == "autoencoder"
        ]
        self.ema = Ema(averaged, self.settings.ema_decay) if self.settings.ema else None

    def _fix_precision(self) -> None:
        """ "auto" is measured on a CPU: a run keeps what it was started with, so that going on is exact."""
        if self.settings.mixed_precision == "auto" and self.progress.precision:
            self.dist.set_precision(self.progress.precision)
        self.progress.precision = self.dist.precision
        for updater in self.updaters.values():
            if updater.muon:
                updater.muon.dtype = torch.float32 if self.dist.dtype is None else torch.bfloat16

    # ------------------------------------------------------------- checkpoints

    def _resume(self) -> bool:
        path = self.dist.on_rank_0(self._newest)
        if path is None:
            return False
        self.dist.on_all_ranks(lambda: self._load(path))
        if self.dist.is_rank_0:
            self.run.trim_log(self.progress.step, ended=self.progress.step >= self.settings.steps)
            console.say(f"going on from step {self.progress.step}")
        return True

    def _newest(self) -> Path | None:
        """The checkpoint to go on from, None at the start. Raises ModelError where all that was saved is lost."""
        path = runs.newest_checkpoint(self.run.path, console.warn)
        saved = self.run.state().get("checkpoint")
        if path is None and saved:
            raise ModelError(
                f"{self.run.path}: step {saved} was saved, but no checkpoint in it is whole; restore checkpoints/ "
                "from a copy, or begin anew with --fresh"
            )
        if path is None:
            self.run.trim_log(0)  # what an attempt logged that was ended before its first checkpoint
        return path

    def _load(self, path: Path) -> None:
        state = files.read_json(path / "state.json")
        fingerprint = self.objective.rows.fingerprint
        if state["data_fingerprint"] != fingerprint and "data" not in self.options.allow:
            raise ModelError(
                f"{self.run.path}: the training data changed since the run was started ({state['rows']} rows "
                f"then, {len(self.objective.rows)} now, or other content); restore it, begin anew with "
                "--fresh, or go on all the same with --allow data"
            )
        self.progress = Progress.of(state)
        threads = torch.get_num_threads()
        if self.dist.is_rank_0 and self.dist.device.type == "cpu" and state.get("threads", threads) != threads:
            console.warn(
                f"{path.name}: trained with {state['threads']} threads, now {threads}: the run goes on, but not bit "
                f"for bit as it would have (OMP_NUM_THREADS={state['threads']} does that)"
            )
        for name, module in self.objective.networks.items():
            tensors, _ = files.load_tensors(path / f"{name}.safetensors")
            module.load_state_dict(tensors)
            optimiser, _ = files.load_tensors(path / f"optimizer-{name}.safetensors", finite=False)
            self.updaters[name].load({k: v.to(self.dist.device) for k, v in optimiser.items()})
        if self.ema:
            averaged, _ = files.load_tensors(path / "ema.safetensors")
            self.ema.load(averaged, self.progress.ema_count)
        if (path / "extra.safetensors").exists():
            self.objective.load_extra(files.load_tensors(path / "extra.safetensors")[0])

    def _save(self) -> None:
        """A checkpoint and the weights for use, written by the main process; all wait for it and share its errors."""

        def write() -> None:
            groups = {name: module.state_dict() for name, module in self.objective.networks.items()}
            groups |= {f"optimizer-{name}": updater.state() for name, updater in self.updaters.items()}
            if self.ema:
                groups["ema"] = self.ema.shadow
            if extra := self.objective.extra_state():
                groups["extra"] = extra
            for group in groups.values():
                if not all(bool(t.isfinite().all()) for t in group.values() if t.is_floating_point()):
                    raise DivergedError(
                        f"{self.run.path}: weights or optimiser state hold NaN or Inf; not saved, the "
                        "last good checkpoint stands"
                    )
            state = {
                **asdict(self.progress),
                "data_fingerprint": self.objective.rows.fingerprint,
                "rows": len(self.objective.rows),
                "batch_size": self.settings.batch_size,
                "threads": torch.get_num_threads(),
            }
            runs.write_checkpoint(self.run, self.progress.step, groups, state, self.settings.keep)
            self._write_weights()
            self.run.update(step=self.progress.step, checkpoint=self.progress.step)

        self.dist.on_rank_0(write)

    def _write_weights(self) -> None:
        module = self.objective.networks[self.objective.main]
        weights = {k: v.detach().cpu() for k, v in module.state_dict().items()}
        if self.ema:
            weights |= {k: v.cpu() for k, v in self.ema.shadow.items()}
        metadata = {
            "config_sha256": config_hash(self.config),
            "settings": json.dumps(settings_of_weights(self.config)),
            "step": str(self.progress.step),
            "weights": "ema" if self.ema else "raw",
            "ldm_version": __version__,
        }
        self.objective.save_inference_files(weights, metadata, self.with_ema_weights(self.objective.run_statistics))

    def with_ema_weights(self, function: Callable[[], Any]) -> Any:
        """Calls `function` in evaluation mode with the averaged weights in place; modes and weights come back."""
        modules = self.objective.networks.values()
        for module in modules:
            module.eval()
        if self.ema:
            self.ema.swap()
        try:
            return function()
        finally:
            if self.ema:
                self.ema.swap()
            for module in modules:
                module.train()

    # ------------------------------------------------------------- the loop

    def run_to_end(self) -> dict[str, Any]:
        """Steps until the target, then the final evaluation; returns run.json's content."""
        self._announce()
        self.batches = Prefetcher(
            self.objective.batch,
            self.progress.step,
            depth=3,
            workers=min(self.config.data.workers, 1) if self.config.data.streaming else self.config.data.workers,
            limit=self.settings.steps,
        )
        self.window = ThroughputMeter(self.batches)
        try:
            while self.progress.step < self.settings.steps and not self._time_is_up():
                self._step()
                self._after_step()
        finally:
            self.batches.close()
        return self._finish()

    def _announce(self) -> None:
        objective, dist = self.objective, self.dist
        if self.options.init_from and not self.resumed:
            tensors = dist.on_all_ranks(lambda: objective.init_weights(Path(self.options.init_from)))
            objective.networks[objective.main].load_state_dict(tensors, strict=False)
            if self.ema:
                self.ema = Ema(self.ema.named, self.ema.decay)
        dist.on_rank_0(self._write_start)
        if dist.is_rank_0:
            console.say(objective.describe())
            console.say(
                f"{len(objective.rows):,} rows to train on, {len(objective.validation):,} to validate; "
                f"{dist.device.type}, {dist.world_size} process(es), "
                f"{dist.precision}; "
                f"step {self.progress.step:,} of {self.settings.steps:,} -> {self.run.path}"
            )
            if left_out := objective.measures():
                console.say(left_out)

    def _write_start(self) -> None:
        size = sum(p.numel() * 4 for m in self.objective.networks.values() for p in m.parameters())
        files.require_space(self.run.path, size * 4 * (self.settings.keep + 1))
        parents = []
        if self.objective.kind == "diffusion":
            parents = [{"path": str(self.objective.autoencoder_path), "sha256": self.objective.autoencoder.fingerprint}]
        # first of all: without run.json the folder would be taken for somebody else's after a kill
        self.run.update(
            kind=self.objective.kind,
            state="running",
            step=self.progress.step,
            version=__version__,
            command=console.redact(" ".join(self.options.command_line)),
            seed=self.settings.seed,
            parents=parents,
            machine=runs.machine(self.dist.gpu_name, self.dist.world_size),
            reason="",
            exit_code=None,
            weights="ema" if self.ema else "raw",
            data=data_facts(self.objective.rows, self.objective.validation, self.objective.bad),
        )
        self.run.begun = True
        files.write_text(self.run.path / "config.toml", to_toml(self.config))
        if self.objective.kind == "diffusion":
            # written at once: a vocabulary learned twice need not come out the same
            files.write_json(self.run.path / "stats.json", self.objective.run_statistics())

    def _time_is_up(self) -> bool:
        limit = self.settings.max_minutes * 60
        late = bool(limit) and self.progress.trained_seconds >= limit
        return self.dist.all_reduce_max([float(late)])[0] > 0 if limit else False

    def rate(self) -> float:
        """Factor of every learning rate at this step: warm-up, and cooldown by steps or by time, whichever is ahead."""
        s, p = self.settings, self.progress
        done = p.step / s.steps
        if s.max_minutes:
            done = max(done, min(1.0, p.trained_seconds / (s.max_minutes * 60)))
            done = self.dist.all_reduce_max([done])[0]
        return warmup_factor(p.step, s.warmup) * cooldown_factor(done, s.cooldown)

    def _step(self) -> None:
        begun, step = time.perf_counter(), self.progress.step
        # nobody begins a backward pass before the others have their batch
        batch = self.dist.on_all_ranks(lambda: self.batches.get(step))
        logs = (step + 1) % self.settings.log_every == 0 or step == 0
        rate, good, stats = self.rate(), True, {}
        for phase in self.objective.phases(step):
            good, found = self._update(phase, batch, step, rate, logs)
            stats |= found
            if not good:
                break
            if self.ema and phase == self.objective.main:  # also where the discriminator's update is then refused
                self.ema.update()
                self.progress.ema_count = self.ema.count
        if good:
            stats |= self.objective.after_update(step)
        self._handle_nonfinite_step(good, batch, stats)
        self.progress.step = step + 1
        self.progress.images += self.settings.batch_size
        self.progress.trained_seconds += time.perf_counter() - begun
        self.window.add(stats, self.settings.batch_size, rate)

    def _update(self, phase: str, batch: dict[str, Tensor], step: int, rate: float, norms: bool):
        """Backward over this process's micro-batches and one update; (applied?, statistics)."""
        updater, dist = self.updaters[phase], self.dist
        for name, parameters in self.trained.items():
            for parameter in parameters:
                parameter.requires_grad_(name == phase)
        stats = that_fits(lambda: self._backward(phase, batch, step, norms), self.progress, len(batch["row"]), dist)
        grads = updater.gradients()
        if self.progress.loss_scale != 1:
            torch._foreach_div_(grads, self.progress.loss_scale)
        norm = torch.nn.utils.get_total_norm(grads)
        good = bool(dist.all_reduce_max([float(not bool(norm.isfinite()))])[0] == 0)
        if good:
            if (factor := self._scaled_down(phase, float(norm))) < 1:
                torch._foreach_mul_(grads, factor)
            updater.step(rate)
        self._update_loss_scale(good)
        return good, {**stats, f"grad_norm_{phase}": norm}

    def _backward(self, phase: str, batch: dict[str, Tensor], step: int, norms: bool) -> dict[str, Tensor]:
        """Gradients summed over this process's micro-batches; means of the statistics."""
        wrapped, dist = self.wrapped[phase], self.dist
        self.updaters[phase].zero()
        parts = micro_batches(len(batch["row"]), self.progress.micro_batch)
        sums: dict[str, Tensor] = {}
        seen: dict[str, int] = {}
        for index, part in enumerate(parts):
            micro = dist.on_device({k: v[part] for k, v in batch.items()})
            share_of_step = (part.stop - part.start) / self.settings.batch_size
            last = index == len(parts) - 1
            with dist.accelerator.no_sync(wrapped) if not last and dist.world_size > 1 else nullcontext():
                masks = dist.dropout(self.settings.seed, phase, step, index)
                with dist.autocast(), self._count_flops(share_of_step), masks:
                    # norms are collective, and processes may have different numbers of micro-batches
                    loss, stats = self.objective.loss(phase, self.wrapped, micro, step, norms and last)
                # data-parallel wrapping averages over processes; the shares sum to 1 over all of them
                (loss.float() * share_of_step * dist.world_size * self.progress.loss_scale).backward()
            for name, value in {f"loss_{phase}": loss, **stats}.items():
                sums[name] = sums.get(name, 0) + value.detach().float() * (part.stop - part.start)
                seen[name] = seen.get(name, 0) + part.stop - part.start
        return {name: total / seen[name] for name, total in sums.items()}

    def _scaled_down(self, phase: str, norm: float) -> float:
        """What the gradient is multiplied by: it is cut to train.clip, and to its usual norm where it is a spike."""
        course, s = self.progress.course, self.settings
        first = course.spikes == 0
        factor = course.factor(phase, norm, s.spike)
        if first and course.spikes and self.dist.is_rank_0:
            console.warn(
                f"step {self.progress.step:,}: a gradient norm of {norm:.3g} where {norm * factor:.3g} is usual; "
                "scaled down to that (more are counted as `spikes` in metrics.jsonl; train.spike sets the bound)"
            )
        return min(factor, s.clip / norm) if s.clip and norm > 0 else factor

    @contextmanager
    def _count_flops(self, share_of_step: float):
        """Counts the first step's forward pass; a training step is three of them."""
        from torch.utils.flop_counter import FlopCounterMode

        if self.flops:  # on all processes: the first use takes seconds, and gradients wait for the last
            yield
            return
        with FlopCounterMode(display=False) as counter:
            yield
        self.flops = 3 * counter.get_total_flops() / share_of_step

    def _update_loss_scale(self, good: bool) -> None:
        p = self.progress
        if self.dist.dtype != torch.float16:
            return
        p.good_steps = p.good_steps + 1 if good else 0
        if not good:
            p.loss_scale = max(p.loss_scale / 2, 1.0)
        elif p.good_steps % _FP16_GROWTH == 0:
            p.loss_scale *= 2

    def _handle_nonfinite_step(self, good: bool, batch: dict[str, Tensor], stats: dict[str, Tensor]) -> None:
        if good:
            self.progress.bad_in_a_row = 0
            return
        if self.progress.loss_scale > 1:
            return  # float16 looks for its scale
        self.progress.bad_in_a_row += 1
        rows = [self.objective.rows.name(int(i)) for i in batch["row"]]
        numbers = {k: repr(float(v)) for k, v in stats.items()}
        named = self.dist.gather(rows)
        if self.dist.is_rank_0:
            files.write_json(
                self.run.path / "bad-batch.json",
                {"step": self.progress.step, "rows": sum(named, []), "values": numbers},
            )
            self.run.log(step=self.progress.step, event="not applied: NaN or Inf")
            console.warn(
                f"step {self.progress.step}: NaN or Inf, the update was not applied "
                f"({self.progress.bad_in_a_row} in a row; rows in bad-batch.json)"
            )
        if self.progress.bad_in_a_row >= self.settings.max_bad_steps:
            raise DivergedError(
                f"{self.run.path}: NaN or Inf in {self.progress.bad_in_a_row} steps in a row up to step "
                f"{self.progress.step}; bad-batch.json has the rows and values, the last good checkpoint "
                "stands; lower --lr or raise train.warmup"
            )

    def _after_step(self) -> None:
        step, s = self.progress.step, self.settings
        due = {
            name: step % every == 0
            for name, every in (
                ("log", s.log_every),
                ("sample", s.sample_every),
                ("eval", s.eval_every),
                ("save", s.save_every),
            )
            if every
        }
        if due.get("log") or step == 1:
            self._log()
        if self.dist.world_size > 1 and step % _CHECK_EVERY in (0, 1):
            self.dist.check_equal(self.objective.networks)
        hours_up = s.max_hours and time.monotonic() - self.started > s.max_hours * 3600 * 0.98
        stop, save = self.dist.all_reduce_max(
            [float(self.request.stop or (-1 if not hours_up else 1)), float(self.request.save_requested)]
        )
        if stop > 0:  # whoever ends us may not wait for an evaluation
            self._save()
            self._end_early(int(stop))
        if step < s.steps:
            if due.get("eval"):
                self._evaluate()
            if due.get("sample"):
                self._preview()
            if due.get("save") or save:
                self._save()

    def _end_early(self, signal_number: int) -> None:
        if signal_number == 1:
            text = f"{self.run.path}: saved at step {self.progress.step}, --max-hours reached; the same command goes on"
            self.dist.on_rank_0(lambda: self.run.update(state="interrupted", reason="time limit", exit_code=0))
            console.say(text)
            raise SystemExit(0)
        raise Interrupted(
            f"{self.run.path}: saved at step {self.progress.step}; the same command goes on", signal_number
        )

    def _end_if_asked(self) -> None:
        stop = self.dist.all_reduce_max([float(self.request.stop)])[0]
        if stop:
            self._end_early(int(stop))

    def _log(self) -> None:
        mine = rank_slice(self.settings.batch_size, self.dist.rank, self.dist.world_size)
        values = self.dist.mean(self.window.close(), mine.stop - mine.start)
        if not self.dist.is_rank_0:
            return
        self._watch_loss(values)
        peak = peak_memory_bytes(self.dist.device)
        rate = values["images_per_s"]
        line = {
            "step": self.progress.step,
            "images": self.progress.images,
            **values,
            "spikes": self.progress.course.spikes,
            "tflops_per_s": self.flops * rate / self.settings.batch_size / 1e12,
            "peak_memory_bytes": peak,
            "trained_seconds": self.progress.trained_seconds,
        }
        self.run.log(**line)
        if self.trackers:
            self.trackers.log({k: v for k, v in values.items()}, step=self.progress.step)
        left = (self.settings.steps - self.progress.step) * self.settings.batch_size / max(rate, 1e-9)
        if self.settings.max_minutes:
            left = min(left, self.settings.max_minutes * 60 - self.progress.trained_seconds)
        losses = "  ".join(f"{k.removeprefix('loss_')} {v:.4g}" for k, v in values.items() if k.startswith("loss_"))
        console.say(
            f"step {self.progress.step:>7,}/{self.settings.steps:,}  loss {losses}  {rate:.1f} images/s  "
            f"data-wait {values['data_wait'] * 100:.0f} %  {files.human_bytes(peak)}  ETA {format_duration(left)}"
        )

    def _watch_loss(self, values: dict[str, float]) -> None:
        """Tells the user, the log and run.json when the loss has risen and stays, and when it is down again."""
        course, step = self.progress.course, self.progress.step
        before = course.risen
        if (loss := values.get(self.objective.watched)) is not None:
            course.watch(loss, step)
        if course.risen == before:
            return
        texts = course.warnings()
        for text in texts:
            console.warn(f"step {step:,}: {text}")
        self.run.log(step=step, event=texts[0] if texts else "the loss is down again")
        self.run.update(warnings=texts)

    def _trackers(self):
        if not self.settings.track or not self.dist.is_rank_0:
            return None
        return open_trackers(self.settings.track, self.run.path, flat(self.config))

    def _evaluate(self) -> dict[str, float]:
        found = self.with_ema_weights(self.objective.evaluate)
        if self.dist.is_rank_0:
            self.run.log(
                step=self.progress.step, images=self.progress.images, **{f"val/{k}": v for k, v in found.items()}
            )
            # JSON holds no NaN: a number that is none stands in the log, as text
            self.run.update(metrics={k: v for k, v in found.items() if math.isfinite(v)})
            console.say(
                f"step {self.progress.step:>7,}  validation: " + "  ".join(f"{k} {v:.4g}" for k, v in found.items())
            )
            if self.trackers:
                self.trackers.log({f"val/{k}": v for k, v in found.items()}, step=self.progress.step)
        return found

    def _preview(self) -> None:
        path = self.run.path / "samples" / f"step-{self.progress.step:08d}.png"
        try:
            self.dist.on_rank_0(lambda: self.with_ema_weights(lambda: self.objective.preview(path)))
        except ModelError as error:  # NaN or Inf in what is drawn: the loss decides whether a training goes on
            console.warn(f"no preview at step {self.progress.step}: {error}")

    def _finish(self) -> dict[str, Any]:
        self._save()  # before the last evaluation, which may take long and be ended
        self._evaluate()
        self._end_if_asked()
        if self.settings.sample_every:
            self._preview()
        if self.trackers:
            self.trackers.close()
        # the others wait for this, so that none leaves the process group while another still uses it
        course = self.progress.course
        facts = {
            "trained_seconds": self.progress.trained_seconds,
            "images": self.progress.images,
            "spikes": course.spikes,
            "warnings": course.warnings(),
        }
        self.dist.on_rank_0(lambda: self.run.update(state="finished", exit_code=0, **facts))
        if not self.dist.is_rank_0:
            return {}
        for text in course.warnings():
            console.warn(f"{self.run.path}: {text}")
        took = format_duration(self.progress.trained_seconds)
        console.say(f"done: {self.run.path} at step {self.progress.step:,}, {took} of training")
        return self.run.state()
