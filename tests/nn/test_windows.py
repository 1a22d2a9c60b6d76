"""Shifted windows: the gather equals roll and partition, and the gradients are those of plain operations."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from unmask.nn.windows import _fused, _traceable, clamp_window, cut, window_attention, window_index


def plain_partition(x, window, shift):
    """Roll and cut as the paper writes it, for maps that the windows divide. ``[*S]`` -> ``[W, K]``."""
    axes = tuple(range(x.ndim))
    x = x.roll([-s for s in shift], axes)
    pieces = itertools.product(*(range(0, s, w) for s, w in zip(x.shape, window, strict=True)))
    cuts = [x[tuple(slice(a, a + w) for a, w in zip(at, window, strict=True))].reshape(-1) for at in pieces]
    return torch.stack(cuts)


def official_mask(size, window, shift):
    """The regions of the official code, two axes: slices at -window and -shift."""
    regions, count = torch.zeros(size), 0
    axis = lambda a: (slice(0, -window[a]), slice(-window[a], -shift[a]), slice(-shift[a], None))  # noqa: E731
    for rows in axis(0):
        for columns in axis(1):
            regions[rows, columns] = count
            count += 1
    flat = plain_partition(regions, window, (0, 0))
    return torch.where(flat[:, None] != flat[:, :, None], -100.0, 0.0)


sides = st.lists(st.tuples(st.integers(1, 3), st.integers(1, 4)), min_size=1, max_size=3)


@settings(max_examples=40, deadline=None)
@given(sides, st.booleans())
def test_the_gather_equals_roll_and_partition_on_any_number_of_axes(pairs, shifted):
    size, window = tuple(n * w for n, w in pairs), tuple(w for _, w in pairs)
    shift = tuple(w // 2 if shifted else 0 for w in window)
    windows = cut(size, window, shift)
    ids = torch.arange(math.prod(size)).view(size)
    assert torch.equal(windows.index, plain_partition(ids, window, shift))
    assert torch.equal(windows.index.reshape(-1)[windows.inverse], ids.reshape(-1))
    assert windows.padding is None


@pytest.mark.parametrize(("size", "window", "shift"), [((8, 8), (4, 4), (2, 2)), ((6, 9), (3, 3), (1, 1))])
def test_the_shift_mask_is_the_official_one(size, window, shift):
    assert torch.equal(cut(size, window, shift).mask, official_mask(size, window, shift))


def test_windows_that_divide_and_do_not_shift_need_no_mask():
    assert cut((8, 12), (4, 4), (0, 0)).mask is None


def test_a_map_smaller_than_the_window_gets_one_window_without_shift():
    assert clamp_window((4, 4), (7, 7), (3, 3)) == ((4, 4), (0, 0))
    assert clamp_window((7, 14), (7, 7), (3, 3)) == ((7, 7), (0, 0))
    assert clamp_window((8, 14), (7, 7), (3, 3)) == ((7, 7), (3, 3))
    assert clamp_window((4, 16), (8, 4), (4, 2)) == ((4, 4), (0, 2))


@pytest.mark.parametrize("shift", [(0, 0), (2, 2)])
def test_real_tokens_ignore_padding_and_padding_takes_no_gradient(shift):
    torch.manual_seed(0)
    size, window = (6, 7), (4, 4)
    qkv = torch.randn(2, 42, 3, 2, 5, requires_grad=True, dtype=torch.float64)
    bias = torch.randn(2, 16, 16, requires_grad=True, dtype=torch.float64)
    windows = cut(size, window, shift)
    assert windows.count == 4
    assert int(windows.padding.sum()) == 64 - 42
    out = window_attention(qkv, bias, windows, scale=0.4)
    expected = torch.zeros_like(out)
    for w in range(windows.count):
        real = ~windows.padding[w]
        ids = windows.index[w, real]
        q, k, v = qkv[:, ids].permute(2, 0, 3, 1, 4)
        logits = q @ k.transpose(-1, -2) * 0.4 + bias[:, real][:, :, real] + windows.mask[w][real][:, real]
        expected[:, ids] = (logits.softmax(-1) @ v).transpose(1, 2).flatten(2)
    torch.testing.assert_close(out, expected)
    ours = torch.autograd.grad(out.square().sum(), (qkv, bias))
    theirs = torch.autograd.grad(expected.square().sum(), (qkv, bias))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.integers(2, 7), min_size=1, max_size=3),
    st.integers(2, 3),
    st.booleans(),
    st.booleans(),
    st.integers(1, 3),
    st.sampled_from([window_attention, _fused]),
)
def test_every_path_agrees_with_plain_operations_in_value_and_gradient(size, side, shifted, biased, heads, path):
    window, shift = clamp_window(size, (side,) * len(size), (side // 2 if shifted else 0,) * len(size))
    windows = cut(size, window, shift)
    generator = torch.Generator().manual_seed(1)
    draw = lambda *s: torch.randn(*s, generator=generator, dtype=torch.float64).requires_grad_()  # noqa: E731
    qkv = draw(2, math.prod(size), 3, heads, 4)
    bias = draw(heads, windows.slots, windows.slots) if biased else None
    inputs = [qkv] + ([bias] if biased else [])
    fast, plain = path(qkv, bias, windows, scale=0.5), _traceable(qkv, bias, windows, 0.5)
    torch.testing.assert_close(fast, plain)
    weight = draw(*fast.shape).detach()
    for a, b in zip(
        torch.autograd.grad((fast * weight).sum(), inputs),
        torch.autograd.grad((plain * weight).sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


def test_gradients_pass_gradcheck_through_shift_and_padding():
    windows = cut((3, 5), (2, 2), (1, 1))
    qkv = torch.randn(1, 15, 3, 2, 3, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(2, 4, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda q, b: window_attention(q, b, windows, scale=0.7), (qkv, bias))


def test_a_smaller_window_reads_the_middle_of_the_table():
    small, large = window_index((2, 2), (2, 2), "cpu"), window_index((2, 2), (4, 4), "cpu")
    offsets = torch.cartesian_prod(torch.arange(-3, 4), torch.arange(-3, 4))
    own = torch.cartesian_prod(torch.arange(-1, 2), torch.arange(-1, 2))
    assert torch.equal(offsets[large], own[small])


def test_windows_made_under_inference_mode_serve_training():
    with torch.inference_mode():
        windows = cut((9, 9), (3, 3), (1, 1))
        window_attention(torch.randn(1, 81, 3, 1, 2), None, windows, scale=1.0)
    qkv = torch.randn(1, 81, 3, 1, 2, requires_grad=True)
    window_attention(qkv, None, windows, scale=1.0).sum().backward()
    assert qkv.grad is not None


# --- overlapping windows ---


def test_overlapping_attention_is_what_a_loop_over_windows_gives():
    from unmask.nn.windows import overlapping_attention, overlapping_index

    torch.manual_seed(0)
    size, window, larger, heads, dim = (4, 6), (2, 3), (4, 5), 2, 3
    qkv = torch.randn(2, 24, 3, heads, dim, requires_grad=True)
    bias = torch.randn(heads, 6, 20, requires_grad=True)
    out = overlapping_attention(qkv, bias, size, window, larger, scale=0.7)
    maps = qkv.view(2, *size, 3, heads, dim)
    padded = torch.nn.functional.pad(maps, (0, 0, 0, 0, 0, 0, 1, 1, 1, 1))
    wanted = torch.empty(2, *size, heads * dim)
    for top in range(0, 4, 2):
        for left in range(0, 6, 3):
            q = maps[:, top : top + 2, left : left + 3, 0].reshape(2, 6, heads, dim).transpose(1, 2)
            around = padded[:, top : top + 4, left : left + 5].reshape(2, 20, 3, heads, dim)
            k, v = around[:, :, 1].transpose(1, 2), around[:, :, 2].transpose(1, 2)
            mixed = (q @ k.transpose(-1, -2) * 0.7 + bias).softmax(-1) @ v
            wanted[:, top : top + 2, left : left + 3] = mixed.transpose(1, 2).reshape(2, 2, 3, -1)
    assert torch.allclose(out, wanted.view(2, 24, -1), atol=1e-5)
    ours, theirs = (torch.autograd.grad(t.square().sum(), (qkv, bias), retain_graph=True) for t in (out, wanted))
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(ours, theirs, strict=True))
    index = overlapping_index(window, larger)
    assert (index.min(), index.max()) == (0, 5 * 7 - 1)


def test_overlapping_windows_of_one_axis_and_of_three_work_alike():
    from unmask.nn.windows import overlapping_attention

    torch.manual_seed(0)
    line = torch.randn(1, 8, 3, 2, 4)
    one = overlapping_attention(line, None, (8,), (4,), (6,), scale=0.5)
    three = overlapping_attention(line, None, (1, 8, 1), (1, 4, 1), (1, 6, 1), scale=0.5)
    assert torch.allclose(one, three, atol=1e-6)
