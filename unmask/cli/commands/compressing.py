"""``unmask compress``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def register(app: typer.Typer) -> None:
    app.command("compress")(compress_command)


def compress_command(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="The model to make smaller.")],
    method: Annotated[str | None, typer.Option(help="A system of `unmask list --verb compress`.")] = None,
    data: Annotated[str | None, typer.Option(help="Images to measure on.")] = None,
    budget: Annotated[str | None, typer.Option(help="What it may cost: macs=0.6, parameters=0.5 ...")] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Folder for the smaller model.")] = None,
) -> None:
    """Make a model smaller by masking it. No installed system serves this verb yet: `unmask list --verb compress`."""
    import unmask

    unmask.compress(model, method=method, data=data, budget=budget, out=out)
