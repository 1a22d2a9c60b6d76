"""A folder of images as a data set: class sub-folders and ``train`` / ``test`` folders where there are any."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from unmask.data.decode import is_image
from unmask.data.source import ALIASES, Source, find_split, no_split
from unmask.errors import UserError

_SPLITS = {name for names in ALIASES.values() for name in names}


def split_folders(folder: Path) -> dict[str, Path]:
    """The sub-folders that are splits, if one of them is a training split; names in lower case."""
    found = {p.name.lower(): p for p in sorted(folder.iterdir()) if p.is_dir() and p.name.lower() in _SPLITS}
    return found if found.keys() & set(ALIASES["train"]) else {}


def image_files(folder: Path) -> list[Path]:
    """Every image below a folder, by suffix, in order of path. Links are followed, but no folder is walked twice."""
    found: list[Path] = []
    seen: set[tuple[int, int]] = set()
    for here, folders, files in os.walk(folder, followlinks=True):
        status = os.stat(here)
        if (status.st_dev, status.st_ino) in seen:
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        folders[:] = sorted(f for f in folders if not f.startswith((".", "__MACOSX")))
        found += [Path(here, name) for name in files if is_image(Path(name))]
    return sorted(found)


def open_folder(uri: str, folder: Path, split: str) -> Source:
    """The images of one split. Classes are the sub-folders (nested ones joined with "/"), if every image lies in one and
    there are two or more. Raises ``UserError`` where there is no image."""
    import datasets

    splits = split_folders(folder)
    root = folder
    if splits:
        name = find_split(split, list(splits))
        if name is None:
            raise no_split(uri, split, list(splits))
        root = splits[name]
    elif split != "train":
        raise no_split(uri, split, ["train"])
    files = image_files(root)
    if not files:
        raise UserError(
            f"no image in {root}: it takes a folder of PNG, JPEG, WebP, TIFF, BMP, GIF or NPY files{_instead(root)}"
        )
    parents = [f.parent.relative_to(root).as_posix() for f in files]
    names = tuple(sorted(set(parents)))
    labelled = "." not in names and len(names) > 1
    columns: dict[str, list] = {"image": [str(f) for f in files]}
    features = {"image": datasets.Image(decode=False)}
    if labelled:
        ids = {n: i for i, n in enumerate(names)}
        columns["label"] = [ids[p] for p in parents]
        features["label"] = datasets.ClassLabel(names=list(names))
    return Source(
        uri=uri,
        split=split,
        dataset=datasets.Dataset.from_dict(columns, features=datasets.Features(features)),
        classes=names if labelled else None,
        fingerprint=files_fingerprint(files),
        columns=tuple(columns),
    )


def files_fingerprint(files: list[Path]) -> str:
    """Changes when a path, a size or a time of change does."""
    digest = hashlib.blake2b(digest_size=16)
    for file in files:
        try:
            status = os.stat(file)
            digest.update(
                f"{file.absolute()}\0{status.st_size}\0{status.st_mtime_ns}\n".encode(errors="surrogateescape")
            )
        except OSError:  # a dangling link is skipped with its reason when it is read
            digest.update(f"{file.absolute()}\0missing\n".encode(errors="surrogateescape"))
    return digest.hexdigest()


def _instead(folder: Path) -> str:
    """What lies there in place of images, if it is something we can open."""
    for pattern, words in (("*.parquet", "parquet files lie there"), ("*.tar", "shards lie there: use 'FOLDER/*.tar'")):
        if any(folder.rglob(pattern)):
            return f" ({words})"
    return ""
