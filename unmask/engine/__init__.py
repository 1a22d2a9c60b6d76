"""The loop that trains everything, and the folder a run leaves. It names no system.

:func:`~unmask.engine.stages.train` runs one stage or several; :func:`~unmask.engine.failure.replay` repeats a failed
step. Names are looked up when asked for: reading a run's folder or the settings imports no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_WHERE = {
    "TrainSettings": "settings",
    "RunFolder": "run",
    "read_metrics": "run",
    "read_run": "run",
    "Interrupted": "run",
    "Stage": "stages",
    "train": "stages",
    "stage_folder": "run",
    "replay": "failure",
    "StepFailed": "failure",
}

__all__ = [*_WHERE]


def __getattr__(name: str) -> Any:
    if name in _WHERE:
        return getattr(import_module(f"unmask.engine.{_WHERE[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
