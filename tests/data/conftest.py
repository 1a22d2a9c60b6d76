"""A cache and a data root of their own for every test, and small images of every kind."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image
from pixels import noise


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("UNMASK_CACHE", str(folder))
    monkeypatch.delenv("UNMASK_DATA", raising=False)
    return folder


@pytest.fixture
def photos(tmp_path: Path) -> Callable[..., Path]:
    """``photos(n, height, width)`` writes a folder of smooth colour JPEGs, ragged unless told otherwise."""

    def make(n: int = 6, height: int = 60, width: int = 80, ragged: bool = True, classes: int = 0) -> Path:
        folder = tmp_path / "photos"
        for i in range(n):
            h, w = (height + 7 * i, width + 5 * (n - i)) if ragged else (height, width)
            where = folder / f"class{i % classes}" if classes else folder
            where.mkdir(parents=True, exist_ok=True)
            small = Image.fromarray(noise(6, 8, 3, seed=i))
            small.resize((w, h), Image.Resampling.BICUBIC).save(where / f"{i:03}.jpg", quality=95)
        return folder

    return make
