"""Frozen features of any encoder over a whole data set, computed once and kept."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
from torch import Tensor

from unmask.contracts import Encoder, Preprocessing
from unmask.data.settings import DataSettings
from unmask.engine.precision import chosen_precision
from unmask.errors import UserError, nearest
from unmask.evaluation.samples import Samples, samples

Pool = Literal["auto", "mean", "cls", "maps", "tokens"]
POOLS = ("auto", "mean", "cls", "maps", "tokens")
_FLOAT32_LIMIT = 2**30  # numbers; more tokens than 4 GB of float32 are kept as float16


@torch.no_grad()
def features(
    encoder: Encoder,
    data: Any,
    pool: Pool = "auto",
    *,
    preprocessing: Preprocessing | None = None,
    batch_size: int | None = None,
    precision: Literal["auto", "fp32", "bf16"] = "auto",
    tell: Callable[[int, int | None], None] | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Features ``[N, D]`` (``[N, L, D]`` for "tokens") and labels ``[N]`` or None, in the data's order, on the CPU.

    data: anything :func:`unmask.evaluation.samples.samples` takes. pool: "auto" (what the encoder calls pooled), "mean"
    of the patch tokens, "cls" (the class token), "maps" (the average of each feature map, joined), "tokens" (all tokens).
    The encoder runs in evaluation mode, on its own device, with bf16 where that is fast. tell: called with (done, all).
    Raises ``UserError`` for a pool the encoder does not have.
    """
    if pool not in POOLS:
        raise UserError(f"no pool {pool!r}: {nearest(pool, POOLS)}")
    source = samples(data)
    device = next((p.device for p in encoder.parameters()), torch.device("cpu"))
    rows: list[Tensor] = []
    labels: list[Tensor] = []
    done = 0
    with evaluating(encoder), autocast(device, precision):
        size = batch_size or fitting_batch(encoder.image_size)
        for batch in source.batches(preprocessing or encoder.preprocessing, size):
            value = pooled(encoder, batch["image"].to(device, non_blocking=True), pool).float().cpu()
            if pool == "tokens" and (source.count or 0) * value[0].numel() > _FLOAT32_LIMIT:
                value = value.half()
            rows.append(value)
            if batch.get("label") is not None:
                labels.append(batch["label"].long().cpu())
            done += len(value)
            if tell is not None:
                tell(done, source.count)
    if not rows:
        raise UserError(f"{source.uri or 'the data'} holds no image to compute features of")
    return torch.cat(rows), torch.cat(labels) if labels else None


@torch.no_grad()
def augmented(
    encoder: Encoder,
    data: Samples,
    views: int,
    pool: Pool = "auto",
    *,
    preprocessing: Preprocessing | None = None,
    seed: int = 0,
    precision: Literal["auto", "fp32", "bf16"] = "auto",
) -> list[Tensor]:
    """Features ``[N, D]`` of so many views of the samples: random resized crops (0.08 ... 1 of the area) and flips, as MAE
    augments for its linear probe; all drawn from the seed. Raises ``UserError`` for a stream."""
    if data.count is None:
        raise UserError(f"{data.uri} streams: its images cannot be augmented several times; use views=0")
    device = next((p.device for p in encoder.parameters()), torch.device("cpu"))
    settings = DataSettings(augment="crop_flip", crop_scale=(0.08, 1.0))
    size = fitting_batch(encoder.image_size)
    out = []
    with evaluating(encoder), autocast(device, precision):
        for view in range(views):
            batches = data.augmented(settings, preprocessing or encoder.preprocessing, size, seed, view)
            out.append(torch.cat([pooled(encoder, b["image"].to(device), pool).float().cpu() for b in batches]))
    return out


def pooled(encoder: Encoder, images: Tensor, pool: Pool) -> Tensor:
    """One batch's features ``[B, D]``, or ``[B, L, D]`` for "tokens"."""
    if pool == "auto":
        return encoder.pooled(images)
    if pool == "maps":
        return torch.cat([m.flatten(2).mean(dim=2) for m in encoder.maps(images)], dim=1)
    if pool == "cls" and not encoder.prefix_tokens:
        raise UserError(f"{encoder.name or type(encoder).__name__} has no class token: use pool=mean")
    tokens = encoder.tokens(images)
    if pool == "tokens":
        return tokens
    return tokens[:, 0] if pool == "cls" else tokens[:, encoder.prefix_tokens :].mean(dim=1)


@contextlib.contextmanager
def evaluating(module: torch.nn.Module) -> Iterator[None]:
    """The module in evaluation mode, and every part of it in its former mode afterwards."""
    training = [m for m in module.modules() if m.training]
    module.eval()
    try:
        yield
    finally:
        for part in training:
            part.training = True


def autocast(device: torch.device, precision: str) -> Any:
    """bf16 where asked for, or where the hardware multiplies it fast; otherwise nothing."""
    name = chosen_precision(precision, device)
    return torch.autocast(device.type, torch.bfloat16) if name == "bf16" else contextlib.nullcontext()


def fitting_batch(size: tuple[int, ...]) -> int:
    """A batch with as many pixels as 64 images of 224 x 224, a power of two between 8 and 512."""
    wanted = 64 * 224 * 224 / max(math.prod(size), 1)
    return int(min(max(2 ** round(math.log2(max(wanted, 1))), 8), 512))
