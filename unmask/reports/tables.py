"""Tables for README and docs, made from the cards and from what ``unmask reproduce`` wrote."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from unmask import catalog
from unmask.catalog import Card
from unmask.errors import UserError

BEGIN, END = "<!-- systems:begin -->", "<!-- systems:end -->"


def results(folder: Path | str) -> dict[str, dict[str, Any]]:
    """What ``unmask reproduce`` wrote, by slug: every ``*.json`` in ``folder`` that names a slug. None there: empty."""
    found = {}
    for path in sorted(Path(folder).glob("*.json")):
        try:
            value = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if isinstance(value, dict) and isinstance(value.get("slug"), str) and value.get("verdict"):
            found[value["slug"]] = value
    return found


def is_backbone(card: Card) -> bool:
    """Whether a card is of a family of backbones that trains nothing by itself."""
    return bool(card.backbones) or bool(card.build and not card.entry)


def systems_table(results_dir: Path | str, *, link: str = "") -> str:
    """The published systems as a Markdown table: what each hides and predicts, its paper, and whether its claim was shown
    here. Backbones follow in a table of their own.

    link: where a system's page is, with ``{slug}`` in it; "" = no link.
    """
    shown = results(results_dir)
    rows = [
        [_name(c, link), *map(_cell, (c.hides, c.predicts)), _paper(c), _verdict(c, shown.get(c.slug))]
        for c in _systems()
    ]
    table = _table(["System", "Hides", "Predicts", "Paper", "Its claim, here"], rows)
    families = [c for c in catalog.list_systems() if is_backbone(c)]
    if not families:
        return table
    names = [
        [_name(c, link), _cell(c.title), _paper(c), _examples(c), _verdict(c, shown.get(c.slug))] for c in families
    ]
    return table + "\n" + _table(["Backbone", "What it is", "Paper", "Names", "Its claim, here"], names)


def _systems() -> list[Card]:
    return [c for c in catalog.list_systems() if not is_backbone(c)]


def refresh_systems(readme: Path | str, results_dir: Path | str, *, link: str = "") -> bool:
    """Put the table of systems between its two markers in a file; returns whether the file changed.

    Raises ``UserError`` when the markers are not there.
    """
    path = Path(readme)
    text = path.read_text(encoding="utf-8")
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise UserError(f"{path} has no place for the table of systems: write {BEGIN} and {END} on lines of their own")
    fresh = f"{before}{BEGIN}\n{systems_table(results_dir, link=link)}{END}{after}"
    if fresh != text:
        path.write_text(fresh, encoding="utf-8")
    return fresh != text


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _name(card: Card, link: str) -> str:
    return f"[`{card.slug}`]({link.format(slug=card.slug)})" if link else f"`{card.slug}`"


def _paper(card: Card) -> str:
    first = card.authors.split(",")[0].strip()
    several = " et al." if "," in card.authors else ""
    words = f"{first}{several} {card.year or ''}".strip() or card.title
    return f"[{_cell(words)}]({card.paper})" if card.paper else "–"


def _examples(card: Card) -> str:
    return ", ".join(f"`{n}`" for n in (card.suggests or card.backbones)[:3]) or "–"


def _verdict(card: Card, result: Mapping[str, Any] | None) -> str:
    if result is None:
        return "not run yet" if card.beside("claim.yaml") else "–"
    tier = f" ({result['tier']})" if result.get("tier") else ""
    return f"{_cell(str(result['verdict']))}{tier}"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|") or "–"
