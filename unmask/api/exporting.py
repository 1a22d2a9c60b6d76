"""``export`` and ``import_checkpoint``: encoders out, authors' checkpoints in."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from unmask.errors import UserError, nearest

Talk = Callable[[str], None]


def import_checkpoint(
    system: str,
    file: str | Path,
    out: str | Path,
    *,
    overrides: Iterable[str] | Mapping[str, Any] = (),
    talk: Talk | None = None,
) -> Path:
    """The authors' checkpoint of a system as a folder that every command takes; returns the folder.

    The file is read as data (safetensors, or torch's format without code), its names are changed by the system's rules, and
    nothing may be missing or left over; of a file without the whole system only the encoder is taken. overrides: what the
    tensors do not tell (``num_heads=12``). Raises ``UserError`` for options that the system's rules do not know, and when the
    file is damaged, holds code, or belongs to another system; then nothing is written.
    """
    from unmask.catalog import card
    from unmask.config import override, parse_word
    from unmask.contracts import Preprocessing, Trainable
    from unmask.engine.run import refuse_occupied
    from unmask.official import hub
    from unmask.official.load import read_checkpoint

    found = card(system)
    rules = found.module("official")
    if rules is None or not hasattr(rules, "load_official"):
        raise UserError(f"{system} has no rules for official checkpoints: {nearest(system, _with_rules())}")
    out = Path(out)
    refuse_occupied(out)
    options: dict[str, Any] = {}
    for key, value in overrides.items() if isinstance(overrides, Mapping) else map(parse_word, overrides):
        options = override(options, key, value)
    known = getattr(rules, "OPTIONS", options)
    for name in options:
        if name not in known:
            raise UserError(f'no option "{name}" in the checkpoints of {system}: {nearest(name, known)}')
    model = rules.load_official(read_checkpoint(Path(file), prefer=getattr(rules, "PREFER", ())), options)
    encoder = model.encoder if isinstance(model, Trainable) else model
    if encoder is not None and encoder.preprocessing is None and encoder.in_channels == 3:
        encoder.preprocessing = Preprocessing(image_size=tuple(encoder.image_size))  # ImageNet's statistics
    if isinstance(model, Trainable):
        hub.save_trainable(model, out)
    else:
        hub.save_encoder(model, out, system=system)
    if talk is not None:
        whole = isinstance(model, Trainable)
        kind = "the whole system" if whole else "the encoder"
        rest = "none of them missing in the file" + ("" if whole else "; a head or a decoder in it is left out")
        talk(f"{kind}, {sum(p.numel() for p in model.parameters()):,} parameters, {rest}")
    return out


def _with_rules() -> list[str]:
    from unmask.catalog import cards

    return [slug for slug, card in cards().items() if card.beside("official.py")]


def export(
    model: Any,
    *,
    to: str = "safetensors",
    out: str | Path | None = None,
    whole: bool = False,
    model_options: Mapping[str, Any] | None = None,
) -> str:
    """An encoder in a format that others read: ``safetensors`` (config.json beside it), ``timm``, ``onnx``, or ``hub`` (uploads
    to the repository ``out``). whole: a classifier or language model with its head instead, to ONNX (``model.onnx`` gives
    ``logits``). Returns the folder, or the address. Raises ``UserError`` in one line.
    """
    from unmask.api.loading import load
    from unmask.contracts import Encoder
    from unmask.engine.run import refuse_occupied
    from unmask.official.export import FORMATS, export_encoder

    if to not in FORMATS:
        raise UserError(f'no format "{to}": {nearest(to, FORMATS)}')
    if out is None:
        place = "user/name" if to == "hub" else "DIR"
        raise UserError(f"where to? unmask export {model} --to {to} -o {place}")
    if whole:
        from unmask.models import open_model

        if to != "onnx":
            raise UserError(f"--whole goes to onnx, not to {to}: the whole system of a run lies in its model/ folder")
        refuse_occupied(Path(out))
        return str(open_model(model, **(model_options or {})).export_onnx(out))
    encoder = load(model, **(model_options or {}))
    if not isinstance(encoder, Encoder):
        raise UserError(f"{encoder.slug or type(encoder).__name__} has no encoder to export: share its model/ folder")
    if to != "hub":
        if (Path(out) / "config.json").is_file():
            raise UserError(f"{out} holds a model already: give another folder with -o")
        refuse_occupied(Path(out))
    return export_encoder(encoder, to, out, system=_trained_by(model))


def _trained_by(model: Any) -> str:
    from unmask.api.loading import is_run
    from unmask.engine.run import read_run

    return str(read_run(Path(model)).get("system") or "") if isinstance(model, (str, Path)) and is_run(model) else ""
