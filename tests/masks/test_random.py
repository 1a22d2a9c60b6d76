"""Uniform masks and the Mask itself: counts, ids, and their inverses."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from unmask.draw import Seeded
from unmask.errors import UserError
from unmask.masks.mask import Mask
from unmask.masks.random import mask_from_scores, random_mask, visible_count


@settings(max_examples=100, deadline=None)
@given(st.integers(2, 300), st.floats(0.01, 0.99), st.integers(0, 2**31))
def test_every_sample_hides_what_maes_rounding_says(tokens, ratio, seed):
    visible = int(tokens * (1 - ratio))
    noise = Seeded(seed).uniform("noise", (4, tokens))
    if not 0 < visible < tokens:
        with pytest.raises(UserError, match="leaves no"):
            random_mask(noise, ratio, (tokens,))
        return
    mask = random_mask(noise, ratio, (tokens,))
    assert (~mask.hidden).sum(dim=1).tolist() == [visible] * 4
    largest_visible = noise.masked_fill(mask.hidden, -1).amax(dim=1)
    assert (largest_visible <= noise.masked_fill(~mask.hidden, 2).amin(dim=1)).all()


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 60), st.integers(1, 6), st.data())
def test_of_equal_scores_the_lower_index_stays_visible(tokens, values, data):
    hidden = data.draw(st.integers(1, tokens - 1))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    scores = torch.randint(-values, values, (3, tokens), generator=generator).float()
    expected = torch.ones_like(scores, dtype=torch.bool)
    expected.scatter_(1, scores.argsort(dim=1, stable=True)[:, : tokens - hidden], False)
    assert torch.equal(mask_from_scores(scores, hidden, (tokens,)).hidden, expected)


@settings(max_examples=40, deadline=None)
@given(st.tuples(st.integers(1, 6), st.integers(2, 6)), st.integers(0, 2**31))
def test_ids_of_visible_and_hidden_tokens_restore_the_grid(grid, seed):
    tokens = grid[0] * grid[1]
    noise = Seeded(seed).uniform("noise", (3, tokens))
    mask = mask_from_scores(noise, tokens // 2, grid)
    values = torch.arange(tokens).expand(3, -1)
    together = torch.cat((values.gather(1, mask.keep), values.gather(1, mask.hide)), dim=1)
    assert torch.equal(together.gather(1, mask.restore), values)
    assert not mask.hidden.gather(1, mask.keep).any()
    assert mask.hidden.gather(1, mask.hide).all()
    assert torch.equal(mask.keep, mask.keep.sort(dim=1).values)
    assert mask.pixels((2, 3)).sum() == 6 * mask.hidden.sum()


def test_the_ratio_is_held_in_python_floats():
    assert visible_count(25, 0.6) == 10
    assert visible_count(196, 0.75) == 49
    with pytest.raises(UserError, match="leaves no visible"):
        visible_count(10, 1 - 0.05)


def test_a_mask_refuses_what_is_none():
    with pytest.raises(ValueError, match="bool"):
        Mask(torch.zeros(2, 4), (2, 2))
    with pytest.raises(ValueError, match="does not hold"):
        Mask(torch.zeros(2, 4, dtype=torch.bool), (2, 3))
