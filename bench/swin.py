"""Swin-T, 224 pixels, forward and backward on the CPU: ours against timm's, same weights, equal outputs asserted.

    python bench/swin.py [--batch 2] [--seconds 50] [--threads N] [--json FILE]

The two sides take turns, so that what else the machine does falls on both; the ratio is of the medians.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import timm
import torch
from torch import Tensor, nn

from unmask.backbones.swin.official import load_official


def sides() -> tuple[nn.Module, nn.Module]:
    """Ours and timm's, with the same weights."""
    torch.manual_seed(0)
    theirs = timm.create_model("swin_tiny_patch4_window7_224", num_classes=0, drop_path_rate=0.0)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return load_official(theirs.state_dict()).train(), theirs.train()


def step(model: nn.Module, images: Tensor, precision: str) -> tuple[Tensor, float]:
    """Features and the seconds of one forward and backward."""
    for parameter in model.parameters():
        parameter.grad = None
    context = torch.autocast("cpu", torch.bfloat16) if precision == "bf16" else nullcontext()
    start = time.perf_counter()
    with context:
        features = model(images)
        loss = features.float().square().mean()
    loss.backward()
    return features.detach().float(), time.perf_counter() - start


def measure(precision: str, batch: int, seconds: float) -> dict[str, float]:
    """Medians of both sides. Raises ``AssertionError`` where outputs or gradients differ."""
    ours, theirs = sides()
    images = torch.randn(batch, 3, 224, 224, generator=torch.Generator().manual_seed(1))
    run: Callable[[nn.Module], tuple[Tensor, float]] = lambda model: step(model, images, precision)  # noqa: E731
    (a, _), (b, _) = run(ours), run(theirs)
    gap = float((a - b).abs().max() / b.abs().max())
    allowed = 1e-4 if precision == "fp32" else 5e-2
    assert gap < allowed, f"{precision}: features differ by {gap:.2g} of their largest value"
    grad, other = ours.patch_embed.proj.weight.grad, theirs.patch_embed.proj.weight.grad
    grad_gap = float((grad - other).norm() / other.norm())
    assert grad_gap < (1e-3 if precision == "fp32" else 0.2), f"{precision}: gradients differ by {grad_gap:.2g}"
    times: dict[str, list[float]] = {"ours": [], "timm": []}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times["ours"]) < 2:
        pair = (("ours", ours), ("timm", theirs))
        for name, model in pair if len(times["ours"]) % 2 else pair[::-1]:
            times[name].append(run(model)[1])
    mine, peer = statistics.median(times["ours"]), statistics.median(times["timm"])
    return {"ours_s": mine, "timm_s": peer, "ratio": peer / mine, "rounds": len(times["ours"]), "features_gap": gap}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=50.0)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    results = {}
    for precision in ("fp32", "bf16"):
        found = results[precision] = measure(precision, options.batch, options.seconds / 2 - 4)
        print(
            f"swin_tiny 224 {precision}, batch {options.batch}: ours {found['ours_s'] * 1e3:.0f} ms, "
            f"timm {found['timm_s'] * 1e3:.0f} ms, {found['ratio']:.2f}x over {found['rounds']:.0f} rounds "
            f"(outputs equal within {found['features_gap']:.1e} of the largest)"
        )
    if options.json:
        options.json.write_text(
            json.dumps({"benchmark": "swin", "threads": torch.get_num_threads(), **results}, indent=2)
        )


if __name__ == "__main__":
    main()
