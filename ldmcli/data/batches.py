"""Which rows a step sees, how a step is shared out, and threads that prepare batches ahead of the loop."""

import threading
import time
from collections.abc import Callable
from functools import lru_cache
from typing import Generic, TypeVar

import numpy as np

from ldmcli.core.errors import InputError
from ldmcli.maths import rng

T = TypeVar("T")


@lru_cache(maxsize=4)
def _order(seed: int, epoch: int, n: int) -> np.ndarray:
    order = np.asarray(rng.permutation(seed, epoch, n), dtype=np.int64)
    order.setflags(write=False)
    return order


def epoch_positions(start: int, count: int, n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Row ids and global positions start … start + count − 1 of a training, int64 (count,) each.

    Position p is one of an endless sequence of permutations: epoch p // n, place p % n in it. Every row comes once an
    epoch however positions are shared out to steps. `n` must be at least 1.
    """
    if n < 1:
        raise InputError(f"no rows to train on: {n} rows cannot fill a batch of {count}")
    where = np.arange(start, start + count, dtype=np.int64)
    epochs, places = where // n, where % n
    ids = np.empty_like(where)
    for epoch in np.unique(epochs):
        chosen = epochs == epoch
        ids[chosen] = _order(seed, int(epoch), n)[places[chosen]]
    return ids, where


def rank_slice(batch_size: int, rank: int, world: int) -> slice:
    """The part of a global batch that a process takes: contiguous, in order of rank, sizes differing by at most 1."""
    base, rest = divmod(batch_size, world)
    start = rank * base + min(rank, rest)
    return slice(start, start + base + (rank < rest))


def micro_batches(count: int, micro: int) -> list[slice]:
    """Slices of at most `micro` of `count` samples, as even as possible; micro = 0 means all at once."""
    if count == 0:
        return []
    parts = 1 if micro <= 0 else -(-count // micro)
    return [rank_slice(count, part, parts) for part in range(parts)]


class Prefetcher(Generic[T]):
    """Prepares `make_batch(step)` for steps start_step, start_step + 1, … in threads, `depth` steps ahead.

    `get(step)` takes the steps in that order. An error in `make_batch` is raised by the `get` of its step.
    `waited_s` is the time that `get` has spent waiting, in seconds. workers = 0 makes batches in the caller's thread.
    `limit` is the step at which to stop preparing.
    """

    def __init__(
        self,
        make_batch: Callable[[int], T],
        start_step: int,
        depth: int = 2,
        workers: int = 1,
        *,
        limit: int | None = None,
    ):
        self._make, self._next, self._depth, self._limit = make_batch, start_step, max(depth, 1), limit
        self._pending: dict[int, _Promise[T]] = {}
        self._wake = threading.Condition()
        self._closed = False
        self._handed = start_step  # first step that no thread has taken
        self.waited_s = 0.0
        self._threads = [
            threading.Thread(target=self._work, daemon=True, name=f"ldm-batch-{k}") for k in range(workers)
        ]
        for thread in self._threads:
            thread.start()

    def _work(self) -> None:
        while (step := self._take()) is not None:
            promise = self._pending[step]
            try:
                promise.value = self._make(step)
            except BaseException as error:  # handed to the thread that takes this step
                promise.error = error
            with self._wake:
                promise.done = True
                self._wake.notify_all()

    def _take(self) -> int | None:
        with self._wake:
            self._wake.wait_for(lambda: self._closed or self._handed < self._next + self._depth)
            if self._closed or (self._limit is not None and self._handed >= self._limit):
                return None
            step, self._handed = self._handed, self._handed + 1
            self._pending[step] = _Promise()
            return step

    def get(self, step: int) -> T:
        """The batch of `step`, which must be the next one in order."""
        if self._closed:
            raise RuntimeError("the prefetcher is closed")
        if step != self._next:
            raise RuntimeError(f"batches come in order: step {self._next} is next, step {step} was asked for")
        if self._limit is not None and step >= self._limit:
            raise RuntimeError(f"step {step} was asked for, but batches end before step {self._limit}")
        started = time.perf_counter()
        try:
            return self._make(step) if not self._threads else self._wait(step)
        finally:
            self._next += 1 if not self._threads else 0
            self.waited_s += time.perf_counter() - started

    def _wait(self, step: int) -> T:
        with self._wake:
            self._wake.wait_for(lambda: self._closed or step in self._pending and self._pending[step].done)
            if self._closed:
                raise RuntimeError("the prefetcher was closed while a batch was awaited")
            promise = self._pending.pop(step)
            self._next += 1
            self._wake.notify_all()
        if promise.error is not None:
            raise promise.error
        return promise.value

    def close(self) -> None:
        """Stops and joins the threads; batches in the making are finished and dropped. May be called twice."""
        with self._wake:
            self._closed = True
            self._wake.notify_all()
        for thread in self._threads:
            thread.join()
        self._pending.clear()

    def __enter__(self) -> "Prefetcher[T]":
        return self

    def __exit__(self, *exc) -> None:
        self.close()


class _Promise(Generic[T]):
    value: T
    error: BaseException | None = None
    done = False
