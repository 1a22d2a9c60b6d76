"""Masks: each generator on a whole batch against the loop over samples that published code runs in its data loader.

Two loops for each: "as published" draws its own numbers, sample by sample, with numpy or Python's generator; "same numbers"
is a loop over samples on the very numbers that ours was given, so that the masks must be equal, and are asserted to be.
Counts are asserted equal for both. Single thread; best of several runs.

    python bench/masks.py            # prints a table with the ratios
    python bench/masks.py --json
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from unmask.draw import Recorder, Seeded
from unmask.masks.blocks import block_mask, blocks_from
from unmask.masks.color import color_mask, crops, noise_bank, shared_crop_mask
from unmask.masks.random import random_mask, visible_count
from unmask.masks.tube import tube_mask

GRID, RATIO, BLOCKS, FRAMES = (14, 14), 0.75, 75, 8
TOKENS = GRID[0] * GRID[1]


@dataclass
class Row:
    """One line of the table; times in milliseconds a batch."""

    name: str
    ours: float
    with_draws: float
    published: float
    same_numbers: float | None

    @property
    def ratio(self) -> float:
        return self.published / self.ours


def best(call: Callable[[], object], repeats: int) -> float:
    """Milliseconds of the fastest of several calls."""
    call()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return 1000 * min(times)


# --- the loops, as published code has them ----------------------------------------------------------------------


def random_loop(batch: int) -> Tensor:
    """A permutation a sample (SimMIM's and VideoMAE's loaders)."""
    out = []
    for _ in range(batch):
        mask = np.zeros(TOKENS, dtype=int)
        mask[np.random.permutation(TOKENS)[visible_count(TOKENS, RATIO) :]] = 1
        out.append(torch.from_numpy(mask.reshape(GRID)))
    return torch.stack(out).flatten(1)


def block_loop(batch: int) -> Tensor:
    """BEiT's generator: attempts, and a loop over the cells of a block."""
    return torch.from_numpy(np.stack([beit_mask() for _ in range(batch)])).flatten(1)


def beit_mask(min_area: int = 16, aspect: float = 0.3) -> np.ndarray:
    rows, columns = GRID
    mask, count = np.zeros(GRID, dtype=int), 0
    while count < BLOCKS:
        added = 0
        for _ in range(10):
            area = random.uniform(min_area, BLOCKS - count)
            ratio = math.exp(random.uniform(math.log(aspect), -math.log(aspect)))
            height, width = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if width >= columns or height >= rows:
                continue
            top, left = random.randint(0, rows - height), random.randint(0, columns - width)
            fresh = height * width - mask[top : top + height, left : left + width].sum()
            if 0 < fresh <= BLOCKS - count:
                for i in range(top, top + height):
                    for j in range(left, left + width):
                        if mask[i, j] == 0:
                            mask[i, j] = 1
                            added += 1
            if added:
                break
        count += added
    return mask


def color_loop(bank: Tensor, batch: int) -> Tensor:
    """ColorMAE's: a crop and flips of the whole bank a round, then a sort a sample."""
    out = []
    visible = visible_count(TOKENS, RATIO)
    for start in range(0, batch, len(bank)):
        top, left = (random.randint(0, bank.shape[1] - g) for g in GRID)
        pieces = bank.clone()[:, top : top + GRID[0], left : left + GRID[1]]
        pieces = pieces.flip(2) if random.random() < 0.5 else pieces
        pieces = pieces.flip(1) if random.random() < 0.5 else pieces
        for i in range(min(len(bank), batch - start)):
            flat = (pieces[i] / pieces[i].max()).flatten()
            mask = torch.ones(TOKENS)
            mask[flat.argsort(descending=True, stable=True)[:visible]] = 0
            out.append(mask)
    return torch.stack(out)


def tube_loop(batch: int) -> Tensor:
    """VideoMAE's: shuffle one frame, tile it over the others."""
    out = []
    visible = visible_count(TOKENS, RATIO)
    for _ in range(batch):
        frame = np.hstack([np.zeros(visible), np.ones(TOKENS - visible)])
        np.random.shuffle(frame)
        out.append(torch.from_numpy(np.tile(frame, (FRAMES, 1)).flatten()))
    return torch.stack(out)


# --- the same numbers, a sample at a time -----------------------------------------------------------------------


def sorted_loop(scores: Tensor) -> Tensor:
    """Hide the largest of each sample's scores."""
    visible = visible_count(TOKENS, RATIO)
    out = []
    for row in scores:
        mask = torch.ones(TOKENS, dtype=torch.bool)
        mask[row.argsort(stable=True)[:visible]] = False
        out.append(mask)
    return torch.stack(out)


