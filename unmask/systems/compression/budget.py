"""Budgets: what a user may say, and what it means for a model."""

from __future__ import annotations

import re
from typing import Any

from unmask.contracts import Budget
from unmask.errors import UserError, nearest

KINDS = ("macs", "parameters", "bytes", "milliseconds")
SHORT = {"ms": "milliseconds", "params": "parameters", "flops": "macs", "latency": "milliseconds"}
SUFFIXES = {"k": 1e3, "m": 1e6, "g": 1e9}


def parse_budget(text: str | Budget) -> Budget:
    """``macs=0.6`` (a share), ``macs=300M``, ``parameters=5M``, ``bytes=4M``, ``ms=12``, ``milliseconds=0.5x`` (a share).

    A number up to 1 is a share of the original's, but of milliseconds only with an ``x`` behind it. Raises ``UserError``.
    """
    if isinstance(text, Budget):
        return text
    kind, equals, amount = str(text).partition("=")
    kind = SHORT.get(kind.strip().lower(), kind.strip().lower())
    if not equals:
        raise UserError(f"budget {text!r} is no budget: write macs=0.6, parameters=5M, bytes=4M or ms=12")
    if kind not in KINDS:
        raise UserError(f"no budget of {kind!r}: {nearest(kind, KINDS)}")
    found = re.fullmatch(r"([0-9]*\.?[0-9]+(?:e[+-]?\d+)?)\s*([kKmMgGxX%]?)", amount.strip())
    if found is None:
        raise UserError(f"budget {kind}={amount} is no amount: write 0.6 for a share, 300M for a number")
    value, suffix = float(found[1]), found[2].lower()
    share = suffix in ("x", "%") or (not suffix and value <= 1 and kind != "milliseconds")
    value = value / 100 if suffix == "%" else value * SUFFIXES.get(suffix, 1.0)
    if value <= 0 or (share and value > 1):
        raise UserError(f"budget {kind}={amount} does not fit: a share lies above 0 and at most at 1")
    return Budget(kind, value, share)


def absolute(budget: Budget, before: float) -> float:
    """The budget in its own units. before: what the model costs now. Raises ``UserError`` for one that the model meets
    already."""
    if budget.relative:
        return budget.amount * before
    if budget.amount > before:
        raise UserError(
            f"budget {budget.kind}={budget.amount:g}: the model costs {shown(budget.kind, before)} already, which is less"
        )
    return budget.amount


def unreachable(budget: Budget, target: float, least: float, before: float, why: str) -> UserError:
    """The error for a budget that cannot be reached: it names the smallest that can."""
    smallest = f"{least / before:.3f}".rstrip("0").rstrip(".") if budget.relative else f"{least:.6g}"
    if budget.relative and float(smallest) < least / before:
        smallest = f"{float(smallest) + 0.001:.3f}"
    return UserError(
        f"budget {budget.kind}={budget.amount:g} cannot be reached ({shown(budget.kind, target)}): {why}; "
        f"the smallest that can be reached is {budget.kind}={smallest}"
    )


def shown(kind: str, amount: float) -> str:
    """An amount as a person reads it: ``1.26 G MACs``, ``3.1 MB``, ``12.4 ms``."""
    if kind == "milliseconds":
        return f"{amount:.3g} ms"
    unit = {"macs": "MACs", "parameters": "parameters", "bytes": "B"}[kind]
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if amount >= size:
            return f"{amount / size:.3g} {letter}{'' if unit == 'B' else ' '}{unit}"
    return f"{amount:.0f} {unit}"


def plain(budget: Budget) -> dict[str, Any]:
    return {"kind": budget.kind, "amount": budget.amount, "relative": budget.relative}
