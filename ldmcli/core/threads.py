"""How many threads a CPU's arithmetic takes: as the user says, else what measures fastest.

Two threads of one core's siblings give a fifth more when nothing else runs, and a tenth when something does: each
product waits for the slower one. So nobody can say beforehand, and what was right may not stay so.
"""

import math
import os
import statistics
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

EARNED = 1.1  # times as fast as fewer threads, or more of them are not taken
VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
LEAST_SECONDS, LEAST_PASSES = 0.2, 2  # a number is measured for so long …
LONG_PASS = 1.0  # … but once where a pass takes as many seconds
WINDOW = 5  # steps whose median is the speed of now
SLOWER = 2.0  # times the fastest such median: worth measuring again …
AGAIN_AFTER = 30.0  # … at most every so many seconds, longer where it changed nothing,
COST_SHARE = 0.05  # and so seldom that it takes no more than this share of the time
WAITING = 3.0  # times as long with all threads as with one: they wait for each other, and for who else computes


def are_given(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether the user has said how many."""
    return any(environ.get(name) for name in VARIABLES)


def fewest_fast(seconds: Callable[[int], float], most: int) -> tuple[int, dict[int, float]]:
    """(number of threads, what was measured by number): of 1, 2, 4, … `most` the fewest that no larger number beats by
    a tenth. seconds(n): what a piece of the work takes with n threads."""
    candidates = sorted({most, *(2**k for k in range(most.bit_length()) if 2**k <= most)})
    measured = {n: seconds(n) for n in candidates}
    return next(n for n in candidates if measured[n] <= EARNED * min(measured.values())), measured


def without_waiting(seconds: Callable[[int], float], most: int) -> int:
    """`most` threads, or where another program takes their cores as many as `fewest_fast` says. An idle machine always
    gives `most`, and so the same bits. seconds(n): what a piece of the work takes with n threads."""
    if most < 2 or seconds(most) <= WAITING * seconds(1):
        return most
    return fewest_fast(seconds, most)[0]


def best_seconds(work: Callable[[], object]) -> float:
    """What a call of `work` takes, the best of several: single passes of milliseconds are too short to choose by."""
    best, total, passes = math.inf, 0.0, 0
    while best < LONG_PASS and (total < LEAST_SECONDS or passes < LEAST_PASSES) or not passes:
        begun = time.perf_counter()
        work()
        took = time.perf_counter() - begun
        best, total, passes = min(best, took), total + took, passes + 1
    return best


@dataclass
class SlowdownWatch:
    """Notices that steps take twice as long as they did. `now`: seconds of any clock that only rises."""

    fastest: float = math.inf  # the lowest median of WINDOW steps so far, in seconds
    measured_at: float = -math.inf
    wait: float = AGAIN_AFTER
    recent: deque[float] = field(default_factory=lambda: deque(maxlen=WINDOW))

    @property
    def speed_now(self) -> float:
        """Seconds a step: the median of the last ones."""
        return statistics.median(self.recent)

    def is_slow(self, seconds: float, now: float) -> bool:
        """Takes a step of `seconds` that has ended; whether threads should be measured again."""
        self.recent.append(seconds)
        if len(self.recent) < WINDOW:
            return False
        self.fastest = min(self.fastest, self.speed_now)
        if self.speed_now < SLOWER * self.fastest:
            self.wait = AGAIN_AFTER
            return False
        return now - self.measured_at >= self.wait

    def measured(self, took: float, now: float, changed: bool) -> None:
        """Threads were measured, which took so many seconds, and are other ones now or not."""
        self.wait = max(AGAIN_AFTER if changed else 2 * self.wait, took / COST_SHARE)
        self.measured_at = now
        self.recent.clear()
