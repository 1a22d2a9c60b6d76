import io

import numpy as np
import pytest
import torch
from PIL import Image

from unmask.data.bicubic import resize_bicubic
from unmask.data.degradations import (
    RealWorld,
    Stage,
    blur_kernels,
    filtered,
    gaussian_kernels,
    jpeg,
    poisson,
    real_world,
    sinc_kernels,
    unsharp,
)
from unmask.data.opening import open_source
from unmask.data.restoration import RestorationBatches, RestorationSettings, evaluation_pair, turned
from unmask.draw import Scoped, Seeded
from unmask.errors import UserError


def smooth(height: int = 48, width: int = 48, count: int = 2) -> torch.Tensor:
    y, x = torch.meshgrid(torch.linspace(0, 6, height), torch.linspace(0, 9, width), indexing="ij")
    one = 0.5 + 0.2 * torch.stack((x.sin(), (x + y).cos(), (x * y / 4).sin()))
    return torch.stack([one.roll(5 * i, dims=-1) for i in range(count)])


@pytest.fixture
def folder(tmp_path):
    rng = np.random.default_rng(0)
    for i, (height, width) in enumerate([(40, 60), (70, 50), (33, 80), (20, 24)]):
        Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(tmp_path / f"{i}.png")
    return tmp_path


def batches(folder, scale=2, size=(32, 32), batch_size=4, **options) -> RestorationBatches:
    settings = RestorationSettings(uri=str(folder), cache=False, **options)
    return RestorationBatches(open_source(folder), settings, batch_size, 0, scale=scale, size=size)


# --- bicubic ---


