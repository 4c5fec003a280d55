"""Threads of a training on a CPU, chosen before its first step by what a pass takes."""

import time
from collections.abc import Callable

import torch

from ldmcli.core import console, threads
from ldmcli.training.objective import Objective
from ldmcli.training.run_end import out_of_memory
from ldmcli.training.state import TrainState

PASSES = 2  # of each number of threads, after one that does not count


def choose_threads(
    objective: Objective, state: TrainState, forward_backward: Callable[..., object], *, resumed: bool
) -> None:
    """Sets the number of threads to the fewest that are fast at a pass of the next step; says so.

    Where the user has said how many, where a checkpoint did (`resumed`: other threads add up in another order), with
    compiled networks, which hold the number, on GPUs and with several processes all stays as it is.
    """
    most, dist = torch.get_num_threads(), state.dist
    fixed = resumed or state.settings.compile or threads.are_given()
    if fixed or most < 2 or dist.device.type != "cpu" or dist.world_size > 1:
        return
    step = state.progress.step
    batch = {name: rows[: state.progress.micro_batch] for name, rows in objective.batch(step).items()}
    phase = objective.phases(step)[0]
    state.train_only(phase)
    buffers = [buffer for network in objective.networks.values() for buffer in network.buffers()]
    kept, extra = [buffer.clone() for buffer in buffers], {k: v.clone() for k, v in objective.extra_state().items()}

    def run() -> None:
        forward_backward(phase, batch, step, False)

    def seconds(count: int) -> float:
        torch.set_num_threads(count)
        run()
        best = float("inf")
        for _ in range(PASSES):
            begun = time.perf_counter()
            run()
            best = min(best, time.perf_counter() - begun)
        return best

    try:
        chosen, measured = threads.fewest_fast(seconds, most)
    except Exception as error:
        torch.set_num_threads(most)
        if not out_of_memory(error):
            raise
        return  # the first step takes less at a time
    finally:  # nobody takes these gradients, running means and codes in use
        state.optimizers[phase].zero_grad()
        for buffer, before in zip(buffers, kept):
            buffer.copy_(before)
        objective.load_extra_state(extra)
    torch.set_num_threads(chosen)
    times = ", ".join(f"{count}: {took:.2g} s" for count, took in measured.items())
    console.say(f"threads: {chosen} of {most} (a pass takes with {times}; OMP_NUM_THREADS sets the number)")
