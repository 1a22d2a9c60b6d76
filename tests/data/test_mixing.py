from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.data import mixup as timm_mixup

from unmask.data.mixing import Mixing, mix, shares, soft_labels
from unmask.draw import Replay, Seeded
from unmask.errors import UserError


class Numbers:
    """numpy's generator as timm asks it, answered from lists; beta draws are looked up by their place."""

    def __init__(self, rand: list, beta: list, randint: list):
        self.answers: dict[str, Iterator] = {"rand": iter(rand), "beta": iter(beta), "randint": iter(randint)}

    def rand(self, size: int | None = None) -> object:
        return next(self.answers["rand"])

    def beta(self, a: float, b: float, size: int | None = None) -> object:
        return next(self.answers["beta"])

    def randint(self, low: int, high: int, size: int | None = None) -> object:
        return next(self.answers["randint"])


def replay(apply: float, switch: float, share: float, box: tuple[float, float]) -> Replay:
    return Replay(
        {
            "mix.apply": torch.tensor([apply]),
            "mix.switch": torch.tensor([switch]),
            "mix.share": torch.tensor([share]),
            "mix.box": torch.tensor([box]),
        }
    )


@pytest.mark.parametrize("switch", [0.9, 0.1])
def test_a_mixed_batch_equals_timms_with_the_same_numbers(switch: float, monkeypatch: pytest.MonkeyPatch) -> None:
    from scipy.special import betaincinv

    images, labels = torch.rand(6, 3, 20, 24), torch.randint(0, 5, (6,))
    alpha = 1.0 if switch < 0.5 else 0.8
    share = float(betaincinv(alpha, alpha, 0.3 + 2.0**-25))
    numbers = Numbers([0.5, switch], [share], [int(0.4 * 20), int(0.9 * 24)])
    monkeypatch.setattr(timm_mixup.np, "random", numbers)
    theirs = timm_mixup.Mixup(0.8, 1.0, prob=1.0, switch_prob=0.5, mode="batch", label_smoothing=0.1, num_classes=5)
    expected, targets = theirs(images.clone(), labels)
    monkeypatch.undo()
    found, soft = mix(images, labels, 5, replay(0.5, switch, 0.3, (0.4, 0.9)), Mixing(partner="reversed"))
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(soft, targets)


@pytest.mark.parametrize("mode", ["elem", "pair"])
def test_each_sample_or_pair_equals_timms_with_the_same_numbers(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    images, labels = torch.rand(6, 3, 16, 16), torch.randint(0, 5, (6,))
    drawn = {f"mix.{n}": torch.rand(6) for n in ("apply", "switch", "share")} | {"mix.box": torch.rand(6, 2)}
    options = Mixing(mode=mode, partner="reversed", probability=0.7)
    share, cut = shares(6, Replay(drawn), options)
    count = 6 if mode == "elem" else 3
    places = [int(v * 16) for i in range(count) if cut[i] for v in drawn["mix.box"][i].tolist()]
    switches = drawn["mix.switch"][:count].numpy()
    lam = np.where(drawn["mix.apply"][:count].numpy() < 0.7, share[:count].numpy(), 0.5)
    numbers = Numbers([switches, drawn["mix.apply"][:count].numpy()], [lam, lam], places)
    monkeypatch.setattr(timm_mixup.np, "random", numbers)
    theirs = timm_mixup.Mixup(0.8, 1.0, prob=0.7, switch_prob=0.5, mode=mode, label_smoothing=0.1, num_classes=5)
    expected, targets = theirs(images.clone(), labels)
    monkeypatch.undo()
    found, soft = mix(images, labels, 5, Replay(drawn), options)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(soft, targets)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 1000),
    mode=st.sampled_from(["batch", "pair", "elem"]),
    mixup=st.sampled_from([0.0, 0.8]),
    cutmix=st.sampled_from([0.0, 1.0]),
)
def test_labels_follow_the_pixels(seed: int, mode: str, mixup: float, cutmix: float) -> None:
    count, classes = 8, 8
    labels = torch.arange(8)
    images = torch.eye(8)[:, :, None, None].expand(8, 8, 12, 12)  # sample i is 1 in channel i alone
    options = Mixing(mode=mode, mixup=mixup, cutmix=cutmix, label_smoothing=0.0)
    found, soft = mix(images, labels, classes, Seeded(seed), options)
    assert found.shape == (count, 8, 12, 12)
    torch.testing.assert_close(soft.sum(dim=1), torch.ones(count))
    torch.testing.assert_close(found.mean(dim=(2, 3)), soft, atol=1e-5, rtol=0)


@pytest.mark.parametrize("mode", ["batch", "pair", "elem"])
def test_two_halves_are_mixed_as_the_whole_is(mode: str) -> None:
    images, labels = torch.rand(8, 3, 10, 10), torch.arange(8) % 4
    whole = mix(images, labels, 4, Seeded(1), Mixing(mode=mode))
    halves = [
        mix(images[i : i + 4], labels[i : i + 4], 4, Seeded(1, first_sample=i), Mixing(mode=mode)) for i in (0, 4)
    ]
    torch.testing.assert_close(torch.cat([h[0] for h in halves]), whole[0])
    torch.testing.assert_close(torch.cat([h[1] for h in halves]), whole[1])


@pytest.mark.parametrize("alpha", [0.2, 0.8, 1.0, 2.0])
def test_shares_are_beta_distributed(alpha: float) -> None:
    share, _ = shares(4000, Seeded(0), Mixing(mode="elem", mixup=alpha, cutmix=0.0))
    expected = np.sqrt(1 / (4 * (2 * alpha + 1)))
    assert abs(float(share.mean()) - 0.5) < 0.03
    assert abs(float(share.std()) - expected) < 0.02


def test_probability_and_switch_are_respected() -> None:
    share, cut = shares(4000, Seeded(0), Mixing(mode="elem", probability=0.3, switch_probability=0.25))
    mixed = share < 1
    assert abs(float(mixed.float().mean()) - 0.3) < 0.03
    assert abs(float(cut[mixed].float().mean()) - 0.25) < 0.05


def test_mixing_switched_off_only_softens_labels() -> None:
    images, labels = torch.rand(3, 1, 4, 4), torch.tensor([0, 1, 2])
    found, soft = mix(images, labels, 4, Seeded(0), Mixing(mixup=0, cutmix=0))
    assert found is images
    torch.testing.assert_close(soft, soft_labels(labels, 4, 0.1))
    torch.testing.assert_close(soft[0], torch.tensor([0.925, 0.025, 0.025, 0.025]))


def test_an_odd_batch_is_one_clear_line() -> None:
    with pytest.raises(UserError, match="even"):
        mix(torch.rand(3, 1, 4, 4), torch.tensor([0, 1, 2]), 4, Seeded(0), Mixing())


def test_the_callers_images_are_not_changed() -> None:
    images = torch.rand(4, 3, 8, 8)
    kept = images.clone()
    for seed in range(6):
        mix(images, torch.arange(4), 4, Seeded(seed), Mixing())
    assert (images == kept).all()
