"""``unmask explain``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from unmask.cli import speech


def register(app: typer.Typer) -> None:
    app.command("explain")(explain_command)


def explain_command(
    model: Annotated[
        str,
        typer.Argument(metavar="MODEL", help="A run or export of a classifier, torchvision/NAME, timm/NAME, a folder."),
    ],
    files: Annotated[
        list[str],
        typer.Argument(metavar="FILES... [key=value ...]", help="Images; then options (samples=1000, target=cat)."),
    ],
    method: Annotated[
        str | None,
        typer.Option(
            help="With commas: layer_masking, token_dropping, grey, black, blur ... (LIME with that masking), lime, "
            "integrated_gradients, gradcam, occlusion ... Default: what suits the model, and grey."
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Folder: index.html, pictures, explanations.json.")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda ...")] = "auto",
    json: Annotated[bool, typer.Option("--json", help="The numbers as JSON.")] = False,
) -> None:
    """Show which parts of an image decide: heat maps by several methods, and how faithful each is.

    Example: [bold]unmask explain torchvision/resnet50 photo.png --method layer_masking,lime,integrated_gradients -o why/[/bold]
    """
    import unmask
    from unmask.cli.commands.predicting import sorted_words

    options, inputs = sorted_words(files)
    ticker = speech.Ticker()
    try:
        found = unmask.explain(
            model, inputs, method=method, out=out, device=device, tell=ticker, talk=speech.say, **options
        )
    finally:
        ticker.stop()
    if json:
        speech.as_json([one.plain() for one in found])
    else:
        rows = [
            (one.source, one.name, row.method, f"{row.deletion:.3f}", f"{row.insertion:.3f}", f"{row.seconds:.1f} s")
            for one in found
            for row in one.rows
        ]
        speech.table(("file", "class", "method", "deletion", "insertion", "time"), rows)
    if out is not None:
        speech.say(f"written to {out}: open {out / 'index.html'}")
