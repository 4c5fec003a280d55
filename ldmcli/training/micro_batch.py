"""How much of its share of a batch a process takes at once: all of it, or as much as memory holds. Losses and the batch
stay; only the order in which gradients are summed changes, so a run keeps what it was started with."""

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

Result = TypeVar("Result")


def choose_micro_batch(objective: Objective, dist: Distributed, settings: TrainSettings, stored: int) -> int:
    """Samples at a time: as set; else as in the checkpoint that the run goes on from (`stored`, 0 without one), where
    these still fit; else all, or as many as fit. The same on all processes; where it is not all, it is said."""
    share = -(-settings.batch_size // dist.world_size)
    if settings.micro_batch:
        return settings.micro_batch
    named = [pair for module in objective.networks.values() for pair in module.named_parameters()]
    still_to_come = 4 * sum(p.numel() for _, p in named) + cost.optimizer_bytes(named, settings)
    beside = 1 if dist.device.type == "cuda" else int(os.environ.get("LOCAL_WORLD_SIZE") or dist.world_size)
    room = cost.MEMORY_SHARE * (cost.available_bytes(dist.device) // beside - still_to_come)
    fitting = share
    if not cost.certainly_fits(share, objective.size, room):
        fitting = cost.largest_micro_batch(share, objective.activation_bytes(), room)
    fitting = min(dist.gather(fitting))
    chosen = min(stored, fitting) if stored else fitting
    if chosen < share and dist.is_rank_0:
        console.say(
            f"{chosen} of {share} images go through at a time: free memory holds no more "
            f"({files.human_bytes(max(room, 0))}; --micro-batch N sets it); the batch stays"
        )
    return chosen


def halve_on_out_of_memory(work: Callable[[], Result], progress: Progress, held: int, dist: Distributed) -> Result:
    """`work`, which takes `progress.micro_batch` of `held` samples at a time and changes no weights; begun again with
    half as many where memory runs out. Several processes end instead: the others wait in the middle of their step."""
    while True:
        try:
            return work()
        except Exception as error:
            size = min(progress.micro_batch, held)
            if not out_of_memory(error) or size < 2 or dist.world_size > 1:
                raise
        progress.micro_batch = -(-size // 2)
        console.warn(f"memory ran out with {size} images at a time; the step begins again with {progress.micro_batch}")
        if dist.device.type == "cuda":
            torch.cuda.empty_cache()
