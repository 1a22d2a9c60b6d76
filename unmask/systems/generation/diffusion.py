"""Gaussian diffusion with noise prediction and, where wanted, a learned variance (Ho et al. 2020; Nichol, Dhariwal 2021).

    diffusion = GaussianDiffusion.of("linear", 1000)
    noisy = diffusion.noisy(x0, t, noise)
    terms = diffusion.loss_terms(network(noisy, t), x0, noisy, t, noise)       # {"mse": [B], "vb": [B]}
    shorter = diffusion.respaced(250)                                          # for sampling

Tables are computed in float64 and cast to float32 when gathered. Legend: x0 data, x_t noisy, ε noise, ᾱ the product of
1 - β, v the network's variance values; t int64 ``[B]`` counts the steps of *this* object, from 0.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from unmask.systems.generation import schedules

Tables = dict[str, Tensor]


@dataclass(frozen=True)
class Posterior:
    """The distribution of x_(t-1) that the network believes in: ``mean``, ``log_variance``, its guess of the data ``x0`` and
    the noise ``epsilon``; all in x_t's shape."""

    mean: Tensor
    log_variance: Tensor
    x0: Tensor
    epsilon: Tensor


class GaussianDiffusion:
    """betas: float64 ``[T]``. timesteps: what the network is told at each of them (default 0 … T - 1). variance: where the
    network learns none, β itself ("large", β̃₁ in the first place) or the posterior's β̃ ("small")."""

    def __init__(self, betas: np.ndarray, timesteps: list[int] | None = None, variance: str = "large"):
        self.betas = np.asarray(betas, dtype=np.float64)
        self.timesteps = list(range(len(self.betas))) if timesteps is None else list(timesteps)
        self.variance = variance
        alphas = 1 - self.betas
        self.alpha_bar = np.cumprod(alphas)
        before = np.append(1.0, self.alpha_bar[:-1])
        bar, beta = self.alpha_bar, self.betas
        posterior = beta * (1 - before) / (1 - bar)
        # the first posterior variance is 0: its logarithm takes the second's place (or β where there is no second)
        clipped = np.append(posterior[1] if len(beta) > 1 else beta[0], posterior[1:])
        self._tables: dict[str, np.ndarray] = {
            "sqrt_bar": np.sqrt(bar),
            "sqrt_one_minus_bar": np.sqrt(1 - bar),
            "sqrt_recip_bar": np.sqrt(1 / bar),
            "sqrt_recip_bar_minus_one": np.sqrt(1 / bar - 1),
            "bar": bar,
            "bar_before": before,
            "log_beta": np.log(beta),
            "log_posterior": np.log(clipped),
            "log_large": np.log(np.append(clipped[0], beta[1:])),
            "mean_x0": beta * np.sqrt(before) / (1 - bar),
            "mean_x_t": (1 - before) * np.sqrt(alphas) / (1 - bar),
        }
        self._placed: dict[tuple[str, torch.device], Tensor] = {}

    @classmethod
    def of(cls, schedule: str = "linear", steps: int = 1000, variance: str = "large") -> GaussianDiffusion:
        """By the name of a noise schedule. Raises ``UserError`` for a name nobody knows."""
        return cls(schedules.betas(schedule, steps), variance=variance)

    def respaced(self, steps: int) -> GaussianDiffusion:
        """The same process in fewer steps: β = 1 - ᾱ_i / ᾱ_(i-1) of the steps kept; the network still gets original times.

        Raises ``UserError`` for fewer than one step, or more than there are.
        """
        kept = schedules.respaced_timesteps(steps, len(self))
        bar = self.alpha_bar[kept]
        return GaussianDiffusion(1 - bar / np.append(1.0, bar[:-1]), [self.timesteps[i] for i in kept], self.variance)

    def __len__(self) -> int:
        return len(self.betas)

    def table(self, name: str, t: Tensor, like: Tensor) -> Tensor:
        """float32 entries at ``t [B]``, shaped to broadcast over ``like [B, ...]``."""
        key = (name, t.device)
        if key not in self._placed:
            self._placed[key] = torch.from_numpy(self._tables[name]).float().to(t.device)
        return self._placed[key][t].reshape(-1, *[1] * (like.ndim - 1))

    def original(self, t: Tensor) -> Tensor:
        """The times that the network was trained with, int64 ``[B]``."""
        key = ("timesteps", t.device)
        if key not in self._placed:
            self._placed[key] = torch.tensor(self.timesteps, device=t.device)
        return self._placed[key][t]

    # --- the process ---
    def noisy(self, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """x_t = √ᾱ·x0 + √(1 - ᾱ)·ε (often called q_sample)."""
        return self.table("sqrt_bar", t, x0) * x0 + self.table("sqrt_one_minus_bar", t, x0) * noise

    def x0_from_noise(self, x_t: Tensor, t: Tensor, epsilon: Tensor) -> Tensor:
        """x̂0 = x_t / √ᾱ - √(1 / ᾱ - 1)·ε."""
        return self.table("sqrt_recip_bar", t, x_t) * x_t - self.table("sqrt_recip_bar_minus_one", t, x_t) * epsilon

    def posterior_mean(self, x0: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """The mean of x_(t-1) given both ends."""
        return self.table("mean_x0", t, x_t) * x0 + self.table("mean_x_t", t, x_t) * x_t

    def learned_log_variance(self, values: Tensor, t: Tensor) -> Tensor:
        """f·log β + (1 - f)·log β̃ with f = (v + 1) / 2, between the two bounds of the variance."""
        share = (values + 1) / 2
        return share * self.table("log_beta", t, values) + (1 - share) * self.table("log_posterior", t, values)

    def split(self, output: Tensor, x_t: Tensor, axis: int = 1) -> tuple[Tensor, Tensor | None]:
        """A network's output as noise and, where it has twice x_t's channels, variance values."""
        if output.shape[axis] == 2 * x_t.shape[axis]:
            epsilon, values = output.chunk(2, dim=axis)
            return epsilon, values
        return output, None

    def posterior(self, output: Tensor, x_t: Tensor, t: Tensor, *, axis: int = 1) -> Posterior:
        """What the network's output says of x_(t-1). x̂0 is not clipped."""
        epsilon, values = self.split(output, x_t, axis)
        if values is not None:
            log_variance = self.learned_log_variance(values, t)
        else:
            name = "log_large" if self.variance == "large" else "log_posterior"
            log_variance = self.table(name, t, x_t).expand_as(x_t)
        x0 = self.x0_from_noise(x_t, t, epsilon)
        return Posterior(self.posterior_mean(x0, x_t, t), log_variance, x0, epsilon)

    # --- the loss ---
    def bound(self, x0: Tensor, x_t: Tensor, t: Tensor, believed: Posterior) -> Tensor:
        """The variational term in bits, for every value (x0's shape): KL of the true posterior to the believed one, and at
        t = 0 the negative log-likelihood of x0 under a Gaussian cut into the 256 levels of a picture."""
        mean = self.posterior_mean(x0, x_t, t)
        log_variance = self.table("log_posterior", t, x_t)
        divergence = normal_kl(mean, log_variance, believed.mean, believed.log_variance)
        likelihood = -discretised_log_likelihood(x0, believed.mean, 0.5 * believed.log_variance)
        first = (t == 0).reshape(-1, *[1] * (x_t.ndim - 1))
        return torch.where(first, likelihood, divergence) / math.log(2)

    def loss_values(
        self, output: Tensor, x0: Tensor, x_t: Tensor, t: Tensor, noise: Tensor, *, axis: int = 1
    ) -> dict[str, Tensor]:
        """The terms for every value, in x0's shape, for systems that average over a part: "mse" and, where the variance is
        learned, "vb" with the mean held fixed (times T / 1000: RESCALED_MSE)."""
        epsilon, values = self.split(output, x_t, axis)
        found = {"mse": (noise - epsilon) ** 2}
        if values is not None:
            held = torch.cat((epsilon.detach(), values), dim=axis)
            bound = self.bound(x0, x_t, t, self.posterior(held, x_t, t, axis=axis))
            found["vb"] = bound * (len(self) / 1000)
        return found

    def loss_terms(
        self, output: Tensor, x0: Tensor, x_t: Tensor, t: Tensor, noise: Tensor, *, axis: int = 1
    ) -> dict[str, Tensor]:
        """ "mse" and "vb" of each sample, ``[B]``; the hybrid loss is the mean of their sum."""
        found = self.loss_values(output, x0, x_t, t, noise, axis=axis)
        return {name: term.flatten(1).mean(dim=1) for name, term in found.items()}


def normal_kl(mean: Tensor, log_variance: Tensor, other_mean: Tensor, other_log_variance: Tensor) -> Tensor:
    """KL(N(mean, exp log_variance) ‖ N(other…)) in nats, value by value."""
    return 0.5 * (
        -1
        + other_log_variance
        - log_variance
        + torch.exp(log_variance - other_log_variance)
        + (mean - other_mean) ** 2 * torch.exp(-other_log_variance)
    )


def discretised_log_likelihood(x: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
    """log probability of the 1/255-wide cell around each value of x in [-1, 1]; the first and last cell reach to infinity.

    Φ is its tanh approximation, and every probability is at least 1e-12.
    """
    centred, inverse = x - mean, torch.exp(-log_std)
    upper = _normal_cdf((centred + 1 / 255) * inverse)
    lower = _normal_cdf((centred - 1 / 255) * inverse)
    inside = (upper - lower).clamp(min=1e-12).log()
    above = (1 - lower).clamp(min=1e-12).log()
    return torch.where(x < -0.999, upper.clamp(min=1e-12).log(), torch.where(x > 0.999, above, inside))


def _normal_cdf(x: Tensor) -> Tensor:
    return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
