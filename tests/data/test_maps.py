"""Images with label maps: three ways to store them, what is refused, and geometry that image and map share."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from unmask.config import validated
from unmask.data.maps import SegmentationBatches, SegmentationData, open_maps
from unmask.draw import Recorder, Seeded
from unmask.errors import UserError

CAMVID = Path(__file__).parents[3] / "shared" / "data" / "camvid_240x320.zip"
QUIET = {"jitter": False, "normalise": "none"}


def quadrants(i: int, height: int = 40, width: int = 60) -> np.ndarray:
    map_ = np.zeros((height, width), dtype=np.uint8)
    map_[: height // 2, width // 2 :], map_[height // 2 :, : width // 2] = 1, 2
    map_[-5:, -5:] = 255
    return np.roll(map_, 3 * i, axis=1)


def classes_of(i: int) -> np.ndarray:
    return np.where(quadrants(i) == 255, -1, quadrants(i).astype(int))


def as_image(map_: np.ndarray) -> Image.Image:
    """A picture whose grey level tells the class: 0, 60, 120."""
    return Image.fromarray(np.repeat((map_.astype(int) % 255 * 60).astype(np.uint8)[..., None], 3, axis=2))


def folders(root: Path, n: int = 6, split: str = "train", sizes=None) -> Path:
    for i in range(n):
        map_ = quadrants(i, *(sizes[i % len(sizes)] if sizes else (40, 60)))
        for kind, picture in (("images", as_image(map_)), ("labels", Image.fromarray(map_))):
            where = root / split / kind
            where.mkdir(parents=True, exist_ok=True)
            picture.save(where / f"{i:02}.png")
    (root / "classes.txt").write_text("sky\nsea\nsand\n")
    return root


def data(uri, **options) -> SegmentationData:
    return validated(SegmentationData, {"uri": str(uri), "image_size": 32, **options}, where="data")


# --- three ways ---


def test_two_folders_give_images_maps_and_names(tmp_path):
    source = open_maps(data(folders(tmp_path)))
    assert len(source) == 6
    assert source.classes == ("sky", "sea", "sand")
    assert np.array_equal(source[1].map, classes_of(1))
    assert source[0].image.shape == (40, 60, 3)


def test_splits_may_lie_below_images_and_labels(tmp_path):
    folders(tmp_path / "a")
    for kind in ("images", "labels"):
        (tmp_path / "b" / kind).mkdir(parents=True)
        (tmp_path / "a" / "train" / kind).rename(tmp_path / "b" / kind / "val")
    assert len(open_maps(data(tmp_path / "b", split="test", classes=3))) == 6
    with pytest.raises(UserError, match="has no split 'train'"):
        open_maps(data(tmp_path / "b", classes=3))


def test_palette_maps_are_read_by_index_and_cityscapes_names_are_paired(tmp_path):
    image, label = (tmp_path / "train" / kind / "town" for kind in ("leftImg8bit", "gtFine"))
    for folder in (image, label):
        folder.mkdir(parents=True)
    map_ = Image.fromarray(quadrants(0)).convert("P")
    map_.putpalette([v for c in range(256) for v in (255 - c, c, 7)])
    map_.putdata(quadrants(0).ravel().tolist())
    map_.save(label / "x_000_gtFine_labelTrainIds.png")
    Image.fromarray(quadrants(0)).save(label / "x_000_gtFine_instanceIds.png")
    as_image(quadrants(0)).save(image / "x_000_leftImg8bit.png")
    source = open_maps(data(tmp_path))
    assert len(source) == 1
    assert source[0].map.max() == 2


def test_a_class_called_unlabelled_is_ignored_and_the_others_close_up(tmp_path):
    folders(tmp_path)
    (tmp_path / "classes.txt").write_text("sky\nvoid\nsand\n")
    source = open_maps(data(tmp_path))
    assert source.classes == ("sky", "sand")
    assert set(np.unique(source[0].map)) == {-1, 0, 1}


def test_classes_may_begin_at_one_and_be_counted_from_the_maps(tmp_path):
    folders(tmp_path)
    (tmp_path / "classes.txt").unlink()
    assert open_maps(data(tmp_path)).classes == ("0", "1", "2")
    shifted = open_maps(data(tmp_path, first_class=1))
    assert shifted.classes == ("0", "1")
    assert shifted[0].map.min() == -1  # the value 0 means nothing
    assert len(shifted[0].map[shifted[0].map >= 0]) == (quadrants(0) % 255 > 0).sum()


def panoptic(root: Path, n: int = 3) -> Path:
    """Two stuff halves and a square; the last picture's square is a crowd."""
    pngs = root / "annotations" / "panoptic_train2017"
    pngs.mkdir(parents=True)
    (root / "train2017").mkdir()
    annotations, images = [], []
    for i in range(n):
        ids = np.full((40, 60), 300)
        ids[:, 30:], ids[10:20, 5:15] = 70000, 5
        ids[:2] = 0
        rgb = np.stack([ids & 255, ids >> 8 & 255, ids >> 16], -1).astype(np.uint8)
        Image.fromarray(rgb).save(pngs / f"{i:012}.png")
        Image.fromarray(rgb).save(root / "train2017" / f"{i:012}.jpg")
        kinds = {300: 92, 70000: 92, 5: 17}
        segments = [{"id": s, "category_id": c, "iscrowd": int(i == n - 1 and s == 5)} for s, c in kinds.items()]
        annotations.append({"image_id": i, "file_name": f"{i:012}.png", "segments_info": segments})
        images.append({"id": i, "file_name": f"{i:012}.jpg"})
    categories = [{"id": 17, "name": "cat", "isthing": 1}, {"id": 92, "name": "wall", "isthing": 0}]
    described = {"images": images, "annotations": annotations, "categories": categories}
    (root / "annotations" / "panoptic_train2017.json").write_text(json.dumps(described))
    return root


