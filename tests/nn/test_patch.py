import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from unmask.nn.patch import PatchEmbed, patchify, select, unpatchify


@settings(deadline=None, max_examples=30)
@given(
    grid=st.lists(st.integers(1, 4), min_size=1, max_size=3),
    patch=st.integers(1, 4),
    channels=st.integers(1, 4),
    channels_first=st.booleans(),
)
def test_unpatchify_undoes_patchify_for_any_number_of_axes(grid, patch, channels, channels_first):
    patches = [patch + i for i in range(len(grid))]
    x = torch.randn(2, channels, *(g * p for g, p in zip(grid, patches, strict=True)))
    tokens = patchify(x, patches, channels_first=channels_first)
    assert tokens.shape == (2, math.prod(grid), math.prod(patches) * channels)
    assert torch.equal(unpatchify(tokens, grid, patches, channels_first=channels_first), x)


def test_values_inside_a_patch_run_row_column_channel():
    x = torch.arange(2 * 4 * 4).reshape(1, 2, 4, 4)
    first = patchify(x, (2, 2))[0, 0]
    assert first.tolist() == [0, 16, 1, 17, 4, 20, 5, 21]
    assert patchify(x, (2, 2), channels_first=True)[0, 0].tolist() == [0, 1, 4, 5, 16, 17, 20, 21]


@pytest.mark.parametrize("axes", [1, 2, 3])
def test_patch_embedding_equals_its_convolution(axes):
    torch.manual_seed(0)
    embed = PatchEmbed(3, 8, (2,) * axes)
    x = torch.randn(2, 3, *(4,) * axes)
    assert torch.allclose(embed(x), embed.proj(x).flatten(2).transpose(1, 2), atol=1e-6)


def test_embedding_some_patches_equals_selecting_afterwards():
    torch.manual_seed(0)
    embed = PatchEmbed(3, 8, (4, 4))
    x, ids = torch.randn(2, 3, 16, 8), torch.tensor([[0, 5], [7, 2]])
    assert torch.allclose(embed(x, ids), select(embed(x), ids), atol=1e-6)
