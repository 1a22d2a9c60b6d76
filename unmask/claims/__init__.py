"""Claims of papers, shown at small scale: budgets, statistics, verdicts. ``unmask reproduce`` runs them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from unmask.claims.run import reproduce as reproduce

__all__ = ["reproduce"]


def __getattr__(name: str) -> Any:
    if name != "reproduce":
        raise AttributeError(f"module 'unmask.claims' has no attribute {name!r}")
    from unmask.claims.run import reproduce

    return reproduce
