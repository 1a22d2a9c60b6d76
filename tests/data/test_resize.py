from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

import unmask.data as data
from unmask.data.crops import flipped, random_boxes, shifted
from unmask.data.resize import Window, centre_crop, crop_windows, resized_crop, weights
from unmask.draw import Replay, Seeded

MODES = {"bicubic": v2.InterpolationMode.BICUBIC, "bilinear": v2.InterpolationMode.BILINEAR}


@pytest.fixture(scope="module")
def photograph() -> Tensor:
    """A real photograph, uint8 ``[3, 427, 640]``."""
    sklearn = pytest.importorskip("sklearn.datasets")
    return torch.from_numpy(sklearn.load_sample_image("china.jpg").copy()).permute(2, 0, 1)


def ragged(photograph: Tensor) -> tuple[Tensor, Tensor]:
    """Four photographs of different sizes, padded, and their sizes."""
    parts = [photograph, photograph[:, 40:300, 100:620], photograph[:, :120, :90], photograph[:, 100:, 200:555]]
    images = torch.zeros(4, 3, 427, 640, dtype=torch.uint8)
    for place, part in zip(images, parts, strict=True):
        place[:, : part.shape[1], : part.shape[2]] = part
    return images, torch.tensor([p.shape[1:] for p in parts])


@pytest.mark.parametrize("size", [(224, 224), (32, 32), (96, 160), (300, 41)])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("kind", [torch.uint8, torch.float32])
@pytest.mark.parametrize("method", ["matrices", "kernel"])
def test_a_batch_of_crops_equals_torchvisions_antialiased_resize(
    photograph: Tensor, size: tuple[int, int], interpolation: str, kind: torch.dtype, method: str
) -> None:
    images, sizes = ragged(photograph)
    boxes = random_boxes(sizes, Seeded(3), (0.05, 1.0), (3 / 4, 4 / 3))
    images = images.to(kind)
    found = resized_crop(images, boxes, size, interpolation, method=method) / 255
    for image, box, ours in zip(images, boxes.tolist(), found, strict=True):
        theirs = F.resized_crop(image, *box, list(size), interpolation=MODES[interpolation], antialias=True) / 255
        difference = (ours - theirs).abs()
        if kind == torch.float32:
            assert difference.max() < 1e-4
        elif method == "kernel":
            assert difference.max() == 0
        else:  # for uint8, torchvision rounds between its two passes and at the end; the matrices do not round
            assert difference.mean() < 2e-3
            assert (difference > 1e-2).float().mean() < 5e-3


def test_the_two_methods_agree_in_float(photograph: Tensor) -> None:
    images, sizes = ragged(photograph)
    images = images.to(torch.float32)
    boxes = random_boxes(sizes, Seeded(1), (0.2, 1.0), (3 / 4, 4 / 3))
    first, second = (resized_crop(images, boxes, (64, 48), method=m) for m in ("matrices", "kernel"))
    torch.testing.assert_close(first, second, atol=0.02, rtol=0)


@pytest.mark.parametrize("share", [1.0, 0.875])
@pytest.mark.parametrize("method", ["matrices", "kernel"])
def test_the_centre_crop_equals_torchvisions(photograph: Tensor, share: float, method: str) -> None:
    images, sizes = ragged(photograph)
    found = centre_crop(images, sizes, (112, 112), share, method=method) / 255
    reference = v2.Compose([v2.Resize(int(112 / share), MODES["bicubic"], antialias=True), v2.CenterCrop(112)])
    for image, (height, width), ours in zip(images, sizes.tolist(), found, strict=True):
        theirs = reference(image[:, :height, :width].to(torch.float32) / 255).clamp(0, 1)
        assert (ours - theirs).abs().max() < (1e-4 if method == "matrices" else 1e-2)


@settings(max_examples=60, deadline=None)
@given(
    start=st.floats(0, 20),
    length=st.integers(1, 40),
    out=st.integers(1, 50),
    interpolation=st.sampled_from(["bicubic", "bilinear"]),
)
def test_weights_sum_to_one_and_stay_inside_the_box(start: float, length: int, out: int, interpolation: str) -> None:
    low = torch.tensor([float(int(start))])
    found = weights(Window(low, torch.tensor([length / out]), low, low + length), 64, out, interpolation)
    torch.testing.assert_close(found.sum(dim=2), torch.ones(1, out))
    outside = torch.ones(64, dtype=torch.bool)
    outside[int(start) : int(start) + length] = False
    assert found[:, :, outside].abs().max() == 0 if outside.any() else True


