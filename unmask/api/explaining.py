"""``explain``."""

from __future__ import annotations

from typing import Any, NoReturn

from unmask.catalog import list_systems
from unmask.errors import UserError


def explain(model: Any, files: Any, *, method: str | None = None, out: Any = None) -> NoReturn:
    """Attribute a model's answer to its input with a system that explains. Raises ``UserError`` as long as none is installed."""
    _nobody("explain", "unmask explain")


def _nobody(verb: str, command: str) -> NoReturn:
    serving = [card.slug for card in list_systems(verb)]
    if serving:
        raise UserError(f"{command} does not run {', '.join(serving)} yet: call {serving[0]} through its own package")
    raise UserError(f"no installed system serves the verb {verb} yet: unmask list shows what there is")
