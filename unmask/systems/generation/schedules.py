"""Schedules: how much noise, or how many hidden tokens, at which time. Everything here is computed in float64.

Three families: the variances of Gaussian diffusion (``linear_betas``, ``cosine_betas``, ``respaced_timesteps``), the times of
rectified flow (``logit_normal_time``, ``shifted_time``), and the share of tokens that stay hidden (``hidden_share``,
``hidden_counts``).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from unmask.draw import Draw
from unmask.errors import UserError, nearest

NoiseSchedule = Literal["linear", "cosine"]
HiddenSchedule = Literal["cosine", "linear", "square", "log", "exp"]


# --- Gaussian diffusion -----------------------------------------------------------------------------------------


def linear_betas(steps: int) -> np.ndarray:
    """float64 ``[steps]``: from 1e-4 to 0.02 for 1000 steps, both ends times 1000 / steps otherwise (Ho et al. 2020)."""
    scale = 1000 / steps
    return np.linspace(scale * 1e-4, scale * 0.02, steps, dtype=np.float64)


def cosine_betas(steps: int, largest: float = 0.999) -> np.ndarray:
    """float64 ``[steps]``: ᾱ(u) = cos²((u + 0.008) / 1.008 · π / 2), each β at most ``largest`` (Nichol, Dhariwal 2021)."""
    u = np.arange(steps + 1, dtype=np.float64) / steps
    bar = np.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2
    return np.minimum(1 - bar[1:] / bar[:-1], largest)


def betas(schedule: str, steps: int) -> np.ndarray:
    """The variances of a schedule by name. Raises ``UserError`` for a name nobody knows, or fewer than one step."""
    known: dict[str, Callable[[int], np.ndarray]] = {"linear": linear_betas, "cosine": cosine_betas}
    if schedule not in known:
        raise UserError(f"no noise schedule {schedule!r}: {nearest(schedule, known)}")
    if steps < 1:
        raise UserError(f"diffusion_steps={steps} must be at least 1")
    found = known[schedule](steps)
    if found.max() >= 1:
        raise UserError(f"diffusion_steps={steps} are too few for the {schedule} schedule: it takes 21 or more")
    return found


def respaced_timesteps(steps: int, of: int) -> list[int]:
    """The ``steps`` times that sampling visits among 0 … ``of`` - 1, ascending: equal strides, each rounded (ADM).

    Raises ``UserError`` for fewer than one step or more than there are.
    """
    if not 1 <= steps <= of:
        raise UserError(f"steps={steps} does not fit: it takes 1 ... {of}, the steps that the model was trained with")
    stride = (of - 1) / (steps - 1) if steps > 1 else 1.0
    times, here = [], 0.0
    for _ in range(steps):  # a running sum, whose rounding errors belong to the published tables
        times.append(round(here))
        here += stride
    return times


# --- rectified flow ---------------------------------------------------------------------------------------------


def logit_normal_time(
    draw: Draw, name: str, count: int, *, mean: float = 0.0, std: float = 1.0, device: torch.device | str = "cpu"
) -> Tensor:
    """float32 ``[count]`` in (0, 1): the sigmoid of a normal number, which visits the middle most (Esser et al. 2024)."""
    return torch.sigmoid(draw.normal(name, (count,), device=device) * std + mean)


def uniform_time(draw: Draw, name: str, count: int, *, device: torch.device | str = "cpu") -> Tensor:
    """float32 ``[count]`` in [0, 1)."""
    return draw.uniform(name, (count,), device=device)


def shifted_time(time: Tensor, shift: float = 1.0) -> Tensor:
    """``s·t / (1 + (s - 1)·t)``: the identity at s = 1; larger s stay longer where t is large."""
    return time if shift == 1.0 else shift * time / (1 + (shift - 1) * time)


# --- masked tokens ----------------------------------------------------------------------------------------------


def hidden_share(schedule: str, fraction: float, tokens: int = 1024) -> float:
    """Which share of the tokens stays hidden when ``fraction`` of the decoding is done: 1 at 0, 0 at 1 (MaskGIT).

    schedule: cosine, linear, square, ``pow3`` (any exponent), log and exp (which depend on the number of tokens).
    """
    u, logarithm = float(fraction), math.log2(max(tokens, 2))
    if schedule == "cosine":
        return math.cos(u * math.pi / 2)
    if schedule == "linear":
        return 1 - u
    if schedule == "square":
        return 1 - u**2
    if schedule == "log":
        return min(-math.log2(u) / logarithm, 1.0) if u > 0 else 1.0
    if schedule == "exp":
        return 1 - 2 ** (-logarithm * (1 - u))
    if schedule.startswith("pow"):
        try:
            return 1 - u ** float(schedule.removeprefix("pow"))
        except ValueError:
            pass
    known = ("cosine", "linear", "square", "log", "exp", "pow3")
    raise UserError(f"no masking schedule {schedule!r}: {nearest(schedule, known)}")


def hidden_counts(schedule: str, steps: int, tokens: int) -> list[int]:
    """How many of ``tokens`` are hidden when each of ``steps`` steps begins, and 0 at the end: ``steps + 1`` numbers.

    The counts are known before a single token is, so every step has one shape for the whole batch.
    Raises ``UserError`` for fewer than one step.
    """
    if steps < 1:
        raise UserError(f"steps={steps} must be at least 1")
    counts = [tokens]
    for step in range(1, steps):
        share = hidden_share(schedule, step / steps, tokens)
        counts.append(min(max(math.floor(tokens * share), 0), counts[-1]))
    return [*counts, 0]
