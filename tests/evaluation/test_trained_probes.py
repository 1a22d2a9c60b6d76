"""Probes that are trained: they learn, they are repeatable, and they choose their rate on samples they did not see."""

from __future__ import annotations

import pytest
import torch

from unmask.evaluation.attentive import AttentiveHead, attentive
from unmask.evaluation.linear import linear
from unmask.evaluation.metrics import measured
from unmask.evaluation.training import HeadSettings, rate_at, train_heads
from unmask.nn.heads import BatchNormHead


@pytest.fixture(scope="module")
def digits():
    data = pytest.importorskip("sklearn.datasets").load_digits()
    x, y = torch.tensor(data.data, dtype=torch.float32), torch.tensor(data.target)
    return x[:1200], y[:1200], x[1200:], y[1200:]


def test_the_linear_probe_with_lars_learns_digits(digits):
    x, y, x_test, y_test = digits
    settings = HeadSettings(optimizer="lars", base_lr=(0.1, 1.0, 10.0), epochs=20, warmup_epochs=2)
    scores, chosen = linear(x, y, x_test, classes=10, settings=settings)
    assert measured(scores, y_test)["top1"] > 0.85
    assert chosen["held_out_top1"] > 0.85
    assert chosen["base_lr"] in settings.base_lr


def test_the_linear_probe_with_sgd_learns_digits(digits):
    x, y, x_test, y_test = digits
    scores, _ = linear(x, y, x_test, classes=10, settings=HeadSettings(optimizer="sgd", base_lr=(0.5,), epochs=10))
    assert measured(scores, y_test)["top1"] > 0.85


def test_the_same_seed_gives_the_same_head_and_leaves_the_callers_random_state(digits):
    x, y, x_test, _ = digits
    settings = HeadSettings(epochs=2)
    state = torch.random.get_rng_state()
    first, _ = linear(x, y, x_test, classes=10, settings=settings, seed=5)
    assert torch.equal(state, torch.random.get_rng_state())
    torch.rand(3)
    again, _ = linear(x, y, x_test, classes=10, settings=settings, seed=5)
    other, _ = linear(x, y, x_test, classes=10, settings=settings, seed=6)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_several_views_are_read_in_turn():
    seen = []

    class Spy(BatchNormHead):
        def forward(self, x):
            if self.training:
                seen.append(float(x[0, 0]))
            return super().forward(x)

    views = [torch.full((8, 2), float(v)) for v in range(3)]
    train_heads(lambda: Spy(2, 2), views[0], torch.arange(8) % 2, HeadSettings(epochs=4, batch_size=8), views=views)
    assert seen == [0.0, 1.0, 2.0, 0.0]


def test_a_rate_that_diverges_is_not_chosen(digits):
    x, y, x_test, y_test = digits
    settings = HeadSettings(optimizer="sgd", base_lr=(1e38, 0.5), epochs=5, warmup_epochs=0)
    scores, chosen = linear(x, y, x_test, classes=10, settings=settings)
    assert chosen["base_lr"] == 0.5
    assert measured(scores, y_test)["top1"] > 0.8


def test_the_rate_rises_over_the_warm_up_and_falls_to_zero():
    settings = HeadSettings(epochs=90, warmup_epochs=10)
    assert rate_at(0, settings) == 0
    assert rate_at(5, settings) == pytest.approx(0.5)
    assert rate_at(10, settings) == pytest.approx(1)
    assert rate_at(50, settings) == pytest.approx(0.5)
    assert rate_at(90, settings) == pytest.approx(0)


def test_the_attentive_probe_finds_the_one_token_that_tells_the_class():
    """The label stands in one token at a random place; the mean of the tokens drowns it."""
    generator = torch.Generator().manual_seed(0)
    count, length, dim, classes = 450, 24, 16, 3
    labels = torch.arange(count) % classes
    tokens = torch.randn(count, length, dim, generator=generator)
    place = torch.randint(length, (count,), generator=generator)
    tokens[torch.arange(count), place, :] = 0
    tokens[torch.arange(count), place, 0] = 6
    tokens[torch.arange(count), place, 1 + labels] = 6
    settings = HeadSettings(optimizer="sgd", base_lr=(0.3,), epochs=20, warmup_epochs=2, batch_size=32)
    scores, _ = attentive(tokens[:300], labels[:300], tokens[300:], classes=classes, num_heads=2, settings=settings)
    mean, _ = linear(tokens[:300].mean(1), labels[:300], tokens[300:].mean(1), classes=classes)
    assert measured(scores, labels[300:])["top1"] > measured(mean, labels[300:])["top1"] + 0.1


def test_the_attentive_head_starts_as_the_mean_of_the_values():
    """A query of zeros meets every key with the same logit."""
    head = AttentiveHead(8, 3, 2).eval()
    tokens = torch.randn(4, 5, 8, generator=torch.Generator().manual_seed(0))
    expected = head.proj(head.v(head.norm_v(tokens)).mean(dim=1))
    torch.testing.assert_close(head.pooled(tokens), expected)
