import math

import pytest
import torch

from unmask.draw import Recorder, Replay, Seeded
from unmask.errors import UserError
from unmask.systems.generation import flow, samplers
from unmask.systems.generation.decoding import decode, filtered
from unmask.systems.generation.schedules import hidden_counts


def test_the_path_runs_from_noise_to_data_along_its_velocity():
    data, noise = torch.randn(3, 4, 2), torch.randn(3, 4, 2)
    assert torch.equal(flow.interpolate(data, noise, torch.zeros(3)), noise)
    assert torch.equal(flow.interpolate(data, noise, torch.ones(3)), data)
    x = flow.interpolate(data, noise, torch.full((3,), 0.3))
    assert torch.allclose(flow.data_from_velocity(x, torch.full((3,), 0.3), data - noise), data, atol=1e-6)


def test_padding_changes_no_loss():
    v, data, noise = (torch.randn(2, 6, 4) for _ in range(3))
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0]])
    alone = flow.flow_loss(v[1:, :3], data[1:, :3], noise[1:, :3])
    assert torch.allclose(flow.flow_loss(v, data, noise, mask)[1:], alone)
    assert torch.allclose(flow.flow_loss(v, data, noise, mask)[:1], flow.flow_loss(v[:1], data[:1], noise[:1]))


def test_the_score_of_standard_data_points_home():
    # data and noise both standard: p_t is N(0, t² + (1 - t)²), and the best velocity is known
    x, time = torch.randn(5, 3), torch.full((5,), 0.4)
    variance = 0.4**2 + 0.6**2
    v = x * (0.4 - 0.6) / variance
    assert torch.allclose(flow.score(x, time, v), -x / variance, atol=1e-5)


def exact(x, time):
    """dx/dt = cos(3t)·x: x(1) = x(0)·exp(sin(3) / 3)."""
    return x * torch.cos(3 * time)[:, None]


@pytest.mark.parametrize(("solver", "steps", "error"), [("euler", 200, 2e-2), ("heun", 200, 1e-4), ("dopri5", 1, 2e-3)])
def test_solvers_follow_a_field_with_a_known_answer(solver, steps, error):
    start = torch.randn(4, 3)
    found = samplers.ode(exact, start, solver=solver, steps=steps)
    assert torch.allclose(found, start * math.exp(math.sin(3) / 3), rtol=error, atol=error)


def test_dopri5_is_as_exact_as_it_is_told_to_be():
    start = torch.randn(4, 3, dtype=torch.float64)

    def field(x, time):
        return x * torch.cos(3 * time.double())[:, None]

    found = samplers.ode(field, start, solver="dopri5", rtol=1e-7, atol=1e-9)
    assert torch.allclose(found, start * math.exp(math.sin(3) / 3), rtol=1e-5)


def test_dopri5_gives_a_sample_the_same_path_whatever_its_neighbours():
    def field(x, time):
        return -x * x.abs() * 5 * time[:, None]

    start = torch.tensor([[0.3, 1.0], [20.0, -30.0], [1e-3, 0.0]])
    together = samplers.ode(field, start)
    alone = torch.cat([samplers.ode(field, row[None]) for row in start])
    assert torch.allclose(together, alone, rtol=1e-6)


def test_a_stochastic_path_ends_in_the_datas_distribution():
    data_mean, draw = 2.0, Seeded(0)

    def field(x, time):  # data N(2, 0.25), noise N(0, 1): the velocity is known
        t = time[:, None]
        variance = t**2 * 0.25 + (1 - t) ** 2
        return data_mean + (t * 0.25 - (1 - t)) / variance * (x - t * data_mean)

    start = samplers.start_noise(draw, (4000, 1))
    for kind in ("sigma", "sbdm"):
        found = samplers.sde(field, start, draw, steps=60, diffusivity=kind)
        assert found.mean() == pytest.approx(2, abs=0.05)
        assert found.std() == pytest.approx(0.5, abs=0.05)


def test_the_stochastic_sampler_draws_by_name_except_in_its_last_step():
    draw = Recorder(Seeded(0))
    samplers.sde(lambda x, t: x, torch.randn(2, 3), draw, steps=4)
    assert list(draw.recorded) == ["step.0", "step.1", "step.2"]


def test_unknown_solvers_and_no_steps_are_one_clear_line():
    with pytest.raises(UserError, match="did you mean euler"):
        samplers.ode(exact, torch.ones(1, 1), solver="eule")
    with pytest.raises(UserError, match="steps=0"):
        samplers.ode(exact, torch.ones(1, 1), solver="euler", steps=0)


# --- masked tokens ---


def counting(seen):
    def logits(ids, hidden, step):
        seen.append((ids.clone(), hidden.clone(), step))
        return torch.randn(*hidden.shape, 7, generator=torch.Generator().manual_seed(step.number))

    return logits


@pytest.mark.parametrize("token_draw", ["uniform", "gumbel"])
def test_each_step_sees_as_many_hidden_tokens_as_the_schedule_says(token_draw):
    seen: list = []
    ids = decode(counting(seen), 3, 16, 7, Seeded(0), steps=5, token_draw=token_draw)
    assert ids.shape == (3, 16)
    assert 0 <= ids.min() <= ids.max() < 7
    for (before, hidden, step), count in zip(seen, hidden_counts("cosine", 5, 16), strict=False):
        assert hidden.shape == (3, count)
        assert step.hidden == count
        assert torch.equal((before == 7).nonzero()[:, 1].reshape(3, -1), hidden)


def test_what_was_kept_is_never_changed_again():
    seen: list = []
    final = decode(counting(seen), 2, 16, 7, Seeded(1), steps=6)
    for ids, _, _ in seen:
        assert torch.equal(torch.where(ids == 7, final, ids), final)


@pytest.mark.parametrize("token_draw", ["uniform", "gumbel"])
def test_ids_follow_the_probabilities(token_draw):
    log_p = torch.tensor([0.5, 0.3, 0.2, 0.0]).log()
    ids = decode(
        lambda ids, hidden, step: log_p.expand(*hidden.shape, 4), 400, 20, 4, Seeded(0), steps=1,
        sampling_temperature=0.0, coldest=1.0, token_draw=token_draw,
    )  # fmt: skip
    shares = [(ids == i).float().mean().item() for i in range(4)]
    assert shares == pytest.approx([0.5, 0.3, 0.2, 0.0], abs=0.02)
    assert shares[3] == 0


def test_gumbel_noise_can_be_replayed_as_it_was_recorded():
    noise = torch.randn(2, 6, 5)
    draw = Replay({"token.0.gumbel": noise})
    logits = torch.randn(2, 6, 5)
    ids = decode(lambda i, h, s: logits, 2, 6, 5, draw, steps=1, coldest=1.0, token_draw="gumbel")
    assert torch.equal(ids, (logits.log_softmax(-1) + noise).argmax(-1))


def test_filters_leave_the_likeliest():
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    assert filtered(logits, top_k=2).isfinite().tolist() == [True, True, False, False]
    assert filtered(logits, top_p=0.6).isfinite().tolist() == [True, True, False, False]
    assert filtered(logits, top_p=0.5).isfinite().tolist() == [True, False, False, False]
    assert torch.equal(filtered(logits), logits)


def test_bad_filters_and_no_steps_are_one_clear_line():
    for wrong in ({"steps": 0}, {"top_k": 0}, {"top_p": 0.0}):
        with pytest.raises(UserError, match=next(iter(wrong))):
            decode(counting([]), 1, 4, 7, Seeded(0), **wrong)
