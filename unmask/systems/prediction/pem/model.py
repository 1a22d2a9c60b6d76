"""PEM: prototype-based efficient MaskFormer. Cavagnero, Rosi, Cuttano, Pistilli, Ciccone, Averta, Cermelli, CVPR 2024,
arXiv:2402.19422.

A convolutional network and a light pyramid make a mask feature map; learned queries each predict one class and one binary
mask of it. Instead of attending to all pixels, a query looks, in every head, at its one most similar pixel.

    model = PEM(PEM.Config(backbone="stdc1", classes=19))
    loss = model.loss({"image": images, "map": labels}, draw=Seeded(0))["loss"]     # a bare PyTorch loop is enough

Legend: images ``[B, 3, H, W]``, standardised; K classes, Q queries, M mask channels; maps of labels int64, -1 = ignored.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from unmask.backbones import BackboneConfig, build_encoder
from unmask.config import Config, Field, validated
from unmask.contracts import Batch, DataFacts, Encoder, Group, Losses, Picture, Progress, Trainable, TrainingBatches
from unmask.data.maps import SegmentationBatches, SegmentationData
from unmask.draw import Draw
from unmask.errors import UserError, nearest
from unmask.nn.pyramid import SimplePyramid, is_pyramid, padded_to, pyramid_scales
from unmask.official.hub import load_encoder
from unmask.systems.prediction.mask_losses import MaskLoss, MaskLossConfig
from unmask.systems.prediction.mask_targets import MaskTargets
from unmask.systems.prediction.pem.answers import Ask, answers
from unmask.systems.prediction.pem.head import HeadConfig, PEMHead
from unmask.systems.prediction.pem.query_decoder import Predictions
from unmask.systems.prediction.segmentation import Segmentation
from unmask.systems.prediction.transfer import backbone_of, transfer


class PEM(Trainable):
    slug = "pem"
    loss_units = "class, mask and Dice losses of all layers, weighted"
    measures = {"pq": "panoptic quality, %", "miou": "mean IoU, %"}
    Data = SegmentationData
    Ask = Ask
    encoder: Encoder

    class Config(HeadConfig):
        backbone: BackboneConfig = Field(
            BackboneConfig(name="stdc1"), description="stdc1, stdc2, timm/resnet50 ..., or a plain ViT"
        )
        classes: int | tuple[str, ...] | None = Field(None, description="their names or number; from the data if open")
        things: tuple[str | int, ...] | None = Field(
            None, description="names or numbers of classes that are countable objects; from the data if open"
        )
        init: str | None = Field(None, description="a run or encoder folder: its backbone and weights are taken")
        backbone_lr: float = Field(0.1, ge=0, description="learning rate of the backbone, as a share of the others'")
        frozen_norm: bool = Field(False, description="keep the backbone's batch statistics and scales as they are")
        deep_supervision: bool = Field(True, description="also every layer before the last predicts and is corrected")
        loss: MaskLossConfig = Field(MaskLossConfig(), description="weights and points of matching and losses")

    config: Config

    def __init__(self, config: Config, encoder: Encoder | None = None):
        """encoder: used as it is instead of the one that ``config.backbone`` names."""
        super().__init__(config)
        if config.classes is None:
            raise UserError("pem: classes is open: give their number or names (classes=19), or data with label maps")
        self.encoder = build_encoder(config.backbone) if encoder is None else encoder
        self.pyramid, dims, self.divisor = pyramid_of(self.encoder)
        self.things = thing_numbers(config.things or (), self.classes)
        self.head = PEMHead(config, dims, len(self.classes))
        self.criterion = MaskLoss(config.loss, len(self.classes))
        if config.frozen_norm:
            for module in batch_norms(self.encoder):
                module.requires_grad_(False)
        self._said_too_many = False

    @property
    def classes(self) -> tuple[str, ...]:
        """The names of the classes; numbers where only their number is known."""
        known = self.config.classes
        return tuple(str(i) for i in range(known)) if isinstance(known, int) else tuple(known or ())

    # --- construction ---
    @classmethod
    def open_batches(cls, config: Config, data: SegmentationData, batch_size: int, seed: int) -> TrainingBatches:
        return SegmentationBatches(data, batch_size, seed)

    @classmethod
    def adapted(cls, config: Config, facts: DataFacts) -> Config:  # type: ignore[override]
        values: dict[str, Any] = {}
        if config.classes is None:
            if not facts.classes:
                raise UserError(f"pem needs label maps, {facts.uri or 'the data'} has none")
            values["classes"] = facts.classes
        if config.things is None and facts.extra.get("things"):
            values["things"] = tuple(facts.extra["things"])
        backbone = config.backbone.model_dump(exclude_none=True)
        if config.init:
            backbone = backbone_of(config.init, backbone, free=("drop_path",))
        backbone.setdefault("in_channels", facts.channels)
        backbone.setdefault("image_size", facts.image_size)
        values["backbone"] = {k: v for k, v in backbone.items() if v is not None}
        return validated(cls.Config, {**config.model_dump(exclude_unset=True), **values}, where=cls.slug)

    @classmethod
    def check_batch(cls, config: Config, size: int) -> None:  # type: ignore[override]
        if config.norm == "bn" and size < 2:
            raise UserError(
                "pem needs at least 2 images a step on each process (batch norm over pooled features): raise the batch or "
                "use norm=gn"
            )

    @classmethod
    def build(cls, config: Config, sources: Mapping[str, Path] | None = None) -> PEM:  # type: ignore[override]
        """The system, its encoder with the weights that ``init`` (or an earlier stage named "init") holds. They are then its
        own: its config names them no more."""
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
    def maps(self, images: Tensor, draw: Draw | None = None) -> list[Tensor]:
        """Four maps, finest first, each half as fine as the one before. Sides must be divisible by ``divisor``."""
        found = self.encoder.maps(images, draw=draw)
        return found if self.pyramid is None else self.pyramid(found[-1])

    def predictions(self, images: Tensor, draw: Draw | None = None) -> Predictions:
        """What the queries say, of images that are padded where they need to be (with the mean colour, right and below)."""
        return self.head(self.maps(padded_to(images, self.divisor), draw))

    def loss(self, batch: Batch, draw: Draw, progress: Progress | None = None, phase: str = "main") -> Losses:
        images = batch["image"]
        targets = MaskTargets.of_batch(batch, len(self.classes))
        self._say_too_many(targets)
        found = self.predictions(images, draw)
        masks = padded_to(targets.masks, self.divisor, False)  # type: ignore[arg-type]
        layers = found.layers(deep=self.config.deep_supervision)
        losses = self.criterion(layers, replace(targets, masks=masks), draw)
        shown = ("loss", "loss_ce", "loss_mask", "loss_dice")  # of the last layer: the others would fill a page
        return {name: losses[name] for name in shown}

    def _say_too_many(self, targets: MaskTargets) -> None:
        most = max(targets.counts, default=0)
        if most > self.config.queries and not self._said_too_many:
            self._said_too_many = True
            warnings.warn(
                f"pem: an image has {most} masks, more than the {self.config.queries} queries: the rest is not learnt; "
                f"use queries={most} or more",
                stacklevel=3,
            )

    def parameter_groups(self, phase: str = "main", layer_decay: float = 1.0) -> list[Group]:
        """The authors': the backbone's rate is smaller; norms and tables (queries, levels, positions) do not decay, everything
        else does, biases too."""
        spared = {f"encoder.{n}" for n in self.encoder.no_weight_decay()}
        for name, module in self.named_modules():
            if isinstance(module, nn.Embedding) or "Norm" in type(module).__name__:
                spared |= {f"{name}.{n}" for n, _ in module.named_parameters(recurse=False)}
        last = self.encoder.num_layers + 1
        groups: dict[tuple[float, float], Group] = {}
        for name, parameter in self.named_parameters():
            if not parameter.requires_grad:
                continue
            scale = 1.0
            if name.startswith("encoder."):
                scale = self.config.backbone_lr * layer_decay ** (last - self.depth_of(name))
            decay = 0.0 if name in spared else 1.0
            group = groups.setdefault((scale, decay), Group([], [], scale, decay))
            group.names.append(name)
            group.parameters.append(parameter)
        return list(groups.values())

    def train(self, mode: bool = True) -> PEM:
        super().train(mode)
        if mode and self.config.frozen_norm:
            for module in batch_norms(self.encoder):
                module.eval()
        return self

    def blocks_to_compile(self) -> list[nn.Module]:
        return list(self.encoder.blocks_to_compile())  # queries guide one another by indices, which break graphs

    # --- telling a person ---
    @torch.no_grad()
    def preview(self, batch: Batch, draw: Draw, progress: Progress | None = None) -> list[Picture]:
        from unmask.systems.prediction.pem.measuring import preview

        return [preview(self, batch)]

    @torch.no_grad()
    def measure(
        self,
        data: SegmentationData,
        draw: Draw,
        *,
        limit: int | None = None,
        device: torch.device | None = None,
        tell: Callable[[str], None] | None = None,
        folder: Path | None = None,
    ) -> dict[str, Any]:
        """mIoU, and PQ where the data tell objects apart, at the images' own size; a number a class; images a second."""
        from unmask.systems.prediction.pem.measuring import measure

        return measure(self, data, limit=limit, device=device, tell=tell, folder=folder)

    # --- predicting ---
    @torch.no_grad()
    def predict(self, inputs: list[Any], **options: Any) -> list[Segmentation]:
        """Segmentations of files, Pillow images, arrays or tensors of any size, in order. options: see :class:`Ask`.

        What is taken: :func:`unmask.systems.prediction.inputs.read_image`. Raises ``UserError`` naming an input that cannot
        be read, or an option that does not fit."""
        ask = validated(Ask, options, where="predict")
        training = self.training
        self.eval()
        try:
            return answers(self, inputs, ask)
        finally:
            self.train(training)


