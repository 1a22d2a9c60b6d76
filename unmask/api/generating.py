"""``generate``."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NoReturn

from unmask.catalog import list_systems
from unmask.errors import UserError


def generate(model: Any, n: int = 16, *, out: str | Path | None = None) -> NoReturn:
    """Make new samples with a system that generates. Raises ``UserError`` as long as none is installed."""
    _nobody("generate", "unmask generate")


def _nobody(verb: str, command: str) -> NoReturn:
    serving = [card.slug for card in list_systems(verb)]
    if serving:
        raise UserError(f"{command} does not run {', '.join(serving)} yet: call {serving[0]} through its own package")
    raise UserError(f"no installed system serves the verb {verb} yet: unmask list shows what there is")
