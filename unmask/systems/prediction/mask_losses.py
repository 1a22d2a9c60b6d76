"""Losses of mask classification, on sampled points (Cheng et al., Mask2Former, CVPR 2022, section 3.3; PointRend's
uncertainty sampling, Kirillov et al., CVPR 2020).

    loss = MaskLoss(MaskLossConfig(), classes=19)
    losses = loss({"final": MaskLayer(logits, masks), "0": ...}, MaskTargets.of_map(batch["map"], 19), draw)
    losses["loss"].backward()

Every layer's output is matched with the targets anew, at points of its own; a mask classifier's N queries each predict
one class (or none, the last) and one binary mask.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from unmask.config import Config, Field
from unmask.draw import Draw
from unmask.nn.collective import summed_over_processes
from unmask.systems.prediction.mask_targets import MaskTargets
from unmask.systems.prediction.matching import Pairs, assign


class MaskLossConfig(Config):
    """Weights and points of the losses; the defaults are those of every published recipe."""

    class_weight: float = Field(2.0, ge=0, description="weight of the classes' cross-entropy, in loss and matching")
    mask_weight: float = Field(5.0, ge=0, description="weight of the masks' binary cross-entropy")
    dice_weight: float = Field(5.0, ge=0, description="weight of the masks' Dice loss")
    no_object_weight: float = Field(0.1, ge=0, description="weight of the class 'no object' in the cross-entropy")
    num_points: int = Field(12544, ge=1, description="points a mask that losses and matching look at")
    oversample_ratio: float = Field(3.0, ge=1, description="candidates a point, of which the uncertain are kept")
    importance_sample_ratio: float = Field(0.75, ge=0, le=1, description="share of points chosen by uncertainty")


@dataclass
class MaskLayer:
    """What one layer predicts: class logits ``[B, Q, K + 1]`` (the last: no object), and mask logits ``[B, Q, h, w]``, given
    or as the product of ``embedding [B, Q, M]`` and ``features [B, M, h, w]``. With the product, full maps are made only of
    matched queries: resampling commutes with it."""

    logits: Tensor
    masks: Tensor | None = None
    embedding: Tensor | None = None
    features: Tensor | None = None

    def at(self, points: Tensor) -> Tensor:
        """Mask logits ``[B, Q, P]`` at points ``[B, P, 2]`` of each image, float32."""
        if self.masks is not None:
            return point_sample(self.masks.float(), points)
        assert self.embedding is not None
        assert self.features is not None
        return self.embedding.float() @ point_sample(self.features.float(), points)

    def matched(self, pairs: Pairs) -> Tensor:
        """Mask logits ``[M, h, w]`` of the matched queries, float32."""
        if self.masks is not None:
            return self.masks[pairs.image, pairs.query].float()
        assert self.embedding is not None
        assert self.features is not None
        chosen = self.embedding[pairs.image, pairs.query].float()
        features = self.features.float()
        parts = chosen.split(pairs.counts)
        maps = [torch.einsum("qm,mhw->qhw", part, features[i]) for i, part in enumerate(parts) if len(part)]
        return torch.cat(maps) if maps else features.new_zeros(0, *features.shape[2:])


class MaskLoss(nn.Module):
    """Classes, masks and Dice of every layer, each matched anew.

    classes: K, without "no object". The buffer ``empty_weight`` (K + 1) holds the weights of the cross-entropy.
    """

    empty_weight: Tensor

    def __init__(self, config: MaskLossConfig, classes: int):
        super().__init__()
        self.config, self.classes = config, classes
        weight = torch.ones(classes + 1)
        weight[-1] = config.no_object_weight
        self.register_buffer("empty_weight", weight)

    def forward(self, layers: Mapping[str, MaskLayer], targets: MaskTargets, draw: Draw) -> dict[str, Tensor]:
        """``loss`` (the weighted sum of everything) and, unweighted, ``loss_ce``, ``loss_mask``, ``loss_dice`` of the layer
        "final" and ``loss_ce_NAME`` ... of every other.

        Draws of layer NAME: ``match_points.NAME`` ``[B, P, 2]``; ``loss_points.NAME`` ``[B, N, S, 2]`` and
        ``loss_random.NAME`` ``[B, N, P - k, 2]``, of which image b uses the first rows, one a pair, queries ascending.
        """
        names = list(layers)
        truths = targets.masks.float()
        costs = [self.costs(layers[name], targets, draw, name, truths) for name in names]
        matched = assign(torch.stack(costs), targets.counts)
        number = mask_count(targets, truths.device)
        out: dict[str, Tensor] = {}
        total: Tensor | float = 0.0
        c = self.config
        for name, pairs in zip(names, matched, strict=True):
            ending = "" if name == "final" else f"_{name}"
            ce = self.class_loss(layers[name].logits, targets, pairs)
            mask, dice = self.mask_losses(layers[name], targets, pairs, draw, name, number, truths)
            out |= {f"loss_ce{ending}": ce, f"loss_mask{ending}": mask, f"loss_dice{ending}": dice}
            total = total + c.class_weight * ce + c.mask_weight * mask + c.dice_weight * dice
        assert isinstance(total, Tensor)
        return {"loss": total, **out}

    # --- matching ---
    @torch.no_grad()
    def costs(
        self, layer: MaskLayer, targets: MaskTargets, draw: Draw, name: str, truths: Tensor | None = None
    ) -> Tensor:
        """``[B, Q, N]``: weighted cross-entropy, minus class probability, and Dice at points that all queries and targets of
        an image share."""
        c = self.config
        truths = targets.masks.float() if truths is None else truths
        images, device = len(layer.logits), layer.logits.device
        points = draw.uniform(f"match_points.{name}", (images, c.num_points, 2), device=device)
        with torch.autocast(device_type=device.type, enabled=False):
            found = layer.at(points)
            truth = point_sample(truths, points)
            labels = targets.labels[:, None].expand(-1, layer.logits.shape[1], -1)
            probability = layer.logits.float().softmax(dim=-1).gather(2, labels)
            # softplus(-l) t + softplus(l) (1 - t) = softplus(l) - l t, summed over points as one product
            positive = F.softplus(found)
            entropy = positive.sum(dim=-1, keepdim=True) - found @ truth.mT
            share = found.sigmoid()
            overlap = 2 * (share @ truth.mT)
            dice = 1 - (overlap + 1) / (share.sum(-1)[:, :, None] + truth.sum(-1)[:, None] + 1)
            return c.mask_weight * entropy / c.num_points - c.class_weight * probability + c.dice_weight * dice

    # --- losses ---
    def class_loss(self, logits: Tensor, targets: MaskTargets, pairs: Pairs) -> Tensor:
        """Weighted mean cross-entropy over all queries; unmatched ones should answer "no object"."""
        wanted = torch.full(logits.shape[:2], self.classes, dtype=torch.int64, device=logits.device)
        wanted[pairs.image, pairs.query] = targets.labels[pairs.image, pairs.target]
        return F.cross_entropy(logits.float().flatten(0, 1), wanted.flatten(), self.empty_weight)

    def mask_losses(
        self,
        layer: MaskLayer,
        targets: MaskTargets,
        pairs: Pairs,
        draw: Draw,
        name: str,
        number: Tensor | float,
        truths: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Binary cross-entropy (mean over points) and Dice of the matched masks, each summed and divided by ``number``."""
        with torch.autocast(device_type=layer.logits.device.type, enabled=False):
            found = layer.matched(pairs)[:, None]
            if not len(pairs):
                nothing = found.sum() + sum(
                    0.0 * t.float().sum() for t in (layer.masks, layer.embedding, layer.features) if t is not None
                )
                return nothing, nothing
            truth = (targets.masks if truths is None else truths)[pairs.image, pairs.target][:, None].float()
            with torch.no_grad():
                points = self.loss_points(found, pairs, draw, name)
                answer = point_sample(truth, points)[:, 0]
            value = point_sample(found, points)[:, 0]
            entropy = F.binary_cross_entropy_with_logits(value, answer, reduction="none").mean(dim=1)
            share = value.sigmoid()
            dice = 1 - (2 * (share * answer).sum(1) + 1) / (share.sum(1) + answer.sum(1) + 1)
            return entropy.sum() / number, dice.sum() / number

    def loss_points(self, found: Tensor, pairs: Pairs, draw: Draw, name: str) -> Tensor:
        """``[M, P, 2]``: of many candidates the most uncertain (logits nearest to 0), and fresh uniform points."""
        c = self.config
        candidates = int(c.num_points * c.oversample_ratio)
        certain = int(c.importance_sample_ratio * c.num_points)
        points = points_of_pairs(draw, f"loss_points.{name}", pairs, candidates, found.device)
        doubt = -point_sample(found, points)[:, 0].abs()
        kept = doubt.topk(certain, dim=1).indices
        points = points.gather(1, kept[..., None].expand(-1, -1, 2))
        if certain == c.num_points:
            return points
        fresh = points_of_pairs(draw, f"loss_random.{name}", pairs, c.num_points - certain, found.device)
        return torch.cat((points, fresh), dim=1)


