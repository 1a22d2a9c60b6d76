"""Data sets by name: found under ``$UNMASK_DATA``, else fetched, else one line that says what to set."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from unmask.data.source import Source, find_split, no_split
from unmask.errors import UserError


@dataclass(frozen=True)
class Known:
    """Where a data set is to be had. torchvision: its class there, if its images fit in memory; hub: its id."""

    hub: str = ""
    torchvision: str = ""
    columns: Mapping[str, str] = field(default_factory=dict)
    splits: tuple[str, ...] = ("train", "test")


KNOWN: dict[str, Known] = {
    "cifar10": Known("uoft-cs/cifar10", "CIFAR10"),
    "cifar100": Known("uoft-cs/cifar100", "CIFAR100", {"label": "fine_label"}),
    "fashion_mnist": Known("zalando-datasets/fashion_mnist", "FashionMNIST"),
    "mnist": Known("ylecun/mnist", "MNIST"),
    "svhn": Known("ufldl-stanford/svhn:cropped_digits", "SVHN"),
    "stl10": Known("", "STL10", splits=("train", "test", "unlabeled")),
    "imagenet": Known("ILSVRC/imagenet-1k", splits=("train", "val")),
    "imagenette": Known("frgfm/imagenette:full_size"),
    "tiny_imagenet": Known("zh-plus/tiny-imagenet"),
    "food101": Known("ethz/food101"),
    "oxford_pets": Known("timm/oxford-iiit-pet"),
    "eurosat": Known("timm/eurosat-rgb"),
}


def data_root() -> Path | None:
    """The folder that ``$UNMASK_DATA`` names."""
    value = os.environ.get("UNMASK_DATA", "").strip()
    return Path(value).expanduser() if value else None


def open_name(name: str, split: str, columns: Mapping[str, str]) -> Source:
    """Looked for as ``name/`` (class folders, parquet, torchvision's files), ``name.parquet``, ``name-SPLIT.parquet``,
    then downloaded. Raises ``UserError`` where nothing of it is to be had."""
    root = data_root()
    if root is not None and not root.is_dir():
        raise UserError(f"UNMASK_DATA names {root}, which is no folder")
    if root is not None:
        found = _found(name, split, columns, root)
        if found is not None:
            return found
    return _fetched(name, split, columns, root)


def _found(name: str, split: str, columns: Mapping[str, str], root: Path) -> Source | None:
    from unmask.data.folder import image_files, open_folder
    from unmask.data.tables import open_parquet

    known = KNOWN[name]
    if known.torchvision:
        for folder in (root / name, root):
            if folder.is_dir() and (source := _torchvision(name, split, folder, download=False)):
                return source
    folder = root / name
    if folder.is_dir():
        if any(folder.rglob("*.parquet")):
            return open_parquet(name, folder, split, {**known.columns, **columns} if known.columns else columns)
        if any(folder.rglob("*.tar")):
            from unmask.data.shards import open_shards

            return open_shards(name, sorted(folder.rglob("*.tar")), split, columns)
        if image_files(folder):
            return open_folder(name, folder, split)
    for file in sorted(root.glob(f"{name}*.parquet"), key=lambda f: ("train" not in f.stem, f)):
        if file.stem == name or file.stem.removeprefix(name)[:1] in "-_.":
            return open_parquet(name, file, split, columns)
    return None


def _fetched(name: str, split: str, columns: Mapping[str, str], root: Path | None) -> Source:
    known = KNOWN[name]
    tried = []
    if known.hub:
        from unmask.data.tables import open_hub

        try:
            return open_hub(name, known.hub, split, {**known.columns, **columns})
        except UserError as error:
            if "no split" in str(error):
                raise
            tried.append(str(error))
    if known.torchvision:
        from unmask.data.cache import cache_root

        try:
            source = _torchvision(name, split, (root or cache_root() / "downloads") / name, download=True)
            if source is not None:
                return source
        except UserError:
            raise
        except Exception as error:  # whatever a download can die of
            tried.append(str(error))
    where = f"it is not under UNMASK_DATA={root}" if root is not None else "UNMASK_DATA is not set"
    raise UserError(
        f"{name}: {where} and it cannot be downloaded here: set UNMASK_DATA to a folder that holds {name}/ "
        f"(class folders, parquet{', or torchvision files' if known.torchvision else ''})"
    )


def _torchvision(name: str, split: str, folder: Path, *, download: bool) -> Source | None:
    """A torchvision data set kept as arrays; None where its files are not there."""
    import torchvision.datasets as sets

    known = KNOWN[name]
    found = find_split(split, known.splits)
    if found is None:
        raise no_split(name, split, known.splits)
    kind = getattr(sets, known.torchvision)
    choice: dict[str, Any] = {"split": found} if known.torchvision in ("STL10", "SVHN") else {"train": found == "train"}
    try:
        data = kind(root=str(folder), download=download, **choice)
    except (RuntimeError, FileNotFoundError, EOFError):
        if download:
            raise
        return None
    return from_arrays(name, split, data, known.torchvision)


def from_arrays(name: str, split: str, data: Any, kind: str) -> Source:
    """A source from a torchvision data set that holds its pixels in ``data``."""
    import datasets
    import numpy as np

    pixels = np.asarray(data.data)
    if kind in ("STL10", "SVHN"):
        pixels = pixels.transpose(0, 2, 3, 1)
    labels = getattr(data, "targets", None)
    labels = np.asarray(data.labels if labels is None else labels)
    classes = getattr(data, "classes", None) or [str(i) for i in range(int(labels.max()) + 1)]
    grey = pixels.ndim == 3
    head = b"P%d %d %d 255\n" % (5 if grey else 6, pixels.shape[2], pixels.shape[1])
    images = [
        {"bytes": head + image.tobytes(), "path": f"{i}.{'pgm' if grey else 'ppm'}"} for i, image in enumerate(pixels)
    ]
    features = datasets.Features(
        {"image": datasets.Image(decode=False), "label": datasets.ClassLabel(names=list(classes))}
    )
    dataset = datasets.Dataset.from_dict(
        {"image": images, "label": [int(v) if v >= 0 else None for v in labels]}, features=features
    )
    import hashlib

    key = hashlib.blake2b(pixels.tobytes(), digest_size=16).hexdigest()
    return Source(
        uri=name, split=split, dataset=dataset, classes=tuple(classes), fingerprint=key, columns=("image", "label")
    )
