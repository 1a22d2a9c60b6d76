from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from pixels import noise

import unmask.data as data
from unmask.errors import MissingExtra, UserError

SHARED = Path(__file__).parents[3] / "shared" / "data"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="../shared/data is not here")


def png(i: int, *shape: int) -> bytes:
    out = io.BytesIO()
    Image.fromarray(noise(*(shape or (8, 8, 3)), seed=i)).save(out, "PNG")
    return out.getvalue()


def parquet(path: Path, n: int = 6, image: str = "image", names: list[str] | None = None, **columns: list) -> Path:
    table = pa.table({image: [{"bytes": png(i), "path": f"{i}.png"} for i in range(n)], **columns})
    features: dict = {image: {"_type": "Image"}}
    if names:
        features["label"] = {"_type": "ClassLabel", "names": names}
        metadata = {"huggingface": json.dumps({"info": {"features": features}})}
        table = table.replace_schema_metadata(metadata)
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path)
    return path


def message(*args: object, **kwargs: object) -> str:
    with pytest.raises(UserError) as error:
        print(data.open(*args, **kwargs).facts)  # type: ignore[arg-type]
    assert "\n" not in str(error.value)
    return str(error.value)


# --- folders ---


def test_a_folder_of_16_bit_grey_images(tmp_path: Path) -> None:
    for i in range(30):
        Image.fromarray(noise(150, 200, seed=i, dtype=np.uint16)).save(tmp_path / f"{i}.png")
    facts = data.open(tmp_path).facts
    assert (facts.count, facts.channels, facts.bit_depth, facts.image_size) == (30, 1, 16, (150, 200))
    assert facts.classes is None
    pixels = np.stack([noise(150, 200, seed=i, dtype=np.uint16) for i in range(30)]) / 65535
    assert facts.mean == pytest.approx([pixels.mean()], rel=1e-6)
    assert facts.std == pytest.approx([pixels.std()], rel=1e-6)


def test_class_folders_may_be_nested(tmp_path: Path) -> None:
    for name in ("cats/tabby", "cats/siamese", "dogs"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "a.png").write_bytes(png(1))
    source = data.open(tmp_path)
    assert source.classes == ("cats/siamese", "cats/tabby", "dogs")
    assert source.labels is not None
    assert source.labels.tolist() == [0, 1, 2]


def test_images_beside_folders_mean_no_classes(tmp_path: Path) -> None:
    (tmp_path / "more").mkdir()
    (tmp_path / "a.png").write_bytes(png(1))
    (tmp_path / "more" / "b.png").write_bytes(png(2))
    source = data.open(tmp_path)
    assert source.classes is None
    assert len(source) == 2


@pytest.mark.parametrize("test", ["test", "val", "Validation"])
def test_split_folders_are_honoured(tmp_path: Path, test: str) -> None:
    for split, n in (("train", 3), (test, 2)):
        for name in ("a", "b"):
            (tmp_path / split / name).mkdir(parents=True)
            for i in range(n):
                (tmp_path / split / name / f"{i}.png").write_bytes(png(i))
    assert len(data.open(tmp_path)) == 6
    assert len(data.open(tmp_path, "test")) == 4
    assert data.open(tmp_path, "test").classes == ("a", "b")


def test_a_missing_test_split_says_how_to_take_a_share(photos: Callable[..., Path]) -> None:
    assert 'split="train[80%:]"' in message(photos(), "test")


def test_shares_of_a_split_are_disjoint_and_whole(photos: Callable[..., Path]) -> None:
    folder = photos(11)
    names = [[s.name_of(i) for i in range(len(s))] for s in data.train_and_test(folder)]
    assert len(names[0]) == 9
    assert not set(names[0]) & set(names[1])
    assert len({*names[0], *names[1]}) == 11
    assert names[0] == sorted(names[0])


def test_a_limit_is_spread_over_the_data(photos: Callable[..., Path]) -> None:
    source = data.open(photos(9, classes=3), limit=3)
    assert source.labels is not None
    assert source.labels.tolist() == [0, 1, 2]


