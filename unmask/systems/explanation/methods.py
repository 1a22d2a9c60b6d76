"""Every method of explanation by name: installed systems, each masking as LIME's, the ``lime`` package, and captum's."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from unmask import catalog
from unmask.config import override, validated
from unmask.errors import UserError, nearest
from unmask.systems.explanation import maskings
from unmask.systems.explanation.packages import CAPTUM, LimePackage, captum_method
from unmask.systems.explanation.perturbing import LimeExplainer


def about() -> dict[str, str]:
    """Every method, in words."""
    found = {
        c.slug: f"LIME; pixels {maskings.about(c.slug)}" if c.slug in maskings.NAMES else c.title for c in systems()
    }
    found |= {n: f"LIME; hidden regions: {maskings.about(n)}" for n in maskings.NAMES if n not in found}
    found["lime"] = "the lime package; hidden regions grey"
    return found | CAPTUM


def systems() -> list[catalog.Card]:
    return [c for c in catalog.list_systems("explain") if c.entry]


def class_of(method: str) -> type[Any]:
    """The explainer of a method. Raises ``UserError`` for an unknown one, with the nearest."""
    card = next((c for c in systems() if c.slug == method), None)
    if card is not None:
        return card.load()
    if method.removesuffix(maskings.SMOOTH) in maskings.NAMES:
        return LimeExplainer
    if method == "lime":
        return LimePackage
    if method in CAPTUM:
        return captum_method(method)
    raise UserError(f"no method {method!r}: {nearest(method, about())}")


def build(methods: Iterable[str], options: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Explainers by name, and the options that belong to none of them.

    options: an option's plain name reaches every method that has it, ``METHOD.option`` one of them. Raises ``UserError`` for an
    unknown method, and for an option of a method that it does not have.
    """
    classes = {name: class_of(name) for name in methods}
    given: dict[str, dict[str, Any]] = {name: {} for name in classes}
    left: dict[str, Any] = {}
    for key, value in options.items():
        head, _, rest = key.partition(".")
        if rest and head in classes:
            given[head] = override(given[head], rest, value)
            continue
        takers = [n for n, cls in classes.items() if head in cls.Config.model_fields and head != "model"]
        for name in takers:
            given[name].setdefault(key, value)
        if not takers:
            left[key] = value
    out = {}
    for name, cls in classes.items():
        values = dict(given[name])
        if issubclass(cls, LimeExplainer):
            values.setdefault("masking", name)
        out[name] = cls(validated(cls.Config, values, where=name))
    return out, left


def option_names(methods: Iterable[str]) -> list[str]:
    return sorted({f for m in methods for f in class_of(m).Config.model_fields if f != "model"})
