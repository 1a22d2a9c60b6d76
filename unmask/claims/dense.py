"""The dense probe: a linear classifier on each patch token of frozen features, measured by mean IoU on street scenes.

CamVid's frames (240 x 320) are resized to 192 x 256 and cut into twelve tiles of 64 px. A patch has the class that most
of its pixels have; patches that are mostly unlabelled are ignored.
"""

from __future__ import annotations

import io
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from unmask.contracts import Encoder
from unmask.errors import UserError

SIZE = (192, 256)  # height, width before cutting
TILE = 64
CLASSES = 11
UNLABELLED = 11


@dataclass(frozen=True)
class Scenes:
    """Tiles and their labels: ``image`` uint8 ``[N, 3, 64, 64]``, ``label`` int64 ``[N, 64, 64]``, 11 = unlabelled."""

    image: Tensor
    label: Tensor


def read_scenes(archive: Path, split: str) -> Scenes:
    """The tiles of one split ("train", "test") of the archive, in order of file name, row by row."""
    import numpy as np
    from PIL import Image

    images, labels = [], []
    with zipfile.ZipFile(archive) as files:
        names = sorted(n for n in files.namelist() if n.startswith(f"{split}/images/") and n.endswith(".jpg"))
        if not names:
            raise UserError(f"{archive} holds no {split}/images/*.jpg")
        for name in names:
            picture = Image.open(io.BytesIO(files.read(name))).convert("RGB")
            classes = Image.open(io.BytesIO(files.read(name.replace("/images/", "/labels/")[:-4] + ".png")))
            images.append(np.asarray(picture.resize(SIZE[::-1], Image.Resampling.BICUBIC)).transpose(2, 0, 1))
            labels.append(np.asarray(classes.resize(SIZE[::-1], Image.Resampling.NEAREST)))
    image, label = torch.from_numpy(np.stack(images)), torch.from_numpy(np.stack(labels)).long()
    return Scenes(tiles(image), tiles(label[:, None])[:, 0])


def tiles(frames: Tensor) -> Tensor:
    """``[N, C, H, W]`` -> ``[N * H/64 * W/64, C, 64, 64]``."""
    cut = frames.unfold(2, TILE, TILE).unfold(3, TILE, TILE)
    return cut.permute(0, 2, 3, 1, 4, 5).flatten(0, 2).contiguous()


def patch_classes(label: Tensor, patch: tuple[int, ...]) -> Tensor:
    """``[N, H, W]`` -> ``[N, h * w]``: the commonest class of each patch's pixels, the lowest among equals."""
    counts = F.one_hot(label, UNLABELLED + 1).permute(0, 3, 1, 2).float()
    return F.avg_pool2d(counts, patch).argmax(dim=1).flatten(1)


@torch.no_grad()
def patch_features(encoder: Encoder, image: Tensor, batch_size: int = 64) -> Tensor:
    """``[N, L, D]`` float32: the patch tokens of uint8 tiles, prepared as the encoder wants them."""
    from unmask.evaluation.features import autocast, evaluating

    device = next(encoder.parameters()).device
    facts = encoder.preprocessing
    if facts is None or len(facts.mean) != 3:
        raise UserError("the dense probe needs an encoder that was trained on colour images")
    mean, std = (torch.tensor(v, device=device)[:, None, None] for v in (facts.mean, facts.std))
    rows = []
    with evaluating(encoder), autocast(device, "auto"):
        for part in image.split(batch_size):
            x = (part.to(device).float() / 255 - mean) / std
            rows.append(encoder.tokens(x)[:, encoder.prefix_tokens :].float().cpu())
    return torch.cat(rows)


def fit_softmax(
    x: Tensor, y: Tensor, classes: int, *, decay: float = 1e-4, iterations: int = 60
) -> tuple[Tensor, Tensor]:
    """Multinomial logistic regression by L-BFGS from zero: weight ``[D, K]`` and bias ``[K]``. Convex, so nothing is drawn.

    Minimises mean cross-entropy + decay / 2 |weight|^2.
    """
    weight = torch.zeros(x.shape[1], classes, requires_grad=True)
    bias = torch.zeros(classes, requires_grad=True)
    optimiser = torch.optim.LBFGS([weight, bias], max_iter=iterations, history_size=10, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimiser.zero_grad()
        loss = F.cross_entropy(x @ weight + bias, y) + decay / 2 * weight.square().sum()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    optimiser.step(closure)  # type: ignore[arg-type]
    return weight.detach(), bias.detach()


def dense(encoder: Encoder, archive: Path, *, samples: int = 100_000, iterations: int = 60) -> dict[str, Any]:
    """``miou`` (0 ... 1, mean over the 11 classes) and ``per_class`` of the dense probe on the test tiles.

    samples: at most so many training patches, spread evenly. The encoder must keep one token a patch (a plain ViT).
    Raises ``UserError`` for an encoder whose tokens do not lie on its patches.
    """
    from torchmetrics.functional.classification import multiclass_jaccard_index

    train, test = (read_scenes(archive, split) for split in ("train", "test"))
    x, x_test = patch_features(encoder, train.image), patch_features(encoder, test.image)
    y, y_test = (patch_classes(s.label, encoder.patch_size) for s in (train, test))
    if x.shape[:2] != y.shape:
        raise UserError(f"the dense probe needs one token a patch: {x.shape[1]} tokens for {y.shape[1]} patches")
    x, y, x_test, y_test = x.flatten(0, 1), y.flatten(), x_test.flatten(0, 1), y_test.flatten()
    labelled = (y != UNLABELLED).nonzero()[:, 0]
    chosen = labelled[torch.linspace(0, len(labelled) - 1, min(samples, len(labelled))).long()]
    x, y = x[chosen], y[chosen]
    mean, std = x.mean(dim=0), x.std(dim=0).clamp_min(1e-6)
    weight, bias = fit_softmax((x - mean) / std, y, CLASSES, iterations=iterations)
    answers = (((x_test - mean) / std) @ weight + bias).argmax(dim=1)
    kept = y_test != UNLABELLED
    each = multiclass_jaccard_index(answers[kept], y_test[kept], num_classes=CLASSES, average="none")
    macro = multiclass_jaccard_index(answers[kept], y_test[kept], num_classes=CLASSES, average="macro")
    return {"miou": float(macro), "per_class": each.tolist(), "patches": int(kept.sum()), "train_patches": len(y)}
