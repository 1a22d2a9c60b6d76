"""``unmask eval``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from unmask.cli import speech


def register(app: typer.Typer) -> None:
    app.command("eval")(eval_command)


def eval_command(
    model: Annotated[
        str, typer.Argument(metavar="RUN|MODEL", help="A run, an export (safetensors or timm), timm/NAME or a hub id.")
    ],
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[KEY=VALUE]...",
            help="Options of the probe: probe.k=10, probe.limit=1000; of a backbone by name: pretrained=false.",
        ),
    ] = None,
    data: Annotated[str | None, typer.Option(help="Labelled images. Default for a run: its own data.")] = None,
    probe: Annotated[
        str | None,
        typer.Option(
            help="linear, ridge, knn, attentive, finetune; rankme needs no labels; own: the system's own metrics (mean IoU, PSNR "
            "...). Default: own where it has some, else ridge."
        ),
    ] = None,
    labels: Annotated[float, typer.Option(help="Share of the training labels used: 0.1, 0.01.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Everything random follows from it.")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda ...")] = "auto",
    baseline: Annotated[bool, typer.Option(help="Measure the same network at random initialisation beside it.")] = True,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Where to write. Default: the run's evaluation/ folder.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="The numbers as JSON.")] = False,
) -> None:
    """Measure what an encoder knows (its frozen features, or fine-tuning), or how well a system does its own task.

    Example: [bold]unmask eval runs/mae-001 --data sample:fashion --probe linear --labels 0.1[/bold]
    """
    import unmask
    from unmask.config import words as as_options
    from unmask.data.source import skipped_words
    from unmask.errors import UserError

    options = as_options(words or [])
    of_probe = options.pop("probe", {})
    if not isinstance(of_probe, dict):
        raise UserError(f"probe={of_probe} is no option of a probe: write --probe {of_probe}, or probe.k=10")
    for name in ("data", "labels", "seed", "device", "baseline", "out"):
        if name in of_probe:
            raise UserError(f"probe.{name} is an option of the command: write --{name}")

    ticker = speech.Ticker()
    try:
        scores = unmask.evaluate(
            model,
            data,
            probe,
            labels=labels,
            seed=seed,
            device=device,
            baseline=baseline,
            out=out,
            talk=ticker,
            model_options=options,
            **of_probe,
        )
    finally:
        ticker.stop()
    if json:
        speech.as_json(scores)
        return
    from unmask.api.closing import own_rows, score_rows

    if scores["probe"] == "own":
        speech.table((f"on {scores['data']} ({scores['split']})", *own_rows(scores)[0]), own_rows(scores)[1])
        return
    if scores.get("skipped"):
        speech.say(skipped_words(scores["skipped"]))

    names, rows = score_rows(scores)
    share = "" if labels == 1.0 else f", {100 * labels:g} % of the labels"
    speech.table((f"{scores['probe']} on {scores['data']}{share}", *names), rows)
