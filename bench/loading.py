"""Loading for pre-training: cached, batched crops against torchvision's ImageFolder + DataLoader + transforms v2.

Both sides read one folder of JPEG photographs (500 x 375, as ImageNet's), and give batches of 224-pixel random resized
crops, flipped and standardised, for an epoch after the first. The evaluation crop of both is compared, so that the work
is the same.

    python bench/loading.py            # prints a table and the ratio
    python bench/loading.py --json
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageFilter
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

import unmask.data as data
from unmask.draw import Seeded

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def write_photographs(folder: Path, count: int) -> None:
    """JPEGs of 500 x 375 with a photograph's falling spectrum: soft shapes, edges, and grain."""
    rng = np.random.default_rng(0)
    for i in range(count):
        image = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)).resize(
            (500, 375), Image.Resampling.BICUBIC
        )
        fine = Image.fromarray(rng.integers(0, 256, (94, 125, 3), dtype=np.uint8)).resize(
            (500, 375), Image.Resampling.NEAREST
        )
        image = Image.blend(image, fine.filter(ImageFilter.GaussianBlur(1)), 0.25)
        where = folder / f"class{i % 4}"
        where.mkdir(parents=True, exist_ok=True)
        image.save(where / f"{i:04}.jpg", quality=90)


def torchvision_loader(folder: Path, batch: int, workers: int) -> torch.utils.data.DataLoader:
    transform = v2.Compose(
        [
            v2.PILToTensor(),
            v2.RandomResizedCrop(224, scale=(0.2, 1.0), interpolation=v2.InterpolationMode.BICUBIC, antialias=True),
            v2.RandomHorizontalFlip(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(MEAN, STD),
        ]
    )
    return torch.utils.data.DataLoader(
        ImageFolder(str(folder), transform),
        batch,
        shuffle=True,
        drop_last=True,
        num_workers=workers,
        persistent_workers=True,
    )


def same_centre_crop(folder: Path, batches: data.Batches) -> float:
    """The largest difference of the evaluation crop of eight images, in standard deviations."""
    transform = v2.Compose(
        [
            v2.PILToTensor(),
            v2.Resize(int(224 / batches.apply.eval_crop), v2.InterpolationMode.BICUBIC, antialias=True),
            v2.CenterCrop(224),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(MEAN, STD),
        ]
    )
    theirs = ImageFolder(str(folder), transform)
    ours = batches.transform(batches.raw(range(8)), train=False)["image"]
    return max(float((theirs[i][0] - ours[i]).abs().max()) for i in range(8))


def rate(epoch: Callable[[], Iterator[int]]) -> float:
    """Images a second over one epoch."""
    begin = time.perf_counter()
    images = sum(epoch())
    return images / (time.perf_counter() - begin)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=384)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    workers = min(os.cpu_count() or 1, 8)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary, "photographs")
        write_photographs(folder, options.images)
        os.environ["UNMASK_CACHE"] = str(Path(temporary, "cache"))
        begin = time.perf_counter()
        source = data.open(folder)
        settings = data.DataSettings(image_size=224, normalise="imagenet", eval_crop=0.875)
        batches = data.Batches(source, settings, options.batch)
        print(f"decoded {len(batches.images)} images in {time.perf_counter() - begin:.1f} s (once)")
        difference = same_centre_crop(folder, batches)
        assert difference < 1e-5, f"the evaluation crops differ by {difference}"
        loader = torchvision_loader(folder, options.batch, workers)
        steps = len(loader)

        def theirs() -> Iterator[int]:
            for images, _ in loader:
                yield len(images)

        reader = batches.iterate()

        def ours() -> Iterator[int]:
            for step, raw in enumerate(islice(reader, steps)):
                yield len(batches.transform(raw, Seeded(0, step))["image"])

        for warm_up in (theirs, ours):
            rate(warm_up)
        rates = {"torchvision": [], "unmask": []}
        for _ in range(3):  # interleaved, so that a busy machine slows both
            rates["torchvision"].append(rate(theirs))
            rates["unmask"].append(rate(ours))
        best = {name: max(values) for name, values in rates.items()}
        reader.close()
    ratio = best["unmask"] / best["torchvision"]
    result = {"images_per_second": best, "ratio": ratio, "workers": workers, "same_crop_within": difference}
    if options.json:
        print(json.dumps(result))
        return
    print(f"torchvision ImageFolder + DataLoader({workers} workers) + v2: {best['torchvision']:8.0f} images/s")
    print(f"unmask, cached, batched:                               {best['unmask']:8.0f} images/s")
    print(f"ratio {ratio:.1f} (same evaluation crop within {difference:.0e})")


if __name__ == "__main__":
    main()
