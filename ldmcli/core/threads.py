"""How many threads a CPU's arithmetic takes: as the user says, else what measures fastest.

Two threads of one core's siblings give a fifth more when nothing else runs, and a tenth when something does: each
product waits for the slower one. So nobody can say beforehand.
"""

import os
from collections.abc import Callable, Mapping

EARNED = 1.1  # times as fast as fewer threads, or more of them are not taken
VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")


def are_given(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether the user has said how many."""
    return any(environ.get(name) for name in VARIABLES)


def fewest_fast(seconds: Callable[[int], float], most: int) -> tuple[int, dict[int, float]]:
    """(number of threads, what was measured by number): of 1, 2, 4, … `most` the fewest that no larger number beats by
    a tenth. seconds(n): what a piece of the work takes with n threads."""
    candidates = sorted({most, *(2**k for k in range(most.bit_length()) if 2**k <= most)})
    measured = {n: seconds(n) for n in candidates}
    return next(n for n in candidates if measured[n] <= EARNED * min(measured.values())), measured
