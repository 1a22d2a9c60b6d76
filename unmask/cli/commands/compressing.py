"""``unmask compress``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from unmask.cli import speech


def register(app: typer.Typer) -> None:
    app.command("compress")(compress_command)


def compress_command(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="A run or an export of a classifier, timm/NAME, torchvision/NAME, a folder of transformers.",
        ),
    ],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Options of the method, e.g. calibration=256.")
    ] = None,
    method: Annotated[str, typer.Option(help="A system of `unmask list --verb compress`.")] = "optin",
    data: Annotated[str | None, typer.Option(help="Images (or text) to calibrate and measure on.")] = None,
    budget: Annotated[
        str, typer.Option(help="What it may cost: macs=0.6, parameters=5M, bytes=4M, ms=12 (measured here).")
    ] = "macs=0.6",
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Folder for the smaller model, the table and a picture.")
    ] = None,
    weights: Annotated[Path | None, typer.Option(help="A checkpoint, for timm's and torchvision's names.")] = None,
    pretrained: Annotated[
        bool | None, typer.Option(help="Published weights for such names; the default where no file is given.")
    ] = None,
    baselines: Annotated[bool, typer.Option(help="Measure magnitude, random, torch prune and int8 beside it.")] = True,
    limit: Annotated[int | None, typer.Option(help="Test samples at most. Default 2000.")] = None,
    seed: Annotated[int, typer.Option()] = 0,
    onnx: Annotated[bool, typer.Option("--onnx", help="Also an ONNX file, checked with onnxruntime.")] = False,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda ...")] = "auto",
    json: Annotated[bool, typer.Option("--json", help="The report as JSON.")] = False,
) -> None:
    """Make a model smaller and faster, and measure what that costs.

    Example: [bold]unmask compress runs/classifier-001 --data photos/ --budget macs=0.6 -o smaller/[/bold]
    """
    import unmask

    options: dict[str, Any] = {} if weights is None else {"weights": weights}
    if pretrained is not None:
        options["pretrained"] = pretrained
    ticker = speech.Ticker()
    try:
        report = unmask.compress(
            model,
            method=method,
            data=data,
            budget=budget,
            out=out,
            baselines=baselines,
            limit=limit,
            seed=seed,
            onnx=onnx,
            device=device,
            model_options=options,
            overrides=overrides or (),
            talk=speech.say,
            tell=ticker,
        )
    finally:
        ticker.stop()
    if json:
        speech.as_json({k: v for k, v in report.items() if k != "model"})
        return
    columns, rows = table(report)
    if rows:
        speech.table(columns, rows)


def table(report: dict[str, Any]) -> tuple[tuple[str, ...], list[tuple[Any, ...]]]:
    """The report's rows as a person reads them; shares are of the original."""
    rows = report.get("rows") or []
    if not rows and report.get("scores"):  # a compressor that learned: its own metrics beside those of one-shot methods
        from unmask.api.closing import own_rows

        names, of_methods = own_rows(report["scores"])
        return ("model", *names), [tuple(row) for row in of_methods]
    if not rows:
        return (), []
    first = rows[0]
    key = next((k for k in ("accuracy", "perplexity") if k in first), "")
    columns = (
        "model",
        *((key + (", %" if key == "accuracy" else ""),) if key else ()),
        "MACs",
        "parameters",
        "bytes",
        "ms",
        "faster",
    )
    out = []
    for row in rows:
        ms = row["milliseconds"]
        out.append(
            (
                row["name"],
                *((f"{row[key]:.2f}" if key in row else "–",) if key else ()),
                share(row["macs"], first["macs"]),
                share(row["parameters"], first["parameters"]),
                share(row["bytes"], first["bytes"]),
                f"{ms['median']:.2f} ({ms['low']:.2f} ... {ms['high']:.2f})",
                f"{first['milliseconds']['median'] / max(ms['median'], 1e-9):.2f}x",
            )
        )
    return columns, out


def share(value: float, whole: float) -> str:
    """``1.2 M (60 %)``."""
    for size, letter in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if value >= size:
            return f"{value / size:.3g}{letter} ({100 * value / max(whole, 1):.0f} %)"
    return f"{value:.0f}"
