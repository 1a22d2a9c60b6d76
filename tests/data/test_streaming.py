from __future__ import annotations

import io
import json
import tarfile
from collections import Counter
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import pytest
import torch
from PIL import Image
from pixels import noise

import unmask.data as data
from unmask.data import streaming
from unmask.draw import Seeded
from unmask.errors import UserError

Make = Callable[..., str]


def add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    archive.addfile(info, io.BytesIO(content))


@pytest.fixture
def shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Make:
    """``shards(files, each)`` writes tar shards; sample i is a constant image of value i with class i % 3."""
    monkeypatch.setattr(streaming, "BLOCK", 8)

    def make(files: int = 4, each: int = 10, labels: str = "cls", broken: tuple[int, ...] = (), name: str = "s") -> str:
        for f in range(files):
            with tarfile.open(tmp_path / f"{name}-{f:04}.tar", "w") as archive:
                for j in range(each):
                    i = f * each + j
                    image = io.BytesIO()
                    Image.new("RGB", (10, 8), (i, i, i)).save(image, "PNG")
                    add(archive, f"x/{i:06}.png", b"broken" if i in broken else image.getvalue())
                    if labels == "cls":
                        add(archive, f"x/{i:06}.cls", str(i % 3).encode())
                    elif labels == "json":
                        add(archive, f"x/{i:06}.json", json.dumps({"label": i % 3}).encode())
        return str(tmp_path / f"{name}-*.tar")

    return make


def batches_of(uri: str, batch_size: int = 4, seed: int = 0) -> data.Batches:
    return data.Batches(data.open(uri), data.DataSettings(uri=uri, normalise="none", augment="none"), batch_size, seed)


def values(raw: dict) -> list[int]:
    return raw["image"][:, 0, 0, 0].tolist()


@pytest.mark.parametrize("labels", ["cls", "json", ""])
def test_shards_have_their_facts(shards: Make, labels: str) -> None:
    source = data.open(shards(labels=labels))
    facts = source.facts
    assert source.streaming
    assert (facts.count, facts.channels, facts.bit_depth, facts.image_size) == (40, 3, 8, (8, 10))
    assert facts.classes == (("0", "1", "2") if labels else None)
    assert facts.mean == pytest.approx([sum(range(40)) / 40 / 255] * 3)


def test_class_names_are_read_beside_the_shards(shards: Make) -> None:
    uri = shards()
    (Path(uri).parent / "classes.txt").write_text("cat\ndog\ncow\n")
    assert data.open(uri).classes == ("cat", "dog", "cow")


def test_an_epoch_gives_every_sample_once_and_the_next_in_another_order(shards: Make) -> None:
    batches = batches_of(shards())
    assert batches.steps_per_epoch == 10
    seen = [v for raw in islice(batches.iterate(), 20) for v in values(raw)]
    assert sorted(seen[:40]) == sorted(seen[40:]) == list(range(40))
    assert seen[:40] != seen[40:]
    assert seen[:40] != list(range(40))
    again = [v for raw in islice(batches_of(batches.source.uri).iterate(), 20) for v in values(raw)]
    assert again == seen
    other = [v for raw in islice(batches_of(batches.source.uri, seed=1).iterate(), 10) for v in values(raw)]
    assert other != seen[:40]


def test_labels_stay_with_their_images(shards: Make) -> None:
    for raw in islice(batches_of(shards()).iterate(), 12):
        assert raw["label"].tolist() == [v % 3 for v in values(raw)]


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("steps", [1, 2, 3, 7, 10, 13])
def test_a_stream_resumes_exactly_where_it_was(shards: Make, steps: int, world: int) -> None:
    uri = shards()
    for rank in range(world):
        first = batches_of(uri, batch_size=3 * world)
        reader = first.iterate(rank=rank, world=world)
        for _ in range(steps):
            next(reader)
        state = json.loads(json.dumps(first.state_dict()))
        expected = [(values(r), r["index"].tolist()) for r in islice(reader, 15)]
        second = batches_of(uri, batch_size=3 * world)
        resumed = second.iterate(start_step=steps, rank=rank, world=world, state=state)
        assert [(values(r), r["index"].tolist()) for r in islice(resumed, 15)] == expected


