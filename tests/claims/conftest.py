"""A toy claim on the bundled images: seconds, not minutes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from unmask import catalog

TOY: dict[str, Any] = {
    "statement": "hiding more teaches more",
    "source": "nowhere: a toy",
    "tiers": {
        "tiny": {
            "about": "three steps of eight images: shows nothing",
            "budget": {"steps": 3, "batch_size": 8},
            "seeds": 3,
            "system": "mae",
            "data": {"uri": "sample:fashion", "image_size": 28, "augment": "none", "limit": 64},
            "model": {
                "backbone": {"name": "vit_nano_patch7", "depth": 1, "embed_dim": 32, "num_heads": 2},
                "decoder": {"embed_dim": 32, "depth": 1, "num_heads": 2},
            },
            "train": {"lr": 1e-3, "compile": "off", "precision": "fp32", "device": "cpu"},
            "arms": {
                "ratio 0.75": None,
                "ratio 0.25": ["mask_ratio=0.25"],
                "random initialisation": {"untrained": True},
            },
            "method": "ratio 0.75",
            "baselines": ["ratio 0.25", "random initialisation"],
            "metric": "ridge",
            "metrics": {"ridge": {"probe": "ridge", "data": "sample:fashion", "options": {"limit": 80}}},
        }
    },
}


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A system "toy" with a claim.yaml; the path of the claim."""
    folder = tmp_path / "toy"
    folder.mkdir()
    path = folder / "claim.yaml"
    path.write_text(yaml.safe_dump(TOY, sort_keys=False))
    card = catalog.Card(slug="toy", title="Toy", folder=str(folder))
    everything = {**catalog.cards(), "toy": card}
    monkeypatch.setattr(catalog, "cards", lambda: everything)
    monkeypatch.chdir(tmp_path)
    return path
