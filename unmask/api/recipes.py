"""Recipes: named sets of options, from a system's ``recipes.yaml`` or from a file of one's own. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from unmask import catalog
from unmask.errors import UserError, nearest
from unmask.plain_yaml import read_yaml

_KEYS = ("about", "data", "model", "train", "stages")
_STAGE_KEYS = ("name", "entry", "data", "model", "train", "from")
_PARTS = ("data", "model", "train")


@dataclass(frozen=True)
class StageRecipe:
    """The options of one stage, still plain. ``reads``: name the stage knows -> earlier stage's name."""

    name: str
    entry: str
    data: dict[str, Any] = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=dict)
    train: dict[str, Any] = field(default_factory=dict)
    reads: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Recipe:
    """What a training is made of before any option is laid over it."""

    system: str
    name: str
    about: str
    stages: tuple[StageRecipe, ...]

    @property
    def card(self) -> catalog.Card:
        return catalog.card(self.system)


def is_file(system: str) -> bool:
    """Whether the word names a recipe file rather than a system."""
    return system.endswith((".yaml", ".yml"))


def named(system: str, name: str) -> Recipe:
    """A recipe of a system. Raises ``UserError`` with the nearest known name, for systems and for recipes."""
    card = catalog.card(system)
    if not card.entry or not _learns(card):
        raise UserError(f"{system} is not trained by itself: {_what_instead(card)}")
    known = catalog.recipes(system)
    if not known:
        raise UserError(f"{system} is not trained by itself: {_what_instead(card)}")
    if name not in known:
        raise UserError(f'no recipe "{name}" in {system}: {nearest(name, [*known, "auto"])}')
    return parse(system, name, known[name], where=f"recipe {name} of {system}")


def from_file(path: str | Path) -> Recipe:
    """A recipe file: the keys of a recipe and ``system: slug``. Raises ``UserError`` naming the file."""
    path = Path(path)
    try:
        values = read_yaml(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"no recipe file {path}: check the path, or name a system (unmask list)") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the recipe {path}: {error}") from None
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not YAML: {error}") from None
    if not isinstance(values, Mapping):
        raise UserError(f"{path}: a recipe is a mapping with the keys system, data, model, train")
    values = dict(values)
    system = values.pop("system", None)
    if not isinstance(system, str):
        raise UserError(f"{path}: a recipe file needs the key system, for example system: mae")
    catalog.card(system)
    return parse(system, path.stem, values, where=str(path))


def parse(system: str, name: str, values: Mapping[str, Any], *, where: str) -> Recipe:
    """A recipe from a plain mapping; every key is checked against what a recipe takes."""
    if not isinstance(values, Mapping):
        raise UserError(f"{where}: a recipe is a mapping with the keys {', '.join(_KEYS)}")
    _refuse_unknown(values, _KEYS, where)
    entry = catalog.card(system).entry
    about = str(values.get("about", "")).strip()
    if "stages" not in values:
        return Recipe(system, name, about, (_stage({"name": "main", **_parts(values, where)}, entry, (), where),))
    given = values["stages"]
    if not isinstance(given, list) or not given:
        raise UserError(f"{where}: stages is a list of mappings with the keys {', '.join(_STAGE_KEYS)}")
    stages: list[StageRecipe] = []
    for item in given:
        stages.append(_stage(item, entry, tuple(s.name for s in stages), where))
    return Recipe(system, name, about, tuple(stages))


def _stage(values: Any, entry: str, earlier: tuple[str, ...], where: str) -> StageRecipe:
    if not isinstance(values, Mapping):
        raise UserError(f"{where}: a stage is a mapping with the keys {', '.join(_STAGE_KEYS)}")
    _refuse_unknown(values, _STAGE_KEYS, where)
    name = str(values.get("name") or f"stage-{len(earlier) + 1}")
    if name in earlier:
        raise UserError(f'{where}: two stages are called "{name}"')
    reads = dict(values.get("from") or {})
    for source in reads.values():
        if source not in earlier:
            raise UserError(
                f'{where}: stage {name} reads "{source}", which is no earlier stage: {nearest(source, earlier)}'
            )
    return StageRecipe(name, str(values.get("entry") or entry), reads=reads, **_parts(values, where))


def _parts(values: Mapping[str, Any], where: str) -> dict[str, dict[str, Any]]:
    out = {}
    for part in _PARTS:
        value = values.get(part) or {}
        if not isinstance(value, Mapping):
            raise UserError(f"{where}: {part} is a mapping of options, got {value!r}")
        out[part] = dict(value)
    return out


def _refuse_unknown(values: Mapping[str, Any], known: tuple[str, ...], where: str) -> None:
    for key in values:
        if key not in known:
            raise UserError(f'no key "{key}" in {where}: {nearest(str(key), known)}')


def _learns(card: catalog.Card) -> bool:
    """Whether a system is trained: a compressor or an explainer may be, or may only measure."""
    if card.verb in ("train", "predict", "generate"):
        return True
    from unmask.contracts import Trainable

    cls = card.load()
    return isinstance(cls, type) and issubclass(cls, Trainable)


def _what_instead(card: catalog.Card) -> str:
    if card.backbones:
        name = (card.suggests or card.backbones)[0]
        return f"it is a backbone: unmask train simmim --backbone {name}"
    return f"its verb is {card.verb}: unmask {card.verb} --help"
