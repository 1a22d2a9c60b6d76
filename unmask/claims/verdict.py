"""From numbers to a word: "shown" or "not shown", by a rule that is fixed before the numbers are seen.

A claim names a method, its baselines and one primary metric. The claim is **shown** when the method is better than
*every* baseline with p < 0.05 in a one-sided paired t-test over seeds; otherwise it is **not shown**. All comparisons
must succeed, so no correction for their number is needed (an intersection-union test). A claim with a **margin** is one of
non-inferiority: the same test of the difference plus the margin. Other arms and other metrics
are reported beside it and decide nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from unmask.claims.statistics import Paired, paired

THRESHOLD = 0.05
RULE = f"shown when the method beats every baseline with p < {THRESHOLD} (one-sided paired t-test over seeds)"


def rule(margin: float = 0.0) -> str:
    """How the verdict is found, in words."""
    if not margin:
        return RULE
    return (
        f"shown when the method is less than {margin:g} worse than every baseline with p < {THRESHOLD} "
        "(one-sided paired t-test over seeds)"
    )


Numbers = Mapping[str, Mapping[str, Sequence[float]]]  # metric -> arm -> one value a seed


@dataclass(frozen=True)
class Comparison:
    """The method against one other arm on one metric."""

    method: str
    other: str
    metric: str
    primary: bool
    test: Paired

    def plain(self) -> dict[str, Any]:
        facts = {"method": self.method, "baseline": self.other, "metric": self.metric, "primary": self.primary}
        return facts | self.test.plain()

    def sentence(self) -> str:
        """One line for a person; numbers in the metric's own unit."""
        t = self.test
        tested = f" (of more than {-t.margin:g})" if t.margin else ""
        return (
            f"{self.method} against {self.other}, {self.metric}: {t.mean:+.2f} "
            f"[{t.low:+.2f}, {t.high:+.2f}], p{tested} = {t.p:.3g}, better in {t.wins} of {len(t.differences)} seeds"
        )


def comparisons(
    numbers: Numbers,
    method: str,
    baselines: Sequence[str],
    primary: str,
    directions: Mapping[str, bool],
    margin: float = 0.0,
) -> list[Comparison]:
    """The method against every other arm on every metric that both have; the primary ones first.

    directions: metric -> whether higher is better. margin: how much worse the method may be on the primary metric.
    """
    found = []
    for metric, arms in numbers.items():
        for other, values in arms.items():
            if other == method or method not in arms:
                continue
            decisive = metric == primary and other in baselines
            test = paired(arms[method], values, higher=directions[metric], margin=margin if decisive else 0.0)
            found.append(Comparison(method, other, metric, decisive, test))
    return sorted(found, key=lambda c: not c.primary)


def verdict(compared: Sequence[Comparison]) -> str:
    """ "shown" or "not shown", by ``RULE``."""
    decisive = [c for c in compared if c.primary]
    return "shown" if decisive and all(c.test.p < THRESHOLD for c in decisive) else "not shown"
