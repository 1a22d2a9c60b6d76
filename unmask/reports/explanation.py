"""The page of ``unmask explain``: each photograph with its heat maps, and a table of what each method is worth."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from unmask.reports.pages import embedded, render, write_page

COLUMNS = (
    ("deletion", "deletion", "area under the class's probability as the hottest pixels are hidden; lower is better"),
    ("insertion", "insertion", "the same as they are shown; higher is better"),
    ("r2", "fit (R²)", "how well LIME's linear model fits the answers; 1 is best"),
    ("coverage", "coverage", "cosine of the regions' weights and the object; 1 is best"),
    ("overlap", "overlap", "of the object and the 20 hottest regions, intersection over union"),
    ("sensitivity", "sensitivity", "how far the map moves when the image hardly does; lower is better"),
    ("seconds", "seconds", "on this machine, without the curves"),
)
BEST = {"deletion": min, "insertion": max, "coverage": max, "overlap": max, "sensitivity": min}


def write_explanations(folder: Path) -> Path:
    """``index.html`` from what lies in the folder (``explanations.json`` and its pictures); one file that stands alone."""
    told = json.loads((folder / "explanations.json").read_text(encoding="utf-8"))
    images = [_image(folder, one) for one in told["images"]]
    page = render(
        "explanation.html",
        title=f"What {_short(told['model'])} looks at",
        model=told["model"],
        images=images,
    )
    return write_page(folder / "index.html", page)


def _image(folder: Path, one: dict[str, Any]) -> dict[str, Any]:
    methods = one["methods"]
    columns = [c for c in COLUMNS if any(c[0] in m for m in methods)]
    best = {k: pick(m[k] for m in methods if k in m) for k, pick in BEST.items() if any(k in m for m in methods)}
    rows = []
    for m in methods:
        cells = []
        for key, _, _ in columns:
            value = m.get(key)
            text = "" if value is None else f"{value:.1f}" if key == "seconds" else f"{value:.3f}"
            cells.append((text, len(methods) > 1 and value is not None and best.get(key) == value))
        rows.append(
            {
                "name": words(m["method"]),
                "about": m["about"],
                "cells": cells,
                "image": embedded(folder / one["files"][m["method"]]),
            }
        )
    return {
        "name": Path(one["source"]).name,
        "photo": embedded(folder / one["photo"]),
        "answer": one["name"],
        "probability": f"{100 * one['probability']:.1f} %",
        "answers": [(n, f"{100 * p:.1f} %") for n, p in one["answers"]],
        "likeliest": one["answers"][0][0] == one["name"],
        "judge": words(one["judge"]),
        "columns": columns,
        "rows": rows,
        "chart": [_chart(methods, kind) for kind in ("deletion", "insertion")],
        "legend": [(words(m["method"]), f"var(--s{i % 8})", "", "") for i, m in enumerate(methods)],
    }


def _short(model: str) -> str:
    """A folder by its own name; ``timm/NAME`` as it is."""
    return Path(model).name if Path(model).exists() else model


def words(method: str) -> str:
    return method.replace("_", " ")


def _chart(methods: list[dict[str, Any]], kind: str) -> dict[str, Any]:
    """Curves in a box of 360 x 200: share of pixels to the right, probability upwards."""
    lines = []
    for i, m in enumerate(methods):
        curve = m["curves"][kind]
        points = " ".join(
            f"{30 + 320 * at / (len(curve) - 1):.1f},{175 - 160 * value:.1f}" for at, value in enumerate(curve)
        )
        lines.append((points, f"var(--s{i % 8})", words(m["method"])))
    title = "Hottest pixels hidden first" if kind == "deletion" else "Hottest pixels shown first"
    axis = "share of pixels hidden" if kind == "deletion" else "share of pixels shown"
    return {"title": title, "axis": axis, "lines": lines}
