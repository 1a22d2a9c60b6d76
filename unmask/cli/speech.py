"""How the command line speaks: results on stdout, the talk on stderr, errors in one line."""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table


def out() -> Console:
    """The console of results."""
    return Console(highlight=False, soft_wrap=True)


def err() -> Console:
    """The console of the talk."""
    return Console(stderr=True, highlight=False, soft_wrap=True)


def say(text: str) -> None:
    """One line of talk."""
    err().print(escape(text))


class Ticker:
    """Talk that counts (``train: 512 of 5550 images``): one line that changes at a terminal, now and then one elsewhere."""

    def __init__(self, pause: float = 5.0):
        self.pause, self.spoke, self.width = pause, time.monotonic(), 0

    def __call__(self, text: str) -> None:
        if sys.stderr.isatty():
            print("\r" + text.ljust(self.width), end="", file=sys.stderr, flush=True)
            self.width = len(text)
        elif time.monotonic() - self.spoke >= self.pause:
            self.spoke = time.monotonic()
            say(text)

    def stop(self) -> None:
        """Clear the line."""
        if self.width:
            print("\r" + " " * self.width + "\r", end="", file=sys.stderr, flush=True)


def complain(message: str) -> None:
    """An error that a user can mend: one line on stderr."""
    print(f"unmask: {' '.join(message.split())}", file=sys.stderr)


def result(text: str) -> None:
    """A plain line of result, never wrapped or coloured."""
    print(text)


def as_json(value: Any) -> None:
    """The result as JSON on stdout."""
    print(json.dumps(value, indent=2, default=_plain, ensure_ascii=False))


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "plain"):
        return value.plain()
    if hasattr(value, "tolist"):
        return value.tolist()
    return str(value)


def width() -> int:
    """The columns of the terminal that results go to; a pipe has as many as it likes."""
    return Console().width if sys.stdout.isatty() or "COLUMNS" in os.environ else 200


def table(columns: Sequence[str], rows: Iterable[Sequence[Any]], title: str | None = None) -> None:
    """A table on stdout; the last column takes what width is left."""
    shown = Table(box=None, title=title, title_justify="left", header_style="bold", pad_edge=False, expand=False)
    for number, name in enumerate(columns):
        shown.add_column(name, overflow="fold", no_wrap=number == 0)
    for row in rows:
        shown.add_row(*(escape(_cell(value)) for value in row))
    Console(highlight=False, width=width()).print(shown)  # a pipe has no width: there nothing is folded


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value))
    return str(value)


def crash(error: BaseException) -> None:
    """An error nobody foresaw: where it happened in three lines; ``UNMASK_DEBUG=1`` shows everything."""
    if os.environ.get("UNMASK_DEBUG"):
        traceback.print_exception(error)
        return
    for frame in traceback.extract_tb(error.__traceback__)[-3:]:
        print(f"  {Path(frame.filename).name}:{frame.lineno} in {frame.name}: {frame.line}", file=sys.stderr)
    print(f"unmask: {type(error).__name__}: {error}", file=sys.stderr)
    print("unmask: this is not your mistake; UNMASK_DEBUG=1 shows the whole traceback", file=sys.stderr)
