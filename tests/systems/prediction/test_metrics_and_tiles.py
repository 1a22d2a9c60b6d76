"""What predictions are measured by, and pictures of any size through networks that want multiples."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from unmask.errors import UserError
from unmask.systems.prediction.metrics import MeanIoU, PanopticQuality, luminance, psnr, ssim
from unmask.systems.prediction.tiling import blended, check_side, check_tiles, in_tiles, padded_to


def test_mean_iou_leaves_out_ignored_pixels_and_absent_classes():
    true = torch.tensor([[0, 0, 1, 1], [255, -1, 1, 1]])
    found = torch.tensor([[0, 1, 1, 1], [0, 0, 1, 0]])
    metric = MeanIoU(3)
    metric.update(found, true)
    out = metric.compute()
    assert out["iou"] == pytest.approx([100 / 3, 60, None])
    assert out["miou"] == pytest.approx((100 / 3 + 60) / 2)
    assert out["pixel_accuracy"] == pytest.approx(100 * 4 / 6)


def test_mean_iou_of_parts_is_that_of_the_whole():
    generator = torch.Generator().manual_seed(0)
    true, found = (torch.randint(-1, 5, (6, 20, 20), generator=generator) for _ in range(2))
    whole, parts = MeanIoU(5), MeanIoU(5)
    whole.update(found, true)
    for one, two in zip(found, true, strict=True):
        parts.update(one, two)
    assert whole.compute() == parts.compute()


def scene(seed: int) -> tuple[torch.Tensor, dict[int, int]]:
    generator = np.random.default_rng(seed)
    ids = np.ones((24, 24), dtype=np.int64)
    for number in range(2, 8):
        top, left = generator.integers(0, 18, 2)
        ids[top : top + 7, left : left + 7] = number
    present = np.unique(ids).tolist()
    return torch.from_numpy(ids), {i: 0 if i == 1 else 1 + i % 2 for i in present}


def moved(ids: torch.Tensor, by: int) -> torch.Tensor:
    return ids.roll(by, 1)


@pytest.mark.slow  # torchmetrics takes seconds to import
def test_mean_iou_equals_torchmetrics():
    segmentation = pytest.importorskip("torchmetrics.classification")
    generator = torch.Generator().manual_seed(0)
    true, found = (torch.randint(0, 5, (6, 20, 20), generator=generator) for _ in range(2))
    metric, theirs = MeanIoU(5), segmentation.MulticlassJaccardIndex(5)
    metric.update(found, true)
    assert metric.compute()["miou"] / 100 == pytest.approx(float(theirs(found, true)), abs=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_panoptic_quality_equals_torchmetrics_where_there_are_no_crowds(seed):
    detection = pytest.importorskip("torchmetrics.detection")
    true, labels = scene(seed)
    found = moved(true, 1)
    metric = PanopticQuality(3, things=(1, 2))
    metric.update(found, labels, true, labels)
    theirs = detection.PanopticQuality(things={1, 2}, stuffs={0})

    def pairs(ids: torch.Tensor) -> torch.Tensor:
        table = torch.tensor([labels.get(i, 0) for i in range(8)])
        return torch.stack((table[ids], torch.where(table[ids] == 0, 0, ids)), -1)[None]

    theirs.update(pairs(found), pairs(true))
    assert metric.compute()["pq"] / 100 == pytest.approx(float(theirs.compute()), abs=1e-6)


def test_a_perfect_answer_has_a_quality_of_100():
    true, labels = scene(0)
    metric = PanopticQuality(3, things=(1, 2))
    metric.update(true, labels, true, labels)
    out = metric.compute()
    assert out["pq"] == out["sq"] == out["rq"] == out["pq_things"] == out["pq_stuff"] == 100


def test_void_and_crowds_excuse_a_prediction():
    true = torch.zeros(10, 10, dtype=torch.int64)
    true[:, 5:] = 9
    found = torch.zeros_like(true)
    found[:, :3], found[:, 6:] = 1, 2
    metric = PanopticQuality(2, things=(1,))
    metric.update(found, {1: 1, 2: 1}, true, {9: 1}, crowds=[9])
    assert metric.compute()["pq_classes"] == [None, None]
    strict = PanopticQuality(2, things=(1,))
    strict.update(found, {1: 1, 2: 1}, true, {9: 1})
    assert strict.compute()["pq_classes"][1] == pytest.approx(80)  # intersection 40 of a union of 50


def test_psnr_and_ssim_are_those_of_scikit_image():
    metrics = pytest.importorskip("skimage.metrics")
    generator = torch.Generator().manual_seed(0)
    true = torch.rand(1, 3, 40, 50, generator=generator)
    found = (true + 0.1 * torch.randn(true.shape, generator=generator)).clamp(0, 1)
    rounded = [(t * 255).round().numpy()[0].transpose(1, 2, 0).astype(np.float64) for t in (true, found)]
    assert float(psnr(found, true, luma=False)) == pytest.approx(
        metrics.peak_signal_noise_ratio(*rounded, data_range=255), abs=1e-9
    )
    theirs = metrics.structural_similarity(
        *rounded,
        data_range=255,
        channel_axis=2,
        gaussian_weights=True,
        sigma=1.5,
        use_sample_covariance=False,
        truncate=3.5,
    )
    assert float(ssim(found, true, luma=False)) == pytest.approx(theirs, abs=1e-9)


def test_luminance_is_16_for_black_and_235_for_white():
    ends = luminance(torch.tensor([0.0, 255.0])[:, None, None, None].expand(-1, 3, 2, 2))
    assert ends[:, 0, 0, 0].tolist() == pytest.approx([16, 235], abs=1e-4)


def test_borders_are_cut_and_what_is_too_small_is_said():
    true, found = torch.zeros(2, 1, 20, 20), torch.zeros(2, 1, 20, 20)
    found[..., 0] = 1
    assert torch.isinf(psnr(found, true, border=2)).all()
    assert psnr(found[0], true[0]).ndim == 0
    with pytest.raises(UserError, match="border of 10"):
        psnr(found, true, border=10)
    with pytest.raises(UserError, match="11 x 11"):
        ssim(found, true, border=5)


# --- any size ---


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 30), st.integers(1, 30), st.sampled_from([1, 4, 16]))
def test_padding_reaches_the_multiple_and_keeps_the_picture(height, width, multiple):
    image = torch.rand(1, 2, height, width)
    for mode in ("reflect", "replicate", "zero"):
        out = padded_to(image, multiple, mode=mode)
        assert all(s % multiple == 0 for s in out.shape[2:])
        assert torch.equal(out[..., :height, :width], image)
        assert torch.isfinite(out).all()


def test_reflection_goes_on_where_the_side_is_shorter_than_the_padding():
    row = torch.arange(3.0).reshape(1, 1, 1, 3)
    assert padded_to(row, 8)[0, 0, 0].tolist() == [0, 1, 2, 1, 0, 1, 2, 1]
    assert torch.equal(padded_to(row, 8)[..., 7, :], padded_to(row, 8)[..., 0, :])


def doubled(x: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.interpolate(x, scale_factor=2, mode="nearest")


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 6), st.integers(1, 6), st.integers(1, 3), st.integers(0, 2), st.integers(1, 5))
def test_tiles_of_a_pointwise_network_are_the_whole(rows, columns, tile, overlap, batch):
    image = torch.rand(2, 3, 4 * rows, 4 * columns)
    out = in_tiles(doubled, image, tile=4 * tile, overlap=4 * overlap, scale=2, batch=batch)
    assert torch.equal(out, doubled(image))


def test_an_overlap_as_wide_as_a_network_sees_makes_tiles_exact():
    convolution = torch.nn.Conv2d(1, 1, 5, padding=2).eval()
    image = torch.rand(1, 1, 24, 40)
    whole = convolution(image)
    torch.testing.assert_close(in_tiles(convolution, image, tile=8, overlap=4), whole.detach())
    assert not torch.allclose(in_tiles(convolution, image, tile=8, overlap=0), whole)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 50), st.integers(1, 50), st.sampled_from([0.0, 0.25, 0.5]))
def test_blended_tiles_of_a_pointwise_network_are_the_whole(height, width, overlap):
    image = torch.rand(1, 2, height, width)
    seen = []

    def run(x: torch.Tensor) -> torch.Tensor:
        seen.append(tuple(x.shape[2:]))
        return 2 * x

    torch.testing.assert_close(blended(run, image, tile=(16, 20), overlap=overlap, batch=3), 2 * image)
    assert set(seen) == {(16, 20)}


def test_tiles_that_do_not_fit_the_window_are_refused_with_one_that_does():
    check_tiles(32, 16, 16)
    with pytest.raises(UserError, match=r"tile=30 .* use tile=32"):
        check_tiles(30, 16, 16)
    with pytest.raises(UserError, match="overlap=5"):
        check_tiles(32, 5, 16)
    with pytest.raises(UserError, match=r"a\.png has 1 x 9 pixels"):
        check_side(torch.zeros(1, 3, 9, 1), 2, name="a.png", what="super-resolution")


def test_progress_counts_the_tiles():
    told = []
    in_tiles(doubled, torch.rand(1, 1, 8, 12), tile=4, scale=2, tell=lambda done, count: told.append((done, count)))
    assert told[-1] == (6, 6)
