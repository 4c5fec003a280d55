"""Signals for a long command to end or to save, as flags that its loop reads between two steps."""

import os
import signal
import sys
import threading
import time
from typing import Any

# launchers pass a Ctrl-C on that the terminal has already delivered; a person is slower than this
SAME_PRESS_SECONDS = 0.5


class StopRequest:
    """`with StopRequest() as request:` SIGINT and SIGTERM set `.stop`, SIGUSR1 sets `.save_requested`.

    A second Ctrl-C raises KeyboardInterrupt at once. The handlers that stood before return at the end. Outside the
    main thread, where Python allows no handlers, the flags stay unset.
    """

    def __init__(self) -> None:
        self.stop = 0  # number of the first SIGINT or SIGTERM, 0 = none
        self._save = False
        self._since = 0.0
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():
            for number, handler in (
                (signal.SIGINT, self._on_stop),
                (signal.SIGTERM, self._on_stop),
                (signal.SIGUSR1, self._on_save),
            ):
                self._previous[number] = signal.signal(number, handler)
        return self

    def __exit__(self, *exc_info) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
        self._previous.clear()

    @property
    def save_requested(self) -> bool:
        """True once for each time that SIGUSR1 came (several between two readings count as one)."""
        save, self._save = self._save, False
        return save

    def _on_stop(self, number: int, frame) -> None:
        if not self.stop:
            self.stop, self._since = number, time.monotonic()
            again = "; Ctrl-C again ends at once" if number == signal.SIGINT else ""
            _note(f"{signal.Signals(number).name}: finishing this step, then saving{again}\n")
        elif number == signal.SIGINT and time.monotonic() - self._since > SAME_PRESS_SECONDS:
            raise KeyboardInterrupt

    def _on_save(self, number: int, frame) -> None:
        self._save = True


def _note(text: str) -> None:
    # a handler may interrupt a print to the same buffer, so this goes round it
    if sys.__stderr__ is not None and os.environ.get("RANK", "0") in ("", "0"):
        try:
            os.write(sys.__stderr__.fileno(), text.encode())
        except (AttributeError, OSError, ValueError):
            pass
