"""From a system, a recipe and words to validated settings: what exactly a training will do.

Later layers win: recipe < what the data tells (``auto``, channels, classes) < options < ``key=value`` words.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from unmask.api import auto, recipes
from unmask.api.layers import Layer, data_class, in_proportion, lay, refuse_changes, size_of, sort_words, without_none
from unmask.api.machine import check_device, machine
from unmask.catalog import Card, cards, load_entry
from unmask.config import Config, validated
from unmask.contracts import Encoder, Trainable, TrainingBatches
from unmask.data import Batches, DataSettings, Source
from unmask.data import open as open_data
from unmask.data.opening import LEARN, own_test
from unmask.data.source import skipped_words
from unmask.engine.settings import TrainSettings
from unmask.errors import UserError
from unmask.official.hub import trainable_class

_FEW = 16  # images: from fewer a training is doubtful


@dataclass
class StagePlan:
    """One training, validated: the class, its three configs, the data behind it."""

    name: str
    system: type[Trainable]
    model: Config
    data: Any  # the system's ``Data``, or image settings
    train: TrainSettings
    source: Source | None  # the images, where it learns from images
    batches: TrainingBatches
    reads: dict[str, str] = field(default_factory=dict)

    def plain(self) -> dict[str, Any]:
        return {"model": self.model.plain(), "data": self.data.plain(), "train": self.train.plain()}


@dataclass
class Plan:
    """A training before anything is written. ``lines``: what ``auto`` chose and why, if it did. ``notes``: which images
    are left out, one line each."""

    card: Card
    recipe: str
    stages: list[StagePlan]
    lines: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def last(self) -> StagePlan:
        return self.stages[-1]


def plan(
    system: str | Path,
    *,
    recipe: str | None = None,
    data: str | Path | None = None,
    backbone: str | None = None,
    image_size: int | str | tuple[int, int] | None = None,
    steps: int | None = None,
    epochs: float | None = None,
    batch_size: int | None = None,
    seed: int | None = None,
    device: str | None = None,
    overrides: Iterable[str] | Mapping[str, Any] = (),
    base: Mapping[str, Layer] | None = None,
    made: recipes.Recipe | None = None,
) -> Plan:
    """Everything that a training needs, checked. base: for each stage the options that a run began with, which replace the
    recipe's own below all that is asked for. made: a recipe already read. Raises ``UserError`` in one line for whatever does not
    fit; writes nothing."""
    system = str(system)
    automatic = (
        base is None and not recipes.is_file(system) and (recipe == "auto" or (recipe is None and data is not None))
    )
    if made is not None:
        chosen = made
    elif recipes.is_file(system):
        if recipe is not None:
            raise UserError(f"{system} is a recipe already: leave --recipe {recipe} out")
        chosen = recipes.from_file(system)
    else:
        chosen = recipes.named(system, auto.base_recipe(machine(device)) if automatic else recipe or "tiny")
    options: Layer = {
        "data": without_none(uri=None if data is None else str(data), image_size=size_of(image_size)),
        "model": without_none(backbone=backbone),
        "train": without_none(steps=steps, epochs=epochs, batch_size=batch_size, seed=seed, device=device),
    }
    words = sort_words(chosen, overrides)
    stages: list[StagePlan] = []
    lines: list[str] = []
    opened: dict[str, tuple[Source, list[str]]] = {}
    for number, stage in enumerate(chosen.stages):
        cls = load_entry(stage.entry, chosen.system) if made is None else trainable_class(stage.entry, Path("run.json"))
        given = _checked(_of_stage(cls, lay(options, words[number]), chosen.system), cls)
        own: Layer = {"data": stage.data, "model": stage.model, "train": stage.train}
        if base is not None:
            own = lay(own, base.get(stage.name) or {})
            refuse_changes(cls, own, given, chosen.system)
        else:
            own = in_proportion(own, given["train"].get("steps"))
        check_device(str(lay(own, given)["train"].get("device", "auto")))
        settings = _data_settings(cls, lay(own, given), chosen)
        batches = _own_batches(cls, lay(own, given), chosen)
        if batches is not None:
            stages.append(_validated(stage, chosen, cls, lay(own, given), getattr(batches, "source", None), batches))
            continue
        free = "split" not in lay(own, given)["data"]
        labels = cards().get(cls.slug, chosen.card).learns_from == "labels"
        key = str((settings.uri, settings.split, settings.limit, settings.columns, free, labels))
        if key not in opened:
            opened[key] = _opened(settings, labels=labels, free=free)
        source = opened[key][0]
        own = lay(own, {"data": {"split": source.split}}) if free else own
        if automatic and "backbone" in cls.Config.model_fields:  # the rules of auto choose an encoder and its images
            seen = _with_start(given)
            choice = auto.choose(source.facts, machine(given["train"].get("device")), own, seen)
            if seen is not given:
                choice.data["image_size"] = seen["data"]["image_size"]
                choice.model = {}
            own = lay(own, {"data": choice.data, "model": choice.model, "train": choice.train})
            lines = choice.lines
        stages.append(_validated(stage, chosen, cls, lay(own, given), source))
    notes = [note for _, told in opened.values() for note in told]
    notes += dict.fromkeys(note for stage in stages for note in _doubts(stage))
    return Plan(chosen.card, "auto" if lines else chosen.name, stages, lines, notes)


def _of_stage(cls: type[Trainable], given: Layer, system: str) -> Layer:
    """What was asked for, for a stage whose data or network know nothing of it."""
    _refuse_backbone(cls, given, system)
    if "image_size" in given["data"] and "image_size" not in data_class(cls).model_fields:
        raise UserError(f"{system} reads no images: leave --image-size out")
    return given


def _checked(given: Layer, cls: type[Trainable]) -> Layer:
    """What the user gave for train and data, alone: each value as its type has it, before any rule reads it."""
    out = dict(given)
    for part, settings, needed in (("train", TrainSettings, {}), ("data", data_class(cls), {"uri": "-"})):
        values = given[part]
        known: Any = validated(settings, {**needed, **_alone(values)}, where=part)
        out[part] = {k: v if isinstance(v, Mapping) or v is None else getattr(known, k) for k, v in values.items()}
    return out


def _alone(values: Mapping[str, Any]) -> dict[str, Any]:
    """The user's values without the default batch, which might not fit them."""
    if isinstance(values.get("accumulate"), int) and values.get("batch_size") is None:
        return {**values, "batch_size": values["accumulate"]} if values["accumulate"] > 0 else dict(values)
    return dict(values)


