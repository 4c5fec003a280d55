"""What a command runs on: the processes that share it, the number format of its networks, and compiled ones."""

import statistics
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch

from ldmcli.core import console, threads
from ldmcli.core.errors import UsageError
from ldmcli.core.train_settings import MIXED_PRECISION
from ldmcli.core.world import World

FULL = "float32"


@dataclass(frozen=True)
class Machine:
    """world: the processes, all of which make the same calls. mixed_precision: "auto", "no", "bf16" or "fp16", see
    `inference_dtype`. compile: whether networks are compiled when they are first used at a size."""

    world: World = field(default_factory=World)
    mixed_precision: str = "auto"
    compile: bool = False


ALONE = Machine()


def leave_taken_cores(world: World) -> None:
    """Takes fewer threads where other programs hold the cores, and says so: threads that wait for each other are many
    times slower than one. Nothing changes on GPUs, with several processes, or where the user has said how many."""
    most = torch.get_num_threads()
    if world.device.type != "cpu" or world.world_size > 1 or threads.are_given():
        return
    chosen = threads.without_waiting(_probe_seconds, most)
    torch.set_num_threads(chosen)
    if chosen < most:
        console.say(f"threads: {chosen} of {most}, since other programs compute here (OMP_NUM_THREADS sets the number)")


def _probe_seconds(count: int) -> float:
    """What a few convolutions of a small UNet take with `count` threads: the median of seven times, some 0.1 s in
    all."""
    torch.set_num_threads(count)
    x, weight, took = torch.ones(4, 64, 32, 32), torch.ones(64, 64, 3, 3), []
    for _ in range(8):
        begun = time.perf_counter()
        h = x
        for _ in range(3):
            h = torch.nn.functional.conv2d(h, weight, padding=1).tanh()
        took.append(time.perf_counter() - begun)
    return statistics.median(took[1:])


def inference_dtype(setting: str, device: torch.device) -> torch.dtype | None:
    """The format of the heavy arithmetic in use (not in training) of networks; None is float32.

    auto: bfloat16 on GPUs that have it (NVIDIA from Ampere on), float16 on older ones, float32 on CPUs and Apple's.
    Raises UsageError for another setting, and for float16 on a CPU.
    """
    if setting not in MIXED_PRECISION:
        raise UsageError(f"--mixed-precision {setting}: choose one of {', '.join(MIXED_PRECISION)}")
    if setting == "auto":
        if device.type != "cuda":
            return None
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    if setting == "fp16" and device.type == "cpu":
        raise UsageError("--mixed-precision fp16: needs a GPU; use bf16 or no")
    return {"no": None, "bf16": torch.bfloat16, "fp16": torch.float16}[setting]


def autocast(device: torch.device, dtype: torch.dtype | None) -> AbstractContextManager[Any]:
    """A context in which convolutions and matrix products run in this format; None: as they are."""
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype)


@contextmanager
def cast_once(network: torch.nn.Module) -> Iterator[None]:
    """A context for passes without gradients: those within one `autocast` share the low-precision copies of weights.

    Autocast keeps copies of weights that can get gradients only, until its outermost context ends; so these can.
    """
    fixed = [weight for weight in network.parameters() if not weight.requires_grad]
    for weight in fixed:
        weight.requires_grad_(True)
    try:
        yield
    finally:
        for weight in fixed:
            weight.requires_grad_(False)


def full_precision(device: torch.device) -> AbstractContextManager[Any]:
    """A context without autocast, for what needs float32."""
    return torch.autocast(device.type, enabled=False) if torch.is_autocast_enabled(device.type) else nullcontext()


def precision_of(dtype: torch.dtype | None) -> str:
    """float32, bfloat16 or float16."""
    return FULL if dtype is None else str(dtype).removeprefix("torch.")


def stated_precision(precision: str) -> dict[str, str]:
    """What files beside pictures say of it: nothing of float32."""
    return {} if precision == FULL else {"precision": precision}
