import math

import pytest

from unmask.config import validated
from unmask.engine.schedule import learning_rate, weight_decay
from unmask.engine.settings import TrainSettings
from unmask.errors import UserError


def mae_rate(epoch: float, *, lr=1e-3, minimum=0.0, warmup=5.0, epochs=20.0) -> float:
    """The rule of the MAE dossier, written out."""
    if epoch < warmup:
        return lr * epoch / warmup
    return minimum + (lr - minimum) * 0.5 * (1 + math.cos(math.pi * (epoch - warmup) / (epochs - warmup)))


@pytest.mark.parametrize("step", [0, 1, 34, 35, 36, 77, 139])
def test_rate_in_every_iteration_is_that_of_the_fractional_epoch(step):
    settings = TrainSettings(epochs=20, warmup_epochs=5, lr=1e-3)
    assert learning_rate(settings, step, 140, 7) == pytest.approx(mae_rate(step / 7), rel=1e-12)


def test_steps_alone_follow_the_same_rule():
    settings = TrainSettings(steps=140, warmup_steps=35, lr=1e-3, min_lr=1e-5)
    assert learning_rate(settings, 70, 140) == pytest.approx(mae_rate(10, minimum=1e-5), rel=1e-12)


def test_base_lr_is_scaled_by_the_batch_and_lr_wins():
    assert TrainSettings(base_lr=1.5e-4, batch_size=4096).peak_lr == pytest.approx(2.4e-3)
    assert TrainSettings(base_lr=1.5e-4, batch_size=4096, lr=0.1).peak_lr == 0.1


def test_warm_up_starts_at_its_own_rate():
    settings = TrainSettings(steps=10, warmup_steps=4, warmup_lr=0.2, lr=1.0, schedule="constant")
    assert [round(learning_rate(settings, s, 10), 3) for s in range(6)] == [0.2, 0.4, 0.6, 0.8, 1.0, 1.0]


def test_milestones_are_shares_below_one_and_epochs_otherwise():
    shares = TrainSettings(steps=100, lr=1.0, schedule="multistep", milestones=[0.5, 0.75])
    assert [learning_rate(shares, s, 100) for s in (49, 50, 75)] == pytest.approx([1.0, 0.1, 0.01])
    epochs = TrainSettings(epochs=10, lr=1.0, schedule="multistep", milestones=[7], gamma=0.5)
    assert [learning_rate(epochs, s, 100, 10) for s in (69, 70)] == [1.0, 0.5]


def test_weight_decay_follows_half_a_cosine():
    settings = TrainSettings(weight_decay=0.04, weight_decay_end=0.4)
    assert [weight_decay(settings, s, 100) for s in (0, 50, 100)] == pytest.approx([0.04, 0.22, 0.4])
    assert weight_decay(TrainSettings(weight_decay=0.04), 50, 100) == 0.04


def test_steps_win_over_epochs_and_one_of_them_is_needed():
    assert TrainSettings(steps=7, epochs=3).total_steps(10) == 7
    assert TrainSettings(epochs=2.5).total_steps(10) == 25
    with pytest.raises(UserError, match="how long"):
        TrainSettings().total_steps(10)
    with pytest.raises(UserError, match="unknown length"):
        TrainSettings(epochs=2).total_steps(None)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"lrr": 1}, "did you mean lr"),
        ({"trackers": ["tensorbord"]}, "did you mean tensorboard"),
        ({"accumulate": 3}, "does not divide batch_size=64"),
        ({"betas": [0.9, 1.0]}, "must lie in"),
        ({"milestones": [3, 2]}, "rising"),
        ({"steps": 0}, "greater than or equal to 1"),
    ],
)
def test_wrong_settings_are_told_in_one_line(options, words):
    with pytest.raises(UserError, match=words) as error:
        validated(TrainSettings, options, where="train")
    assert "\n" not in str(error.value)


def test_resolved_settings_have_every_interval_as_a_number():
    settings = TrainSettings(epochs=4, save_every=0).resolved(50)
    assert (settings.steps, settings.save_every, settings.preview_every, settings.probe_every) == (200, 0, 50, 40)
