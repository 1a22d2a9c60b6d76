"""Images from anywhere, as batches on any device.

    import unmask.data as data
    source = data.open("photos/")                       # folder, parquet, shards/*.tar, cifar10, a hub id, sample:fashion
    batches = data.Batches(source, data.DataSettings(image_size=96), batch_size=64)
    for raw in batches.iterate(0):
        batch = batches.transform(raw, Seeded(0))        # {"image": float [B, C, H, W], "label": [B], "index": [B]}

Nothing is imported before it is asked for.
"""

from __future__ import annotations

import importlib
from typing import Any

_WHERE = {
    "open": ("unmask.data.opening", "open_source"),
    "from_settings": ("unmask.data.opening", "from_settings"),
    "train_and_test": ("unmask.data.opening", "train_and_test"),
    "Source": ("unmask.data.source", "Source"),
    "Batches": ("unmask.data.batches", "Batches"),
    "all": ("unmask.data.batches", "everything"),
    "everything": ("unmask.data.batches", "everything"),
    "DataSettings": ("unmask.data.settings", "DataSettings"),
    "RandAugmentSettings": ("unmask.data.settings", "RandAugmentSettings"),
    "Mixing": ("unmask.data.mixing", "Mixing"),
    "mix": ("unmask.data.mixing", "mix"),
}

__all__ = sorted(_WHERE)


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, attribute = _WHERE[name]
    return getattr(importlib.import_module(module), attribute)
