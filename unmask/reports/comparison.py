"""Several runs side by side, and the table of the runs under a folder."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup

from unmask import catalog
from unmask.errors import UserError
from unmask.reports import charts, wording
from unmask.reports.findings import Probe, beside, best_probe, probe_rows
from unmask.reports.pages import render, write_page
from unmask.reports.report import Shown, loss_line, shown_previews
from unmask.reports.runs import Run, Stage, find_runs, read_run


@dataclass
class Arm:
    """One run of a comparison."""

    run: Run
    label: str
    color: str
    probe: Probe | None = None

    @property
    def stage(self) -> Stage:
        return self.run.last

    @property
    def supervised(self) -> bool:
        return self.run.system == catalog.supervised().slug

    @property
    def seconds(self) -> float | None:
        return self.run.seconds

    @property
    def loss(self) -> float | None:
        final = self.stage.final_loss()
        return final[0] if final else None

    @property
    def reference(self) -> tuple[str, float] | None:
        """The best trivial predictor and its loss."""
        return next(iter(self.stage.last_references().items()), None)

    @property
    def beside(self) -> str:
        """Where the loss lies from the best trivial predictor: "41 % below"; "" where that cannot be said."""
        known = self.loss is not None and self.reference and self.reference[1] > 0
        return beside(self.loss, self.reference[1]) if known else ""  # type: ignore[arg-type, index]

    @property
    def rate(self) -> float | None:
        rates = sorted(v for _, v in self.stage.curve("images_per_second"))
        return rates[len(rates) // 2] if rates else None


@dataclass
class ArmPage:
    """What the page shows of one arm: its curve and its last pictures."""

    arm: Arm
    chart: Markup | None
    legend: list[tuple[str, str, str, str]]
    previews: list[tuple[str, list[Shown]]]


def compare(runs: Sequence[Path | str], out: Path | str) -> Path:
    """Write one page that sets runs side by side, ranked by their probe, and return where it is.

    out: the file, or a folder that gets ``comparison.html``. Raises ``UserError`` for fewer than two runs, or a folder
    that is no run.
    """
    if len(runs) < 2:
        raise UserError(f"a comparison needs two runs or more, got {len(runs)}: unmask report RUN RUN ...")
    target = Path(out)
    if target.is_dir() or not target.suffix:
        target = target / "comparison.html"
    arms = ranked(arms_of([read_run(r) for r in runs]))
    return write_page(target, render("comparison.html", **_values(arms)))


def arms_of(runs: list[Run]) -> list[Arm]:
    """The runs with short labels that tell them apart: the system where that is enough, else the folder's name."""
    systems = Counter(r.system for r in runs)
    labels = [r.system if r.system and systems[r.system] == 1 else r.name for r in runs]
    seen: Counter[str] = Counter()
    arms = []
    for i, (run, label) in enumerate(zip(runs, labels, strict=True)):
        seen[label] += 1
        if seen[label] > 1:
            label = f"{label} ({seen[label]})"
        if run.system == label == catalog.supervised().slug:
            label = "supervised"
        arms.append(Arm(run, label, charts.COLORS[i % len(charts.COLORS)]))
    return arms


def ranked(arms: list[Arm]) -> list[Arm]:
    """The arms with the probe that most of them share, best first; those without it at the end."""
    counts = Counter(e["probe"] for arm in arms for e in arm.run.evaluations if probe_rows(e))
    order = [*(p for p in wording.PROBES if p != "finetune"), "finetune"]
    shared = min(counts, key=lambda p: (-counts[p], order.index(p) if p in order else len(order)), default=None)
    for arm in arms:
        arm.probe = best_probe(arm.run, shared) if shared else best_probe(arm.run)
    keys = Counter((a.probe.key, a.probe.words) for a in arms if a.probe)
    if keys:
        key = keys.most_common(1)[0][0]
        for arm in arms:
            arm.probe = arm.probe if arm.probe and (arm.probe.key, arm.probe.words) == key else None
    return sorted(arms, key=lambda a: -a.probe.merit if a.probe else float("inf"))


