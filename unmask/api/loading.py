"""``load``: finds out what a word means (a run, an export, a timm name, a hub id) and loads it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from unmask.contracts import Encoder, Trainable
from unmask.errors import UserError
from unmask.official import hub
from unmask.official.reach import quick_hub


def load(model: Any, *, whole: bool = False, **options: Any) -> Encoder | Trainable:
    """The encoder behind ``model``, in evaluation mode: a run, an export, ``timm/NAME``, a backbone's name
    (``vit_small_patch16``, at random initialisation), or a hub id. Encoders and systems pass through.

    whole: the whole system (with its decoder or head) instead of its encoder; a system without an encoder is returned
    whole. options: of the backbone, for names; a name of timm brings its published weights unless ``pretrained=False``
    or ``weights=FILE`` says otherwise. Raises ``UserError`` in one line.
    """
    if isinstance(model, Trainable):
        return model if whole or model.encoder is None else model.encoder
    if isinstance(model, Encoder):
        if whole:
            raise UserError("this is an encoder, and a whole system is needed: give a run")
        return model
    if not isinstance(model, (str, Path)):
        raise UserError(f"cannot load a {type(model).__name__}: give a run, an export, timm/NAME or a hub id")
    name = str(model)
    if Path(name).exists():
        if options:
            raise UserError(f"{name} brings its own options: leave {next(iter(options))}= out")
        return _folder(Path(name), whole)
    if _is_backbone(name):
        if whole:
            raise UserError(f"{name} is a backbone, and a whole system is needed: give a run")
        return _backbone(name, options)
    if name.count("/") == 1 and not name.startswith((".", "/")):
        with quick_hub():
            return hub.load_trainable(name) if whole else hub.load_encoder(name)
    raise UserError(
        f"no model {name}: give a run (unmask runs DIR lists them), an export, timm/NAME or a hub id (user/name)"
    )


def named(model: str | Path) -> bool:
    """Whether a word may be a model without looking further: something on the disk, or the name of a backbone."""
    return Path(model).exists() or _is_backbone(str(model))


def is_run(path: str | Path) -> bool:
    """Whether a path is a run folder."""
    from unmask.engine.run import is_run as engine_is_run

    return engine_is_run(Path(path))


def model_folder(run: Path) -> Path:
    """The folder of the run (or of its last finished stage) that holds ``model/`` and ``encoder/``."""
    if (run / "model").is_dir() or (run / "encoder").is_dir():
        return run
    from unmask.engine.run import read_run

    for stage in reversed(read_run(run).get("stages") or []):
        folder = run / "stages" / stage
        if (folder / "model").is_dir() or (folder / "encoder").is_dir():
            return folder
    raise UserError(f"{run} holds no finished model: go on with unmask train --out {run} --resume")


def _folder(path: Path, whole: bool) -> Encoder | Trainable:
    if path.is_file():
        raise UserError(f"{path} is a file: an official checkpoint comes in with unmask import SYSTEM {path} -o DIR")
    if is_run(path):
        path = model_folder(path)
    if (path / "unmask.json").is_file():  # somebody's whole model, as `unmask compress` wrote it
        from unmask.models import open_model

        return open_model(path).module  # type: ignore[return-value]
    foreign = _foreign(path)
    if foreign.get("format") == "onnx":
        raise UserError(
            f"{path} is an ONNX export, which onnxruntime runs: give the run, or export it --to safetensors or timm"
        )
    if "architecture" in foreign and "pretrained_cfg" in foreign:
        if whole:
            raise UserError(f"{path} is an encoder in timm's layout, and a whole system is needed: give a run")
        return _of_timm(path, foreign)
    if not whole and not (path / "encoder").is_dir() and _kind(path) == "trainable":
        loaded = hub.load_trainable(path)
        return loaded.encoder if loaded.encoder is not None else loaded
    return hub.load_trainable(path) if whole else hub.load_encoder(path)


def _foreign(folder: Path) -> dict[str, Any]:
    """``config.json`` of a folder that ``load_encoder`` would not take; empty where there is none."""
    try:
        described = json.loads((folder / hub.CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return described if isinstance(described, dict) and "kind" not in described else {}


def _of_timm(folder: Path, described: Mapping[str, Any]) -> Encoder:
    """The encoder in a folder in timm's own layout (``unmask export --to timm``)."""
    from unmask.backbones import build
    from unmask.contracts import Preprocessing

    known = described["pretrained_cfg"] or {}
    channels, *size = known.get("input_size") or (3, 224, 224)
    arguments = dict(described.get("model_args") or {})
    for name in ("img_size", "in_chans", "num_classes"):
        arguments.pop(name, None)
    encoder = build(
        f"timm/{described['architecture']}",
        image_size=tuple(size),
        in_channels=channels,
        weights=str(folder / hub.WEIGHTS),
        arguments=arguments,
    )
    encoder.options = {k: v for k, v in encoder.options.items() if k != "weights"}
    if known.get("mean") and known.get("std"):
        how = str(known.get("interpolation") or "bicubic")
        encoder.preprocessing = Preprocessing(
            tuple(known["mean"]), tuple(known["std"]), tuple(size), channels, interpolation=how
        )
    return encoder.eval()


def _kind(path: Path) -> str:
    for folder in (path, path / "model"):
        if (folder / hub.CONFIG).is_file():
            return str(hub.read_config(folder).get("kind"))
    return ""


def _is_backbone(name: str) -> bool:
    from unmask.catalog import cards

    for card in cards().values():
        for known in card.backbones:
            if name == known or (known.endswith("*") and name.startswith(known[:-1])):
                return True
    if name.startswith(("timm/", "torchvision/")):
        raise UserError(f"no backbone {name}: this installation reads {', '.join(_prefixes()) or 'no foreign models'}")
    return False


def _prefixes() -> list[str]:
    from unmask.catalog import cards

    return [known.replace("*", "NAME") for card in cards().values() for known in card.backbones if "/" in known]


def _backbone(name: str, options: dict[str, Any]) -> Encoder:
    from unmask.backbones import build

    if name.startswith(("timm/", "torchvision/")):
        given = "pretrained" in options
        options = {"pretrained": not options.get("weights"), **options}
        if options["pretrained"]:
            try:
                with quick_hub():
                    return build(name, **options).eval()
            except UserError as error:
                if given or not str(error).startswith("no weights"):
                    raise
                raise UserError(f"{error}, or pretrained=false for random initialisation") from None
    return build(name, **options).eval()
