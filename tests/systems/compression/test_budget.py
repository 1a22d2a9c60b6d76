"""Budgets, and the search under them."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from unmask.errors import UserError
from unmask.systems.compression.budget import absolute, parse_budget, unreachable
from unmask.systems.compression.search import mac_units, search, search_uniform, spent


@pytest.mark.parametrize(
    ("text", "kind", "amount", "relative"),
    [
        ("macs=0.6", "macs", 0.6, True),
        ("macs=60%", "macs", 0.6, True),
        ("parameters=5M", "parameters", 5e6, False),
        ("ms=12", "milliseconds", 12, False),
        ("ms=0.5", "milliseconds", 0.5, False),
        ("milliseconds=0.5x", "milliseconds", 0.5, True),
        ("bytes=4k", "bytes", 4000, False),
    ],
)
def test_budgets_are_read_as_people_mean_them(text: str, kind: str, amount: float, relative: bool) -> None:
    found = parse_budget(text)
    assert (found.kind, found.amount, found.relative) == (kind, pytest.approx(amount), relative)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("macs", "write macs=0.6"),
        ("mac=0.6", "did you mean macs"),
        ("macs=much", "no amount"),
        ("macs=0", "share lies"),
        ("macs=150%", "share lies"),
    ],
)
def test_what_is_no_budget_is_told_in_one_line(text: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        parse_budget(text)


def test_a_budget_that_cannot_be_reached_names_the_smallest_that_can() -> None:
    error = unreachable(parse_budget("macs=0.1"), 10, 23.45, 100, "the rest is not cut")
    assert "macs=0.235" in str(error)
    with pytest.raises(UserError, match="already"):
        absolute(parse_budget("parameters=5M"), 1e6)


def plain_search(heads, neurons, capacity, costs):
    """The loops of step 10, as they are written there."""
    h, n = heads.flatten(), neurons.flatten()
    h_order, n_order = h.argsort(stable=True), n.argsort(stable=True)
    best = None
    for count in range(1, len(h) + 1):
        left = capacity - count * costs.head
        if left < 0:
            break
        total, taken = float(h[h_order[:count]].abs().sum()), 0
        while taken < len(n) and left >= costs.neuron:
            total, left, taken = total + float(n[n_order[taken]].abs()), left - costs.neuron, taken + 1
        if best is None or total > best[0] + 1e-12:
            best = (total, count, taken)
    return best


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), share=st.floats(0.15, 1.0))
def test_prefix_sums_find_what_the_loops_find(seed: int, share: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    heads = -torch.rand(3, 4, generator=generator, dtype=torch.float64)
    neurons = -torch.rand(3, 10, generator=generator, dtype=torch.float64) / 3
    costs = mac_units(7.5, 16, 4, 3, 4, 10)
    mask_h, mask_n = search(heads, neurons, share * costs.base, costs)
    total = float(heads[mask_h].abs().sum() + neurons[mask_n].abs().sum())
    expected = plain_search(heads, neurons, share * costs.base * (1 + 1e-9), costs)
    assert expected is not None
    assert total == pytest.approx(expected[0])
    assert spent(mask_h, mask_n, costs) <= share * costs.base * (1 + 1e-6)


def test_everything_stays_under_the_whole_budget() -> None:
    costs = mac_units(39.05, 32, 8, 4, 4, 24)
    masks = search(-torch.rand(4, 4), -torch.rand(4, 24), costs.base, costs)
    assert all(bool(m.all()) for m in masks)


def test_a_uniform_search_keeps_the_same_number_in_every_layer() -> None:
    costs = mac_units(10, 16, 4, 3, 4, 12)
    mask_h, mask_n = search_uniform(-torch.rand(3, 4), -torch.rand(3, 12), 0.6 * costs.base, costs)
    assert len(set(mask_h.sum(1).tolist())) == len(set(mask_n.sum(1).tolist())) == 1


def test_a_capacity_below_one_head_is_told() -> None:
    costs = mac_units(10, 16, 4, 3, 4, 12)
    with pytest.raises(UserError, match="does not pay for one head"):
        search(-torch.rand(3, 4), -torch.rand(3, 12), costs.head / 2, costs)
