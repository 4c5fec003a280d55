"""One writer a folder: the system's lock on a file, or, where a file system has none, a file that only one can make."""

import errno
import fcntl
import os
import socket
from pathlib import Path
from typing import IO

from ldmcli.core import console, files
from ldmcli.core.errors import UsageError

_HELD = (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES)  # what the system says where another process has the lock
LOCK, OWNER = ".lock", ".lock-owner"


class FolderLock:
    """The right to write in a folder, for one process. The system's lock goes with the process, however it ends; the
    file that stands for it elsewhere is found stale where its process was on this machine."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._handle: IO[str] | None = None
        self._made = False  # the file that names the owner

    def acquire(self) -> None:
        """Takes the lock in the folder, which exists. Raises UsageError, with its holder, where another process has
        it."""
        with files.writing(self.folder):
            handle = open(self.folder / LOCK, "a+")
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            handle.seek(0)
            holder = handle.read().strip() or "another process"
            if error.errno in _HELD:
                handle.close()
                raise UsageError(
                    f"{self.folder}: {holder} is writing here; wait for it or choose another --out"
                ) from error
            self._make_owner(handle, error)
        handle.seek(0)
        handle.truncate()
        handle.write(_me())
        handle.flush()
        self._handle = handle

    def _make_owner(self, handle: IO[str], error: OSError) -> None:
        path = self.folder / OWNER
        console.warn(f"{self.folder}: no locks on this file system ({error.strerror}); {OWNER} stands for one")
        if _is_stale(path):
            path.unlink(missing_ok=True)
        try:
            with open(path, "x") as file:
                file.write(_me())
        except FileExistsError:
            handle.close()
            holder = path.read_text().strip() or "another process"
            raise UsageError(
                f"{self.folder}: {holder} is writing here, or was killed while it did: then remove {path}; else wait "
                "for it or choose another --out"
            ) from error
        self._made = True

    def release(self) -> None:
        """Lets another writer in."""
        if self._handle:
            self._handle.truncate(0)
            self._handle.close()
            self._handle = None
        if self._made:
            (self.folder / OWNER).unlink(missing_ok=True)
            self._made = False


def _me() -> str:
    return f"process {os.getpid()} on {socket.gethostname()}"


def _is_stale(path: Path) -> bool:
    """Whether the owner was a process of this machine that has ended."""
    try:
        _, number, _, host = path.read_text().split()
        if host != socket.gethostname():
            return False
        os.kill(int(number), 0)
    except ProcessLookupError:
        return True
    except (OSError, ValueError):
        return False
    return False
