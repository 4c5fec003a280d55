"""How `ldm bench` takes time, memory and the rate that a device reaches in matrix products."""

import statistics
import time
import warnings
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ldmcli.training.distributed import Distributed
from ldmcli.training.throughput import peak_memory_bytes

ROUNDS = 5
PRODUCT_SECONDS = 0.5  # at most, for each size
_CLEAR, _STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")


@dataclass(frozen=True)
class Timing:
    """Seconds of one call: the median of the rounds; spread: half the range of the rounds, as a share of it."""

    seconds: float
    spread: float
    calls: int


def synchronize(device: torch.device) -> None:
    """Waits until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def timed(work: Callable[[], object], seconds: float, dist: Distributed) -> Timing:
    """Calls `work` for about `seconds`, in rounds of equally many calls; the first calls, which choose kernels, do not
    count. The slowest process counts. Collective: every process makes equally many calls."""
    begun = time.perf_counter()
    work()
    synchronize(dist.device)
    first = time.perf_counter() - begun
    if first < seconds:  # else one call is the warm-up, and a round
        work()
        first = min(first, _round(work, 1, dist))
    longest = dist.all_reduce_max([first])[0]
    calls = max(1, round(seconds / ROUNDS / max(longest, 1e-6)))
    rounds = max(2, min(ROUNDS, round(seconds / max(longest, 1e-6))))
    found = [dist.all_reduce_max([_round(work, calls, dist)])[0] for _ in range(rounds)]
    middle = statistics.median(found)
    return Timing(middle, (max(found) - min(found)) / 2 / middle, calls * rounds)


def _round(work: Callable[[], object], calls: int, dist: Distributed) -> float:
    dist.all_reduce_max([0.0])  # all begin together
    begun = time.perf_counter()
    for _ in range(calls):
        work()
    synchronize(dist.device)
    return (time.perf_counter() - begun) / calls


def product_format(device: torch.device, precision: str) -> str:
    """What a matrix product of this precision runs in: "TF32" where CUDA takes that for float32."""
    products: Any = torch.backends.cuda.matmul
    new = hasattr(torch.backends.cudnn, "conv")  # from PyTorch 2.9 on, with names that refuse the older ones
    tf32 = device.type == "cuda" and (products.fp32_precision == "tf32" if new else products.allow_tf32)
    return "TF32" if precision == "float32" and tf32 else precision


def reset_peak_memory(device: torch.device) -> None:
    """Forgets the peak so far, where the system can: of the device, else of this process."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        return
    try:
        _CLEAR.write_text("5")
    except OSError:
        return


def peak_memory(device: torch.device) -> int:
    """Bytes since `reset_peak_memory`: of the device, else of this process with all that it holds."""
    if device.type != "cuda":
        try:
            lines = _STATUS.read_text().splitlines()
            return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM:"))
        except (OSError, StopIteration):
            pass
    return peak_memory_bytes(device)


@contextmanager
def counted_waits(device: torch.device):
    """Yields a list that gets a text for each time that the host waits for a GPU in it; None on other devices."""
    if device.type != "cuda":
        yield None
        return
    found: list[str] = []
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            yield found
        found += [str(one.message) for one in seen if "synchron" in str(one.message)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
