"""Masks of an image classifier."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from unmask.config import Field
from unmask.contracts import Batch, DataFacts
from unmask.data import Batches, DataSettings
from unmask.data import open as open_data
from unmask.data.batches import everything
from unmask.data.mixing import Mixing, mix
from unmask.draw import Draw
from unmask.errors import UserError
from unmask.models import UserModel, open_model
from unmask.systems.compression.maskllm.model import MaskLLM


class MaskedClassifier(MaskLLM):
    """The same on an image classifier (the authors' vision code): cross-entropy with smoothing, mixup and CutMix."""

    loss_units = "cross-entropy, less the weight regulariser"
    Data: ClassVar[Any] = DataSettings
    measures: ClassVar = {"top1": "top-1 accuracy, learned masks"}
    lower_is_better = frozenset()

    class Config(MaskLLM.Config):
        mixup: float = Field(0.0, ge=0, description="alpha of mixup; 0: none")
        cutmix: float = Field(0.0, ge=0, description="alpha of CutMix; 0: none")
        smoothing: float = Field(0.1, ge=0, lt=1, description="label smoothing")

    @classmethod
    def opened(cls, config: Any) -> UserModel:
        if not config.model:
            raise UserError("maskllm needs a trained model: model=RUN, timm/NAME or torchvision/NAME")
        found = open_model(config.model)
        if found.kind != "image classifier" or not found.classes:
            raise UserError(f"{config.model} is a {found.kind}: the vision recipe masks image classifiers")
        return found

    @classmethod
    def open_batches(cls, config: Any, data: Any, batch_size: int, seed: int) -> Any:
        source = open_data(data.uri, data.split, columns=data.columns, limit=data.limit)
        known = cls.opened(config)
        if source.classes is None or tuple(source.classes) != tuple(known.classes or ()):
            raise UserError(
                f"{data.uri} has other classes than {config.model}: it takes labelled data of the same classes"
            )
        return Batches(source, data, batch_size, seed, preprocessing=known.preprocessing)

    @classmethod
    def adapted(cls, config: Any, facts: DataFacts) -> Any:
        return config.model_copy(update={"data": config.data or {"uri": facts.uri}})

    def calibration(self) -> list[Batch]:
        source = open_data(self.config.data["uri"], "train", limit=self.config.calibration)
        return list(everything(source, 32, preprocessing=self.user.preprocessing))

    def task(self, batch: Batch, draw: Draw) -> Tensor:
        c, images, labels = self.config, batch["image"], batch["label"]
        classes = len(self.user.classes or ())
        if self.training and (c.mixup or c.cutmix):
            settings = Mixing(mixup=c.mixup, cutmix=c.cutmix, label_smoothing=c.smoothing)
            images, soft = mix(images, labels, classes, draw, settings)
            return F.cross_entropy(self.answer({**batch, "image": images}).float(), soft)
        return F.cross_entropy(self.answer(batch).float(), labels, label_smoothing=c.smoothing)

    def scorer(self, data: Any, limit: int | None, device: torch.device | None) -> Callable[[], dict[str, Any]]:
        source = open_data(data.uri, data.split, columns=data.columns, limit=limit or data.limit)

        def score() -> dict[str, Any]:
            right = count = 0
            for batch in everything(source, 128, preprocessing=self.user.preprocessing, device=device or "cpu"):
                answers = self.answer(batch).argmax(dim=1)
                right += int((answers == batch["label"]).sum())
                count += len(answers)
            return {"top1": right / max(count, 1), "samples": count}

        return score