def test_coco_panoptic_gives_segments_things_and_no_crowds_to_learn(tmp_path):
    batches = SegmentationBatches(data(panoptic(tmp_path)), batch_size=3)
    assert batches.facts.classes == ("cat", "wall")
    assert batches.facts.extra == {"things": (0,), "segments": True}
    raw = batches.fetch(np.array([0, 2]))
    assert raw["segment_labels"].tolist() == [[1, 1, 0], [1, 1, -1]]
    assert raw["segments"][0].unique().tolist() == [0, 1, 2, 3]
    assert raw["map"][0].unique().tolist() == [-1, 0, 1]
    out = batches.transform(raw, Seeded(0))
    assert out["segments"].shape == out["map"].shape == (2, 32, 32)
    assert torch.equal(out["segments"] > 0, out["map"] >= 0)


def test_segments_can_be_left_out_and_cannot_be_invented(tmp_path):
    batches = SegmentationBatches(data(panoptic(tmp_path / "a"), segments=False), batch_size=1)
    assert "segments" not in batches.fetch(np.array([0]))
    with pytest.raises(UserError, match="has no segments"):
        SegmentationBatches(data(folders(tmp_path / "b"), segments=True), batch_size=1)


def test_a_table_with_an_annotation_column_is_read(tmp_path):
    datasets = pytest.importorskip("datasets")

    def encoded(picture: Image.Image) -> dict:
        held = io.BytesIO()
        picture.save(held, "PNG")
        return {"bytes": held.getvalue(), "path": None}

    rows = {
        "image": [encoded(as_image(quadrants(i))) for i in range(4)],
        "annotation": [encoded(Image.fromarray(quadrants(i))) for i in range(4)],
    }
    table = datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image(decode=False))
    table.cast_column("annotation", datasets.Image(decode=False)).to_parquet(str(tmp_path / "rooms-train.parquet"))
    source = open_maps(data(tmp_path / "rooms-train.parquet"))
    assert np.array_equal(source[3].map, classes_of(3))
    with pytest.raises(UserError, match="no column 'anotation': did you mean annotation"):
        open_maps(data(tmp_path / "rooms-train.parquet", columns={"label": "anotation"}))


# --- what is refused ---


