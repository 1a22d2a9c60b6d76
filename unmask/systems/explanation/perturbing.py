"""Explaining by perturbing: LIME with any masking, one forward for a whole batch of masks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from unmask.config import Config, Field
from unmask.contracts import Attribution, Preprocessing
from unmask.data.showing import displayable, uint8_images
from unmask.draw import Draw, Scoped
from unmask.models import UserModel
from unmask.systems.explanation import lime
from unmask.systems.explanation.maskings import masking
from unmask.systems.explanation.regions import Kind, checked, count_of, painted, regions

Talk = Callable[[str], None]


class LimeSettings(Config):
    """How an image is cut into regions, and how often it is asked about."""

    masking: str = Field(
        "grey", description="what hidden regions become: layer_masking, token_dropping, grey, black, blur ..."
    )
    regions: Kind = Field("slic", description="slic and quickshift follow the picture; squares do not")
    region_size: int | None = Field(None, ge=1, description="pixels of a square's side; open: 1/14 of the height")
    n_segments: int | None = Field(
        None, ge=2, description="regions of SLIC, about; open: one in 200 pixels, 250 at most"
    )
    samples: int = Field(512, ge=8, description="masks that are asked about")
    share: float = Field(0.5, gt=0, lt=1, description="chance that a region stays visible")
    kernel_width: float = Field(
        0.25, gt=0, description="how fast a mask's weight falls with its distance to the whole image"
    )
    batch_size: int = Field(64, ge=1, description="masks in one forward")
    color: list[float] | None = Field(None, description="of masking=constant, in 0 ... 1")

    def segments(self, picture: np.ndarray) -> Tensor:
        """int64 ``[H, W]`` for a uint8 picture ``[H, W, 3]``."""
        pixels = picture.shape[0] * picture.shape[1]
        count = self.n_segments or min(max(pixels // 200, 16), 250)
        return checked(regions(picture, self.regions, side=self.region_size, n_segments=count))


class LimeExplainer:
    """LIME, ours: the regression of the ``lime`` package with any masking, in batches."""

    class Config(LimeSettings):
        pass

    def __init__(self, config: Any = None):
        self.config: Any = config or self.Config()

    def asked(self, model: UserModel, draw: Draw) -> Any:
        """The masking."""
        c = self.config
        return masking(c.masking, model, color=c.color, draw=Scoped(draw, "masking"))

    def explain(
        self,
        model: UserModel,
        image: Tensor,
        target: int | None,
        draw: Draw,
        *,
        tell: Talk | None = None,
        segments: Tensor | None = None,
    ) -> Attribution:
        """Heat: each region's weight for the target. image: standardised ``[C, H, W]``; target: a class, None for the likeliest.
        segments: regions to use instead of the config's, int64 ``[H, W]``."""
        c = self.config
        ask = self.asked(model, draw)
        if hasattr(ask, "verify"):
            ask.verify(image[None])
        if segments is None:
            segments = c.segments(picture_of(image, model.preprocessing))
        segments = checked(segments, image.shape[-2:]).cpu()
        rows = lime.presence(draw, c.samples, count_of(segments), c.share)
        found = lime.answers(ask, image, rows, segments, batch_size=c.batch_size, tell=tell)
        label = int(found[0].argmax()) if target is None else target
        fit = lime.fit(rows, found, [label], kernel_width=c.kernel_width)
        notes = {**lime.summary(fit), "regions": count_of(segments), "samples": c.samples, "masking": c.masking}
        return Attribution(
            painted(fit.weights[0], segments), label, {**notes, "weights": fit.weights[0], "segments": segments}
        )


def picture_of(image: Tensor, preprocessing: Preprocessing | None) -> np.ndarray:
    """A standardised image as a person sees it, uint8 ``[H, W, 3]``."""
    known = preprocessing if preprocessing is not None else Preprocessing(channels=image.shape[0])
    return uint8_images(displayable(image[None], known))[0]


def likeliest(model: UserModel, image: Tensor) -> Tensor:
    """Probabilities ``[K]`` for the whole image."""
    with torch.no_grad():
        return model.scores(image=image[None]).float().softmax(dim=1)[0].cpu()
