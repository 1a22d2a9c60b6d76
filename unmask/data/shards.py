"""WebDataset shards: tar files of samples, read as a stream through Hugging Face ``datasets``.

A sample is the files that share a name up to the first dot: ``000.jpg`` with ``000.cls`` (the class as a number) or
``000.json`` (with "label"). Class names are read from ``classes.txt`` beside the shards, one a line, if it is there.
"""

from __future__ import annotations

import json
import os
import re
import tarfile
from collections import Counter
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from unmask.data.cache import cache_root, key_of
from unmask.data.decode import SUFFIXES, Unreadable, decode, fitted, header
from unmask.data.folder import files_fingerprint
from unmask.data.images import Images
from unmask.data.source import STORED_SIDE, Source, find_split, no_split
from unmask.errors import UserError

LOOKED_AT = 512  # samples that sizes, channels and statistics are taken from
COUNTED_UP_TO = 50 << 30  # bytes of shards that are walked through to count their samples
_SPLIT_IN_NAME = re.compile(r"(?:^|[-_.])(train|training|test|val|validation|valid|dev)(?=$|[-_.\d])")


def open_shards(uri: str, files: list[Path], split: str, columns: Mapping[str, str]) -> Source:
    """A streaming source over tar files. Where names or folders say train, val or test, they are splits."""
    groups: dict[str, list[Path]] = {}
    for file in files:
        match = _SPLIT_IN_NAME.search(file.stem)
        folder = file.parent.name if _SPLIT_IN_NAME.fullmatch(file.parent.name) else "train"
        groups.setdefault(match[1] if match else folder, []).append(file)
    if len(groups) == 1 and split == "train":
        name: str | None = next(iter(groups))
    else:
        name = find_split(split, list(groups))
    if name is None:
        raise no_split(uri, split, list(groups))
    chosen = groups[name]
    if all(f.stat().st_size == 0 for f in chosen):
        raise UserError(f"{uri}: the shards are empty")
    source = Source(
        uri=uri,
        split=split,
        dataset=None,
        fingerprint=files_fingerprint(chosen),
        columns=("image", "label", "key"),
        streaming=True,
    )
    source.surveyed["files"] = [str(f) for f in chosen]
    source.surveyed["columns"] = dict(columns)
    source.dataset = stream_of(source, [str(f) for f in chosen])
    found = survey(source)
    source.classes = found["classes"]
    return source


def stream_of(source: Source, files: list[str]) -> Any:
    """An ``IterableDataset`` over the shards in this order, splittable by node and by worker, with a ``state_dict``."""
    import datasets

    features = datasets.Features(
        {"image": datasets.Image(decode=False), "label": datasets.Value("int64"), "key": datasets.Value("string")}
    )
    generated = {"files": files, "columns": source.surveyed["columns"]}
    return datasets.IterableDataset.from_generator(samples_of, gen_kwargs=generated, features=features)


def samples_of(files: list[str], columns: Mapping[str, str]) -> Iterator[dict[str, Any]]:
    """The samples of tar files, one after another. What cannot be read of a broken shard is left out."""
    for file in files:
        for key, parts in grouped(file):
            image = next(((n, b) for n, b in parts.items() if wanted(n, columns)), None)
            if image is None:
                continue
            yield {
                "image": {"bytes": image[1], "path": f"{os.path.basename(file)}/{key}.{image[0]}"},
                "label": label_of(parts, columns),
                "key": key,
            }


def grouped(file: str) -> Iterator[tuple[str, dict[str, bytes]]]:
    """(key, {extension: content}) of each sample of one tar file."""
    key: str | None = None
    parts: dict[str, bytes] = {}
    try:
        with tarfile.open(file, "r|*") as archive:
            for member in archive:
                if not member.isfile():
                    continue
                folder, _, name = member.name.rpartition("/")
                stem, _, extension = name.partition(".")
                here = f"{folder}/{stem}" if folder else stem
                if not stem or not extension:
                    continue
                if here != key:
                    if parts and key is not None:
                        yield key, parts
                    key, parts = here, {}
                content = archive.extractfile(member)
                parts[extension.lower()] = content.read() if content else b""
    except (tarfile.TarError, EOFError, OSError):
        return  # the sample at hand is not whole either
    if parts and key is not None:
        yield key, parts


