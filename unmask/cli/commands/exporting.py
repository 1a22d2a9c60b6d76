"""``unmask export`` and ``unmask import``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from unmask.cli import speech


def register(app: typer.Typer) -> None:
    app.command("export")(export_command)
    app.command("import")(import_command)


def export_command(
    run: Annotated[str, typer.Argument(metavar="RUN|MODEL", help="A run, an export, or timm/NAME.")],
    words: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="Options of a backbone by name: pretrained=false."),
    ] = None,
    to: Annotated[str, typer.Option("--to", help="safetensors, timm, onnx or hub.")] = "safetensors",
    out: Annotated[
        str | None, typer.Option("--out", "-o", help="A folder; for --to hub the repository: user/name.")
    ] = None,
    whole: Annotated[
        bool, typer.Option("--whole", help="With its head: a classifier's answers, to onnx only.")
    ] = False,
) -> None:
    """Take the encoder away in a format that others read.

    Example: [bold]unmask export runs/mae-001 --to onnx -o exported/[/bold]
    """
    import unmask
    from unmask.config import words as as_options

    place = unmask.export(run, to=to, out=out, whole=whole, model_options=as_options(words or []))
    speech.result(place)
    how = _how(to, place)
    speech.say(f"load it with: {how.replace('encoder.onnx', 'model.onnx') if whole else how}")


def _how(to: str, place: str) -> str:
    """The line of Python that loads what was written."""
    match to:
        case "timm":
            return f"timm.create_model({'local-dir:' + place!r}, pretrained=True), or unmask.load({place!r})"
        case "onnx":
            return f"onnxruntime.InferenceSession({place + '/encoder.onnx'!r}).run(None, {{'image': images}})"
        case "hub":
            return f"unmask.load({place.removeprefix('https://huggingface.co/')!r})"
        case _:
            return f"unmask.load({place!r})"


def import_command(
    system: Annotated[str, typer.Argument(metavar="SYSTEM", help="Whose checkpoint it is: mae, simmim, swin ...")],
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The authors' .pth, .pt, .bin or .safetensors.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the model in our format.")],
    words: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="Options of the system, where the file does not tell."),
    ] = None,
) -> None:
    """Turn an official checkpoint into a folder that every command here takes. The file is read as data, never run.

    Example: [bold]unmask import mae mae_pretrain_vit_base.pth -o models/mae-base[/bold]
    """
    import unmask

    speech.result(str(unmask.import_checkpoint(system, file, out, overrides=words or [], talk=speech.say)))
