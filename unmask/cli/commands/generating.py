"""``unmask generate``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from unmask.cli import speech


def register(app: typer.Typer) -> None:
    app.command("generate")(generate_command)


def generate_command(
    model: Annotated[
        str,
        typer.Argument(
            metavar="RUN|SYSTEM", help="A run or an export of a generator, or a system's name with weights=FILE."
        ),
    ],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Options of the system, e.g. solver=heun.")
    ] = None,
    n: Annotated[int, typer.Option("-n", help="How many.")] = 16,
    classes: Annotated[
        list[str] | None,
        typer.Option("--class", help="A class by name or number; again for several, in turn. Default: all in turn."),
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Sampling steps. Default: the system's.")] = None,
    guidance: Annotated[float | None, typer.Option(help="Weight of classifier-free guidance; 1: none.")] = None,
    seed: Annotated[int, typer.Option(help="Image i depends on the seed and i alone.")] = 0,
    size: Annotated[str | None, typer.Option(help="Height x width in pixels, e.g. 32x48.")] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Folder for PNGs, a grid and made_by.json.")] = None,
    batch: Annotated[int, typer.Option(help="Images made together.")] = 16,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda ...")] = "auto",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Write over what lies in the folder.")] = False,
    json: Annotated[bool, typer.Option("--json", help="What made the images, as JSON.")] = False,
) -> None:
    """New images of a trained generator. A call that was stopped goes on when it is repeated.

    Example: [bold]unmask generate runs/dit-001 -n 16 --class cat --steps 50 --guidance 2.5 -o samples/[/bold]
    """
    import unmask
    from unmask.errors import UserError

    folder = out or _free_folder(Path("samples"))
    if folder.is_file():
        raise UserError(f"{folder} is a file: give --out a folder")
    ticker = speech.Ticker()
    try:
        samples = unmask.generate(
            model,
            n,
            classes=classes,
            steps=steps,
            guidance=guidance,
            seed=seed,
            size=size,
            out=folder,
            batch=batch,
            device=device,
            overwrite=overwrite,
            overrides=overrides or [],
            talk=ticker,
            warn=speech.say,
        )
    except KeyboardInterrupt:
        ticker.stop()
        if (folder / "made_by.json").is_file():
            again = "the same command goes on" if out is not None else f"the same command with -o {folder} goes on"
            speech.say(f"what is done lies in {folder}; {again}")
        raise
    finally:
        ticker.stop()
    if json:
        speech.as_json([sample.made_by for sample in samples])
        return
    speech.result(str(folder))
    speech.say(f"{len(samples)} images, grid.png and made_by.json written to {folder}")


def _free_folder(base: Path) -> Path:
    """``samples``, or the first ``samples-2`` ... that is not there."""
    number, folder = 1, base
    while folder.exists():
        number += 1
        folder = base.with_name(f"{base.name}-{number}")
    return folder
