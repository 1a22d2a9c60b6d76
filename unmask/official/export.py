"""Taking a trained encoder elsewhere: a safetensors folder, a timm model, an ONNX file, the Hub.

What architecture of timm an encoder equals is known beside each backbone (``to_timm.py`` in its folder); here the weights
are written, and read back and compared before anybody trusts them.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from unmask.catalog import backbone_card
from unmask.contracts import Encoder
from unmask.errors import MissingExtra, UserError, nearest
from unmask.official.hub import push_to_hub, save_encoder, write_folder
from unmask.official.load import load_strict

FORMATS = ("safetensors", "timm", "onnx", "hub")
TOLERANCE = 1e-3  # largest difference in relation to the features' own size


@dataclass
class TimmTwin:
    """The model of timm that computes what an encoder computes: ``timm.create_model(architecture, **arguments)``."""

    architecture: str
    arguments: dict[str, Any]
    state: dict[str, Tensor]
    notes: list[str] = field(default_factory=list)


def export_encoder(encoder: Encoder, to: str, out: str | Path, *, system: str = "", repo_id: str | None = None) -> str:
    """Write the encoder in one of ``FORMATS`` and say where: a folder, or for "hub" an address.

    out: the folder to write (for "hub" the repository's id, unless ``repo_id`` is given). system: what trained it.
    Raises ``UserError`` in one line: unknown format, no counterpart in timm, a missing package, an unwritable place.
    """
    if to not in FORMATS:
        raise UserError(f"cannot export to {to!r}: {nearest(to, FORMATS)}")
    training = encoder.training
    encoder.eval()
    try:
        match to:
            case "safetensors":
                return str(save_encoder(encoder, out, system=system))
            case "timm":
                return str(export_timm(encoder, Path(out)))
            case "onnx":
                return str(export_onnx(encoder, Path(out)))
            case _:
                return push_to_hub(encoder, repo_id or str(out))
    finally:
        encoder.train(training)


# --- timm -----------------------------------------------------------------------------------------------------


def timm_twin(encoder: Encoder) -> TimmTwin:
    """The model of timm that computes the same. Raises ``UserError`` where there is none."""
    name = encoder.name or type(encoder).__name__
    module = backbone_card(encoder.name).module("to_timm") if encoder.name else None
    if module is None:
        raise UserError(f"{name} has no counterpart in timm: export --to safetensors or onnx")
    return module.timm_twin(encoder)


def export_timm(encoder: Encoder, folder: Path) -> Path:
    """Write ``config.json`` and ``model.safetensors`` in timm's own layout.

    ``timm.create_model("local-dir:FOLDER", pretrained=True)`` loads them, and so does ``load_state_dict`` on
    ``timm.create_model(config["architecture"], **config["model_args"])``. Both models' features are compared first.
    Raises ``UserError``.
    """
    import timm

    twin = timm_twin(encoder)
    image = torch.randn(1, encoder.in_channels, *encoder.image_size, generator=torch.Generator().manual_seed(0))
    try:
        model = timm.create_model(twin.architecture, pretrained=False, **twin.arguments).eval()
    except (TypeError, ValueError, RuntimeError, AssertionError) as error:
        raise UserError(f"timm cannot build {twin.architecture} with {twin.arguments}: {error}") from None
    load_strict(model, twin.state, where=f"timm {twin.architecture}")
    device = next(encoder.parameters()).device
    with torch.no_grad():
        ours = encoder.tokens(image.to(device)).cpu()
        theirs = model.forward_features(image)
    check_equal(ours, tokens_of(theirs, model), f"timm's {twin.architecture}")
    described = {
        "architecture": twin.architecture,
        "num_classes": 0,
        "num_features": encoder.embed_dim,
        "model_args": twin.arguments,
        "pretrained_cfg": _pretrained_cfg(encoder),
    }
    return write_folder(folder, described, twin.state)


def tokens_of(features: Tensor, model: nn.Module) -> Tensor:
    """``[B, L, D]`` from what ``forward_features`` of a timm model returns."""
    if features.ndim == 3:
        return features
    return features.flatten(1, 2) if getattr(model, "output_fmt", "") == "NHWC" else features.flatten(2).mT


def _pretrained_cfg(encoder: Encoder) -> dict[str, Any]:
    size = [encoder.in_channels, *encoder.image_size]
    known = encoder.preprocessing
    if known is None:
        return {"input_size": size, "num_classes": 0}
    return {
        "input_size": size,
        "num_classes": 0,
        "mean": list(known.mean),
        "std": list(known.std),
        "interpolation": known.interpolation,
        "crop_pct": known.crop,
    }


# --- ONNX -----------------------------------------------------------------------------------------------------


class _Features(nn.Module):
    """Pooled features and tokens: the two outputs of an ONNX file."""

    def __init__(self, encoder: Encoder, image: Tensor):
        super().__init__()
        self.encoder, self.by_mean = encoder, False
        pooled, tokens = self(image)
        self.by_mean = torch.equal(pooled, self.mean(tokens))  # then one pass through the network gives both

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        tokens = self.encoder.tokens(image)
        return self.mean(tokens) if self.by_mean else self.encoder.pooled(image), tokens

    def mean(self, tokens: Tensor) -> Tensor:
        return tokens[:, self.encoder.prefix_tokens :].mean(dim=1)


def export_onnx(encoder: Encoder, folder: Path) -> Path:
    """Write ``encoder.onnx`` (inputs ``image [B, C, H, W]``, standardised; outputs ``pooled`` and ``tokens``; any B) with a
    ``config.json`` that says how images are prepared. onnxruntime's features are compared with torch's first.

    Raises ``UserError``: packages of the extra ``export`` missing, an operation that ONNX does not have.
    """
    for package in ("onnx", "onnxscript", "onnxruntime"):
        _need(package)
    import numpy as np
    import onnxruntime

    device = next(encoder.parameters()).device
    encoder.cpu()
    try:
        generator = torch.Generator().manual_seed(0)
        image = torch.randn(3, encoder.in_channels, *encoder.image_size, generator=generator)
        with torch.no_grad():
            module = _Features(encoder, image).eval()
            expected = module(image)  # first of all: tables that are made once must be real tensors, not traced ones
        program = _traced(module, image[:2], encoder)
    finally:
        encoder.to(device)
    buffer = program.model_proto.SerializeToString()
    session = onnxruntime.InferenceSession(buffer, providers=["CPUExecutionProvider"])
    for batch in (1, 3):
        found = session.run(None, {"image": np.asarray(image[:batch])})
        for ours, theirs in zip(expected, found, strict=True):
            check_equal(ours[:batch], torch.from_numpy(theirs), "onnxruntime")
    described = {
        "format": "onnx",
        "inputs": {"image": ["batch", encoder.in_channels, *encoder.image_size]},
        "outputs": {"pooled": ["batch", expected[0].shape[1]], "tokens": ["batch", *expected[1].shape[1:]]},
        "backbone": {"name": encoder.name},
        "preprocessing": encoder.preprocessing.plain() if encoder.preprocessing else None,
    }
    return write_folder(folder, described, {}, files={"encoder.onnx": buffer})


def _traced(module: nn.Module, image: Tensor, encoder: Encoder) -> Any:
    batch = torch.export.Dim("batch", min=1, max=65536)
    try:
        with _quiet():
            traced = torch.export.export(module, (image,), dynamic_shapes={"image": {0: batch}}, strict=False)
            return torch.onnx.export(
                traced, dynamo=True, input_names=["image"], output_names=["pooled", "tokens"], verbose=False
            )
    except Exception as error:  # torch reports an operation it cannot translate in many ways
        lines = [line for line in str(error).strip().splitlines() if line.strip()] or [type(error).__name__]
        raise UserError(
            f"{encoder.name or type(encoder).__name__} cannot be written as ONNX: {lines[0][:160]}"
        ) from None


@contextmanager
def _quiet() -> Iterator[None]:
    import logging

    loggers = [logging.getLogger(n) for n in ("torch.onnx", "onnxscript", "torch.onnx._internal.exporter")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _need(package: str) -> None:
    import importlib.util

    if importlib.util.find_spec(package) is None:
        raise MissingExtra("export to onnx", package, "export")


def check_equal(ours: Tensor, theirs: Tensor, where: str) -> None:
    """Raise ``UserError`` when features computed elsewhere differ from ours."""
    ours, theirs = ours.float(), theirs.float()
    if ours.shape != theirs.shape:
        raise UserError(
            f"{where} gives features of shape {list(theirs.shape)}, ours are {list(ours.shape)}: nothing was written"
        )
    gap, size = float((ours - theirs).abs().max()), float(ours.abs().max())
    if not gap <= TOLERANCE * max(size, 1e-6):
        raise UserError(
            f"{where} computes other features (differing by {gap:.2g} of {size:.2g}): nothing was written; "
            "export --to onnx or safetensors"
        )
