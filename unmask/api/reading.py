"""``report``, ``runs`` and ``replay``: what is read from run folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from unmask.errors import UserError


def report(*folders: str | Path, out: str | Path | None = None) -> Path:
    """The report of one run, or of several side by side, as one HTML file; returns its path. Imports no torch.

    out: default ``report.html`` in the run, or ``comparison.html`` beside the first of several runs.
    """
    if not folders:
        raise UserError("which run? unmask report RUN")
    paths = [Path(folder) for folder in folders]
    target = None if out is None else Path(out)
    if len(paths) == 1:
        from unmask.reports.report import report as write

        return write(paths[0], target)
    from unmask.reports.comparison import compare as side_by_side

    return side_by_side(paths, target or paths[0].parent / "comparison.html")


def runs(folder: str | Path = "runs") -> list[dict[str, Any]]:
    """The runs under a folder with their key numbers, one mapping a run. Imports no torch."""
    from unmask.reports.comparison import runs_table

    return runs_table(Path(folder))


def replay(folder: str | Path) -> dict[str, Any]:
    """Repeat the step at which a run's loss was not finite; what was found. Raises ``UserError`` if no step was kept."""
    from unmask.engine import replay as again

    return again(Path(folder))
