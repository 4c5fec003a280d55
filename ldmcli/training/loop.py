"""The training loop: steps, learning rates, micro-batches, checkpoints and signals, for any objective.

Everything random is a function of (seed, position), the learning rate one of the step. A checkpoint is therefore
weights, optimiser state, averaged weights and progress, and the same command resumes exactly.
"""

import time
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from ldmcli.core import console, runs
from ldmcli.core.config import Resolved
from ldmcli.core.errors import Interrupted, LdmError, ModelError, ResourceError
from ldmcli.core.settings import AutoencoderConfig, ClassifierConfig
from ldmcli.core.signals import StopRequest
from ldmcli.data.batches import Prefetcher, micro_batches
from ldmcli.training import sharding
from ldmcli.training.autoencoder import AutoencoderObjective
from ldmcli.training.checkpoints import Checkpointer
from ldmcli.training.classifier import ClassifierObjective
from ldmcli.training.diffusion import DiffusionObjective
from ldmcli.training.distributed import Distributed, arithmetic
from ldmcli.training.gradient_guard import GradientGuard
from ldmcli.training.logger import TrainLogger
from ldmcli.training.micro_batch import choose_micro_batch, halve_on_out_of_memory
from ldmcli.training.objective import Objective
from ldmcli.training.outcomes import Outcomes, Step
from ldmcli.training.progress import Progress
from ldmcli.training.run_clock import RunClock
from ldmcli.training.run_end import StopReason, out_of_resources, record_failure, stop_early
from ldmcli.training.run_setup import RunOptions, claim_run_folder, log_start, write_run_files
from ldmcli.training.state import TrainState
from ldmcli.training.thread_choice import ThreadChoice
from ldmcli.training.throughput import StepFlops, ThroughputMeter

REPLICA_CHECK_EVERY = 500  # steps between comparisons of the weights of all processes
HOURS_MARGIN = 0.98  # share of train.max_hours after which a run saves and ends: saving takes time, too


def train(run_kind: str, resolved: Resolved, out: Path, options: RunOptions) -> dict[str, Any]:
    """Trains (or goes on training) the run in `out`; returns run.json's content.

    Raises Interrupted after a signal (state saved), ResourceError, ModelError, InputError, UsageError.
    """
    dist = Distributed(resolved.config.train)
    folder = runs.RunFolder(out)
    with StopRequest() as request:
        try:
            done = dist.on_rank_0(lambda: claim_run_folder(folder, run_kind, resolved, options))
            if done:
                return done
            return Trainer(resolved, folder, dist, options, request).run()
        except LdmError as error:
            record_failure(folder, error, dist)
            raise
        except KeyboardInterrupt:
            text = "stopped at once by a second Ctrl-C; the same command goes on from the newest checkpoint"
            record_failure(folder, Interrupted(text, 2), dist)
            raise
        except Exception as error:
            text = out_of_resources(error, dist, resolved.config.train)
            if not text:
                record_failure(folder, error, dist)
                raise
            record_failure(folder, ResourceError(text), dist)
            raise ResourceError(f"{out}: {text}") from error
        finally:
            if dist.is_rank_0:
                folder.release()
            if dist.world_size > 1 and torch.distributed.is_initialized():
                torch.distributed.destroy_process_group()


