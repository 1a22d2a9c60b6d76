"""Coloured noise: the spectra the paper names, exact counts, crops and flips in their right places."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from unmask.draw import Replay, Seeded
from unmask.errors import UserError
from unmask.masks.color import COLORS, SIGMAS, color_mask, crops, noise_bank, response, shared_crop_mask
from unmask.masks.random import visible_count


def spectrum(bank):
    """Mean power at each frequency, and the frequencies, in cycles a pixel."""
    size = bank.shape[1]
    power = torch.fft.rfft2(bank).abs().square().mean(dim=0) / size**2
    frequency = (torch.fft.fftfreq(size)[:, None] ** 2 + torch.fft.rfftfreq(size)[None] ** 2).sqrt()
    return frequency.flatten(), power.flatten()


def band(bank, low, high):
    frequency, power = spectrum(bank)
    return float(power[(frequency >= low) & (frequency < high)].mean())


def slope(bank, low, high):
    """d log10 power / d log10 frequency between two frequencies, by least squares."""
    frequency, power = spectrum(bank)
    inside = (frequency >= low) & (frequency < high)
    x, y = frequency[inside].log10(), power[inside].log10()
    return float(((x - x.mean()) * (y - y.mean())).sum() / ((x - x.mean()) ** 2).sum())


@pytest.fixture(scope="module")
def banks():
    return {color: noise_bank(color, 192, 64, seed=1) for color in COLORS}


@pytest.mark.parametrize("color", COLORS)
def test_every_image_has_mean_zero_and_variance_one(banks, color):
    assert banks[color].mean(dim=(1, 2)).abs().max() < 1e-5
    assert (banks[color].var(dim=(1, 2), unbiased=False) - 1).abs().max() < 1e-4


def test_the_spectra_have_the_slopes_of_their_colours(banks):
    assert slope(banks["white"], 0.02, 0.5) == pytest.approx(0, abs=0.1)
    assert slope(banks["red"], 0.1, 0.35) < -2
    assert slope(banks["blue"], 0.03, 0.2) > 2
    assert slope(banks["green"], 0.02, 0.08) > 2
    assert slope(banks["green"], 0.25, 0.5) < -2


def test_the_bands_lie_where_the_colours_say(banks):
    low, middle, high = ((0.016, 0.05), (0.1, 0.2), (0.4, 0.5))
    for color, order in {
        "red": (low, middle, high),
        "blue": (high, middle, low),
        "green": (middle, low, high),
    }.items():
        strong, *weaker = [band(banks[color], *b) for b in order]
        assert all(strong > 3 * w for w in weaker), color
    assert band(banks["green"], *middle) > 3 * band(banks["green"], *high)
    assert band(banks["purple"], *low) > 1.5 * band(banks["purple"], *middle)
    assert band(banks["purple"], *high) > 1.5 * band(banks["purple"], *middle)


@pytest.mark.parametrize("color", COLORS)
def test_the_power_is_the_square_of_the_filter(color):
    """Against the formula, with one sigma for all images so that the mean over images has nothing else in it."""
    sigmas = tuple((low, low) for low, _ in SIGMAS[color])
    bank = noise_bank(color, 400, 32, sigmas=sigmas)
    square = torch.fft.fftfreq(32)[:, None] ** 2 + torch.fft.rfftfreq(32)[None] ** 2
    expected = response(color, [torch.tensor([s]) for s, _ in sigmas], square)[0].square().flatten()
    _, power = spectrum(bank)
    expected, power = expected[1:], power[1:]
    ratio = (power / power.mean()) / (expected / expected.mean())
    strong = expected > 0.05 * expected.max()
    assert (ratio[strong] - 1).abs().max() < 0.35
    assert ratio[strong].mean() == pytest.approx(1, abs=0.03)


def test_the_blur_is_a_periodic_gaussian():
    sigma, white = 1.3, torch.zeros(1, 16, 16)
    white[0, 0, 0] = 1
    square = torch.fft.fftfreq(16)[:, None] ** 2 + torch.fft.rfftfreq(16)[None] ** 2
    blurred = torch.fft.irfft2(torch.fft.rfft2(white) * response("red", [torch.tensor([sigma])], square), s=(16, 16))[0]
    place = torch.arange(16.0)
    wrapped = sum(torch.exp(-((place + 16 * k) ** 2) / (2 * sigma**2)) for k in range(-3, 4)) / (
        sigma * math.sqrt(2 * math.pi)
    )
    torch.testing.assert_close(blurred, wrapped[:, None] * wrapped[None], rtol=1e-3, atol=1e-5)


def test_a_larger_bank_begins_with_the_smaller_one():
    assert torch.equal(noise_bank("green", 300, 16)[:7], noise_bank("green", 7, 16))
    assert not torch.equal(noise_bank("green", 7, 16, seed=1), noise_bank("green", 7, 16))


@st.composite
def cases(draw):
    grid = draw(st.tuples(st.integers(1, 12), st.integers(2, 12)))
    visible = draw(st.integers(1, grid[0] * grid[1] - 1))
    return grid, 1 - (visible + 0.5) / (grid[0] * grid[1])


SMALL = noise_bank("green", 5, 12)


@settings(max_examples=60, deadline=None)
@given(cases(), st.integers(0, 2**31), st.booleans(), st.integers(1, 13))
def test_every_sample_hides_exactly_the_count(case, seed, shared, batch):
    grid, ratio = case
    make = shared_crop_mask if shared else color_mask
    mask = make(SMALL, Seeded(seed), batch, grid, ratio)
    tokens = grid[0] * grid[1]
    assert mask.hidden.sum(dim=1).tolist() == [tokens - visible_count(tokens, ratio)] * batch


@settings(max_examples=20, deadline=None)
@given(cases(), st.integers(0, 2**31), st.booleans())
def test_a_sample_depends_on_its_own_numbers_only(case, seed, shared):
    grid, ratio = case
    make = shared_crop_mask if shared else color_mask
    together = make(SMALL, Seeded(seed), 12, grid, ratio).hidden
    parts = [make(SMALL, Seeded(seed, first_sample=i), 4, grid, ratio).hidden for i in (0, 4, 8)]
    assert torch.equal(together, torch.cat(parts))


def test_crops_are_cut_then_mirrored():
    bank = torch.arange(2 * 36.0).view(2, 6, 6)
    image, top, left = torch.tensor([1, 0]), torch.tensor([2, 0]), torch.tensor([1, 3])
    got = crops(bank, image, top, left, torch.tensor([1, 0]), torch.tensor([0, 1]), (3, 2)).view(2, 3, 2)
    assert torch.equal(got[0], bank[1, 2:5, 1:3].flip(1))
    assert torch.equal(got[1], bank[0, 0:3, 3:5].flip(0))


def test_the_largest_noise_stays_visible_and_ties_go_to_the_lower_index():
    bank = torch.tensor([[[3.0, 1.0], [1.0, 2.0]]])
    draws = {"image": [0], "top": [0], "left": [0], "flip_horizontal": [0], "flip_vertical": [0]}
    draw = Replay({k: torch.tensor(v) for k, v in draws.items()})
    assert color_mask(bank, draw, 1, (2, 2), 0.5).hidden.tolist() == [[False, True, True, False]]
    assert color_mask(bank, draw, 1, (2, 2), 0.25).hidden.tolist() == [[False, False, True, False]]


def test_colours_make_hidden_regions_of_different_sizes(banks):
    def boundary(color):
        hidden = color_mask(banks[color], Seeded(0), 128, (16, 16), 0.75).on_grid()
        return float((hidden[:, 1:] != hidden[:, :-1]).float().mean())

    edges = {color: boundary(color) for color in COLORS}
    assert edges["red"] < edges["green"] < edges["white"] < edges["blue"]


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: noise_bank("grean", 1, 8), "did you mean green"),
        (lambda: noise_bank("green", 1, 8, sigmas=((1.0, 2.0),)), "takes 2 ranges"),
        (lambda: noise_bank("red", 1, 8, sigmas=((2.0, 1.0),)), "0 < low <= high"),
        (lambda: noise_bank("green", 1, 8, sigmas=((1.0, 2.0), (1.5, 3.0))), "overlap"),
        (lambda: color_mask(SMALL, Seeded(0), 1, (13, 4), 0.5), "noise_size=13"),
        (lambda: color_mask(SMALL, Seeded(0), 1, (3, 4, 4), 0.5), "rows and columns"),
        (lambda: shared_crop_mask(SMALL, Seeded(0), 1, (4, 4), 1.0), "strictly between"),
    ],
)
def test_what_cannot_be_is_one_line(call, words):
    with pytest.raises(UserError, match=words):
        call()
