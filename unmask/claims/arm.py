"""Do one job: train (or only initialise), then measure. Also a program: ``python -m unmask.claims.arm FOLDER``.

What is done already is left as it is: a finished training is loaded, a stopped one resumed, a measure that is written
not measured again.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from unmask.claims.jobs import Job, read_job
from unmask.claims.measure import measure
from unmask.contracts import Trainable
from unmask.engine.run import is_run, read_run, write_json
from unmask.errors import UserError

Talk = Callable[[str], None]


def perform(job: Job, talk: Talk) -> dict[str, float]:
    """The job's numbers, by metric. Raises ``UserError`` for whatever does not fit."""
    missing = [name for name in job.metrics if not job.measure_file(name).is_file()]
    if missing or not job.metrics:
        model = compressed(job) if job.compress else untrained(job) if job.untrained else trained(job, talk)
        for name in missing:
            started = time.monotonic()
            wanted = job.metrics[name]
            numbers = measure(model, job, name, talk)
            if wanted["key"] not in numbers:
                known = ", ".join(k for k, v in numbers.items() if isinstance(v, float))
                raise UserError(f"probe {wanted['probe']} gives no {wanted['key']!r}: it gives {known}")
            path = job.measure_file(name)
            path.parent.mkdir(parents=True, exist_ok=True)
            kept = {
                "value": numbers[wanted["key"]],
                "seconds": round(time.monotonic() - started, 2),
                "numbers": numbers,
            }
            write_json(path, kept)
    return job.values() or {}


def trained(job: Job, talk: Talk) -> Trainable:
    """The system after its training, which is started, resumed or found done."""
    from unmask.api.loading import load
    from unmask.api.plan import plan
    from unmask.api.training import carry_out

    if is_run(job.run) and read_run(job.run)["state"] != "done" and not has_checkpoint(job.run):
        shutil.rmtree(job.run)  # it was stopped before its first checkpoint: there is nothing to go on from
    if not is_run(job.run) or read_run(job.run)["state"] != "done":
        chosen = plan(job.recipe_file)
        carry_out(
            chosen,
            job.run,
            talk=talk,
            resume=is_run(job.run),
            probe=False,
            command=["unmask", "train", str(job.recipe_file)],
        )
    model = load(job.run, whole=True)
    assert isinstance(model, Trainable)
    return model


def compressed(job: Job) -> Trainable:
    """What a compressor makes of the run that this seed's arms share, calibrated on the job's own data."""
    from unmask.api.compressing import compress

    options = dict(job.compress)
    method, budget = options.pop("method"), options.pop("budget")
    report = compress(
        job.before,
        method=method,
        budget=budget,
        data=job.recipe["data"]["uri"],
        overrides=options,
        baselines=False,
        limit=64,
        seed=job.seed,
        talk=lambda _: None,
    )
    return report["model"].module


def has_checkpoint(run: Path) -> bool:
    return any((run / "checkpoints").glob("step-*"))


def untrained(job: Job) -> Trainable:
    """The system as its training would begin it, from the same seed."""
    import torch

    from unmask.api.plan import plan

    stage = plan(job.recipe_file).last
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(job.seed)
        model = stage.system.build(stage.model)
    if model.encoder is not None:
        model.encoder.preprocessing = getattr(stage.batches, "preprocessing", None)
    model.side_files.update(getattr(stage.batches, "side_files", None) or {})
    return model.eval()


def main(arguments: list[str] | None = None) -> int:
    """0 done, 2 a line for the user on stderr, 130 stopped (and saved)."""

    def say(line: Any) -> None:
        print(line, file=sys.stderr, flush=True)

    folder = Path((arguments or sys.argv[1:])[0])
    try:
        print(json.dumps(perform(read_job(folder), say)))
        return 0
    except UserError as error:
        say(f"unmask: {error}")
        return 2
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
