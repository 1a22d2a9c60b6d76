import numpy as np
import pytest
import torch

from unmask.errors import UserError
from unmask.nn.positions import (
    RelativePositionBias,
    relative_index,
    resize_relative_table,
    resize_table,
    sincos_table,
)


def test_the_first_half_of_the_channels_encodes_the_column():
    table = sincos_table(8, (2, 3)).reshape(2, 3, 8)
    assert torch.equal(table[0, :, :4], table[1, :, :4]), "the same column has the same first half in every row"
    assert torch.equal(table[:, 0, 4:], table[:, 2, 4:]), "the same row has the same second half in every column"
    assert not torch.equal(table[0, 0, :4], table[0, 1, :4])


def test_the_table_equals_the_formula_value_by_value():
    table = sincos_table(12, (3, 2)).double().numpy()
    for row in range(3):
        for column in range(2):
            omega = 10000.0 ** (-np.arange(3) / 3)
            wanted = [np.sin(column * omega), np.cos(column * omega), np.sin(row * omega), np.cos(row * omega)]
            assert np.allclose(table[row * 2 + column], np.concatenate(wanted), atol=1e-6)


def test_a_width_that_does_not_fit_is_a_user_error():
    with pytest.raises(UserError, match="divisible by 4"):
        sincos_table(10, (2, 2))
    assert sincos_table(12, (2, 2, 2)).shape == (8, 12)


@pytest.mark.parametrize("window", [(3,), (2, 3), (2, 2, 3)])
def test_relative_index_is_equal_exactly_where_offsets_are_equal(window):
    index = relative_index(window)
    place = torch.cartesian_prod(*(torch.arange(w) for w in window)).reshape(-1, len(window))
    offset = (place[:, None] - place[None]).reshape(-1, len(window)).tolist()
    seen = {}
    for value, delta in zip(index.flatten().tolist(), map(tuple, offset), strict=True):
        assert seen.setdefault(value, delta) == delta
    assert sorted(seen) == list(range(int(np.prod([2 * w - 1 for w in window]))))


def test_class_token_rows_come_last():
    index = relative_index((2, 2), prefix=1)
    assert index[0, 1:].unique().tolist() == [9], "class to token"
    assert index[1:, 0].unique().tolist() == [10], "token to class"
    assert index[0, 0] == 11
    assert torch.equal(index[1:, 1:], relative_index((2, 2)))


def test_relative_bias_reads_its_table_by_the_index():
    bias = RelativePositionBias((2, 3), num_heads=2)
    with torch.no_grad():
        bias.relative_position_bias_table.copy_(torch.arange(30.0).reshape(15, 2))
    out = bias()
    assert out.shape == (2, 6, 6)
    assert torch.equal(out[1], bias.relative_position_index * 2.0 + 1)


def test_resizing_a_table_to_its_own_grid_changes_nothing_and_keeps_constants():
    table = torch.randn(1, 12, 5)
    assert torch.equal(resize_table(table, (3, 4), (3, 4)), table)
    constant = resize_table(torch.full((12, 5), 0.7), (3, 4), (5, 6))
    assert torch.allclose(constant, torch.full((30, 5), 0.7), atol=1e-6)


@pytest.mark.parametrize("spacing", ["even", "geometric"])
def test_resized_relative_tables_keep_extra_rows_and_the_centre(spacing):
    torch.manual_seed(0)
    table = torch.randn(7 * 7 + 3, 2)
    out = resize_relative_table(table, (4, 4), (6, 6), extra=3, spacing=spacing)
    assert out.shape == (11 * 11 + 3, 2)
    assert torch.equal(out[-3:], table[-3:])
    assert torch.allclose(out[60], table[24], atol=1e-4), "offset (0, 0) stays where it was"


def test_geometric_spacing_keeps_the_values_of_near_offsets_closer_than_even_spacing():
    rows = torch.arange(-6, 7).abs().float()
    table = (rows[:, None] + rows[None]).reshape(-1, 1)
    wanted = 1.0  # offset (0, 1)
    geometric = resize_relative_table(table, (7, 7), (14, 14), spacing="geometric").reshape(27, 27)[13, 14]
    even = resize_relative_table(table, (7, 7), (14, 14), spacing="even").reshape(27, 27)[13, 14]
    assert abs(geometric - wanted) < 0.1 < abs(even - wanted)
