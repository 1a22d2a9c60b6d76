"""Pictures of alignments, contact maps, mutation scans and pairings, as arrays and PNG files."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from unmask.systems.proteins.alphabet import CLS, MASK, PAD, VOCABULARY

# By the chemistry of the side chain, as alignment viewers colour letters.
_COLOURS = {
    "AVLIMC": (120, 160, 215),
    "FWYH": (95, 190, 190),
    "KR": (225, 110, 100),
    "DE": (190, 115, 200),
    "STNQ": (120, 195, 120),
    "G": (240, 170, 90),
    "P": (215, 205, 90),
    "-.": (242, 242, 240),
}
_INK = "#24292f"


def _palette() -> np.ndarray:
    table = np.full((len(VOCABULARY), 3), 180, dtype=np.uint8)
    for letters, colour in _COLOURS.items():
        for letter in letters:
            table[VOCABULARY.index(letter)] = colour
    table[[CLS, PAD]] = 255
    table[MASK] = 20
    return table


PALETTE = _palette()


def letters_picture(
    tokens: Tensor, *, right: Tensor | None = None, wrong: Tensor | None = None, cell: tuple[int, int] = (6, 3)
) -> Any:
    """uint8 ``[H, W, 3]``: a table of tokens ``[R, C]`` as coloured cells; ``right`` and ``wrong`` places in green and red."""
    picture = PALETTE[tokens[:, 1:].cpu().numpy()]
    for where, colour in ((right, (30, 140, 60)), (wrong, (210, 40, 40))):
        if where is not None:
            picture[where[:, 1:].cpu().numpy()] = colour
    return picture.repeat(cell[0], axis=0).repeat(cell[1], axis=1)


def figure_png(width: float, height: float, draw: Any, *, dpi: int = 130) -> bytes:
    """A PNG of what ``draw(figure)`` puts on a white matplotlib figure."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=dpi, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    draw(figure)
    held = io.BytesIO()
    figure.savefig(held, format="png")
    return held.getvalue()


def contact_map_png(
    values: np.ndarray, *, unit: str, target: np.ndarray | None = None, title: str = "", top: int | None = None
) -> bytes:
    """A map with its likeliest pairs (separation of 6 or more) ringed: above the diagonal the map, below it the truth where it is
    known."""
    length = len(values)

    def draw(figure: Any) -> None:
        axes = figure.add_subplot()
        i, j = np.triu_indices(length, 6)
        far = values[i, j]
        limits = (0.0, 1.0) if unit == "probability" else tuple(np.percentile(far, [2, 99.7])) if len(far) else (0, 1)
        shown = values.copy()
        if unit != "probability":
            near = np.abs(np.subtract.outer(np.arange(length), np.arange(length))) < 6
            shown = np.where(near, np.nan, shown)
        extent = (0.5, length + 0.5, length + 0.5, 0.5)
        image = axes.imshow(
            shown, cmap="Greys" if unit == "probability" else "viridis", vmin=limits[0], vmax=limits[1], extent=extent
        )
        best = np.argsort(-far, kind="stable")[: top or length]
        if target is None:
            axes.scatter(j[best] + 1, i[best] + 1, s=14, facecolors="none", edgecolors="#c2410c", linewidths=0.7)
        else:
            hit = target[i[best], j[best]] == 1
            for which, colour in ((hit, "#15803d"), (~hit, "#dc2626")):
                axes.scatter(
                    j[best][which] + 1, i[best][which] + 1, s=14, facecolors="none", edgecolors=colour, linewidths=0.8
                )
            x, y = np.nonzero(np.tril(target == 1, -6))
            axes.scatter(y + 1, x + 1, s=3, color="#93c5fd", marker="s")
        axes.set_xlabel("column (from 1)")
        axes.set_ylabel("column (from 1)")
        axes.set_title(title, fontsize=9, color=_INK)
        figure.colorbar(image, ax=axes, shrink=0.75, label=unit)

    return figure_png(5.6, 4.8, draw)


