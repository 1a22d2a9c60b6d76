"""Sampling with ENAT (22 + 2 blocks, 16 x 16 tokens, 8 steps, guidance): what reuse saves, with the same ids.

    python bench/enat.py [--dim 256] [--depth 22] [--grid 16] [--batch 2] [--steps 8] [--rounds 3] [--threads N] [--json FILE]

All sides have the same weights, classes and random draws, and take turns; ratios are of medians.

- reuse: ours. A step encodes the tokens that became visible in the last one, and takes the others' features as they are.
- recompute: the same function with nothing kept. A step encodes every visible token again, each among those, and in the
  context, with which it became visible. Only so does recomputing define the same ids, and they are asserted equal.
- formulation: the authors' way of computing reuse, after the facts of their code: two forward passes for guidance, the
  class's modulation of every block anew at every step, each context normed and modulated in every block, boolean indexing
  to and from the whole grid, logits of all tokens. The ids are asserted equal.
- no reuse: the same weights without the reuse, all visible tokens encoded together: another function, with other ids.
- NAT: a network of as many blocks in which all tokens pass all blocks: another network, for the cost alone.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from unmask.draw import Seeded
from unmask.systems.generation.decoding import Step, decode
from unmask.systems.generation.enat.blocks import Block, normalised
from unmask.systems.generation.enat.model import ENAT
from unmask.systems.generation.enat.reuse import Anew, Guided, Reused, Together, left
from unmask.systems.generation.guidance import doubled

CFG_SCALE, CODES, CLASSES = 2.5, 1024, 1000


class Recomputed(Reused):
    """The features of ``Reused`` with nothing kept from step to step but which tokens became visible when."""

    def __init__(self, *arguments: Any, **options: Any):
        super().__init__(*arguments, **options)
        self.groups: list[Tensor] = []

    def features(self, ids: Tensor, hidden: Tensor, step: Step, conditions: list[Tensor]) -> Tensor:
        if self.hidden is not None:
            before = self.hidden if len(self.hidden) == len(hidden) else doubled(self.hidden)
            self.groups.append(left(before, hidden, self.network.tokens))
        self.hidden, self.seen = hidden, None
        for group in self.groups:
            self.seen = self.grown(self.network.embed(ids.gather(1, group), group), conditions)
        masks = self.masks(hidden)
        return self.network.decode(masks, conditions, masks[:, :0] if self.seen is None else self.seen)


class Formulation(Guided):
    """Reuse as the authors compute it; see above."""

    def __init__(self, *arguments: Any, **options: Any):
        super().__init__(*arguments, **options)
        self.classes: Tensor = arguments[1]
        self.kept: list[tuple[Tensor, Tensor]] = []  # features of the whole grid and what was visible, one a pass

    def __call__(self, ids: Tensor, hidden: Tensor, step: Step) -> Tensor:
        empty = torch.full_like(self.classes, self.network.empty_class)
        before, self.kept = self.kept, []
        first, second = (
            self.whole(ids, classes, before[i] if before else None) for i, classes in enumerate((self.classes, empty))
        )
        logits = first + self.cfg_scale * step.previous * (first - second)
        return logits.gather(1, hidden[..., None].expand(-1, -1, logits.shape[2]))

    def whole(self, ids: Tensor, classes: Tensor, previous: tuple[Tensor, Tensor] | None) -> Tensor:
        net, (batch, tokens) = self.network, ids.shape
        conditions = net.conditions(classes)
        x = net.embed(ids, torch.arange(tokens).expand_as(ids))
        visible = ids != net.codebook_size
        features, fresh, context = torch.zeros_like(x), visible, x[:, :0]
        if previous is not None and bool(previous[1].any()):
            assert net.previous is not None
            context = net.previous(previous[0][previous[1]].reshape(batch, -1, x.shape[2]))
            features[previous[1]] = context.flatten(0, 1)
            fresh = visible & ~previous[1]
        if bool(fresh.any()):
            new = x[fresh].reshape(batch, -1, x.shape[2])
            for block, condition in zip(net.blocks[: net.encoder_depth], conditions, strict=False):
                new = step_through(block, new, condition, context)  # type: ignore[arg-type]
            features[fresh] = new.flatten(0, 1)
        seen = features[visible].reshape(batch, -1, x.shape[2])
        unseen = x[~visible].reshape(batch, -1, x.shape[2])
        for block, condition in zip(net.blocks[net.encoder_depth :], conditions, strict=False):
            unseen = step_through(block, unseen, condition, seen)  # type: ignore[arg-type]
        features[~visible] = unseen.flatten(0, 1)
        self.kept.append((features, visible))
        return net.logits(features)


def step_through(block: Block, x: Tensor, condition: Tensor, context: Tensor) -> Tensor:
    return block(x, condition, normalised(context) if context.shape[1] else None)


def network(options: argparse.Namespace, kind: str) -> ENAT:
    torch.manual_seed(0)
    system = ENAT(
        ENAT.Config(
            network=kind,
            embed_dim=options.dim,
            encoder_depth=options.depth,
            decoder_depth=2,
            num_heads=max(options.dim // 64, 1),
            codebook_size=CODES,
            grid=options.grid,
            classes=CLASSES,
            first_stage=None,
            ema=0.0,
        )
    ).eval()
    with torch.no_grad():  # an untrained block does nothing, its gates being zero
        for block in system.network.blocks:
            block.modulate.weight.normal_(std=0.02)  # type: ignore[union-attr, operator]
            block.modulate.bias.normal_(std=0.2)  # type: ignore[union-attr, operator]
        system.network.words.weight.normal_(std=0.3)
    return system


def sampler(system: ENAT, way: type[Guided], options: argparse.Namespace) -> Callable[[], tuple[float, Tensor]]:
    classes = torch.arange(options.batch) * 7 % CLASSES

    def sample() -> tuple[float, Tensor]:
        start = time.perf_counter()
        with torch.no_grad():
            predict = way(system.network, classes, cfg_scale=CFG_SCALE)
            ids = decode(predict, options.batch, system.tokens, CODES, Seeded(0), steps=options.steps)
        return time.perf_counter() - start, ids

    return sample


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    for name, value in (
        ("dim", 256),
        ("depth", 22),
        ("grid", 16),
        ("batch", 2),
        ("steps", 8),
        ("rounds", 3),
        ("threads", 0),
    ):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    enat, nat = network(options, "enat"), network(options, "nat")
    sides = {
        "reuse": sampler(enat, Reused, options),
        "recompute": sampler(enat, Recomputed, options),
        "formulation": sampler(enat, Formulation, options),
        "no reuse": sampler(enat, Anew, options),
        "NAT": sampler(nat, Together, options),
    }
    ids = {name: sample()[1] for name, sample in sides.items()}  # warm-up, too
    for name in ("recompute", "formulation"):
        assert torch.equal(ids[name], ids["reuse"]), f"{name}: the ids differ"
    print(f"reuse, recompute and formulation: the same {ids['reuse'].numel()} ids")
    assert not torch.equal(ids["no reuse"], ids["reuse"]), "the ids depend on nothing: the comparison would be empty"
    times: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(options.rounds):
        for name in list(sides)[:: 1 if number % 2 else -1]:
            times[name].append(sides[name]()[0])
    medians = {name: statistics.median(values) for name, values in times.items()}
    for name, value in medians.items():
        ratio = "" if name == "reuse" else f"   {value / medians['reuse']:.2f}x the time of reuse"
        print(f"  {name:12} {value / options.batch * 1e3:8.0f} ms an image{ratio}")
    if options.json:
        report: dict[str, Any] = {
            "benchmark": "enat",
            "threads": torch.get_num_threads(),
            "seconds": medians,
            **{n: getattr(options, n) for n in ("dim", "depth", "grid", "batch", "steps")},
            **{f"{n} / reuse": v / medians["reuse"] for n, v in medians.items() if n != "reuse"},
        }
        options.json.write_text(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
