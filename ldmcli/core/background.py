"""Files that are written by threads while their maker goes on: a GPU draws faster than one thread packs PNG."""

import hashlib
import os
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from ldmcli.core import files

Files = Iterable[tuple[Path, bytes]]
THREADS = 8
WAITING = 4  # jobs a thread that may wait: what is to be written stays in memory until it is


class BackgroundWriter:
    """Writes files in threads, each whole or not at all, in the order of their job. hashes: SHA-256 by name of what is
    written so far. folder: where they go, flushed by `wait`."""

    def __init__(self, folder: Path):
        self.folder, self.hashes = folder, dict[str, str]()
        self._threads = min(THREADS, os.cpu_count() or 1)
        self._pool = ThreadPoolExecutor(self._threads, "ldm-write")
        self._running: deque[Future[None]] = deque()

    def submit(self, make: Callable[[], Files]) -> None:
        """Writes what `make` gives, soon. Raises what an earlier job has raised."""
        while self._running and (self._running[0].done() or len(self._running) >= WAITING * self._threads):
            self._running.popleft().result()
        self._running.append(self._pool.submit(self._write, make))

    def wait(self) -> None:
        """Returns when all is on the disk. Raises what a job has raised."""
        while self._running:
            self._running.popleft().result()
        files.flush_folder(self.folder)

    def close(self) -> None:
        """Ends the threads when they have done what they were given, whatever became of it."""
        self._pool.shutdown(wait=True)

    def _write(self, make: Callable[[], Files]) -> None:
        for path, data in make():
            files.write_bytes(path, data, folder_too=False)
            self.hashes[path.name] = hashlib.sha256(data).hexdigest()
