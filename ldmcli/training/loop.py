"""The training loop: steps, learning rates, micro-batches, checkpoints and signals, for any objective.

Everything random is a function of (seed, position), the learning rate one of the step. A checkpoint is therefore
weights, optimiser state, averaged weights and progress, and the same command resumes exactly.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from ldmcli.core import console, runs
from ldmcli.core.config import Resolved
from ldmcli.core.errors import DivergedError, Interrupted, LdmError, ModelError, ResourceError
from ldmcli.core.settings import AutoencoderConfig, ClassifierConfig
from ldmcli.core.signals import StopRequest
from ldmcli.data.batches import Prefetcher, micro_batches
from ldmcli.training import sharding
from ldmcli.training.autoencoder import AutoencoderObjective
from ldmcli.training.checkpoints import Checkpointer
from ldmcli.training.classifier import ClassifierObjective
from ldmcli.training.diffusion import DiffusionObjective
from ldmcli.training.distributed import Distributed
from ldmcli.training.logger import TrainLogger
from ldmcli.training.micro_batch import choose_micro_batch, halve_on_out_of_memory
from ldmcli.training.objective import Objective
from ldmcli.training.progress import Progress
from ldmcli.training.run_clock import RunClock
from ldmcli.training.run_end import StopReason, out_of_resources, record_failure, stop_early
from ldmcli.training.run_setup import RunOptions, claim_run_folder, log_start, write_run_files
from ldmcli.training.state import TrainState
from ldmcli.training.thread_choice import choose_threads
from ldmcli.training.throughput import ThroughputMeter

REPLICA_CHECK_EVERY = 500  # steps between comparisons of the weights of all processes
HOURS_MARGIN = 0.98  # share of train.max_hours after which a run saves and ends: saving takes time, too


def train(run_kind: str, resolved: Resolved, out: Path, options: RunOptions) -> dict[str, Any]:
    """Trains (or goes on training) the run in `out`; returns run.json's content.

    Raises Interrupted after a signal (state saved), DivergedError, ResourceError, ModelError, InputError, UsageError.
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
        self.checkpointer = Checkpointer(folder, self.config, dist, self.objective, self.state)
        self.resumed = self.checkpointer.resume(options.allow)
        self.state.fix_precision()
        chosen = choose_micro_batch(self.objective, dist, self.settings, self.progress.micro_batch)
        self.progress.micro_batch = chosen
        self.step_flops = 0.0  # of the global batch; 0 = not counted yet
        self.logger = TrainLogger(folder, self.config, dist)

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
        with self.checkpointer:
            return self._run()

    def _run(self) -> dict[str, Any]:
        self._start()
        choose_threads(self.objective, self.state, self._forward_backward, resumed=self.resumed)
        data = self.config.data
        self.batches = Prefetcher(
            self.objective.batch, self.progress.step, depth=3, workers=data.workers, limit=self.settings.steps
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
        begun, step, progress = time.perf_counter(), self.progress.step, self.progress
        # nobody begins a backward pass before the others have their batch
        batch = self.dist.on_all_ranks(lambda: self.batches.get(step))
        logs = (step + 1) % self.settings.log_every == 0 or step == 0
        lr_factor, finite = self.clock.lr_factor(), True
        stats: dict[str, Any] = {}
        for phase in self.objective.phases(step):
            finite, measured = self._update(phase, batch, step, lr_factor, logs)
            stats |= measured
            if not finite:
                break
            if self.state.ema and phase == self.objective.main_network:  # also where the other's update is refused
                self.state.ema.update()
                progress.ema_count = self.state.ema.count
        if finite:
            stats |= self.objective.after_update(step)
            progress.bad_in_a_row = 0
        elif progress.loss_scale <= 1:  # above 1 float16 is looking for its scale
            self._handle_nonfinite_step(batch, stats)
        progress.step = step + 1
        progress.images += self.settings.batch_size
        progress.trained_seconds += time.perf_counter() - begun
        self.meter.add(stats, self.settings.batch_size, lr_factor)

    def _update(
        self, phase: str, batch: dict[str, Tensor], step: int, lr_factor: float, norms: bool
    ) -> tuple[bool, dict[str, Tensor]]:
        """Forward, backward and, where all gradients are finite, an optimiser step; (applied, statistics)."""
        optimizer, progress, dist = self.state.optimizers[phase], self.progress, self.dist
        self.state.train_only(phase)
        stats = halve_on_out_of_memory(
            lambda: self._forward_backward(phase, batch, step, norms), progress, len(batch["row"]), dist
        )
        grads = optimizer.gradients()
        if progress.loss_scale != 1:
            torch._foreach_div_(grads, progress.loss_scale)
        norm = self.state.total_norm(grads)
        finite = dist.all_reduce_max([float(not bool(norm.isfinite()))])[0] == 0
        if finite:
            if (scale := self._gradient_scale(phase, float(norm))) < 1:
                torch._foreach_mul_(grads, scale)
            optimizer.step(lr_factor)
        if dist.dtype == torch.float16:
            progress.update_loss_scale(finite)
        return finite, {**stats, f"grad_norm_{phase}": norm}

    def _forward_backward(self, phase: str, batch: dict[str, Tensor], step: int, norms: bool) -> dict[str, Tensor]:
        """Gradients summed over this process's micro-batches; means of the statistics."""
        dist, batch_size = self.dist, self.settings.batch_size
        self.state.optimizers[phase].zero_grad()
        parts = micro_batches(len(batch["row"]), self.progress.micro_batch)
        sums: dict[str, Tensor] = {}
        counts: dict[str, int] = {}
        for index, part in enumerate(parts):
            size, last = part.stop - part.start, index == len(parts) - 1
            micro_batch = dist.on_device({k: v[part] for k, v in batch.items()})
            with self.state.adding_up(phase) if not last else nullcontext():
                dropout = dist.dropout(self.settings.seed, phase, step, index)
                with dist.autocast(), self._count_flops(size / batch_size), dropout:
                    # norms are collective, and processes may have different numbers of micro-batches
                    loss, stats = self.objective.loss(phase, self.state.wrapped, micro_batch, step, norms and last)
                # data-parallel wrapping averages over processes; the shares sum to 1 over all of them
                (loss.float() * (size / batch_size) * dist.world_size * self.progress.loss_scale).backward()
            for name, value in {f"loss_{phase}": loss, **stats}.items():
                sums[name] = sums.get(name, 0) + value.detach().float() * size
                counts[name] = counts.get(name, 0) + size
        return {name: total / counts[name] for name, total in sums.items()}

    def _after_step(self) -> None:
        """Whatever is due at this step: log, comparison of replicas, stop, evaluation, preview, checkpoint."""
        step, s = self.progress.step, self.settings

        def due(every: int) -> bool:
            return bool(every) and step % every == 0

        if due(s.log_every) or step == 1:
            self.logger.log_step(self.meter, self.progress, self.objective.monitored, self.step_flops)
        if self.dist.world_size > 1 and step % REPLICA_CHECK_EVERY in (0, 1):
            self.dist.check_equal(self.objective.networks)
        late = s.max_hours and time.monotonic() - self.started > s.max_hours * 3600 * HOURS_MARGIN
        own = self.request.stop or (StopReason.TIME_LIMIT if late else StopReason.NONE)
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
                self.checkpointer.save(wait=bool(save))
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
        self.checkpointer.save()  # before the last evaluation, which may take long and be ended
        self._evaluate()
        self._stop_if_asked()
        if self.settings.sample_every:
            self._preview()
        return self.logger.finish(self.progress)

    def _stop(self, reason: float) -> NoReturn:
        self.checkpointer.save()
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
        metrics = self.state.with_ema_weights(lambda: self.objective.evaluate(lambda: bool(self.request.stop)))
        if metrics is None:  # it is made up for when the run goes on
            self.progress.evaluations = max(self.progress.evaluations - 1, 0)
            self._stop_if_asked()
            return
        seconds = time.perf_counter() - begun
        self.meter.leave_out(seconds)
        self.logger.log_validation(metrics, seconds, self.progress)
        self.checkpointer.save_best(metrics)

    def _preview(self) -> None:
        step = self.progress.step
        path = self.folder.path / "samples" / f"step-{step:08d}.png"
        try:
            self.state.with_ema_weights(lambda: self.dist.on_rank_0(lambda: self.objective.preview(path)))
        except ModelError as error:  # NaN or Inf in samples: the loss decides whether a training goes on
            console.warn(f"no preview at step {step}: {error}")

    def _gradient_scale(self, phase: str, norm: float) -> float:
        """What the gradient is multiplied by: it is cut to train.clip, and to its usual norm where it is a spike."""
        monitor, s = self.progress.course, self.settings
        first = monitor.spikes == 0
        scale = monitor.gradient_scale(phase, norm, s.spike)
        if first and monitor.spikes:
            self.logger.log_spike(self.progress.step, norm, norm * scale)
        return min(scale, s.clip / norm) if s.clip and norm > 0 else scale

    def _handle_nonfinite_step(self, batch: dict[str, Tensor], stats: dict[str, Tensor]) -> None:
        """Counts and reports a step that was not applied; raises DivergedError after train.max_bad_steps in a row."""
        progress = self.progress
        progress.bad_in_a_row += 1
        self.logger.log_nonfinite(progress, [self.objective.rows.name(int(i)) for i in batch["row"]], stats)
        if progress.bad_in_a_row >= self.settings.max_bad_steps:
            raise DivergedError(
                f"{self.folder.path}: NaN or Inf in {progress.bad_in_a_row} steps in a row up to step "
                f"{progress.step}; bad-batch.json has the rows and values, the last good checkpoint "
                "stands; lower --lr or raise train.warmup"
            )

    @contextmanager
    def _count_flops(self, share_of_batch: float) -> Iterator[None]:
        """Counts the first forward pass; a training step is three of them (backward is two)."""
        from torch.utils.flop_counter import FlopCounterMode

        if self.step_flops:  # on all processes: the first use takes seconds, and gradients wait for the last
            yield
            return
        with FlopCounterMode(display=False) as counter:
            yield
        self.step_flops = 3 * counter.get_total_flops() / share_of_batch
