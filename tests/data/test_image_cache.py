from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pixels import noise

import unmask.data as data
from unmask.data import cache as caching
from unmask.errors import UserError


def files_of(cache: Path) -> list[str]:
    return sorted(p.name for p in (cache / "images").iterdir() if p.is_dir())


def test_images_are_decoded_once(photos: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    folder = photos()
    first = data.open(folder).images()

    def never(*args: object) -> None:
        raise AssertionError("decoded again")

    monkeypatch.setattr(caching, "decode", never)
    monkeypatch.setattr(caching, "header", never)
    second = data.open(folder).images()
    assert len(second) == len(first) == 6
    for i in range(6):
        np.testing.assert_array_equal(first.read(i)[0], second.read(i)[0])
    assert first.statistics() == second.statistics()


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
@pytest.mark.parametrize("ragged", [False, True])
def test_stored_pixels_are_the_images_own(tmp_path: Path, dtype: type, ragged: bool) -> None:
    arrays = [noise(6 + i * ragged, 9, 5, seed=i, dtype=dtype) for i in range(4)]
    for i, array in enumerate(arrays):
        np.save(tmp_path / f"{i}.npy", array)
    images = data.open(tmp_path).images()
    assert images.one_size == (None if ragged else (6, 9))
    for i, array in enumerate(arrays):
        found, number = images.read(i)
        assert found.dtype == dtype
        assert number == i
        np.testing.assert_array_equal(found, array)
    full = {np.uint8: 255, np.uint16: 65535, np.float32: 1}[dtype]
    flat = np.concatenate([a.reshape(-1, 5) for a in arrays]).astype(np.float64) / full
    mean, std = images.statistics()
    np.testing.assert_allclose(mean, flat.mean(axis=0), rtol=1e-6)
    np.testing.assert_allclose(std, flat.std(axis=0), rtol=1e-6)


def test_a_constant_channel_has_scale_one(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.stack([noise(5, 5), np.full((5, 5), 7, dtype=np.uint8)], axis=-1))
    assert data.open(tmp_path).facts.std[1] == 1.0  # type: ignore[index]


def test_a_changed_file_makes_a_new_cache(photos: Callable[..., Path], cache: Path) -> None:
    folder = photos()
    before = data.open(folder).images().read(0)[0].copy()
    Image.fromarray(noise(30, 40, 3)).save(folder / "000.jpg")
    assert data.open(folder).images().read(0)[0].shape != before.shape
    assert len(files_of(cache)) == 2


def test_a_half_written_cache_is_never_used(
    photos: Callable[..., Path], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = photos()
    real = caching.fitted

    def dies(*args: object) -> np.ndarray:
        if len(calls) == 3:
            raise KeyboardInterrupt
        calls.append(1)
        return real(*args)  # type: ignore[arg-type]

    calls: list[int] = []
    monkeypatch.setattr(caching, "fitted", dies)
    with pytest.raises(KeyboardInterrupt):
        data.open(folder, workers=1).images()
    assert files_of(cache) == []
    monkeypatch.setattr(caching, "fitted", real)
    assert len(data.open(folder).images()) == 6


def test_what_a_killed_process_left_is_removed(photos: Callable[..., Path], cache: Path) -> None:
    folder = photos()
    data.open(folder).images()
    made = next(p for p in (cache / "images").iterdir() if p.is_dir())
    left = made.with_name(made.name + ".part-1")
    made.rename(left)
    assert len(data.open(folder).images()) == 6
    assert files_of(cache) == [made.name]


def test_two_at_once_make_one_cache(photos: Callable[..., Path], cache: Path) -> None:
    folder = photos(12)
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda _: data.open(folder).images(), range(2)))
    assert len(files_of(cache)) == 1
    for i in range(12):
        np.testing.assert_array_equal(found[0].read(i)[0], found[1].read(i)[0])


def test_a_damaged_cache_is_made_anew(photos: Callable[..., Path], cache: Path) -> None:
    folder = photos()
    data.open(folder).images()
    pixels = next((cache / "images").rglob("pixels.bin"))
    os.truncate(pixels, 100)
    assert len(data.open(folder).images()) == 6
    assert pixels.stat().st_size > 100


