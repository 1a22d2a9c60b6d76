"""Hide something, and learn from what is missing.

    import unmask

    run = unmask.train("mae", data="photos/")       # the same as `unmask train mae --data photos/`
    unmask.evaluate(run, probe="ridge")
    encoder = unmask.load(run)                      # an nn.Module: images [B, C, H, W] -> features [B, D]

Importing this module imports no torch: each name below is looked up when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from unmask.api.catalogue import info as info
    from unmask.api.comparing import compare as compare
    from unmask.api.compressing import compress as compress
    from unmask.api.demonstration import demo as demo
    from unmask.api.explaining import explain as explain
    from unmask.api.exporting import export as export
    from unmask.api.exporting import import_checkpoint as import_checkpoint
    from unmask.api.generating import generate as generate
    from unmask.api.loading import load as load
    from unmask.api.machine import doctor as doctor
    from unmask.api.measuring import evaluate as evaluate
    from unmask.api.predicting import predict as predict
    from unmask.api.reading import replay as replay
    from unmask.api.reading import report as report
    from unmask.api.reading import runs as runs
    from unmask.api.training import train as train
    from unmask.catalog import list_systems as list_systems
    from unmask.claims import reproduce as reproduce
    from unmask.errors import UserError as UserError

__version__ = "0.1.0"

_PLACES = {
    "train": "unmask.api.training",
    "evaluate": "unmask.api.measuring",
    "predict": "unmask.api.predicting",
    "generate": "unmask.api.generating",
    "compress": "unmask.api.compressing",
    "explain": "unmask.api.explaining",
    "compare": "unmask.api.comparing",
    "load": "unmask.api.loading",
    "export": "unmask.api.exporting",
    "import_checkpoint": "unmask.api.exporting",
    "report": "unmask.api.reading",
    "runs": "unmask.api.reading",
    "replay": "unmask.api.reading",
    "reproduce": "unmask.claims",
    "demo": "unmask.api.demonstration",
    "doctor": "unmask.api.machine",
    "info": "unmask.api.catalogue",
    "list_systems": "unmask.catalog",
    "UserError": "unmask.errors",
}

__all__ = ["__version__", *_PLACES]


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module 'unmask' has no attribute {name!r}")
    value = getattr(importlib.import_module(_PLACES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_PLACES})
