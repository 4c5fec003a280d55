"""Means between two log lines, throughput and its share of what the device can do, time spent waiting for data, peak
memory."""

import resource
import sys
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ldmcli.data.batches import Prefetcher
from ldmcli.training.cost import flop_counter
from ldmcli.training.objective import Objective
from ldmcli.training.state import TrainState


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


class StepFlops:
    """What the phases of a step compute for one sample: `a_sample` FLOPs, backward passes included."""

    def __init__(self, objective: Objective, state: TrainState):
        self.objective, self.state = objective, state
        self.a_sample = 0.0
        self._counted: tuple[str, ...] = ()

    def count(self, batch: dict[str, Tensor], step: int) -> None:
        """Counts where a step begins that has other phases than those before it: a sample of its batch goes through the
        networks as they are, neither compiled nor in training mode, and what it leaves is dropped. Collective."""
        phases, networks = self.objective.phases(step), self.objective.networks
        if phases == self._counted:
            return
        self._counted, one = phases, {name: tensor[:1] for name, tensor in batch.items()}
        for module in networks.values():
            module.eval()
        with flop_counter() as counter, self.state.dist.autocast():
            for phase in phases:
                self.state.train_only(phase)
                self.objective.loss(phase, networks, one, step, False)[0].backward()
                self.state.optimizers[phase].zero_grad()
        for module in networks.values():
            module.train()
        self.a_sample = float(counter.get_total_flops())


def product_rate(
    device: torch.device, dtype: torch.dtype | None, sides: Sequence[int] = (), seconds: float = 0.0
) -> float:
    """FLOP/s of matrix products in a number format (None: float32), the best of three or more passes in about `seconds`
    for each side: what the device reaches here and now, not what its maker says. Without `sides` one is taken that
    fills the device."""
    best = 0.0
    for side in sides or ((8192,) if device.type == "cuda" else (512,)):
        # random numbers: equal ones take less power, and let a GPU run faster than it does at work
        matrix = torch.randn(side, side, device=device, dtype=dtype or torch.float32)
        end, passes = time.perf_counter() + seconds, 0
        while passes < 4 or time.perf_counter() < end:  # the first one chooses kernels
            passes += 1
            begun = time.perf_counter()
            float((matrix @ matrix)[0, 0])  # a read waits for the product, on any device
            best = max(best, 2 * side**3 / (time.perf_counter() - begun))
    return best


def peak_memory_bytes(device: torch.device) -> int:
    """Peak memory of this process: of the device where it counts, else resident memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
