"""The micro-batch: how many samples of its share of a batch a process takes at once. It changes neither batch nor loss,
only the order in which gradients are summed; a run keeps the one it was started with."""

import os
from collections.abc import Callable
from typing import TypeVar

import torch

from ldmcli.core import console, files
from ldmcli.core.settings import TrainSettings
from ldmcli.training import cost
from ldmcli.training.distributed import Distributed
from ldmcli.training.objective import Objective
from ldmcli.training.progress import Progress
from ldmcli.training.run_end import out_of_memory

T = TypeVar("T")


def choose_micro_batch(objective: Objective, dist: Distributed, settings: TrainSettings, stored: int) -> int:
    """Samples at a time, the same on all processes: as set; else `stored`, from the checkpoint that the run resumes (0
    without one), where these still fit; else all, or as many as fit. Says so where it is not all. Collective."""
    share = -(-settings.batch_size // dist.world_size)
    if settings.micro_batch:
        return settings.micro_batch
    named = [pair for module in objective.networks.values() for pair in module.named_parameters()]
    to_allocate = 4 * sum(p.numel() for _, p in named) + cost.optimizer_bytes(named, settings)
    to_allocate += cost.cast_bytes(named, dist.dtype)
    processes = 1 if dist.device.type == "cuda" else int(os.environ.get("LOCAL_WORLD_SIZE") or dist.world_size)
    room = cost.MEMORY_SHARE * (cost.available_bytes(dist.device) // processes - to_allocate)
    fitting = share
    if not cost.certainly_fits(share, objective.size, room):
        fitting = cost.largest_micro_batch(share, objective.activation_bytes(), room)
    fitting = min(dist.gather(fitting))
    chosen = min(stored, fitting) if stored else fitting
    if chosen < share and dist.is_rank_0:
        why = f"free memory holds no more ({files.human_bytes(max(room, 0))}; --micro-batch N sets it)"
        if chosen < fitting:
            why = "as before the run was resumed (--micro-batch N sets it)"
        console.say(f"{chosen} of {share} images go through at a time: {why}; the batch stays")
    return chosen


def halve_on_out_of_memory(work: Callable[[], T], progress: Progress, samples: int, dist: Distributed) -> T:
    """Calls `work`, which takes `progress.micro_batch` of `samples` at a time and changes no weights; again with half
    as many where memory runs out. With several processes the error is raised: the others wait amid their step."""
    while True:
        try:
            return work()
        except Exception as error:
            size = min(progress.micro_batch, samples)
            if not out_of_memory(error) or size < 2 or dist.world_size > 1:
                raise
        progress.micro_batch = -(-size // 2)
        console.warn(f"memory ran out with {size} images at a time; the step begins again with {progress.micro_batch}")
        if dist.device.type == "cuda":
            torch.cuda.empty_cache()
