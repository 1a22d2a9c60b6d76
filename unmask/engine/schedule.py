"""Learning rate and weight decay as pure functions of the step: nothing to save, nothing to restore.

A step counts from 0; the rate of step ``i`` is the rate at the fractional epoch ``i / steps_per_epoch``, as MAE's
official code updates it in every iteration. Where the data has no length the same formulas run in steps.
"""

from __future__ import annotations

import bisect
import math

from unmask.engine.settings import TrainSettings


def learning_rate(settings: TrainSettings, step: int, steps: int, steps_per_epoch: int | None = None) -> float:
    """The rate of optimiser step ``step`` (from 0) of ``steps``.

    Linear from ``warmup_lr`` to the peak over the warm-up W, then: ``min + (peak - min) (1 + cos(pi (e - W) / (E - W))) / 2``
    (cosine; He et al. 2022), a straight line to the minimum (linear; Devlin et al. 2019), the peak (constant), or the peak
    times ``gamma`` for each milestone passed (multistep).
    """
    peak, warmup = settings.peak_lr, warmup_length(settings, steps_per_epoch)
    if step < warmup:
        return settings.warmup_lr + (peak - settings.warmup_lr) * step / warmup
    if settings.schedule == "constant":
        return peak
    if settings.schedule == "multistep":
        passed = bisect.bisect_right(milestone_steps(settings, steps, steps_per_epoch), step)
        return peak * settings.gamma**passed
    share = (step - warmup) / (steps - warmup) if steps > warmup else 1.0
    if settings.schedule == "linear":
        return settings.min_lr + (peak - settings.min_lr) * (1 - min(share, 1.0))
    return settings.min_lr + (peak - settings.min_lr) * 0.5 * (1 + math.cos(math.pi * min(share, 1.0)))


def weight_decay(settings: TrainSettings, step: int, steps: int) -> float:
    """The decay of step ``step``: constant, or along a half cosine to ``weight_decay_end`` (DINO, Caron et al. 2021)."""
    first, last = settings.weight_decay, settings.weight_decay_end
    if last is None:
        return first
    return last + (first - last) * 0.5 * (1 + math.cos(math.pi * min(step / max(steps, 1), 1.0)))


def warmup_length(settings: TrainSettings, steps_per_epoch: int | None) -> float:
    """Length of the warm-up in steps; a part of a step is possible with fractional epochs."""
    if settings.warmup_steps is not None:
        return float(settings.warmup_steps)
    return (settings.warmup_epochs or 0.0) * (steps_per_epoch or 0)


def milestone_steps(settings: TrainSettings, steps: int, steps_per_epoch: int | None) -> list[float]:
    """Where multistep multiplies by ``gamma``, in steps: shares of the run when all are below 1, else epochs."""
    shares = all(m < 1 for m in settings.milestones) or not steps_per_epoch
    return [m * (steps if shares else (steps_per_epoch or 1)) for m in settings.milestones]
