"""Kill a small run with SIGKILL at random moments, resume it each time, and compare its weights with those of an
uninterrupted run.

    python -m engine.kill_and_resume FOLDER [KILLS] [SEED]        (with tests/ on PYTHONPATH)

Each process is a fork of this one, which has imported torch and started none of its threads; the run itself starts from
nothing but its folder.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from pathlib import Path

from .toys import Width, losses, same, stage, weights

STEPS = 400


def run(out: Path, *, resume: bool) -> None:
    """The run that is killed: dropout (global generators), averages, accumulation, a careless probe, lines of 7 steps."""
    from unmask.engine.display import SilentDisplay
    from unmask.engine.stages import train

    made = stage(
        steps=STEPS,
        compile="off",  # seconds of every life would go to the compiler
        accumulate=2,
        ema=0.95,
        log_every=7,
        save_every=10,
        preview_every=50,
        probe_every=40,
        model={"dropout": 0.2},
        data={"streaming": True},
        monitors=[Width()],
        best="width",
    )
    train([made], out, describe={"system": "toy"}, resume=resume, display=SilentDisplay())


def forked(out: Path) -> int:
    """A process that starts or resumes the run; its id."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        run(out, resume=(out / "run.json").exists())
        code = 0
    finally:
        sys.stderr.flush()
        os._exit(code)


def kill_and_resume(folder: Path, kills: int, seed: int) -> int:
    """How many kills met a running process. Raises ``AssertionError`` when a weight or a metric differs."""
    chance = random.Random(seed)
    begun = time.monotonic()
    child = forked(folder / "straight")
    assert os.waitpid(child, 0)[1] == 0
    whole = time.monotonic() - begun
    met = 0
    out = folder / "killed"
    for _ in range(kills):
        child = forked(out)
        # the remaining work shrinks with every checkpoint that survives: short lives keep the run from ending early
        time.sleep(chance.uniform(0.0, 2.2 * whole / kills))
        os.kill(child, signal.SIGKILL)
        met += os.waitpid(child, 0)[1] == signal.SIGKILL
    child = forked(out)
    assert os.waitpid(child, 0)[1] == 0
    assert same(weights(folder / "straight"), weights(out)), "the weights differ"
    assert losses(folder / "straight") == losses(out), "the metrics differ"
    return met


if __name__ == "__main__":
    kills = int(sys.argv[2]) if len(sys.argv) > 2 else 20
    begun = time.monotonic()
    met = kill_and_resume(Path(sys.argv[1]), kills, int(sys.argv[3]) if len(sys.argv) > 3 else 0)
    print(
        f"{met} of {kills} kills met a running process; the final weights are bit-identical ({time.monotonic() - begun:.0f} s)"
    )
