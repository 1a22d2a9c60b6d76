"""``unmask doctor``."""

from __future__ import annotations

from typing import Annotated

import typer

from unmask.cli import speech


def register(app: typer.Typer) -> None:
    app.command("doctor")(doctor_command)


def doctor_command(json: Annotated[bool, typer.Option("--json", help="The findings as JSON.")] = False) -> None:
    """What this machine offers: versions, device, speed in bf16, extras, data, cache, write access.

    Example: [bold]unmask doctor[/bold]
    """
    import unmask

    findings = unmask.doctor()
    if json:
        speech.as_json(findings)
        return
    speech.table(("what", "found", ""), [(f["what"], f["found"], f["hint"]) for f in findings])