def test_a_whole_image_at_its_own_size_is_itself() -> None:
    images = torch.randint(0, 256, (3, 2, 20, 30), dtype=torch.uint8)
    boxes = torch.tensor([[0, 0, 20, 30]] * 3)
    rows, columns = crop_windows(boxes, (20, 30))
    torch.testing.assert_close(weights(rows, 20, 20, "bicubic")[0], torch.eye(20))
    assert (resized_crop(images, boxes, (20, 30)) == images).all()


@settings(max_examples=80, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    height=st.integers(1, 400),
    width=st.integers(1, 400),
    low=st.floats(0.01, 1),
    high=st.floats(0.01, 1),
    ratio=st.floats(0.2, 1),
)
def test_crop_boxes_lie_inside_their_images(
    seed: int, height: int, width: int, low: float, high: float, ratio: float
) -> None:
    sizes = torch.tensor([[height, width], [width, height], [height, height]] * 4)
    boxes = random_boxes(sizes, Seeded(seed), (min(low, high), max(low, high)), (ratio, 1 / ratio))
    assert (boxes[:, :2] >= 0).all()
    assert (boxes[:, 2:] >= 1).all()
    assert (boxes[:, :2] + boxes[:, 2:] <= sizes).all()


def test_the_largest_draws_stay_inside() -> None:
    sizes = torch.tensor([[37, 5000], [5000, 37]])
    top = torch.tensor(1 - 2.0**-24)
    draw = Replay({"crop.shape": torch.full((2, 10, 2), float(top)), "crop.place": torch.full((2, 2), float(top))})
    boxes = random_boxes(sizes, draw, (0.2, 1.0), (3 / 4, 4 / 3))
    assert (boxes[:, :2] + boxes[:, 2:] <= sizes).all()


def test_crop_areas_and_ratios_are_distributed_as_torchvisions() -> None:
    sizes = torch.tensor([[375, 500]] * 4000)
    boxes = random_boxes(sizes, Seeded(0), (0.2, 1.0), (3 / 4, 4 / 3)).double()
    torch.manual_seed(0)
    reference = v2.RandomResizedCrop(224, scale=(0.2, 1.0))
    image = torch.empty(3, 375, 500)
    theirs = [reference.make_params([image]) for _ in range(4000)]
    for name, ours in zip(("top", "left", "height", "width"), boxes.unbind(1), strict=True):
        values = torch.tensor([p[name] for p in theirs], dtype=torch.float64)
        spread = values.std() / 4000**0.5
        assert abs(ours.mean() - values.mean()) < 5 * spread
        assert abs(ours.std() - values.std()) < 5 * spread


def test_shifts_are_crops_of_the_reflected_image() -> None:
    images = torch.randint(0, 256, (8, 3, 12, 10)).to(torch.float32)
    found = shifted(images, Seeded(5), 3)
    padded = torch.nn.functional.pad(images, (3, 3, 3, 3), mode="reflect")
    offsets = Seeded(5).integers("shift", -3, 4, (8, 2)) + 3
    for image, ours, (top, left) in zip(padded, found, offsets.tolist(), strict=True):
        assert (image[:, top : top + 12, left : left + 10] == ours).all()


def test_flips_happen_at_their_rate_and_mirror() -> None:
    images = torch.arange(5.0).expand(2000, 1, 2, 5)
    found = flipped(images, Seeded(0), 0.3)
    mirrored = (found[:, 0, 0, 0] == 4).float()
    assert abs(mirrored.mean() - 0.3) < 0.05
    assert (flipped(images, Seeded(0), 1.0) == images.flip(-1)).all()
    assert flipped(images, Seeded(0), 0.0) is images


def test_settings_of_the_interpolation_reach_the_crop(photograph: Tensor) -> None:
    images, sizes = ragged(photograph)
    batch = {"image": images, "size": sizes, "index": torch.arange(4)}
    from unmask.contracts import Preprocessing
    from unmask.data.transforms import Transform

    results = []
    for name in ("bicubic", "bilinear"):
        made = Transform(
            data.DataSettings(image_size=32, interpolation=name),
            Preprocessing(image_size=(32, 32), interpolation=name),
            channels=3,
            one_size=False,
            full_range=255.0,
        )
        results.append(made(batch, Seeded(0))["image"])
    assert (results[0] - results[1]).abs().max() > 0.05
