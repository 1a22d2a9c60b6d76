"""Writing a user's model: its library's own files where its config allows, and what was cut beside them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import nn

from unmask.errors import UserError
from unmask.models.user import UserModel
from unmask.official import hub
from unmask.official.load import load_strict, read_checkpoint
from unmask.official.reshaped import SCRIPT, Surgery, reshape

SURGERY, LOADER, DESCRIPTION = "surgery.json", "load_plain.py", "unmask.json"


def save(model: UserModel, folder: Path) -> Path:
    """The folder of ``UserModel.save``: ours as a system of ours; others as ``model.safetensors``, their library's
    ``config.json``, ``unmask.json``, and, where something was cut, ``surgery.json`` with ``load_plain.py``, which loads the
    model without this library."""
    if model.family == "unmask":
        return hub.save_trainable(model.module, folder)  # type: ignore[arg-type]
    described = {
        "kind": model.kind,
        "family": model.family,
        "name": model.name,
        "made": model.made,
        "classes": list(model.classes) if model.classes else None,
        "preprocessing": model.preprocessing.plain() if model.preprocessing else None,
        "surgery": model.surgery.plain(),
    }
    files = {DESCRIPTION: _text(described)}
    if model.surgery:
        files[SURGERY] = _text(model.surgery.plain())
        build = _build(model)
        if build and not model.surgery.merges:
            files[LOADER] = SCRIPT.replace("{build}", build).encode()
    config = _own_config(model)
    written = hub.write_folder(folder, config, model.module.state_dict(), files=files)
    if model.tokenizer is not None:
        model.tokenizer.save_pretrained(folder)
    return written


def restore(module: nn.Module, folder: str | Path) -> nn.Module:
    """A module of yours, freshly built, made as small as the saved one and filled with its weights, in place."""
    folder = Path(folder)
    described = json.loads((folder / DESCRIPTION).read_text(encoding="utf-8"))
    reshape(module, Surgery.of(described.get("surgery") or {}))
    load_strict(module, read_checkpoint(folder / hub.WEIGHTS), where=folder / hub.WEIGHTS)
    return module.eval()


def plain_config(model: UserModel) -> tuple[dict[str, Any] | None, str]:
    """The options with which the model's own library builds the smaller architecture by itself, or None and why it cannot."""
    surgery = model.surgery
    if not surgery:
        return {}, ""
    if surgery.merges:
        return None, "tokens are merged between its blocks"
    if surgery.constants:
        return None, "some of its layers lost all their heads"
    from unmask.models.plain import options

    return options(model)


def _own_config(model: UserModel) -> dict[str, Any]:
    if model.family == "transformers":
        config: Any = model.module.config
        plain = config.to_dict()
        plain["architectures"] = [type(model.module).__name__]
        own, _ = plain_config(model)
        if own:
            plain |= own
        return json.loads(json.dumps(plain, default=str))
    if model.family == "timm":
        known: dict[str, Any] = dict(getattr(model.module, "pretrained_cfg", None) or {})
        prepared = model.preprocessing
        if prepared is not None:
            known |= {"mean": list(prepared.mean), "std": list(prepared.std)}
            known["input_size"] = [prepared.channels, *prepared.image_size]
        keep = ("mean", "std", "input_size", "interpolation", "crop_pct", "num_classes")
        known = {k: v for k, v in known.items() if k in keep}
        count = len(model.classes or ())
        architecture = model.name.removeprefix("timm/").partition(".")[0]
        arguments = {k: v for k, v in model.made.items() if k != "num_classes"}
        return {"architecture": architecture, "num_classes": count, "model_args": arguments, "pretrained_cfg": known}
    return {"format": "torch", "family": model.family, "name": model.name, "arguments": model.made}


def _build(model: UserModel) -> str:
    """The lines of ``load_plain.py`` that make the architecture in its library."""
    if model.family == "timm":
        return (
            f"    import timm\n\n    model = timm.create_model({model.name.removeprefix('timm/')!r}, **{model.made!r})"
        )
    if model.family == "torchvision":
        name = model.name.removeprefix("torchvision/")
        return f"    from torchvision import models\n\n    model = models.get_model({name!r}, weights=None, **{model.made!r})"
    if model.family == "transformers":
        cls = type(model.module).__name__
        return (
            "    import transformers\n\n"
            "    config = transformers.AutoConfig.from_pretrained(HERE)\n"
            f"    model = transformers.{cls}(config)"
        )
    return ""


def _text(value: Any) -> bytes:
    try:
        return (json.dumps(value, indent=1) + "\n").encode()
    except TypeError as error:
        raise UserError(f"the model's options cannot be written as JSON: {error}") from None
