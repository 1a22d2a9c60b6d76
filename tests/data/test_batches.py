from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pixels import noise

import unmask.data as data
from unmask.config import validated
from unmask.contracts import Preprocessing
from unmask.data.order import shuffled, some_of
from unmask.data.prefetch import ahead
from unmask.draw import Recorder, Replay, Seeded
from unmask.errors import UserError


@pytest.fixture
def small(photos: Callable[..., Path]) -> data.Source:
    return data.open(photos(25, ragged=False, classes=5))


def indices(batches: data.Batches, steps: int, **options: int) -> list[list[int]]:
    return [b["index"].tolist() for b in islice(batches.iterate(**options), steps)]


@settings(max_examples=30, deadline=None)
@given(n=st.integers(1, 500), seed=st.integers(0, 2**40))
def test_an_order_is_a_permutation_and_a_pure_function_of_seed_and_count(n: int, seed: int) -> None:
    order = shuffled(n, seed)
    assert sorted(order.tolist()) == list(range(n))
    assert (order == shuffled(n, seed)).all()


def test_an_epoch_sees_every_image_at_most_once_and_epochs_differ(small: data.Source) -> None:
    batches = data.Batches(small, batch_size=6, seed=3)
    assert batches.steps_per_epoch == 4
    seen = indices(batches, 8)
    for epoch in (seen[:4], seen[4:]):
        flat = [i for step in epoch for i in step]
        assert len(set(flat)) == 24
    assert seen[:4] != seen[4:]
    assert indices(data.Batches(small, batch_size=6, seed=4), 4) != seen[:4]


@pytest.mark.parametrize("start", [0, 1, 3, 4, 9])
def test_a_resume_needs_only_the_step(small: data.Source, start: int) -> None:
    whole = indices(data.Batches(small, batch_size=6), 12)
    assert indices(data.Batches(small, batch_size=6), 12 - start, start_step=start) == whole[start:]


@pytest.mark.parametrize("accumulate", [1, 3])
def test_two_processes_see_the_halves_of_what_one_sees(small: data.Source, accumulate: int) -> None:
    one = indices(data.Batches(small, batch_size=12), 6, accumulate=accumulate)
    two = [indices(data.Batches(small, batch_size=12), 6, accumulate=accumulate, rank=r, world=2) for r in (0, 1)]
    assert [a + b for a, b in zip(*two, strict=True)] == one


def test_augmented_halves_are_the_augmented_whole(small: data.Source) -> None:
    wanted = data.DataSettings(image_size=32, rand_augment={}, color_jitter=0.4, erase=0.3)  # type: ignore[arg-type]
    batches = data.Batches(small, wanted, batch_size=8)
    raw = batches.raw(range(8))
    whole = batches.transform(raw, Seeded(5, 7))["image"]
    halves = [
        batches.transform({k: v[i : i + 4] for k, v in raw.items()}, Seeded(5, 7, first_sample=i))["image"]
        for i in (0, 4)
    ]
    torch.testing.assert_close(torch.cat(halves), whole, atol=1e-5, rtol=0)


def test_a_transform_is_replayed_from_its_draws(small: data.Source) -> None:
    batches = data.Batches(small, data.DataSettings(image_size=32, augment="rand_augment"), batch_size=8)
    draw = Recorder(Seeded(1))
    raw = batches.raw(range(8))
    first = batches.transform(raw, draw)["image"]
    assert (batches.transform(raw, Replay(draw.recorded))["image"] == first).all()
    assert not (batches.transform(raw, Seeded(2))["image"] == first).all()


def test_batches_that_cannot_be_shared_or_filled_are_one_clear_line(small: data.Source) -> None:
    with pytest.raises(UserError, match="use --batch-size 25"):
        data.Batches(small, batch_size=26)
    with pytest.raises(UserError, match="multiple of 4"):
        data.Batches(small, batch_size=6).iterate(world=2, accumulate=2)


