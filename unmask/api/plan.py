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
from unmask.api.machine import check_device, machine
from unmask.catalog import Card, cards, load_entry
from unmask.config import Config, field_names, merged, override, parse_word, validated
from unmask.contracts import Encoder, Trainable
from unmask.data import Batches, DataSettings, Source
from unmask.data import open as open_data
from unmask.data.opening import LEARN, own_test
from unmask.data.source import skipped_words
from unmask.engine.settings import TrainSettings
from unmask.errors import UserError, nearest

Layer = dict[str, dict[str, Any]]
_FEW = 16  # images: from fewer a training is doubtful


@dataclass
class StagePlan:
    """One training, validated: the class, its three configs, the data behind it."""

    name: str
    system: type[Trainable]
    model: Config
    data: DataSettings
    train: TrainSettings
    source: Source
    batches: Batches
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
) -> Plan:
    """Everything that a training needs, checked. base: for each stage the options that a run began with, which replace the
    recipe's own below all that is asked for. Raises ``UserError`` in one line for whatever does not fit; writes nothing."""
    system = str(system)
    automatic = (
        base is None and not recipes.is_file(system) and (recipe == "auto" or (recipe is None and data is not None))
    )
    if recipes.is_file(system):
        if recipe is not None:
            raise UserError(f"{system} is a recipe already: leave --recipe {recipe} out")
        chosen = recipes.from_file(system)
    else:
        chosen = recipes.named(system, auto.base_recipe(machine(device)) if automatic else recipe or "tiny")
    options: Layer = {
        "data": _without_none(uri=None if data is None else str(data), image_size=size_of(image_size)),
        "model": _without_none(backbone=backbone),
        "train": _without_none(steps=steps, epochs=epochs, batch_size=batch_size, seed=seed, device=device),
    }
    words = sort_words(chosen, overrides)
    stages, lines = [], []
    opened: dict[str, tuple[Source, list[str]]] = {}
    for number, stage in enumerate(chosen.stages):
        given = _checked(_lay(options, words[number]))
        own: Layer = {"data": stage.data, "model": stage.model, "train": stage.train}
        if base is not None:
            own = _lay(own, base.get(stage.name) or {})
        else:
            own = _in_proportion(own, given["train"].get("steps"))
        cls = load_entry(stage.entry, chosen.system)
        if base is not None:
            _refuse_changes(cls, own, given, chosen.system)
        _refuse_backbone(cls, given, chosen.system)
        settings = _data_settings(_lay(own, given), chosen)
        check_device(str(_lay(own, given)["train"].get("device", "auto")))
        free = "split" not in _lay(own, given)["data"]
        labels = cards().get(cls.slug, chosen.card).learns_from == "labels"
        key = str((settings.uri, settings.split, settings.limit, settings.columns, free, labels))
        if key not in opened:
            opened[key] = _opened(settings, labels=labels, free=free)
        source = opened[key][0]
        own = _lay(own, {"data": {"split": source.split}}) if free else own
        if automatic:
            seen = _with_start(given)
            choice = auto.choose(source.facts, machine(given["train"].get("device")), own, seen)
            if seen is not given:
                choice.data["image_size"] = seen["data"]["image_size"]
                choice.model = {}
            own = _lay(own, {"data": choice.data, "model": _if_backbone(cls, choice.model), "train": choice.train})
            lines = choice.lines
        stages.append(_validated(stage, chosen, cls, _lay(own, given), source))
    notes = [note for _, told in opened.values() for note in told]
    notes += dict.fromkeys(note for stage in stages for note in _doubts(stage))
    return Plan(chosen.card, "auto" if automatic else chosen.name, stages, lines, notes)


