"""``compare``: several methods under the same budget on the same data, each probed the same way, on one page."""

from __future__ import annotations

import itertools
import re
import statistics
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unmask import catalog
from unmask.errors import UserError

Talk = Callable[[str], None]
_UNITS = {"s": 1, "m": 60, "min": 60, "h": 3600}
_WARM, _TIMED = 4, 12  # steps before the clock starts, steps on the clock


@dataclass(frozen=True)
class Allowance:
    """What each method may spend: seconds of training steps, or a number of steps."""

    amount: float
    in_steps: bool = False

    @property
    def words(self) -> str:
        return f"{self.amount:g} steps" if self.in_steps else f"{self.amount:g} s of training"


def read_budget(text: str) -> Allowance:
    """``5m``, ``90s``, ``1h``, ``500steps``. Raises ``UserError`` for anything else."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(steps?|s|m|min|h)\s*", text)
    if not found or float(found[1]) <= 0:
        raise UserError(f"budget {text!r} is not understood: write 5m, 90s, 1h or 500steps")
    if found[2].startswith("step"):
        return Allowance(float(int(float(found[1]))), in_steps=True)
    return Allowance(float(found[1]) * _UNITS[found[2]])


def compare(
    systems: Sequence[str],
    *,
    data: str | Path = "sample:fashion",
    budget: str = "5m",
    backbone: str | None = None,
    recipe: str | None = None,
    probe: str = "ridge",
    supervised: bool = True,
    seed: int = 0,
    device: str = "auto",
    out: str | Path | None = None,
    talk: Talk | None = None,
) -> dict[str, Any]:
    """Train each system for the same budget with the same backbone, probe each, write one report.

    A budget in time is turned into steps by timing a few steps of each method first (data ready, nothing compiled), so
    that each has a schedule that ends; what was really spent is in the result. supervised: also the supervised baseline on
    the same backbone, where there are labels. Returns ``{"metric", "budget", "data", "backbone", "seed", "rows", "report"}``,
    each row ``{name, score, spread, steps, seconds, run}`` (spread: over seeds, of random initialisation); the same lies in
    ``compare.json``. Everything is checked before the first method trains.
    """
    from unmask.api.plan import plan
    from unmask.api.training import _free_folder, _refuse_occupied, _stderr, carry_out
    from unmask.engine.run import write_json

    talk = talk or _stderr
    allowance = read_budget(budget)
    if len(set(systems)) < len(systems):
        raise UserError("a system is named twice: name each once")
    folder = Path(out) if out is not None else _free_folder("compare")
    _refuse_occupied(folder)
    recipe = recipe or ("tiny" if str(data).startswith("sample:") else "auto")
    options: dict[str, Any] = {"recipe": recipe, "data": data, "seed": seed, "device": device}

    first = plan(systems[0], backbone=backbone, **options)
    shared = _backbone_of(first)
    plans = {systems[0]: first}
    for system in systems[1:]:
        plans[system] = plan(system, overrides={"backbone": shared} if shared else {}, **options)
    images = first.last.source
    labelled = images is not None and len(images.classes or ()) > 1
    baseline = catalog.supervised().slug
    if supervised and baseline not in plans:
        if labelled and images is not None and not images.streaming:
            plans[baseline] = plan(baseline, overrides={"backbone": shared} if shared else {}, **options)
        else:
            talk(f"{data} has no labels: nothing is trained on them, and the probe is rankme")
    probe = probe if labelled else "rankme"
    for chosen in plans.values():
        for stage in chosen.stages:
            if not stage.reads:  # complains now, not after an hour of the others
                stage.system.build(stage.model)

    rows, folders = [], []
    for name, chosen in plans.items():
        steps = int(allowance.amount) if allowance.in_steps else steps_within(chosen, allowance.amount, talk)
        for stage in chosen.stages:
            stage.train = fitted(stage.train, max(steps // len(chosen.stages), 1), stage.batches.steps_per_epoch)
        for line in (*chosen.notes, f"{steps} steps"):
            talk(f"{name}: {line}")
        run = carry_out(chosen, folder / name, talk=talk, probe=False, command=_command(systems, data, budget, seed))
        rows.append(_measured(name, run, probe, seed, device, talk))
        folders.append(run)
    from unmask.api.reading import report

    key = "rankme" if probe == "rankme" else "top1"
    rows.append(
        {
            "name": "random initialisation",
            "score": _shown(key, rows[0].pop("random")),
            "spread": _shown(key, rows[0].pop("spread")),
            "steps": 0,
            "seconds": 0,
            "run": "",
        }
    )
    for row in rows:
        row.pop("random", None)
        row.setdefault("spread", None)
        if row["run"]:
            row["spread"] = None
    outcome = {
        "metric": f"{probe} {key}",
        "budget": allowance.words,
        "data": str(data),
        "backbone": (shared or {}).get("name"),
        "seed": seed,
        "rows": rows,
        "report": str(report(*folders, out=folder / "report.html")),
    }
    write_json(folder / "compare.json", outcome)
    return outcome


def fitted(train: Any, steps: int, steps_per_epoch: int | None) -> Any:
    """Training settings of ``steps`` steps, with the warm-up in proportion; uncompiled, so that the clock counts steps alone."""
    own = train.total_steps(steps_per_epoch) if train.steps or (train.epochs and steps_per_epoch) else steps
    warm = train.warmup_steps if train.warmup_steps is not None else (train.warmup_epochs or 0) * (steps_per_epoch or 0)
    values = {
        "steps": steps,
        "epochs": None,
        "warmup_epochs": None,
        "warmup_steps": round(steps * min(warm / max(own, 1), 0.2)),
        "compile": "off",
    }
    return train.model_copy(update=values)


def steps_within(chosen: Any, seconds: float, talk: Talk) -> int:
    """How many steps of a plan fit into ``seconds``: a few are timed in a throw-away run."""
    from unmask.engine import Stage
    from unmask.engine import train as run_stages
    from unmask.engine.display import SilentDisplay

    pace = 0.0
    for stage in chosen.stages:
        settings = stage.train.model_copy(
            update={
                "steps": _WARM + _TIMED,
                "epochs": None,
                "log_every": 1,
                "compile": "off",
                "warmup_epochs": None,
                "warmup_steps": 1,
            }
            | {"save_every": 0, "preview_every": 0, "probe_every": 0, "reference_every": 0}
        )
        with tempfile.TemporaryDirectory() as aside:
            trial = Stage(stage.name, lambda s=stage: s.system.build(s.model), stage.batches, settings, [])
            run_stages([trial], Path(aside) / "trial", describe={"system": chosen.card.slug}, display=SilentDisplay())
            pace += seconds_a_step(Path(aside) / "trial")
    steps = max(int(seconds / pace), 1)
    talk(f"{chosen.card.slug}: {1000 * pace:.0f} ms a step, so {steps} steps in {seconds:g} s")
    return steps


def seconds_a_step(run: Path) -> float:
    """The median time between two logged steps, after the warm ones."""
    from unmask.reports.runs import read_run

    times = [record["seconds"] for record in read_run(run).last.train][_WARM:]
    return max(statistics.median(b - a for a, b in itertools.pairwise(times)), 1e-4)


def _backbone_of(chosen: Any) -> dict[str, Any] | None:
    backbone = getattr(chosen.last.model, "backbone", None)
    if backbone is None:
        return None
    return {k: v for k, v in backbone.plain().items() if v is not None and k not in ("image_size", "in_channels")}


def _measured(name: str, run: Path, probe: str, seed: int, device: str, talk: Talk) -> dict[str, Any]:
    from unmask.api.measuring import probe_run
    from unmask.reports.runs import read_run

    scores = probe_run(run, talk, seed=seed, device=device, probe=probe) or {}
    key = "rankme" if probe == "rankme" else "top1"
    read = read_run(run)
    random = (scores.get("baseline") or {}).get("random initialisation") or {}
    label = f"{name} (trained on labels)" if catalog.card(name).learns_from == "labels" else name
    return {
        "name": label,
        "score": _shown(key, scores.get(key)),
        "steps": read.last.steps_done,
        "seconds": round(read.seconds or 0, 1),
        "run": str(run),
        "random": random.get(key),
        "spread": random.get(f"{key}_std"),
    }


def _shown(key: str, value: float | None) -> float | None:
    """Shares in percent."""
    return None if value is None else round(100 * value if key == "top1" else value, 2)


def _command(systems: Sequence[str], data: str | Path, budget: str, seed: int) -> list[str]:
    return ["unmask", "compare", *systems, "--data", str(data), "--budget", budget, "--seed", str(seed)]