def _opened(settings: DataSettings, *, labels: bool, free: bool) -> tuple[Source, list[str]]:
    """The data, and what is left out of it in words. labels: the system learns from labels, so images without one are left
    out, and, where the split is free and there is no test split, those that the probe will test on."""

    def opened(split: str) -> Source:
        return open_data(settings.uri, split, columns=settings.columns, limit=settings.limit)

    source = opened(settings.split)
    notes: list[str] = []
    if not labels or source.streaming or source.labels is None:
        return source, notes
    if settings.split == "train" and own_test(settings.uri, columns=settings.columns) is None:
        source = opened(LEARN) if free else source
        rest = (
            "80 % of the images, the others are for the probe" if free else "all images, those of the probe among them"
        )
        notes.append(f"{settings.uri} has no test split: it learns from {rest}")
    bare = int((source.labels < 0).sum())
    if bare == len(source):
        raise UserError(f"none of the {bare} images of {settings.uri} has a label: it takes data with labels")
    if bare:
        source = source.select(np.flatnonzero(source.labels >= 0), "labelled")
        notes.append(f"{bare} of the images of {settings.uri} have no label and are left out")
    return source, notes


def _validated(
    stage: recipes.StageRecipe,
    recipe: recipes.Recipe,
    cls: type[Trainable],
    values: Layer,
    source: Source | None,
    batches: TrainingBatches | None = None,
) -> StagePlan:
    train = validated(TrainSettings, values["train"], where="train")
    data = _data_settings(cls, values, recipe)
    if batches is None:
        assert source is not None
        batches = Batches(source, data, train.batch_size, train.seed)
    model = cls.adapted(validated(cls.Config, values["model"], where=recipe.system), batches.facts)
    cls.check_batch(model, train.batch_size // (int(os.environ.get("WORLD_SIZE", "1")) * train.accumulate))
    return StagePlan(stage.name, cls, model, data, train, source, batches, stage.reads)


def _own_batches(cls: type[Trainable], values: Layer, recipe: recipes.Recipe) -> TrainingBatches | None:
    """Batches of a kind of the system's own; None where it learns from images as they are."""
    train = validated(TrainSettings, values["train"], where="train")
    model = validated(cls.Config, values["model"], where=recipe.system)
    return cls.open_batches(model, _data_settings(cls, values, recipe), train.batch_size, train.seed)


def _data_settings(cls: type[Trainable], values: Layer, recipe: recipes.Recipe) -> Any:
    kind = data_class(cls)
    if not values["data"].get("uri") and (cls.Data is None or kind.model_fields["uri"].is_required()):
        raise UserError(f"recipe {recipe.name} of {recipe.system} names no data: give --data URI")
    return validated(kind, values["data"], where="data")


def _doubts(stage: StagePlan) -> list[str]:
    """What is left out of the images of a stage, and what speaks against learning from them, one line each."""
    source, facts = stage.source, stage.batches.facts
    if source is None or not isinstance(stage.batches, Batches) or source.streaming:
        left_out = getattr(stage.batches, "skipped", None) or []
        return [f"{skipped_words(left_out)}: see skipped.json in the run"] if left_out else []
    lines = []
    if source.skipped:
        lines.append(f"{skipped_words(source.skipped, len(source))}: see skipped.json in the run")
    if _plain(stage.batches):
        lines.append(f"warning: every image of {source.uri} looked at has one plain colour: there is nothing to learn")
    elif facts.count is not None and facts.count < _FEW:
        few = f"{facts.count} images are" if facts.count > 1 else "1 image is"
        lines.append(f"warning: {few} few: what is learnt will hardly hold for others")
    return lines


def _plain(batches: Batches) -> bool:
    """Whether each of a few images spread over the data has one colour."""
    images = batches.samples(16)["image"].float().flatten(2)
    return bool((images.amax(2) - images.amin(2)).max() < 1e-6)


def _with_start(given: Layer) -> Layer:
    """What was asked for, with the backbone and the image size of the encoder that ``init=FOLDER`` starts from."""
    if not given["model"].get("init"):
        return given
    from unmask.api.loading import load

    encoder = load(str(given["model"]["init"]))
    if not isinstance(encoder, Encoder):
        raise UserError(
            f"init={given['model']['init']}: {encoder.slug} has no encoder to start from: give a run that has"
        )
    backbone = {"name": encoder.name, "patch_size": max(encoder.patch_size)}
    return lay({"data": {"image_size": list(encoder.image_size)}, "model": {"backbone": backbone}, "train": {}}, given)


def _refuse_backbone(cls: type[Trainable], given: Layer, system: str) -> None:
    if "backbone" in given["model"] and "backbone" not in cls.Config.model_fields:
        raise UserError(f"{system} has a network of its own and takes no --backbone: leave it out")