def test_unreadable_images_are_skipped_counted_and_listed(photos: Callable[..., Path]) -> None:
    folder = photos(6)
    whole = (folder / "000.jpg").read_bytes()
    (folder / "truncated.jpg").write_bytes(whole[: len(whole) // 2])
    (folder / "empty.png").write_bytes(b"")
    (folder / "words.jpg").write_text("hello")
    source = data.open(folder)
    assert source.facts.count == 6
    assert {Path(s["path"]).name for s in source.skipped} == {"truncated.jpg", "empty.png", "words.jpg"}
    assert all(s["reason"] for s in source.skipped)
    again = data.open(folder)
    assert again.facts.count == 6
    assert again.skipped == source.skipped


def test_skipping_keeps_pixels_and_labels_together(tmp_path: Path) -> None:
    for i in range(6):
        where = tmp_path / f"c{i}"
        where.mkdir()
        Image.fromarray(np.full((5 + i, 6, 3), 10 * i, dtype=np.uint8)).save(where / "a.png")
    broken = (tmp_path / "c2" / "a.png").read_bytes()
    (tmp_path / "c2" / "a.png").write_bytes(broken[: len(broken) // 2])
    batches = data.Batches(data.open(tmp_path), batch_size=5)
    raw = batches.raw([0, 1, 2, 3, 4])
    assert raw["label"].tolist() == [0, 1, 3, 4, 5]
    assert raw["image"][:, 0, 0, 0].tolist() == [0, 10, 30, 40, 50]


def test_grey_among_colour_becomes_colour_and_other_channels_are_skipped(tmp_path: Path) -> None:
    Image.fromarray(noise(6, 6)).save(tmp_path / "grey.png")
    Image.fromarray(noise(6, 6, 3)).save(tmp_path / "colour.png")
    assert data.open(tmp_path).facts.channels == 3
    other = tmp_path / "other"
    other.mkdir()
    for i in range(3):
        np.save(other / f"{i}.npy", noise(6, 6, 5, seed=i))
    np.save(other / "odd.npy", noise(6, 6, 4))
    source = data.open(other)
    assert (source.facts.channels, source.facts.count) == (5, 3)
    assert "4 channels" in source.skipped[0]["reason"]


@pytest.mark.parametrize("name", ["empty", "texts", "broken", "missing"])
def test_a_folder_without_an_image_is_one_clear_line(tmp_path: Path, name: str) -> None:
    folder = tmp_path / name
    if name != "missing":
        folder.mkdir()
    if name == "texts":
        (folder / "a.txt").write_text("a")
    if name == "broken":
        (folder / "a.png").write_bytes(b"no")
    text = message(folder)
    assert {"empty": "empty", "texts": "no image", "broken": "readable", "missing": "no file"}[name] in text


def test_a_misspelt_path_and_name_get_the_nearest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "photos").mkdir()
    monkeypatch.chdir(tmp_path)
    assert "photos" in message("./photo")
    assert "cifar10" in message("cifar-10")
    assert "sample:fashion" in message("sample:fashon")


def test_archives_and_single_files_say_what_is_taken(tmp_path: Path) -> None:
    (tmp_path / "a.zip").write_bytes(b"PK")
    (tmp_path / "a.png").write_bytes(png(0))
    assert "unpack" in message(tmp_path / "a.zip")
    assert "single file" in message(tmp_path / "a.png")


# --- parquet ---


def test_parquet_in_the_hub_layout_has_its_class_names(tmp_path: Path) -> None:
    path = parquet(tmp_path / "x.parquet", names=["cat", "dog"], label=[0, 1] * 3)
    source = data.open(path)
    assert source.classes == ("cat", "dog")
    assert source.labels is not None
    assert source.labels.tolist() == [0, 1] * 3
    assert source.facts.count == 6


def test_the_test_file_beside_a_train_file_is_found(tmp_path: Path) -> None:
    parquet(tmp_path / "x-train.parquet", 5)
    parquet(tmp_path / "x-test.parquet", 3)
    parquet(tmp_path / "y-test.parquet", 2)
    assert len(data.open(tmp_path / "x-train.parquet", "test")) == 3
    assert len(data.open(tmp_path / "x-test.parquet", "test")) == 3
    assert len(data.open(tmp_path / "x-test.parquet")) == 3
    assert "no split" in message(parquet(tmp_path / "z-train.parquet"), "test")


def test_a_folder_of_parquet_in_the_hub_layout(tmp_path: Path) -> None:
    for i in range(2):
        parquet(tmp_path / "data" / f"train-0000{i}-of-00002.parquet", 4)
    parquet(tmp_path / "data" / "validation-00000-of-00001.parquet", 3)
    assert len(data.open(tmp_path)) == 8
    assert len(data.open(tmp_path, "test")) == 3


def test_different_tables_in_one_folder_are_not_mixed(tmp_path: Path) -> None:
    for name in ("cats-train", "dogs-train"):
        parquet(tmp_path / f"{name}.parquet")
    assert "2 different tables" in message(tmp_path)


def test_words_and_sparse_numbers_become_class_ids(tmp_path: Path) -> None:
    source = data.open(parquet(tmp_path / "x.parquet", label=["b", "a", "b", "a", "c", None]))
    assert source.classes == ("a", "b", "c")
    assert source.labels is not None
    assert source.labels.tolist() == [1, 0, 1, 0, 2, -1]
    source = data.open(parquet(tmp_path / "y.parquet", label=[1000, 7, 7, 1000, 7, 7]))
    assert source.classes == ("7", "1000")


def test_columns_may_be_named(tmp_path: Path) -> None:
    path = parquet(tmp_path / "x.parquet", image="shot", coarse=[0, 1] * 3, fine=[0, 1, 2] * 2)
    source = data.open(path, columns={"image": "shot", "label": "fine"})
    assert source.labels is not None
    assert source.labels.tolist() == [0, 1, 2] * 2
    assert "did you mean shot" in message(path, columns={"image": "shots"})
    assert "did you mean fine" in message(path, columns={"label": "fin"})


def test_tables_without_rows_or_images_are_one_clear_line(tmp_path: Path) -> None:
    pq.write_table(pa.table({"image": pa.array([], pa.binary())}), tmp_path / "empty.parquet")
    pq.write_table(pa.table({"text": ["a"], "n": [1]}), tmp_path / "text.parquet")
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 no")
    assert "no row" in message(tmp_path / "empty.parquet")
    assert "no image column among text, n" in message(tmp_path / "text.parquet")
    assert "cannot be read as parquet" in message(tmp_path / "broken.parquet")


@needs_shared
@pytest.mark.parametrize(
    ("name", "count", "classes", "size", "channels"),
    [
        ("cifar10", 2000, 10, (32, 32), 3),
        ("fashion_mnist", 1000, 10, (28, 28), 1),
        ("grocery96", 340, 34, (96, 96), 3),
        ("clothing96", 372, 10, (96, 96), 3),
    ],
)
def test_shared_parquet_opens(name: str, count: int, classes: int, size: tuple[int, int], channels: int) -> None:
    source = data.open(SHARED / f"{name}-train.parquet", "test")
    facts = source.facts
    assert (facts.count, facts.image_size, facts.channels) == (count, size, channels)
    assert facts.classes is not None
    assert len(facts.classes) == classes
    assert not source.skipped


# --- names, hub, samples ---


def test_a_name_is_found_under_the_data_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UNMASK_DATA", str(tmp_path))
    parquet(tmp_path / "cifar10-train.parquet", names=["a", "b"], label=[0, 1] * 3)
    parquet(tmp_path / "cifar10-test.parquet", 2)
    for split in ("train", "val"):
        (tmp_path / "imagenet" / split / "n01").mkdir(parents=True)
        (tmp_path / "imagenet" / split / "n02").mkdir(parents=True)
        for name in ("n01", "n02"):
            (tmp_path / "imagenet" / split / name / "a.png").write_bytes(png(1))
    assert data.open("cifar10").classes == ("a", "b")
    assert len(data.open("cifar10", "test")) == 2
    assert data.open("imagenet", "test").classes == ("n01", "n02")


def test_torchvision_files_are_found_under_the_data_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import gzip

    monkeypatch.setenv("UNMASK_DATA", str(tmp_path))
    raw = tmp_path / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    pixels, labels = noise(5, 28, 28), np.array([3, 1, 0, 9, 2], dtype=np.uint8)
    for part in ("train", "t10k"):
        images = b"\0\0\x08\x03" + b"".join(int(n).to_bytes(4, "big") for n in (5, 28, 28)) + pixels.tobytes()
        (raw / f"{part}-images-idx3-ubyte").write_bytes(images)
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(b"\0\0\x08\x01" + (5).to_bytes(4, "big") + labels.tobytes())
        with gzip.open(raw / f"{part}-labels-idx1-ubyte.gz", "wb") as file:
            file.write(b"")
    source = data.open("fashion_mnist")
    assert source.labels is not None
    assert source.labels.tolist() == labels.tolist()
    assert source.classes is not None
    assert source.classes[9] == "Ankle boot"
    read = np.stack([source.images().read(i)[0][..., 0] for i in range(5)])
    np.testing.assert_array_equal(read, pixels)


def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    import socket

    def refuse(*args: object, **kwargs: object) -> None:
        raise OSError("no network in this test")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)


def test_a_name_that_is_nowhere_says_what_to_set(monkeypatch: pytest.MonkeyPatch) -> None:
    no_network(monkeypatch)
    assert "set UNMASK_DATA" in message("cifar10")
    assert "set UNMASK_DATA" in message("imagenet")


def test_a_hub_id_without_a_network_is_one_clear_line(monkeypatch: pytest.MonkeyPatch) -> None:
    no_network(monkeypatch)
    text = message("somebody/some-images")
    assert "hub cannot be reached" in text
    assert "no such file or folder" in text


def test_a_hub_data_set_is_opened_by_its_id(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import datasets
    from huggingface_hub import HfApi

    table = datasets.Dataset.from_parquet(str(parquet(tmp_path / "x.parquet", image="img", fine_label=[0, 1, 2] * 2)))
    asked = []
    monkeypatch.setattr(HfApi, "dataset_info", lambda self, name, timeout: asked.append(name))
    monkeypatch.setattr(datasets, "get_dataset_split_names", lambda name, config: ["train", "validation"])
    monkeypatch.setattr(datasets, "load_dataset", lambda name, config, split: table)
    source = data.open("somebody/some-images:small", "test")
    assert asked == ["somebody/some-images"]
    assert source.classes == ("0", "1", "2")
    assert source.facts.count == 6
    assert "no split 'unlabelled'" in message("hf:somebody/some-images", "unlabelled")


def test_a_path_without_permission_is_one_clear_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Path, *args: object, **kwargs: object) -> bool:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "exists", refuse)
    assert "Permission denied" in message(tmp_path)


def test_the_fashion_sample_is_bundled_small_and_balanced() -> None:
    folder = Path(data.__file__).parent / "samples"
    assert sum(f.stat().st_size for f in folder.iterdir()) <= 3_000_000
    assert "Zalando" in (folder / "NOTICE-fashion-mnist.txt").read_text(encoding="utf-8")
    for split, each in (("train", 555), ("test", 100)):
        source = data.open("sample:fashion", split)
        assert source.labels is not None
        assert np.bincount(source.labels).tolist() == [each] * 10
    facts = data.open("sample:fashion", "test").facts
    assert (facts.channels, facts.image_size) == (1, (28, 28))


def test_missing_photographs_name_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    from unmask.data import photos

    photos._tiles.cache_clear()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtra, match=r"unmask\[photos\]"):
        data.open("sample:photos")


