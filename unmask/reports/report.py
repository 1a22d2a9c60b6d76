"""One run as one page: what ran, how good it is, what it fills in, and how to repeat it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from markupsafe import Markup

from unmask import catalog
from unmask.errors import UserError
from unmask.reports import charts, wording
from unmask.reports.findings import Finding, Probe, loss_finding, probe_finding, probe_rows
from unmask.reports.pages import Image, embedded, render, write_page
from unmask.reports.runs import Preview, Run, Stage, read_run

_SHOWN_SKIPS = 40


@dataclass
class Shown:
    """One preview as the page shows it."""

    image: Image
    step: int
    columns: tuple[str, ...]
    caption: str

    @property
    def small(self) -> bool:
        """Whether its pixels are so few that they should be seen as squares."""
        return self.image.width / max(len(self.columns), 1) < 120


@dataclass
class Chart:
    """A small chart with its title."""

    title: str
    svg: Markup
    note: str = ""


@dataclass
class StagePage:
    """What the page shows of one stage."""

    stage: Stage
    previews: list[tuple[str, list[Shown]]]
    loss_wide: Markup | None
    loss_narrow: Markup | None
    legend: list[tuple[str, str, str, str]]  # name, color, dash, value
    charts: list[Chart]
    config: list[tuple[str, list[tuple[str, Any]]]]
    facts: list[tuple[str, str]]
    few: str = ""  # the metrics in words, where they are too few for a curve

    @property
    def pictures_title(self) -> str:
        """What the pictures are: a prediction of what was hidden, or anything else."""
        columns = " ".join(c for _, shown in self.previews for c in shown[0].columns).lower()
        return "What it fills in" if any(w in columns for w in ("predict", "fill", "past")) else "What it makes"


@dataclass
class EvaluationPage:
    """What the page shows of one probe."""

    name: str
    rows: list[Probe]
    baselines: list[str]
    notes: list[str]
    confusion: Markup | None = None
    pictures: list[tuple[str, str, Image]] = field(default_factory=list)

    @property
    def drawn(self) -> bool:
        return self.confusion is not None or bool(self.pictures)


def report(run: Path | str, out: Path | str | None = None) -> Path:
    """Write the report of a run and return where it is (default: ``report.html`` in the run's folder).

    The page is one file: no script has to run and nothing is fetched. Raises ``UserError`` when ``run`` is no run.
    """
    found = read_run(run)
    target = Path(out) if out is not None else found.path / "report.html"
    if target.is_dir():
        target = target / "report.html"
    return write_page(target, render("report.html", **_values(found)))


def _values(run: Run) -> dict[str, Any]:
    stage = run.last
    pages = [stage_page(s) for s in run.stages]
    findings = [f for f in (probe_finding(run), loss_finding(stage)) if f is not None]
    speed = _speed(stage)
    evaluations = evaluation_pages(run)
    return {
        "run": run,
        "title": run_title(run),
        "lede": _lede(run),
        "method": _method(run),
        "state": _state(run),
        "findings": [*findings, *([speed] if speed else [])],
        "stages": pages,
        "evaluations": evaluations,
        "classified": any(wording.is_share(row.unit) for e in evaluations for row in e.rows),
        "probed": any(e.rows and e.name != "own" for e in evaluations) or not any(e.rows for e in evaluations),
        "margins": any(row.margin is not None for e in evaluations for row in e.rows),
        "baselines": list(dict.fromkeys(name for e in evaluations for name in e.baselines)),
        "auto": [str(line).removeprefix("auto:").strip() for line in run.info.get("auto") or []],
        "versions": [(str(k), str(v)) for k, v in (run.info.get("versions") or {}).items()],
        "machine": [(str(k), str(v)) for k, v in (run.info.get("machine") or {}).items() if v not in (None, "")],
        "skipped": [s for page in run.stages for s in page.skipped][:_SHOWN_SKIPS],
        "skipped_count": sum(len(s.skipped) for s in run.stages),
        "metric_value": wording.metric_value,
        "metric_margin": wording.metric_margin,
        "probe_name": wording.probe_name,
    }


def run_title(run: Run) -> str:
    """The title that a person gave the run, else "mae on sample:fashion"; a paper's title is no name for a run."""
    data = run.last.data
    short = data if len(data) < 40 else "…/" + data.rstrip("/").rpartition("/")[2]
    given, method = str(run.info.get("title") or ""), _method(run)
    if given and not (method and given == method["title"]):
        return given
    return f"{run.system or 'a run'} on {short}" if data else run.system or "a run"


def _lede(run: Run) -> str:
    """What was trained, on what, for how long, in one or two sentences."""
    stage, facts = run.last, run.last.facts
    who = f"A {stage.backbone}" if stage.backbone else f"A {run.system} model"
    parameters = run.info.get("parameters") or stage.info.get("parameters")
    if wording.finite(parameters):
        who += f" ({wording.short_count(parameters)} parameters)"
    what = ""
    if wording.finite(facts.get("count")):
        what = f" learned from {wording.number(facts['count'])} {stage.noun}"
        size = facts.get("image_size")
        if size:
            what += (
                " of "
                + "\u00a0×\u00a0".join(str(s) for s in (size if isinstance(size, (list, tuple)) else [size, size]))
                + " pixels"
            )
    done, asked = stage.steps_done, stage.steps
    epochs = stage.epochs
    steps = wording.number(done) + (f" of {wording.number(asked)}" if asked and done < asked else "")
    each = stage.noun if stage.batch_size != 1 else stage.noun.removesuffix("s")
    how = f" for {steps} steps" + (f" of {stage.batch_size} {each}" if stage.batch_size else "")
    if epochs:
        how += f" ({wording.passes(epochs)})"
    time = f", in {wording.duration(run.seconds)}" if run.seconds else ""
    chain = f" Its {len(run.stages)} stages: {', '.join(s.name for s in run.stages)}." if len(run.stages) > 1 else ""
    return f"{who}{what or ' trained'}{how}{time}.{chain}"


def _method(run: Run) -> dict[str, str] | None:
    """What the system hides and predicts, from its card; None for systems that are not installed here."""
    try:
        card = catalog.card(run.system)
    except UserError:
        return None
    return {
        "title": card.title,
        "hides": card.hides,
        "predicts": card.predicts,
        "authors": card.authors,
        "year": str(card.year or ""),
    }


def _state(run: Run) -> dict[str, str] | None:
    """The banner of a run that did not end well; None for one that did."""
    stage = run.last
    done, asked = stage.steps_done, stage.steps
    where = f"step {wording.number(done)}" + (f" of {wording.number(asked)}" if asked else "")
    if run.state == "done":
        return None
    if run.state == "failed":
        error = str(run.info.get("error") or stage.info.get("error") or "the run left no message")
        kept = any((s.folder / "failed-step.safetensors").is_file() for s in run.stages)
        then = "The last good checkpoint is kept." + (
            " The step that failed was written down and can be repeated:" if kept else ""
        )
        return {
            "tone": "bad",
            "title": f"This run failed at {where}",
            "text": error,
            "then": then,
            "command": f"unmask replay {run.name}" if kept else "",
        }
    resume = f"{run.command} --resume" if run.command and "--resume" not in run.command else run.command
    if run.state == "interrupted":
        return {
            "tone": "wait",
            "title": f"Interrupted after {where}",
            "text": "",
            "then": "It was saved and goes on from there:",
            "command": resume,
        }
    if run.state == "stopped":
        return {
            "tone": "wait",
            "title": f"Stopped at {where}",
            "text": "",
            "then": "Its process is gone: it was killed. It goes on from its last checkpoint:",
            "command": resume,
        }
    title = f"Not finished: {where} when this page was written"
    then = "Still running, or stopped without a word. If it stopped, it goes on from its last checkpoint:"
    return {"tone": "wait", "title": title, "text": "", "then": then, "command": resume}


def _speed(stage: Stage) -> Finding | None:
    rates = sorted(v for _, v in stage.curve("images_per_second"))
    if len(rates) < 2:  # the first value of a run holds its warm-up
        return None
    machine = stage.info.get("machine") or {}
    place = machine.get("gpu") or (
        f"{machine.get('cores')} CPU cores" if machine.get("cores") else machine.get("device") or ""
    )
    return Finding(
        wording.number(round(rates[len(rates) // 2])),
        f"{stage.noun} per second",
        f"Median while training{', on ' + str(place) if place else ''}.",
    )


def stage_page(stage: Stage, prefix: str = "") -> StagePage:
    """Pictures, curves and settings of one stage. prefix: keeps the names in the page apart."""
    key = f"{prefix}{stage.name or 'run'}".replace(" ", "-")
    curve = stage.curve("loss")
    levels = [
        charts.Level(n, v, charts.DASHES[i % len(charts.DASHES)])
        for i, (n, v) in enumerate(stage.last_references().items())
    ]
    wide = narrow = None
    legend: list[tuple[str, str, str, str]] = []
    few = ""
    if len(curve) == 1:
        step, value = curve[0]
        few = f"One line of metrics was written, at step {wording.number(step)}: loss {wording.number(value)}"
        few += "".join(f"; {level.name} {wording.number(level.value)}" for level in levels) + "."
    elif curve:
        line = loss_line(stage, "model")
        title = "The loss over the steps" + (", beside trivial predictors" if levels else "")
        wide = charts.line_chart([line], levels, name=f"{key}-loss", title=title, width=880, height=330, labels=True)
        narrow = charts.line_chart([line], levels, name=f"{key}-loss-narrow", title=title, width=360, height=260)
        final = stage.final_loss()
        legend = [("model", line.color, "", wording.number(final[0]) if final else "")]
        legend += [(level.name, level.color, level.dash, wording.number(level.value)) for level in levels]
    config = [(name, list(wording.flat(values).items())) for name, values in stage.config.items() if values]
    facts = [(k.replace("_", " "), wording.value_text(v)) for k, v in stage.facts.items() if v not in (None, [], "")]
    small = _small_charts(stage, key)
    return StagePage(stage, shown_previews(stage), wide, narrow, legend, small, config, facts, few)


def loss_line(stage: Stage, name: str, color: str = charts.COLORS[0]) -> charts.Line:
    """The loss, smoothed when it is long, with the raw values behind it."""
    curve = stage.curve("loss")
    if len(curve) < 40:
        return charts.Line(name, curve, color)
    return charts.Line(name, charts.smoothed(curve), color, raw=curve)


def _small_charts(stage: Stage, key: str) -> list[Chart]:
    out = []
    for name, points in stage.probe_curves().items():
        if len(points) < 2:
            continue
        level = _baseline_level(stage, name, points)
        chart = charts.line_chart(
            [charts.Line(name, points, charts.COLORS[1], dots=True)],
            [level] if level else [],
            name=f"{key}-probe-{name}",
            title=f"{wording.metric_name(name)} over the steps",
            share=wording.is_share(name),
            y_text=lambda v, n=name: wording.metric_value(n, v),
        )
        out.append(Chart(wording.metric_name(name), chart, "dashed: random initialisation" if level else ""))
    for name in ("lr", "images_per_second", "grad_norm"):
        points = stage.curve(name)
        if len(points) > 1:
            line = charts.Line(
                name,
                charts.smoothed(points) if name != "lr" else points,
                charts.COLORS[2],
                raw=points if name != "lr" else (),
            )
            words = wording.metric_name(name).replace("images", stage.noun)
            chart = charts.line_chart([line], name=f"{key}-{name}", title=words, zero=name != "grad_norm")
            out.append(Chart(words, chart))
    for name in stage.other_losses()[:6]:
        points, words = stage.curve(name), wording.metric_name(name)
        if len(points) > 1:
            line = charts.Line(name, charts.smoothed(points), charts.COLORS[0], raw=points)
            chart = charts.line_chart([line], name=f"{key}-{name}", title=words, share=wording.is_share(name))
            out.append(Chart(words, chart))
    return out


def _baseline_level(stage: Stage, name: str, points: list[tuple[float, float]]) -> charts.Level | None:
    return charts.Level("random initialisation", points[0][1]) if points[0][0] == 0 and len(points) > 1 else None


def shown_previews(stage: Stage, *, last_only: bool = False) -> list[tuple[str, list[Shown]]]:
    """Each kind of picture at its first and its last step, so that learning is visible."""
    kinds: dict[str, list[Preview]] = {}
    for preview in stage.previews:
        kinds.setdefault(preview.name, []).append(preview)
    out = []
    for name, previews in kinds.items():
        ends = [previews[-1]] if last_only or len(previews) == 1 else [previews[0], previews[-1]]
        shown = [Shown(image, p.step, p.columns, p.caption) for p in ends if (image := embedded(p.path)) is not None]
        if shown:
            out.append((name.replace("-", " ").replace("_", " "), shown))
    return out


def evaluation_pages(run: Run) -> list[EvaluationPage]:
    """Every probe with its baselines, its confusion and its pictures."""
    pages = []
    pictures = next((s.pictures for s in reversed(run.stages) if s.pictures), [])
    taken: set[Path] = set()
    captions = {
        str(p.get("file")): str(p.get("caption") or "")
        for e in run.evaluations
        for p in e.get("pictures") or []
        if isinstance(p, dict)
    }
    order = list(wording.PROBES)
    for evaluation in sorted(
        run.evaluations, key=lambda e: order.index(e["probe"]) if e["probe"] in order else len(order)
    ):
        rows = probe_rows(evaluation)
        baselines = list(dict.fromkeys(name for row in rows for name in row.baselines))
        notes = _probe_notes(evaluation)
        page = EvaluationPage(str(evaluation["probe"]), rows, baselines, notes)
        matrix, classes = evaluation.get("confusion"), evaluation.get("classes") or []
        if isinstance(matrix, list) and 1 < len(matrix) <= 40:
            page.confusion = charts.confusion_chart(matrix, classes, title=f"Confusion of the {page.name} probe")
        for path in pictures:
            if path.stem.startswith(page.name):
                taken.add(path)
                if page.confusion is not None and "confusion" in path.stem:
                    continue
                if (image := embedded(path)) is not None:
                    page.pictures.append((*_picture_words(path, page.name, captions), image))
        pages.append(page)
    rest = [
        (*_picture_words(p, "", captions), image)
        for p in pictures
        if p not in taken and (image := embedded(p)) is not None
    ]
    if rest:
        pages.append(EvaluationPage("pictures", [], [], [], pictures=rest))
    return pages


def _probe_notes(evaluation: dict[str, Any]) -> list[str]:
    """On what and how a probe was measured."""
    notes = [f"on {evaluation['data']}"] if evaluation.get("data") else []
    share = evaluation.get("labels")
    if wording.finite(share) and share != 1:
        notes.append(f"with {100 * share:g} % of the labels")
    if wording.finite(evaluation.get("train_samples")) and wording.finite(evaluation.get("test_samples")):
        notes.append(
            f"({wording.number(evaluation['train_samples'])} to learn, {wording.number(evaluation['test_samples'])} to test)"
        )
    if wording.finite(evaluation.get("seconds")):
        notes.append(f"in {wording.duration(evaluation['seconds'])}")
    if evaluation.get("split"):
        notes.append(f"{'· ' if notes else ''}{evaluation['split']}")
    return notes


def _picture_words(path: Path, probe: str, captions: dict[str, str]) -> tuple[str, str]:
    """The title and the caption of a probe's picture."""
    words = path.stem.removeprefix(probe).strip("-_ ").replace("-", " ").replace("_", " ")
    named = {"pca": "What the features see", "feature pca": "What the features see", "": wording.probe_name(probe)}
    title = named.get(words, words)
    return title[:1].upper() + title[1:], captions.get(path.name, "")
