"""Options in layers: a stage's data, model and train values, laid over one another, and the ``key=value`` words that a person
types, sorted to them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from unmask.api import recipes
from unmask.catalog import load_entry
from unmask.config import Config, field_names, merged, override, parse_word, validated
from unmask.contracts import Trainable
from unmask.data import DataSettings
from unmask.engine.settings import TrainSettings
from unmask.errors import UserError, nearest

Layer = dict[str, dict[str, Any]]


def data_class(cls: type[Trainable]) -> type[Config]:
    """The settings of a system's data."""
    return cls.Data or DataSettings


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
    entries = {stage: load_entry(recipe.stages[stage].entry, recipe.system) for stage in stages}
    if head in ("train", "data") and rest:
        if head == "data":  # stages may read data of several kinds
            field = rest.partition(".")[0]
            stages = [stage for stage in stages if field in data_class(entries[stage]).model_fields] or stages
        for stage in stages:
            out[stage][head] = override(out[stage][head], rest, value)
            if head == "train" and rest in ("steps", "epochs"):  # the later word decides how long
                out[stage]["train"].pop({"steps": "epochs", "epochs": "steps"}[rest], None)
        return
    classes = {stage: entry.Config for stage, entry in entries.items()}
    taking = [stage for stage, cls in classes.items() if head in cls.model_fields]
    for stage in taking:
        out[stage]["model"] = override(out[stage]["model"], key, value)
    if taking:
        return
    of_data = {name for entry in entries.values() for name in data_class(entry).model_fields}
    for part, fields in (("train", set(TrainSettings.model_fields)), ("data", of_data)):
        if key in fields:
            raise UserError(f'no option "{key}" in {recipe.system}: it belongs to {part}: write {part}.{key}={value}')
    known = {name for cls in classes.values() for name in field_names(cls)}
    known |= {f"train.{name}" for name in TrainSettings.model_fields} | {f"data.{name}" for name in of_data}
    raise UserError(f'no option "{key}" in {recipe.system}: {nearest(key, known)}')


# --- layers ---


def lay(under: Mapping[str, Mapping[str, Any]], over: Mapping[str, Mapping[str, Any]]) -> Layer:
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


def in_proportion(own: Layer, steps: int | None) -> Layer:
    """A recipe of another length: its warm-up, counted in steps, keeps its share of the run."""
    train = own["train"]
    if not (steps and train.get("steps") and train.get("warmup_steps")) or steps == train["steps"]:
        return own
    return own | {"train": train | {"warmup_steps": round(train["warmup_steps"] * steps / train["steps"])}}


def _name(backbone: Any) -> Any:
    return backbone.get("name") if isinstance(backbone, Mapping) else backbone


_FREE_OF_RUN = {"workers", "cache"}  # data options that change nothing of what is learnt


def refuse_changes(cls: type[Trainable], own: Layer, given: Layer, system: str) -> None:
    """A run that goes on keeps its system's options and its data; only how long and where it trains may change."""
    for part, settings, where in (("model", cls.Config, system), ("data", data_class(cls), "data")):
        asked = given[part]
        if not asked:
            continue
        before = _flat(validated(settings, own[part], where=where).plain())
        after = _flat(validated(settings, lay(own, given)[part], where=where).plain())
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


def without_none(**values: Any) -> dict[str, Any]:
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