def test_large_photographs_are_stored_small(photos: Callable[..., Path]) -> None:
    folder = photos(2, 700, 1100)
    source = data.open(folder)
    images = source.images()
    assert images.sizes.min(axis=1).tolist() == [512, 512]
    assert source.facts.sizes is not None
    assert min(source.facts.sizes[0]) == 700
    assert source.images(256).sizes.min(axis=1).tolist() == [256, 256]
    assert source.images(2048).sizes.min(axis=1).tolist() == [700, 707]


def test_a_larger_training_size_stores_larger_images(photos: Callable[..., Path]) -> None:
    source = data.open(photos(2, 700, 1100))
    batches = data.Batches(source, data.DataSettings(image_size=300), batch_size=2)
    assert batches.images.sizes.min(axis=1).tolist() == [700, 707]


@pytest.mark.parametrize("why", ["no room", "no permission", "not wanted", "disk full"])
def test_without_a_cache_images_are_decoded_as_they_are_read(
    photos: Callable[..., Path],
    cache: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    why: str,
) -> None:
    folder = photos()
    kept = [data.open(folder).images().read(i)[0] for i in range(6)]
    expected = data.open(folder).facts
    other = cache / "other"
    monkeypatch.setenv("UNMASK_CACHE", str(other))
    if why == "no room":
        monkeypatch.setattr(caching.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1000}))
    elif why == "no permission":
        other.write_text("a file where a folder should be")
    elif why == "disk full":

        def full(*args: object) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(caching.os, "posix_fallocate", full)
    source = data.open(folder, cache=why != "not wanted")
    for i in range(6):
        np.testing.assert_array_equal(source.images().read(i)[0], kept[i])
    assert source.facts == expected
    assert not list(cache.rglob("*.part-*"))
    assert ("decoded images are not kept" in capsys.readouterr().err) == (why != "not wanted")
    batches = data.Batches(source, data.DataSettings(image_size=32), batch_size=4)
    cached = data.Batches(data.open(folder), data.DataSettings(image_size=32), batch_size=4)
    assert (next(batches.iterate(3))["image"] == next(cached.iterate(3))["image"]).all()


def test_an_unreadable_image_met_while_reading_gives_way_to_the_next(photos: Callable[..., Path]) -> None:
    folder = photos(6, classes=6)
    whole = (folder / "class2" / "002.jpg").read_bytes()
    (folder / "class2" / "002.jpg").write_bytes(whole[: len(whole) // 2])
    source = data.open(folder, cache=False)
    batches = data.Batches(source, data.DataSettings(cache=False), batch_size=3)
    raw = batches.raw([1, 2, 3])
    assert raw["label"].tolist() == [1, 3, 3]
    assert [Path(s["path"]).name for s in source.skipped] == ["002.jpg"]


def test_a_large_share_is_read_from_the_cache_of_the_whole(photos: Callable[..., Path], cache: Path) -> None:
    folder = photos(10, ragged=False)
    whole = data.open(folder)
    whole.images()
    part = data.open(folder, "train[50%:]")
    assert len(part.images()) == part.facts.count == 5
    assert len(files_of(cache)) == 1
    names = [whole.name_of(i) for i in range(10)]
    batches = data.Batches(part, batch_size=5)
    for i, pixels in enumerate(batches.raw(range(5))["image"]):
        expected = whole.images().read(names.index(part.name_of(i)))[0]
        np.testing.assert_array_equal(pixels.permute(1, 2, 0).numpy(), expected)


def test_nothing_readable_is_one_clear_line(tmp_path: Path) -> None:
    for i in range(3):
        content = Image.fromarray(noise(30, 30, 3, seed=i))
        content.save(tmp_path / f"{i}.jpg")
        whole = (tmp_path / f"{i}.jpg").read_bytes()
        (tmp_path / f"{i}.jpg").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="none of the 3 files"):
        data.open(tmp_path).images()
