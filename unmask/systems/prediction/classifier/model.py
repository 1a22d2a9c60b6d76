"""Supervised classification with any backbone: the baseline of every system, and the fine-tuning of every encoder.

Pool what the encoder gives, one linear layer, cross-entropy against labels that may be smoothed and mixed.

    model = Classifier(Classifier.Config(backbone="vit_small_patch16", classes=10))
    loss = model.loss({"image": images, "label": labels}, draw=Seeded(0))["loss"]     # a bare PyTorch loop is enough

``init=FOLDER`` starts from the encoder of a run. No paper of its own; the defaults are MAE's fine-tuning
(He et al. 2022, appendix A.1).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from unmask.backbones import BackboneConfig, build_encoder
from unmask.config import Config, Field
from unmask.contracts import Batch, DataFacts, Encoder, Losses, Picture, Progress, Trainable
from unmask.data.mixing import Mixing, mix
from unmask.data.showing import displayable, uint8_images
from unmask.draw import Draw
from unmask.errors import UserError
from unmask.official.hub import load_encoder
from unmask.systems.prediction.inputs import fit_channels, preprocessing_of, read_image, standardised
from unmask.systems.prediction.results import Scores, bars
from unmask.systems.prediction.transfer import backbone_of, transfer

SOFT = ("drop_path", "position", "relative")  # a backbone's options that fine-tuning may choose anew


class Classifier(Trainable):
    slug = "classifier"
    loss_units = "nats (cross-entropy)"
    encoder: Encoder

    class Config(Config):
        backbone: BackboneConfig = BackboneConfig(name="vit_base_patch16")
        classes: int | tuple[str, ...] | None = Field(None, description="their names or number; from the data if open")
        init: str | None = Field(
            None,
            description="a run or encoder folder: its backbone and weights are taken (drop_path, position: from here)",
        )
        pool: Literal["mean", "cls"] = Field("mean", description="mean of the patch tokens, or the class token")
        fc_norm: bool | None = Field(
            None, description="LayerNorm on the mean instead of the encoder's last norm; open: for plain ViTs"
        )
        head_std: float = Field(2e-5, gt=0, description="truncated normal of the linear layer's weights")
        smoothing: float = Field(0.1, ge=0, lt=1, description="share of each label spread over all classes")
        mixup: float = Field(0.8, ge=0, description="Beta parameter of mixup, 0 for none")
        cutmix: float = Field(1.0, ge=0, description="Beta parameter of cutmix, 0 for none")
        mix_share: float = Field(1.0, ge=0, le=1, description="share of batches that are mixed")
        cutmix_share: float = Field(
            0.5, ge=0, le=1, description="share of mixed batches that take cutmix, where both are on"
        )
        freeze: bool = Field(False, description="train the head alone")

    def __init__(self, config: Config, encoder: Encoder | None = None):
        """encoder: used as it is instead of the one that ``config.backbone`` names."""
        super().__init__(config)
        if config.classes is None:
            raise UserError("classifier: classes is open: give their number or names (classes=10), or data with labels")
        self.encoder = build_encoder(config.backbone) if encoder is None else encoder
        if config.pool == "cls" and not self.encoder.prefix_tokens:
            raise UserError(f"classifier: {config.backbone.name} has no class token: use pool=mean")
        own_norm = config.fc_norm
        if own_norm is None:
            own_norm = config.pool == "mean" and bool(getattr(_config_of(self.encoder), "final_norm", False))
        if own_norm:
            drop_final_norm(self.encoder)
        self.fc_norm = nn.LayerNorm(self.encoder.embed_dim, eps=1e-6) if own_norm else None
        self.head = nn.Linear(self.encoder.embed_dim, len(self.classes))
        nn.init.trunc_normal_(self.head.weight, std=config.head_std)
        nn.init.zeros_(self.head.bias)
        if config.freeze:
            self.encoder.requires_grad_(False).eval()

    @property
    def classes(self) -> tuple[str, ...]:
        """The names of the classes; numbers where only their number is known."""
        known = self.config.classes
        return tuple(str(i) for i in range(known)) if isinstance(known, int) else tuple(known or ())

    # --- construction ---
    @classmethod
    def adapted(cls, config: Config, facts: DataFacts) -> Config:  # type: ignore[override]
        values: dict[str, Any] = {}
        if config.classes is None:
            if not facts.classes:
                raise UserError(
                    f"classifier needs labels, {facts.uri or 'the data'} has none: name the column, or give class sub-folders"
                )
            values["classes"] = facts.classes
        backbone = config.backbone.model_dump(exclude_none=True)
        if config.init:
            backbone = backbone_of(config.init, backbone, free=SOFT, drop=("final_norm",))
        backbone.setdefault("in_channels", facts.channels)
        backbone.setdefault("image_size", facts.image_size)
        values["backbone"] = {k: v for k, v in backbone.items() if v is not None}
        return cls.Config.model_validate({**config.model_dump(exclude_unset=True), **values})

    @classmethod
    def check_batch(cls, config: Config, size: int) -> None:  # type: ignore[override]
        if size % 2 and (config.mixup or config.cutmix) and config.mix_share:
            raise UserError(
                f"mixup and cutmix pair samples, and a batch of {size} is odd: use an even batch on each process, "
                "or mixup=0 cutmix=0"
            )

    @classmethod
    def build(cls, config: Config, sources: Mapping[str, Path] | None = None) -> Classifier:  # type: ignore[override]
        """The classifier with the weights that ``init`` (or an earlier stage named "init") holds. They are then its own:
        its config names them no more."""
        folder = (sources or {}).get("init") or config.init
        model = cls(config)
        if folder:
            source = load_encoder(folder)
            transfer(model.encoder, source, where=folder)
            if source.preprocessing is not None and model.encoder.preprocessing is None:
                model.encoder.preprocessing = source.preprocessing
            model.config = config.model_copy(update={"init": None})
        return model

    # --- learning ---
    def features(self, images: Tensor, draw: Draw | None = None) -> Tensor:
        """``[B, D]``, what the linear layer sees."""
        if self.config.pool == "cls":
            pooled = self.encoder.tokens(images, draw=draw)[:, 0]
        elif self.fc_norm is not None:
            pooled = self.encoder.tokens(images, draw=draw)[:, self.encoder.prefix_tokens :].mean(dim=1)
        else:
            pooled = self.encoder.pooled(images, draw=draw)
        return pooled if self.fc_norm is None else self.fc_norm(pooled)

    def logits(self, images: Tensor, draw: Draw | None = None) -> Tensor:
        """``[B, K]`` for standardised images ``[B, C, H, W]``."""
        return self.head(self.features(images, draw))

    def loss(self, batch: Batch, draw: Draw, progress: Progress | None = None, phase: str = "main") -> Losses:
        """Mean cross-entropy; labels are smoothed and mixed while training only. ``top1`` counts against the heavier
        label of a mixed image."""
        images, targets = self._targets(batch, draw)
        logits = self.logits(images, draw).float()
        loss = F.cross_entropy(logits, targets)
        heavier = targets if targets.ndim == 1 else targets.argmax(dim=1)
        return {"loss": loss, "top1": (logits.detach().argmax(dim=1) == heavier).float().mean()}

    def _targets(self, batch: Batch, draw: Draw) -> tuple[Tensor, Tensor]:
        """Images and what to answer: int64 ``[B]``, or shares ``[B, K]`` where labels are smoothed or mixed."""
        if batch.get("label") is None:
            raise UserError("classifier needs labels, this data has none: name the column, or give class sub-folders")
        images, labels, c = batch["image"], batch["label"], self.config
        if not self.training or not (c.smoothing or ((c.mixup or c.cutmix) and c.mix_share)):
            return images, labels
        mixing = Mixing(
            mixup=c.mixup,
            cutmix=c.cutmix,
            probability=c.mix_share,
            switch_probability=c.cutmix_share,
            label_smoothing=c.smoothing,
        )
        return mix(images, labels, len(self.classes), draw, mixing)

    def train(self, mode: bool = True) -> Classifier:
        super().train(mode)
        if self.config.freeze:
            self.encoder.eval()
        return self

    # --- telling a person ---
    def references(self, batch: Batch, draw: Draw, progress: Progress | None = None) -> Losses:
        """The loss of answering the same for every image: all classes alike, or each as often as it occurs here."""
        with torch.no_grad():
            _, targets = self._targets(batch, draw)
            shares = targets if targets.ndim == 2 else F.one_hot(targets, len(self.classes)).float()
            often = shares.mean(dim=0)
            entropy = -(often * often.clamp_min(1e-12).log()).sum()
        return {
            "all classes alike": torch.full_like(entropy, math.log(len(self.classes))),
            "how often each class occurs": entropy,
        }

    @torch.no_grad()
    def preview(self, batch: Batch, draw: Draw, progress: Progress | None = None) -> list[Picture]:
        images = batch["image"][:8]
        probabilities = self.logits(images).float().softmax(dim=1).cpu()
        labels = batch["label"][:8].tolist() if batch.get("label") is not None else [None] * len(images)
        rows = []
        for image, scores, label in zip(
            uint8_images(displayable(images, self.encoder.preprocessing)), probabilities, labels, strict=True
        ):
            right = None if label is None else self.classes[label]
            ranked = Scores(scores, self.classes).top(5)
            rows.append([np.asarray(image), np.asarray(bars(ranked, size=160, right=right))])
        return [Picture("answers", ["image", "likeliest classes"], rows, "The true class is drawn in green.")]

    # --- predicting ---
    @torch.no_grad()
    def predict(self, inputs: list[Any], *, batch_size: int = 32) -> list[Scores]:
        """Probabilities of the classes for files, Pillow images, arrays or tensors, one result an input, in order.

        What is taken: :func:`unmask.systems.prediction.inputs.read_image`. Raises ``UserError`` naming an input that
        cannot be read."""
        preprocessing = preprocessing_of(self.encoder)
        device = self.head.weight.device
        training = self.training
        self.eval()
        results: list[Scores] = []
        for start in range(0, len(inputs), batch_size):
            read = [read_image(x, start + i) for i, x in enumerate(inputs[start : start + batch_size])]
            images = standardised([fit_channels(a, preprocessing.channels, n) for a, n in read], preprocessing)
            probabilities = self.logits(images.to(device)).float().softmax(dim=1).cpu()
            seen = uint8_images(displayable(images, preprocessing))
            results += [
                Scores(p, self.classes, source=name, image=picture)
                for p, (_, name), picture in zip(probabilities, read, seen, strict=True)
            ]
        self.train(training)
        return results


def _config_of(encoder: Encoder) -> Any:
    return getattr(encoder, "config", None)


def drop_final_norm(encoder: Encoder) -> None:
    """Take the encoder's last norm away, as its option ``final_norm=False`` would. Raises ``UserError`` if it has none."""
    config = _config_of(encoder)
    if not getattr(config, "final_norm", False):
        raise UserError(
            f"classifier: fc_norm replaces an encoder's last norm, {encoder.name} has no option final_norm: use fc_norm=false"
        )
    encoder.norm = nn.Identity()
    encoder.config = config.model_copy(update={"final_norm": False})
    encoder.options = {**encoder.options, "final_norm": False}
