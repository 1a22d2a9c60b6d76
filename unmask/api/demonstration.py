"""``demo``: the main job on real images, in minutes on two cores."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

MOST_STEPS = 3000  # on a fast machine more would only make the demo longer
Talk = Callable[[str], None]


def demo(
    *,
    out: str | Path | None = None,
    seconds: float = 120,
    seed: int = 0,
    device: str = "auto",
    talk: Talk | None = None,
) -> dict[str, Any]:
    """Pre-train MAE on Fashion-MNIST pictures with 75 % of each hidden, for about ``seconds`` of training; probe it beside its
    random initialisation; write the report. Returns the facts of the run, the headline and the closing screen.
    """
    from unmask.api.closing import facts, screen
    from unmask.api.comparing import fitted, steps_within
    from unmask.api.plan import plan
    from unmask.api.training import _free_folder, _refuse_occupied, _stderr, carry_out

    talk = talk or _stderr
    folder = Path(out) if out is not None else _free_folder("demo")
    _refuse_occupied(folder)
    talk("Fashion-MNIST, 28 x 28 pixels: MAE hides 36 of 49 patches of every picture and learns to paint them.")
    chosen = plan("mae", recipe="tiny", seed=seed, device=device)
    steps = min(steps_within(chosen, seconds, talk), MOST_STEPS)
    stage = chosen.last
    stage.train = fitted(stage.train, steps, stage.batches.steps_per_epoch)
    run = carry_out(
        chosen, folder, talk=talk, command=["unmask", "demo", "--seconds", f"{seconds:g}", "--seed", str(seed)]
    )
    found = facts(run)
    line = headline(found)
    return {**found, "headline": line, "screen": f"{line}\n\n{screen(run)}"}


def headline(found: dict[str, Any]) -> str:
    """The one number: the probe, its random initialisation, and the margin in units of seed noise."""
    for probe, numbers in found["evaluation"].items():
        random = (numbers.get("baseline") or {}).get("random initialisation") or {}
        if numbers.get("top1") is None or random.get("top1") is None:
            continue
        noise = random.get("top1_std") or 0.0
        margin = numbers["top1"] - random["top1"]
        seeds = (
            f" ({margin / noise:.0f} times the spread of {len(random.get('seeds') or [])} random networks)"
            if noise
            else ""
        )
        return (
            f"A {probe} probe reads the kind of clothing from the features: {100 * numbers['top1']:.1f} % right, "
            f"{100 * random['top1']:.1f} % before learning: {100 * margin:+.1f} points{seeds}."
        )
    return "The demo ended without a probe."
