"""The picture of a claim: every arm with its seeds, seeds of the same number joined, so that the pairing is seen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from unmask.errors import UserError
from unmask.reports.runs import finite

_METHOD, _OTHER, _INK, _RULE, _SEED = "#0f766e", "#7c8591", "#24292f", "#e2e3df", "#b9bfc7"


def arm_values(result: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """``{arm: {seed: value}}`` of the claim's metric, from a file that ``unmask reproduce`` wrote.

    Understands ``numbers[metric][arm] = [one value a seed]`` with ``seeds``, and a list of ``runs`` with arm, seed and the
    metric's value. Raises ``UserError`` when neither is there.
    """
    metric = str(result.get("metric") or "")
    numbers = (result.get("numbers") or {}).get(metric)
    if isinstance(numbers, Mapping):
        seeds = [str(s) for s in result.get("seeds") or []] if isinstance(result.get("seeds"), Sequence) else []
        return {
            str(arm): {(seeds[i] if i < len(seeds) else str(i)): float(v) for i, v in enumerate(values) if finite(v)}
            for arm, values in numbers.items()
        }
    arms: dict[str, dict[str, float]] = {}
    for run in result.get("runs") or []:
        value = run.get("value", (run.get("values") or {}).get(metric))
        if finite(value):
            arms.setdefault(str(run.get("arm")), {})[str(run.get("seed"))] = float(value)
    if not arms:
        raise UserError(
            f"the result of {result.get('slug', 'this claim')} holds no values of its metric {metric!r}: run it again"
        )
    return arms


def claim_figure(result: Mapping[str, Any], path: Path | str) -> Path:
    """Draw a claim's arms, the method first, and return the file; its ending chooses PNG, SVG or PDF.

    A dot is a seed, a bar the mean; lines join the dots of one seed. Values that lie in 0 ... 1 are shown in per cent.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    arms = arm_values(result)
    method = str(result.get("method") or next(iter(arms)))
    order = sorted(arms, key=lambda a: a != method)
    share = all(0 <= v <= 1 for values in arms.values() for v in values.values())
    scale = 100 if share else 1
    figure = Figure(figsize=(max(4.8, 1.25 * len(order) + 2.2), 3.9), dpi=160, facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for seed in dict.fromkeys(s for a in order for s in arms[a]):
        points = [(i, scale * arms[a][seed]) for i, a in enumerate(order) if seed in arms[a]]
        axes.plot(*zip(*points, strict=True), color=_SEED, linewidth=0.9, zorder=1)
    values = [scale * v for a in order for v in arms[a].values()]
    for i, arm in enumerate(order):
        color = _METHOD if arm == method else _OTHER
        own = [scale * v for v in arms[arm].values()]
        mean = sum(own) / len(own)
        axes.plot([i - 0.24, i + 0.24], [mean, mean], color=color, linewidth=3, solid_capstyle="round", zorder=2)
        axes.scatter([i] * len(own), own, s=30, color=color, edgecolor="white", linewidth=0.8, zorder=3)
        axes.annotate(
            f"{mean:.1f}" if max(values) >= 10 else f"{mean:.3g}",
            (i + 0.3, mean),
            color=color,
            fontsize=9,
            va="center",
            fontweight="bold",
        )
    reach = (max(values) - min(values)) or abs(values[0]) or 1
    axes.set_ylim(min(values) - 0.15 * reach, max(values) + 0.15 * reach)
    axes.set_xlim(-0.5, len(order) - 0.15)
    axes.set_xticks(range(len(order)), [_wrapped(a) for a in order], fontsize=9, color=_INK)
    axes.set_ylabel(_metric_words(result) + (", %" if share else ""), fontsize=9, color=_INK)
    axes.set_title(_title(result), fontsize=10, color=_INK, loc="left", pad=10)
    axes.grid(axis="y", color=_RULE, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(length=0, labelsize=9, colors=_INK)
    for side in axes.spines.values():
        side.set_visible(False)
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, bbox_inches="tight", pad_inches=0.15, metadata=_undated(path))
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}: choose another place") from None
    except ValueError:
        raise UserError(f"cannot draw {path}: a figure ends in .png, .svg or .pdf") from None
    return path


def _undated(path: Path) -> dict[str, Any] | None:
    """No date in the file, so that the same numbers give the same figure."""
    return {".svg": {"Date": None}, ".pdf": {"CreationDate": None}}.get(path.suffix)


def _metric_words(result: Mapping[str, Any]) -> str:
    from unmask.reports.wording import metric_name

    return str(result.get("metric_label") or metric_name(str(result.get("metric") or "")))


def _title(result: Mapping[str, Any]) -> str:
    words = [str(result.get(k)) for k in ("slug", "tier") if result.get(k)]
    return ", ".join(words) + (f": {result['verdict']}" if result.get("verdict") else "")


def _wrapped(text: str, width: int = 16) -> str:
    lines = [""]
    for word in text.split():
        if lines[-1] and len(lines[-1]) + 1 + len(word) > width:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return "\n".join(lines)
