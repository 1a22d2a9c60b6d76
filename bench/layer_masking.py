"""What hiding pixels in every layer costs over a plain forward pass of the same network on as many images.

    python bench/layer_masking.py --network resnet50 --size 128 --masks 8

One image under many masks, in one batch; sides take turns, medians of their times. An all-visible mask must give the plain
answers.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
import torchvision

from unmask.contracts import Preprocessing
from unmask.models import open_model
from unmask.systems.explanation import maskings


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--network", default="resnet50")
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--masks", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    asked = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    module = getattr(torchvision.models, asked.network)(num_classes=10).eval()
    known = Preprocessing((0.5,) * 3, (0.5,) * 3, (asked.size, asked.size), 3)
    model = open_model(module, classes=tuple("abcdefghij"), preprocessing=known)
    images = torch.randn(1, 3, asked.size, asked.size).expand(asked.masks, -1, -1, -1)
    cells = torch.rand(asked.masks, 8, 8) < 0.5
    visible = cells.float().repeat_interleave(asked.size // 8, 1).repeat_interleave(asked.size // 8, 2)
    ask = maskings.masking("layer_masking", model)
    grey = maskings.masking("grey", model)
    with torch.no_grad():
        whole = ask(images[:1], torch.ones(1, asked.size, asked.size))
        torch.testing.assert_close(whole, model.logits({"image": images[:1]}), rtol=1e-3, atol=1e-4)
        sides = {
            "plain forward": lambda: model.logits({"image": images}),
            "grey": lambda: grey(images, visible),
            "layer masking": lambda: ask(images, visible),
        }
        times: dict[str, list[float]] = {name: [] for name in sides}
        for side in sides.values():
            side()
        for _ in range(asked.rounds):
            for name, side in sides.items():
                begun = time.perf_counter()
                side()
                times[name].append(time.perf_counter() - begun)
    plain = statistics.median(times["plain forward"])
    print(f"{asked.network}, {asked.size} px, {asked.masks} masks of one image in one batch, one thread")
    for name, spent in times.items():
        print(
            f"  {name:14} {1000 * statistics.median(spent):7.1f} ms  {statistics.median(spent) / plain:5.2f}x a plain forward"
        )


if __name__ == "__main__":
    main()
