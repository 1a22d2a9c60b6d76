import math
import re
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from unmask.reports.charts import Level, Line, line_chart, smoothed, thinned, tick_texts, ticks, value_range
from unmask.reports.wording import date, duration, metric_margin, metric_value, number, short_count, value_text

finite = st.floats(-1e6, 1e6, allow_nan=False).filter(lambda v: v == 0 or abs(v) > 1e-6)


@given(finite, st.floats(1e-3, 1e5))
def test_ticks_lie_within_the_axis_and_are_evenly_spaced(low, span):
    values = ticks(low, low + span)
    slack = 1e-6 * max(span, abs(low))
    assert all(low - slack <= v <= low + span + slack for v in values)
    assert 1 <= len(values) <= 12
    gaps = [b - a for a, b in pairwise(values)]
    assert all(math.isclose(g, gaps[0], rel_tol=1e-3, abs_tol=slack) for g in gaps)


def test_ticks_of_one_axis_have_the_same_decimals():
    assert tick_texts([0.4, 0.6, 0.8, 1.0]) == ["0.4", "0.6", "0.8", "1.0"]
    assert tick_texts([0.7, 0.725, 0.75], share=True) == ["70.0\u202f%", "72.5\u202f%", "75.0\u202f%"]


@given(st.lists(finite, min_size=1, max_size=2000))
def test_thinning_keeps_the_extremes_and_the_ends(values):
    points = list(enumerate(values))
    kept = thinned(points, 100)
    assert len(kept) <= 110
    assert {min(values), max(values)} <= {v for _, v in kept}
    assert (kept[0], kept[-1]) == (points[0], points[-1])


def test_smoothing_keeps_a_constant_and_the_number_of_points():
    points = [(i, 3.0) for i in range(500)]
    assert [p[0] for p in smoothed(points)] == [p[0] for p in points]
    assert all(math.isclose(v, 3.0) for _, v in smoothed(points))


def test_a_few_high_first_values_do_not_flatten_the_curve():
    curve = [(0, 900.0), *((i, 0.5) for i in range(1, 100))]
    _, high = value_range([Line("loss", curve)], [Level("mean", 1.0)])
    assert 1.0 < high < 2.0


def test_names_in_a_chart_are_escaped():
    svg = str(
        line_chart([Line("<b>", [(0, 1), (1, 2)])], [Level("a & b", 1.5)], name="x", title='"quoted" <i>', labels=True)
    )
    assert "<b>" not in svg
    assert "a &amp; b" in svg
    assert "<i>" not in svg


def test_a_chart_of_one_point_or_none_is_drawn():
    assert "<circle" in line_chart([Line("loss", [(5, 0.3)])], name="one", title="one")
    assert "<svg" in line_chart([], name="none", title="none")


def test_numbers_read_as_a_person_writes_them():
    thin = "\u202f"
    assert number(0.5234) == "0.523"
    assert number(12345) == f"12{thin}345"
    assert number(1234.5) == f"1{thin}234"
    assert number(0.00015) == f"1.5{thin}×{thin}10⁻⁴"
    assert short_count(1_234_567) == f"1.23{thin}M"
    assert duration(151.3) == f"2{thin}min 31{thin}s"
    assert duration(3725) == f"1{thin}h 02{thin}min"
    assert metric_value("top1", 0.7834) == f"78.3{thin}%"
    assert metric_margin("knn_top1", -0.021) == "−2.1 points"
    assert metric_margin("rankme", 3.25) == "+3.25"
    assert metric_value("top1", math.nan) == "not a number"
    assert date("2025-11-25T01:06:59+00:00") == "25 November 2025, 01:06"
    assert value_text([0.9, 0.95]) == "0.9, 0.95"
    assert value_text(None) == "none"


def test_a_charts_name_cannot_leave_its_attribute():
    svg = str(line_chart([Line("loss", [(0, 1), (1, 2)])], name='m"><script>alert(1)</script>', title="t"))
    assert "<script" not in svg
    assert svg.count(re.search(r'clipPath id="([\w-]+)"', svg)[1]) == 2
