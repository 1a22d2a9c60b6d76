"""Layer masking. Balasubramanian and Feizi, ICCV 2023, arXiv:2211.14646.

Pixels are hidden in every layer of a convolutional network: the mask travels along, a thin border of hidden activations is filled
from visible neighbours before each convolution, the rest is zero after it. No training, no other weights.

    ask = LayerMasked(torchvision.models.resnet50(weights="DEFAULT").eval())
    logits = ask(images, visible)                                          # [B, 1, H, W] of ones and zeros
    LayerMasking().explain(open_model("torchvision/resnet50"), image, None, Seeded(0)).heat
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from unmask import config as configs
from unmask.config import Field
from unmask.contracts import Attribution, Batch, Losses, Progress, Trainable
from unmask.data.batches import Batches, everything
from unmask.data.opening import open_source
from unmask.draw import Draw, Scoped
from unmask.errors import UserError
from unmask.models import UserModel, open_model
from unmask.systems.explanation.curves import Order, Removal, order_of, removal_curve
from unmask.systems.explanation.maskings import LAYERED, masking
from unmask.systems.explanation.perturbing import LimeExplainer, LimeSettings
from unmask.systems.explanation.regions import count_of, squares


class LayerMasking(Trainable):
    """LIME with layer masking (``explain``), and removal curves of a classifier under any masking (``measure``)."""

    slug = "layer_masking"
    measures: ClassVar = {
        "accuracy": "accuracy over the removal curve, %",
        "entropy": "class entropy with half hidden, nats",
        "kept": "answers as for the whole image, %",
    }

    class Config(LimeSettings):
        masking: str = Field(
            "layer_masking", description="layer_masking, no_padding, partial_convolution; of curves: any"
        )
        variant: Literal["main", "older"] | None = Field(
            None, description="rules of convolutions and joins; open: older for AlexNet and SqueezeNet"
        )
        strict_pool: bool = Field(False, description="hidden places take no part in a maximum")
        global_pool: Literal["visible", "plain"] | None = Field(
            None, description="the last mean: of visible places, or of all; open: plain for DenseNet"
        )
        model: str = Field("", description="of removal curves: the classifier, a run or a name as explain takes it")
        levels: list[float] = Field(
            [i / 10 for i in range(10)], description="shares of hidden regions on a removal curve"
        )

    def __init__(self, config: configs.Config | None = None):
        super().__init__(config or self.Config())
        self.user: UserModel | None = None
        self.network: nn.Module | None = None
        if self.config.model:  # type: ignore[attr-defined]
            self.user = open_model(self.config.model)  # type: ignore[attr-defined]
            self.network = self.user.module.requires_grad_(False)

    def asked(self, model: UserModel, draw: Draw) -> Any:
        """The masking of the config."""
        c: Any = self.config
        rules = {"variant": c.variant, "strict_pool": c.strict_pool, "global_pool": c.global_pool}
        given = rules if c.masking in LAYERED else {}
        return masking(c.masking, model, color=c.color, draw=Scoped(draw, "masking"), **given)

    def explain(
        self,
        model: UserModel,
        image: Tensor,
        target: int | None,
        draw: Draw,
        *,
        tell: Callable[[str], None] | None = None,
        segments: Tensor | None = None,
    ) -> Attribution:
        """Heat: each region's weight for the target (LIME). Raises ``UserError`` for a transformer, and for a layer without
        a rule."""
        system = self

        class Own(LimeExplainer):
            def asked(self, model: UserModel, draw: Draw) -> Any:
                return system.asked(model, draw)

        return Own(self.config).explain(model, image, target, draw, tell=tell, segments=segments)

    def loss(self, batch: Batch, draw: Draw, progress: Progress | None = None, phase: str = "main") -> Losses:
        raise UserError("layer_masking learns nothing: unmask explain MODEL photo.png --method layer_masking")

    def parameter_groups(self, phase: str = "main", layer_decay: float = 1.0) -> list[Any]:
        raise UserError("layer_masking learns nothing: unmask explain MODEL photo.png --method layer_masking")

    @torch.no_grad()
    def measure(
        self,
        data: Any,
        draw: Draw,
        *,
        limit: int | None = None,
        device: torch.device | None = None,
        tell: Callable[[str], None] | None = None,
        folder: Path | None = None,
    ) -> dict[str, Any]:
        """Removal curves of ``config.model`` on labelled images, squares hidden in random order. Raises ``UserError`` without a
        model, and for data without labels or with other classes."""
        c: Any = self.config
        if self.user is None:
            raise UserError("layer_masking measures a classifier: model=RUN (or timm/NAME, torchvision/NAME)")
        images, labels = labelled(self.user, data, limit, device)
        if int(labels.max()) >= len(self.user.classes or range(10**9)):
            raise UserError(f"{data.uri} has more classes than {self.user.name} ({len(self.user.classes or ())})")
        side = c.region_size or max(images.shape[-2] // 8, 1)
        segments = squares(tuple(images.shape[-2:]), side)
        curve = self.curve(self.user, images, labels, segments, draw, tell=tell)
        middle = min(range(len(curve.shares)), key=lambda i: abs(curve.shares[i] - 0.5))
        return {
            "accuracy": 100 * sum(curve.accuracy) / len(curve.accuracy),
            "entropy": curve.entropy[middle],
            "kept": 100 * sum(curve.kept) / len(curve.kept),
            "whole": 100 * curve.accuracy[0],
            "half": 100 * curve.accuracy[middle],
            "curve": curve.plain(),
            "samples": len(images),
        }

    def curve(
        self,
        model: UserModel,
        images: Tensor,
        labels: Tensor | None,
        segments: Tensor,
        draw: Draw,
        *,
        order: Order = "random",
        saliency: Tensor | None = None,
        similarity: Tensor | None = None,
        tell: Callable[[str], None] | None = None,
    ) -> Removal:
        """A removal curve under the config's masking. segments: ``[H, W]``; saliency: ``[N, F]`` where the order needs it."""
        c: Any = self.config
        rows = order_of(draw, len(images), count_of(segments), order, saliency)
        ask = self.asked(model, draw)
        return removal_curve(
            ask, images, labels, segments, rows, c.levels, batch_size=4 * c.batch_size, similarity=similarity, tell=tell
        )


def labelled(model: UserModel, data: Any, limit: int | None, device: torch.device | None) -> tuple[Tensor, Tensor]:
    """Images as the model takes them, and their labels. limit: a fixed random choice."""
    source = open_source(data.uri, data.split, columns=data.columns, limit=limit or data.limit)
    batches = Batches(source, data, 1, preprocessing=model.preprocessing)
    if batches.labels is None:
        raise UserError(f"{data.uri} has no labels: accuracy under a mask needs them")
    found = list(everything(batches, 256, device=device or "cpu"))
    return torch.cat([b["image"] for b in found]), torch.cat([b["label"].cpu() for b in found])
