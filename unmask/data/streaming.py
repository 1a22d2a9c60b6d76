"""Batches of a stream: shards in an order of their own each epoch, split by process, shuffled in blocks, resumable.

A block of consecutive samples is read whole and given out in a random order that depends on (seed, epoch, rank, block)
alone. The position is therefore the stream's own position at the start of the block and the number of samples given out
since; resuming reads that block again. Unreadable samples are skipped and listed.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from unmask.contracts import Batch
from unmask.data.decode import Unreadable, decode, fitted
from unmask.data.order import shuffled
from unmask.data.prefetch import ahead
from unmask.data.shards import samples_of, stream_of
from unmask.errors import UserError

if TYPE_CHECKING:
    from unmask.data.batches import Batches

BLOCK = 512  # samples shuffled together
Sample = tuple[np.ndarray, int]  # pixels [H, W, C] and label


def stream(batches: Batches, share: int, rank: int, world: int, state: Mapping[str, Any]) -> Iterator[Batch]:
    """Micro-batches of ``share`` samples for one process, without end. Sets the position of ``batches`` as they leave."""
    if state and (state["world"], state["rank"]) != (world, rank):
        raise UserError(
            f"a stream saved by process {state['rank']} of {state['world']} cannot go on as process {rank} of {world}: "
            f"resume with {state['world']} processes"
        )

    def work() -> Iterator[tuple[Batch, dict[str, Any]]]:
        seen = int(state.get("seen", 0))
        with ThreadPoolExecutor(batches.source.workers or min(os.cpu_count() or 1, 16)) as pool:
            samples = _samples(batches, rank, world, state, pool)
            while True:
                some = list(islice(samples, share))
                index = torch.arange(seen, seen + share) * world + rank
                seen += share
                position = {**some[-1][1], "seen": seen, "rank": rank, "world": world}
                yield _batch([sample for sample, _ in some], index, bool(batches.source.surveyed["labelled"])), position

    for batch, position in ahead(work()):
        batches._state = position
        yield batch


def _samples(
    batches: Batches, rank: int, world: int, state: Mapping[str, Any], pool: ThreadPoolExecutor
) -> Iterator[tuple[Sample, dict[str, Any]]]:
    """(sample, position behind it), without end."""
    from datasets.distributed import split_dataset_by_node

    source = batches.source
    files = source.surveyed["files"]
    epoch, block, offset = int(state.get("epoch", 0)), int(state.get("block", 0)), int(state.get("offset", 0))
    at = state.get("stream")  # of `datasets`, at the start of the block; None is the start of the epoch
    fruitless = 0
    while True:
        order = shuffled(len(files), seed=(batches.seed << 24) ^ epoch)
        dataset = stream_of(source, [files[i] for i in order])
        if world > 1:
            dataset = split_dataset_by_node(dataset, rank=rank, world_size=world)
        if at is not None:
            dataset.load_state_dict(at)
        reader = iter(dataset)
        given = 0
        while rows := list(islice(reader, BLOCK)):
            mixed = shuffled(len(rows), seed=(batches.seed << 64) ^ (rank << 48) ^ (epoch << 24) ^ block)
            decoded = pool.map(lambda i: _decoded(batches, rows[i]), mixed)
            for number, found in enumerate(decoded):
                if isinstance(found, str):
                    _skip(batches, rows[mixed[number]], found)
                elif number >= offset:
                    given += 1
                    yield found, {"epoch": epoch, "block": block, "offset": number + 1, "stream": at}
            at, block, offset = dataset.state_dict(), block + 1, 0
        fruitless = 0 if given else fruitless + 1
        if fruitless == 2:  # one epoch may be resumed at its very end
            raise UserError(
                f"{source.uri}: process {rank} of {world} gets no image: use fewer processes or more shards"
            )
        epoch, block, offset, at = epoch + 1, 0, 0, None


def _decoded(batches: Batches, row: Mapping[str, Any]) -> Sample | str:
    facts = batches.source.facts
    side = batches.stored_side
    try:
        pixels = fitted(decode(dict(row["image"]), side), facts.channels or 3, facts.bit_depth or 8, side)
    except Unreadable as error:
        return str(error)
    return pixels, int(row["label"])


def _skip(batches: Batches, row: Mapping[str, Any], reason: str) -> None:
    entry = {"path": row["image"]["path"], "reason": reason}
    if entry not in batches.source.skipped:
        batches.source.skipped.append(entry)


def _batch(samples: list[Sample], index: torch.Tensor, labelled: bool) -> Batch:
    from unmask.data.batches import padded, tensor

    pixels, sizes = padded([p for p, _ in samples])
    batch = {"image": tensor(pixels), "size": torch.from_numpy(sizes), "index": index}
    if labelled:
        batch["label"] = torch.tensor([label for _, label in samples])
    return batch


def once(batches: Batches, batch_size: int) -> Iterator[Batch]:
    """Every readable sample of all shards once, in their order, as raw batches."""
    source = batches.source
    rows = samples_of(source.surveyed["files"], source.surveyed["columns"])
    waiting: list[Sample] = []
    done = 0
    with ThreadPoolExecutor(source.workers or min(os.cpu_count() or 1, 16)) as pool:
        while some := list(islice(rows, batch_size)):
            for row, found in zip(some, pool.map(lambda row: _decoded(batches, row), some), strict=True):
                if isinstance(found, str):
                    _skip(batches, row, found)
                else:
                    waiting.append(found)
            while len(waiting) >= batch_size:
                yield _batch(
                    waiting[:batch_size], torch.arange(done, done + batch_size), bool(source.surveyed["labelled"])
                )
                waiting, done = waiting[batch_size:], done + batch_size
    if waiting:
        yield _batch(waiting, torch.arange(done, done + len(waiting)), bool(source.surveyed["labelled"]))


def first_samples(batches: Batches, n: int) -> Batch:
    """The first ``n`` readable samples, as a raw batch."""
    return next(once(batches, n))
