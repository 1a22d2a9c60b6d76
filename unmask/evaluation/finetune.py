"""Fine-tuning as a probe: the whole encoder learns the labels, by the supervised classifier and the engine."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from unmask.backbones import build
from unmask.config import validated
from unmask.contracts import Batch, DataFacts, Encoder, Preprocessing
from unmask.data.batches import Batches
from unmask.data.order import shuffled, some_of
from unmask.data.settings import DataSettings
from unmask.draw import Draw
from unmask.engine.display import SilentDisplay
from unmask.engine.settings import TrainSettings
from unmask.engine.stages import Stage, train
from unmask.errors import UserError
from unmask.evaluation.features import autocast, evaluating, fitting_batch
from unmask.evaluation.samples import Samples, transform_of
from unmask.official.load import load_strict, read_checkpoint
from unmask.systems.prediction.classifier.model import Classifier
from unmask.systems.prediction.transfer import transfer


def finetune(
    encoder: Encoder,
    train_data: Samples,
    test_data: Samples,
    *,
    classes: tuple[str, ...],
    preprocessing: Preprocessing | None = None,
    seed: int = 0,
    folder: str | Path | None = None,
    tell: Callable[[str], None] | None = None,
    model: Mapping[str, Any] | None = None,
    data_options: Mapping[str, Any] | None = None,
    precision: str = "auto",
    **options: Any,
) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """Scores ``[M, K]`` and labels of the test images after fine-tuning a copy of the encoder, and the settings used.

    options: train settings (epochs=50, steps, batch_size, base_lr, layer_decay, ema ...); model: the classifier's options
    (mixup, cutmix, smoothing, pool ...); data_options: data settings (augment, rand_augment, erase ...). Defaults: MAE's
    (He et al. 2022, appendix A.2) with 50 epochs, a tenth of them warm-up, and a batch that a small data set allows.
    folder: where the run is kept; default nowhere. Raises ``UserError`` for options that do not exist, and for streams.
    """
    if train_data.count is None:
        raise UserError(f"{train_data.uri} streams: fine-tune on it with `unmask train {Classifier.slug} init=RUN`")
    settings = _train_settings(encoder, train_data.count, seed, precision, options)
    batches = _batches(train_data, settings, preprocessing, seed, data_options)
    made: list[Classifier] = []

    def new() -> Classifier:
        made.append(classifier_around(encoder, classes, model))
        return made[0]

    with tempfile.TemporaryDirectory() as temporary:
        out = Path(folder) if folder is not None else Path(temporary) / "finetune"
        describe = {
            "system": Classifier.slug,
            "title": "Fine-tuning",
            "recipe": "finetune",
            "command": [],
            "config": {},
        }
        train([Stage("finetune", new, batches, settings)], out, describe=describe, display=_Told(tell, settings))
        load_strict(made[0], read_checkpoint(out / "model" / "model.safetensors"), where=out / "model")
    scores, labels = scores_of(made[0], test_data, preprocessing or batches.preprocessing, precision)
    return scores, labels, _told_settings(settings, made[0], data_options)


def classifier_around(
    encoder: Encoder, classes: tuple[str, ...], options: Mapping[str, Any] | None = None
) -> Classifier:
    """A classifier with a copy of the encoder's weights, and drop path 0.1 where the encoder has such an option."""
    options = dict(options or {})
    own = {
        "name": encoder.name or "given",
        **{k: v for k, v in getattr(encoder, "options", {}).items() if k not in ("pretrained", "weights")},
    }
    if encoder.name and hasattr(getattr(encoder, "config", None), "drop_path"):
        own["drop_path"] = options.pop("drop_path", 0.1)
    config = validated(Classifier.Config, {"backbone": own, "classes": classes, **options}, where=Classifier.slug)
    if not encoder.name:  # an encoder from elsewhere: nothing can build it again, so a copy is trained as it is
        return Classifier(config, encoder=copy.deepcopy(encoder).requires_grad_(True))
    inner = build(config.backbone.name, **config.backbone.options)
    transfer(inner, encoder, where=encoder.name)
    inner.preprocessing = encoder.preprocessing
    return Classifier(config, encoder=inner)


