"""Block masks: exact counts everywhere, blocks that are blocks, samples that do not depend on one another."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from unmask.draw import Seeded
from unmask.errors import UserError
from unmask.masks.blocks import block_mask, blocks_from

GRIDS = st.tuples(st.integers(1, 20), st.integers(1, 20)).filter(lambda g: g[0] * g[1] > 1)


@st.composite
def grid_and_count(draw):
    grid = draw(GRIDS)
    return grid, draw(st.integers(1, grid[0] * grid[1] - 1))


@settings(max_examples=80, deadline=None)
@given(grid_and_count(), st.integers(0, 2**40), st.integers(1, 40), st.floats(0.05, 1.0))
def test_every_sample_hides_exactly_the_count_on_every_grid(case, seed, min_area, min_aspect):
    grid, hidden = case
    mask = block_mask(Seeded(seed), 5, grid, hidden, min_area=min_area, min_aspect=min_aspect)
    assert mask.hidden.sum(dim=1).tolist() == [hidden] * 5
    assert mask.num_hidden == hidden
    assert mask.grid == grid


@settings(max_examples=30, deadline=None)
@given(grid_and_count(), st.integers(0, 1000))
def test_a_sample_depends_on_its_own_numbers_only(case, seed):
    grid, hidden = case
    together = block_mask(Seeded(seed, step=3), 6, grid, hidden).hidden
    alone = [block_mask(Seeded(seed, step=3, first_sample=i), 1, grid, hidden).hidden[0] for i in range(6)]
    assert torch.equal(together, torch.stack(alone))


def test_the_same_draw_gives_the_same_mask_and_another_another():
    first, again, other = (block_mask(Seeded(s), 4, (14, 14), 75).hidden for s in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_one_block_is_a_rectangle_of_the_area_and_aspect_it_was_given():
    uniform = torch.tensor([[[0.999, 0.5, 0.5, 0.5], *[[0.0, 0.5, 0.0, 0.0]] * 3]])
    hidden = blocks_from(uniform, torch.zeros(1), (10, 10), 36).on_grid()[0]
    rows, columns = hidden.any(dim=1).nonzero(), hidden.any(dim=0).nonzero()
    assert len(rows) == len(columns) == 6
    assert hidden[rows[0, 0] : rows[-1, 0] + 1, columns[0, 0] : columns[-1, 0] + 1].all()


def test_the_last_block_is_trimmed_in_row_major_order():
    uniform = torch.tensor([[[0.0, 0.5, 0.0, 0.0]]])  # one square of 16 tokens in the corner, 10 wanted
    hidden = blocks_from(uniform, torch.zeros(1), (8, 8), 10).hidden[0].nonzero()[:, 0].tolist()
    assert hidden == [0, 1, 2, 3, 8, 9, 10, 11, 16, 17]


def test_hidden_tokens_stand_together():
    blocks = block_mask(Seeded(0), 64, (14, 14), 75).on_grid()
    scattered = (
        torch.rand(64, 196, generator=torch.Generator().manual_seed(0))
        .argsort(1)
        .argsort(1)
        .lt(75)
        .unflatten(1, (14, 14))
    )

    def neighbours(hidden):
        return (hidden[:, 1:] & hidden[:, :-1]).float().mean() + (hidden[:, :, 1:] & hidden[:, :, :-1]).float().mean()

    assert neighbours(blocks) > 1.8 * neighbours(scattered)


def test_every_place_is_hidden_at_times():
    share = block_mask(Seeded(0), 2000, (10, 10), 40).hidden.float().mean(dim=0)
    assert share.min() > 0.04  # corners are rarest, as in BEiT: few blocks reach them
    assert share.mean() == pytest.approx(0.4, abs=1e-6)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"grid": (4, 4), "hidden": 16}, "at least one must be hidden and one visible"),
        ({"grid": (4, 4), "hidden": 0}, "at least one must be hidden"),
        ({"grid": (4, 4, 4), "hidden": 8}, "rows and columns"),
        ({"grid": (4, 4), "hidden": 8, "min_aspect": 0}, "min_aspect"),
        ({"grid": (4, 4), "hidden": 8, "min_area": 9, "max_area": 4}, "max_area"),
    ],
)
def test_what_cannot_be_is_one_line(arguments, words):
    with pytest.raises(UserError, match=words):
        block_mask(Seeded(0), 2, **arguments)
