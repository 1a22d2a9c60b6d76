"""``Result``: what every prediction is, and how it reaches the disk whole."""

from __future__ import annotations

import contextlib
import io
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from unmask.errors import UserError

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image


@dataclass
class Result:
    """One input's prediction. ``source`` names the input (a path, or "input 3"); ``image`` is a copy of it for drawing,
    uint8 ``[H, W, 3]``, where the input was an image.

    A new kind subclasses this: it says its ``kind``, gives ``plain()`` (JSON-able), ``files`` if it is more than JSON, and,
    if it can be seen, ``overlay()``.
    """

    kind: ClassVar[str] = "result"
    source: str = field(default="", kw_only=True)
    image: Any = field(default=None, kw_only=True, repr=False)

    def plain(self) -> dict[str, Any]:
        """Everything but pictures, as JSON-able values."""
        return {"kind": self.kind, "source": self.source}

    def files(self) -> dict[str, bytes]:
        """What is saved beside the JSON: ending -> content."""
        return {}

    def save(self, path: str | Path) -> Path:
        """Write ``plain()`` as JSON, and ``files()`` under the same name with their endings. A name without the ending .json
        gets it. The JSON is written last: where it is, the result is whole. Returns it."""
        path = Path(path)
        path = path if path.suffix == ".json" else path.with_name(path.name + ".json")
        for ending, content in self.files().items():
            write_whole(path.with_name(path.name.removesuffix(".json") + ending), content)
        return write_whole(path, (json.dumps(self.plain(), indent=2, ensure_ascii=False) + "\n").encode())

    def overlay(self, *, size: int = 256) -> Image.Image:
        """The prediction drawn on or beside its input, about ``size`` pixels high. Raises ``UserError`` if it cannot be."""
        raise UserError(f"a {self.kind} has nothing to draw")


def write_whole(path: Path, content: bytes) -> Path:
    """Write a file that is whole at any moment it is there. Raises ``UserError`` where it cannot be written."""
    aside = path.with_name(f".{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        aside.write_bytes(content)
        os.replace(aside, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            aside.unlink()
        raise UserError(f"cannot write {path}: {error.strerror or error}") from None
    return path


def png(array: np.ndarray) -> bytes:
    """The PNG of uint8 ``[H, W]`` or ``[H, W, 3]``, or of uint16 ``[H, W]``."""
    from PIL import Image

    held = io.BytesIO()
    Image.fromarray(array).save(held, format="PNG")
    return held.getvalue()


def drawn(result: Any) -> bytes | None:
    """The overlay of a result as a PNG; None where there is nothing to see."""
    if not hasattr(result, "overlay"):
        return None
    try:
        picture = result.overlay()
    except UserError:
        return None
    held = io.BytesIO()
    picture.save(held, format="PNG")
    return held.getvalue()
