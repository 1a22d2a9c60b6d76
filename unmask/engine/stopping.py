"""Leaving when asked: the first SIGINT or SIGTERM ends the run after its step, a second SIGINT at once."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from types import FrameType
from typing import Any

_ECHO = (
    1.0  # a launcher passes on a Ctrl-C that the terminal has delivered already: within this time it is the same one
)


class StopRequest:
    """While entered, signals are noted in ``number`` instead of raised."""

    def __init__(self, *, launched: bool = False):
        self.number: int | None = None
        self.when = 0.0
        self.launched = launched
        self.before: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self.before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)
        self.before.clear()

    def _note(self, number: int, frame: FrameType | None) -> None:
        again = self.number is not None and number == signal.SIGINT
        if again and not (self.launched and time.monotonic() - self.when < _ECHO):
            if sys.stderr.isatty():
                os.write(2, b"\x1b[?25h\n")  # the live line hides the cursor
            os._exit(128 + number)
        if self.number is None:
            self.number, self.when = number, time.monotonic()
