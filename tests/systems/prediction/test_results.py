"""Results: what is saved can be read again by others' tools, and what is drawn shows the prediction."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image

from unmask.errors import UserError
from unmask.systems.prediction.drawing import palette
from unmask.systems.prediction.restored import most_changed
from unmask.systems.prediction.result import Result
from unmask.systems.prediction.results import Depth, Detections, PictureResult, Segment, Segmentation
from unmask.systems.prediction.segmentation import box_of, run_lengths

PHOTO = np.random.default_rng(0).integers(0, 255, (40, 60, 3), dtype=np.uint8)


def halves() -> np.ndarray:
    map_ = np.zeros((40, 60), dtype=np.int64)
    map_[:, 30:] = 2
    map_[:5] = -1
    return map_


def panoptic() -> Segmentation:
    ids = np.zeros((40, 60), dtype=np.int64)
    ids[10:20, 5:15], ids[25:35, 5:15], ids[:, 40:] = 1, 300, 70000
    segments = [Segment(1, 1, 100, 0.9), Segment(300, 1, 100, 0.8), Segment(70000, 0, 800, 0.7, thing=False)]
    map_ = np.where(ids == 70000, 0, np.where(ids > 0, 1, -1))
    return Segmentation(
        map_, ("wall", "cat"), "panoptic", segments, ids, things=(1,), image=PHOTO, source="photos/a.png"
    )


def test_a_label_map_is_saved_as_an_8_bit_png_whose_values_are_the_classes(tmp_path):
    file = Segmentation(torch.from_numpy(halves()), ("sky", "sea", "sand"), source="a.png").save(tmp_path / "a")
    assert file == tmp_path / "a.json"
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.mode == "L"
        assert np.array_equal(np.asarray(picture), np.where(halves() < 0, 255, halves()))
    said = json.loads(file.read_text())
    assert said["classes"] == ["sky", "sea", "sand"]
    assert [row["class"] for row in said["segments"]] == ["sky", "sand"]
    assert sum(row["area"] for row in said["segments"]) == pytest.approx(35 / 40, abs=1e-3)


def test_more_than_255_classes_need_16_bits(tmp_path):
    map_ = halves()
    map_[-1] = 299
    Segmentation(map_, [str(i) for i in range(300)]).save(tmp_path / "a")
    with Image.open(tmp_path / "a.png") as picture:
        values = np.asarray(picture).astype(int)
    assert values.max() == 65535
    assert (values[-1] == 299).all()


def test_a_panoptic_png_follows_cocos_arithmetic(tmp_path):
    found = panoptic()
    found.save(tmp_path / "a")
    rgb = np.asarray(Image.open(tmp_path / "a.png")).astype(int)
    assert np.array_equal(rgb[..., 0] + 256 * rgb[..., 1] + 65536 * rgb[..., 2], found.ids)
    info = json.loads((tmp_path / "a.json").read_text())["segments_info"]
    assert [(s["id"], s["category_id"], s["isthing"]) for s in info] == [(1, 1, 1), (300, 1, 1), (70000, 0, 0)]
    assert info[0]["bbox"] == [5, 10, 10, 10]
    assert found.to_coco(7)["image_id"] == 7


def test_run_lengths_are_those_of_pycocotools():
    mask_tools = pytest.importorskip("pycocotools.mask")
    generator = np.random.default_rng(0)
    for mask in (generator.random((31, 57)) > 0.5, np.ones((4, 300), bool), np.zeros((5, 5), bool), halves() > 0):
        theirs = mask_tools.encode(np.asfortranarray(mask.astype(np.uint8)))
        assert run_lengths(mask) == theirs["counts"].decode()
        assert box_of(mask) == [int(v) for v in mask_tools.toBbox(theirs)]


def test_instances_may_overlap_and_each_keeps_its_mask():
    masks = np.zeros((2, 40, 60), bool)
    masks[0, :20], masks[1, 10:30] = True, True
    segments = [Segment(i + 1, 0, int(m.sum()), 0.9 - i / 10, mask=torch.from_numpy(m)) for i, m in enumerate(masks)]
    found = Segmentation(np.full((40, 60), -1), ("cat",), "instance", segments, source="a", image=PHOTO)
    entries = found.to_coco()
    assert [e["area"] for e in entries] == [1200, 1200]
    assert entries[1]["bbox"] == [0, 10, 60, 20]
    assert found.words() == "2 x cat"
    assert json.dumps(found.plain())


def test_an_overlay_colours_each_class_and_keeps_the_photo_under_it():
    flat = np.full((40, 60, 3), 100, np.uint8)
    drawn = np.asarray(Segmentation(halves(), ("sky", "sea", "sand"), image=flat).overlay(size=400))
    assert drawn.shape[0] == 400
    assert drawn.shape[1] > 600  # the legend stands beside it
    expected = (0.5 * 100 + 0.5 * palette(3)[2].astype(float)).astype(int)
    assert np.abs(drawn[80, 580].astype(int) - expected).max() <= 1
    assert (drawn[10, 100] == 100).all()


def test_a_tiny_or_empty_map_can_be_drawn():
    assert Segmentation(np.full((1, 1), 0), ("a",)).overlay().height == 512
    assert Segmentation(np.full((3, 5), -1), ("a",), image=np.zeros((3, 5, 3), np.uint8)).overlay().height == 512
    many = Segmentation(np.arange(40).reshape(5, 8), [f"class number {i}" for i in range(40)])
    assert many.overlay(size=64).height == 64


def test_panoptic_words_count_things():
    assert panoptic().words() == "wall, 2 x cat"
    assert panoptic().overlay().height == 512


def test_a_restored_picture_is_saved_and_compared_with_its_input(tmp_path):
    enlarged = torch.rand(3, 80, 120)
    found = PictureResult(enlarged, "x2", image=PHOTO, source="a.png")
    assert found.pixels.dtype == np.uint8
    found.save(tmp_path / "a")
    assert Image.open(tmp_path / "a.png").size == (120, 80)
    assert json.loads((tmp_path / "a.json").read_text())["input"] == [40, 60, 3][:2]
    assert found.overlay().width > 120
    assert PictureResult(np.zeros((5, 4, 1), np.uint8)).overlay().height == 384


def test_the_zoom_shows_where_the_pictures_differ_most():
    before = np.zeros((120, 240, 3), np.uint8)
    after = before.copy()
    after[80:100, 200:220] = 255
    left, top, side = most_changed(before, after)
    assert side == 20
    assert (left, top) == (200, 80)


def test_depth_is_millimetres_in_16_bits_and_exact_beside_it(tmp_path):
    metres = np.linspace(0.5, 9.5, 40 * 60, dtype=np.float32).reshape(40, 60)
    metres[0, 0] = 0
    Depth(torch.from_numpy(metres), image=PHOTO).save(tmp_path / "a")
    assert np.array_equal(np.load(tmp_path / "a.npy"), metres)
    assert np.array_equal(np.asarray(Image.open(tmp_path / "a.png")), np.rint(metres * 1000).astype(np.uint16))
    assert Depth(metres, image=PHOTO).overlay().width > 2 * 384
    assert Depth(np.zeros((4, 4))).overlay().height > 384


def test_boxes_become_cocos_results():
    found = Detections([[1, 2, 11, 22]], [0], [0.75], ("cat",), (40, 60), image=PHOTO, source="a")
    assert found.to_coco(3) == [{"image_id": 3, "category_id": 0, "bbox": [1, 2, 10, 20], "score": 0.75}]
    assert found.overlay().height == 512
    assert found.words() == "cat"


def test_what_cannot_be_seen_says_so_and_what_cannot_be_written_is_one_line(tmp_path):
    with pytest.raises(UserError, match="nothing to draw"):
        Result().overlay()
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot write"):
        Result().save(tmp_path / "file" / "a")
