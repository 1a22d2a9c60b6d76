"""``compress``."""

from __future__ import annotations

from typing import Any, NoReturn

from unmask.catalog import list_systems
from unmask.errors import UserError


def compress(
    model: Any, *, method: str | None = None, data: str | None = None, budget: str | None = None, out: Any = None
) -> NoReturn:
    """Make a model smaller with a system that compresses. Raises ``UserError`` as long as none is installed."""
    _nobody("compress", "unmask compress")


def _nobody(verb: str, command: str) -> NoReturn:
    serving = [card.slug for card in list_systems(verb)]
    if serving:
        raise UserError(f"{command} does not run {', '.join(serving)} yet: call {serving[0]} through its own package")
    raise UserError(f"no installed system serves the verb {verb} yet: unmask list shows what there is")
