"""Numbers, times and probes in words a person reads."""

from __future__ import annotations

import math
from datetime import datetime
from typing import Any

from unmask.reports.runs import finite

PROBES = {
    "finetune": "fine-tuning",
    "linear": "linear probe",
    "attentive": "attentive probe",
    "ridge": "ridge probe",
    "knn": "k-NN",
    "rankme": "RankMe",
    "own": "own metrics",
}
"""The probes by name, from the one that changes the network most to the one that changes nothing."""

METRICS = {
    "top1": "top-1 accuracy",
    "top5": "top-5 accuracy",
    "knn_top1": "k-NN top-1 accuracy",
    "knn_top5": "k-NN top-5 accuracy",
    "rankme": "RankMe",
    "lr": "learning rate",
    "images_per_second": "images per second",
    "grad_norm": "gradient norm",
    "memory_mb": "memory, MB",
}
_SHARES = ("top1", "top5", "accuracy")
_UNBREAKABLE = "\u202f"


def metric_name(key: str) -> str:
    """A metric's name as words: ``knn_top1`` -> "k-NN top-1 accuracy"."""
    return METRICS.get(key) or key.replace("_", " ")


def probe_name(key: str) -> str:
    return PROBES.get(key) or key.replace("_", " ")


def is_share(key: str) -> bool:
    """Whether a metric is a share in 0 ... 1, shown in per cent."""
    return key.endswith(_SHARES)


def metric_value(key: str, value: Any) -> str:
    """A metric with its unit: shares in per cent with one decimal."""
    if not finite(value):
        return "not a number" if isinstance(value, float) else "–"
    return f"{100 * value:.1f}{_UNBREAKABLE}%" if is_share(key) else number(value)


def metric_margin(key: str, difference: float) -> str:
    """A difference of two values of a metric, with its sign: shares in points."""
    sign = "+" if difference >= 0 else "−"
    size = abs(difference)
    return f"{sign}{100 * size:.1f} points" if is_share(key) else f"{sign}{number(size)}"


def number(value: Any) -> str:
    """Three significant digits; whole numbers in full, with spaces between thousands; never an exponent a reader trips on."""
    if value is None:
        return "–"
    if not finite(value):
        return str(value)
    if value == 0:
        return "0"
    if float(value).is_integer() and abs(value) < 1e15:
        return f"{int(value):,}".replace(",", _UNBREAKABLE)
    size = abs(value)
    if size >= 1000:
        return f"{value:,.0f}".replace(",", _UNBREAKABLE)
    if size < 1e-3:
        return power(value)
    return f"{value:.{max(0, 2 - math.floor(math.log10(size)))}f}"


def passes(epochs: float) -> str:
    """How often the data was gone through: "12 epochs", "1 epoch", "0.3 epochs", "0.02 epochs"."""
    text = f"{epochs:.1f}".removesuffix(".0") if epochs >= 0.1 else f"{epochs:.1g}"
    return f"{text} epoch{'' if text == '1' else 's'}"


def power(value: float) -> str:
    """A small number as "3.1 × 10⁻⁴"."""
    mantissa, _, exponent = f"{value:.2g}".partition("e") if abs(value) < 1e-4 else f"{value:.1e}".partition("e")
    raised = str(int(exponent or 0)).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
    return f"{float(mantissa):g}{_UNBREAKABLE}×{_UNBREAKABLE}10{raised}"


def short_count(value: Any) -> str:
    """1 234 567 -> "1.2 M"."""
    if not finite(value):
        return "–"
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= size:
            scaled = value / (1e3 if letter == "k" else size)
            return f"{scaled:.3g}{_UNBREAKABLE}{letter}" if scaled < 1000 else f"{scaled:.0f}{_UNBREAKABLE}{letter}"
    return number(value)


def duration(seconds: Any) -> str:
    """Seconds as "41 s", "2 min 31 s", "3 h 05 min"."""
    if not finite(seconds):
        return "–"
    whole = round(seconds)
    if whole < 10:
        return f"{seconds:.1f}{_UNBREAKABLE}s"
    if whole < 60:
        return f"{whole}{_UNBREAKABLE}s"
    if whole < 3600:
        return f"{whole // 60}{_UNBREAKABLE}min {whole % 60:02d}{_UNBREAKABLE}s"
    return f"{whole // 3600}{_UNBREAKABLE}h {whole % 3600 // 60:02d}{_UNBREAKABLE}min"


def date(text: Any) -> str:
    """An ISO time as "25 November 2025, 01:06"; anything else as it is."""
    try:
        when = datetime.fromisoformat(str(text))
    except ValueError:
        return str(text or "–")
    return f"{when.day} {when:%B %Y, %H:%M}"


def value_text(value: Any) -> str:
    """A config value on one line: as YAML would have it, long lists shortened."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, (list, tuple)):
        shown = ", ".join(value_text(v) for v in value[:12])
        return f"{shown}, … ({len(value)} in all)" if len(value) > 12 else shown or "none"
    if isinstance(value, dict):
        return ", ".join(f"{k} {value_text(v)}" for k, v in value.items()) or "none"
    return str(value)


def flat(values: Any, prefix: str = "") -> dict[str, Any]:
    """A nested mapping with dotted keys."""
    out: dict[str, Any] = {}
    for key, value in (values or {}).items():
        name = f"{prefix}{key}"
        out.update(flat(value, f"{name}.") if isinstance(value, dict) and value else {name: value})
    return out
