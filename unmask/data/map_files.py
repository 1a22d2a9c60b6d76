"""Where label maps are found: two folders, COCO's panoptic files, or a table with an annotation column."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from unmask.data.decode import Encoded
from unmask.data.folder import files_fingerprint, image_files
from unmask.data.source import ALIASES, encoded, find_split, no_split
from unmask.errors import UserError, nearest

IMAGES = ("images", "image", "img", "leftImg8bit", "JPEGImages", "img_dir", "photos")
LABELS = ("labels", "label", "masks", "mask", "annotations", "annotation", "gtFine", "SegmentationClass", "ann_dir")
COLUMNS = ("annotation", "mask", "segmentation_mask", "label", "labels", "semantic_segmentation", "segmentation")
_ENDINGS = re.compile(r"(_leftImg8bit|_gtFine_labelTrainIds|_labelTrainIds|_mask|_label|_labels|_L)$", re.IGNORECASE)


@dataclass
class Found:
    """One split: an image and a label map a sample, by number. segments: of a COCO panoptic sample, its ``segments_info``
    with ``category_id`` already a class number. classes, things: where the data name them."""

    uri: str
    split: str
    images: Sequence[Encoded]
    maps: Sequence[Encoded]
    names: list[str]
    classes: tuple[str, ...] | None = None
    things: tuple[int, ...] | None = None
    segments: list[list[dict[str, Any]]] | None = None
    fingerprint: str = ""
    skipped: list[dict[str, str]] = field(default_factory=list)


class Column(Sequence[Encoded]):
    """The files of one column of a Hugging Face table, read when asked for."""

    def __init__(self, table: Any, name: str):
        self.table, self.name = table.select_columns([name]), name

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index: Any) -> Any:
        return encoded(self.table[int(index)][self.name])


def find(uri: str, split: str, columns: Mapping[str, str]) -> Found:
    """Images and label maps of one split ("train", "test" ...). Raises ``UserError`` for what is missing."""
    path = Path(uri).expanduser()
    try:
        if path.is_dir():
            found = _panoptic(uri, path, split)
            if found is not None:
                return found
            if any(path.rglob("*.parquet")) and not _pair(path):
                return _table(uri, path, split, columns)
            return _folders(uri, path, split)
        if path.suffix.lower() == ".parquet" and path.is_file():
            return _table(uri, path, split, columns)
        if path.suffix.lower() == ".zip" and path.is_file():
            raise UserError(f"{uri} is an archive: unpack it and name the folder")
        if re.fullmatch(r"(hf:)?[\w.-]+/[\w.-]+(:[\w.-]+)?", uri) and not path.suffix:
            from unmask.data.tables import hub_table

            table = hub_table(uri, uri.removeprefix("hf:"), split)
            return _from_table(uri, split, table, columns, f"hub-{table._fingerprint}")
    except OSError as error:
        raise UserError(f"{uri}: cannot be read: {error.strerror or error}") from None
    raise UserError(
        f"no label maps at {uri!r}: it takes a folder with images/ and labels/, a COCO panoptic folder, a .parquet file or a hub id"
    )


# --- two folders ---


def _pair(folder: Path) -> tuple[Path, Path] | None:
    """The folders of images and of label maps inside one."""
    inside = {p.name.lower(): p for p in sorted(folder.iterdir()) if p.is_dir()}
    image = next((inside[n.lower()] for n in IMAGES if n.lower() in inside), None)
    label = next((inside[n.lower()] for n in LABELS if n.lower() in inside), None)
    return (image, label) if image is not None and label is not None else None


def _splits(folder: Path) -> dict[str, Path]:
    known = {name for names in ALIASES.values() for name in names}
    return {p.name.lower(): p for p in sorted(folder.iterdir()) if p.is_dir() and p.name.lower() in known}


def _folders(uri: str, folder: Path, split: str) -> Found:
    pair = _pair(folder)
    if pair is not None:  # images/train and labels/train, or no splits at all
        splits = _splits(pair[0])
        if splits:
            name = find_split(split, list(splits))
            if name is None:
                raise no_split(uri, split, list(splits))
            label = _splits(pair[1]).get(name)
            if label is None:
                raise UserError(f"{pair[0] / name} has no label maps: {pair[1] / name} is not there")
            pair = splits[name], label
        elif split != "train":
            raise no_split(uri, split, ["train"])
        root = folder
    else:
        splits = _splits(folder)
        if not splits:
            shown = ", ".join(sorted(p.name for p in folder.iterdir() if p.is_dir())[:6]) or "no folder"
            raise UserError(f"{uri} holds {shown}: it takes images/ and labels/ (or train/images, train/labels ...)")
        name = find_split(split, list(splits))
        if name is None:
            raise no_split(uri, split, list(splits))
        root = splits[name]
        pair = _pair(root)
        if pair is None:
            raise UserError(f"{root} has no folders images/ and labels/")
    images, maps = image_files(pair[0]), image_files(pair[1])
    trained = [m for m in maps if "labelTrainIds" in m.name]  # Cityscapes keeps several kinds of map side by side
    by_key = {_key(m, pair[1]): m for m in trained or maps}
    rows = [(i, by_key.get(_key(i, pair[0]))) for i in images]
    kept = [(i, m) for i, m in rows if m is not None]
    skipped = [{"path": str(i), "reason": "has no label map"} for i, m in rows if m is None]
    if not kept:
        example = f", such as {_key(images[0], pair[0])}.png for {images[0].name}" if images else ""
        raise UserError(f"{pair[0]} holds {len(images)} images, and {pair[1]} no label map of the same name{example}")
    return Found(
        uri=uri,
        split=split,
        images=[{"bytes": None, "path": str(i)} for i, _ in kept],
        maps=[{"bytes": None, "path": str(m)} for _, m in kept],
        names=[str(m) for _, m in kept],
        classes=_class_names([folder, root, pair[1]]),
        fingerprint=files_fingerprint([f for row in kept for f in row]),
        skipped=skipped,
    )


def _key(path: Path, root: Path) -> str:
    """What an image and its label map have in common: the path below their folders, without endings."""
    below = path.relative_to(root)
    return (below.parent / _ENDINGS.sub("", below.stem)).as_posix()


def _class_names(folders: Sequence[Path]) -> tuple[str, ...] | None:
    """The lines of the first ``classes.txt``: line i names the class of value i."""
    for folder in folders:
        file = folder / "classes.txt"
        if file.is_file():
            names = tuple(line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip())
            if not names:
                raise UserError(f"{file} is empty: it takes one class name a line, in order of the values")
            return names
    return None


# --- COCO panoptic ---


def _panoptic(uri: str, folder: Path, split: str) -> Found | None:
    files = {f.stem.lower(): f for f in sorted(folder.rglob("*.json")) if "panoptic" in f.stem.lower()}
    if not files:
        return None
    words = {stem: re.sub(r"\d+$", "", stem.replace("panoptic", "").strip("_- ")) for stem in files}
    if len(files) == 1 and split == "train":
        file = next(iter(files.values()))
    else:
        name = find_split(split, list(words.values()))
        if name is None:
            raise no_split(uri, split, sorted(w for w in words.values() if w))
        file = files[next(stem for stem, word in words.items() if word == name)]
    try:
        read = json.loads(file.read_text(encoding="utf-8"))
        images, annotations, categories = read["images"], read["annotations"], read["categories"]
        if annotations and "segments_info" not in annotations[0]:
            raise KeyError("segments_info")
    except (ValueError, KeyError, TypeError) as error:
        reason = f"no {error} in it" if isinstance(error, KeyError) else str(error)
        raise UserError(f"{file} is no COCO panoptic file: {reason}") from None
    pngs = next((p for p in (file.with_suffix(""), folder / file.stem) if p.is_dir()), None)
    if pngs is None:
        raise UserError(f"{file} needs its PNG files in {file.with_suffix('')}")
    inside = {i.name: i for i in image_files(folder) if pngs not in i.parents}
    number = {c["id"]: i for i, c in enumerate(categories)}
    of_image = {i["id"]: i["file_name"] for i in images}
    found = Found(uri, split, [], [], [], tuple(str(c["name"]) for c in categories), segments=[])
    found.things = tuple(i for i, c in enumerate(categories) if c.get("isthing", 1))
    rows_images, rows_maps, used = [], [], []
    for entry in annotations:
        image = inside.get(Path(str(of_image.get(entry["image_id"], ""))).name)
        png = pngs / entry["file_name"]
        if image is None or not png.is_file():
            missing = "has no image file" if image is None else f"has no {png.name}"
            found.skipped.append({"path": str(of_image.get(entry["image_id"], entry["image_id"])), "reason": missing})
            continue
        for segment in entry["segments_info"]:
            if segment["category_id"] not in number:
                raise UserError(
                    f"{file}: {entry['file_name']} has category {segment['category_id']}, which is not listed"
                )
        assert found.segments is not None
        found.segments.append([{**s, "category_id": number[s["category_id"]]} for s in entry["segments_info"]])
        rows_images.append({"bytes": None, "path": str(image)})
        rows_maps.append({"bytes": None, "path": str(png)})
        found.names.append(str(png))
        used += [image, png]
    if not rows_images:
        reason = found.skipped[0]["reason"] if found.skipped else "it lists none"
        raise UserError(f"{file}: none of its {len(annotations)} pictures is there ({reason})")
    found.images, found.maps, found.fingerprint = rows_images, rows_maps, files_fingerprint([*used, file])
    return found


# --- tables ---


def _table(uri: str, path: Path, split: str, columns: Mapping[str, str]) -> Found:
    from unmask.data.tables import parquet_table

    table, fingerprint = parquet_table(uri, path, split)
    return _from_table(uri, split, table, columns, fingerprint)


def _from_table(uri: str, split: str, table: Any, columns: Mapping[str, str], fingerprint: str) -> Found:
    import datasets

    from unmask.data.tables import holds_files, image_column

    if len(table) == 0:
        raise UserError(f"{uri} holds no row (split {split})")
    features = table.features
    wanted = columns.get("label")
    if wanted is not None and wanted not in features:
        raise UserError(f"{uri} has no column {wanted!r}: {nearest(wanted, features)}")
    image = image_column(uri, {k: v for k, v in features.items() if k != wanted}, columns.get("image"))
    files = [n for n, kind in features.items() if n != image and holds_files(kind)]
    label = wanted or next((n for n in COLUMNS if n in files), files[0] if len(files) == 1 else None)
    if label is None or label not in files:
        raise UserError(
            f"{uri} has no column of label maps among {', '.join(features)}: name it with data.columns.label=NAME"
        )
    for name in (image, label):
        if isinstance(features[name], datasets.Image):
            table = table.cast_column(name, datasets.Image(decode=False))
    return Found(
        uri=uri,
        split=split,
        images=Column(table, image),
        maps=Column(table, label),
        names=[f"row {i} of {uri}" for i in range(len(table))],
        fingerprint=f"{fingerprint}-{image}-{label}",
    )
