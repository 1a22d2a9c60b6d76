"""What was cut, to look at: layers by heads with the removed ones struck out, kept neurons or channels as bars."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

INK, QUIET, KEPT, GONE = "#1d2733", "#7a8694", "#2f6f9f", "#d9dee4"


def importance_picture(layers: Sequence[Mapping[str, Any]], path: Path) -> Path:
    """One PNG. layers: ``name``, ``kind``, ``scores`` (at most 0) and ``kept``, in the order of the network."""
    from matplotlib.figure import Figure

    heads = [x for x in layers if x["kind"] == "head"]
    rest = [x for x in layers if x["kind"] != "head"]
    parts = int(bool(heads)) + int(bool(rest))
    rows = max(len(heads), len(rest), 1)
    figure = Figure(figsize=(4.6 * parts + 0.6, 1.3 + 0.3 * rows), dpi=140, layout="constrained")
    axes = list(np.atleast_1d(np.asarray(figure.subplots(1, parts))))
    if heads:
        _heads(axes.pop(0), heads)
    if rest:
        _bars(axes.pop(0), rest)
    figure.savefig(path, metadata={"Software": None})
    return path


def _heads(axes: Any, heads: Sequence[Mapping[str, Any]]) -> None:
    width = max(len(x["scores"]) for x in heads)
    values = np.full((len(heads), width), np.nan)
    for i, x in enumerate(heads):
        values[i, : len(x["scores"])] = np.log10(np.maximum(-np.asarray(x["scores"]), 1e-12))
    finite = values[np.isfinite(values)]
    low, high = np.quantile(finite, [0.02, 1.0]) if finite.size else (0, 1)
    shown = axes.imshow(values, aspect="auto", cmap="YlGnBu", vmin=low, vmax=max(high, low + 1e-6))
    for i, x in enumerate(heads):
        for j, kept in enumerate(x["kept"]):
            if not kept:
                axes.plot([j - 0.38, j + 0.38], [i + 0.38, i - 0.38], color="#c0392b", linewidth=1.6)
                axes.plot([j - 0.38, j + 0.38], [i - 0.38, i + 0.38], color="#c0392b", linewidth=1.6)
    axes.set_xticks(range(width), [str(j + 1) for j in range(width)], fontsize=8)
    axes.set_yticks(range(len(heads)), [str(i + 1) for i in range(len(heads))], fontsize=8)
    axes.set_xlabel("head", fontsize=9, color=INK)
    axes.set_ylabel("layer", fontsize=9, color=INK)
    axes.set_title("importance of heads; crossed out: cut", fontsize=9, loc="left", color=INK)
    bar = axes.figure.colorbar(shown, ax=axes, fraction=0.05, pad=0.03)
    bar.set_label("log10 of the score", fontsize=8)
    bar.ax.tick_params(labelsize=7)
    axes.tick_params(length=0)
    for side in axes.spines.values():
        side.set_visible(False)


def _bars(axes: Any, layers: Sequence[Mapping[str, Any]]) -> None:
    kinds = sorted({str(x["kind"]) for x in layers})
    counts = [len(x["kept"]) for x in layers]
    kept = [int(np.sum(x["kept"])) for x in layers]
    places = np.arange(len(layers))
    axes.barh(places, counts, color=GONE, height=0.72)
    axes.barh(places, kept, color=KEPT, height=0.72)
    for place, n, whole in zip(places, kept, counts, strict=True):
        inside = n > 0.3 * max(counts)
        axes.text(
            n + (-0.01 if inside else 0.01) * max(counts),
            place,
            f"{n} of {whole}",
            va="center",
            ha="right" if inside else "left",
            fontsize=7,
            color="white" if inside else INK,
        )
    names = [str(x["name"]) if len(layers) > 8 or kinds != ["neuron"] else str(i + 1) for i, x in enumerate(layers)]
    axes.set_yticks(places, names if kinds != ["neuron"] else [str(i + 1) for i in range(len(layers))], fontsize=7)
    axes.invert_yaxis()
    axes.set_ylabel("layer", fontsize=9, color=INK)
    axes.set_title(f"{' and '.join(k + 's' for k in kinds)} that stay", fontsize=9, loc="left", color=INK)
    axes.tick_params(length=0, labelsize=7)
    for side in ("top", "right", "left", "bottom"):
        axes.spines[side].set_visible(False)
    axes.set_xticks([])