def _train_settings(
    encoder: Encoder, count: int, seed: int, precision: str, options: Mapping[str, Any]
) -> TrainSettings:
    batch = min(max(2 ** int(np.log2(max(count / 8, 1))), 8), 256, max(count // 2 * 2, 2))  # even: mixup pairs samples
    values: dict[str, Any] = {
        "batch_size": batch,
        "base_lr": 1e-3,
        "betas": (0.9, 0.999),
        "weight_decay": 0.05,
        "min_lr": 1e-6,
        "layer_decay": 0.75 if encoder.num_layers >= 24 else 0.65,
        "save_every": 0,
        "preview_every": 0,
        "reference_every": 0,
        "probe_every": 0,
        "seed": seed,
        "precision": precision,
        "device": str(next(encoder.parameters()).device),
        **options,
    }
    if values.get("steps") is None:
        values.setdefault("epochs", 50)
        values.setdefault("warmup_epochs", values["epochs"] / 10)
    else:
        values.setdefault("warmup_steps", values["steps"] // 10)
    return validated(TrainSettings, values, where="finetune")


def _batches(
    data: Samples,
    settings: TrainSettings,
    preprocessing: Preprocessing | None,
    seed: int,
    options: Mapping[str, Any] | None,
) -> _Chosen | _TensorBatches:
    if data.images is not None:
        chosen = validated(DataSettings, {"augment": "shift_flip", **(options or {})}, where="finetune data")
        return _TensorBatches(data, chosen, settings.batch_size, seed, preprocessing)
    colours = (data.facts.channels if data.facts else 3) in (1, 3)
    values = {"augment": "rand_augment" if colours else "crop_flip", "erase": 0.25, "uri": data.uri, **(options or {})}
    return _Chosen(
        data, validated(DataSettings, values, where="finetune data"), settings.batch_size, seed, preprocessing
    )


class _Chosen(Batches):
    """Batches of some of a source's images."""

    def __init__(
        self, data: Samples, settings: DataSettings, batch_size: int, seed: int, preprocessing: Preprocessing | None
    ):
        super().__init__(data.source, settings, batch_size, seed, preprocessing=preprocessing)  # type: ignore[arg-type]
        self.numbers = np.arange(len(self.images)) if data.ids is None else data.ids.numpy()
        self.facts = replace(self.facts, count=len(self.numbers))

    def order(self, epoch: int) -> np.ndarray:  # type: ignore[override]
        return self.numbers[shuffled(len(self.numbers), seed=(self.seed << 24) ^ epoch)]


class _TensorBatches:
    """Batches of images that lie in memory, in the shape the engine takes."""

    def __init__(
        self, data: Samples, settings: DataSettings, batch_size: int, seed: int, preprocessing: Preprocessing | None
    ):
        assert data.images is not None
        self.data, self.batch_size, self.seed = data, batch_size, seed
        self.numbers = torch.arange(len(data.images)) if data.ids is None else data.ids
        self.apply = transform_of(data.images, preprocessing, settings)
        self.preprocessing = self.apply.preprocessing
        size, channels = tuple(self.preprocessing.image_size), self.preprocessing.channels
        self.facts = DataFacts("tensors", len(self.numbers), channels, size, data.classes)
        self.steps_per_epoch = max(len(self.numbers) // batch_size, 1)

    def iterate(
        self, start_step: int = 0, *, rank: int = 0, world: int = 1, accumulate: int = 1, state: Any = None
    ) -> Iterator[Batch]:
        share, step = self.batch_size // (world * accumulate), start_step
        while True:
            epoch, place = divmod(step, self.steps_per_epoch)
            order = torch.from_numpy(shuffled(len(self.numbers), seed=(self.seed << 24) ^ epoch))
            chosen = order[place * self.batch_size : (place + 1) * self.batch_size]
            for micro in range(accumulate):
                first = (micro * world + rank) * share
                yield self.raw(chosen[first : first + share])
            step += 1

    def raw(self, places: Tensor) -> Batch:
        assert self.data.images is not None
        assert self.data.labels is not None
        numbers = self.numbers[places]
        return {"image": self.data.images[numbers], "label": self.data.labels[places], "index": numbers}

    def transform(self, batch: Batch, draw: Draw | None = None, *, train: bool = True) -> dict[str, Any]:
        return self.apply(batch, draw, train=train)

    def samples(self, n: int) -> dict[str, Any]:
        count = len(self.numbers)
        n = min(n, count)
        return self.transform(self.raw(torch.from_numpy(some_of(count, n))), train=False)

    def state_dict(self) -> dict[str, Any]:
        return {}


@torch.no_grad()
def scores_of(
    model: Classifier, data: Samples, preprocessing: Preprocessing | None, precision: str = "auto"
) -> tuple[Tensor, Tensor]:
    """Logits ``[M, K]`` and labels ``[M]`` of all samples, on the CPU."""
    device = model.head.weight.device
    scores, labels = [], []
    with evaluating(model), autocast(device, precision):
        for batch in data.batches(preprocessing, fitting_batch(model.encoder.image_size)):
            scores.append(model.logits(batch["image"].to(device)).float().cpu())
            labels.append(batch["label"].cpu())
    return torch.cat(scores), torch.cat(labels)


def _told_settings(settings: TrainSettings, model: Classifier, data: Mapping[str, Any] | None) -> dict[str, Any]:
    names = ("steps", "epochs", "batch_size", "base_lr", "lr", "weight_decay", "layer_decay", "ema")
    train_values = {n: v for n, v in settings.plain().items() if n in names and v is not None}
    own = {n: getattr(model.config, n) for n in ("pool", "smoothing", "mixup", "cutmix")}
    return {"train": train_values, "model": own, "data": dict(data or {})}


class _Told(SilentDisplay):
    """Passes a line on now and then."""

    def __init__(self, tell: Callable[[str], None] | None, settings: TrainSettings):
        self.tell, self.steps = tell, settings.steps or 0

    def start(self, title: str, steps: int, done: int) -> None:
        self.steps = steps

    def step(self, done: int) -> None:
        if self.tell is not None and done % 10 == 0:
            self.tell(f"fine-tuning: step {done} of {self.steps}")
