import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from unmask.draw import Seeded
from unmask.errors import UserError
from unmask.systems.generation import schedules
from unmask.systems.generation.guidance import check_guidance, combined, power_cosine, scheduled


def test_linear_betas_keep_their_total_noise_when_the_number_of_steps_changes():
    assert schedules.linear_betas(1000)[[0, -1]] == pytest.approx([1e-4, 0.02], abs=0)
    long, short = (np.log1p(-schedules.linear_betas(n)).sum() for n in (1000, 500))
    assert short == pytest.approx(long, rel=0.02)


def test_cosine_betas_end_in_pure_noise_and_stay_below_their_limit():
    betas = schedules.cosine_betas(1000)
    assert betas.max() == 0.999
    assert np.cumprod(1 - betas)[-1] < 1e-4


@given(st.integers(1, 300))
def test_respaced_times_rise_from_the_first_to_the_last(steps):
    times = schedules.respaced_timesteps(steps, 300)
    assert len(times) == len(set(times)) == steps
    assert times == sorted(times)
    assert times[0] == 0
    assert steps == 1 or times[-1] == 299


@pytest.mark.parametrize("steps", [0, 1001])
def test_more_steps_than_were_trained_are_one_clear_line(steps):
    with pytest.raises(UserError, match=rf"steps={steps} does not fit: it takes 1 \.\.\. 1000"):
        schedules.respaced_timesteps(steps, 1000)


@pytest.mark.parametrize("schedule", ["cosine", "linear", "square", "log", "exp", "pow3"])
@pytest.mark.parametrize("steps", [1, 4, 13])
def test_hidden_tokens_only_become_fewer_until_none_is_left(schedule, steps):
    counts = schedules.hidden_counts(schedule, steps, 64)
    assert counts[0] == 64
    assert counts[-1] == 0
    assert len(counts) == steps + 1
    assert counts == sorted(counts, reverse=True)


def test_the_cosine_schedule_hides_half_at_two_thirds():
    assert schedules.hidden_counts("cosine", 3, 64)[1:3] == [math.floor(64 * math.cos(math.pi / 6)), 32]


def test_an_unknown_schedule_is_answered_with_the_nearest():
    with pytest.raises(UserError, match="did you mean cosine"):
        schedules.hidden_share("cosin", 0.5)
    with pytest.raises(UserError, match="did you mean linear"):
        schedules.betas("linea", 10)


def test_logit_normal_times_lie_inside_and_mostly_in_the_middle():
    time = schedules.logit_normal_time(Seeded(0), "time", 4000)
    assert 0 < time.min() < time.max() < 1
    assert time.mean() == pytest.approx(0.5, abs=0.02)
    assert ((time - 0.5).abs() < 0.25).float().mean() == pytest.approx(0.728, abs=0.02)  # P(|z| < ln 3)


def test_shifted_times_keep_both_ends():
    time = torch.tensor([0.0, 0.5, 1.0])
    assert schedules.shifted_time(time, 3.0).tolist() == [0.0, 0.75, 1.0]
    assert schedules.shifted_time(time) is time


def test_guidance_of_weight_one_is_the_conditional_pass_and_of_weight_zero_the_empty():
    both = torch.randn(4, 3, 2, 2)
    assert torch.allclose(combined(both, 1.0), both[:2], atol=1e-6)
    assert torch.equal(combined(both, 0.0), both[2:])


def test_channels_beyond_the_guided_stay_the_conditional_passes_own():
    both = torch.randn(4, 5, 2, 2)
    found = combined(both, 2.0, channels=3)
    assert torch.equal(found[:, 3:], both[:2, 3:])
    assert torch.equal(found[:, :3], combined(both, 2.0)[:, :3])
    tokens = both.flatten(2).transpose(1, 2)
    assert torch.equal(combined(tokens, 2.0, channels=3, axis=2), found.flatten(2).transpose(1, 2))


def test_a_weight_may_differ_between_samples():
    both = torch.randn(4, 3)
    found = combined(both, torch.tensor([1.0, 3.0]))
    assert torch.allclose(found[1], combined(both, 3.0)[1])


def test_scheduled_weights_begin_and_end_where_they_should():
    assert power_cosine(4.0, 0.0, 2.0) == pytest.approx(4)
    assert power_cosine(4.0, 1.0, 2.0) == pytest.approx(1)
    assert torch.allclose(power_cosine(4.0, torch.tensor([0.3]), 2.0), torch.tensor([power_cosine(4.0, 0.3, 2.0)]))
    assert [scheduled(s, 2.0, 0.0) for s in ("constant", "linear", "cosine")] == [2.0, 0.0, 0.0]
    assert [scheduled(s, 2.0, 1.0) for s in ("constant", "linear", "cosine")] == [2.0, 2.0, 2.0]


def test_guidance_asked_of_a_model_without_classes_is_one_clear_line():
    with pytest.raises(UserError, match="needs classes"):
        check_guidance(2.0, classes=0, default=1.5)
    with pytest.raises(UserError, match="takes a number from 0"):
        check_guidance(float("nan"), classes=3, default=1.5)
    assert check_guidance(None, classes=3, default=1.5) == 1.5
