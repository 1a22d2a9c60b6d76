"""The page of a compression, from ``report.json`` and the picture beside it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from unmask.errors import UserError
from unmask.reports.pages import embedded, render, write_page

NAME = "report.html"


def page(folder: str | Path) -> Path:
    """Write ``report.html`` of a folder that ``unmask compress`` wrote. Raises ``UserError`` without ``report.json``."""
    folder = Path(folder)
    try:
        report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise UserError(f"{folder} holds no report.json of a compression") from None
    rows = report.get("rows") or []
    key = next((k for k in ("accuracy", "perplexity") if rows and k in rows[0]), "")
    text = render(
        "compression.html",
        title=f"{report['method']} on {report['model']}",
        lede=_lede(rows, key, report["method"]),
        rows=[_row(row, rows[0], key) for row in rows],
        key={"accuracy": "accuracy, %", "perplexity": "perplexity"}.get(key, ""),
        picture=embedded(folder / "importance.png"),
        loads=_loads(report, folder),
        budget=_budget(report.get("budget") or {}),
        data=_capital(report.get("data") or ""),
        refused=sorted(((report.get("importance") or {}).get("refused") or {}).items())[:20],
        options=sorted((report.get("options") or {}).items()),
        tokens=(report.get("importance") or {}).get("tokens"),
    )
    return write_page(folder / NAME, text)


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _lede(rows: list[dict[str, Any]], key: str, method: str) -> str:
    if len(rows) < 2:
        return "The model was made smaller; nothing was measured beside it."
    before, after = rows[0], rows[1]
    speed = before["milliseconds"]["median"] / max(after["milliseconds"]["median"], 1e-9)
    share = 100 * after["macs"] / max(before["macs"], 1)
    words = f"{share:.0f} % of the multiply-adds, {speed:.2f} times as fast on this machine"
    if key == "accuracy" and key in after:
        words += f", {after[key]:.1f} % right instead of {before[key]:.1f} %"
    elif key and key in after:
        words += f", perplexity {after[key]:.1f} instead of {before[key]:.1f}"
    return words + "."


def _row(row: dict[str, Any], first: dict[str, Any], key: str) -> dict[str, Any]:
    ms = row["milliseconds"]
    return {
        "name": row["name"],
        "metric": f"{row[key]:.2f}" if key in row else "–",
        "cells": [
            f"{_short(row[k])} ({100 * row[k] / max(first[k], 1):.0f} %)" for k in ("macs", "parameters", "bytes")
        ],
        "ms": f"{ms['median']:.2f}",
        "spread": f"{ms['low']:.2f} … {ms['high']:.2f}",
        "faster": f"{first['milliseconds']['median'] / max(ms['median'], 1e-9):.2f}×",
    }


def _short(value: float) -> str:
    for size, letter in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if value >= size:
            return f"{value / size:.3g}{letter}"
    return f"{value:.0f}"


def _budget(budget: dict[str, Any]) -> str:
    if not budget:
        return ""
    amount = f"{100 * budget['amount']:g} %" if budget.get("relative") else f"{budget['amount']:g}"
    return (
        f"{amount} of the {budget['kind'].replace('macs', 'multiply-adds')}"
        if budget.get("relative")
        else f"{amount} {budget['kind']}"
    )


def _loads(report: dict[str, Any], folder: Path) -> list[str]:
    told = report.get("loads") or {}
    lines = [f'unmask.load("{folder.name}") gives the module.']
    if told.get("plain"):
        options = ", ".join(f"{k}={v}" for k, v in (told.get("options") or {}).items())
        lines.append(f"Its own library builds the smaller architecture by its options: {options}." if options else "")
    elif told.get("why") and "another library" not in told["why"]:
        lines.append(f"Its own library's options cannot describe it: {told['why']}.")
    if (folder / "load_plain.py").is_file():
        lines.append("load_plain.py loads it without unmask.")
    if (folder / "onnx" / "model.onnx").is_file():
        lines.append("onnx/model.onnx runs in onnxruntime, with equal answers.")
    return [line for line in lines if line]