def differing(arms: list[Arm]) -> tuple[list[tuple[str, list[str]]], list[tuple[str, list[str]]]]:
    """Options whose values differ: those that two arms or more have, and those that only one has. "–" = has none."""
    configs = [wording.flat(a.stage.config) for a in arms]
    shared: list[tuple[str, list[str]]] = []
    own: list[tuple[str, list[str]]] = []
    for key in dict.fromkeys(k for c in configs for k in c):
        values = [wording.value_text(c[key]) if key in c else "–" for c in configs]
        if len(set(values)) == 1:
            continue
        (shared if sum(key in c for c in configs) > 1 else own).append((key, values))
    return shared, own


def _values(arms: list[Arm]) -> dict[str, Any]:
    measured = [a for a in arms if a.probe]
    shared, own = differing(arms)
    first = measured[0].probe if measured else None
    names = [a.label for a in arms if not a.supervised] or [a.label for a in arms]
    data = list(dict.fromkeys(a.stage.data for a in arms if a.stage.data))
    wide = narrow = None
    if first:
        rows = [(a.label, a.probe.random, a.probe.value, a.color) for a in measured if a.probe]

        def text(value: float) -> str:
            return wording.metric_value(first.unit, value)

        title = f"{first.label} of each run, from random initialisation to after training"
        share = wording.is_share(first.unit)
        wide, narrow = (charts.dumbbells(rows, title=title, text=text, share=share, width=w) for w in (880, 360))
    curves = _probe_curves(arms)
    return {
        "title": _listed(names) + (f" on {data[0]}" if len(data) == 1 else ""),
        "lede": _lede(arms, data),
        "verdict": verdict(measured),
        "best": best_of(measured),
        "arms": arms,
        "first": first,
        "noun": "samples" if all(a.stage.noun == "samples" for a in arms) else "images",
        "margins": first is None or not first.words or any(a.probe.margin is not None for a in measured if a.probe),
        "dumbbells_wide": wide,
        "dumbbells_narrow": narrow,
        "curves": curves,
        "curve_legend": [(a.label, a.color, "", "") for a in arms],
        "pages": [_arm_page(a, i) for i, a in enumerate(arms)],
        "differing": shared,
        "own": own,
        "commands": list(dict.fromkeys(a.run.command for a in arms if a.run.command)),
        "metric_value": wording.metric_value,
        "metric_margin": wording.metric_margin,
        "same_seconds": _nearly_same([a.seconds for a in arms]),
    }


def _lede(arms: list[Arm], data: list[str]) -> str:
    backbones = list(dict.fromkeys(a.stage.backbone for a in arms if a.stage.backbone))
    who = _who(arms) + (f" of {backbones[0]}" if len(backbones) == 1 else "")
    parts = [who]
    if len(data) > 1:
        parts.append(f"on {len(data)} data sets")
    if _nearly_same([a.seconds for a in arms]):
        parts.append(f"each trained for about {wording.duration(max(a.seconds or 0 for a in arms))}")
    elif len({a.stage.steps_done for a in arms}) == 1 and arms[0].stage.steps_done:
        parts.append(f"each trained for {wording.number(arms[0].stage.steps_done)} steps")
    else:
        parts.append("not under the same budget: see the times below")
    return ", ".join(parts) + "."


def _who(arms: list[Arm]) -> str:
    """ "3 methods and the supervised arm"; "4 runs" where a method has several."""
    systems = [a.run.system for a in arms]
    if len(set(systems)) < len(systems) or not all(systems):
        return f"{len(arms)} runs"
    count = sum(not a.supervised for a in arms)
    methods = f"{count} method{'s' if count != 1 else ''}"
    return methods if count == len(arms) else f"{methods} and the supervised arm"


