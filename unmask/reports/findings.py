"""What a run found, in sentences: its loss beside trivial predictors, its probe beside random initialisation.

Report, comparison, table of runs and the last screen of a training say the same because all of them ask here:

- :func:`loss_finding`: the final loss (the mean over the last twentieth of what was logged) and its sentence;
- :func:`beside`: how far a loss lies from a level, "41 % below";
- :func:`best_probe`, :func:`probe_finding`: the number a run is judged by and its sentence.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from unmask.reports.runs import Run, Stage, finite
from unmask.reports.wording import PROBES, is_share, metric_margin, metric_name, metric_value, number, probe_name

RANDOM = "random initialisation"
_PREFERRED = ("top1", "accuracy", "knn_top1", "rankme")
_KNOWN = (*_PREFERRED, "top5", "knn_top5", "per_class_mean")


@dataclass(frozen=True)
class Finding:
    """One figure of the headline: a value, what it is, and the sentence that says whether it is any good.

    tone: "good" when better than what it is compared with, "bad" when not, "" when there is nothing to compare.
    """

    value: str
    label: str
    sentence: str
    tone: str = ""


@dataclass(frozen=True)
class Probe:
    """One number of a probe with the numbers it is compared with."""

    probe: str
    key: str
    value: float
    baselines: dict[str, float]
    spreads: dict[str, float] = field(
        default_factory=dict
    )  # standard deviations over seeds, of baselines measured on several
    seeds: int = 1  # initialisations that the random baseline was measured on
    while_training: bool = False
    tested: int | None = None  # samples that it was measured on
    words: str = ""  # what the number is, where the system says it
    lower: bool = False  # whether a lower value is better

    @property
    def unit(self) -> str:
        """The key that says how its values are written; a system's own words say it themselves ("found, %")."""
        return "" if self.words else self.key

    @property
    def merit(self) -> float:
        """The value with the sign that makes more of it better."""
        return -self.value if self.lower else self.value

    @property
    def random(self) -> float | None:
        return self.baselines.get(RANDOM)

    @property
    def margin(self) -> float | None:
        return None if self.random is None else self.value - self.random

    @property
    def noise(self) -> float:
        """The standard deviation of the random initialisation over its seeds; 0 where only one was measured."""
        return self.spreads.get(RANDOM, 0.0)

    @property
    def sampling(self) -> float:
        """The standard deviation of a share that comes from testing on few samples; 0 where that is not known."""
        if not self.tested or not is_share(self.unit) or not 0 <= self.value <= 1:
            return 0.0
        share = (self.value * self.tested + 1) / (self.tested + 2)  # all or none right is no certainty either
        return math.sqrt(share * (1 - share) / self.tested)

    @property
    def error(self) -> float:
        """Both together: the standard deviation that a difference is read against."""
        return math.hypot(self.noise, self.sampling)

    @property
    def tone(self) -> str:
        """ "good" above random initialisation by more than the noise (two standard deviations), "bad" below it, "" within."""
        if self.margin is None or abs(self.margin) <= 2 * self.error:
            return ""
        return "good" if (self.margin > 0) != self.lower else "bad"

    @property
    def label(self) -> str:
        if self.words:
            return self.words
        if self.while_training:
            return metric_name(self.key)
        probe, metric = probe_name(self.probe), metric_name(self.key)
        return metric if probe == metric else f"{probe}, {metric}"


def probe_rows(evaluation: dict[str, Any]) -> list[Probe]:
    """Every number that a probe measured and that its baselines know or a reader knows, with that of each baseline."""
    baselines = {str(k): v for k, v in (evaluation.get("baseline") or {}).items() if isinstance(v, dict)}
    name = str(evaluation.get("probe") or "probe")
    seeds = len((baselines.get(RANDOM) or {}).get("seeds") or [0])
    tested = int(evaluation["test_samples"]) if finite(evaluation.get("test_samples")) else None
    named = evaluation.get("measures") or {}
    lower = set(evaluation.get("lower_is_better") or ())
    rows = []
    for key, value in evaluation.items():
        if not finite(value) or (named and key not in named):
            continue
        if not (key in _KNOWN or key in named or any(key in v for v in baselines.values())):
            continue
        same = {k: float(v[key]) for k, v in baselines.items() if finite(v.get(key))}
        spreads = {k: float(v[f"{key}_std"]) for k, v in baselines.items() if finite(v.get(f"{key}_std"))}
        words = str(named.get(key) or "")
        rows.append(
            Probe(name, key, float(value), same, spreads, seeds, tested=tested, words=words, lower=key in lower)
        )
    order = list(named) or list(_PREFERRED)
    return sorted(rows, key=lambda r: order.index(r.key) if r.key in order else len(order))


