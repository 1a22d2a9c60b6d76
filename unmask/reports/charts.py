"""Charts as inline SVG: drawn with the page's own colours (CSS variables), so that they follow light, dark and print.

Nothing is fetched and nothing runs: a chart is text. Colours are the page's ``--s0`` ... ``--s7``, ``--ink``,
``--quiet`` and ``--rule``.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

from unmask.reports.runs import Point
from unmask.reports.wording import number

COLORS = tuple(f"var(--s{i})" for i in range(8))
DASHES = ("5 4", "1.5 3.5", "9 4 2 4", "2.5 2.5", "12 4")


@dataclass(frozen=True)
class Line:
    """One curve. ``raw``: the unsmoothed values, drawn faintly behind it."""

    name: str
    points: Sequence[Point]
    color: str = COLORS[0]
    dash: str = ""
    raw: Sequence[Point] = ()
    dots: bool = False


@dataclass(frozen=True)
class Level:
    """A horizontal line that a curve is read against."""

    name: str
    value: float
    dash: str = DASHES[0]
    color: str = "var(--quiet)"


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About ``count`` round numbers within [low, high]: multiples of 1, 2, 2.5 or 5 times a power of ten."""
    if not high > low:
        return [low]
    raw = (high - low) / max(count, 1)
    base = 10.0 ** math.floor(math.log10(raw))
    step = next(base * m for m in (1, 2, 2.5, 5, 10) if base * m >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    out = []
    while (value := first * step) <= high + step * 1e-9:
        out.append(0.0 if abs(value) < step * 1e-9 else value)
        first += 1
    return out


def tick_texts(values: Sequence[float], share: bool = False) -> list[str]:
    """The ticks of one axis, all with the same number of decimals. share: as per cent."""
    scale = 100 if share else 1
    step = min((b - a for a, b in itertools.pairwise(values)), default=abs(values[0]) if values else 1) * scale
    if not share and 0 < max((abs(v) for v in values), default=0) < 1e-3:
        return [number(v) for v in values]
    if step >= 1 and all(float(v * scale).is_integer() for v in values):
        texts = [number(round(v * scale)) for v in values]
    else:
        decimals = next((d for d in range(7) if abs(round(step, d) - step) < step * 1e-6), 6)
        texts = [f"{v * scale:.{decimals}f}" for v in values]
    return [f"{t}\u202f%" for t in texts] if share else texts


def smoothed(points: Sequence[Point], share: float = 0.04) -> list[Point]:
    """A centred moving average over ``share`` of the points; the ends use what they have."""
    half = int(len(points) * share / 2)
    if half < 1:
        return list(points)
    sums = [0.0]
    for _, value in points:
        sums.append(sums[-1] + value)
    out = []
    for i, (x, _) in enumerate(points):
        first, last = max(i - half, 0), min(i + half + 1, len(points))
        out.append((x, (sums[last] - sums[first]) / (last - first)))
    return out


def thinned(points: Sequence[Point], most: int = 400) -> list[Point]:
    """At most about ``most`` points: of every bucket its lowest and highest, so that no spike is lost."""
    if len(points) <= most:
        return list(points)
    size = math.ceil(2 * len(points) / most)
    out: list[Point] = [points[0]]
    for start in range(0, len(points), size):
        bucket = points[start : start + size]
        out += sorted({min(bucket, key=lambda p: p[1]), max(bucket, key=lambda p: p[1])})
    return [*out, points[-1]]


def value_range(lines: Sequence[Line], levels: Sequence[Level], zero: bool = False) -> tuple[float, float]:
    """The y axis: everything, except that a few high values (the first steps of a loss) may leave at the top."""
    values = sorted(v for line in lines for _, v in (*line.points, *line.raw))
    given = [level.value for level in levels]
    if not values:
        values = sorted(given) or [0.0, 1.0]
    low, high = min([values[0], *given]), max([values[-1], *given])
    usual = max([values[int(0.95 * (len(values) - 1))], *given])
    if len(values) > 20 and low >= 0 and high > 2 * usual > 0:
        high = 1.15 * usual
    if zero:
        low = min(low, 0.0)
    pad = (high - low) * 0.06 or abs(high) * 0.1 or 1.0
    return (low if zero and low == 0 else low - pad), high + pad


def line_chart(
    lines: Sequence[Line],
    levels: Sequence[Level] = (),
    *,
    name: str,
    title: str,
    x_label: str = "step",
    width: int = 360,
    height: int = 220,
    labels: bool = False,
    zero: bool = False,
    share: bool = False,
    y_text: Callable[[float], str] = number,
) -> Markup:
    """Curves over a common x axis, with levels to read them against.

    name: unique in the page (it names the clip path). labels: write the names at the right edge instead of leaving them
    to a legend. title: what a screen reader says. share: the values are shares, the axis is in per cent.
    """
    name = re.sub(r"[^\w-]", "-", name)  # it may hold a metric's name, which is anyone's text
    low, high = value_range(lines, levels, zero)
    xs = [x for line in lines for x, _ in line.points] or [0.0, 1.0]
    left_x, right_x = min(xs), max(xs)
    if not right_x > left_x:  # one point alone stands on an axis that begins at zero
        left_x, right_x = min(left_x, 0.0), max(right_x, left_x + 1 if left_x <= 0 else left_x)
    y_ticks = ticks(low, high, max(2, height // 48))
    y_texts = tick_texts(y_ticks, share)
    left = 12 + 6.6 * max((len(t) for t in y_texts), default=3)
    longest = max(
        (len(s) for x in (*lines, *levels) for s in (x.name, *([y_text(x.value)] if isinstance(x, Level) else []))),
        default=0,
    )
    right = 14 + 6.7 * longest if labels else 14
    top, bottom = 10, 40
    x_of = _scale(left_x, right_x, left, width - right)
    y_of = _scale(low, high, height - bottom, top)

    parts = [
        f'<svg class="chart" role="img" viewBox="0 0 {width} {height}" aria-label="{escape(title)}">',
        f'<clipPath id="{name}"><rect x="{left - 4:.1f}" y="{top - 6}" width="{width - right - left + 8:.1f}" '
        f'height="{height - bottom - top + 8}"/></clipPath>',
    ]
    for value, text in zip(y_ticks, y_texts, strict=True):
        y = y_of(value)
        parts.append(f'<path class="grid" d="M{left:.1f} {y:.1f}H{width - right:.1f}"/>')
        parts.append(f'<text class="tick" x="{left - 7:.1f}" y="{y + 4:.1f}" text-anchor="end">{escape(text)}</text>')
    x_ticks = [x for x in ticks(left_x, right_x, max(2, int((width - left - right) // 72))) if x.is_integer()] or [
        left_x
    ]
    for value, text in zip(x_ticks, tick_texts(x_ticks), strict=True):
        parts.append(
            f'<text class="tick" x="{x_of(value):.1f}" y="{height - bottom + 17}" text-anchor="middle">{escape(text)}</text>'
        )
    parts.append(
        f'<text class="axis" x="{(left + width - right) / 2:.1f}" y="{height - 6}" text-anchor="middle">{escape(x_label)}</text>'
    )
    parts += [
        f'<path class="level" d="M{left:.1f} {y_of(level.value):.1f}H{width - right:.1f}" '
        f'stroke="{level.color}" stroke-dasharray="{level.dash}"/>'
        for level in levels
    ]
    parts.append(f'<g clip-path="url(#{name})">')
    parts += [
        f'<path class="raw" d="{_path(thinned(line.raw), x_of, y_of)}" stroke="{line.color}"/>'
        for line in lines
        if line.raw
    ]
    for line in lines:
        dash = f' stroke-dasharray="{line.dash}"' if line.dash else ""
        parts.append(f'<path class="line" d="{_path(thinned(line.points), x_of, y_of)}" stroke="{line.color}"{dash}/>')
        if line.dots or len(line.points) == 1:
            parts += [
                f'<circle cx="{x_of(x):.1f}" cy="{y_of(y):.1f}" r="3" fill="{line.color}">'
                f"<title>{escape(x_label)} {escape(number(x))}: {escape(y_text(y))}</title></circle>"
                for x, y in thinned(line.points, 80)
            ]
    parts.append("</g>")
    if labels:
        parts += _labels(lines, levels, y_of, x=width - right + 8, top=top + 4, bottom=height - bottom, y_text=y_text)
    return Markup("".join(parts) + "</svg>")


def _labels(
    lines: Sequence[Line],
    levels: Sequence[Level],
    y_of: Callable[[float], float],
    *,
    x: float,
    top: float,
    bottom: float,
    y_text: Callable[[float], str],
) -> list[str]:
    """Names at the right edge, moved apart where they would touch."""
    wanted = [(y_of(v.value), v.name, v.color, y_text(v.value)) for v in levels]
    wanted += [(y_of(v.points[-1][1]), v.name, v.color, "") for v in lines if v.points]
    heights = [29 if value else 17 for *_, value in wanted]
    order = sorted(range(len(wanted)), key=lambda i: wanted[i][0])
    places, floor = {}, top
    for i in order:
        places[i] = floor = max(wanted[i][0], floor)
        floor += heights[i]
    ceiling = bottom + 6
    for i in reversed(order):
        ceiling = min(places[i], ceiling - (12 if wanted[i][3] else 0))
        places[i], ceiling = ceiling, ceiling - 17
    out = []
    for i, (_, name, color, value) in enumerate(wanted):
        out.append(f'<text class="name" x="{x:.1f}" y="{places[i] + 4:.1f}" fill="{color}">{escape(name)}</text>')
        if value:
            out.append(f'<text class="tick" x="{x:.1f}" y="{places[i] + 17:.1f}">{escape(value)}</text>')
    return out


def dumbbells(
    rows: Sequence[tuple[str, float | None, float, str]],
    *,
    title: str,
    text: Callable[[float], str],
    share: bool,
    width: int = 720,
) -> Markup:
    """One row an arm: a hollow dot where it started, a full dot where it came to, the gain between them.

    rows: (name, start or None, end, color), drawn in the order given. share: the axis is in per cent.
    """
    values = [v for _, start, end, _ in rows for v in (start, end) if v is not None]
    low, high = min(values), max(values)
    pad = (high - low) * 0.12 or abs(high) * 0.1 or 1.0
    low, high = max(low - pad, 0.0) if low >= 0 else low - pad, high + pad
    narrow = width < 500
    left = 12 if narrow else 16 + 8 * max(len(name) for name, *_ in rows)
    right, gap, top = 64, 46 if narrow else 38, 8
    height = top + gap * len(rows) + 30
    x_of = _scale(low, high, left, width - right)
    parts = [f'<svg class="chart" role="img" viewBox="0 0 {width} {height}" aria-label="{escape(title)}">']
    marks = ticks(low, high, 4 if narrow else 6)
    for value, mark in zip(marks, tick_texts(marks, share), strict=True):
        x = x_of(value)
        parts.append(f'<path class="grid" d="M{x:.1f} {top}V{height - 26}"/>')
        parts.append(f'<text class="tick" x="{x:.1f}" y="{height - 8}" text-anchor="middle">{escape(mark)}</text>')
    for i, (name, start, end, color) in enumerate(rows):
        y = top + gap * (i + (0.66 if narrow else 0.5))
        if narrow:
            parts.append(f'<text class="name ink" x="{left}" y="{y - 14:.1f}">{escape(name)}</text>')
        else:
            parts.append(
                f'<text class="name ink" x="{left - 14:.1f}" y="{y + 4:.1f}" text-anchor="end">{escape(name)}</text>'
            )
        if start is not None:
            parts.append(f'<path class="gain" d="M{x_of(start):.1f} {y:.1f}H{x_of(end):.1f}" stroke="{color}"/>')
            parts.append(
                f'<circle class="hollow" cx="{x_of(start):.1f}" cy="{y:.1f}" r="5.5" stroke="{color}">'
                f"<title>start {escape(text(start))}</title></circle>"
            )
        parts.append(
            f'<circle cx="{x_of(end):.1f}" cy="{y:.1f}" r="6.5" fill="{color}"><title>{escape(text(end))}</title></circle>'
        )
        edge = max(x_of(end), x_of(start) if start is not None else 0)
        parts.append(f'<text class="value ink" x="{edge + 13:.1f}" y="{y + 4:.1f}">{escape(text(end))}</text>')
    return Markup("".join(parts) + "</svg>")


def confusion_chart(matrix: Sequence[Sequence[float]], classes: Sequence[str], *, title: str) -> Markup:
    """Rows: the true class; columns: what was predicted; each row in per cent of its samples.

    The diagonal is drawn in the model's colour, mistakes in the warning colour.
    """
    n = len(matrix)
    names = [str(classes[i]) if i < len(classes) else str(i) for i in range(n)]
    cell = max(16.0, min(38.0, 520 / n))
    left = 12 + 6.7 * max(len(c) for c in names)
    top = 8
    foot = 16 + 4.9 * max(len(c) for c in names)
    width, height = left + cell * n + 10, top + cell * n + foot
    parts = [
        f'<svg class="chart matrix" role="img" viewBox="0 0 {width:.0f} {height:.0f}" aria-label="{escape(title)}">'
    ]
    for i, row in enumerate(matrix):
        total = sum(row) or 1
        y = top + cell * i
        parts.append(
            f'<text class="tick" x="{left - 7:.1f}" y="{y + cell / 2 + 4:.1f}" text-anchor="end">{escape(names[i])}</text>'
        )
        for j, count in enumerate(row):
            share = count / total
            color = "var(--s0)" if i == j else "var(--bad)"
            x = left + cell * j
            parts.append(
                f'<rect class="cell" x="{x + 0.5:.1f}" y="{y + 0.5:.1f}" width="{cell - 1:.1f}" height="{cell - 1:.1f}" '
                f'fill="{color}" fill-opacity="{0.04 + 0.86 * share**0.7:.2f}">'
                f"<title>{escape(names[i])} taken for {escape(names[j])}: {count:g} ({100 * share:.0f} %)</title></rect>"
            )
            if cell >= 26 and share >= 0.005:
                tone = "cell-on" if share > 0.45 else "cell-off"
                parts.append(
                    f'<text class="{tone}" x="{x + cell / 2:.1f}" y="{y + cell / 2 + 4:.1f}">{100 * share:.0f}</text>'
                )
    for j, label in enumerate(names):
        x, y = left + cell * (j + 0.5), top + cell * n + 12
        parts.append(
            f'<text class="tick" transform="translate({x + 3:.1f} {y:.1f}) rotate(-45)" text-anchor="end">{escape(label)}</text>'
        )
    return Markup("".join(parts) + "</svg>")


def _scale(from_low: float, from_high: float, to_low: float, to_high: float) -> Callable[[float], float]:
    span = (from_high - from_low) or 1.0
    return lambda v: to_low + (v - from_low) / span * (to_high - to_low)


def _path(points: Sequence[Point], x_of: Callable[[float], float], y_of: Callable[[float], float]) -> str:
    return "M" + "L".join(f"{x_of(x):.1f} {max(-400.0, min(2000.0, y_of(y))):.1f}" for x, y in points) if points else ""
