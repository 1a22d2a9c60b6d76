"""Tubes: the same patches hidden in all frames of a stretch, the same number in every frame."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from unmask.errors import UserError
from unmask.masks.random import visible_count
from unmask.masks.tube import tube_mask, tubelet_mask


@st.composite
def cases(draw):
    grid = draw(st.tuples(st.integers(1, 8), st.integers(1, 9), st.integers(2, 9)))
    visible = draw(st.integers(1, grid[1] * grid[2] - 1))
    return grid, 1 - (visible + 0.5) / (grid[1] * grid[2]), draw(st.integers(1, grid[0]))


@settings(max_examples=60, deadline=None)
@given(cases(), st.integers(0, 2**31))
def test_every_frame_hides_the_same_number_and_stretches_share_their_patches(case, seed):
    grid, ratio, span = case
    stretches, area = -(-grid[0] // span), grid[1] * grid[2]
    noise = torch.rand(3, stretches, area, generator=torch.Generator().manual_seed(seed))
    mask = tubelet_mask(noise, ratio, grid, span=span)
    hidden = area - visible_count(area, ratio)
    frames = mask.hidden.view(3, grid[0], area)
    assert torch.equal(frames.sum(dim=2), torch.full((3, grid[0]), hidden))
    assert mask.num_hidden == hidden * grid[0]
    for start in range(0, grid[0], span):
        assert torch.equal(
            frames[:, start : start + span], frames[:, start : start + 1].expand_as(frames[:, start : start + span])
        )


def test_a_tube_goes_through_all_frames():
    noise = torch.rand(2, 12, generator=torch.Generator().manual_seed(0))
    frames = tube_mask(noise, 0.75, (5, 3, 4)).on_grid()
    assert torch.equal(frames, frames[:, :1].expand_as(frames))
    assert torch.equal(frames[:, 0].flatten(1), noise >= noise.sort(dim=1).values[:, 3:4])


def test_what_cannot_be_is_one_line():
    with pytest.raises(UserError, match="frames, rows and columns"):
        tubelet_mask(torch.rand(1, 1, 4), 0.5, (2, 2), span=1)
    with pytest.raises(UserError, match="span=3"):
        tubelet_mask(torch.rand(1, 1, 4), 0.5, (2, 2, 2), span=3)
    with pytest.raises(UserError, match="strictly between"):
        tube_mask(torch.rand(1, 4), 1.0, (2, 2, 2))
