"""Means between two log lines, throughput, time spent waiting for data, peak memory."""

import resource
import sys
import time
from typing import Any

import torch

from ldmcli.data.batches import Prefetcher


class ThroughputMeter:
    """Sums since the last log line. Statistics stay on the device until it is written."""

    def __init__(self, batches: Prefetcher):
        self.batches = batches
        self._restart()

    def _restart(self) -> None:
        self.begun, self.waited = time.perf_counter(), self.batches.waited_s
        self.images, self.steps, self.lr_factor = 0, 0, 1.0
        self.sums: dict[str, Any] = {}
        self.counts: dict[str, int] = {}

    def add(self, stats: dict[str, Any], images: int, lr_factor: float) -> None:
        """One step: its statistics (scalars or scalar tensors), images of the global batch, learning-rate factor."""
        self.images, self.steps, self.lr_factor = self.images + images, self.steps + 1, lr_factor
        for name, value in stats.items():
            self.sums[name] = self.sums.get(name, 0) + value
            self.counts[name] = self.counts.get(name, 0) + 1

    def leave_out(self, seconds: float) -> None:
        """Time that was no training: an evaluation's."""
        self.begun += seconds

    def close(self) -> dict[str, float]:
        """Means over the window, throughput, share of time spent waiting for data; begins a new window."""
        seconds = max(time.perf_counter() - self.begun, 1e-9)
        out = {name: float(value) / self.counts[name] for name, value in self.sums.items()}
        out |= {
            "images_per_s": self.images / seconds,
            "seconds_per_step": seconds / max(self.steps, 1),
            "data_wait": (self.batches.waited_s - self.waited) / seconds,
            "lr_factor": self.lr_factor,
        }
        self._restart()
        return out


def peak_memory_bytes(device: torch.device) -> int:
    """Peak memory of this process: of the device where it counts, else resident memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
