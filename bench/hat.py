"""HAT on the CPU: ours against the authors' formulation as spandrel keeps it, same weights, equal outputs asserted.

    python bench/hat.py [--size hat_s] [--side 64] [--seconds 60] [--threads N] [--json FILE]

One size's width and windows, with fewer groups so that a CPU has rounds to count (``--groups``; 6 is the whole network). The
two sides take turns, so that what else the machine does falls on both; ratios are of medians.
"""

from __future__ import annotations

import argparse
import importlib
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from unmask.systems.prediction.hat.config import SIZES
from unmask.systems.prediction.hat.official import load_official


def sides(size: str, groups: int) -> tuple[nn.Module, nn.Module]:
    """Ours and spandrel's, with the same weights."""
    official = importlib.import_module("spandrel.architectures.HAT.__arch.HAT")
    torch.manual_seed(0)
    known = SIZES[size]
    theirs = official.HAT(
        img_size=64,
        window_size=16,
        upscale=2,
        upsampler="pixelshuffle",
        img_range=1.0,
        mlp_ratio=2,
        conv_scale=0.01,
        overlap_ratio=0.5,
        drop_path_rate=0.0,
        resi_connection="1conv",
        embed_dim=known["embed_dim"],
        depths=[6] * groups,
        num_heads=[known["num_heads"]] * groups,
        compress_ratio=known["compress_ratio"],
        squeeze_factor=known["squeeze_factor"],
    )
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    state = {k: v for k, v in theirs.state_dict().items() if not k.startswith("mean")}
    return load_official(state, {"drop_path_rate": 0.0}).network, theirs


def restored(model: nn.Module, low: Tensor) -> Tensor:
    with torch.no_grad():
        return model(low)


def trained(model: nn.Module, low: Tensor) -> Tensor:
    """The output of a forward and backward pass."""
    for parameter in model.parameters():
        parameter.grad = None
    out = model(low)
    out.abs().mean().backward()
    return out.detach()


def measure(
    what: str,
    run: Callable[[nn.Module, Tensor], Tensor],
    pair: tuple[nn.Module, nn.Module],
    low: Tensor,
    seconds: float,
) -> dict[str, float]:
    """Medians of both sides. Raises ``AssertionError`` where outputs or gradients differ."""
    ours, theirs = pair
    for model in pair:
        model.train(what == "training")
    a, b = run(ours, low), run(theirs, low)
    gap = float((a - b).abs().max() / b.abs().max())
    assert gap < 1e-4, f"{what}: outputs differ by {gap:.2g} of the largest"
    if what == "training":
        first, second = ours.shallow.weight.grad, theirs.conv_first.weight.grad
        apart = float((first - second).norm() / second.norm())
        assert apart < 1e-3, f"gradients of the first convolution differ by {apart:.2g}"
    times: dict[str, list[float]] = {"ours": [], "spandrel": []}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times["ours"]) < 2:
        both = (("ours", ours), ("spandrel", theirs))
        for name, model in both if len(times["ours"]) % 2 else both[::-1]:
            start = time.perf_counter()
            run(model, low)
            times[name].append(time.perf_counter() - start)
    mine, peer = statistics.median(times["ours"]), statistics.median(times["spandrel"])
    return {"ours_s": mine, "spandrel_s": peer, "ratio": peer / mine, "rounds": len(times["ours"]), "gap": gap}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--size", default="hat", choices=list(SIZES))
    parser.add_argument("--groups", type=int, default=1)
    parser.add_argument("--side", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=40.0)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    pair = sides(options.size, options.groups)
    low = torch.rand(1, 3, options.side, options.side, generator=torch.Generator().manual_seed(1))
    results = {}
    for what, run in (("inference", restored), ("training", trained)):
        found = results[what] = measure(what, run, pair, low, options.seconds / 2)
        print(
            f"{options.size} x2, {options.groups} groups, {options.side} px, {what}: ours {found['ours_s'] * 1e3:.0f} ms, "
            f"spandrel {found['spandrel_s'] * 1e3:.0f} ms, {found['ratio']:.2f}x over {found['rounds']:.0f} rounds "
            f"(outputs equal within {found['gap']:.1e} of the largest)"
        )
    if options.json:
        options.json.write_text(
            json.dumps({"benchmark": "hat", "threads": torch.get_num_threads(), **results}, indent=2)
        )


if __name__ == "__main__":
    main()