def equal(ours: Tensor, theirs: Tensor) -> None:
    if not torch.equal(ours, theirs):
        raise AssertionError("masks from the same numbers differ")


def counted(ours: Tensor, theirs: Tensor) -> None:
    each = theirs.to(torch.int64).sum(dim=1)
    if not (ours.sum(dim=1) == each[0]).all() or not (each == each[0]).all():
        raise AssertionError("the two sides hide different numbers of tokens")


def measure(batch: int = 256, repeats: int = 20) -> list[Row]:
    draw, rows = Seeded(0), []
    noise = draw.uniform("noise", (batch, TOKENS))

    ours = random_mask(noise, RATIO, GRID).hidden
    counted(ours, random_loop(batch))
    equal(ours, sorted_loop(noise))
    rows.append(
        Row(
            "uniform random",
            best(lambda: random_mask(noise, RATIO, GRID), repeats),
            best(lambda: random_mask(draw.uniform("noise", (batch, TOKENS)), RATIO, GRID), repeats),
            best(lambda: random_loop(batch), 3),
            best(lambda: sorted_loop(noise), 3),
        )
    )

    recorder = Recorder(draw)
    ours = block_mask(recorder, batch, GRID, BLOCKS).hidden
    uniform, rest = recorder.recorded["blocks"], recorder.recorded["blocks.rest"]
    counted(ours, block_loop(batch))

    def one_by_one() -> Tensor:
        return torch.cat(
            [blocks_from(u[None], r[None], GRID, BLOCKS).hidden for u, r in zip(uniform, rest, strict=True)]
        )

    equal(ours, one_by_one())
    rows.append(
        Row(
            "blocks (BEiT)",
            best(lambda: blocks_from(uniform, rest, GRID, BLOCKS), repeats),
            best(lambda: block_mask(draw, batch, GRID, BLOCKS), repeats),
            best(lambda: block_loop(batch), 3),
            best(one_by_one, 2),
        )
    )

    bank = noise_bank("green", 3072, 64)
    recorder = Recorder(draw)
    ours = color_mask(bank, recorder, batch, GRID, RATIO).hidden
    counted(ours, color_loop(bank, batch))
    names = ("image", "top", "left", "flip_horizontal", "flip_vertical")
    places = [recorder.recorded[n] for n in names]

    def crop_loop() -> Tensor:
        return sorted_loop(torch.cat([-crops(bank, *(p[i : i + 1] for p in places), GRID) for i in range(batch)]))

    equal(ours, crop_loop())
    for name, make in (("colour noise", color_mask), ("colour noise, shared crop", shared_crop_mask)):
        took = best(lambda make=make: make(bank, draw, batch, GRID, RATIO), repeats)
        loop = best(lambda: color_loop(bank, batch), 3)
        rows.append(Row(name, took, took, loop, best(crop_loop, 3) if make is color_mask else None))

    ours = tube_mask(noise, RATIO, (FRAMES, *GRID)).hidden
    counted(ours, tube_loop(batch))
    equal(ours, sorted_loop(noise).repeat(1, FRAMES))
    rows.append(
        Row(
            "tube (8 frames)",
            best(lambda: tube_mask(noise, RATIO, (FRAMES, *GRID)), repeats),
            best(lambda: tube_mask(draw.uniform("noise", (batch, TOKENS)), RATIO, (FRAMES, *GRID)), repeats),
            best(lambda: tube_loop(batch), 3),
            best(lambda: sorted_loop(noise).repeat(1, FRAMES), 3),
        )
    )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--batch", type=int, default=256)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = measure(options.batch)
    if options.json:
        print(json.dumps([{**vars(r), "ratio": r.ratio} for r in rows], indent=2))
        return
    print(f"masks of {options.batch} samples, grid {GRID[0]}x{GRID[1]}, milliseconds a batch, one thread")
    print(f"{'':28}{'ours':>8}{'+draws':>8}{'as published':>14}{'ratio':>8}{'same numbers':>14}{'ratio':>8}")
    for r in rows:
        same = f"{r.same_numbers:14.2f}{r.same_numbers / r.ours:7.1f}x" if r.same_numbers else f"{'':22}"
        print(f"{r.name:28}{r.ours:8.2f}{r.with_draws:8.2f}{r.published:14.2f}{r.ratio:7.1f}x{same}")


if __name__ == "__main__":
    main()
