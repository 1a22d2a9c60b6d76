"""``unmask explain``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def register(app: typer.Typer) -> None:
    app.command("explain")(explain_command)


def explain_command(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="The model to explain.")],
    files: Annotated[list[Path], typer.Argument(metavar="FILES...", help="Images.")],
    method: Annotated[str | None, typer.Option(help="Systems of `unmask list --verb explain`, with commas.")] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Folder for the pictures.")] = None,
) -> None:
    """Show which parts of an input decide. No installed system serves this verb yet: `unmask list --verb explain`."""
    import unmask

    unmask.explain(model, files, method=method, out=out)
