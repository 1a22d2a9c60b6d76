"""The last screen of a training, and tables of scores: what was reached, where it lies, what to do next."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from unmask import catalog
from unmask.reports.findings import beside
from unmask.reports.runs import Run, finite, read_run
from unmask.reports.wording import duration

_SHARES = ("top1", "top5", "knn_top1")
_COMMONEST = "always the commonest class"


def facts(path: Path) -> dict[str, Any]:
    """What a run came to, as plain values (``unmask train --json``)."""
    run = read_run(path)
    stage = run.last
    loss = stage.final_loss()
    return {
        "run": str(path),
        "system": run.system,
        "state": run.state,
        "steps": stage.steps_done,
        "seconds": run.seconds,
        "loss": loss[0] if loss else None,
        "references": stage.last_references(),
        "units": stage.units,
        "evaluation": {str(e.get("probe")): _numbers(e) for e in run.evaluations},
        "report": str(path / "report.html"),
    }


def screen(path: Path) -> str:
    """The last screen: numbers beside their baselines, where things are, the next commands."""
    run = read_run(path)
    stage, spent = run.last, duration(run.seconds).replace("\u202f", " ")  # a page's thin spaces: terminals lack them
    lines = [f"{run.system} on {stage.data}: {stage.steps_done} steps in {spent}, {run.state}"]
    lines += _loss_lines(run)
    for evaluation in sorted(run.evaluations, key=lambda e: e.get("probe") != "accuracy"):
        lines += [score_line(evaluation)]
    folder = shlex.quote(shown(path))
    encoder = (stage.folder / "encoder").is_dir()
    lines += ["", f"  report   {shown(path)}/report.html"]
    lines += [f"  encoder  {shown(path)}/encoder/"] if encoder else [f"  model    {shown(path)}/model/"]
    lines += ["", "next:"]
    labelled = any(e.get("top1") is not None for e in run.evaluations)
    probe = (
        f"unmask eval {folder} --probe linear" if labelled else f"unmask eval {folder} --data LABELLED --probe linear"
    )
    baseline = catalog.supervised().slug
    if run.system == baseline:
        probe = f"unmask predict {folder} IMAGE.png"
    verb = _card_verb(run.system)
    if verb in ("predict", "generate"):
        use = {
            "predict": f"unmask predict {folder} FILES -o results/",
            "generate": f"unmask generate {folder} -n 16 -o samples/",
        }
        return "\n".join([*lines, f"  {use[verb]}", f"  unmask eval {folder}"])
    if not encoder:  # it measures itself: no probe fits it
        lines += [f"  unmask predict {folder} FILES -o results/"] if _predicts(run.system) else []
        return "\n".join([*lines, f"  unmask eval {folder}"])
    lines += [f"  {probe}"]
    lines += [f"  unmask export {folder} --to {_format(path)} -o exported/"]
    if run.system != baseline:
        lines += [f"  unmask train {baseline} --data LABELLED init={folder}        fine-tune it"]
    return "\n".join(lines)


def _card_verb(slug: str) -> str:
    known = catalog.cards().get(slug)
    return known.verb if known is not None else "train"


def _predicts(slug: str) -> bool:
    known = catalog.cards().get(slug)
    return known is not None and bool(known.entry) and hasattr(known.load(), "predict")


def _loss_lines(run: Run) -> list[str]:
    stage = run.last
    final = stage.final_loss()
    if final is None:
        return []
    last, logged = final
    lines = [f"  loss {last:.4g}" + (f" (mean of the last {logged} logged steps)" if logged > 1 else "")]
    references = stage.last_references()
    if references:
        best, value = next(iter(references.items()))
        distance = beside(last, value) if value > 0 else "below" if last < value else "level"
        learns = distance.endswith("below")
        word = distance if learns else "NOT below"
        rest = ", ".join(f"{name} {number:.3g}" for name, number in references.items())
        lines[0] += (
            f", {word} the best trivial guess ({best}): it learns"
            if learns
            else f", {word} the best trivial guess ({best}): train longer"
        )
        lines.append(f"  trivial guesses: {rest}{f' ({stage.units})' if stage.units else ''}")
    return lines


def _format(run: Path) -> str:
    """What the encoder can be exported to: timm where it has a counterpart there, else ONNX."""
    from unmask.api.loading import load
    from unmask.contracts import Encoder
    from unmask.errors import UserError
    from unmask.official.export import timm_twin

    try:
        encoder = load(run)
        assert isinstance(encoder, Encoder)
        timm_twin(encoder)
    except (UserError, AssertionError):
        return "onnx"
    return "timm"


def score_line(evaluation: Mapping[str, Any]) -> str:
    """One probe in one line, beside its baseline."""
    probe = str(evaluation.get("probe"))
    if probe == "own":
        return _own_line(evaluation)
    baseline = _baseline(evaluation)
    key = next((k for k in ("top1", "rankme", "knn_top1") if finite(evaluation.get(k))), None)
    if key is None:
        return f"  {probe}: no number"
    value = _amount(key, evaluation[key])
    if probe == "accuracy":
        count, commonest = evaluation.get("test_samples"), (evaluation.get("baseline") or {}).get(_COMMONEST) or {}
        beside = f", {_COMMONEST} {_amount(key, commonest[key])}" if finite(commonest.get(key)) else ""
        return f"  right on {count} test images: {value}{beside}"
    name = f"{probe} probe" if key != "rankme" else "RankMe (directions in use)"
    before = f", random initialisation {_amount(key, baseline[key])}" if finite(baseline.get(key)) else ""
    return f"  {name}: {value}{before}"


def _own_line(evaluation: Mapping[str, Any]) -> str:
    """A system's own metrics in one line, the main one beside its baselines."""
    names, rows = own_rows(evaluation)
    own = ", ".join(f"{name} {value}" for name, value in zip(names, rows[0][1:], strict=True) if value)
    beside = "; ".join(f"{row[0]} {row[1]}" for row in rows[1:] if row[1])
    count = evaluation.get("test_samples")
    return (
        f"  {own}"
        + (f" on {count} samples ({evaluation.get('split')})" if count else "")
        + (f"; {beside}" if beside else "")
    )


