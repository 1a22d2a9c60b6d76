"""Named randomness: everything random in a step is asked of a ``Draw`` by name.

The same name in the same step gives the same numbers, so a step can be replayed, a paper's own draws can be fed in,
and a run resumes exactly. Three sources:

- :class:`Seeded` computes the numbers from (seed, step, name, sample) with the counter-based generator Philox4x32-10
  (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011). Sample ``i`` of a global batch gets the same
  numbers whether one process holds the batch or eight share it, on any device, and nothing is drawn for other samples.
- :class:`Replay` hands out given tensors.
- :class:`Recorder` passes requests on and keeps what was drawn.

``shape[0]`` is the number of samples, unless ``shared=True``: then the draw belongs to the step, not to a sample, and is
the same on every process.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

_LOW = 0xFFFFFFFF
_SHARED = 0xFFFFFFFF  # the sample id of draws that belong to the whole step


@runtime_checkable
class Draw(Protocol):
    """Named randomness. The same name in the same step gives the same tensor."""

    def uniform(
        self, name: str, shape: Sequence[int], *, device: torch.device | str = "cpu", shared: bool = False
    ) -> Tensor:
        """float32 in [0, 1)."""
        ...

    def normal(
        self, name: str, shape: Sequence[int], *, device: torch.device | str = "cpu", shared: bool = False
    ) -> Tensor:
        """float32, mean 0, variance 1."""
        ...

    def integers(
        self,
        name: str,
        low: int,
        high: int,
        shape: Sequence[int],
        *,
        device: torch.device | str = "cpu",
        shared: bool = False,
    ) -> Tensor:
        """int64 in [low, high)."""
        ...


class Seeded:
    """Numbers computed from (seed, step, name, sample).

    seed: any Python integer. step: the optimiser step, so that accumulation's micro-batches count as one batch.
    first_sample: index of this process's first sample in the global batch.
    """

    def __init__(self, seed: int, step: int = 0, first_sample: int = 0):
        self.seed, self.step, self.first_sample = int(seed), int(step), int(first_sample)

    def uniform(
        self, name: str, shape: Sequence[int], *, device: torch.device | str = "cpu", shared: bool = False
    ) -> Tensor:
        return (self._words(name, shape, device, shared) >> 8).to(torch.float32) * 2.0**-24

    def normal(
        self, name: str, shape: Sequence[int], *, device: torch.device | str = "cpu", shared: bool = False
    ) -> Tensor:
        # Box-Muller on pairs of words; the first of a pair lies in (0, 1], so that its logarithm is finite.
        *lead, last = (tuple(shape) or (1,)) if shared or len(shape) > 1 else (*shape, 1)
        pairs = self._words(name, (*lead, (last + 1) // 2, 2), device, shared)
        first = ((pairs[..., 0] >> 8) + 1).to(torch.float32) * 2.0**-24
        angle = (pairs[..., 1] >> 8).to(torch.float32) * (2.0**-24 * 2 * math.pi)
        radius = (-2 * first.log()).sqrt()
        both = torch.stack((radius * angle.cos(), radius * angle.sin()), dim=-1).flatten(-2)
        return both[..., :last].reshape(tuple(shape))

    def integers(
        self,
        name: str,
        low: int,
        high: int,
        shape: Sequence[int],
        *,
        device: torch.device | str = "cpu",
        shared: bool = False,
    ) -> Tensor:
        span = high - low
        if not 0 < span < 2**31:
            raise ValueError(f"integers({name!r}): high - low must lie in 1 ... 2^31 - 1, got {span}")
        return low + ((self._words(name, shape, device, shared) * span) >> 32)

    def _words(self, name: str, shape: Sequence[int], device: torch.device | str, shared: bool) -> Tensor:
        """int64 tensor of 32-bit words: counter (block, sample, step low, step high), key from (seed, name)."""
        shape = tuple(int(s) for s in shape)
        digest = hashlib.blake2b(f"{self.seed}\0{name}".encode(), digest_size=8).digest()
        key = (int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:], "little"))
        rows = 1 if shared or not shape else shape[0]
        each = math.prod(shape) if shared or not shape else math.prod(shape[1:])
        blocks = max((each + 3) // 4, 1)
        if shared or not shape:
            sample = torch.full((1, 1), _SHARED, dtype=torch.int64, device=device)
        else:
            sample = torch.arange(self.first_sample, self.first_sample + rows, device=device)[:, None]
        block = torch.arange(blocks, device=device)[None]
        step = (self.step & _LOW, (self.step >> 32) & _LOW)
        out = philox(block, sample, step, key)
        return out.flatten(1)[:, :each].reshape(shape)


def philox(block: Tensor, sample: Tensor, step: tuple[int, int], key: tuple[int, int]) -> Tensor:
    """Philox4x32-10. ``block [1, n]``, ``sample [B, 1]`` (int64 holding 32-bit words) -> ``[B, n, 4]`` int64 words."""
    shape = torch.broadcast_shapes(block.shape, sample.shape)
    c0, c1 = block.expand(shape), sample.expand(shape)
    c2, c3 = torch.full_like(c0, step[0]), torch.full_like(c0, step[1])
    k0, k1 = key
    for _ in range(10):
        # 64-bit products wrap in int64, but their bits are right: shift and mask recover both halves
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (p1 >> 32) & _LOW ^ c1 ^ k0, p1 & _LOW, (p0 >> 32) & _LOW ^ c3 ^ k1, p0 & _LOW
        k0, k1 = (k0 + 0x9E3779B9) & _LOW, (k1 + 0xBB67AE85) & _LOW
    return torch.stack((c0, c1, c2, c3), dim=-1)


class Replay:
    """Hands out given tensors by name; what was drawn once (a fixture, a failed step) is drawn again."""

    def __init__(self, tensors: Mapping[str, Tensor]):
        self.tensors = dict(tensors)

    def _take(self, name: str, shape: Sequence[int], device: torch.device | str) -> Tensor:
        if name not in self.tensors:
            raise KeyError(f"nothing was recorded for the draw {name!r}; recorded: {sorted(self.tensors)}")
        value = self.tensors[name]
        if tuple(value.shape) != tuple(shape):
            raise ValueError(f"draw {name!r}: recorded with shape {tuple(value.shape)}, asked for {tuple(shape)}")
        return value.to(device)

    def uniform(
        self, name: str, shape: Sequence[int], *, device: torch.device | str = "cpu", shared: bool = False
    ) -> Tensor:
        return self._take(name, shape, device).to(torch.float32)

    def normal(
        self, name: str, shape: Sequence[int], *, device: torch.device | str = "cpu", shared: bool = False
    ) -> Tensor:
        return self._take(name, shape, device).to(torch.float32)

    def integers(
        self,
        name: str,
        low: int,
        high: int,
        shape: Sequence[int],
        *,
        device: torch.device | str = "cpu",
        shared: bool = False,
    ) -> Tensor:
        value = self._take(name, shape, device).to(torch.int64)
        if value.numel() and (int(value.min()) < low or int(value.max()) >= high):
            raise ValueError(f"draw {name!r}: recorded values leave [{low}, {high})")
        return value


class Recorder:
    """Passes requests to another source and keeps every tensor under its name (in ``recorded``)."""

    def __init__(self, source: Draw):
        self.source = source
        self.recorded: dict[str, Tensor] = {}

    def uniform(
        self, name: str, shape: Sequence[int], *, device: torch.device | str = "cpu", shared: bool = False
    ) -> Tensor:
        return self.recorded.setdefault(name, self.source.uniform(name, shape, device=device, shared=shared))

    def normal(
        self, name: str, shape: Sequence[int], *, device: torch.device | str = "cpu", shared: bool = False
    ) -> Tensor:
        return self.recorded.setdefault(name, self.source.normal(name, shape, device=device, shared=shared))

    def integers(
        self,
        name: str,
        low: int,
        high: int,
        shape: Sequence[int],
        *,
        device: torch.device | str = "cpu",
        shared: bool = False,
    ) -> Tensor:
        return self.recorded.setdefault(
            name, self.source.integers(name, low, high, shape, device=device, shared=shared)
        )


class Scoped:
    """A source whose names all get a prefix: ``Scoped(draw, "teacher")`` asks for ``teacher.mask``."""

    def __init__(self, source: Draw, prefix: str):
        self.source, self.prefix = source, prefix

    def uniform(
        self, name: str, shape: Sequence[int], *, device: torch.device | str = "cpu", shared: bool = False
    ) -> Tensor:
        return self.source.uniform(f"{self.prefix}.{name}", shape, device=device, shared=shared)

    def normal(
        self, name: str, shape: Sequence[int], *, device: torch.device | str = "cpu", shared: bool = False
    ) -> Tensor:
        return self.source.normal(f"{self.prefix}.{name}", shape, device=device, shared=shared)

    def integers(
        self,
        name: str,
        low: int,
        high: int,
        shape: Sequence[int],
        *,
        device: torch.device | str = "cpu",
        shared: bool = False,
    ) -> Tensor:
        return self.source.integers(f"{self.prefix}.{name}", low, high, shape, device=device, shared=shared)


# --- functions of a draw: distributions that several systems need -----------------------------------------------


def bernoulli(
    draw: Draw, name: str, probability: float | Tensor, shape: Sequence[int], *, device: torch.device | str = "cpu"
) -> Tensor:
    """bool, True with the given probability."""
    return draw.uniform(name, shape, device=device) < probability


def gumbel(
    draw: Draw, name: str, shape: Sequence[int], *, device: torch.device | str = "cpu", shared: bool = False
) -> Tensor:
    """Standard Gumbel noise, -log(-log u), always finite: u is kept away from 0 and 1 by half a step of the 24-bit grid (in
    float64, where that half step still counts). A ``Replay`` may hold the noise itself, under ``<name>.gumbel``."""
    if isinstance(draw, Replay) and f"{name}.gumbel" in draw.tensors:
        return draw.normal(f"{name}.gumbel", shape, device=device)
    uniform = draw.uniform(name, shape, device=device, shared=shared).double() + 2.0**-25
    return -(-uniform.log()).log().float()


def permutation(draw: Draw, name: str, shape: Sequence[int], *, device: torch.device | str = "cpu") -> Tensor:
    """int64; every row ``[..., n]`` is a random order of ``0 ... n - 1``."""
    return draw.uniform(name, shape, device=device).argsort(dim=-1, stable=True)


def truncated_normal(
    draw: Draw,
    name: str,
    shape: Sequence[int],
    *,
    low: float = -2.0,
    high: float = 2.0,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Standard normal conditioned on [low, high], by inversion of the distribution function."""
    ends = torch.tensor([low, high], dtype=torch.float64)
    below, above = (0.5 * (1 + torch.erf(ends / math.sqrt(2)))).tolist()
    uniform = draw.uniform(name, shape, device=device).double() + 2.0**-25
    value = torch.erfinv(2 * (below + uniform * (above - below)) - 1) * math.sqrt(2)
    return value.clamp(low, high).to(torch.float32)
