"""Mixed shapes: every image keeps its ratio, fits the context, and is resampled as torch would."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from unmask import data
from unmask.config import validated
from unmask.data.aspect import AspectBatches, AspectSettings, mirrored, packed
from unmask.draw import Seeded
from unmask.errors import UserError

SHARED = Path(__file__).parents[3] / "shared" / "data"


def batches(folder: Path, *, cell: int = 4, context: int = 64, batch_size: int = 4, **options) -> AspectBatches:
    settings = validated(AspectSettings, {"uri": str(folder), "normalise": "half", **options}, where="data")
    source = data.open(settings.uri, settings.split, columns=settings.columns)
    return AspectBatches(source, settings, batch_size, cell=cell, context=context)


def first(found: AspectBatches, step: int = 0) -> dict:
    return found.transform(next(found.iterate(step)), Seeded(0, step))


@pytest.mark.parametrize("options", [{"augment": "flip"}, {"augment": "none", "enlarge": False}, {"max_ratio": 1.0}])
def test_every_image_fits_the_context_in_whole_cells(photos, options):
    found = batches(photos(6), **options)
    batch = first(found)
    cells = batch["size"] // found.cell
    assert torch.equal(cells * found.cell, batch["size"])
    assert (cells.prod(dim=1) <= found.context).all()
    assert batch["image"].shape[2:] == found.canvas
    assert ((batch["image"] == 0) | found.inside(batch["size"])[:, None]).all()
    assert batch["image"].abs().max() <= 1


def test_the_ratio_of_the_sides_is_kept_as_near_as_cells_allow(photos):
    found = batches(photos(6, 60, 90, ragged=False), cell=1, context=4000, augment="none")
    height, width = first(found)["size"][0].tolist()
    assert width / height == pytest.approx(1.5, rel=0.03)
    assert height * width == pytest.approx(4000, rel=0.05)


def test_long_images_are_cut_to_the_ratio_allowed(photos):
    found = batches(photos(4, 30, 120, ragged=False), max_ratio=2.0, augment="none")
    height, width = (first(found)["size"][0] // 4).tolist()
    assert (height, width) == (5, 11)


def test_a_whole_image_is_resampled_as_torch_does(photos):
    found = batches(photos(4, 64, 64, ragged=False), augment="none")
    raw = next(found.iterate())
    batch = found.transform(raw, Seeded(0))
    assert batch["size"].tolist() == [[32, 32]] * 4
    expected = F.interpolate(raw["image"].float(), size=(32, 32), mode="bicubic", antialias=True).clamp(0, 255)
    assert torch.allclose(batch["image"][:, :, :32, :32], expected / 127.5 - 1, atol=1e-3)


def test_given_shapes_are_picked_at_random_and_again_the_same(photos):
    found = batches(photos(8), sizes=[[32, 32], [24, 40], [40, 24]], augment="crop_flip", crop_scale=[0.5, 1.0])
    seen = {tuple(size) for step in range(6) for size in first(found, step)["size"].tolist()}
    assert seen == {(32, 32), (24, 40), (40, 24)}
    assert torch.equal(first(found, 3)["image"], first(found, 3)["image"])
    assert found.canvas == (40, 40)


def test_a_central_square_is_seen_now_and_then(photos):
    found = batches(photos(4, 60, 90, ragged=False), central=0.5, augment="none")
    seen = {tuple(size) for step in range(8) for size in first(found, step)["size"].tolist()}
    assert len(seen) == 2
    assert (32, 32) in seen


def test_samples_for_looking_are_the_same_every_time(photos):
    found = batches(photos(6), sizes=[[16, 16], [16, 32]])
    assert torch.equal(found.samples(4)["image"], found.samples(4)["image"])


def test_mirroring_stays_within_each_samples_width():
    images = torch.arange(12.0).reshape(2, 1, 1, 6)
    assert mirrored(images, torch.tensor([6, 3])).tolist() == [[[[5, 4, 3, 2, 1, 0]]], [[[8, 7, 6, 9, 10, 11]]]]


@given(st.lists(st.integers(1, 64), max_size=40))
def test_packing_loses_no_sample_and_overfills_no_sequence(counts):
    rows = packed(counts, 64)
    assert sorted(i for row in rows for i in row) == list(range(len(counts)))
    assert all(sum(counts[i] for i in row) <= 64 for row in rows)
    assert len(rows) <= 2 * -(-sum(counts) // 64)  # two rows that are half empty would have been one


def test_shapes_that_do_not_fit_are_one_clear_line(photos):
    folder = photos(6)
    for sizes, message in (
        ([[30, 32]], "multiples of 4, such as 32"),
        ([[40, 40]], "100 tokens, more than the context of 64"),
    ):
        with pytest.raises(UserError, match=message):
            batches(folder, sizes=sizes)
    with pytest.raises(UserError, match="augment=shift is for images of one size"):
        batches(folder, augment="shift")
    with pytest.raises(UserError, match="does not fit into a context"):
        packed([65], 64)


@pytest.mark.skipif(not SHARED.is_dir(), reason="../shared/data is not here")
def test_real_photographs_of_both_orientations_share_a_batch(tmp_path):
    with zipfile.ZipFile(SHARED / "photos.zip") as archive:
        archive.extractall(tmp_path)
    found = batches(tmp_path, batch_size=16, augment="flip")
    sizes = {tuple(s) for s in first(found)["size"].tolist()}
    assert any(h > w for h, w in sizes)
    assert any(w > h for h, w in sizes)