@pytest.mark.parametrize("tile", [96, 128, 224])
def test_photo_tiles_of_the_two_splits_never_touch(tile: int) -> None:
    pytest.importorskip("skimage")
    pytest.importorskip("sklearn")
    from unmask.data.photos import photographs, tile_places

    counted = 0
    for path in photographs().values():
        with Image.open(path) as image:
            width, height = image.size
        covered = {}
        for split in ("train", "test"):
            cover = np.zeros((height, width), dtype=bool)
            for top, left in tile_places(height, width, tile, split):
                assert top + tile <= height
                assert left + tile <= width
                cover[top : top + tile, left : left + tile] = True
            covered[split] = cover
        assert not (covered["train"] & covered["test"]).any()
        assert covered["train"].any() == covered["test"].any()
        counted += covered["train"].any()
    assert counted >= 10


def test_photo_tiles_are_labelled_by_photograph() -> None:
    pytest.importorskip("skimage")
    pytest.importorskip("sklearn")
    train, test = data.open("sample:photos"), data.open("sample:photos", "test")
    assert train.classes == test.classes
    assert train.classes is not None
    assert {"china", "flower", "astronaut"} <= set(train.classes)
    assert train.labels is not None
    assert np.bincount(train.labels).min() >= 20
    assert "sample:photos@128" in message("sample:photos@12")
