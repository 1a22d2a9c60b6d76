"""The cards of all systems and backbones: what exists, read without importing torch.

A card is the ``card.toml`` in a system's folder. Other packages add systems through entry points of the group
``unmask.systems``: each names a package whose folder tree holds cards.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import tomllib
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from importlib import metadata
from pathlib import Path
from typing import Any

from unmask.errors import UserError, nearest

VERBS = ("train", "predict", "generate", "compress", "explain")
GROUP = "unmask.systems"
_HERE = Path(__file__).parent


@dataclass(frozen=True)
class Card:
    """One system as data. ``entry`` is "module:Class"; ``folder`` is where its recipes, claim and adapter lie.

    A backbone's card also has ``backbones``: the names (or the beginnings of names, ending in ``*``) that its
    ``build`` ("module:function") understands.
    """

    slug: str
    title: str
    folder: str
    verb: str = "train"
    room: str = ""
    authors: str = ""
    year: int = 0
    arxiv: str = ""
    venue: str = ""
    hides: str = ""
    predicts: str = ""
    needs: str = ""
    entry: str = ""
    build: str = ""
    backbones: tuple[str, ...] = ()
    suggests: tuple[str, ...] = ()  # backbones to try, shown by `unmask info`
    original: str = ""  # repository of the authors' code
    licence: str = ""  # of the original
    reference: str = "official code"
    decided: tuple[str, ...] = ()
    learns_from: str = "hidden parts"
    baseline: bool = False  # the supervised system that others are compared with and fine-tuned by
    package: str = "unmask"

    @property
    def path(self) -> Path:
        return Path(self.folder)

    @property
    def paper(self) -> str:
        return f"https://arxiv.org/abs/{self.arxiv}" if self.arxiv else ""

    def plain(self) -> dict[str, Any]:
        """For JSON: everything but the folder, with the paper's address."""
        return {**{k: v for k, v in asdict(self).items() if k != "folder"}, "paper": self.paper}

    def load(self) -> Any:
        """The class (or function) that ``entry`` names. This imports torch."""
        return load_entry(self.entry, self.slug)

    def beside(self, name: str) -> Path | None:
        """A file of the system's folder, if it is there ("recipes.yaml", "claim.yaml", "official.py")."""
        path = self.path / name
        return path if path.is_file() else None

    def module(self, name: str) -> Any:
        """A module of the system's folder (``"official"``), or None where there is no such file."""
        if self.beside(f"{name}.py") is None:
            return None
        owner = (self.build or self.entry).partition(":")[0].rpartition(".")[0]
        return importlib.import_module(f"{owner}.{name}")


def load_entry(entry: str, slug: str = "") -> Any:
    """The object that "module:name" names. Raises ``UserError`` for a malformed or missing entry."""
    module, colon, name = entry.partition(":")
    if not colon:
        raise UserError(f"{slug or entry}: its card names no entry to load (module:Class)")
    try:
        return getattr(importlib.import_module(module), name)
    except (ModuleNotFoundError, AttributeError) as error:
        raise UserError(f"{slug or entry}: cannot load {entry}: {error}") from error


def read_card(path: Path, package: str = "unmask") -> Card:
    """The card in one file. Raises ``UserError`` naming the file and key that do not fit."""
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"{path}: not TOML: {error}") from None
    known = {f.name for f in fields(Card)} - {"folder", "package"}
    for key in values:
        if key not in known:
            raise UserError(f"{path}: no key {key!r} in a card: {nearest(key, known)}")
    for key in ("slug", "title"):
        if not values.get(key):
            raise UserError(f"{path}: a card needs {key!r}")
    lists: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
    room = lists.pop("room", "") or path.parent.parent.name
    return Card(folder=str(path.parent), room=room, package=package, **lists)


def _folders() -> Iterator[tuple[str, Path]]:
    yield "unmask", _HERE / "systems"
    yield "unmask", _HERE / "backbones"
    for point in sorted(metadata.entry_points(group=GROUP), key=lambda p: p.name):
        spec = importlib.util.find_spec(point.value.partition(":")[0])
        for folder in (spec.submodule_search_locations or []) if spec else []:
            yield point.value, Path(folder)


@functools.cache
def cards() -> dict[str, Card]:
    """Every card by slug: this package's and those of installed entry points. The first of a slug wins; a second raises."""
    found: dict[str, Card] = {}
    for package, folder in _folders():
        for path in sorted(folder.rglob("card.toml")):
            card = read_card(path, package)
            if card.slug in found:
                raise UserError(
                    f"two systems call themselves {card.slug!r}: {found[card.slug].folder} and {path.parent}"
                )
            found[card.slug] = card
    return found


def list_systems(verb: str | None = None) -> list[Card]:
    """The cards of published systems and backbones, by room and slug; only those of one verb if given."""
    if verb is not None and verb not in VERBS:
        raise UserError(f"no verb {verb!r}: {nearest(verb, VERBS)}")
    return sorted((c for c in cards().values() if verb in (None, c.verb)), key=lambda c: (c.room, c.slug))


def card(slug: str) -> Card:
    """The card of one system. Raises ``UserError`` with the nearest known name."""
    found = cards()
    if slug not in found:
        raise UserError(f"no system {slug!r}: {nearest(slug, found)}")
    return found[slug]


def supervised() -> Card:
    """The system that learns from labels, beside which the others are measured and by which they are fine-tuned."""
    return next(c for c in cards().values() if c.baseline)


def recipes(slug: str) -> dict[str, Any]:
    """The recipes of a system by name, as plain mappings. A system without recipes has none."""
    from unmask.plain_yaml import read_yaml

    path = card(slug).beside("recipes.yaml")
    if path is None:
        return {}
    values = read_yaml(path.read_text(encoding="utf-8")) or {}
    if not isinstance(values, dict):
        raise UserError(f"{path}: recipes are a mapping from name to options")
    return values


def backbone_card(name: str) -> Card:
    """The card of the backbone family that understands ``name``. Raises ``UserError`` with the nearest known names."""
    families = [c for c in cards().values() if c.backbones]
    for family in families:
        for known in family.backbones:
            if name == known or (known.endswith("*") and name.startswith(known[:-1])):
                return family
    raise UserError(
        f"no backbone {name!r}: {nearest(name, [n for c in families for n in (*c.suggests, *c.backbones)])}"
    )