class Trainer:
    """One process's part of a run, from its data to its last file."""

    def __init__(
        self, resolved: Resolved, folder: runs.RunFolder, dist: Distributed, options: RunOptions, request: StopRequest
    ):
        self.config, self.settings, self.folder, self.dist = resolved.config, resolved.config.train, folder, dist
        self.options, self.request = options, request
        self.started = time.monotonic()
        self.objective = self._make_objective()
        self.state = TrainState(self.objective, dist, self.settings)
        self.clock = RunClock(self.settings, self.state, dist)
        self.threads = ThreadChoice(self.objective, self.state, self._forward_backward, folder)
        self.checkpointer = Checkpointer(folder, self.config, dist, self.objective, self.state)
        self.resumed = self.checkpointer.resume(options.allow)
        self.state.fix_precision()
        chosen = choose_micro_batch(self.objective, dist, self.settings, self.progress.micro_batch)
        self.progress.micro_batch = chosen
        self.guard = GradientGuard(self.progress, self.settings, dist.device, dist.dtype == torch.float16)
        self.flops = StepFlops(self.objective, self.state)
        self.logger = TrainLogger(folder, self.config, dist)
        row_name, main = self.objective.rows.name, self.objective.main_network
        self.outcomes = Outcomes(self.state, self.guard, self.logger, folder, main, row_name)

    def _make_objective(self) -> Objective:
        if isinstance(self.config, AutoencoderConfig):
            return AutoencoderObjective(self.config, self.folder.path, self.dist)
        options, where, check = self.options, (self.folder.path, self.dist), self._raise_if_stopped
        if isinstance(self.config, ClassifierConfig):
            return ClassifierObjective(self.config, *where, options.autoencoder, model=options.model, check=check)
        return DiffusionObjective(self.config, *where, options.autoencoder, init_from=options.init_from, check=check)

    def _raise_if_stopped(self) -> None:
        if self.request.stop:
            raise Interrupted(f"{self.folder.path}: stopped before step 1; the same command goes on", self.request.stop)

    @property
    def progress(self) -> Progress:
        """Step, images seen, loss scale and what else the loop counts."""
        return self.state.progress

    def run(self) -> dict[str, Any]:
        """Trains to the last step, evaluates; returns run.json's content, {} beside rank 0."""
        with self.checkpointer, arithmetic(self.settings):
            return self._run()

    def _run(self) -> dict[str, Any]:
        self._start()
        self.threads.choose_at_start(self.resumed)
        data = self.config.data
        self.batches = Prefetcher(
            lambda step: self.dist.pinned(self.objective.batch(step)),
            self.progress.step,
            depth=max(3, data.workers + 1),  # each worker has one in hand while the next is waited for
            workers=data.workers,
            limit=self.settings.steps,
        )
        self.meter = ThroughputMeter(self.batches)
        try:
            self._catch_up()
            while self.progress.step < self.settings.steps and not self.clock.time_is_up():
                self._train_step()
                self._after_step()
        finally:
            self.batches.close()
        return self._finish()

    def _train_step(self) -> None:
        """One batch: an update of each network that the step trains."""
        begun, step, progress, guard = time.perf_counter(), self.progress.step, self.progress, self.guard
        # nobody begins a backward pass before the others have their batch
        batch = self.dist.on_all_ranks(lambda: self.batches.get(step))
        there = self.dist.on_device(batch)
        logs, lr_factor = self._logs(step + 1), self.clock.lr_factor()
        stats: dict[str, Any] = {}
        self.flops.count(there, step)
        guard.begin()
        for phase in self.objective.phases(step):
            stats |= self._update(phase, there, step, lr_factor, logs)
            if not guard.late and guard.refused:
                break
            if self.state.ema and phase == self.objective.main_network:  # also where the other's update is refused
                self.state.ema.update(guard.keep if guard.late else None)
                progress.ema_count = self.state.ema.count
        if guard.late or not guard.refused:
            stats |= self.objective.after_update(step)
        self.outcomes.add(Step(step, batch["row"], dict(stats), guard.report()))
        progress.step = step + 1
        images = self.settings.batch_at(step)[1]
        progress.images += images
        took = time.perf_counter() - begun
        progress.trained_seconds += took
        self.meter.add(stats, images, lr_factor)
        choosing = self.threads.after_step(took * self.settings.batch_size / images)
        progress.trained_seconds += choosing
        self.meter.leave_out(choosing)

    def _logs(self, step: int) -> bool:
        """Whether a line is written after so many steps."""
        return step % self.settings.log_every == 0 or step == 1

    def _update(
        self, phase: str, batch: dict[str, Tensor], step: int, lr_factor: float, norms: bool
    ) -> dict[str, Tensor]:
        """Forward, backward and, where all gradients are finite, an optimiser step; statistics."""
        optimizer, guard = self.state.optimizers[phase], self.guard
        self.state.train_only(phase)
        stats = halve_on_out_of_memory(
            lambda: self._forward_backward(phase, batch, step, norms), self.progress, len(batch["row"]), self.dist
        )
        # gradients are equal on all processes, or parts whose norm is, and so is what follows from it
        gradients = optimizer.gradients()
        stats[f"grad_norm_{phase}"] = guard.check(phase, gradients, self.state.total_norm(gradients))
        if guard.late:
            optimizer.step(lr_factor, guard.keep)
        elif not guard.refused:
            optimizer.step(lr_factor)
        return stats

    def _forward_backward(self, phase: str, batch: dict[str, Tensor], step: int, norms: bool) -> dict[str, Tensor]:
        """Gradients summed over this process's micro-batches; means of the statistics."""
        dist, batch_size = self.dist, self.settings.batch_at(step)[1]
        self.state.optimizers[phase].zero_grad()
        parts = micro_batches(len(batch["row"]), self.progress.micro_batch)
        sums: dict[str, Tensor] = {}
        counts: dict[str, int] = {}
        for index, part in enumerate(parts):
            size, last = part.stop - part.start, index == len(parts) - 1
            micro_batch = {k: v[part] for k, v in batch.items()}
            dropout: AbstractContextManager = nullcontext()
            if self.state.has_dropout:
                dropout = dist.dropout(self.settings.seed, phase, step, index)
            with self.state.adding_up(phase) if not last else nullcontext():
                with dist.autocast(), dropout:
                    # norms are collective, and processes may have different numbers of micro-batches
                    loss, stats = self.objective.loss(phase, self.state.wrapped, micro_batch, step, norms and last)
                # data-parallel wrapping averages over processes; the shares sum to 1 over all of them
                scaled = loss.float() * (size / batch_size) * dist.world_size
                (scaled * self.guard.loss_scale if self.guard.float16 else scaled).backward()
            for name, value in {f"loss_{phase}": loss, **stats}.items():
                sums[name] = sums.get(name, 0) + value.detach().float() * size
                counts[name] = counts.get(name, 0) + size
        return {name: total / counts[name] for name, total in sums.items()}

    def _after_step(self) -> None:
        """Whatever is due at this step: log, comparison of replicas, stop, evaluation, preview, checkpoint."""
        step, s = self.progress.step, self.settings

        def due(every: int) -> bool:
            return bool(every) and step % every == 0

        if self._logs(step):
            self.outcomes.settle()
            self.logger.log_step(self.meter, self.progress, self.objective.monitored, self.flops.a_sample)
        if self.dist.world_size > 1 and step % REPLICA_CHECK_EVERY in (0, 1):
            self.dist.check_equal(self.objective.networks)
        late = s.max_hours and time.monotonic() - self.started > s.max_hours * 3600 * HOURS_MARGIN
        own = self.request.stop or (StopReason.TIME_LIMIT if late else StopReason.NONE)
        if self.clock.guide_is_due():
            self.outcomes.settle()
            self.checkpointer.keep_guiding()
        flags = [float(own), float(self.request.save_requested), float(self.checkpointer.failed)]
        reason, save, failed = self.dist.all_reduce_max(flags)
        if failed:
            self.checkpointer.raise_failure()
        if reason:  # whoever ends us may not wait for an evaluation
            self._stop(reason)
        if step < s.steps:
            if self.clock.evaluation_is_due():
                self._evaluate()
            if due(s.sample_every):
                self._preview()
            if due(s.save_every) or save:
                self._save(wait=bool(save))
            self.checkpointer.make_room()

    def _start(self) -> None:
        objective, dist, step = self.objective, self.dist, self.progress.step
        if self.options.init_from and not self.resumed:
            sharding.load(self.state.main, dist.on_all_ranks(objective.init_weights), strict=False)
            self.state.restart_ema()
        dist.on_rank_0(lambda: write_run_files(self.folder, self.config, self.options, dist, objective, step))
        if dist.is_rank_0:
            log_start(self.folder, self.settings.steps, dist, objective, step)

    def _finish(self) -> dict[str, Any]:
        self._save()  # before the last evaluation, which may take long and be ended
        self._evaluate()
        self._stop_if_asked()
        if self.settings.sample_every:
            self._preview()
        return self.logger.finish(self.progress)

    def _save(self, *, wait: bool = True) -> None:
        self.outcomes.settle()
        self.checkpointer.save(wait=wait)

    def _stop(self, reason: float) -> NoReturn:
        self._save()
        stop_early(StopReason(int(reason)), self.folder, self.dist, self.progress.step)

    def _stop_if_asked(self) -> None:
        """Ends the command, its state saved, where a process got a signal. Collective."""
        reason = self.dist.all_reduce_max([float(self.request.stop)])[0]
        if reason:
            self._stop(reason)

    def _catch_up(self) -> None:
        """The evaluation of the step that the run goes on from, where it was to take place and did not."""
        step = self.progress.step
        if self.resumed and step < self.settings.steps and self.clock.evaluation_is_due():
            if not self.dist.on_rank_0(lambda: self.logger.has_validation(step)):
                self._evaluate()

    def _evaluate(self) -> None:
        begun = time.perf_counter()
        self.outcomes.settle()
        metrics = self.state.with_ema_weights(lambda: self.objective.evaluate(lambda: bool(self.request.stop)))
        if metrics is None:  # it is made up for when the run goes on
            self.progress.evaluations = max(self.progress.evaluations - 1, 0)
            self._stop_if_asked()
            return
        seconds = time.perf_counter() - begun
        self.logger.log_validation(metrics, seconds, self.progress)
        self.checkpointer.save_best(metrics)
        self.meter.leave_out(time.perf_counter() - begun)

    def _preview(self) -> None:
        step = self.progress.step
        path = self.folder.path / "samples" / f"step-{step:08d}.png"
        try:
            self.state.with_ema_weights(lambda: self.dist.on_rank_0(lambda: self.objective.preview(path)))
        except ModelError as error:  # NaN or Inf in samples: the loss decides whether a training goes on
            console.warn(f"no preview at step {step}: {error}")
