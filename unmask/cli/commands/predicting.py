"""``unmask predict``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from unmask.cli import speech


def register(app: typer.Typer) -> None:
    app.command("predict")(predict_command)


def predict_command(
    model: Annotated[
        str, typer.Argument(metavar="RUN|MODEL|SYSTEM", help="A run, an export, or a system's name with weights=FILE.")
    ],
    files: Annotated[
        list[str],
        typer.Argument(metavar="FILES... [key=value ...]", help="Images, or folders of images; then options."),
    ],
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="Folder for the results, one after another. The same command goes on."),
    ] = None,
    overlay: Annotated[bool, typer.Option(help="With -o: also pictures to look at (NAME.overlay.png).")] = True,
    resume: Annotated[
        bool, typer.Option("--resume", help="Only go on with a folder that is there: refuse a new one.")
    ] = False,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda ...")] = "auto",
    json: Annotated[bool, typer.Option("--json", help="The results as JSON.")] = False,
) -> None:
    """What a model says about files. Options of the system are words: task=panoptic, tile=256.

    Example: [bold]unmask predict runs/classifier-001 shoe.png bag.png -o answers[/bold]
    """
    from unmask.api.predicting import predict_each, words
    from unmask.errors import UserError

    options, inputs = sorted_words(files)
    if resume and (out is None or not (out / "results.jsonl").is_file()):
        raise UserError(f"--resume goes on with a folder of results, {out or 'and none is named'}: give its -o")
    ticker = speech.Ticker()
    rows: list[tuple[str, Any]] = []
    try:
        for item, result in predict_each(
            model, inputs, out=out, device=device, overlay=overlay, tell=ticker, talk=speech.say, options=options
        ):
            rows.append((str(item), result.plain() | {"file": str(item)} if json else words(result)))
    except KeyboardInterrupt:
        ticker.stop()
        if out is not None and (out / "results.jsonl").is_file():
            speech.say(f"what is done lies in {out}; the same command goes on")
        raise
    finally:
        ticker.stop()
    if json:
        speech.as_json([values for _, values in rows])
    else:
        speech.table(("file", "result"), rows)
    if out is not None:
        speech.say(f"written to {out}")


def sorted_words(given: list[str]) -> tuple[dict[str, Any], list[Path]]:
    """``key=value`` words (no such file) and files. Raises ``UserError`` without a file."""
    from unmask.config import parse_word
    from unmask.errors import UserError

    options: dict[str, Any] = {}
    files: list[Path] = []
    for word in given:
        if "=" in word and not Path(word).exists() and "/" not in word.partition("=")[0]:
            key, value = parse_word(word)
            options[key] = value
        else:
            files.append(Path(word))
    if not files:
        raise UserError("nothing to predict on: give files before the options")
    return options, files