@pytest.mark.parametrize("files", [4, 3])
def test_two_processes_share_an_epoch(shards: Make, files: int) -> None:
    uri = shards(files=files)
    seen = [
        [v for raw in islice(batches_of(uri, batch_size=10).iterate(rank=rank, world=2), files) for v in values(raw)]
        for rank in (0, 1)
    ]
    assert not set(seen[0]) & set(seen[1])
    assert sorted(seen[0] + seen[1]) == list(range(10 * files))


def test_workers_of_a_loader_share_the_shards(shards: Make) -> None:
    source = data.open(shards())
    loader = torch.utils.data.DataLoader(source.dataset, batch_size=None, num_workers=2)
    assert Counter(row["key"] for row in loader) == Counter(f"x/{i:06}" for i in range(40))


def test_a_state_of_another_process_is_refused(shards: Make) -> None:
    batches = batches_of(shards())
    next(batches.iterate())
    with pytest.raises(UserError, match="resume with 1 processes"):
        next(batches.iterate(rank=1, world=2, state=batches.state_dict()))


def test_unreadable_samples_are_skipped_and_listed(shards: Make) -> None:
    batches = batches_of(shards(broken=(5, 17)))
    seen = [v for raw in islice(batches.iterate(), 9) for v in values(raw)]
    assert len(set(seen)) == 36
    assert not {5, 17} & set(seen)
    list(islice(batches.iterate(), 12))
    assert {Path(s["path"]).name for s in batches.source.skipped} == {"000005.png", "000017.png"}


def test_a_truncated_shard_gives_what_is_whole(shards: Make) -> None:
    uri = shards(files=2)
    path = Path(uri.replace("*", "0001"))
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    facts = data.open(uri).facts
    assert facts.count is not None
    assert 10 < facts.count < 20


def test_everything_and_samples_come_in_order(shards: Make) -> None:
    batches = batches_of(shards(broken=(2,)))
    found = torch.cat([b["image"] for b in data.all(batches, 7)])
    assert (found[:, 0, 0, 0] * 255).round().tolist() == [i for i in range(40) if i != 2]
    assert len(batches.samples(5)["image"]) == 5


def test_splits_are_read_from_the_names(shards: Make) -> None:
    shards(files=2, name="train")
    uri = shards(files=1, name="val").replace("val", "*")
    assert data.open(uri).facts.count == 20
    assert data.open(uri, "test").facts.count == 10


def test_transforms_take_streamed_batches(shards: Make) -> None:
    batches = data.Batches(data.open(shards()), data.DataSettings(image_size=8, augment="rand_augment"), 4)
    found = batches.transform(next(batches.iterate()), Seeded(0))
    assert found["image"].shape == (4, 3, 8, 8)


def test_shards_without_an_image_and_shares_of_shards_are_one_clear_line(tmp_path: Path, shards: Make) -> None:
    with tarfile.open(tmp_path / "none.tar", "w") as archive:
        add(archive, "a.txt", b"words")
    (tmp_path / "zero.tar").write_bytes(b"")
    with pytest.raises(UserError, match="no readable image"):
        data.open(tmp_path / "none.tar")
    with pytest.raises(UserError, match="empty"):
        data.open(tmp_path / "zero.tar")
    with pytest.raises(UserError, match="no file matches"):
        data.open(str(tmp_path / "nowhere" / "*.tar"))
    with pytest.raises(UserError, match="share of shards"):
        data.open(shards(), "train[:50%]")


def test_ragged_streams_are_padded(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "r.tar", "w") as archive:
        for i in range(6):
            out = io.BytesIO()
            Image.fromarray(noise(10 + i, 12, 3)).save(out, "JPEG")
            add(archive, f"{i}.jpg", out.getvalue())
    batches = data.Batches(data.open(tmp_path / "r.tar"), data.DataSettings(image_size=8), 6)
    raw = next(batches.iterate())
    assert raw["image"].shape == (6, 3, 15, 12)
    assert sorted(raw["size"][:, 0].tolist()) == list(range(10, 16))
    assert "label" not in raw