@pytest.mark.parametrize("scale", [0.25, 1 / 3, 0.5, 2, 3, 4])
def test_bicubic_keeps_a_constant_and_rounds_sizes_up(scale):
    images = torch.full((1, 2, 17, 10), 0.3)
    out = resize_bicubic(images, scale)
    assert out.shape == (1, 2, -(-17 * scale // 1), -(-10 * scale // 1))
    assert torch.allclose(out, torch.full_like(out, 0.3), atol=1e-6)


def test_bicubic_there_and_back_keeps_a_smooth_picture():
    images = smooth()
    assert (resize_bicubic(resize_bicubic(images, 2), 0.5) - images).abs().mean() < 0.003


# --- JPEG, noise, blur ---


@pytest.mark.parametrize("quality", [10, 40, 90])
@pytest.mark.parametrize("channels", [1, 3])
def test_our_jpeg_is_near_to_what_a_file_leaves(quality, channels):
    images = smooth(64, 64, 1)[:, :channels]
    ours = jpeg(images, torch.tensor([quality]))
    pixels = (images[0].permute(1, 2, 0) * 255).round().byte().numpy()
    held = io.BytesIO()
    Image.fromarray(pixels[..., 0] if channels == 1 else pixels).save(held, format="JPEG", quality=quality)
    read = np.asarray(Image.open(held)).astype(np.float32).reshape(64, 64, channels) / 255
    theirs = torch.from_numpy(read).permute(2, 0, 1)
    lost = (theirs - images[0]).square().mean()
    assert (ours[0] - theirs).square().mean() < 0.35 * lost + 1e-5
    assert jpeg(images[..., :37, :21], torch.tensor([quality])).shape == (1, channels, 37, 21)


def test_poisson_counts_have_the_mean_and_variance_of_their_rate():
    rate = torch.tensor([0.0, 0.4, 5.0, 200.0])[:, None]
    counts = poisson(Seeded(0).uniform("u", (4, 20000)), rate)
    assert (counts == counts.round()).all()
    assert torch.allclose(counts.mean(1), rate[:, 0], rtol=0.03)
    assert torch.allclose(counts.var(1), rate[:, 0], rtol=0.06)


def test_blur_kernels_sum_to_one_and_stay_within_their_side():
    kernels = blur_kernels(Seeded(0), Stage(), 64)
    assert kernels.shape == (64, 21, 21)
    assert torch.allclose(kernels.sum((1, 2)), torch.ones(64), atol=1e-4)
    side, one = torch.tensor([7, 21]), torch.ones(2)
    small, large = gaussian_kernels(side, 3 * one, one, 0 * one, one, torch.tensor([False, True]))
    assert (small > 0).sum() == 49
    assert (large > 0).sum() == 441
    ring = sinc_kernels(torch.tensor([21]), torch.tensor([1.5]))[0]
    assert ring.min() < 0
    assert torch.allclose(ring, ring.flip(0), atol=1e-6)


def test_a_filter_of_one_pixel_changes_nothing():
    kernel = torch.zeros(2, 21, 21)
    kernel[:, 10, 10] = 1
    assert torch.allclose(filtered(smooth(), kernel), smooth(), atol=1e-6)


def test_unsharp_masking_sharpens_edges_and_leaves_flat_places():
    step = torch.zeros(1, 1, 64, 64)
    step[..., 32:] = 0.5
    step = step + 0.25
    sharp = unsharp(step)
    assert sharp[..., 33].mean() > 0.75
    assert torch.allclose(sharp[..., :4], step[..., :4], atol=0.01)
    flat = torch.full((1, 3, 64, 64), 0.4)
    assert torch.allclose(unsharp(flat), flat, atol=1e-5)


@pytest.mark.parametrize("scale", [2, 4])
def test_a_real_world_degradation_belongs_to_its_sample(scale):
    high = smooth(48, 64, 3)
    low = real_world(high, Seeded(0, 5), RealWorld(), scale)
    assert low.shape == (3, 3, 48 // scale, 64 // scale)
    assert ((low * 255) - (low * 255).round()).abs().max() < 1e-3
    alone = real_world(high[1:2], Seeded(0, 5, first_sample=1), RealWorld(), scale)
    assert torch.allclose(alone, low[1:2], atol=1 / 255 + 1e-6)
    assert not torch.equal(low, real_world(high, Seeded(0, 6), RealWorld(), scale))


# --- pairs ---


def test_crops_are_native_pixels_and_a_function_of_the_step(folder):
    made = batches(folder)
    first = [next(made.iterate(step))["image"] for step in (0, 3)]
    stream = made.iterate(0)
    ahead = [next(stream)["image"] for _ in range(4)]
    assert torch.equal(ahead[0], first[0])
    assert torch.equal(ahead[3], first[1])
    whole = {i: np.asarray(Image.open(folder / f"{i}.png")) for i in range(4)}
    raw = next(made.iterate(1))
    for crop, number in zip(raw["image"], raw["index"].tolist(), strict=True):
        if number == 3:  # smaller than a crop: mirrored
            continue
        patch = crop.permute(1, 2, 0).numpy()
        views = np.lib.stride_tricks.sliding_window_view(whole[number], (32, 32, 3))[:, :, 0]
        assert (views == patch).all((-1, -2, -3)).any()


def test_two_processes_read_what_one_would(folder):
    made = batches(folder)
    one = next(made.iterate(2))["image"]
    two = torch.cat([next(made.iterate(2, rank=r, world=2))["image"] for r in range(2)])
    assert torch.equal(one, two)


def test_the_low_picture_is_the_high_one_degraded(folder):
    made = batches(folder)
    batch = made.transform(next(made.iterate()), Scoped(Seeded(0), "data"))
    wanted = (resize_bicubic(batch["image"], 0.5).clamp(0, 1) * 255).round() / 255
    assert torch.equal(batch["low"], wanted)
    same = batches(folder, scale=1, degradation="noise", sigma=50)
    noisy = same.transform(next(same.iterate()), Seeded(0))
    assert float((noisy["low"] - noisy["image"]).std() * 255) == pytest.approx(50, rel=0.03)
    for degradation in ("jpeg", "real"):
        other = batches(folder, scale=1, degradation=degradation)
        pair = other.transform(next(other.iterate()), Seeded(0))
        assert pair["low"].shape == pair["image"].shape
        assert ("sharp" in pair) == (degradation == "real")


def test_turning_mirrors_and_transposes_and_loses_nothing():
    images = torch.rand(64, 1, 8, 8)
    out = turned(images, Seeded(0))
    assert torch.equal(out.flatten(1).sort().values, images.flatten(1).sort().values)
    same = (out == images).flatten(1).all(1).float().mean()
    assert 0.02 < same < 0.3


def test_pictures_to_measure_on_are_cut_to_multiples_of_the_scale(folder):
    pixels = np.asarray(Image.open(folder / "2.png"))
    high, low = evaluation_pair(pixels, RestorationSettings(), 4, 3, Seeded(0))
    assert (high.shape[2:], low.shape[2:]) == ((32, 80), (8, 20))
    high, low = evaluation_pair(pixels, RestorationSettings(eval_crop=16), 2, 1, Seeded(0))
    assert (high.shape, low.shape) == ((1, 1, 16, 16), (1, 1, 8, 8))
    high, low = evaluation_pair(pixels, RestorationSettings(degradation="jpeg", quality=10), 1, 3, Seeded(0))
    assert 0 < (high - low).abs().mean() < 0.5


def test_data_that_do_not_fit_are_told_in_one_line(folder):
    for words, act in {
        "more than the 4 pictures": lambda: batches(folder, batch_size=9),
        "no multiple of scale=3": lambda: batches(folder, scale=3),
        "keeps the size": lambda: batches(folder, degradation="noise"),
        "needs scale=2": lambda: batches(folder, scale=1, degradation="bicubic"),
    }.items():
        with pytest.raises(UserError, match=words):
            act()
    for options in ({"sigma": 300}, {"quality": 0}, {"image_size": 4}, {"real": {"first": {"kinds": [1.0]}}}):
        with pytest.raises(ValueError, match=r"must|takes"):
            RestorationSettings(**options)
