"""The paired test against scipy's, the interval against its p, the verdict against its rule."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from unmask.claims.statistics import paired
from unmask.claims.verdict import comparisons, rule, verdict
from unmask.errors import UserError

scores = st.lists(
    st.tuples(st.floats(0, 100, allow_nan=False), st.floats(0, 100, allow_nan=False)), min_size=2, max_size=8
)


@settings(max_examples=60, deadline=None)
@given(scores, st.booleans())
def test_t_and_p_are_those_of_scipys_related_samples_test(pairs: list[tuple[float, float]], higher: bool) -> None:
    method, baseline = [list(v) for v in zip(*pairs, strict=True)]
    ours = paired(method, baseline, higher=higher)
    spread = max(ours.differences) - min(ours.differences)
    if spread < 1e-6 * (1 + abs(ours.mean)):
        return  # no spread: scipy divides by zero
    theirs = stats.ttest_rel(method, baseline, alternative="greater" if higher else "less")
    assert ours.t == pytest.approx(theirs.statistic if higher else -theirs.statistic, rel=1e-6, abs=1e-9)
    assert ours.p == pytest.approx(theirs.pvalue, rel=1e-6, abs=1e-12)
    interval = stats.ttest_rel(method, baseline).confidence_interval(0.90)
    low, high = (interval.low, interval.high) if higher else (-interval.high, -interval.low)
    assert (ours.low, ours.high) == (pytest.approx(low, rel=1e-6, abs=1e-9), pytest.approx(high, rel=1e-6, abs=1e-9))


@settings(max_examples=60, deadline=None)
@given(scores)
def test_the_interval_lies_above_zero_exactly_when_p_is_below_five_percent(pairs: list[tuple[float, float]]) -> None:
    found = paired(*[list(v) for v in zip(*pairs, strict=True)])
    if abs(found.p - 0.05) > 1e-9:
        assert (found.low > 0) == (found.p < 0.05)


def test_without_spread_the_sign_decides() -> None:
    assert paired([2, 3, 4], [1, 2, 3]).p == 0
    assert paired([1, 2, 3], [2, 3, 4]).p == 1
    assert paired([1, 2, 3], [1, 2, 3]).p == 1
    assert paired([2, 3, 4], [1, 2, 3]).plain()["t"] is None, "JSON has no infinity"


@pytest.mark.parametrize(
    ("method", "baseline", "said"),
    [([1.0], [0.0], "two seeds or more"), ([1.0, 2.0], [1.0], "2 and 1"), ([1.0, math.nan], [0.0, 0.0], "NaN")],
)
def test_what_cannot_be_tested_is_refused(method: list[float], baseline: list[float], said: str) -> None:
    with pytest.raises(UserError, match=said):
        paired(method, baseline)


def test_a_claim_is_shown_only_when_every_baseline_is_beaten() -> None:
    clear, unclear = [50.0, 51.0, 52.0], [54.9, 56.5, 56.0]
    method = [55.1, 56.0, 57.1]

    def decided(**arms: list[float]) -> str:
        numbers = {"ridge": {"ours": method, **arms}, "knn": {"ours": clear, **arms}}
        return verdict(comparisons(numbers, "ours", list(arms), "ridge", {"ridge": True, "knn": True}))

    assert decided(white=clear) == "shown"
    assert decided(white=unclear) == "not shown"
    assert decided(white=clear, random=unclear) == "not shown"


def test_other_arms_and_other_metrics_are_reported_and_decide_nothing() -> None:
    numbers = {
        "loss": {"ours": [1.0, 1.1, 1.2], "white": [2.0, 2.2, 2.1], "blue": [0.5, 0.6, 0.4]},
        "ridge": {"ours": [1.0, 1.1, 1.2], "white": [2.0, 2.2, 2.1]},
    }
    compared = comparisons(numbers, "ours", ["white"], "loss", {"loss": False, "ridge": True})
    assert [(c.metric, c.other, c.primary) for c in compared] == [
        ("loss", "white", True),
        ("loss", "blue", False),
        ("ridge", "white", False),
    ]
    assert verdict(compared) == "shown"
    assert compared[0].sentence().startswith("ours against white, loss: +1.00 [+")


def test_a_margin_tests_that_the_method_is_not_worse_by_so_much() -> None:
    method, baseline = [70.0, 71.5, 69.0, 70.5], [70.4, 71.4, 69.7, 70.6]
    gaps = [a - b for a, b in zip(method, baseline, strict=True)]
    found = paired(method, baseline, margin=2.0)
    assert found.p == pytest.approx(stats.ttest_1samp(gaps, -2.0, alternative="greater").pvalue)
    assert (found.low, found.high) == (paired(method, baseline).low, paired(method, baseline).high)
    assert (found.low > -2.0) == (found.p < 0.05)
    numbers = {"miou": {"ours": method, "theirs": baseline}}
    assert verdict(comparisons(numbers, "ours", ["theirs"], "miou", {"miou": True}, 2.0)) == "shown"
    assert verdict(comparisons(numbers, "ours", ["theirs"], "miou", {"miou": True})) == "not shown"
    assert "less than 2 worse" in rule(2.0)
