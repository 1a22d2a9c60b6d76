"""What a person sees while it trains, on stderr: a live line at a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Mapping
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.text import Text

_PAUSE = 5.0  # seconds between plain lines
_WINDOW = 20  # logs that the time left is reckoned from
_ENOUGH = 3  # steps between two logs, before there is a time left to tell


class Display(Protocol):
    """Where the engine tells how it goes. Every method is cheap; none waits for the device."""

    def start(self, title: str, steps: int, done: int) -> None: ...
    def step(self, done: int) -> None: ...
    def metrics(self, values: Mapping[str, float]) -> None: ...
    def references(self, values: Mapping[str, float]) -> None: ...
    def probe(self, values: Mapping[str, float]) -> None: ...
    def say(self, line: str) -> None: ...
    def stop(self) -> None: ...


class Words:
    """The latest numbers as a person reads them."""

    def __init__(self) -> None:
        self.values: dict[str, float] = {}
        self.reference: tuple[str, float] | None = None

    def loss(self) -> str:
        """``loss 0.51 (0.87 mean of the visible)``: the best of the trivial predictors beside it."""
        if "loss" not in self.values:
            return ""
        beside = f" ({number(self.reference[1])} {self.reference[0]})" if self.reference else ""
        return f"loss {number(self.values['loss'])}{beside}"

    def parts(self) -> list[str]:
        values = self.values
        out = [f"epoch {values['epoch']:.1f}"] if values.get("epoch") is not None else []
        out.append(self.loss())
        rates = {noun: values.get(f"{noun}_per_second") for noun in ("images", "samples")}
        out += [f"{rate:,.0f} {noun}/s" for noun, rate in rates.items() if rate]
        if values.get("memory_mb"):
            memory = values["memory_mb"]
            out.append(f"{memory / 1024:.1f} GB" if memory >= 1024 else f"{memory:.0f} MB")
        return [part for part in out if part]

    def take_references(self, values: Mapping[str, float]) -> None:
        if values:
            name = min(values, key=lambda n: values[n])
            self.reference = (name, values[name])


class Pace:
    """The time left, from the last logs: before the first one a step may be slow (compiling, filling caches)."""

    def __init__(self, steps: int):
        self.steps = steps
        self.marks: deque[tuple[int, float]] = deque(maxlen=_WINDOW)  # step, seconds

    def mark(self, done: int, when: float | None = None) -> None:
        """A log was written at step ``done``: the device has really done it."""
        self.marks.append((done, time.monotonic() if when is None else when))

    def left(self) -> list[str]:
        """``["2:05 left"]``; empty at the end, and while too little was seen."""
        if not self.marks:
            return []
        (first, begun), (done, now) = self.marks[0], self.marks[-1]
        if done - first < _ENOUGH or done >= self.steps:
            return []
        minutes, seconds = divmod(round((now - begun) / (done - first) * (self.steps - done)), 60)
        hours, minutes = divmod(minutes, 60)
        return [f"{hours}:{minutes:02d}:{seconds:02d} left" if hours else f"{minutes}:{seconds:02d} left"]


class LiveDisplay:
    """One line at a terminal that is drawn again, with a bar and the time left."""

    def __init__(self, console: Console | None = None):
        self.console = console or Console(stderr=True)
        self.words, self.pace = Words(), Pace(0)
        self.done, self.probed = 0, ""
        self.progress: Progress | None = None
        self.task: TaskID | None = None

    def start(self, title: str, steps: int, done: int) -> None:
        self.stop()
        self.words, self.pace, self.done, self.probed = Words(), Pace(steps), done, ""
        self.progress = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=20),
            TextColumn("{task.completed}/{task.total}"),
            TimeElapsedColumn(),
            TextColumn("{task.fields[words]}", markup=False),
            console=self.console,
            refresh_per_second=4,
        )
        self.task = self.progress.add_task(title, total=steps, completed=done, words="")
        self.progress.start()

    def step(self, done: int) -> None:
        self.done = done
        if self.progress is not None and self.task is not None:
            self.progress.update(self.task, completed=done)

    def metrics(self, values: Mapping[str, float]) -> None:
        self.words.values = dict(values)
        self.pace.mark(int(values.get("step", self.done)))
        self._redraw()

    def references(self, values: Mapping[str, float]) -> None:
        self.words.take_references(values)
        self._redraw()

    def probe(self, values: Mapping[str, float]) -> None:
        self.probed = f"{numbers(values)} at {self.done}" if values else ""
        self._redraw()

    def say(self, line: str) -> None:
        self.console.print(Text(line))

    def stop(self) -> None:
        if self.progress is not None:
            self._redraw()
            self.progress.stop()
            self.progress = None

    def _redraw(self) -> None:
        if self.progress is not None and self.task is not None:
            parts = [*self.words.parts(), self.probed, *self.pace.left()]
            self.progress.update(self.task, words="  ".join(part for part in parts if part))


class PlainDisplay:
    """Whole lines, at most one every few seconds, for logs and pipes."""

    def __init__(self, pause: float = _PAUSE):
        self.pause, self.words, self.pace = pause, Words(), Pace(0)
        self.title, self.steps, self.done = "", 0, 0
        self.spoke = float("-inf")

    def start(self, title: str, steps: int, done: int) -> None:
        self.title, self.steps, self.done = title, steps, done
        self.words, self.pace, self.spoke = Words(), Pace(steps), float("-inf")
        self.say(f"{title}: step {done} of {steps}")

    def step(self, done: int) -> None:
        self.done = done

    def metrics(self, values: Mapping[str, float]) -> None:
        self.words.values = dict(values)
        self.done = int(values.get("step", self.done))
        self.pace.mark(self.done)
        if time.monotonic() - self.spoke >= self.pause or self.done >= self.steps:
            self.spoke = time.monotonic()
            self.say("  ".join([f"{self.title} {self.done}/{self.steps}", *self.words.parts(), *self.pace.left()]))

    def references(self, values: Mapping[str, float]) -> None:
        self.words.take_references(values)

    def probe(self, values: Mapping[str, float]) -> None:
        if values:
            self.say(f"{self.title}: {numbers(values)} at step {self.done}")

    def say(self, line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    def stop(self) -> None:
        pass


class SilentDisplay:
    """Says nothing: for tests, and for every process but the first."""

    def start(self, title: str, steps: int, done: int) -> None: ...
    def step(self, done: int) -> None: ...
    def metrics(self, values: Mapping[str, float]) -> None: ...
    def references(self, values: Mapping[str, float]) -> None: ...
    def probe(self, values: Mapping[str, float]) -> None: ...
    def say(self, line: str) -> None: ...
    def stop(self) -> None: ...


def default_display() -> Display:
    """Live at a terminal, plain lines elsewhere."""
    return LiveDisplay() if sys.stderr.isatty() else PlainDisplay()


def numbers(values: Mapping[str, float]) -> str:
    return "  ".join(f"{name} {number(value)}" for name, value in values.items())


def number(value: float | None) -> str:
    """Three significant digits, without a sea of zeros."""
    if value is None:
        return "?"
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"
