"""What a training reports while it runs: lines on the console and in metrics.jsonl, and numbers for trackers."""

import math
from functools import cached_property
from typing import Any

from ldmcli.core import console, files, runs
from ldmcli.core.config import Config, flat
from ldmcli.core.durations import format_duration
from ldmcli.data.batches import rank_slice
from ldmcli.training.distributed import Distributed
from ldmcli.training.progress import Progress
from ldmcli.training.throughput import ThroughputMeter, peak_memory_bytes, product_rate
from ldmcli.training.trackers import Trackers, open_trackers


class TrainLogger:
    """The voice of a run. Rank 0 writes; methods named as collective are called by all."""

    def __init__(self, folder: runs.RunFolder, config: Config, dist: Distributed):
        self.folder, self.settings, self.dist = folder, config.train, dist
        self.trackers: Trackers | None = None
        if self.settings.track and dist.is_rank_0:
            self.trackers = open_trackers(self.settings.track, folder.path, flat(config))

    def log_step(self, meter: ThroughputMeter, progress: Progress, monitored: str, sample_flops: float) -> None:
        """Means since the last line, over all processes. Collective.

        monitored: name of the statistic whose rise is watched; sample_flops: FLOPs of a step for one
        sample.
        """
        s, dist = self.settings, self.dist
        mine = rank_slice(s.batch_at(progress.step - 1)[1], dist.rank, dist.world_size)
        values = dist.mean(meter.close(), mine.stop - mine.start)
        if not dist.is_rank_0:
            return
        self._watch_loss(values.get(monitored), progress)
        peak, rate = peak_memory_bytes(dist.device), values["images_per_s"]
        mfu = sample_flops * rate / dist.world_size / self.peak_flops
        self.folder.log(
            step=progress.step,
            images=progress.images,
            **values,
            spikes=progress.course.spikes,
            images_per_s_device=rate / dist.world_size,
            tflops_per_s=sample_flops * rate / 1e12,
            mfu=mfu,
            peak_memory_bytes=peak,
            trained_seconds=progress.trained_seconds,
        )
        self._track(values, progress.step)
        left = (s.batch_at(s.steps)[0] - s.batch_at(progress.step)[0]) / max(rate, 1e-9)
        if s.max_minutes:
            left = min(left, s.max_minutes * 60 - progress.trained_seconds)
        losses = "  ".join(f"{k.removeprefix('loss_')} {v:.4g}" for k, v in values.items() if k.startswith("loss_"))
        console.say(
            f"step {progress.step:>7,}/{s.steps:,}  loss {losses}  {rate:.1f} images/s  "
            f"MFU {mfu * 100:.0f} %  data-wait {values['data_wait'] * 100:.0f} %  "
            f"{files.human_bytes(peak)}  ETA {format_duration(left)}"
        )

    @cached_property
    def peak_flops(self) -> float:
        """FLOP/s of a matrix product on this process's device in the precision in use, measured once."""
        return product_rate(self.dist.device, self.dist.dtype)

    def _watch_loss(self, loss: float | None, progress: Progress) -> None:
        """Tells the user, the log and run.json when the loss has risen and stays, and when it is down again."""
        monitor, step = progress.course, progress.step
        before = monitor.has_risen
        if loss is not None:
            monitor.observe_loss(loss, step)
        if monitor.has_risen == before:
            return
        texts = monitor.warnings()
        for text in texts:
            console.warn(f"step {step:,}: {text}")
        self.folder.log(step=step, event=texts[0] if texts else "the loss is down again")
        self.folder.update(warnings=texts)

    def has_validation(self, step: int) -> bool:
        """Whether the log has the validation of a step."""
        lines = [line for line in runs.read_log(self.folder.path) if line.get("step") == step]
        return any(name.startswith("val/") for line in lines for name in line)

    def log_validation(self, metrics: dict[str, float], seconds: float, progress: Progress) -> None:
        """Metrics of a validation and the seconds that it took, in the log and in run.json."""
        if not self.dist.is_rank_0:
            return
        named = {f"val/{k}": v for k, v in metrics.items()}
        self.folder.log(step=progress.step, images=progress.images, **named, eval_seconds=seconds)
        # JSON holds no NaN: such a number stands in the log only, as text
        self.folder.update(metrics={k: v for k, v in metrics.items() if math.isfinite(v)})
        shown = "  ".join(f"{k} {v:.4g}" for k, v in metrics.items())
        console.say(f"step {progress.step:>7,}  validation: {shown}  ({format_duration(seconds)})")
        self._track(named | {"eval_seconds": seconds}, progress.step)

    def log_spike(self, step: int, norm: float, usual: float) -> None:
        """The first gradient that was scaled down."""
        if self.dist.is_rank_0:
            console.warn(
                f"step {step:,}: a gradient norm of {norm:.3g} where {usual:.3g} is usual; "
                "scaled down to that (more are counted as `spikes` in metrics.jsonl; train.spike sets the bound)"
            )

    def log_nonfinite(self, step: int, in_a_row: int, rows: list[str], stats: dict[str, Any]) -> None:
        """A step that was not applied: this process's rows and numbers, into bad-batch.json. Collective."""
        numbers = {k: repr(float(v)) for k, v in stats.items()}
        named = self.dist.gather(rows)
        if not self.dist.is_rank_0:
            return
        found: dict[str, Any] = {"step": step, "rows": sum(named, []), "values": numbers}
        files.write_json(self.folder.path / "bad-batch.json", found)
        self.folder.log(step=step, event="not applied: NaN or Inf")
        console.warn(
            f"step {step}: NaN or Inf, the update was not applied ({in_a_row} in a row; rows in bad-batch.json)"
        )

    def finish(self, progress: Progress) -> dict[str, Any]:
        """Closes the trackers and marks the run as finished; run.json's content, {} beside rank 0. Collective."""
        if self.trackers:
            self.trackers.close()
        monitor, path = progress.course, self.folder.path
        totals = {
            "trained_seconds": progress.trained_seconds,
            "images": progress.images,
            "spikes": monitor.spikes,
            "warnings": monitor.warnings(),
        }
        # the others wait for this, so that none leaves the process group while another still uses it
        self.dist.on_rank_0(lambda: self.folder.update(state="finished", exit_code=0, **totals))
        if not self.dist.is_rank_0:
            return {}
        for text in monitor.warnings():
            console.warn(f"{path}: {text}")
        took = format_duration(progress.trained_seconds)
        console.say(f"done: {path} at step {progress.step:,}, {took} of training")
        return self.folder.state()

    def _track(self, values: dict[str, float], step: int) -> None:
        if self.trackers:
            self.trackers.log(dict(values), step=step)
