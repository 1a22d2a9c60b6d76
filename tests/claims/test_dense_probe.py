"""The dense probe: what a patch's class is, that the classifier finds the minimum, and that it reads street scenes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from unmask.backbones import build
from unmask.claims import cost, materials
from unmask.claims.claim import Cost
from unmask.claims.dense import UNLABELLED, dense, fit_softmax, patch_classes, read_scenes, tiles
from unmask.contracts import Preprocessing
from unmask.errors import UserError

HERE = Path(__file__).resolve()
DATA = HERE.parents[3] / "shared" / "data"
needs_scenes = pytest.mark.skipif(not (DATA / materials.SCENES).is_file(), reason=f"{DATA} is absent")


def test_tiles_keep_every_pixel_in_reading_order() -> None:
    frame = torch.arange(192 * 256).reshape(1, 1, 192, 256)
    cut = tiles(frame)
    assert cut.shape == (12, 1, 64, 64)
    rows = [torch.cat(list(cut[4 * r : 4 * r + 4]), dim=2) for r in range(3)]
    assert torch.equal(torch.cat(rows, dim=1), frame[0])


def test_a_patch_has_the_class_of_most_of_its_pixels_and_the_lowest_among_equals() -> None:
    label = torch.tensor([[[3, 3, 7, 7], [3, UNLABELLED, 2, 2]]])
    assert patch_classes(label, (2, 2)).tolist() == [[3, 2]]


def test_the_classifier_is_the_minimum_that_scikit_learn_finds() -> None:
    linear = pytest.importorskip("sklearn.linear_model")
    random = torch.Generator().manual_seed(0)
    x = torch.randn(300, 5, generator=random)
    y = (x @ torch.randn(5, 3, generator=random) + torch.randn(300, 3, generator=random)).argmax(dim=1)
    weight, bias = fit_softmax(x, y, 3, decay=1e-2, iterations=200)
    theirs = linear.LogisticRegression(C=1 / (300 * 1e-2), tol=1e-8, max_iter=1000).fit(x.numpy(), y.numpy())
    ours = (weight - weight.mean(dim=1, keepdim=True)).T.numpy()
    assert np.allclose(ours, theirs.coef_ - theirs.coef_.mean(axis=0), atol=2e-3)
    assert np.allclose((bias - bias.mean()).numpy(), theirs.intercept_ - theirs.intercept_.mean(), atol=2e-3)


@needs_scenes
def test_the_scenes_are_twelve_tiles_a_frame_with_eleven_classes_and_unlabelled() -> None:
    scenes = read_scenes(DATA / materials.SCENES, "test")
    assert scenes.image.shape == (480, 3, 64, 64)
    assert scenes.image.dtype == torch.uint8
    assert scenes.label.shape == (480, 64, 64)
    assert set(scenes.label.unique().tolist()) == set(range(12))


@pytest.mark.slow
@needs_scenes
def test_the_dense_probe_of_a_random_network_lies_between_chance_and_perfect() -> None:
    torch.manual_seed(0)
    encoder = build("vit_nano_patch8", image_size=64, embed_dim=32, depth=1, num_heads=2).eval()
    encoder.preprocessing = Preprocessing(image_size=(64, 64))
    found = dense(encoder, DATA / materials.SCENES, samples=5000, iterations=20)
    assert 0.03 < found["miou"] < 0.6
    assert len(found["per_class"]) == 11


def test_an_encoder_without_colour_is_refused() -> None:
    encoder = build("vit_nano_patch8", image_size=64, embed_dim=32, depth=1, num_heads=2)
    encoder.preprocessing = Preprocessing((0.5,), (0.5,), (64, 64), 1)
    if not (DATA / materials.SCENES).is_file():
        pytest.skip(f"{DATA} is absent")
    with pytest.raises(UserError, match="colour"):
        dense(encoder, DATA / materials.SCENES)


@needs_scenes
def test_joined_sets_are_one_parquet_of_their_training_images(tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    path = materials.joined(["grocery96", "camvid"], DATA, tmp_path)
    written = Path(path).stat().st_mtime_ns
    table = pq.read_table(path)
    assert table.num_rows == 1227 + 120
    assert table.column_names == ["image"]
    assert materials.joined(["grocery96", "camvid"], DATA, tmp_path) == path
    assert Path(path).stat().st_mtime_ns == written, "written once"


def test_cost_is_measured_once_and_drawn(tmp_path: Path) -> None:
    options = {"name": "vit_nano_patch8", "embed_dim": 32, "depth": 1, "num_heads": 2}
    wanted = Cost(sides=[16, 32], backbones={"ViT": options}, repeats=1)
    found = cost.cost(wanted, tmp_path, lambda _: None)
    assert all(t > 0 for t in found["milliseconds"]["ViT"])
    assert cost.cost(wanted, tmp_path, lambda _: pytest.fail("measured again")) == found
    assert b"<svg" in cost.cost_figure(found, tmp_path / "cost.svg").read_bytes()