def best_probe(run: Run, probe: str | None = None) -> Probe | None:
    """The number a run is judged by: the first of linear, attentive, ridge, k-NN, fine-tuning that was measured, else what
    was probed while training, from its first value (before the first step: random initialisation) to its last.

    probe: only this one.
    """
    order = ["own", *(p for p in PROBES if p not in ("finetune", "own")), "finetune"]
    known = sorted(run.evaluations, key=lambda e: order.index(e["probe"]) if e["probe"] in order else len(order))
    for evaluation in known:
        rows = probe_rows(evaluation)
        if rows and probe in (None, evaluation["probe"]):
            return rows[0]
    if probe is not None and probe != "while training":
        return None
    return probe_while_training(run.last)


def probe_while_training(stage: Stage) -> Probe | None:
    """The last value of the k-NN curve (RankMe without labels), with its value before the first step as baseline."""
    curves = stage.probe_curves()
    for key in (*_PREFERRED, *curves):
        if key in curves:
            first, last = curves[key][0], curves[key][-1]
            if last[0] == 0:  # measured before the first step only: it says nothing about the training
                return None
            before = {RANDOM: first[1]} if first[0] == 0 and len(curves[key]) > 1 else {}
            return Probe("while training", key, last[1], before, while_training=True)
    return None


def probe_finding(run: Run) -> Finding | None:
    """The best probe beside random initialisation, a system's own metric beside the best of its baselines."""
    found = best_probe(run)
    if found is None:
        return None
    value = metric_value(found.unit, found.value)
    if found.random is None and found.baselines:
        name, other = (min if found.lower else max)(found.baselines.items(), key=lambda b: b[1])
        better = (found.value < other) == found.lower and found.value != other
        size = metric_margin(found.unit, abs(found.value - other)).lstrip("+")
        side = "above" if found.value > other else "below"
        return Finding(
            value,
            found.label,
            f"{size} {side} {name} ({metric_value(found.unit, other)}).",
            "good" if better else "bad",
        )
    if found.random is None or found.margin is None:
        return Finding(value, found.label, "There is no baseline to read it against.")
    start = metric_value(found.unit, found.random)
    if found.noise:
        start += f" ± {metric_value(found.unit, found.noise)} over {found.seeds} seeds"
    size = metric_margin(found.unit, abs(found.margin)).lstrip("+")
    if found.tone == "good":
        sentence = f"{size} above the same network at random initialisation ({start})."
    elif found.tone == "bad":
        sentence = f"{size} below the same network at random initialisation ({start})."
    elif not found.margin:
        sentence = f"No different from the same network at random initialisation ({start})."
    else:
        side = "above" if found.margin > 0 else "below"
        sentence = f"{size} {side} the same network at random initialisation ({start}): within its noise"
        sentence += f" and that of {number(found.tested)} test images." if found.sampling else "."
    return Finding(value, found.label, sentence, found.tone)


def beside(loss: float, level: float) -> str:
    """How far a loss lies from a level above zero, in words: "41 % below", "70 % above", "level"."""
    share = round(100 * abs(loss - level) / level)
    return f"{share} % {'below' if loss < level else 'above'}" if share else "level"


def loss_finding(stage: Stage) -> Finding | None:
    """The final loss beside the best trivial predictor, and beside the others: ``value`` is ``Stage.final_loss`` as text.

    None where no loss was logged.
    """
    final = stage.final_loss()
    if final is None:
        return None
    loss, logged = final
    label = f"loss, mean of the last {logged} logged steps" if logged > 1 else "loss, last logged step"
    references = stage.last_references()
    if not references:
        return Finding(number(loss), label, "")
    (best, level), *others = references.items()
    text = "; ".join(f"{name}: {number(value)}" for name, value in others)
    others_text = f" ({text})" if text else ""
    if level <= 0:
        return Finding(
            number(loss), label, f"The best trivial predictor, {best}, reaches {number(level)}{others_text}."
        )
    distance = beside(loss, level)
    if distance.endswith("below"):
        sentence = f"{distance} the best trivial predictor, {best}: {number(level)}{others_text}."
        return Finding(number(loss), label, sentence, "good")
    if distance.endswith("above"):
        sentence = f"{distance} what needs no learning: {best} reaches {number(level)}{others_text}."
    else:
        sentence = f"No better than a trivial predictor: {best} reaches {number(level)}{others_text}."
    return Finding(number(loss), label, sentence, "bad")
