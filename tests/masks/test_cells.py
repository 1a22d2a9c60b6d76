"""Cell masks: exact counts, whole cells, the official rounding."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from unmask.draw import Seeded, permutation
from unmask.errors import UserError
from unmask.masks.cells import cell_grid, cell_mask, hidden_cells, square_mask

grids = st.tuples(st.integers(1, 7), st.integers(1, 7)).filter(lambda g: math.prod(g) > 2)
ratios = st.floats(0.05, 0.95)


@settings(max_examples=60, deadline=None)
@given(grids, st.integers(1, 3), ratios, st.integers(0, 99))
def test_every_sample_hides_the_same_number_of_whole_cells(cells, times, ratio, seed):
    count = math.ceil(math.prod(cells) * ratio)
    order = permutation(Seeded(seed), "permutation", (3, math.prod(cells)))
    if count == math.prod(cells):
        with pytest.raises(UserError, match="leaves no visible cell"):
            cell_mask(order, ratio, cells, (times, times))
        return
    mask = cell_mask(order, ratio, cells, (times, times))
    assert mask.grid == (cells[0] * times, cells[1] * times)
    assert (mask.hidden.sum(dim=1) == count * times**2).all()
    assert mask.num_hidden == count * times**2
    corners = mask.on_grid()[:, ::times, ::times]
    whole = corners.repeat_interleave(times, 1).repeat_interleave(times, 2)
    assert torch.equal(whole, mask.on_grid())
    assert torch.equal(corners.flatten(1).nonzero()[:, 1].view(3, -1), order[:, :count].sort(dim=1).values)


def test_the_rounding_is_the_ceiling_of_the_float_product():
    assert [hidden_cells(36, 0.6), hidden_cells(16, 0.6), hidden_cells(256, 0.6), hidden_cells(4, 0.5)] == [
        22,
        10,
        154,
        2,
    ]


@settings(max_examples=60, deadline=None)
@given(grids, ratios, st.integers(0, 99))
def test_a_square_is_one_block_inside_the_image(cells, ratio, seed):
    if math.ceil(math.prod(cells) * ratio) == math.prod(cells):
        return
    mask = square_mask(Seeded(seed).uniform("square", (4, 2)), ratio, cells, (1, 1))
    for sample in mask.on_grid():
        rows, columns = sample.any(dim=1).nonzero()[:, 0], sample.any(dim=0).nonzero()[:, 0]
        block = sample[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        assert block.all()
        assert int(block.sum()) == int(sample.sum()) == mask.num_hidden < sample.numel()


def test_squares_reach_every_place():
    mask = square_mask(Seeded(0).uniform("square", (300, 2)), 0.25, (4, 4), (1, 1))
    assert mask.num_hidden == 4
    assert mask.on_grid().any(dim=0).all()
    assert len({tuple(s.nonzero()[0].tolist()) for s in mask.on_grid()}) == 9


@pytest.mark.parametrize(
    ("size", "cell", "token", "line"),
    [
        ((192, 192), (33, 33), (4, 4), "cell_size=33 is no multiple of the patch 4: use 32"),
        ((28, 28), (32, 32), (4, 4), "cell_size=32 does not divide image size 28: use 4"),
        ((30, 30), (8, 8), (2, 2), "cell_size=8 does not divide image size 30: use 6"),
    ],
)
def test_a_cell_that_does_not_fit_is_one_line(size, cell, token, line):
    with pytest.raises(UserError) as error:
        cell_grid(size, cell, token)
    assert str(error.value) == line


@pytest.mark.parametrize("ratio", [0.0, 1.0, 0.99])
def test_a_ratio_that_leaves_nothing_is_refused(ratio):
    with pytest.raises(UserError, match="mask_ratio"):
        hidden_cells(16, ratio)
