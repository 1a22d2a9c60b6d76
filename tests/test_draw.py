"""Named randomness: the generator's published answers, the same numbers however a batch is split, right distributions."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from unmask.draw import Recorder, Replay, Scoped, Seeded, bernoulli, gumbel, permutation, philox, truncated_normal

ONES = 0xFFFFFFFF
# Random123's kat_vectors for philox4x32-10: counter, key, answer
ANSWERS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((ONES,) * 4, (ONES,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "answer"), ANSWERS)
def test_philox_gives_its_published_answers(counter, key, answer):
    out = philox(torch.tensor([[counter[0]]]), torch.tensor([[counter[1]]]), (counter[2], counter[3]), key)
    assert out.flatten().tolist() == list(answer)


KINDS = {
    "uniform": lambda draw, shape, **o: draw.uniform("x", shape, **o),
    "normal": lambda draw, shape, **o: draw.normal("x", shape, **o),
    "integers": lambda draw, shape, **o: draw.integers("x", -3, 1000, shape, **o),
}


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=30, deadline=None)
@given(
    shape=st.lists(st.integers(1, 5), min_size=1, max_size=3),
    seed=st.integers(-(2**70), 2**70),
    step=st.integers(0, 2**40),
)
def test_a_batch_split_over_processes_gets_the_same_numbers(kind, shape, seed, step):
    whole = KINDS[kind](Seeded(seed, step), (6, *shape[1:]))
    parts = [KINDS[kind](Seeded(seed, step, first), (2, *shape[1:])) for first in (0, 2, 4)]
    assert torch.equal(whole, torch.cat(parts))


@pytest.mark.parametrize("kind", KINDS)
def test_seed_step_name_and_sample_each_change_the_numbers(kind):
    first = KINDS[kind](Seeded(0, 0), (4, 50))
    assert torch.equal(first, KINDS[kind](Seeded(0, 0), (4, 50)))
    for other in (Seeded(1, 0), Seeded(0, 1), Seeded(0, 2**32), Seeded(0, 0, 1), Scoped(Seeded(0, 0), "y")):
        assert not torch.equal(first, KINDS[kind](other, (4, 50)))
    assert not torch.equal(first[0], first[1])


@pytest.mark.parametrize("kind", KINDS)
def test_a_shared_draw_is_the_same_on_every_process_and_differs_from_a_samples(kind):
    one, two = (KINDS[kind](Seeded(0, 5, first), (3, 4), shared=True) for first in (0, 64))
    assert torch.equal(one, two)
    assert not torch.equal(one, KINDS[kind](Seeded(0, 5), (3, 4)))


def kolmogorov(values, distribution) -> float:
    values = values.double().flatten().sort().values
    n = len(values)
    at = distribution(values)
    steps = torch.arange(1, n + 1) / n
    return float(torch.maximum((steps - at).abs(), (at - steps + 1 / n).abs()).max()) * math.sqrt(n)


LIMIT = 1.95  # exceeded with probability 0.001 by numbers of the right distribution; the numbers here are fixed


def test_uniforms_are_uniform_and_lie_in_zero_to_one():
    values = Seeded(3).uniform("x", (64, 1000))
    assert values.min() >= 0
    assert values.max() < 1
    assert kolmogorov(values, lambda v: v) < LIMIT


def test_normals_are_normal_and_uncorrelated():
    values = Seeded(3).normal("x", (64, 1001))
    assert torch.isfinite(values).all()
    assert kolmogorov(values, lambda v: 0.5 * (1 + torch.erf(v / math.sqrt(2)))) < LIMIT
    pairs = values[:, :1000].reshape(-1, 2)
    assert abs(float(torch.corrcoef(pairs.T)[0, 1])) < 0.02
    assert abs(float(torch.corrcoef(values[:2])[0, 1])) < 0.1


def test_integers_are_equally_likely_within_their_ends():
    values = Seeded(3).integers("x", -2, 5, (64, 1000))
    assert set(values.unique().tolist()) == set(range(-2, 5))
    count = values.flatten().add(2).bincount()
    expected = 64000 / 7
    assert float(((count - expected) ** 2 / expected).sum()) < 22.5  # chi-square, 6 degrees, 0.001
    with pytest.raises(ValueError, match="high - low"):
        Seeded(0).integers("x", 0, 0, (3,))


def test_what_is_made_of_uniforms_has_its_distribution():
    draw = Seeded(5)
    assert kolmogorov(gumbel(draw, "g", (16, 1000)), lambda v: (-(-v).exp()).exp()) < LIMIT
    assert float(bernoulli(draw, "b", 0.3, (64, 1000)).float().mean()) == pytest.approx(0.3, abs=0.01)
    order = permutation(draw, "p", (500, 7))
    assert torch.equal(order.sort(dim=1).values, torch.arange(7).expand(500, 7))
    assert (order[:, 0].bincount(minlength=7) - 500 / 7).abs().max() < 35
    cut = truncated_normal(draw, "t", (16, 1000), low=-1, high=2)
    assert cut.min() >= -1
    assert cut.max() <= 2

    def below(v):
        return 0.5 * (1 + torch.erf(v / math.sqrt(2)))

    ends = torch.tensor([-1.0, 2.0], dtype=torch.float64)
    low, high = below(ends)
    assert kolmogorov(cut, lambda v: (below(v) - low) / (high - low)) < LIMIT


def test_shapes_without_axes_and_without_numbers():
    assert Seeded(0).uniform("x", (), shared=True).shape == ()
    assert Seeded(0).normal("x", (3,)).shape == (3,)
    assert Seeded(0).uniform("x", (0, 4)).shape == (0, 4)
    assert Seeded(0).uniform("x", (4, 0)).shape == (4, 0)


def test_what_was_recorded_replays():
    recorder = Recorder(Seeded(0, 7))
    first = recorder.normal("a", (2, 3)), recorder.integers("b", 0, 9, (4,))
    assert torch.equal(recorder.normal("a", (2, 3)), first[0])
    replay = Replay(recorder.recorded)
    assert torch.equal(replay.normal("a", (2, 3)), first[0])
    assert torch.equal(replay.integers("b", 0, 9, (4,)), first[1])


def test_a_replay_refuses_what_it_was_not_given():
    replay = Replay({"a": torch.zeros(2, 3), "b": torch.tensor([7])})
    with pytest.raises(KeyError, match="nothing was recorded for the draw 'c'"):
        replay.uniform("c", (1,))
    with pytest.raises(ValueError, match=r"recorded with shape \(2, 3\), asked for \(3, 2\)"):
        replay.uniform("a", (3, 2))
    with pytest.raises(ValueError, match="leave"):
        replay.integers("b", 0, 7, (1,))


def test_scopes_prefix_every_kind():
    recorder = Recorder(Seeded(0))
    scoped = Scoped(recorder, "loss")
    scoped.uniform("a", (1,))
    scoped.normal("b", (1,))
    scoped.integers("c", 0, 3, (1,))
    assert set(recorder.recorded) == {"loss.a", "loss.b", "loss.c"}


def test_gumbel_noise_is_finite_at_both_ends_of_the_uniform():
    ends = torch.tensor([0.0, 1 - 2.0**-24])
    assert torch.isfinite(gumbel(Replay({"g": ends}), "g", (2,))).all()
