"""A toy generator as if it were installed, and small images to train it on."""

from __future__ import annotations

import numpy as np
import pytest
import toy_generator
from PIL import Image
from toy_generator import toy

from unmask import catalog


@pytest.fixture
def installed(monkeypatch):
    """The toy's card stands in the catalog."""
    monkeypatch.setitem(catalog.cards(), "toy_generator", toy_generator.CARD)


@pytest.fixture(scope="session")
def pictures(tmp_path_factory):
    """48 images of two classes, 8 x 12: red ones and blue ones."""
    folder = tmp_path_factory.mktemp("pictures")
    generator = np.random.default_rng(0)
    for name, colour in (("blue", (20, 40, 220)), ("red", (220, 40, 20))):
        (folder / name).mkdir()
        for number in range(24):
            pixels = np.clip(np.array(colour) + generator.normal(0, 15, (8, 12, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{number}.png")
    return folder


@pytest.fixture
def toy_folder(tmp_path):
    """A saved toy, as ``unmask generate`` takes it."""
    toy().save_pretrained(tmp_path / "toy" / "model")
    return tmp_path / "toy"
