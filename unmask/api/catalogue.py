"""What ``info`` tells of a system: its card, its recipes and its options."""

from __future__ import annotations

from typing import Any

from unmask import catalog
from unmask.config import Config
from unmask.plain_yaml import read_yaml


def info(system: str) -> dict[str, Any]:
    """Everything known about one system as plain values: card, recipes, options with defaults (of the system, of data that only
    it reads, of its predictions or samples), claim.

    Raises ``UserError`` with the nearest known name. Only this reads the system's code (and imports torch), for its options.
    """
    card = catalog.card(system)
    out = card.plain()
    out["recipes"] = {name: _about(values) for name, values in catalog.recipes(system).items()}
    cls = card.load() if card.entry else None
    data, ask = getattr(cls, "Data", None), getattr(cls, "Ask", None)
    out["options"] = options(cls.Config) if cls is not None else []
    out["data_options"] = options(data, "data.") if data is not None else []
    out["asks"] = options(ask) if ask is not None else []
    out["asked_by"] = "generate" if hasattr(cls, "generate") else "predict"
    claim = card.beside("claim.yaml")
    if claim is not None:
        out["claim"] = read_yaml(claim.read_text(encoding="utf-8"))
    return out


def options(config: type[Config], prefix: str = "") -> list[dict[str, Any]]:
    """Every option of a config, nested ones with dots: name, default, description."""
    rows: list[dict[str, Any]] = []
    for name, field in config.model_fields.items():
        default = field.get_default(call_default_factory=True)
        inner = type(default) if isinstance(default, Config) else None
        if inner is not None and inner.model_fields:
            shown = getattr(default, "name", None)
            if shown is not None:  # a backbone: its name alone is enough
                rows.append(
                    {"name": prefix + name, "default": shown, "description": field.description or "a name, or options"}
                )
                continue
            rows += [
                {**row, "default": _plain(_deep(default, row["name"]))} | {"name": f"{prefix}{name}.{row['name']}"}
                for row in options(inner)
            ]
            continue
        rows.append({"name": prefix + name, "default": _plain(default), "description": field.description or ""})
    return rows


def _deep(value: Any, path: str) -> Any:
    for part in path.split("."):
        value = getattr(value, part)
    return value


def _plain(value: Any) -> Any:
    if isinstance(value, Config):
        return getattr(value, "name", None) or value.plain()
    return value if isinstance(value, (int, float, str, bool, type(None), list, dict)) else _sequence(value)


def _sequence(value: Any) -> Any:
    return (
        list(value) if isinstance(value, (tuple, set)) else ("(required)" if "Undefined" in repr(value) else str(value))
    )


def _about(values: Any) -> str:
    return str(values.get("about", "")).strip() if isinstance(values, dict) else ""