def _nearly_same(seconds: list[float | None]) -> bool:
    known = [s for s in seconds if s]
    return len(known) == len(seconds) and max(known) <= 1.15 * min(known)


def _methods(measured: list[Arm]) -> list[tuple[Arm, Probe]]:
    """The arms that need no labels (all of them where none does) with their probes, best first."""
    chosen = [a for a in measured if not a.supervised] or measured
    return sorted(((a, a.probe) for a in chosen if a.probe), key=lambda pair: -pair[1].merit)


def _level(methods: list[tuple[Arm, Probe]]) -> list[tuple[Arm, Probe]]:
    """The best method and those that this test cannot tell from it: within two standard deviations of the difference."""
    best = methods[0][1]
    return [(a, p) for a, p in methods if best.merit - p.merit <= 2 * math.hypot(best.error, p.error)]


def best_of(measured: list[Arm]) -> Arm | None:
    """The method whose features are best: better than untrained ones, and than the next method's by more than the noise."""
    methods = _methods(measured)
    if not methods or (methods[0][1].margin is not None and methods[0][1].tone != "good"):
        return None
    return methods[0][0] if len(_level(methods)) == 1 else None


def verdict(measured: list[Arm]) -> str:
    """The sentence a person takes away: the best method that needs no labels, by how much, and supervised training.

    Nothing is called best that does not beat its random initialisation, or that is ahead by less than the noise.
    """
    methods = _methods(measured)
    if not methods:
        return "No probe was measured on these runs, so they are not ranked."
    probe = methods[0][1]
    beaten = all(p.margin is not None and p.tone != "good" for _, p in methods)
    best = best_of(measured)
    if beaten:
        chance = " by more than the noise" if any((p.margin or 0) > 0 for _, p in methods) else ""
        text = f"{_none_of(methods)} random initialisation{chance}: {probe.label} {_with_margins(methods)}"
    elif best is not None:
        praise = "was measured alone" if len(measured) == 1 else "is best" if probe.words else "has the best features"
        text = f"{best.label} {praise}: {probe.label} {wording.metric_value(probe.unit, probe.value)}"
        if probe.margin is not None:
            text += f", {wording.metric_margin(probe.unit, probe.margin)} over its random initialisation"
        if len(methods) > 1:
            ahead = wording.metric_margin(probe.unit, probe.merit - methods[1][1].merit).lstrip("+")
            text += f", {ahead} ahead of {methods[1][0].label}"
    else:
        level = _level(methods)
        if len(level) == 1:  # the largest number, and yet not above its own random initialisation
            text = f"{level[0][0].label} has the largest number and does not beat its random initialisation: "
        else:
            text = f"No difference that this test can show between {_listed([a.label for a, _ in level])}: "
        text += f"{probe.label} {_with_margins(level if len(level) > 1 else methods)}"
    taught = [a.probe for a in measured if a.supervised and a.probe and all(a is not m for m, _ in methods)]
    if taught:
        text += (
            f". Supervised training of the same backbone reaches {wording.metric_value(probe.unit, taught[0].value)}"
        )
    if probe.sampling:
        text += (
            f". Measured on {wording.number(probe.tested)} test images: ± {100 * 2 * probe.sampling:.1f} points each"
        )
    return text + ". One run each: a small difference between two methods can be chance."


def _none_of(methods: list[tuple[Arm, Probe]]) -> str:
    names = [a.label for a, _ in methods]
    if len(names) == 1:
        return f"{names[0]} does not beat"
    return f"Neither {names[0]} nor {names[1]} beats" if len(names) == 2 else f"None of {_listed(names)} beats"


def _with_margins(methods: list[tuple[Arm, Probe]]) -> str:
    """ "25.0 % (+1.7 points over random initialisation) and 23.1 % (+0.2 points)"."""
    texts, said = [], False
    for _, probe in methods:
        text = wording.metric_value(probe.unit, probe.value)
        if probe.margin is not None:
            over = "" if said else " over its random initialisation"
            text, said = f"{text} ({wording.metric_margin(probe.unit, probe.margin)}{over})", True
        texts.append(text)
    return _listed(texts)


