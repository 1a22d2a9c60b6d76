"""Validated settings: pydantic models that refuse unknown keys and speak in one line.

``Config`` is the base of every nested ``Config`` of the library. ``validated`` turns pydantic's report into a
:class:`~unmask.errors.UserError`; ``override`` applies ``a.b=3`` words from a command line.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic.fields import FieldInfo

from unmask.errors import UserError, nearest
from unmask.plain_yaml import read_yaml

__all__ = ["Config", "Field", "field_names", "merged", "override", "parse_word", "validated"]

C = TypeVar("C", bound="Config")


class Config(BaseModel):
    """Settings of one thing. Unknown keys are refused; assignments are validated; defaults are the paper's."""

    model_config = ConfigDict(extra="forbid", validate_assignment=True, validate_default=True, protected_namespaces=())

    def plain(self) -> dict[str, Any]:
        """The settings as JSON-able values."""
        return self.model_dump(mode="json")


def validated(cls: type[C], values: Mapping[str, Any] | None, *, where: str) -> C:
    """``cls(**values)``; raises ``UserError`` in one line naming the option, its value, and what it takes.

    where: what the options belong to, as the user knows it ("mae", "train", "recipe tiny of mae").
    """
    try:
        return cls.model_validate(dict(values or {}))
    except ValidationError as error:
        raise UserError(_one_line(cls, error, where)) from None


def _one_line(cls: type[Config], error: ValidationError, where: str) -> str:
    first = error.errors()[0]
    path = [str(p) for p in first["loc"]]
    name = ".".join(path)
    if first["type"] == "extra_forbidden":
        known = _names_at(cls, path[:-1])
        return f"no option {name!r} in {where}: {nearest(path[-1], known)}".replace("'", '"')
    if first["type"] == "value_error":
        message = re.sub(r"^Value error,\s*", "", first["msg"])
        return f"{where}: {name + ': ' if name else ''}{message}"
    message = first["msg"][0].lower() + first["msg"][1:]
    return f"{where}: {name}={first.get('input')!r} does not fit: {message}"


def _names_at(cls: type[Config], path: list[str]) -> list[str]:
    here: Any = cls
    for part in path:
        field: FieldInfo | None = getattr(here, "model_fields", {}).get(part)
        if field is None:
            return []
        here = next((a for a in _candidates(field.annotation) if hasattr(a, "model_fields")), None)
    return list(getattr(here, "model_fields", {}))


def _candidates(annotation: Any) -> list[Any]:
    return [annotation, *getattr(annotation, "__args__", ())]


def field_names(cls: type[Config]) -> list[str]:
    """Every option of ``cls``, nested ones with dots."""
    names: list[str] = []
    for name, field in cls.model_fields.items():
        names.append(name)
        for inner in _candidates(field.annotation):
            if isinstance(inner, type) and issubclass(inner, Config):
                names += [f"{name}.{n}" for n in field_names(inner)]
    return names


def parse_word(word: str) -> tuple[str, Any]:
    """``"decoder.depth=4"`` -> ``("decoder.depth", 4)``; the value is read as YAML. Raises ``UserError`` without "="."""
    key, equals, text = word.partition("=")
    if not equals or not key.strip():
        raise UserError(f"{word!r} is no option: write key=value, for example mask_ratio=0.6")
    try:
        value = read_yaml(text) if text.strip() else text
    except yaml.YAMLError:
        value = text
    return key.strip(), value


def override(values: Mapping[str, Any], key: str, value: Any) -> dict[str, Any]:
    """A copy of the nested mapping with ``key`` ("a.b.c") set to ``value``.

    A plain name standing where a mapping is needed (``backbone: vit_small``) becomes ``{"name": vit_small}``.
    """
    out = dict(values)
    head, dot, rest = key.partition(".")
    if dot:
        inner = out.get(head)
        if isinstance(inner, str):
            inner = {"name": inner}
        out[head] = override(inner if isinstance(inner, Mapping) else {}, rest, value)
    else:
        out[head] = value
    return out


def merged(*layers: Mapping[str, Any] | None) -> dict[str, Any]:
    """Nested mappings laid over one another, the later over the earlier; lists and values replace."""
    out: dict[str, Any] = {}
    for layer in layers:
        for key, value in (layer or {}).items():
            old = out.get(key)
            if isinstance(value, Mapping) and isinstance(old, str):
                old = {"name": old}
            out[key] = merged(old, value) if isinstance(value, Mapping) and isinstance(old, Mapping) else value
    return out


def words(items: Iterable[str]) -> dict[str, Any]:
    """Many ``key=value`` words as one nested mapping."""
    out: dict[str, Any] = {}
    for item in items:
        out = override(out, *parse_word(item))
    return out
