"""Pages that stand alone: templates filled, pictures as data URIs, written aside and then renamed."""

from __future__ import annotations

import base64
import functools
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from unmask.errors import UserError
from unmask.reports import wording

_KINDS = {
    ".png": "image/png",
    ".jpg": "image/jpeg",
    ".jpeg": "image/jpeg",
    ".svg": "image/svg+xml",
    ".webp": "image/webp",
}


@dataclass(frozen=True)
class Image:
    """A picture inside the page. ``uri``: its bytes; ``width`` and ``height`` in its own pixels (0 if unknown)."""

    uri: str
    width: int = 0
    height: int = 0


def embedded(path: Path) -> Image | None:
    """The picture in a file as a data URI; None when the file is damaged, so that a report never shows a broken image."""
    try:
        content = path.read_bytes()
    except OSError:
        return None
    width = height = 0
    if path.suffix == ".png":
        if len(content) < 45 or content[:8] != b"\x89PNG\r\n\x1a\n" or b"IEND" not in content[-16:]:
            return None
        width, height = int.from_bytes(content[16:20], "big"), int.from_bytes(content[20:24], "big")
    kind = _KINDS.get(path.suffix.lower(), "application/octet-stream")
    return Image(f"data:{kind};base64,{base64.b64encode(content).decode()}", width, height)


@functools.cache
def _templates() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        number=wording.number,
        duration=wording.duration,
        date=wording.date,
        count=wording.short_count,
        value=wording.value_text,
        breakable=_breakable,
    )
    return environment


def _breakable(text: Any) -> Markup:
    """A path or key that may break after its separators when the line is full."""
    out = Markup("").join(Markup("{}<wbr>").format(c) if c in "/._-=,:" else Markup("{}").format(c) for c in str(text))
    return Markup(out)


def render(template: str, **values: Any) -> str:
    """A filled template."""
    return _templates().get_template(template).render(**values)


def write_page(path: Path, text: str) -> Path:
    """Write a page whole or not at all. Raises ``UserError`` when the place cannot be written."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        aside.write_text(text, encoding="utf-8")
        aside.replace(path)
    except OSError as error:
        aside.unlink(missing_ok=True) if aside.parent.is_dir() else None
        raise UserError(f"cannot write {path}: {error.strerror or error}: choose another place with --out") from None
    return path
