"""``reproduce``: run a paper's claim at small scale and write what came of it."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from unmask.claims.claim import Claim, Tier, tier_of
from unmask.claims.jobs import Job, jobs_before, jobs_of
from unmask.claims.materials import find_data
from unmask.claims.pool import cores, run_jobs
from unmask.claims.verdict import comparisons, rule, verdict
from unmask.errors import UserError

Talk = Callable[[str], None]
WORK = Path("runs") / "claims"
FORMAT = 1


def reproduce(
    system: str,
    *,
    tier: str = "tiny",
    seeds: int | None = None,
    out: str | Path = "results",
    work: str | Path | None = None,
    jobs: int | None = None,
    device: str | None = None,
    talk: Talk | None = None,
) -> dict[str, Any]:
    """Train a method and its baselines under one budget over several seeds, test the difference, write the verdict.

    system: a slug with a ``claim.yaml``. tier: "tiny" (two cores, minutes) or "small" (one GPU). seeds: instead of the
    claim's own number (3 or more). out: gets ``SLUG.json`` and its figures. work: where the runs lie (default
    ``runs/claims``); what is finished there is not done again, what was stopped goes on. jobs: how many trainings at
    once (default: one a core without a GPU, else one). Returns what ``SLUG.json`` holds; its ``verdict`` is "shown" or
    "not shown". Raises ``UserError`` in one line, before anything is trained where that can be known.
    """
    talk = talk or _stderr
    claim, chosen = tier_of(system, tier)
    if seeds is not None and seeds < 3:
        raise UserError(f"seeds={seeds}: a paired test needs 3 or more")
    count = seeds or chosen.seeds
    folder = Path(work) if work is not None else WORK
    uris = [chosen.settings(arm)["data"].get("uri", "") for arm in chosen.arms] + [
        m.data for m in chosen.metrics.values()
    ]
    if not all(uris):
        raise UserError(f"the claim of {system}, tier {tier}: data.uri is missing")
    if chosen.before is not None:
        uris.append(chosen.before.data.get("uri", ""))
    found = find_data(uris, folder)
    first = jobs_before(system, chosen, count, folder, found, device)
    every = jobs_of(system, chosen, count, folder, found, device, first)
    checked(first[:1] or every[: len(chosen.arms)])
    talk(f"{system}: {claim.statement}")
    talk(f"{len(chosen.arms)} arms, {count} seeds; {chosen.budget.sentence()}; runs in {folder}")
    began = time.monotonic()
    if first:
        run_jobs(first, jobs or default_jobs(device), talk)
        checked(every[: len(chosen.arms)])
    run_jobs(every, jobs or default_jobs(device), talk)
    result = outcome(system, claim, tier, chosen, every, count)
    if chosen.cost is not None:
        from unmask.claims.cost import cost

        result["cost"] = cost(chosen.cost, folder, talk)
    result["wall_seconds"] = round(time.monotonic() - began, 1)
    written(result, Path(out), talk)
    for line in sentences(result):
        talk(line)
    return result


def checked(jobs: list[Job]) -> None:
    """Plan every arm once and build its network, so that a wrong option is told now and not after an hour."""
    from unmask.api.plan import plan

    for job in jobs:
        if job.values() is None and not job.compress:
            job.write()
            for stage in plan(job.recipe_file).stages:
                if not stage.reads:  # what reads an earlier stage can be built when that is done
                    stage.system.build(stage.model)


def default_jobs(device: str | None = None) -> int:
    """One a core on a CPU, one alone on a GPU."""
    import torch

    on_cpu = device == "cpu" or (device in (None, "auto") and not torch.accelerator.is_available())
    return cores() if on_cpu else 1


def outcome(system: str, claim: Claim, name: str, tier: Tier, jobs: list[Job], seeds: int) -> dict[str, Any]:
    """Everything that ``SLUG.json`` holds but the cost."""
    from unmask.catalog import card
    from unmask.engine.run import machine, now, versions

    numbers: dict[str, dict[str, list[float]]] = {m: {arm: [] for arm in tier.arms} for m in tier.metrics}
    for job in jobs:
        for metric, value in (job.values() or {}).items():
            numbers[metric][job.arm].append(value)
    directions = {m: metric.higher for m, metric in tier.metrics.items()}
    compared = comparisons(numbers, tier.method, tier.baselines, tier.metric, directions, tier.margin)
    decisive = [c for c in compared if c.primary]
    return {
        "format": FORMAT,
        "slug": system,
        "title": card(system).title,
        "claim": claim.statement,
        "source": claim.source,
        "expect": claim.expect,
        "tier": name,
        "about": tier.about,
        "budget": tier.budget.sentence(),
        "verdict": verdict(compared),
        "rule": rule(tier.margin),
        "metric": tier.metric,
        "metric_label": tier.metrics[tier.metric].label or tier.metric,
        "metrics": {m: {**metric.plain(), "label": metric.label or m} for m, metric in tier.metrics.items()},
        "method": tier.method,
        "baseline": tier.baselines,
        "interval": [[round(c.test.low, 4), round(c.test.high, 4)] for c in decisive],
        "level": decisive[0].test.level,
        "comparisons": [c.plain() for c in compared],
        "sentences": [c.sentence() for c in compared],
        "numbers": numbers,
        "arms": {arm: {m: summary(numbers[m][arm]) for m in tier.metrics} for arm in tier.arms},
        "runs": [told(job) for job in jobs],
        "seeds": list(range(seeds)),
        "seconds": round(sum(job.seconds() for job in jobs), 1),
        "versions": versions(),
        "machine": machine(),
        "finished": now(),
    }


def summary(values: list[float]) -> dict[str, Any]:
    """Mean, spread (n - 1) and the values, one a seed."""
    import statistics

    return {"mean": statistics.fmean(values), "std": statistics.stdev(values), "values": values}


def told(job: Job) -> dict[str, Any]:
    return {
        "arm": job.arm,
        "seed": job.seed,
        "trained": not job.untrained,
        "values": job.values(),
        "seconds": round(job.seconds(), 1),
        "run": job.folder.name,
    }


def written(result: Mapping[str, Any], out: Path, talk: Talk) -> None:
    """``SLUG.json`` and the figures."""
    from unmask.engine.run import mended_errors, write_json
    from unmask.reports import figures

    with mended_errors(f"making {out}"):
        out.mkdir(parents=True, exist_ok=True)
    write_json(out / f"{result['slug']}.json", result)
    figures.claim_figure(dict(result), out / f"{result['slug']}.svg")
    if result.get("cost"):
        from unmask.claims.cost import cost_figure

        cost_figure(result["cost"], out / f"{result['slug']}-cost.svg")
    talk(f"written: {out / (result['slug'] + '.json')}")


def sentences(result: Mapping[str, Any]) -> list[str]:
    """The verdict for a person: first the word, then every comparison."""
    return [f"{result['slug']}: {result['verdict']} ({result['rule']})", *(f"  {s}" for s in result["sentences"])]


def _stderr(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