def own_rows(scores: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Columns (in words) and rows of a system's own metrics: the model, then each baseline."""
    keys = list(scores["measures"])
    rows = [["this model", *(own_value(scores.get(key)) for key in keys)]]
    for name, numbers in (scores.get("baseline") or {}).items():
        rows.append([name, *(own_value(numbers.get(key)) for key in keys)])
    return [scores["measures"][key] for key in keys], rows


def own_value(value: Any) -> str:
    return f"{value:.4g}" if finite(value) else ""


def score_rows(scores: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Columns and rows of a table of scores: the model, then each baseline with its spread over seeds."""
    keys = [key for key in ("top1", "top5", "rankme") if finite(scores.get(key))]
    rows = [["this model", *(_amount(key, scores[key]) for key in keys)]]
    for name, numbers in (scores.get("baseline") or {}).items():
        cells = []
        for key in keys:
            spread = numbers.get(f"{key}_std")
            cell = _amount(key, numbers[key]) if finite(numbers.get(key)) else ""
            cells.append(f"{cell} ± {_amount(key, spread).removesuffix(' %')}" if cell and spread else cell)
        rows.append([name, *cells])
    return keys, rows


def _baseline(evaluation: Mapping[str, Any]) -> Mapping[str, Any]:
    found = (evaluation.get("baseline") or {}).get("random initialisation")
    return found if isinstance(found, Mapping) else {}


def _numbers(evaluation: Mapping[str, Any]) -> dict[str, Any]:
    kept = {k: v for k, v in evaluation.items() if finite(v)}
    return kept | ({"baseline": evaluation["baseline"]} if evaluation.get("baseline") else {})


def _amount(key: str, value: float) -> str:
    return f"{100 * value:.1f} %" if key in _SHARES else f"{value:.4g}"


def shown(path: Path) -> str:
    """A path as short as it can be copied: relative where it lies below the present folder."""
    try:
        return str(Path(path).resolve().relative_to(Path.cwd().resolve()))
    except ValueError:
        return str(path)
