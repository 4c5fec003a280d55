"""Threads of a training on a CPU, chosen by what a pass takes: before its first step and, in a run whose end is a time,
again when it has become slow, and now and then while some are idle. Elsewhere the number stays, since other threads add
up in another order."""

import time
from collections.abc import Callable

import torch

from ldmcli.core import console, threads
from ldmcli.core.runs import RunFolder
from ldmcli.training.objective import Objective
from ldmcli.training.run_end import out_of_memory
from ldmcli.training.state import TrainState


class ThreadChoice:
    """Sets the number of threads of a training to the fewest that are fast at a pass of its next step, and says so: on
    the console, in metrics.jsonl and, as a list, in run.json.

    Where the user has said how many, with compiled networks, which hold the number, on GPUs and with several processes
    all stays as it is. Made before a checkpoint is loaded, which sets the number of the run that is resumed.
    """

    def __init__(
        self, objective: Objective, state: TrainState, forward_backward: Callable[..., object], folder: RunFolder
    ):
        self.objective, self.state, self.forward_backward, self.folder = objective, state, forward_backward, folder
        self.most = torch.get_num_threads()
        is_alone_on_cpu = state.dist.device.type == "cpu" and state.dist.world_size == 1
        self.is_free = is_alone_on_cpu and self.most > 1 and not (state.settings.compile or threads.are_given())
        self.watch = threads.SlowdownWatch()
        self.retry = threads.AGAIN_AFTER  # seconds from one measurement to the next while threads are idle

    def choose_at_start(self, resumed: bool) -> None:
        """Before the first step; a run that is resumed keeps its number."""
        if self.is_free and not resumed:
            torch.set_num_threads(1)
            self._choose(warm_up=True)
        self.watch.measured_at = time.perf_counter()

    def after_step(self, seconds: float) -> float:
        """Takes the time of a step; seconds that choosing anew has taken: 0 where it was not due.

        It is due in a run bounded by train.max_minutes when steps take twice as long as they did, and while not all
        threads are in use, since what disturbed them may be over. When little time is left nothing is gained by it.
        """
        progress, settings = self.state.progress, self.state.settings
        left = settings.max_minutes * 60 - progress.trained_seconds
        if not self.is_free or left < threads.AGAIN_AFTER or progress.step >= settings.steps:
            return 0.0
        begun = time.perf_counter()
        slow, before, why = self.watch.is_slow(seconds, begun), torch.get_num_threads(), ", measured again"
        if slow:
            why = f", since a step takes {self.watch.speed_now:.2g} s instead of {self.watch.fastest:.2g} s"
        elif before == self.most or begun - self.watch.measured_at < self.retry:
            return 0.0
        self._choose(why=why, say_same=slow)
        ended = time.perf_counter()
        took, changed = ended - begun, torch.get_num_threads() != before
        self.watch.measured(took, ended, changed)
        self.retry = threads.AGAIN_AFTER if changed else max(2 * self.retry, took / threads.COST_SHARE)
        return took

    def _choose(self, warm_up: bool = False, why: str = "", say_same: bool = True) -> None:
        """say_same: also where the number stays."""
        before, step = torch.get_num_threads(), self.state.progress.step
        try:
            chosen, measured = self._measure(warm_up)
        except Exception as error:
            torch.set_num_threads(self.most if warm_up else before)
            if not out_of_memory(error):
                raise
            return  # the next step takes less at a time
        torch.set_num_threads(chosen)
        if chosen == before and not say_same:
            return
        times = ", ".join(f"{count}: {took:.2g} s" for count, took in measured.items())
        text = f"threads: {chosen} of {self.most}{why} (a pass takes with {times}; OMP_NUM_THREADS sets the number)"
        console.say(f"step {step:>7,}  {text}" if why else text)
        if why:
            self.folder.log(step=step, event=text)
        seconds = {str(count): took for count, took in measured.items()}
        chosen_before = self.folder.state().get("threads") or []
        self.folder.update(threads=[*chosen_before, {"step": step, "threads": chosen, "pass_seconds": seconds}])

    def _measure(self, warm_up: bool) -> tuple[int, dict[int, float]]:
        """(number, seconds of a pass by number). What passes leave behind is undone: nobody takes their gradients,
        running means and codes in use."""
        objective, state, step = self.objective, self.state, self.state.progress.step
        batch = {name: rows[: state.progress.micro_batch] for name, rows in objective.batch(step).items()}
        phase = objective.phases(step)[0]
        state.train_only(phase)
        buffers = [buffer for network in objective.networks.values() for buffer in network.buffers()]
        kept, extra = [buffer.clone() for buffer in buffers], {k: v.clone() for k, v in objective.extra_state().items()}

        def run() -> None:
            self.forward_backward(phase, batch, step, False)

        def seconds(count: int) -> float:
            torch.set_num_threads(count)
            return threads.best_seconds(run)

        try:
            if warm_up:
                run()
            return threads.fewest_fast(seconds, self.most)
        finally:
            state.optimizers[phase].zero_grad()
            for buffer, before in zip(buffers, kept):
                buffer.copy_(before)
            objective.load_extra_state(extra)