def pyramid_of(encoder: Encoder) -> tuple[SimplePyramid | None, tuple[int, ...], int]:
    """What makes four maps of an encoder's (None where it gives four by itself), their channels, and what must divide an
    image's sides. Raises ``UserError`` for an encoder whose maps are neither a pyramid nor of one size."""
    strides = tuple(encoder.strides)
    if is_pyramid(strides):
        return None, tuple(encoder.map_dims), strides[-1]
    if len(set(strides)) == 1 and len(set(encoder.patch_size)) == 1:
        scales = pyramid_scales(strides[0])
        pyramid = SimplePyramid(encoder.map_dims[-1], scales)
        return pyramid, pyramid.map_dims, round(strides[0] / scales[-1])
    raise UserError(
        f"pem needs four maps, each half as fine as the one before, {encoder.name or type(encoder).__name__} has strides "
        f"{list(strides)}: use stdc1, timm/resnet50, swin_tiny or a plain vit_*"
    )


def thing_numbers(things: tuple[str | int, ...], classes: tuple[str, ...]) -> tuple[int, ...]:
    """Class numbers of names and numbers. Raises ``UserError`` for one that is no class."""
    known = {name: i for i, name in enumerate(classes)}
    out = set()
    for thing in things:
        place = known.get(thing) if isinstance(thing, str) else thing
        if place is None or not 0 <= place < len(classes):
            raise UserError(f"things names {thing!r}, no class of this model: {nearest(str(thing), known)}")
        out.add(place)
    return tuple(sorted(out))


def batch_norms(module: nn.Module) -> list[nn.Module]:
    return [m for m in module.modules() if isinstance(m, _BatchNorm)]