def heat_map_png(scores: np.ndarray, query: str, letters: str, *, title: str = "") -> bytes:
    """Site x amino acid, wild types as dots. scores ``[L, 20]``."""
    length = len(query)

    def draw(figure: Any) -> None:
        axes = figure.add_subplot()
        limit = float(np.percentile(np.abs(scores), 98)) or 1.0
        image = axes.imshow(scores.T, cmap="RdBu", vmin=-limit, vmax=limit, aspect="auto", interpolation="nearest")
        known = [(place, letters.index(letter)) for place, letter in enumerate(query) if letter in letters]
        axes.scatter(*zip(*known, strict=True), s=5, color=_INK) if known else None
        axes.set_yticks(range(len(letters)), list(letters), fontsize=7)
        axes.set_xlabel("place in the query (from 1)")
        step = max(length // 12, 1)
        axes.set_xticks(range(0, length, step), [str(i + 1) for i in range(0, length, step)], fontsize=7)
        axes.set_title(title, fontsize=9, color=_INK)
        figure.colorbar(image, ax=axes, label="log-odds against the wild type", pad=0.01)

    return figure_png(min(max(5.0, length / 14), 18), 3.6, draw)


def save_maps(maps: Tensor, strength: Tensor, path: Path) -> dict[str, str]:
    """Row maps beside the couplings of DCA, written as PNG; what a report needs to show it."""
    tables = [("row maps of the network", maps.numpy()), ("mean-field DCA couplings", strength.numpy())]

    def draw(figure: Any) -> None:
        for place, (title, table) in enumerate(tables):
            axes = figure.add_subplot(1, 2, place + 1)
            near = np.abs(np.subtract.outer(*(2 * [np.arange(len(table))]))) < 6
            shown = np.where(near, np.nan, table)
            low, high = np.nanpercentile(shown, [2, 99.5]) if (~near).any() else (0, 1)
            axes.imshow(shown, cmap="viridis", vmin=low, vmax=high)
            axes.set_title(title, fontsize=9, color=_INK)

    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(figure_png(8.0, 4.0, draw))
    return {
        "file": path.name,
        "caption": "Which columns go together: APC-corrected row maps, and DCA couplings of the whole family",
    }


def pairing_png(
    soft: np.ndarray,
    hard: np.ndarray,
    sizes: list[int],
    *,
    losses: list[float] | None = None,
    correct: list[float] | None = None,
    chance: float | None = None,
    title: str = "",
) -> bytes:
    """Block-diagonal matrices of left against right rows, species by species: shares of runs, pairs; and the losses by step, with
    the number of correct pairs where it is known."""
    count = 2 + bool(losses) + bool(correct)
    edges = np.cumsum([0, *sizes])

    def draw(figure: Any) -> None:
        for place, (name, table) in enumerate((("share of runs", soft), ("pairs", hard))):
            axes = figure.add_subplot(1, count, place + 1)
            where = (0.5, table.shape[1] + 0.5, table.shape[0] + 0.5, 0.5)  # rows count from 1, as in the table
            colours = "Greens" if place == 0 else "Greys"
            axes.imshow(table, cmap=colours, vmin=0, vmax=1, interpolation="nearest", extent=where)
            for start, size in zip(edges[:-1], sizes, strict=True):
                axes.add_patch(_square(start + 0.5, size))
            for axis in (axes.xaxis, axes.yaxis):
                axis.get_major_locator().set_params(integer=True)
            axes.set_title(name, fontsize=9, color=_INK)
            axes.set_xlabel("right rows, a box a species")
            axes.set_ylabel("left rows")
        if losses:
            axes = figure.add_subplot(1, count, 3)
            axes.plot(losses, color="#0f766e", linewidth=1.2)
            axes.set_title("masked loss (mean of runs)", fontsize=9, color=_INK)
            axes.set_xlabel("step")
        if correct:
            axes = figure.add_subplot(1, count, count)
            axes.plot(correct, color="#0f766e", linewidth=1.2)
            if chance is not None:
                axes.axhline(chance, color="#7c8591", linestyle="--", linewidth=1, label="chance")
                axes.legend(fontsize=7)
            axes.set_title("correct pairs (mean of runs)", fontsize=9, color=_INK)
            axes.set_xlabel("step")
        figure.suptitle(title, fontsize=9, color=_INK)

    return figure_png(3.4 * count, 3.5, draw)


def _square(start: float, size: int) -> Any:
    from matplotlib.patches import Rectangle

    return Rectangle((start, start), size, size, fill=False, edgecolor="#c2410c", linewidth=0.8)