def test_an_unknown_value_names_the_file_the_value_and_the_number_of_classes(tmp_path):
    folders(tmp_path)
    bad = quadrants(2)
    bad[3, 4] = 9
    Image.fromarray(bad).save(tmp_path / "train/labels/02.png")
    with pytest.raises(UserError, match=r"02.png holds the value 9, no class of 3"):
        SegmentationBatches(data(tmp_path), batch_size=2)
    assert SegmentationBatches(data(tmp_path, ignore=(9, 255)), batch_size=2).count == 6


def test_a_map_of_another_size_than_its_image_names_both(tmp_path):
    folders(tmp_path)
    Image.fromarray(quadrants(2)[:30]).save(tmp_path / "train/labels/02.png")
    with pytest.raises(UserError, match=r"02.png has 60 x 30 pixels, its image 60 x 40"):
        SegmentationBatches(data(tmp_path), batch_size=2)


def test_images_without_maps_are_told_and_none_at_all_is_refused(tmp_path):
    folders(tmp_path)
    (tmp_path / "train/labels/01.png").unlink()
    batches = SegmentationBatches(data(tmp_path), batch_size=2)
    assert batches.count == 5
    assert batches.skipped[0]["reason"] == "has no label map"
    for file in (tmp_path / "train/labels").iterdir():
        file.rename(file.with_name(f"other-{file.name}"))
    with pytest.raises(UserError, match="no label map of the same name"):
        open_maps(data(tmp_path))


def test_a_colour_picture_is_no_label_map(tmp_path):
    folders(tmp_path)
    Image.fromarray(np.random.default_rng(0).integers(0, 9, (40, 60, 3), dtype=np.uint8)).save(
        tmp_path / "train/labels/00.png"
    )
    with pytest.raises(UserError, match=r"00.png is a colour picture"):
        SegmentationBatches(data(tmp_path), batch_size=2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"augment": "crop"}, "augment is for images alone"),
        ({"scale": (2.0, 0.5)}, "must rise"),
        ({"thigns": ("sky",)}, "did you mean things"),
    ],
)
def test_settings_that_do_nothing_or_make_no_sense_are_one_line(tmp_path, options, message):
    with pytest.raises(UserError, match=message):
        data(tmp_path, **options)


def test_an_unknown_thing_names_the_nearest_class(tmp_path):
    with pytest.raises(UserError, match="did you mean sand"):
        SegmentationBatches(data(folders(tmp_path), things=("sandd",)), batch_size=2)


def test_a_folder_of_something_else_says_what_is_taken(tmp_path):
    (tmp_path / "cats").mkdir()
    with pytest.raises(UserError, match="holds cats: it takes images/ and labels/"):
        open_maps(data(tmp_path))
    with pytest.raises(UserError, match="no label maps at"):
        open_maps(data(tmp_path / "absent"))


# --- geometry ---


def test_image_and_map_move_together(tmp_path):
    folders(tmp_path, sizes=[(40, 60), (52, 44)])
    batches = SegmentationBatches(data(tmp_path, **QUIET, scale=(1.0, 2.0)), batch_size=6)
    raw = next(batches.iterate())
    for seed in range(3):
        out = batches.transform(raw, Seeded(seed))
        grey = out["image"][:, 0] * 255
        right = (grey - out["map"] * 60).abs() < 5
        known = out["map"] >= 0
        assert (
            float(right[known].float().mean()) > 0.85
        )  # the rest are edges between classes, which bilinear weights mix
        assert out["image"].shape == (6, 3, 32, 32)


def test_an_image_smaller_than_its_crop_is_padded_with_nothing_at_the_lower_right(tmp_path):
    folders(tmp_path)
    settings = data(tmp_path, **QUIET, scale=(0.5, 0.5), flip=1.0, pad_value=200)
    out = SegmentationBatches(settings, batch_size=2).transform(
        SegmentationBatches(settings, batch_size=2).fetch(np.arange(2)), Seeded(0)
    )
    assert out["size"].tolist() == [[16, 24]] * 2
    assert (out["map"][:, 16:] == -1).all()
    assert (out["map"][:, :, 24:] == -1).all()
    assert torch.allclose(out["image"][:, :, 16:] * 255, torch.tensor(200.0))
    assert (out["map"][:, :13, :24] >= 0).all()


