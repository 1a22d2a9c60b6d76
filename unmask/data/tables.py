"""Parquet files and hub data sets: rows with an image column, in Hugging Face's layout or anything near it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from unmask.data.folder import files_fingerprint
from unmask.data.source import ALIASES, Source, find_split, no_split
from unmask.errors import UserError, nearest

_IMAGE_NAMES = ("image", "img", "images", "picture", "pixel_values", "jpg", "png", "webp", "file", "image_path", "path")
_LABEL_NAMES = ("label", "labels", "class", "target", "fine_label", "category", "cls")
_SPLIT_IN_NAME = re.compile(r"(?:^|[-_.])(train|training|test|val|validation|valid|dev)(?=$|[-_.])")
IN_MEMORY = 2 << 30  # bytes of parquet that are read whole rather than converted by `datasets` on disk


def open_parquet(uri: str, path: Path, split: str, columns: Mapping[str, str]) -> Source:
    """One parquet file, or a folder of them. ``X-train.parquet`` beside ``X-test.parquet`` are splits of one another."""
    dataset, fingerprint = parquet_table(uri, path, split)
    return from_table(uri, split, dataset, columns, fingerprint)


def parquet_table(uri: str, path: Path, split: str) -> tuple[Any, str]:
    """The rows of one split as a Hugging Face ``Dataset``, and their fingerprint."""
    files = parquet_splits(uri, path, split)
    import datasets
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        if sum(f.stat().st_size for f in files) <= IN_MEMORY:
            dataset = datasets.Dataset(pa.concat_tables([pq.read_table(f) for f in files], promote_options="default"))
        else:
            dataset = datasets.Dataset.from_parquet([str(f) for f in files])
    except FileNotFoundError:
        raise
    except Exception as error:  # whatever pyarrow says about a broken file
        raise UserError(f"{files[0] if len(files) == 1 else path}: cannot be read as parquet: {error}") from None
    return dataset, files_fingerprint(files)


def parquet_splits(uri: str, path: Path, split: str) -> list[Path]:
    """The files of one split. Raises ``UserError`` naming the splits there are."""
    folder, stem = (path, "") if path.is_dir() else (path.parent, path.stem)
    if path.is_file():
        own = _SPLIT_IN_NAME.search(stem)
        if own is None:
            if split != "train":
                raise no_split(uri, split, ["train"])
            return [path]
        siblings = {}
        for file in sorted(folder.glob("*.parquet")):
            match = _SPLIT_IN_NAME.search(file.stem)
            if (
                match
                and file.stem[: match.start(1)] == stem[: own.start(1)]
                and file.stem[match.end(1) :] == stem[own.end(1) :]
            ):
                siblings[match[1]] = file
        # "train" of a file that is itself another split is the file the user named.
        if split == "train" and own[1] not in ALIASES["train"]:
            return [path]
        name = find_split(split, list(siblings))
        if name is None:
            raise no_split(uri, split, list(siblings))
        return [siblings[name]]
    groups: dict[str, list[Path]] = {}
    for file in sorted(folder.rglob("*.parquet")):
        match = _SPLIT_IN_NAME.search(file.stem)
        inside = [p for p in file.relative_to(folder).parts[:-1] if p in {n for a in ALIASES.values() for n in a}]
        groups.setdefault(match[1] if match else inside[-1] if inside else "train", []).append(file)
    name = find_split(split, list(groups))
    if name is None:
        raise no_split(uri, split, list(groups))
    tables = {_table_name(file): file for file in groups[name]}
    if len(tables) > 1:
        shown = ", ".join(file.name for file in list(tables.values())[:4])
        raise UserError(f"{uri} holds {len(tables)} different tables: name the file of one ({shown} ...)")
    return groups[name]


def _table_name(file: Path) -> str:
    """What the parts of one table share: the name without its split, its numbers and its checksum."""
    rest = _SPLIT_IN_NAME.sub("", file.stem)
    return "-".join(w for w in re.split(r"[-_.]", rest) if w and w != "of" and not re.fullmatch(r"\d+|[0-9a-f]{8,}", w))


def from_table(uri: str, split: str, dataset: Any, columns: Mapping[str, str], fingerprint: str) -> Source:
    """A source from any Hugging Face ``Dataset`` with an image column. Raises ``UserError`` where there is none."""
    import datasets

    if len(dataset) == 0:
        raise UserError(f"{uri} holds no row (split {split})")
    features = dataset.features
    image = image_column(uri, features, columns.get("image"))
    label = _label_column(uri, features, columns.get("label"), image)
    mode = getattr(features[image], "mode", None)
    known = tuple(features)
    keep = dataset.select_columns([c for c in (image, label) if c])
    if isinstance(features[image], datasets.Image):
        keep = keep.cast_column(image, datasets.Image(decode=False))
    classes: tuple[str, ...] | None = None
    if label is not None:
        keep, classes = _class_ids(keep, label)
    names = {image: "image", **({label: "label"} if label else {})}
    keep = keep.rename_columns({k: v for k, v in names.items() if k != v})
    key = f"{fingerprint}-{image}" if image != "image" else fingerprint
    return Source(uri=uri, split=split, dataset=keep, classes=classes, fingerprint=key, columns=known, mode=mode)


def image_column(uri: str, features: Mapping[str, Any], wanted: str | None) -> str:
    import datasets

    if wanted is not None:
        if wanted not in features:
            raise UserError(f"{uri} has no column {wanted!r}: {nearest(wanted, features)}")
        if not holds_files(features[wanted]):
            raise UserError(f"column {wanted!r} of {uri} holds no images but {_kind(features[wanted])}")
        return wanted
    typed = [name for name, kind in features.items() if isinstance(kind, datasets.Image)]
    files = [name for name, kind in features.items() if holds_files(kind)]
    for candidates in (typed, files):
        for name in _IMAGE_NAMES:
            if name in candidates and not _plain_text(features[name]):
                return name
        if len(candidates) == 1 and not _plain_text(features[candidates[0]]):
            return candidates[0]
    for name in _IMAGE_NAMES[:-1]:  # a column of paths counts only under a name that says so
        if name in files:
            return name
    shown = ", ".join(features)
    close = nearest("image", features) if any("im" in f or "pic" in f for f in features) else ""
    hint = close or "name it with data.columns.image=NAME"
    raise UserError(f"{uri} has no image column among {shown}: {hint}")


def holds_files(kind: Any) -> bool:
    import datasets

    if isinstance(kind, datasets.Image):
        return True
    if isinstance(kind, Mapping):
        return "bytes" in kind and not isinstance(kind["bytes"], Mapping)
    return isinstance(kind, datasets.Value) and kind.dtype in ("binary", "large_binary", "string", "large_string")


def _plain_text(kind: Any) -> bool:
    import datasets

    return isinstance(kind, datasets.Value) and "string" in kind.dtype


def _kind(kind: Any) -> str:
    return str(getattr(kind, "dtype", None) or type(kind).__name__)


def _label_column(uri: str, features: Mapping[str, Any], wanted: str | None, image: str) -> str | None:
    import datasets

    if wanted is not None:
        if wanted not in features:
            raise UserError(f"{uri} has no column {wanted!r}: {nearest(wanted, features)}")
        return wanted
    usable = [name for name, kind in features.items() if name != image and _could_be_label(kind)]
    for name in _LABEL_NAMES:
        if name in usable:
            return name
    named = [n for n in usable if isinstance(features[n], datasets.ClassLabel)]
    return named[0] if named else None


def _could_be_label(kind: Any) -> bool:
    import datasets

    return isinstance(kind, datasets.ClassLabel) or (
        isinstance(kind, datasets.Value) and ("int" in kind.dtype or "string" in kind.dtype)
    )


def _class_ids(dataset: Any, label: str) -> tuple[Any, tuple[str, ...] | None]:
    """The label column as class ids 0 ... K - 1, and the names of the classes."""
    import datasets

    kind = dataset.features[label]
    if isinstance(kind, datasets.ClassLabel):
        return dataset, tuple(kind.names)
    values = dataset.select_columns([label]).with_format("arrow")[:][label].to_pylist()
    present = {v for v in values if v is not None}
    if (
        all(isinstance(v, int) for v in present)
        and present
        and min(present) >= 0
        and max(present) < 4 * len(present) + 16
    ):
        names = [str(i) for i in range(max(present) + 1)]
        ids = dict(zip(range(len(names)), range(len(names)), strict=True))
    else:
        names = [str(v) for v in sorted(present)]
        ids = {v: i for i, v in enumerate(sorted(present))}
    column = [None if v is None else ids[v] for v in values]
    feature = datasets.ClassLabel(names=names)
    return dataset.remove_columns(label).add_column(label, column, feature=feature), tuple(names)


def open_hub(uri: str, name: str, split: str, columns: Mapping[str, str]) -> Source:
    """A data set of the Hugging Face hub. Raises ``UserError`` in one line where it, or the network, is not there."""
    dataset = hub_table(uri, name, split)
    return from_table(uri, split, dataset, columns, f"hub-{dataset._fingerprint}")


def hub_table(uri: str, name: str, split: str) -> Any:
    """One split of a data set of the hub, as a Hugging Face ``Dataset``."""
    import datasets
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError

    name, _, config = name.partition(":")
    try:
        HfApi().dataset_info(name, timeout=10)
    except RepositoryNotFoundError:
        raise UserError(
            f"{uri}: neither a path here nor a data set of the hub (private ones need `hf auth login`)"
        ) from None
    except HfHubHTTPError as error:
        raise UserError(f"{uri}: the hub refused: {error}") from None
    except Exception as error:  # no network: the kind of error depends on how it is missing
        raise UserError(
            f"{uri}: no such file or folder here, and the hub cannot be reached ({type(error).__name__}): "
            "check the path, or go online to fetch the data set of that name"
        ) from None
    try:
        known = datasets.get_dataset_split_names(name, config or None)
        found = find_split(split, known)
        if found is None:
            raise no_split(uri, split, known)
        dataset = datasets.load_dataset(name, config or None, split=found)
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{uri}: cannot be loaded from the hub: {error}") from None
    return dataset
