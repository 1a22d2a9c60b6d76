"""Samplers: from noise to data. All noise is drawn by name: ``start`` once, ``step.0``, ``step.1`` … in the order of use.

Every sampler treats the samples of a batch apart from one another: which images share a batch changes nothing.
A *field* is what a network has been wrapped into, guidance included: ``field(x, time) -> output``, with times ``[B]``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

from unmask.draw import Draw
from unmask.errors import UserError, nearest
from unmask.systems.generation import flow
from unmask.systems.generation.diffusion import GaussianDiffusion

Field = Callable[[Tensor, Tensor], Tensor]
Tell = Callable[[str], None]
OdeSolver = Literal["euler", "heun", "dopri5"]
Diffusivity = Literal["sigma", "sbdm"]

LAST_STEP = 0.04  # of the stochastic sampler: without noise, because the score grows without bound at t = 1


def start_noise(draw: Draw, shape: Sequence[int], *, device: torch.device | str = "cpu") -> Tensor:
    """The noise that sampling starts from, under the name ``start``."""
    return draw.normal("start", shape, device=device)


# --- Gaussian diffusion -----------------------------------------------------------------------------------------


@torch.no_grad()
def ddpm(
    field: Field,
    diffusion: GaussianDiffusion,
    start: Tensor,
    draw: Draw,
    *,
    axis: int = 1,
    clip: bool = False,
    name: str = "step",
    tell: Tell | None = None,
) -> Tensor:
    """Ancestral sampling: x ← mean + σ·noise, without noise in the last step. ``[B, ...]`` like ``start``.

    diffusion: respaced to the steps wanted. field: noise, or noise and variance values along ``axis``; it is told original
    times, int64. A noise tensor is drawn at every step, used or not. clip: keep every guess of x0 within [-1, 1], where pixels
    lie (the official codes do not, for latents).
    """
    x = start
    for number, t in _descending(diffusion, x, tell):
        believed = diffusion.posterior(field(x, diffusion.original(t)), x, t, axis=axis)
        noise = draw.normal(f"{name}.{number}", x.shape, device=x.device)
        mean = diffusion.posterior_mean(believed.x0.clamp(-1, 1), x, t) if clip else believed.mean
        last = number == len(diffusion) - 1
        x = mean if last else mean + torch.exp(0.5 * believed.log_variance) * noise
    return x


@torch.no_grad()
def ddim(
    field: Field,
    diffusion: GaussianDiffusion,
    start: Tensor,
    draw: Draw,
    *,
    eta: float = 0.0,
    axis: int = 1,
    clip: bool = False,
    name: str = "step",
    tell: Tell | None = None,
) -> Tensor:
    """DDIM (Song et al. 2021): without noise at eta 0, like DDPM with small variances at eta 1. Arguments as ``ddpm``'s."""
    x = start
    for number, t in _descending(diffusion, x, tell):
        epsilon, _ = diffusion.split(field(x, diffusion.original(t)), x, axis)
        x0 = diffusion.x0_from_noise(x, t, epsilon)
        bar, before = diffusion.table("bar", t, x), diffusion.table("bar_before", t, x)
        if clip:
            x0 = x0.clamp(-1, 1)
            epsilon = (x - bar.sqrt() * x0) / (1 - bar).sqrt()
        sigma = eta * torch.sqrt((1 - before) / (1 - bar)) * torch.sqrt(1 - bar / before)
        x = x0 * torch.sqrt(before) + torch.sqrt(1 - before - sigma**2) * epsilon
        if eta:  # without eta the noise has no weight, and a draw by name leaves no trace on others
            noise = draw.normal(f"{name}.{number}", x.shape, device=x.device)
            x = x if number == len(diffusion) - 1 else x + sigma * noise
    return x


def _descending(diffusion: GaussianDiffusion, x: Tensor, tell: Tell | None):  # type: ignore[no-untyped-def]
    steps = len(diffusion)
    for number in range(steps):
        if tell is not None:
            tell(f"step {number + 1} of {steps}")
        yield number, torch.full((len(x),), steps - 1 - number, dtype=torch.int64, device=x.device)


# --- flows ------------------------------------------------------------------------------------------------------


