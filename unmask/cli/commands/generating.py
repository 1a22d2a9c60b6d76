"""``unmask generate``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def register(app: typer.Typer) -> None:
    app.command("generate")(generate_command)


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