def _checked(given: Layer) -> Layer:
    """What the user gave for train and data, alone: each value as its type has it, before any rule reads it."""
    out = dict(given)
    for part, cls, needed in (("train", TrainSettings, {}), ("data", DataSettings, {"uri": "-"})):
        values = given[part]
        known = validated(cls, {**needed, **_alone(values)}, where=part)
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
    stage: recipes.StageRecipe, recipe: recipes.Recipe, cls: type[Trainable], values: Layer, source: Source
) -> StagePlan:
    train = validated(TrainSettings, values["train"], where="train")
    data = _data_settings(values, recipe)
    batches = Batches(source, data, train.batch_size, train.seed)
    model = cls.adapted(validated(cls.Config, values["model"], where=recipe.system), batches.facts)
    cls.check_batch(model, train.batch_size // (int(os.environ.get("WORLD_SIZE", "1")) * train.accumulate))
    return StagePlan(stage.name, cls, model, data, train, source, batches, stage.reads)


def _data_settings(values: Layer, recipe: recipes.Recipe) -> DataSettings:
    if not values["data"].get("uri"):
        raise UserError(f"recipe {recipe.name} of {recipe.system} names no data: give --data URI")
    return validated(DataSettings, values["data"], where="data")


def _doubts(stage: StagePlan) -> list[str]:
    """What is left out of the images of a stage, and what speaks against learning from them, one line each."""
    source, facts = stage.source, stage.batches.facts
    if source.streaming:
        return []
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


# --- words ---


def sort_words(recipe: recipes.Recipe, words: Iterable[str] | Mapping[str, Any]) -> list[Layer]:
    """``key=value`` words, sorted to each stage's data, model and train.

    ``train.K`` and ``data.K`` go to every stage, ``STAGE.K`` to one, anything else to each stage whose system has the option.
    Raises ``UserError`` for what nobody knows; a bare key of train or data is answered with its full name.
    """
    pairs = list(words.items()) if isinstance(words, Mapping) else [parse_word(word) for word in words]
    out: list[Layer] = [{"data": {}, "model": {}, "train": {}} for _ in recipe.stages]
    names = [stage.name for stage in recipe.stages]
    for key, value in pairs:
        head, _, rest = key.partition(".")
        if len(names) > 1 and head in names and rest:
            _place(out, [names.index(head)], recipe, rest, value)
        else:
            _place(out, list(range(len(names))), recipe, key, value)
    return out


def _place(out: list[Layer], stages: list[int], recipe: recipes.Recipe, key: str, value: Any) -> None:
    head, _, rest = key.partition(".")
    if head in ("train", "data") and rest:
        for stage in stages:
            out[stage][head] = override(out[stage][head], rest, value)
            if head == "train" and rest in ("steps", "epochs"):  # the later word decides how long
                out[stage]["train"].pop({"steps": "epochs", "epochs": "steps"}[rest], None)
        return
    classes = {stage: load_entry(recipe.stages[stage].entry, recipe.system).Config for stage in stages}
    taking = [stage for stage, cls in classes.items() if head in cls.model_fields]
    for stage in taking:
        out[stage]["model"] = override(out[stage]["model"], key, value)
    if taking:
        return
    for part, settings in (("train", TrainSettings), ("data", DataSettings)):
        if key in settings.model_fields:
            raise UserError(f'no option "{key}" in {recipe.system}: it belongs to {part}: write {part}.{key}={value}')
    known = {name for cls in classes.values() for name in field_names(cls)}
    known |= {f"train.{name}" for name in TrainSettings.model_fields} | {
        f"data.{name}" for name in DataSettings.model_fields
    }
    raise UserError(f'no option "{key}" in {recipe.system}: {nearest(key, known)}')


# --- layers ---


def _lay(under: Mapping[str, Mapping[str, Any]], over: Mapping[str, Mapping[str, Any]]) -> Layer:
    """One layer over another. Another backbone brings its own options; steps and epochs replace one another."""
    out = {part: dict(under.get(part) or {}) for part in ("data", "model", "train")}
    backbone = (over.get("model") or {}).get("backbone")
    name = backbone.get("name") if isinstance(backbone, Mapping) else backbone
    if name and name != _name(out["model"].get("backbone")):
        out["model"].pop("backbone", None)
    train = over.get("train") or {}
    if (train.get("steps") is None) != (train.get("epochs") is None):
        for key in ("steps", "epochs"):
            out["train"].pop(key, None)
    if "warmup_epochs" in train:  # a warm-up counted in steps belongs to the length it was written for
        out["train"].pop("warmup_steps", None)
    if train.get("base_lr") is not None and train.get("lr") is None:  # an absolute rate would win over it
        out["train"].pop("lr", None)
    return {part: merged(out[part], over.get(part)) for part in out}


def _in_proportion(own: Layer, steps: int | None) -> Layer:
    """A recipe of another length: its warm-up, counted in steps, keeps its share of the run."""
    train = own["train"]
    if not (steps and train.get("steps") and train.get("warmup_steps")) or steps == train["steps"]:
        return own
    return own | {"train": train | {"warmup_steps": round(train["warmup_steps"] * steps / train["steps"])}}


def _with_start(given: Layer) -> Layer:
    """What was asked for, with the backbone and the image size of the encoder that ``init=FOLDER`` starts from."""
    if not given["model"].get("init"):
        return given
    from unmask.api.loading import load

    encoder = load(str(given["model"]["init"]))
    assert isinstance(encoder, Encoder)
    backbone = {"name": encoder.name, "patch_size": max(encoder.patch_size)}
    return _lay({"data": {"image_size": list(encoder.image_size)}, "model": {"backbone": backbone}, "train": {}}, given)


def _name(backbone: Any) -> Any:
    return backbone.get("name") if isinstance(backbone, Mapping) else backbone


def _refuse_backbone(cls: type[Trainable], given: Layer, system: str) -> None:
    if "backbone" in given["model"] and "backbone" not in cls.Config.model_fields:
        raise UserError(f"{system} has a network of its own and takes no --backbone: leave it out")


_FREE_OF_RUN = {"workers", "cache"}  # data options that change nothing of what is learnt


def _refuse_changes(cls: type[Trainable], own: Layer, given: Layer, system: str) -> None:
    """A run that goes on keeps its system's options and its data; only how long and where it trains may change."""
    for part, settings, where in (("model", cls.Config, system), ("data", DataSettings, "data")):
        asked = given[part]
        if not asked:
            continue
        before = _flat(validated(settings, own[part], where=where).plain())
        after = _flat(validated(settings, _lay(own, given)[part], where=where).plain())
        for key in _flat({k: {"name": v} if k == "backbone" and isinstance(v, str) else v for k, v in asked.items()}):
            old, new = before.get(key), after.get(key)
            gone = part == "data" and key == "uri" and _is_gone(str(old))
            if old == new or gone or (part == "data" and key in _FREE_OF_RUN):
                continue
            name = f"data.{key}" if part == "data" else key
            raise UserError(
                f"--resume goes on with {name}={old}, not {new}: leave it out, or train anew with another --out"
            )


def _is_gone(uri: str) -> bool:
    """Whether data were a path that is no longer there: it may have moved."""
    return Path(uri).is_absolute() and not Path(uri).exists()


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A nested mapping with dotted keys; a size of one number written as two."""
    out: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            out |= _flat(value, f"{prefix}{key}.")
        else:
            square = key == "image_size" and isinstance(value, int)
            out[f"{prefix}{key}"] = [value, value] if square else list(value) if isinstance(value, tuple) else value
    return out


def _if_backbone(cls: type[Trainable], model: dict[str, Any]) -> dict[str, Any]:
    return model if "backbone" in cls.Config.model_fields else {k: v for k, v in model.items() if k != "backbone"}


def _without_none(**values: Any) -> dict[str, Any]:
    return {key: value for key, value in values.items() if value is not None}


def size_of(value: int | str | tuple[int, int] | None) -> int | list[int] | None:
    """96, "96", "96x128" (height x width) or (96, 128) as pixels. Raises ``UserError`` for anything else."""
    if value is None or isinstance(value, int):
        return value
    parts = str(value).lower().split("x") if isinstance(value, str) else list(value)
    try:
        sides = [int(part) for part in parts]
    except ValueError:
        sides = []
    if not 1 <= len(sides) <= 2 or min(sides) < 1:
        raise UserError(f"--image-size {value} is no size: write pixels, 96 or 96x128 (height x width)")
    return sides[0] if len(sides) == 1 else sides
