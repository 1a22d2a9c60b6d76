"""What is measured of maskings and of explanations: removal, insertion and deletion curves, shape leakage, linearity,
sensitivity."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from unmask.draw import Draw
from unmask.errors import MissingExtra, UserError
from unmask.systems.explanation.regions import count_of, sums, visible_of

Ask = Callable[[Tensor, Tensor], Tensor]
Order = Literal["random", "most salient first", "least salient first"]
SHARES = tuple(i / 10 for i in range(11))


@dataclass
class Removal:
    """A removal curve over many images: one number a share of hidden regions. accuracy: in 0 ... 1 (empty without labels); entropy:
    of how often each class is answered, in nats (low: answers collapse to a few classes); kept: share of answers that are those
    for the whole image; similarity: of answer and label by a table (empty without one)."""

    shares: tuple[float, ...]
    accuracy: list[float] = field(default_factory=list)
    entropy: list[float] = field(default_factory=list)
    kept: list[float] = field(default_factory=list)
    similarity: list[float] = field(default_factory=list)

    def plain(self) -> dict[str, Any]:
        return {k: list(v) for k, v in vars(self).items() if len(v)}


def order_of(
    draw: Draw | None, count: int, regions: int, order: Order = "random", saliency: Tensor | None = None
) -> Tensor:
    """int64 ``[count, regions]``: which region goes first. saliency: ``[count, regions]``."""
    if order == "random":
        if draw is None:
            raise ValueError("a random order needs a draw")
        return draw.uniform("order", (count, regions)).argsort(dim=1, stable=True)
    if saliency is None:
        raise UserError(f"order {order!r} needs a saliency for each region")
    return saliency.argsort(dim=1, descending=order == "most salient first", stable=True)


def presence_at(order: Tensor, share: float) -> Tensor:
    """``[count, regions]``: 0 for the first int(share x regions) of each row's order, else 1."""
    hidden = int(share * order.shape[1] + 1e-9)
    kept = torch.ones(order.shape)
    return kept.scatter(1, order[:, :hidden], 0.0)


@torch.no_grad()
def removal_curve(
    ask: Ask,
    images: Tensor,
    labels: Tensor | None,
    segments: Tensor,
    order: Tensor,
    shares: Sequence[float] = SHARES,
    *,
    batch_size: int = 128,
    classes: int | None = None,
    similarity: Tensor | None = None,
    tell: Callable[[str], None] | None = None,
) -> Removal:
    """Hide more and more regions of images ``[N, C, H, W]`` and see what is still answered.

    segments: ``[H, W]``, shared by all images. order: ``[N, F]`` (:func:`order_of`). similarity: a table ``[K, K]``.
    """
    if similarity is not None and (similarity.ndim != 2 or similarity.shape[0] != similarity.shape[1]):
        raise UserError(f"a table of similarities is [K, K], this one is {tuple(similarity.shape)}")
    out = Removal(tuple(shares))
    first: Tensor | None = None
    for share in shares:
        answers = []
        for start in range(0, len(images), batch_size):
            rows = slice(start, start + batch_size)
            masks = visible_of(presence_at(order[rows], share).to(images.device), segments.to(images.device))
            logits = ask(images[rows], masks)
            classes = classes or logits.shape[1]
            answers.append(logits.argmax(dim=1).cpu())
        answer = torch.cat(answers)
        first = answer if first is None else first
        out.entropy.append(entropy(answer, classes or 1))
        out.kept.append(float((answer == first).float().mean()))
        if labels is not None:
            out.accuracy.append(float((answer == labels.cpu()).float().mean()))
            if similarity is not None:
                out.similarity.append(float(similarity[answer, labels.cpu()].float().mean()))
        if tell is not None:
            tell(f"{share:.0%} of the regions hidden")
    return out


def entropy(answers: Tensor, classes: int) -> float:
    """-sum p log(p + 1e-7) of how often each class is answered."""
    shares = torch.bincount(answers, minlength=classes).double() / max(len(answers), 1)
    return float(-(shares * (shares + 1e-7).log()).sum())


def wordnet_similarity(classes: Sequence[str]) -> Tensor:
    """``[K, K]``: path similarity of classes whose names are WordNet ids (n01440764) or English nouns; 0 where one is unknown.

    Needs nltk with its WordNet data at hand; nothing is fetched. Raises ``UserError``."""
    try:
        from nltk.corpus import wordnet
    except ImportError:
        raise MissingExtra("similarity by WordNet", "nltk", "explain") from None
    try:
        wordnet.ensure_loaded()
    except LookupError:
        raise UserError("nltk has no WordNet data here: python -m nltk.downloader wordnet, or give a table") from None

    def found(name: str) -> Any:
        if len(name) == 9 and name[0] == "n" and name[1:].isdigit():
            return wordnet.synset_from_pos_and_offset("n", int(name[1:]))
        known = wordnet.synsets(name.split(",")[0].strip().replace(" ", "_"), pos="n")
        return known[0] if known else None

    synsets = [found(c) for c in classes]
    table = torch.zeros(len(classes), len(classes))
    for i, a in enumerate(synsets):
        for j, b in enumerate(synsets[: i + 1]):
            value = float(a.path_similarity(b) or 0) if a is not None and b is not None else 0.0
            table[i, j] = table[j, i] = value
    return table