def wanted(extension: str, columns: Mapping[str, str]) -> bool:
    """Whether this part of a sample is its image."""
    chosen = columns.get("image")
    return extension == chosen.lower() if chosen else f".{extension.rpartition('.')[2]}" in SUFFIXES


def label_of(parts: Mapping[str, bytes], columns: Mapping[str, str]) -> int:
    """The class id of a sample, -1 where it has none."""
    name = columns.get("label", "")
    for extension in [name] if name in parts else ("cls", "label", "cls.txt"):
        if extension in parts:
            try:
                return int(parts[extension])
            except ValueError:
                return -1
    if "json" in parts:
        try:
            value = json.loads(parts["json"])
            found = value.get(name or "label", value.get("cls", -1))
            return int(found)
        except (ValueError, TypeError, AttributeError):
            return -1
    return -1


def survey(source: Source) -> dict[str, Any]:
    """Facts of a stream: counted and looked at once, then kept beside the cached images."""
    if "facts" not in source.surveyed:
        path = (
            cache_root()
            / "streams"
            / f"{key_of(source.fingerprint + str(source.surveyed['columns']), STORED_SIDE)}.json"
        )
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            found = _look(source)
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                aside = path.with_suffix(f".{os.getpid()}.part")
                aside.write_text(json.dumps(found), encoding="utf-8")
                aside.replace(path)
            except OSError:  # it is looked at again next time
                pass
        source.surveyed["labelled"] = found.pop("labelled")
        source.surveyed["facts"] = {k: _tuples(v) for k, v in found.items()}
    return source.surveyed["facts"]


def _tuples(value: Any) -> Any:
    return tuple(_tuples(v) for v in value) if isinstance(value, list) else value


def _look(source: Source) -> dict[str, Any]:
    files, columns = source.surveyed["files"], source.surveyed["columns"]
    arrays, sizes, depths, reasons = [], [], [], []
    counts: Counter[int] = Counter()
    for sample in samples_of(files, columns):
        try:
            head = header(sample["image"])
            arrays.append(decode(sample["image"], STORED_SIDE))
        except Unreadable as error:
            reasons.append(str(error))
            continue
        sizes.append((head.height, head.width))
        counts[head.channels] += 1
        depths.append(head.depth)
        if len(arrays) == LOOKED_AT:
            break
    if not arrays:
        why = f" ({reasons[0]})" if reasons else ": a sample is 000.jpg with 000.cls"
        raise UserError(f"no readable image in the shards of {source.uri}{why}")
    channels = max(counts) if set(counts) <= {1, 3} else counts.most_common(1)[0][0]
    depth = max(depths)
    kept, originals = [], []
    for array, size in zip(arrays, sizes, strict=True):
        try:
            kept.append(fitted(array, channels, depth, STORED_SIDE))
            originals.append(size)
        except Unreadable:
            continue
    stored = np.array([a.shape[:2] for a in kept], dtype=np.int64)
    rows = np.arange(len(kept))
    images = Images(rows, stored, channels, depth, np.array(originals), [], lambda i: (kept[i], i))
    mean, std = images.statistics()
    count, labels = _count(files, columns)
    names = _class_names(files, labels)
    return {
        "count": count,
        "channels": channels,
        "bit_depth": depth,
        "sizes": images.original_sizes,
        "image_size": images.one_size,
        "classes": names,
        "mean": mean,
        "std": std,
        "labelled": bool(labels) or names is not None,
    }


def _count(files: list[str], columns: Mapping[str, str]) -> tuple[int | None, set[int]]:
    """How many samples with an image there are, and their labels; counts nothing where the shards are very large."""
    if sum(os.path.getsize(f) for f in files) > COUNTED_UP_TO:
        labels = {s["label"] for s in islice(samples_of(files, columns), 4096)}
        return None, labels - {-1}
    count, labels = 0, set()
    for sample in samples_of(files, columns):
        count += 1
        labels.add(sample["label"])
    return count, labels - {-1}


def _class_names(files: list[str], labels: set[int]) -> list[str] | None:
    path = Path(files[0]).parent / "classes.txt"
    if path.is_file():
        return [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    return [str(i) for i in range(max(labels) + 1)] if labels and max(labels) < 100_000 else None
