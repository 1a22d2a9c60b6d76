"""Trivial answers that a network has to beat: what one value of a noisy image says of its own noise."""

from __future__ import annotations

from torch import Tensor

from unmask.systems.generation.diffusion import GaussianDiffusion


def alone(diffusion: GaussianDiffusion, x_t: Tensor, t: Tensor, power: Tensor) -> Tensor:
    """The best linear guess of the noise from each value of x_t by itself, for data of mean 0 and mean square ``power``."""
    bar = diffusion.table("bar", t, x_t)
    return x_t * (1 - bar).sqrt() / (bar * power + 1 - bar)


def alone_in_flow(x_t: Tensor, time: Tensor, power: Tensor) -> Tensor:
    """The same for the velocity of a rectified flow at ``time [B]``: x_t·(t·power - (1 - t)) / (t²·power + (1 - t)²)."""
    t = time.reshape(-1, *[1] * (x_t.ndim - 1))
    return x_t * (t * power - (1 - t)) / (t**2 * power + (1 - t) ** 2)