@torch.no_grad()
def ode(
    field: Field,
    start: Tensor,
    *,
    solver: str = "dopri5",
    steps: int = 50,
    atol: float = 1e-6,
    rtol: float = 1e-3,
    most: int = 1000,
    tell: Tell | None = None,
) -> Tensor:
    """Follow dx = v dt from t = 0 to 1. field: the velocity, told float32 times ``[B]``.

    solver: "euler" and "heun" take ``steps`` equal steps (heun evaluates the field twice in each), "dopri5" chooses its
    steps by ``atol`` and ``rtol``, for every sample its own, and takes at most ``most``. Raises ``UserError``.
    """
    known = ("euler", "heun", "dopri5")
    if solver not in known:
        raise UserError(f"no solver {solver!r}: {nearest(solver, known)}")
    if steps < 1:
        raise UserError(f"steps={steps} must be at least 1")
    if solver == "dopri5":
        return _dopri5(field, start, atol, rtol, most, tell)
    x, h = start, 1 / steps
    for number in range(steps):
        if tell is not None:
            tell(f"step {number + 1} of {steps}")
        v = field(x, x.new_full((len(x),), number / steps))
        if solver == "heun":
            ahead = field(x + h * v, x.new_full((len(x),), (number + 1) / steps))
            v = (v + ahead) / 2
        x = x + h * v
    return x


@torch.no_grad()
def sde(
    field: Field,
    start: Tensor,
    draw: Draw,
    *,
    steps: int = 250,
    diffusivity: str = "sigma",
    name: str = "step",
    tell: Tell | None = None,
) -> Tensor:
    """Euler-Maruyama on dx = (v + w·score) dt + √(2w) dW (SiT): ``steps - 1`` equal steps up to t = 0.96, then one without
    noise. diffusivity: w = 1 - t ("sigma") or (1 - t) / t ("sbdm", which starts at t = 1e-3). Raises ``UserError``.
    """
    if diffusivity not in ("sigma", "sbdm"):
        raise UserError(f"no diffusivity {diffusivity!r}: {nearest(diffusivity, ('sigma', 'sbdm'))}")
    if steps < 1:
        raise UserError(f"steps={steps} must be at least 1")
    first, end = (1e-3 if diffusivity == "sbdm" else 0.0), 1 - LAST_STEP
    h = (end - first) / (steps - 1) if steps > 1 else 0.0
    x = start
    for number in range(steps):
        if tell is not None:
            tell(f"step {number + 1} of {steps}")
        t = end if number == steps - 1 else first + number * h
        time = x.new_full((len(x),), t)
        w = (1 - t) / t if diffusivity == "sbdm" else 1 - t
        v = field(x, time)
        drift = v + w * flow.score(x, time, v)
        if number == steps - 1:
            return x + drift * LAST_STEP
        noise = draw.normal(f"{name}.{number}", x.shape, device=x.device)
        x = x + drift * h + math.sqrt(2 * w * h) * noise
    return x


_A = (
    (1 / 5,),
    (3 / 40, 9 / 40),
    (44 / 45, -56 / 15, 32 / 9),
    (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
    (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
    (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
)
_C = (1 / 5, 3 / 10, 4 / 5, 8 / 9, 1.0, 1.0)
_E = (71 / 57600, 0.0, -71 / 16695, 71 / 1920, -17253 / 339200, 22 / 525, -1 / 40)  # fifth minus fourth order


def _dopri5(field: Field, x: Tensor, atol: float, rtol: float, most: int, tell: Tell | None) -> Tensor:
    """Dormand-Prince 5(4): each sample has its own time and step, so that no image depends on its neighbours."""
    time = torch.zeros(len(x), dtype=torch.float64, device=x.device)
    step = torch.full_like(time, 0.01)
    v = field(x, time.float())
    for number in range(most):
        h = torch.minimum(step, 1 - time)
        stages = [v]
        for row, c in zip(_A, _C, strict=True):
            moved = x + flow.expand(h.to(x.dtype), x) * sum(a * k for a, k in zip(row, stages, strict=True) if a)
            stages.append(field(moved, (time + c * h).clamp(max=1).float()))
        # the last stage stands at the end of the step: its place is the new x, its velocity the next first stage
        error = flow.expand(h.to(x.dtype), x) * sum(e * k for e, k in zip(_E, stages, strict=True) if e)
        scale = atol + rtol * torch.maximum(x.abs(), moved.abs())
        ratio = (error / scale).flatten(1).double().square().mean(dim=1).sqrt()
        taken = ratio <= 1
        time = torch.where(taken, time + h, time)
        x = torch.where(flow.expand(taken, x), moved, x)
        v = torch.where(flow.expand(taken, x), stages[-1], v)
        growth = 0.9 * ratio.clamp(min=1e-10) ** -0.2
        step = h * torch.where(taken, growth.clamp(1.0, 10.0), growth.clamp(0.2, 1.0))
        step = torch.where(time >= 1 - 1e-9, torch.zeros_like(step), step)
        left = float((1 - time).max())
        if tell is not None:
            tell(f"step {number + 1}, {100 * (1 - left):.0f} % of the way")
        if left <= 1e-9:
            return x
    raise UserError(f"dopri5 took {most} steps without arriving: use solver=heun, or a larger rtol")
