"""``unmask demo``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from unmask.cli import speech


def register(app: typer.Typer) -> None:
    app.command("demo")(demo_command)


def demo_command(
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Folder of the run. Default: runs/demo-NNN.")] = None,
    seconds: Annotated[float, typer.Option(help="How long to train.")] = 120,
    seed: Annotated[int, typer.Option(help="Everything random follows from it.")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda ...")] = "auto",
    json: Annotated[bool, typer.Option("--json", help="The result as JSON.")] = False,
) -> None:
    """Watch a network learn from hidden patches of real images, in under five minutes on two cores.

    Example: [bold]unmask demo[/bold]
    """
    import unmask

    outcome = unmask.demo(out=out, seconds=seconds, seed=seed, device=device, talk=speech.say)
    if json:
        speech.as_json(outcome)
    else:
        speech.result(outcome["screen"])