def _listed(names: list[str]) -> str:
    return ", ".join(names[:-1]) + " and " + names[-1] if len(names) > 1 else names[0]


def _probe_curves(arms: list[Arm]) -> list[tuple[str, Markup, Markup]]:
    """The probes while training, all arms in one chart over seconds (over steps where the times are not known)."""
    out = []
    keys = dict.fromkeys(k for a in arms for k in a.stage.probe_curves())
    timed = all(a.stage.seconds_at(1) is not None for a in arms if a.stage.probe_curves())
    for key in keys:
        lines = []
        for arm in arms:
            points = arm.stage.probe_curves().get(key)
            if points:
                placed = [(arm.stage.seconds_at(x) or 0.0, y) for x, y in points] if timed else points
                lines.append(charts.Line(arm.label, placed, arm.color, dots=True))
        label = "seconds of training" if timed else "step"
        title, share = wording.metric_name(key), wording.is_share(key)
        wide = charts.line_chart(
            lines,
            name=f"probe-{key}",
            title=title,
            x_label=label,
            width=880,
            height=320,
            labels=True,
            share=share,
            y_text=lambda v, k=key: wording.metric_value(k, v),
        )
        narrow = charts.line_chart(
            lines, name=f"probe-{key}-narrow", title=title, x_label=label, height=250, share=share
        )
        out.append((title, wide, narrow))
    return out


def _arm_page(arm: Arm, index: int) -> ArmPage:
    levels = [
        charts.Level(n, v, charts.DASHES[i % len(charts.DASHES)])
        for i, (n, v) in enumerate(arm.stage.last_references().items())
    ]
    chart, legend = None, []
    if arm.stage.curve("loss"):
        chart = charts.line_chart(
            [loss_line(arm.stage, "loss", arm.color)],
            levels,
            name=f"arm-{index}",
            title=f"Loss of {arm.label}",
            height=230,
        )
        legend = [("loss", arm.color, "", wording.number(arm.loss))]
        legend += [(level.name, level.color, level.dash, wording.number(level.value)) for level in levels]
    return ArmPage(arm, chart, legend, shown_previews(arm.stage, last_only=True))


def runs_table(folder: Path | str) -> list[dict[str, Any]]:
    """The runs at or under a folder, one flat JSON-able row each, the newest first.

    Keys: run (the path from ``folder``), system, backbone, data, state, steps, loss, reference (the loss of the best
    trivial predictor), probe (its name), score, margin (over random initialisation), seconds, date. What is not known is
    None. A folder whose run.json is damaged is listed with state "unreadable".
    """
    folder = Path(folder)
    rows = []
    for path in find_runs(folder):
        name = path.relative_to(folder).as_posix() if path != folder else path.resolve().name
        try:
            rows.append(_row(name, read_run(path)))
        except UserError:
            rows.append({**dict.fromkeys(_COLUMNS), "run": name, "state": "unreadable"})
    return sorted(rows, key=lambda r: str(r["date"] or ""), reverse=True)


_COLUMNS = (
    "run",
    "system",
    "backbone",
    "data",
    "state",
    "steps",
    "loss",
    "reference",
    "probe",
    "score",
    "margin",
    "seconds",
    "date",
)


def _row(name: str, run: Run) -> dict[str, Any]:
    arm = Arm(run, name, "", best_probe(run))
    values = (
        name,
        run.system or None,
        arm.stage.backbone or None,
        arm.stage.data or None,
        run.state,
        arm.stage.steps_done,
        arm.loss,
        arm.reference[1] if arm.reference else None,
        arm.probe.label if arm.probe else None,
        arm.probe.value if arm.probe else None,
        arm.probe.margin if arm.probe else None,
        run.seconds,
        run.info.get("started"),
    )
    return dict(zip(_COLUMNS, values, strict=True))
