"""``evaluate``: what an encoder knows, beside the same network at random initialisation."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from unmask.api.loading import is_run, load, named
from unmask.errors import UserError

TRAIN, TEST, RANKME = 50_000, 10_000, 25_600  # images that the probe at the end of a training looks at
OWN = "own"
Talk = Callable[[str], None]


def evaluate(
    model: Any,
    /,
    data: Any = None,
    probe: str | None = None,
    *,
    labels: float = 1.0,
    seed: int = 0,
    device: str = "auto",
    baseline: bool | int = True,
    out: str | Path | None = None,
    talk: Talk | None = None,
    model_options: Mapping[str, Any] | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Measure a model by a probe; the numbers of :func:`unmask.evaluation.evaluate`.

    probe: ridge, linear, knn, attentive, finetune, rankme, or own: the system's own metrics (``evaluation.own``). Default: own
    for a system that has some, else ridge. model: anything :func:`unmask.load` takes. data: a URI, a source or tensors; a run's own
    data if left out. labels: share of the training labels (0.1, 0.01). baseline: also the same network at random
    initialisation. out: where the numbers and pictures are written; for a run its ``evaluation/`` folder, and its report is
    written anew. model_options: of a backbone that is
    measured by name (``{"pretrained": False}``); options: of the probe, and limit (at most so many images of each
    part). Raises ``UserError`` in one line.
    """
    from unmask.evaluation.measure import PROBES
    from unmask.evaluation.measure import evaluate as measure

    known = [*PROBES, OWN]
    if probe is not None and probe not in known:
        from unmask.errors import nearest

        raise UserError(f'no probe "{probe}": {nearest(probe, known)}')
    if not 0 < labels <= 1:
        raise UserError(f"labels={labels:g} must be a share above 0 and at most 1, for example 0.1")
    run = Path(model) if isinstance(model, (str, Path)) and is_run(model) else None
    whole = _measurable(model, model_options) if probe in (None, OWN) else None
    if probe == OWN or (probe is None and whole is not None):
        return _own(model, whole, run, data, seed=seed, device=device, out=out, talk=talk, **options)
    probe = probe or "ridge"
    if data is None:
        if run is None:
            if isinstance(model, (str, Path)) and not named(model):
                load(model, **(model_options or {}))  # says what is wrong with the name: that comes first
            raise UserError(f"which data? unmask eval {model} --data URI")
        own = data_of(run)
        data, options = own["uri"], {"columns": own.get("columns") or None, **options}
    encoder = load(model, **(model_options or {}))
    folder = Path(out) if out is not None else run / "evaluation" if run is not None else None
    scores = measure(
        encoder,
        str(data) if isinstance(data, Path) else data,
        probe,
        labels=labels,
        baseline=baseline,
        seed=seed,
        device=device,
        out=folder,
        tell=talk,
        **options,
    )
    if run is not None and out is None:
        rewrite_report(run)
    return scores


def _measurable(model: Any, options: Mapping[str, Any] | None) -> Any:
    """The whole system, where it has metrics of its own; else None."""
    from unmask.contracts import Trainable

    if isinstance(model, (str, Path)):
        if options or not Path(model).exists():
            return None
        try:
            model = load(model, whole=True)
        except UserError:  # an encoder alone
            return None
    return model if isinstance(model, Trainable) and model.measures else None


def _own(
    model: Any,
    whole: Any,
    run: Path | None,
    data: Any,
    *,
    out: Any,
    talk: Talk | None,
    seed: int,
    device: str,
    **options: Any,
) -> dict[str, Any]:
    """A system's own metrics; data: a URI, or None for the run's own."""
    from unmask.evaluation.own import own

    if whole is None:
        raise UserError(f"{model} has no metric of its own: measure its encoder: --probe ridge")
    limit, split = options.pop("limit", None), options.pop("split", None)
    settings = dict(data_of(run)) if run is not None else {}
    learned = settings.get("uri")
    if data is not None:
        settings = {**{k: v for k, v in settings.items() if k not in ("split", "limit")}, "uri": str(data)}
    elif run is None:
        raise UserError(f"which data? unmask eval {model} --data URI")
    folder = Path(out) if out is not None else run / "evaluation" if run is not None else None
    scores = own(
        whole,
        {**settings, **options},
        split=split,
        seed=seed,
        limit=limit,
        device=device,
        out=folder,
        learned_from=learned,
        tell=talk,
    )
    if run is not None and out is None:
        rewrite_report(run)
    return scores


def data_of(run: Path) -> dict[str, Any]:
    """The data settings of a run (of its last stage)."""
    from unmask.reports.runs import read_run

    settings = read_run(run).last.config.get("data") or {}
    if not settings.get("uri"):
        raise UserError(f"{run} does not say what it was trained on: give --data URI")
    return settings


def probe_run(
    run: Path, talk: Talk, *, seed: int = 0, device: str = "auto", probe: str | None = None
) -> dict[str, Any] | None:
    """The probe at the end of a training: the system's own metrics where it has some, else of its encoder ridge where the data has
    labels and RankMe where it has none; None where there is nothing to measure.

    It looks at no more than ``TRAIN`` training and ``TEST`` test images (``RANKME`` without labels); the result's ``split``
    says so.
    """
    from unmask.contracts import Encoder
    from unmask.data import open as open_data

    settings = data_of(run)
    whole = load(run, whole=True)
    if whole.measures and probe in (None, OWN):
        talk(f"its own metrics on {settings['uri']} ...")
        try:
            return _own(run, whole, run, None, out=None, talk=talk, seed=seed, device=device)
        except UserError as error:  # the training is done and stays: what could not be measured is said
            talk(f"not measured: {error}")
            return None
    encoder = load(run)
    if not isinstance(encoder, Encoder) or whole.Data is not None:
        return None
    columns = settings.get("columns") or None
    source = open_data(settings["uri"], settings.get("split", "train"), columns=columns, limit=settings.get("limit"))
    if probe is None:
        probe = "ridge" if source.classes and len(source.classes) > 1 and not source.streaming else "rankme"
    talk(f"{probe} probe on {settings['uri']}, beside random initialisation ...")
    data = settings["uri"] if probe != "rankme" else source
    most, own = (RANKME, RANKME) if probe == "rankme" else (TRAIN, TEST), settings.get("limit")
    limit = (min(own or most[0], most[0]), min(own or most[1], most[1]))
    if probe != "rankme":
        from unmask.evaluation.accuracy import accuracy

        try:
            accuracy(whole, data, seed=seed, device=device, columns=columns, limit=limit, out=run / "evaluation")
        except UserError as error:  # the probe says the rest
            talk(f"its own answers are not counted: {error}")
    return evaluate(run, data, probe, seed=seed, device=device, columns=columns, limit=limit)


def rewrite_report(run: Path) -> Path:
    """``report.html`` of a run, from what lies in it now."""
    from unmask.reports.report import report

    return report(run)