def test_ragged_images_are_padded_with_their_sizes(photos: Callable[..., Path]) -> None:
    batches = data.Batches(data.open(photos(5)), data.DataSettings(image_size=24), batch_size=4)
    raw = batches.raw([0, 3])
    assert raw["image"].dtype == torch.uint8
    assert raw["size"].tolist() == [[60, 105], [81, 90]]
    assert raw["image"].shape == (2, 3, 81, 105)
    assert (raw["image"][0, :, 60:] == 0).all()
    assert batches.transform(raw, Seeded(0))["image"].shape == (2, 3, 24, 24)
    assert batches.transform(raw, train=False)["image"].shape == (2, 3, 24, 24)


def test_padding_never_leaks_into_a_crop(photos: Callable[..., Path]) -> None:
    batches = data.Batches(data.open(photos(8)), data.DataSettings(image_size=16, normalise="none"), batch_size=8)
    raw = batches.raw(range(8))
    for i in range(8):
        height, width = raw["size"][i].tolist()
        raw["image"][i, :, height:], raw["image"][i, :, :, width:] = 255, 255
        raw["image"][i, :, :height, :width] = 100
    for train in (True, False):
        found = batches.transform(raw, Seeded(0), train=train)["image"]
        torch.testing.assert_close(found, torch.full_like(found, 100 / 255))


def test_standardised_data_has_mean_zero_and_variance_one(small: data.Source) -> None:
    found = torch.cat([b["image"] for b in data.all(small)])
    assert len(found) == 25
    assert found.mean(dim=(0, 2, 3)).abs().max() < 1e-3
    assert (found.std(dim=(0, 2, 3)) - 1).abs().max() < 1e-2


def test_everything_comes_once_and_in_order(small: data.Source) -> None:
    found = list(data.all(small, 7))
    assert [len(b["index"]) for b in found] == [7, 7, 7, 4]
    assert torch.cat([b["index"] for b in found]).tolist() == list(range(25))
    assert small.labels is not None
    assert torch.cat([b["label"] for b in found]).tolist() == small.labels.tolist()


def test_samples_are_a_fixed_choice_and_not_augmented(small: data.Source) -> None:
    batches = data.Batches(small, data.DataSettings(image_size=32), batch_size=5)
    found = batches.samples(5)
    assert found["index"].tolist() == some_of(25, 5).tolist()
    assert (found["image"] == batches.samples(5)["image"]).all()
    assert len(batches.samples(100)["index"]) == 25


def test_facts_and_preprocessing_describe_the_batches(small: data.Source) -> None:
    batches = data.Batches(small, data.DataSettings(image_size=(32, 48), normalise="imagenet"), batch_size=5)
    assert batches.facts.image_size == batches.preprocessing.image_size == (32, 48)
    assert batches.facts.mean == batches.preprocessing.mean == (0.485, 0.456, 0.406)
    assert batches.facts.classes == tuple(f"class{i}" for i in range(5))
    assert batches.samples(1)["image"].shape == (1, 3, 32, 48)


@pytest.mark.parametrize(("dtype", "depth"), [(np.uint16, 16), (np.float32, 32)])
def test_deep_and_many_channel_data_make_standardised_batches(tmp_path: Path, dtype: type, depth: int) -> None:
    for i in range(6):
        np.save(tmp_path / f"{i}.npy", noise(30 + i, 40, 5, seed=i, dtype=dtype))
    source = data.open(tmp_path)
    batches = data.Batches(source, data.DataSettings(image_size=16, color_jitter=0.2, erase=0.2), batch_size=6)  # type: ignore[arg-type]
    assert batches.facts.bit_depth == depth
    raw = next(batches.iterate())
    assert raw["image"].dtype == torch.float32
    found = batches.transform(raw, Seeded(0))["image"]
    assert found.shape == (6, 5, 16, 16)
    assert found.isfinite().all()
    with pytest.raises(UserError, match="3 channels"):
        data.Batches(source, data.DataSettings(normalise="imagenet"), batch_size=2)
    with pytest.raises(UserError, match="rand_augment"):
        data.Batches(source, data.DataSettings(augment="rand_augment"), batch_size=2)


