"""Rectified flow (Liu et al. 2023) in SiT's form (Ma et al. 2024): a straight path from noise to data, and its velocity.

x_t = t·data + (1 - t)·noise, t from 0 (noise) to 1 (data); the network learns v = data - noise. Times are float32 ``[B]``;
data have any shape ``[B, ...]``. The samplers of ``samplers.py`` follow v from 0 to 1.
"""

from __future__ import annotations

from torch import Tensor


def expand(time: Tensor, like: Tensor) -> Tensor:
    """``[B]`` shaped to broadcast over ``[B, ...]``."""
    return time.reshape(-1, *[1] * (like.ndim - 1))


def interpolate(data: Tensor, noise: Tensor, time: Tensor) -> Tensor:
    """x_t = t·data + (1 - t)·noise."""
    t = expand(time, data)
    return t * data + (1 - t) * noise


def velocity(data: Tensor, noise: Tensor) -> Tensor:
    """data - noise: what the network has to say anywhere on the path."""
    return data - noise


def data_from_velocity(x_t: Tensor, time: Tensor, v: Tensor) -> Tensor:
    """Where the path would end: x_t + (1 - t)·v."""
    return x_t + (1 - expand(time, x_t)) * v


def score(x_t: Tensor, time: Tensor, v: Tensor) -> Tensor:
    """∇ log p_t(x_t) = (t·v - x_t) / (1 - t), for t < 1."""
    t = expand(time, x_t)
    return (t * v - x_t) / (1 - t)


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """``[B]``: the mean of ``values [B, N, C]`` over the real tokens of each sample, ``mask [B, N]`` ≠ 0 at real ones."""
    real = (mask != 0).to(values.dtype)
    total = (values * real[..., None]).flatten(1).sum(dim=1)
    return total / (real.sum(dim=1).clamp(min=1) * values.shape[2])


def flow_loss(v: Tensor, data: Tensor, noise: Tensor, mask: Tensor | None = None) -> Tensor:
    """``[B]``: mean squared error of the velocity, over all values or over the real tokens of ``[B, N, C]``."""
    error = (v - velocity(data, noise)) ** 2
    return error.flatten(1).mean(dim=1) if mask is None else masked_mean(error, mask)
