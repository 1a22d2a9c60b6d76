"""Errors that a user can mend, and the words that help to mend them."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """Something a user can mend: what was wrong with its value, what is taken, what to do, in one line.

    The command line prints it after ``unmask: `` and exits with code 2.
    """

    def __init__(self, message: str):
        super().__init__(" ".join(str(message).split()))


class MissingExtra(UserError):
    """A feature whose optional packages are not installed."""

    def __init__(self, feature: str, package: str, extra: str):
        super().__init__(f"{feature} needs the package {package}: pip install 'unmask[{extra}]'")


def nearest(name: str, known: Iterable[str]) -> str:
    """The hint that ends an error about an unknown name: the closest known ones, or all when they are few."""
    names = sorted({str(k) for k in known})
    close = difflib.get_close_matches(name, names, n=2, cutoff=0.6)
    if close:
        return "did you mean " + " or ".join(close) + "?"
    if not names:
        return "nothing is known by any name here"
    shown = ", ".join(names[:12]) + (f", ... ({len(names)} in all)" if len(names) > 12 else "")
    return f"it takes one of {shown}"
