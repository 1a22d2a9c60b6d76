"""``unmask train``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from unmask.cli import speech


def register(app: typer.Typer) -> None:
    app.command("train")(train_command)


def train_command(
    system: Annotated[
        str, typer.Argument(metavar="SYSTEM|RECIPE.yaml|RUN", help="A system, a recipe file, or (with --resume) a run.")
    ],
    words: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="Any option of the system, train.KEY or data.KEY."),
    ] = None,
    data: Annotated[
        str | None, typer.Option(help="A folder, parquet, WebDataset shards, hub id, name, or sample:fashion.")
    ] = None,
    backbone: Annotated[str | None, typer.Option(help="vit_small_patch16, swin_tiny, timm/resnet18 ...")] = None,
    recipe: Annotated[
        str | None, typer.Option(help="auto, tiny, small or paper. Default: auto with --data, else tiny.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Folder of the run. Default: runs/SYSTEM-NNN.")
    ] = None,
    image_size: Annotated[str | None, typer.Option(help="Pixels: 96, or height x width: 96x128.")] = None,
    steps: Annotated[int | None, typer.Option(help="Optimiser steps.")] = None,
    epochs: Annotated[float | None, typer.Option(help="Passes over the data.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Images in a step, over all processes.")] = None,
    seed: Annotated[int | None, typer.Option(help="Everything random follows from it.")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda, cuda:1, mps ...")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in --out.")] = False,
    json: Annotated[bool, typer.Option("--json", help="The result as JSON.")] = False,
) -> None:
    """Train a system on images, probe what it learnt, and write a report.

    Example: [bold]unmask train mae --data photos/ --out runs/photos mask_ratio=0.6 train.lr=1e-3[/bold]
    """
    import unmask

    run = unmask.train(
        system,
        data=data,
        backbone=backbone,
        recipe=recipe,
        out=out,
        image_size=image_size,
        steps=steps,
        epochs=epochs,
        batch_size=batch_size,
        seed=seed,
        device=device,
        resume=resume,
        overrides=words or [],
        talk=speech.say,
    )
    from unmask.api.closing import facts, screen

    if json:
        speech.as_json(facts(run))
    else:
        speech.result(screen(run))
