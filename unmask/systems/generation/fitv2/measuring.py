"""How well the way back is known: the loss at fixed times with fixed noise, at trained sizes and beyond; sheets of samples."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from unmask.contracts import Batch, Picture
from unmask.data.aspect import AspectBatches
from unmask.draw import Draw, Scoped, Seeded
from unmask.systems.generation.pictures import samples_picture, sheet

if TYPE_CHECKING:
    from unmask.systems.generation.fitv2.model import FiTv2

IMAGES, TIMES, EACH = 1000, 10, 2  # test images; fixed times; of which each image is seen at so many
PART = 64


def images_of(
    model: FiTv2, data: Any, limit: int, device: Any, sizes: Sequence[tuple[int, int]] | None = None
) -> Iterator[Batch]:
    """Test images at the data's own shapes, or cut to ``sizes`` from their centre, in [-1, 1]."""
    from unmask.data.batches import everything
    from unmask.data.opening import open_source

    fewer = limit if data.limit is None else min(limit, data.limit)
    source = open_source(data.uri, data.split, columns=data.columns, limit=fewer)
    settings, context = data.model_copy(update={"normalise": "half", "erase": 0.0}), model.config.context
    if sizes is not None:
        settings = settings.model_copy(update={"sizes": tuple(sizes)})
        context = max(h // model.cell * (w // model.cell) for h, w in sizes)
    batches = AspectBatches(source, settings, 1, cell=model.cell, context=context)
    return everything(batches, PART, device=device)


@torch.no_grad()
def loss_on(model: FiTv2, batches: Iterator[Batch], draw: Draw, context: int) -> tuple[float, int]:
    """The mean loss of every image at two of ten fixed times, with its own fixed noise, and how many images there were."""
    total, seen = 0.0, 0
    for batch in batches:
        count = len(batch["image"])
        tokens, classes = model.tokens(batch, context=context), model.labels(batch)
        for view in range(EACH):
            time = fixed_times(model, seen, count, view, tokens.data.device)
            drawn = Scoped(draw, f"{seen}.{view}")
            total += float(model.terms(tokens, classes, drawn, time)["each"].double().sum())
        seen += count
    return total / max(EACH * seen, 1), seen


def fixed_times(model: FiTv2, first: int, count: int, view: int, device: Any) -> Tensor:
    """Image i is seen at the times i and i + 5 (mod 10) of ten equally spaced ones."""
    which = (torch.arange(first, first + count, device=device) + 5 * view) % TIMES
    time = (which.float() + 0.5) / TIMES
    return time if model.config.objective == "flow" else (time * len(model.diffusion)).long()


def measure(
    model: FiTv2,
    data: Any,
    draw: Draw,
    *,
    limit: int | None = None,
    device: torch.device | None = None,
    tell: Callable[[str], None] | None = None,
    folder: Path | None = None,
) -> dict[str, Any]:
    """See :meth:`.model.FiTv2.measure`."""
    where, most = device or model.device, limit or IMAGES
    c = model.config
    value, seen = loss_on(model, images_of(model, data, most, where), Scoped(draw, "trained"), c.context)
    found: dict[str, Any] = {"flow_loss": value, "samples": seen, "baseline": {}}
    beyond = []
    for size in c.measure_sizes:
        if tell is not None:
            tell(f"loss at {size[0]}x{size[1]} ...")
        model.check_size(size)
        context = size[0] // model.cell * (size[1] // model.cell)
        value, _ = loss_on(
            model, images_of(model, data, most, where, [size]), Scoped(draw, f"{size[0]}x{size[1]}"), context
        )
        found[f"flow_loss_{size[0]}x{size[1]}"] = value
        beyond.append(value)
    if beyond:
        found["flow_loss_beyond"] = sum(beyond) / len(beyond)
    if c.measure_samples:
        from unmask.systems.generation.dit.measuring import add_frechet

        found = add_frechet(found, model, data, device=where, tell=tell)
    if folder is not None:
        found["pictures"] = save_sheets(model, folder)
    return found


def all_sizes(model: FiTv2) -> list[tuple[int, int]]:
    """Sizes to show: three ratios that fill the context, and those of ``measure_sizes`` (open: one of twice the tokens)."""
    trained = model.shapes()
    height, width = trained[0]
    further = list(model.config.measure_sizes) or [(height, 2 * width)]
    return list(dict.fromkeys([*trained, *further]))


def samples_of_sizes(model: FiTv2, draw: Draw, *, steps: int, each: int = 4) -> list[Picture]:
    """A picture of samples for every size, the same noise at every look."""
    pictures = []
    trained = model.shapes()
    for size in all_sizes(model):
        condition = [i % model.num_classes for i in range(each)] if model.num_classes else None
        made = model.generate(each, Seeded(0), condition=condition, size=size, steps=steps, **model.preview_options())
        name = f"{size[0]}x{size[1]}"
        caption = f"{steps} steps, the same noise at every look."
        if size not in trained:
            caption += " More tokens than in training."
        pictures.append(samples_picture([s.value for s in made], name=f"samples-{name}", caption=caption))
    return pictures


def save_sheets(model: FiTv2, folder: Path, count: int = 8, steps: int = 50) -> list[dict[str, str]]:
    """A sheet of samples for every size in the folder, and how a report names it."""
    from PIL import Image

    written = []
    steps = min(steps, model.most_steps or steps)
    for size in all_sizes(model):
        condition = [i % model.num_classes for i in range(count)] if model.num_classes else None
        made = model.generate(count, Seeded(0), condition=condition, size=size, steps=steps, **model.preview_options())
        image = Image.fromarray(sheet([s.value for s in made], columns=4))
        times = max(1, 192 // max(min(image.size), 1))
        name = f"samples-{size[0]}x{size[1]}.png"
        image.resize((image.width * times, image.height * times), Image.Resampling.NEAREST).save(folder / name)
        written.append({"file": name, "caption": f"{count} samples of {size[0]}x{size[1]} pixels, {steps} steps"})
    return written
