"""Paired differences over seeds: is the method better than its baseline, and by how much?"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from unmask.errors import UserError

LEVEL = 0.90  # of the two-sided interval: its lower end lies above zero exactly when the one-sided p is below 0.05


@dataclass(frozen=True)
class Paired:
    """The one-sided paired t-test of "the method is better". Differences are positive where it is."""

    differences: tuple[float, ...]  # one a seed
    mean: float
    std: float  # of the differences, n - 1 in the denominator
    t: float
    p: float  # one-sided: of a difference at least this large where there is none
    low: float  # the two-sided interval of the mean difference
    high: float
    level: float
    wins: int  # seeds in which the method is better
    margin: float = 0.0  # the test is of "not worse by so much or more": non-inferiority where it is above 0

    def plain(self) -> dict[str, Any]:
        """JSON-able: an infinite t (no spread between the seeds) becomes null."""
        values = asdict(self) | {"differences": list(self.differences)}
        return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}


def paired(
    method: Sequence[float],
    baseline: Sequence[float],
    *,
    higher: bool = True,
    level: float = LEVEL,
    margin: float = 0.0,
) -> Paired:
    """Compare two arms, value i of both from the same seed (same initialisation, data order and draws).

    higher: whether a higher value is better. margin: what the mean is tested against is -margin instead of 0. Student's t on
    the n differences, n - 1 degrees of freedom; with no spread at all the sign decides (p 0 or 1). Raises ``UserError`` for
    fewer than two seeds or unequal counts.
    """
    from scipy import stats

    if len(method) != len(baseline):
        raise UserError(f"a paired test needs one value a seed of both arms, got {len(method)} and {len(baseline)}")
    count = len(method)
    if count < 2:
        raise UserError(f"a paired test needs two seeds or more, got {count}")
    gaps = [(a - b) if higher else (b - a) for a, b in zip(method, baseline, strict=True)]
    if not all(math.isfinite(g) for g in gaps):
        raise UserError("a paired test needs finite values: an arm measured NaN or infinity")
    mean = math.fsum(gaps) / count
    std = math.sqrt(math.fsum((g - mean) ** 2 for g in gaps) / (count - 1))
    error = std / math.sqrt(count)
    wins = sum(g > 0 for g in gaps)
    if error <= 1e-12 * max(abs(mean), 1e-300):
        above = mean + margin
        t = math.copysign(math.inf, above) if above else 0.0
        return Paired(tuple(gaps), mean, std, t, 0.0 if above > 0 else 1.0, mean, mean, level, wins, margin)
    t = (mean + margin) / error
    reach = float(stats.t.ppf(0.5 + level / 2, count - 1)) * error
    p = float(stats.t.sf(t, count - 1))
    return Paired(tuple(gaps), mean, std, t, p, mean - reach, mean + reach, level, wins, margin)