# --- one image ---


@torch.no_grad()
def heat_curve(
    ask: Ask,
    image: Tensor,
    heat: Tensor,
    target: int,
    *,
    insert: bool = False,
    steps: int = 20,
    segments: Tensor | None = None,
    batch_size: int = 64,
) -> tuple[list[float], float]:
    """Probability of ``target`` as the hottest places are hidden (or, with ``insert``, shown), and the area under it in 0 ... 1.

    A faithful heat map falls fast when it is deleted and rises fast when it is inserted. heat: ``[H, W]``. segments: hide whole
    regions by their mean heat instead of pixels.
    """
    if segments is None:
        order = heat.flatten().argsort(descending=True, stable=True)[None]
        places = torch.arange(heat.numel()).reshape(heat.shape)
    else:
        counts = torch.bincount(segments.flatten(), minlength=count_of(segments))
        order = (sums(heat, segments) / counts).argsort(descending=True, stable=True)[None]
        places = segments
    rows = torch.cat([presence_at(order, i / steps) for i in range(steps + 1)])
    masks = visible_of(1 - rows if insert else rows, places.cpu())
    found = []
    for start in range(0, len(masks), batch_size):
        some = masks[start : start + batch_size].to(image.device)
        found.append(ask(image.expand(len(some), -1, -1, -1), some).float().softmax(dim=1)[:, target].cpu())
    curve = torch.cat(found)
    return curve.tolist(), float(torch.trapezoid(curve, dx=1 / steps))


def sensitivity(
    explain: Callable[[Tensor], Tensor],
    image: Tensor,
    heat: Tensor,
    draw: Draw,
    *,
    radius: float = 0.02,
    times: int = 3,
) -> float:
    """How far the heat map moves when the image hardly does: the largest |h(x + e) - h(x)| / |h(x)| over ``times`` noises e with
    values in -radius ... radius (max-sensitivity; Yeh et al., NeurIPS 2019). 0 is best."""
    noise = draw.uniform("sensitivity", (times, *image.shape), device=image.device) * 2 * radius - radius
    size = heat.float().norm().clamp_min(1e-12)
    return max(float((explain(image + e).float() - heat.float()).norm() / size) for e in noise)


# --- the mask itself ---


@torch.no_grad()
def shape_leakage(ask: Ask, images: Tensor, labels: Tensor, things: Tensor, batch_size: int = 128) -> dict[str, float]:
    """Does the shape of a hidden object give it away? Accuracy with the object hidden, with the same mask rolled by half the image
    in both directions, and their ratio (near 1: the shape does not leak). things: ``[N, H, W]``, 1 = object."""
    rolled = things.roll((things.shape[1] // 2, things.shape[2] // 2), dims=(1, 2))

    def accuracy(hidden: Tensor) -> float:
        right = 0
        for start in range(0, len(images), batch_size):
            rows = slice(start, start + batch_size)
            seen = (hidden[rows] <= 0.5).float()[:, None].to(images.device)
            right += int((ask(images[rows], seen).argmax(dim=1).cpu() == labels[rows].cpu()).sum())
        return right / max(len(images), 1)

    object_hidden, elsewhere = accuracy(things), accuracy(rolled)
    return {"object": object_hidden, "rolled": elsewhere, "ratio": object_hidden / max(elsewhere, 1e-12)}


@torch.no_grad()
def linearity(
    found: Callable[[Tensor, Tensor], Tensor], images: Tensor, segments: Tensor, draw: Draw, groups: int = 4
) -> dict[str, float]:
    """Features of the union of disjoint random groups of regions against the sum of their features: cosine, relative distance.

    found: (images, visible) -> ``[B, D]``, as ``maskings.features`` gives it. All groups together are the whole image.
    """
    regions = count_of(segments)
    rank = draw.uniform("groups", (len(images), regions)).argsort(dim=1, stable=True).argsort(dim=1)
    member = rank * groups // regions
    total: Any = 0
    for group in range(groups):
        masks = visible_of((member == group).float().to(images.device), segments.to(images.device))
        total = total + found(images, masks)
    union = found(images, torch.ones_like(images[:, :1]))
    near = F.cosine_similarity(total, union, dim=1)
    far = (total - union).norm(dim=1) / union.norm(dim=1).clamp_min(1e-12)
    return {"cosine": float(near.mean()), "relative distance": float(far.mean())}