@pytest.mark.parametrize(("have", "wanted"), [(1, 3), (3, 1)])
def test_a_models_preprocessing_decides_channels_and_size(tmp_path: Path, have: int, wanted: int) -> None:
    from PIL import Image

    for i in range(3):
        Image.fromarray(noise(20, 20, 3)[..., 0] if have == 1 else noise(20, 20, 3)).save(tmp_path / f"{i}.png")
    expected = Preprocessing(mean=(0.5,) * wanted, std=(0.25,) * wanted, image_size=(12, 12), channels=wanted)
    batches = data.Batches(data.open(tmp_path), batch_size=2, preprocessing=expected)
    found = batches.samples(2)["image"]
    assert found.shape == (2, wanted, 12, 12)
    if wanted == 3:
        assert (found[:, 0] == found[:, 2]).all()
    four = Preprocessing(mean=(0.5,) * 4, std=(0.5,) * 4, image_size=(12, 12), channels=4)
    with pytest.raises(UserError, match="takes 4"):
        data.Batches(data.open(tmp_path), batch_size=2, preprocessing=four)


@pytest.mark.parametrize("augment", ["none", "flip", "crop", "crop_flip", "shift", "shift_flip", "rand_augment"])
def test_every_augmentation_gives_batches_of_the_size_asked_for(small: data.Source, augment: str) -> None:
    batches = data.Batches(small, data.DataSettings(image_size=20, augment=augment), batch_size=4)  # type: ignore[arg-type]
    found = batches.transform(batches.raw(range(4)), Seeded(0))
    assert found["image"].shape == (4, 3, 20, 20)
    assert found["image"].dtype == torch.float32
    assert found["image"].is_contiguous()
    assert set(found) == {"image", "label", "index"}
    plain = batches.transform(batches.raw(range(4)), train=False)["image"]
    assert torch.equal(found["image"], plain) == (augment == "none")


def test_the_size_comes_from_the_data_where_it_is_open(photos: Callable[..., Path], tmp_path: Path) -> None:
    assert data.Batches(data.open(photos(4, 90, 90)), batch_size=2).facts.image_size == (96, 96)
    (tmp_path / "one").mkdir()
    np.save(tmp_path / "one" / "a.npy", noise(17, 23))
    assert data.Batches(data.open(tmp_path / "one"), batch_size=1).facts.image_size == (17, 23)


@pytest.mark.parametrize(
    ("option", "value", "says"),
    [
        ("crop_scale", [0.9, 0.2], "crop_scale"),
        ("crop_scale", [0, 1], "crop_scale"),
        ("image_size", 0, "image_size"),
        ("augment", "crops", "augment"),
        ("color_jitter", [0.1, 0.1, 0.1, 0.9], "hue"),
        ("columns", {"picture": "x"}, "columns"),
        ("flip", 1.5, "flip"),
        ("imagesize", 3, "did you mean image_size"),
    ],
)
def test_wrong_settings_are_one_clear_line(option: str, value: object, says: str) -> None:
    with pytest.raises(UserError, match=says):
        validated(data.DataSettings, {option: value}, where="data")


def test_settings_survive_json() -> None:
    before = data.DataSettings(augment="rand_augment", color_jitter=0.4, image_size=(8, 9))  # type: ignore[arg-type]
    assert validated(data.DataSettings, before.plain(), where="data") == before
    assert before.rand_augment is not None


def test_items_made_ahead_come_in_order_and_errors_in_their_place() -> None:
    def items() -> Iterator[int]:
        yield from range(5)
        raise KeyError("sixth")

    reader = ahead(items())
    assert [next(reader) for _ in range(5)] == [0, 1, 2, 3, 4]
    with pytest.raises(KeyError, match="sixth"):
        next(reader)


def test_closing_stops_the_thread_that_runs_ahead() -> None:
    made = []

    def items() -> Iterator[int]:
        for i in range(10**9):
            made.append(i)
            yield i

    reader = ahead(items(), depth=2)
    assert next(reader) == 0
    reader.close()  # type: ignore[attr-defined]
    count = len(made)
    time.sleep(0.3)
    assert len(made) == count <= 5


def test_importing_the_room_does_not_import_torch() -> None:
    import subprocess
    import sys

    code = (
        "import sys, unmask.data, unmask.data.settings; sys.exit('torch' in sys.modules or 'datasets' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
