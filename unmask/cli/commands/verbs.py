"""``unmask generate``, ``compress`` and ``explain``: verbs of systems that may not be installed yet."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def register(app: typer.Typer) -> None:
    app.command("generate")(generate_command)
    app.command("compress")(compress_command)
    app.command("explain")(explain_command)


def generate_command(
    model: Annotated[
        str, typer.Argument(metavar="RUN", help="A run of a system that generates (unmask list --verb generate).")
    ],
    n: Annotated[int, typer.Option("-n", help="How many.")] = 16,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Folder for what is made.")] = None,
) -> None:
    """Make new images by un-hiding. No installed system serves this verb yet: `unmask list --verb generate`."""
    import unmask

    unmask.generate(model, n, out=out)


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


def explain_command(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="The model to explain.")],
    files: Annotated[list[Path], typer.Argument(metavar="FILES...", help="Images.")],
    method: Annotated[str | None, typer.Option(help="Systems of `unmask list --verb explain`, with commas.")] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Folder for the pictures.")] = None,
) -> None:
    """Show which parts of an input decide. No installed system serves this verb yet: `unmask list --verb explain`."""
    import unmask

    unmask.explain(model, files, method=method, out=out)
