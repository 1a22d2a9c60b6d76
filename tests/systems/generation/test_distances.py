import math
from pathlib import Path

import numpy as np
import pytest
import torch
from toy_generator import toy

from unmask.data.settings import DataSettings
from unmask.errors import UserError
from unmask.systems.generation import metrics
from unmask.systems.generation.pictures import from_uint8, sheet, to_uint8

SHARED = Path(__file__).parents[4] / "shared" / "data"


def features(n: int, shift: float = 0.0, scale: float = 1.0, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, 4, generator=torch.Generator().manual_seed(seed)).double() * scale + shift


def test_the_distance_of_two_gaussians_is_the_formulas():
    a, b = features(4000), features(4000, shift=1.0, scale=2.0, seed=1)
    assert metrics.frechet_distance(a, a) == pytest.approx(0, abs=1e-6)
    assert metrics.frechet_distance(a, b) == pytest.approx(4 * (1 + 1), rel=0.1)


def test_the_inception_score_counts_the_classes_that_are_told_apart():
    sure = torch.eye(5).repeat(20, 1) * 100
    assert metrics.inception_score(sure) == pytest.approx(5)
    assert metrics.inception_score(torch.zeros(20, 5)) == pytest.approx(1)


def test_precision_is_about_the_made_and_recall_about_the_real():
    real = features(300)
    narrow, wide = features(300, scale=0.2, seed=1), features(300, scale=4.0, seed=2)
    precision, recall = metrics.precision_recall(real, narrow)
    assert precision > 0.95
    assert recall < 0.4
    precision, recall = metrics.precision_recall(real, wide)
    assert precision < 0.5
    assert recall > 0.9
    with pytest.raises(UserError, match="more than 3 images"):
        metrics.precision_recall(real[:2], narrow)


def test_a_generator_is_measured_by_a_network_of_ours_that_says_so(pictures, tmp_path, monkeypatch):
    monkeypatch.setenv("UNMASK_CACHE", str(tmp_path))
    settings = DataSettings(uri=str(pictures), split="train", cache=False)
    own = metrics.own_features
    monkeypatch.setattr(metrics, "own_features", lambda data, **kw: own(data, steps=20, **kw))
    found = metrics.measure_generator(toy(), settings, limit=40, steps=2)
    assert "network of ours" in found["features"]
    assert found["comparable_with_papers"] is False
    assert found["baseline"]["other real images"]["frechet"] < found["frechet"]
    assert len(list((tmp_path / "features").iterdir())) == 1
    assert metrics.measure_generator(toy(), settings, limit=40, steps=2) == found


def test_features_are_trained_without_labels_too(tmp_path, monkeypatch):
    from PIL import Image

    monkeypatch.setenv("UNMASK_CACHE", str(tmp_path / "cache"))
    for number in range(12):
        pixels = np.random.default_rng(number).integers(0, 255, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{number}.png")
    found = metrics.own_features(DataSettings(uri=str(tmp_path), cache=False), steps=3, batch=8)
    assert "four rotations" in found.name
    assert found.of(torch.zeros(5, 3, 8, 8))[0].shape == (5, 128)


def test_an_extractor_that_is_not_at_hand_is_one_clear_line(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(UserError, match="use extractor=own"):
        metrics.open_features(None, extractor="inception")
    with pytest.raises(UserError, match="no feature extractor"):
        metrics.open_features(None, extractor="vgg")


def test_pictures_come_back_from_bytes():
    images = torch.rand(3, 3, 4, 5) * 2 - 1
    assert (from_uint8(to_uint8(images)) - images).abs().max() <= 1 / 127.5
    assert to_uint8(images[:, :1])[0].shape == (4, 5, 3)
    assert to_uint8(torch.full((1, 3, 1, 1), 9.0))[0].tolist() == [[[255, 255, 255]]]


def test_a_sheet_holds_images_of_several_sizes():
    made = [
        np.zeros((4, 6, 3), dtype=np.uint8),
        np.zeros((6, 4, 3), dtype=np.uint8),
        np.zeros((4, 4, 3), dtype=np.uint8),
    ]
    found = sheet(made)
    assert found.shape == (2 * 6 + 2, 2 * 6 + 2, 3)
    assert math.prod(found.shape) - int((found == 255).sum()) == sum(m.size for m in made)


@pytest.mark.slow
@pytest.mark.skipif(not SHARED.is_dir(), reason="../shared/data is not here")
def test_on_real_images_noise_is_farther_than_other_images(tmp_path, monkeypatch):
    monkeypatch.setenv("UNMASK_CACHE", str(tmp_path))
    settings = DataSettings(uri=str(SHARED / "cifar10-train.parquet"), split="train", limit=2000)
    found = metrics.own_features(settings, steps=150)
    images = torch.cat([b["image"] for b in metrics.real_images(settings, 800)])
    near = metrics.distances(images[:400], images[400:], found)
    far = metrics.distances(images[:400], torch.rand_like(images[400:]) * 2 - 1, found)
    assert near["frechet"] < 0.2 * far["frechet"]
    assert near["precision"] > 0.8
