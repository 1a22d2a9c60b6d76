from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from pixels import noise
from timm.data import auto_augment as timm_ops
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from unmask.data import color
from unmask.data import rand_augment as ra
from unmask.data.erasing import erased
from unmask.data.settings import RandAugmentSettings
from unmask.draw import Recorder, Replay, Seeded


@pytest.fixture(scope="module")
def images() -> Tensor:
    """Three photographs, float ``[3, 3, 96, 128]``."""
    sklearn = pytest.importorskip("sklearn.datasets")
    china = sklearn.load_sample_image("china.jpg")
    parts = [china[:96, :128], china[200:296, 300:428], sklearn.load_sample_image("flower.jpg")[150:246, 200:328]]
    return torch.from_numpy(np.stack(parts)).permute(0, 3, 1, 2).float() / 255


def by_timm(image: Tensor, name: str, level: float, sign: float, increasing: bool) -> Tensor:
    """timm's operation on a PIL image, with its sign and its interpolation fixed."""
    real = {"TranslateX": "TranslateXRel", "TranslateY": "TranslateYRel"}.get(name, name)
    if increasing and f"{real}Increasing" in timm_ops.NAME_TO_OP:
        real += "Increasing"
    timm_ops._randomly_negate, kept = (lambda v: sign * v), timm_ops._randomly_negate
    try:
        scale = timm_ops.LEVEL_TO_ARG[real]
        arguments = scale(level * 10, {}) if scale is not None else ()
    finally:
        timm_ops._randomly_negate = kept
    picture = Image.fromarray((image * 255).round().byte().permute(1, 2, 0).numpy())
    options = {"fillcolor": (128, 128, 128), "resample": Image.Resampling.BILINEAR}
    changed = timm_ops.NAME_TO_OP[real](picture, *arguments, **options)
    return torch.from_numpy(np.asarray(changed).copy()).permute(2, 0, 1).float() / 255


@pytest.mark.parametrize("name", ra.OPERATIONS)
@pytest.mark.parametrize("increasing", [True, False])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_every_operation_equals_timms(images: Tensor, name: str, increasing: bool, sign: float) -> None:
    levels = torch.tensor([0.3, 0.55, 0.9])
    fill = torch.full((3,), 128 / 255)
    found = ra.OPERATIONS[name](images, levels, torch.full((3,), sign), increasing, fill)
    assert found.shape == images.shape
    for image, level, ours in zip(images, levels.tolist(), found, strict=True):
        difference = (ours - by_timm(image, name, level, sign, increasing)).abs()
        # Pillow rounds to 8 bits between steps; along the edge of a turned image single pixels may fall either way
        assert difference.mean() < 0.004
        assert (difference > 0.02).float().mean() < 0.01


def test_grey_and_sixteen_bit_images_pass_through_every_operation() -> None:
    grey = torch.from_numpy(noise(15, 1, 20, 16, dtype=np.float32))
    levels, signs = torch.full((15,), 0.7), torch.ones(15)
    for operation in ra.OPERATIONS.values():
        found = operation(grey, levels, signs, True, torch.full((1,), 0.5))
        assert found.shape == grey.shape
        assert found.isfinite().all()
        assert 0 <= found.min() <= found.max() <= 1


def test_rand_augment_changes_each_sample_as_if_it_were_alone(images: Tensor) -> None:
    settings = RandAugmentSettings(layers=3, probability=0.8)
    many = images.repeat(6, 1, 1, 1)
    together = ra.rand_augment(many.clone(), Seeded(4), settings)
    for i in (0, 5, 17):
        alone = ra.rand_augment(many[i : i + 1].clone(), Seeded(4, first_sample=i), settings)
        torch.testing.assert_close(alone[0], together[i])
    assert len({round(float(x.sum()), 3) for x in together}) > 12


def test_magnitudes_may_be_uniform(images: Tensor) -> None:
    draw = Recorder(Seeded(0))
    ra.rand_augment(images, draw, RandAugmentSettings(magnitude_std=float("inf")))
    assert "rand_augment.magnitude" in draw.recorded
    assert draw.recorded["rand_augment.magnitude"].min() >= 0


def test_jitter_equals_torchvisions_with_the_same_strengths(images: Tensor) -> None:
    factors = torch.tensor([0.6, 1.0, 1.4])
    pairs = [
        (color.brightness, F.adjust_brightness),
        (color.contrast, F.adjust_contrast),
        (color.saturation, F.adjust_saturation),
    ]
    for ours, theirs in pairs:
        for image, factor, found in zip(images, factors.tolist(), ours(images, factors), strict=True):
            torch.testing.assert_close(found, theirs(image, factor), atol=2e-3, rtol=0)
    turns = torch.tensor([-0.4, 0.0, 0.2])
    for image, turn, found in zip(images, turns.tolist(), color.hue(images, turns), strict=True):
        torch.testing.assert_close(found, F.adjust_hue(image, turn), atol=1e-4, rtol=0)


def test_jitter_of_strength_zero_changes_nothing(images: Tensor) -> None:
    assert (color.color_jitter(images, Seeded(0), (0, 0, 0, 0)) == images).all()


def test_jitter_takes_every_sample_through_its_own_order(images: Tensor) -> None:
    many = images.repeat(10, 1, 1, 1)
    together = color.color_jitter(many, Seeded(2), (0.4, 0.4, 0.4, 0.1))
    alone = color.color_jitter(many[7:8], Seeded(2, first_sample=7), (0.4, 0.4, 0.4, 0.1))
    torch.testing.assert_close(together[7:8], alone)


def test_erased_rectangles_have_timms_sizes() -> None:
    images = torch.full((3000, 1, 40, 40), 9.0)
    found = erased(images, Seeded(0), 0.25, mode="const")
    share = (found == 0).float().mean(dim=(1, 2, 3))
    hit = share > 0
    assert abs(hit.float().mean() - 0.25) < 0.03
    assert share[hit].min() > 0.015
    assert share[hit].max() < 0.36
    for image in found[hit][:50, 0]:
        rows, columns = (image == 0).any(dim=1).sum(), (image == 0).any(dim=0).sum()
        assert rows * columns == (image == 0).sum()


def test_erasing_never_happens_at_zero_and_fills_with_noise_at_one() -> None:
    images = torch.full((64, 3, 32, 32), 9.0)
    assert (erased(images, Seeded(0), 0.0) == 9).all()
    found = erased(images, Seeded(0), 1.0)
    values = found[found != 9]
    assert abs(values.mean()) < 0.1
    assert abs(values.std() - 1) < 0.1


def test_augmentation_is_replayed_from_its_draws(images: Tensor) -> None:
    draw = Recorder(Seeded(11))
    first = erased(color.color_jitter(images, draw, (0.4, 0.4, 0.4, 0.1)), draw, 0.5)
    again = Replay(draw.recorded)
    assert (erased(color.color_jitter(images, again, (0.4, 0.4, 0.4, 0.1)), again, 0.5) == first).all()
