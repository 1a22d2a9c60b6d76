"""How good an ENAT is, in numbers and pictures: how well it guesses hidden tokens, and how near its images come to real ones."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from unmask.contracts import Batch, Picture
from unmask.draw import Draw
from unmask.errors import UserError
from unmask.systems.generation.enat.masking import Split, split_at
from unmask.systems.generation.metrics import measure_generator, real_images
from unmask.systems.generation.pictures import to_uint8

if TYPE_CHECKING:
    from unmask.systems.generation.enat.model import ENAT

HIDDEN_SHARES = (0.5, 0.75, 0.9)  # what is hidden of every test image, one look for each
SHOWN_SHARE = 0.75
GREY = -0.2  # of hidden tokens in pictures, in [-1, 1]


def reference_losses(tokens: Tensor, codes: int, smoothing: float) -> dict[str, Tensor]:
    """The smoothed cross-entropy of answering the same for every hidden token of ``tokens [B, N]``."""
    often = torch.bincount(tokens.flatten(), minlength=codes).float() / tokens.numel()
    answer = (1 - smoothing) * often + smoothing / codes  # the best constant answer to smoothed targets
    return {
        "all ids alike": torch.full_like(answer[0], math.log(codes)),
        "how often each id occurs": -torch.xlogy(answer, answer).sum(),
    }


def fixed_split(draw: Draw, name: str, batch: int, tokens: int, share: float, device: torch.device) -> Split:
    """The share of the tokens hidden, at least one and not all, at random."""
    order = draw.uniform(name, (batch, tokens), device=device).argsort(dim=1, stable=True)
    return split_at(order, min(max(round(tokens * share), 1), tokens - 1))


def logits_of(model: ENAT, tokens: Tensor, classes: Tensor, split: Split) -> Tensor:
    """float32 ``[B, M, K]`` of the network that samples, nothing reused."""
    net = model.sampler
    features, _ = net(split.ids(tokens, model.codebook_size), classes, split.visible, split.hidden)
    return net.logits(features).float()


@torch.no_grad()
def measure(
    model: ENAT,
    data: Any,
    draw: Draw,
    *,
    limit: int | None = None,
    device: torch.device | None = None,
    tell: Callable[[str], None] | None = None,
    folder: Path | None = None,
) -> dict[str, Any]:
    """Cross-entropy (nats, no smoothing) and top-1 of hidden test tokens at fixed random masks, the mean over three shares;
    with ``frechet_images`` > 0 also the Fréchet distance of as many made images to test images.

    ``baseline``: answering for every token how often its id occurs.
    """
    where = device or model.device
    model.to(where).eval()
    counts = torch.zeros(model.codebook_size, dtype=torch.float64, device=where)
    sums = {share: torch.zeros(3, dtype=torch.float64, device=where) for share in HIDDEN_SHARES}
    samples = 0
    for number, batch in enumerate(_test_batches(model, data, limit or 1000, where)):
        tokens = model.token_ids(batch)
        classes = model.labels(batch, tokens)
        counts += torch.bincount(tokens.flatten(), minlength=len(counts))
        for share, total in sums.items():
            split = fixed_split(draw, f"hidden {share}.{number}", len(tokens), model.tokens, share, where)
            logits, target = logits_of(model, tokens, classes, split).flatten(0, 1), tokens.gather(1, split.hidden)
            loss = F.cross_entropy(logits, target.flatten(), reduction="sum")
            right = (logits.argmax(dim=1) == target.flatten()).sum()
            total += torch.stack((loss.double(), right.double(), total.new_tensor(float(target.numel()))))
        samples += len(tokens)
        if tell is not None:
            tell(f"tokens of {samples} test images")
    often = counts / counts.sum()
    each = {share: (total[:2] / total[2]).tolist() for share, total in sums.items()}
    found: dict[str, Any] = {
        "cross_entropy": sum(loss for loss, _ in each.values()) / len(each),
        "token_top1": 100 * sum(right for _, right in each.values()) / len(each),
        **{f"cross_entropy_{share:g}_hidden": loss for share, (loss, _) in each.items()},
        "codes_used": int((counts > 0).sum()),
        "samples": samples,
        "baseline": {
            "how often each id occurs": {
                "cross_entropy": float(-torch.xlogy(often, often).sum()),
                "token_top1": 100 * float(often.max()),
            }
        },
    }
    if model.config.frechet_images and model.first_stage is not None:
        made = measure_generator(model, data, limit=model.config.frechet_images, device=where, tell=tell)
        found["baseline"] |= made.pop("baseline")
        found |= {"images_made" if k == "samples" else k: v for k, v in made.items()}
    return found


def _test_batches(model: ENAT, data: Any, limit: int, device: torch.device) -> Iterator[Batch]:
    """Test images as the model was trained to see them. Raises ``UserError`` for a model that reads tokens alone."""
    if model.first_stage is None:
        raise UserError("enat has no first stage to make tokens of test images: give first_stage.weights=RUN")
    yield from real_images(data, limit, size=model.config.image_size, channels=model.config.channels, device=device)


@torch.no_grad()
def filled_in(model: ENAT, batch: Batch, draw: Draw) -> Picture:
    """Eight images: as they are, their tokens decoded, three of four hidden, and the likeliest ids in their place, all guessed
    in one look."""
    stage = model.first_stage
    assert stage is not None
    some = {name: value[:8] for name, value in batch.items() if isinstance(value, Tensor)}
    tokens = model.token_ids(some)
    split = fixed_split(draw, "shown", len(tokens), model.tokens, SHOWN_SHARE, tokens.device)
    guesses = logits_of(model, tokens, model.labels(some, tokens), split).argmax(dim=-1)
    known, guessed = (
        stage.decode(ids.unflatten(1, model.grid)) for ids in (tokens, tokens.scatter(1, split.hidden, guesses))
    )
    cells = torch.zeros_like(tokens).scatter(1, split.hidden, 1).unflatten(1, model.grid)[:, None].float()
    covered = torch.where(F.interpolate(cells, size=known.shape[2:]) > 0, torch.full_like(known, GREY), known)
    images = some.get("image", known)
    rows = [list(row) for row in zip(*(to_uint8(x) for x in (images, known, covered, guessed)), strict=True)]
    columns = ["image", "its tokens, decoded", f"{SHOWN_SHARE:.0%} hidden", "likeliest ids, in one look"]
    return Picture("hidden tokens", columns, rows, "One look guesses every token alone; sampling takes several steps.")
