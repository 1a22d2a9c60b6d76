"""``sample:photos``: tiles cut from the photographs that scikit-image and scikit-learn install; no network needed."""

from __future__ import annotations

import functools
import importlib.util
from pathlib import Path

import numpy as np
from PIL import Image

from unmask.data.source import Source, find_split, no_split
from unmask.errors import MissingExtra, UserError, nearest

# Photographs inside the two wheels; of the stereo pair only one view, so that no scene is in twice.
PHOTOGRAPHS = {
    "skimage": [
        *("astronaut.png", "brick.png", "camera.png", "chelsea.png", "coffee.png", "coins.png", "grass.png"),
        *("gravel.png", "hubble_deep_field.jpg", "ihc.png", "motorcycle_left.png", "retina.jpg", "rocket.jpg"),
    ],
    "sklearn": ["china.jpg", "flower.jpg"],
}
_FOLDERS = {"skimage": "data", "sklearn": "datasets/images"}
SIZES = (96, 128, 224)
TEST_SHARE = 0.25  # of a photograph's longer side, and never less than one tile
STRIDE = 24  # pixels between training tiles, which overlap
LEAST_CONTRAST = 12.0  # standard deviation of a tile's grey, of 255
MOST = {"train": 200, "test": 40}  # tiles of one photograph, spread evenly, so that large ones do not outweigh


def open_photos(uri: str, split: str) -> Source:
    """``sample:photos`` (96-pixel tiles) or ``sample:photos@128``, ``@224``. The label is the photograph of origin.

    Training tiles come from one end of a photograph, test tiles from the other: the regions do not touch.
    """
    _, _, text = uri.partition("@")
    if uri != "sample:photos" and text not in map(str, SIZES):
        raise UserError(f"no sample {uri!r}: {nearest(uri, ['sample:photos', *(f'sample:photos@{s}' for s in SIZES)])}")
    name = find_split(split, list(MOST))
    if name is None:
        raise no_split(uri, split, list(MOST))
    tile = int(text or SIZES[0])
    dataset, classes = _tiles(tile, name)
    import PIL

    return Source(
        uri=uri,
        split=split,
        dataset=dataset,
        classes=classes,
        fingerprint=f"photos-4-{tile}-{name}-{'-'.join(classes)}-{PIL.__version__}",
        columns=("image", "label"),
    )


@functools.lru_cache(maxsize=2)
def _tiles(tile: int, split: str):  # type: ignore[no-untyped-def]
    import datasets

    images: list[dict] = []
    labels: list[int] = []
    classes: list[str] = []
    for name, path in photographs().items():
        with Image.open(path) as image:
            pixels = np.asarray(image.convert("RGB"))
        places = tile_places(pixels.shape[0], pixels.shape[1], tile, split)
        places = spread([p for p in places if has_content(pixels[p[0] : p[0] + tile, p[1] : p[1] + tile])], MOST[split])
        if not places:
            continue
        for top, left in places:
            cut = pixels[top : top + tile, left : left + tile]
            # PPM: a header and the pixels as they are, so that nothing is spent on compressing what is cached anyway
            content = b"P6 %d %d 255\n" % (tile, tile) + cut.tobytes()
            images.append({"bytes": content, "path": f"{name}-{top}-{left}.ppm"})
            labels.append(len(classes))
        classes.append(name)
    features = datasets.Features({"image": datasets.Image(decode=False), "label": datasets.ClassLabel(names=classes)})
    return datasets.Dataset.from_dict({"image": images, "label": labels}, features=features), tuple(classes)


def photographs() -> dict[str, Path]:
    """Name -> file of every photograph that is installed. Raises ``MissingExtra`` where a package is missing."""
    found: dict[str, Path] = {}
    for package, files in PHOTOGRAPHS.items():
        spec = importlib.util.find_spec(package)
        if spec is None or not spec.submodule_search_locations:
            raise MissingExtra("sample:photos", "scikit-image" if package == "skimage" else "scikit-learn", "photos")
        folder = Path(next(iter(spec.submodule_search_locations)), _FOLDERS[package])
        found |= {Path(f).stem: folder / f for f in files if (folder / f).is_file()}
    if not found:
        raise MissingExtra("sample:photos", "scikit-image", "photos")
    return found


def tile_places(height: int, width: int, tile: int, split: str) -> list[tuple[int, int]]:
    """(top, left) of the tiles of one split; none where the photograph is too small for both splits."""
    long, short = max(height, width), min(height, width)
    border = long - max(round(long * TEST_SHARE), tile)
    if short < tile or border < tile:
        return []
    first, last = (0, border) if split == "train" else (border, long)
    stride = STRIDE if split == "train" else tile // 2
    along = range(first, last - tile + 1, stride)
    across = range(0, short - tile + 1, stride)
    return [(a, b) if height >= width else (b, a) for a in along for b in across]


def has_content(pixels: np.ndarray) -> bool:
    """Whether a tile shows anything: clear sky and black margins teach nothing."""
    return float(pixels[::4, ::4].mean(axis=2).std()) >= LEAST_CONTRAST


def spread(items: list, most: int) -> list:
    """At most so many of the items, spread evenly."""
    return items if len(items) <= most else [items[i * len(items) // most] for i in range(most)]
