"""What an encoder knows, measured: probes of frozen features, fine-tuning, and RankMe where there are no labels.

    from unmask.evaluation import evaluate
    evaluate("runs/mae", "photos/", "ridge")["top1"]         # beside the same network at random initialisation

Each probe has its file: ``ridge``, ``knn``, ``linear``, ``attentive``, ``finetune``, ``rankme``. Nothing is imported
before it is asked for.
"""

from __future__ import annotations

import importlib
from typing import Any

_WHERE = {"evaluate": "measure", "PROBES": "measure", "monitors_for": "monitors"}

__all__ = sorted(_WHERE)


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_WHERE[name]}"), name)
