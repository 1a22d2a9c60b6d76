"""One arm with one seed: what it does, and the folder it does it in. Imports no torch.

A job's folder holds ``recipe.yaml`` (so that ``unmask train recipe.yaml`` repeats the training by itself), ``job.json``
(what to measure), ``run/`` (the training) and ``measures/``. Its name carries a digest of the recipe and of the library's
version: what is changed gets new folders, what is not goes on in the old ones.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from unmask import __version__
from unmask.claims.claim import QUIET, Metric, Tier
from unmask.claims.materials import short
from unmask.plain_yaml import read_yaml


@dataclass(frozen=True)
class Job:
    """``metrics``: by name, with ``data`` as ``data.open`` takes it."""

    folder: Path
    slug: str
    arm: str
    seed: int
    untrained: bool
    steps: int
    recipe: dict[str, Any]
    metrics: dict[str, dict[str, Any]]
    compress: dict[str, Any] = field(default_factory=dict)
    before: str = ""  # the run that this arm starts from

    @property
    def run(self) -> Path:
        return self.folder / "run"

    @property
    def recipe_file(self) -> Path:
        return self.folder / "recipe.yaml"

    @property
    def title(self) -> str:
        return f"{self.slug}: {self.arm}, seed {self.seed}"

    def data_settings(self, uri: str) -> dict[str, Any]:
        """The data settings of its training, for other data of the kind."""
        own = {k: v for k, v in self.recipe["data"].items() if k not in ("split", "limit")}
        return {**own, "uri": uri}

    def measure_file(self, metric: str) -> Path:
        return (
            self.folder
            / "measures"
            / f"{plain_name(metric)}-{short(json.dumps(self.metrics[metric], sort_keys=True))}.json"
        )

    def values(self) -> dict[str, float] | None:
        """Each metric's number, or None while one is missing; of a job that only trains: nothing, once that is done."""
        if not self.metrics and not self._trained():
            return None
        found = {}
        for name in self.metrics:
            path = self.measure_file(name)
            if not path.is_file():
                return None
            found[name] = float(json.loads(path.read_text())["value"])
        return found

    def _trained(self) -> bool:
        path = self.run / "run.json"
        return path.is_file() and json.loads(path.read_text()).get("state") == "done"

    def seconds(self) -> float:
        """Seconds of training and measuring, as far as they are written."""
        total = sum(
            float(json.loads(p.read_text())["seconds"]) for p in map(self.measure_file, self.metrics) if p.is_file()
        )
        if (self.run / "run.json").is_file():
            total += float(json.loads((self.run / "run.json").read_text()).get("seconds") or 0)
        return total

    def steps_done(self) -> int:
        """Training steps so far, read from the last line of the metrics."""
        if self.untrained or self.values() is not None:
            return self.steps
        path = self.run / "metrics.jsonl"
        if not path.is_file():
            return 0
        with path.open("rb") as file:
            file.seek(max(path.stat().st_size - 4096, 0))
            found = re.findall(rb'"step": (\d+)', file.read())
        return min(int(found[-1]), self.steps) if found else 0

    def write(self) -> None:
        """Put recipe and job into the folder."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self.recipe_file.write_text(yaml.safe_dump(self.recipe, sort_keys=False), encoding="utf-8")
        told = {
            k: getattr(self, k) for k in ("slug", "arm", "seed", "untrained", "steps", "metrics", "compress", "before")
        }
        (self.folder / "job.json").write_text(json.dumps(told, indent=1), encoding="utf-8")


def read_job(folder: Path) -> Job:
    """The job that ``write`` put there."""
    recipe = read_yaml((folder / "recipe.yaml").read_text(encoding="utf-8"))
    return Job(folder=folder, recipe=recipe, **json.loads((folder / "job.json").read_text(encoding="utf-8")))


def jobs_before(
    slug: str, tier: Tier, seeds: int, work: Path, found: Mapping[str, str], device: str | None = None
) -> list[Job]:
    """What is trained before the arms, one a seed; empty for a claim without it."""
    if tier.before is None:
        return []
    jobs = []
    for seed in range(seeds):
        parts = {part: dict(getattr(tier.before, part)) for part in ("data", "model", "train")}
        parts["train"] = {**QUIET, **parts["train"], "seed": seed, **({"device": device} if device else {})}
        parts["data"]["uri"] = found[parts["data"]["uri"]]
        recipe = {"system": tier.before.system, "about": f"{slug}, before its arms, seed {seed}", **parts}
        digest = short(json.dumps([__version__, recipe], sort_keys=True, default=str))
        folder = work / f"{slug}-before-seed{seed}-{digest}"
        jobs.append(Job(folder, slug, "before", seed, False, parts["train"]["steps"], recipe, {}))
    return jobs


def jobs_of(
    slug: str,
    tier: Tier,
    seeds: int,
    work: Path,
    found: Mapping[str, str],
    device: str | None = None,
    before: Sequence[Job] = (),
) -> list[Job]:
    """Every arm with every seed, seed by seed, so that a half-done claim already has whole pairs.

    found: what each URI of the claim is for ``data.open``. before: what ``jobs_before`` gave.
    """
    jobs = []
    for seed in range(seeds):
        for arm, own in tier.arms.items():
            parts = tier.settings(arm)
            parts["train"]["seed"] = seed
            if device is not None:
                parts["train"]["device"] = device
            parts["data"]["uri"] = found[parts["data"]["uri"]]
            if before:
                parts = _with_run(parts, str(before[seed].run))
            recipe = {"system": tier.system or slug, "about": f"{slug}, {arm}, seed {seed}", **parts}
            metrics = {name: measured(metric, found, seed) for name, metric in tier.metrics.items()}
            told: list[Any] = [__version__, recipe, own.untrained, *([own.compress] if own.compress else [])]
            digest = short(json.dumps(told, sort_keys=True, default=str))
            folder = work / f"{slug}-{plain_name(arm)}-seed{seed}-{digest}"
            steps = 0 if own.untrained or own.compress else tier.budget.steps
            run = str(before[seed].run) if before else ""
            jobs.append(Job(folder, slug, arm, seed, own.untrained, steps, recipe, metrics, own.compress, run))
    return jobs


def _with_run(value: Any, run: str) -> Any:
    """``{before}`` in any text of the settings, replaced by a run."""
    if isinstance(value, Mapping):
        return {k: _with_run(v, run) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_with_run(v, run) for v in value]
    return value.replace("{before}", run) if isinstance(value, str) else value


def measured(metric: Metric, found: Mapping[str, str], seed: int) -> dict[str, Any]:
    return {**metric.plain(), "data": found[metric.data], "seed": seed}


def plain_name(text: str) -> str:
    """Lower-case letters, digits and dashes: ``ratio 0.75`` -> ``ratio-0-75``."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
