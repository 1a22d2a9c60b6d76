"""``unmask compare``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from unmask.cli import speech


def register(app: typer.Typer) -> None:
    app.command("compare")(compare_command)


def compare_command(
    systems: Annotated[
        list[str], typer.Argument(metavar="SYSTEMS...", help="Two or more, for example mae simmim colormae.")
    ],
    data: Annotated[str, typer.Option(help="The data that all of them learn from.")] = "sample:fashion",
    budget: Annotated[str, typer.Option(help="For each of them: 5m, 90s, 1h or 500steps.")] = "5m",
    backbone: Annotated[
        str | None, typer.Option(help="The backbone of all of them. Default: the first system's.")
    ] = None,
    recipe: Annotated[
        str | None, typer.Option(help="auto, tiny, small or paper. Default: tiny on samples, else auto.")
    ] = None,
    probe: Annotated[
        str, typer.Option(help="linear, ridge, knn, attentive; rankme where there are no labels.")
    ] = "ridge",
    supervised: Annotated[
        bool, typer.Option(help="Train the same backbone on the labels, too, for the same budget.")
    ] = True,
    seed: Annotated[int, typer.Option(help="Everything random follows from it.")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda ...")] = "auto",
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Folder of the comparison. Default: runs/compare-NNN.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="The numbers as JSON.")] = False,
) -> None:
    """Train several methods under the same budget, probe each, and put them on one page.

    Example: [bold]unmask compare mae simmim colormae --data sample:fashion --budget 2m[/bold]
    """
    import unmask

    outcome = unmask.compare(
        systems,
        data=data,
        budget=budget,
        backbone=backbone,
        recipe=recipe,
        probe=probe,
        supervised=supervised,
        seed=seed,
        device=device,
        out=out,
        talk=speech.say,
    )
    if json:
        speech.as_json(outcome)
        return
    unit = " %" if outcome["metric"].endswith("top1") else ""
    rows = [(r["name"], _amount(r, unit), r["steps"], r["seconds"], r["run"]) for r in outcome["rows"]]
    speech.table(("method", outcome["metric"], "steps", "seconds", "run"), rows)
    speech.result(f"\nthe page to share: {outcome['report']}")


def _amount(row: dict[str, Any], unit: str) -> str:
    """A score with its unit, and the spread over seeds where it is known."""
    if row["score"] is None:
        return ""
    spread = f" ± {row['spread']:.3g}" if row.get("spread") else ""
    return f"{row['score']:.4g}{spread}{unit}"
