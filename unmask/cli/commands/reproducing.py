"""``unmask reproduce``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from unmask.cli import speech


def register(app: typer.Typer) -> None:
    app.command("reproduce")(reproduce_command)


def reproduce_command(
    systems: Annotated[list[str], typer.Argument(metavar="SYSTEM...", help="Systems with a claim.yaml.")],
    tier: Annotated[str, typer.Option(help="tiny (two cores, minutes) or small (one GPU).")] = "tiny",
    seeds: Annotated[int | None, typer.Option(help="Instead of the claim's own number; 3 or more.")] = None,
    jobs: Annotated[int | None, typer.Option(help="Trainings at once. Default: one a core without a GPU.")] = None,
    work: Annotated[Path, typer.Option(help="Where the runs lie; what is done there is not done again.")] = Path(
        "runs/claims"
    ),
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda, cuda:1, mps ...")] = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for SLUG.json and its figure.")] = Path("results"),
    json: Annotated[bool, typer.Option("--json", help="The verdicts as JSON.")] = False,
) -> None:
    """Test a paper's claim at small scale: the method and its baseline, equal budgets, several seeds, a paired test.

    Example: [bold]unmask reproduce mae simmim --tier tiny[/bold]
    """
    import unmask

    verdicts = [
        unmask.reproduce(system, tier=tier, seeds=seeds, out=out, work=work, jobs=jobs, device=device)
        for system in systems
    ]
    if json:
        speech.as_json(verdicts)
        return
    speech.table(("system", "verdict", "claim"), [(v["slug"], v["verdict"], v["claim"]) for v in verdicts])
