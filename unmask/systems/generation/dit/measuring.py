"""How well noise is recognised: the error at fixed times with fixed noise, beside what trivial answers reach."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from unmask.draw import Draw, Seeded
from unmask.systems.generation.dit.answers import alone
from unmask.systems.generation.metrics import measure_generator, real_images
from unmask.systems.generation.pictures import sheet

if TYPE_CHECKING:
    from unmask.systems.generation.dit.model import DiT

IMAGES, TIMES, EACH = 1000, 10, 4  # test images; fixed times; of which each image is seen at so many
FRECHET_STEPS = 50


@torch.no_grad()
def measure(
    model: DiT,
    data: Any,
    draw: Draw,
    *,
    limit: int | None = None,
    device: torch.device | None = None,
    tell: Callable[[str], None] | None = None,
    folder: Path | None = None,
) -> dict[str, Any]:
    """See :meth:`.model.DiT.measure`. Image i is seen at the times i, i + 3, i + 6, i + 9 (mod 10) of ten equally spaced ones."""
    where = device or model.device
    total = model.config.diffusion_steps
    times = torch.tensor([int((k + 0.5) * total / TIMES) for k in range(TIMES)], device=where)
    sums = {
        name: torch.zeros(TIMES, dtype=torch.float64) for name in ("model", "no noise", "each value alone", "count")
    }
    seen = 0
    for batch in real_images(
        data, limit or IMAGES, size=model.config.image_size, channels=model.config.channels, device=where
    ):
        x0, classes = model.latents(batch["image"]), model.labels(batch)
        numbers = torch.arange(seen, seen + len(x0), device=where)
        for view in range(EACH):
            which = (numbers + 3 * view) % TIMES
            t = times[which]
            noise = draw.normal(f"noise.{seen}.{view}", x0.shape, device=where)
            noisy = model.diffusion.noisy(x0, t, noise)
            guess, _ = model.diffusion.split(model.network(noisy, t, classes).float(), noisy)
            single = alone(model.diffusion, noisy, t, x0.square().mean())
            for name, answer in (("model", guess), ("no noise", torch.zeros_like(noise)), ("each value alone", single)):
                add(sums[name], which, (answer - noise).square().flatten(1).mean(dim=1))
            add(sums["count"], which, torch.ones(len(x0)))
        seen += len(x0)
        if tell is not None:
            tell(f"noise error: {seen} images")
    mean = {name: float(value.sum() / sums["count"].sum()) for name, value in sums.items()}
    by_time = (sums["model"] / sums["count"].clamp(min=1)).tolist()
    found: dict[str, Any] = {
        "epsilon_mse": mean["model"],
        "by_time": {str(int(t)): v for t, v in zip(times.tolist(), by_time, strict=True)},
        "samples": seen,
        "baseline": {name: {"epsilon_mse": mean[name]} for name in ("no noise", "each value alone")},
    }
    if model.config.measure_samples:
        found = add_frechet(found, model, data, device=where, tell=tell)
    if folder is not None:
        found["pictures"] = [save_samples(model, folder)]
    return found


def add(sums: Tensor, which: Tensor, values: Tensor) -> None:
    """Values ``[B]`` onto the sums that ``which [B]`` names."""
    sums.index_add_(0, which.cpu(), values.double().cpu())


def add_frechet(found: dict[str, Any], model: Any, data: Any, **options: Any) -> dict[str, Any]:
    """The numbers with those of samples against test images: few steps, no guidance, both said."""
    asked = {"steps": min(FRECHET_STEPS, model.most_steps or FRECHET_STEPS), "guidance": 1.0, **model.preview_options()}
    more = measure_generator(model, data, limit=model.config.measure_samples, **options, **asked)
    baseline = {**found["baseline"], **more.pop("baseline", {})}
    more["frechet_samples"] = more.pop("samples", None)
    return {**found, **more, "baseline": baseline, "frechet_asked": {k: str(v) for k, v in asked.items()}}


def save_samples(model: Any, folder: Path, count: int = 16, **asked: Any) -> dict[str, str]:
    """A sheet of samples in the folder, and how a report names it."""
    from PIL import Image

    classes = [i % model.num_classes for i in range(count)] if model.num_classes else None
    steps = min(FRECHET_STEPS, model.most_steps or FRECHET_STEPS)
    made = model.generate(count, Seeded(0), condition=classes, steps=steps, **{**model.preview_options(), **asked})
    image = Image.fromarray(sheet([s.value for s in made]))
    times = max(1, 256 // max(min(image.size), 1))
    image.resize((image.width * times, image.height * times), Image.Resampling.NEAREST).save(folder / "samples.png")
    size = "x".join(str(v) for v in made[0].made_by["size"])
    return {"file": "samples.png", "caption": f"{count} samples of {size} pixels, {steps} steps"}
