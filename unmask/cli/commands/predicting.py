"""``unmask predict``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from unmask.cli import speech


def register(app: typer.Typer) -> None:
    app.command("predict")(predict_command)


def predict_command(
    model: Annotated[str, typer.Argument(metavar="RUN|MODEL", help="A run or an export of a system that predicts.")],
    files: Annotated[list[Path], typer.Argument(metavar="FILES...", help="Images, or folders of images.")],
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Folder for one result file an input.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda ...")] = "auto",
    json: Annotated[bool, typer.Option("--json", help="The results as JSON.")] = False,
) -> None:
    """What a trained model says about files.

    Example: [bold]unmask predict runs/classifier-001 shoe.png bag.png[/bold]
    """
    import unmask

    results = unmask.predict(model, files, out=out, device=device)
    if json:
        speech.as_json([r.plain() | {"file": str(f)} for f, r in results])
        return
    speech.table(("file", "result"), [(f, words(r)) for f, r in results])
    if out is not None:
        speech.say(f"written to {out}")


def words(result: Any) -> str:
    """A result in a few words: the likeliest classes, or whatever it says of itself in plain values."""
    if hasattr(result, "top"):
        return ", ".join(f"{name} {100 * share:.0f} %" for name, share in result.top(3))
    return ", ".join(f"{k} {v}" for k, v in result.plain().items() if k not in ("kind", "source"))