def test_a_sample_does_not_depend_on_its_batch_and_every_draw_has_a_name(tmp_path):
    batches = SegmentationBatches(data(folders(tmp_path)), batch_size=6)
    raw = batches.fetch(np.arange(6))
    recorder = Recorder(Seeded(3, 7))
    whole = batches.transform(raw, recorder)
    assert set(recorder.recorded) == {"scale", "crop", "flip", "jitter.chance", "jitter.strength", "jitter.order"}
    part = batches.transform({k: v[4:] for k, v in raw.items()}, Seeded(3, 7, first_sample=4))
    for key in ("image", "map"):
        torch.testing.assert_close(whole[key][4:], part[key])


def test_matrices_and_the_kernel_agree(tmp_path, monkeypatch):
    from unmask.data import map_transform

    folders(tmp_path, sizes=[(40, 60), (52, 44)])
    batches = SegmentationBatches(data(tmp_path, **QUIET), batch_size=6)
    raw = batches.fetch(np.arange(6))
    kernel = batches.transform(raw, Seeded(1))["image"]

    def by_products(images, sizes, resized, start, size):
        scale = sizes.double() / resized.double()
        windows = [
            map_transform.Window(
                (start[:, a] * scale[:, a]).float(), scale[:, a].float(), torch.zeros(len(images)), sizes[:, a].float()
            )
            for a in (0, 1)
        ]
        return map_transform.by_matrices(images, *windows, size, "bilinear")

    monkeypatch.setattr(map_transform, "_by_kernel", by_products)
    torch.testing.assert_close(batches.transform(raw, Seeded(1))["image"], kernel, atol=2e-4, rtol=1e-4)


def test_evaluation_resizes_pads_to_multiples_and_keeps_the_truth(tmp_path):
    folders(tmp_path, sizes=[(40, 60), (52, 44)])
    batches = SegmentationBatches(data(tmp_path, shortest_edge=48, divisor=32), batch_size=2)
    (batch, samples), *rest = batches.whole(2)
    assert batch["image"].shape[2:] == (64, 96)
    assert batch["size"].tolist() == [[48, 72], [57, 48]]
    assert (batch["image"][0, :, 48:] == 0).all()
    assert samples[1].map.shape == (52, 44)
    assert len(rest) == 2
    assert batches.samples(4)["image"].ndim == 4


def test_limits_and_shares_take_a_part(tmp_path):
    folders(tmp_path)
    assert len(open_maps(data(tmp_path, limit=2))) == 2
    first, second = (open_maps(data(tmp_path, split=f"train[{s}]")) for s in (":50%", "50%:"))
    names = [{s.name_of(i) for i in range(len(s))} for s in (first, second)]
    assert len(names[0]) == len(names[1]) == 3
    assert not names[0] & names[1]


def test_jitter_changes_colours_within_their_range(tmp_path):
    from unmask.data.map_transform import ssd_jitter

    images = torch.rand(64, 3, 8, 8) * 255
    out = ssd_jitter(images, Seeded(0))
    assert out.min() >= -1e-3
    assert out.max() <= 255 + 1e-3
    same = (out - images).abs().flatten(1).amax(1) < 1e-2
    assert 0 < int(same.sum()) < 20  # one of sixteen draws nothing


def test_camvid_opens_with_eleven_classes(tmp_path):
    if not CAMVID.is_file():
        pytest.skip("../shared/data/camvid_240x320.zip is not here")
    import zipfile

    with zipfile.ZipFile(CAMVID) as archive:
        archive.extractall(tmp_path)
    batches = SegmentationBatches(data(tmp_path, image_size=(96, 128), limit=16), batch_size=4)
    assert len(batches.facts.classes) == 11
    assert "Unlabelled" not in batches.facts.classes
    out = batches.transform(next(batches.iterate()), Seeded(0))
    assert set(out["map"].unique().tolist()) <= set(range(-1, 11))
