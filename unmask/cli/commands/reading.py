"""``unmask report``, ``unmask runs`` and ``unmask replay``: what is read from run folders."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from unmask.cli import speech


def register(app: typer.Typer) -> None:
    app.command("report")(report_command)
    app.command("runs")(runs_command)
    app.command("replay")(replay_command)


def report_command(
    folders: Annotated[list[Path], typer.Argument(metavar="RUN...", help="One run, or several to put side by side.")],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="The HTML file. Default: report.html in the run.")
    ] = None,
) -> None:
    """Write the report of a run, or of several side by side: one HTML file that needs no network.

    Example: [bold]unmask report runs/mae-001 runs/simmim-001 -o both.html[/bold]
    """
    import unmask

    speech.result(str(unmask.report(*folders, out=out)))


def runs_command(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Where to look, also in sub-folders.")] = Path("runs"),
    wide: Annotated[bool, typer.Option("--wide", help="All columns, however narrow the terminal.")] = False,
    json: Annotated[bool, typer.Option("--json", help="The table as JSON.")] = False,
) -> None:
    """The runs under a folder with their key numbers.

    Example: [bold]unmask runs runs/ --json[/bold]
    """
    import unmask

    found = unmask.runs(folder)
    if json:
        speech.as_json(found)
        return
    if not found:
        speech.say(f"no run under {folder}")
        return
    if not wide and speech.width() < _WIDE:
        speech.table(("run", "system", "state", "steps", "loss", "probe", "date"), map(_short, found))
        return
    columns = [key for key in found[0] if key != "date" and any(row.get(key) not in (None, "") for row in found)]
    speech.table(columns, [[row.get(key) for key in columns] for row in found])


_WIDE = 130  # columns of a terminal that take the whole table


def _short(row: dict[str, Any]) -> tuple[Any, ...]:
    """A run in 80 columns: the probe as its score and its margin over random initialisation."""
    score = row.get("score")
    share = str(row.get("probe") or "").endswith("accuracy") and score is not None and score <= 1
    probe = "" if score is None else f"{100 * score:.1f} %" if share else f"{score:.4g}"
    if score is not None and row.get("margin") is not None:
        probe += f" ({100 * row['margin']:+.1f})" if share else f" ({row['margin']:+.3g})"
    loss = row.get("loss")
    shown = None if loss is None else f"{loss:.3g}"
    names = (row.get(key) for key in ("run", "system", "state", "steps"))
    return (*names, shown, probe, str(row.get("date") or "")[:10])


def replay_command(
    folder: Annotated[Path, typer.Argument(metavar="RUN", help="A run that stopped at a loss that was not finite.")],
    json: Annotated[bool, typer.Option("--json", help="The findings as JSON.")] = False,
) -> None:
    """Repeat the step at which a run failed, and name the first tensor that is not finite.

    Example: [bold]unmask replay runs/mae-001[/bold]
    """
    import unmask

    findings = unmask.replay(folder)
    if json:
        speech.as_json(findings)
        return
    speech.table(("", ""), findings.items())
