"""Time an image against image side: does the cost grow with the pixels, or with their square?"""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from unmask.claims.claim import Cost
from unmask.claims.materials import short

PIXELS = 2 * 256 * 256  # of a batch: small images come in large batches, so that every side fills the machine


def cost(wanted: Cost, work: Path, talk: Callable[[str], None]) -> dict[str, Any]:
    """Milliseconds an image of each backbone's forward pass at each side (median, fp32, no gradients), and the growth.

    ``growth`` is the slope of log time over log pixels between the two largest sides: 1 is linear, 2 quadratic. Kept in
    ``work``, so that a claim that goes on does not measure again.
    """
    path = work / "cost" / f"{short(json.dumps(wanted.plain(), sort_keys=True))}.json"
    if path.is_file():
        return dict(json.loads(path.read_text()))
    talk(f"time an image at sides {', '.join(map(str, wanted.sides))}")
    times = {
        name: [milliseconds(options, side, wanted.repeats) for side in wanted.sides]
        for name, options in wanted.backbones.items()
    }
    (before, last) = wanted.sides[-2:]
    pixels = math.log((last / before) ** 2)
    growth = {name: math.log(t[-1] / t[-2]) / pixels for name, t in times.items()}
    found = {"sides": wanted.sides, "milliseconds": times, "growth": growth, "unit": "ms an image, forward, fp32"}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found, indent=1), encoding="utf-8")
    return found


def milliseconds(backbone: dict[str, Any], side: int, repeats: int) -> float:
    """Median time of a forward pass, by image."""
    import torch

    from unmask.backbones import BackboneConfig, build_encoder

    encoder = build_encoder(BackboneConfig.model_validate({**backbone, "image_size": side, "in_channels": 3})).eval()
    images = torch.zeros(max(PIXELS // side**2, 1), 3, side, side)
    spent = []
    with torch.no_grad():
        for _ in range(repeats + 1):
            began = time.perf_counter()
            encoder.pooled(images)
            spent.append(time.perf_counter() - began)
    return 1000 * statistics.median(spent[1:]) / len(images)  # the first pass warms up


def cost_figure(found: dict[str, Any], path: Path) -> Path:
    """Both axes logarithmic, with a line for cost that is linear in the pixels."""
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.2, 3.6), layout="constrained")
    FigureCanvasSVG(figure)
    axes = figure.add_subplot()
    sides = found["sides"]
    for name, times in found["milliseconds"].items():
        axes.plot(sides, times, marker="o", label=f"{name} (pixels to the power {found['growth'][name]:.2f})")
    first = min(times[0] for times in found["milliseconds"].values())
    axes.plot(
        sides, [first * (s / sides[0]) ** 2 for s in sides], linestyle=":", color="grey", label="linear in the pixels"
    )
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(sides, [str(s) for s in sides])
    axes.set(xlabel="image side, pixels", ylabel=found["unit"])
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(path, metadata={"Date": None})
    return path