def point_sample(maps: Tensor, points: Tensor) -> Tensor:
    """Bilinear values ``[B, C, P]`` of maps ``[B, C, h, w]`` at points ``[B, P, 2]``: (x, y) in 0 ... 1 over the whole map,
    zero outside (half a pixel from the border counts half)."""
    grid = (2 * points - 1)[:, :, None].to(maps.dtype)
    return F.grid_sample(maps, grid, mode="bilinear", padding_mode="zeros", align_corners=False)[..., 0]


def points_of_pairs(draw: Draw, name: str, pairs: Pairs, count: int, device: torch.device) -> Tensor:
    """``[M, count, 2]`` uniform points, ``count`` for each pair. Drawn by image, so that an image's points do not depend on
    how many pairs the images before it have."""
    most = max(pairs.counts)
    drawn = draw.uniform(name, (len(pairs.counts), most, count, 2), device=device)
    place = torch.cat([torch.arange(n) for n in pairs.counts]).to(device)
    return drawn[pairs.image, place]


def by_image(rows: Tensor, counts: Sequence[int]) -> Tensor:
    """``[M, ...]``, one row a pair (as published draws are kept), as the ``[B, N, ...]`` that ``points_of_pairs`` asks for."""
    out = rows.new_zeros(len(counts), max(counts, default=0), *rows.shape[1:])
    start = 0
    for image, count in enumerate(counts):
        out[image, :count] = rows[start : start + count]
        start += count
    return out


def mask_count(targets: MaskTargets, device: torch.device) -> Tensor | float:
    """Number of target masks, averaged over processes; at least 1."""
    own = float(sum(targets.counts))
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return max(own, 1.0)
    return (summed_over_processes(torch.tensor(own, device=device)) / dist.get_world_size()).clamp(min=1.0)
