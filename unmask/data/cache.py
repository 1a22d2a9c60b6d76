"""Decoded images, once: a memory-mapped file of pixels, or decoding on the fly where that does not fit.

A cache is a folder named for a fingerprint of the data and of how it was decoded: ``pixels.bin`` (all images behind one
another, ``[H, W, C]`` each), ``index.npz`` and ``meta.json``. It is written under another name and renamed when whole.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from unmask.data.decode import Header, Unreadable, decode, fitted, header, stored_size
from unmask.data.images import Images
from unmask.errors import UserError

if TYPE_CHECKING:
    from unmask.data.source import Source

FORMAT = 5  # of the files, and of what decoding gives: a change makes caches new
_DTYPES = {8: np.uint8, 16: np.uint16, 32: np.float32}


def cache_root() -> Path:
    """``$UNMASK_CACHE``, else ``~/.cache/unmask``."""
    return Path(os.environ.get("UNMASK_CACHE") or Path.home() / ".cache" / "unmask").expanduser()


def key_of(fingerprint: str, shorter: int | None) -> str:
    """The name of the folder for data of this fingerprint, decoded so."""
    import PIL

    text = f"{FORMAT}\0{fingerprint}\0{shorter}\0{PIL.__version__}"
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


# --- survey: the heads of all files -------------------------------------------------------------------------------


@dataclass
class Survey:
    """What the heads of the files say: which rows look readable, and what the data set is made of."""

    rows: np.ndarray
    headers: list[Header]
    channels: int
    depth: int
    skipped: list[dict[str, str]]

    @property
    def originals(self) -> np.ndarray:
        return np.array([(h.height, h.width) for h in self.headers], dtype=np.int64)


def survey(source: Source) -> Survey:
    """Read the head of every file. Raises ``UserError`` where none is an image."""

    def look(row: int) -> Header | str:
        try:
            return header(source.encoded(row))
        except Unreadable as error:
            return str(error)

    heads = list(_mapped(look, range(len(source)), source.workers, f"looking at {source.uri}"))
    good = [(row, h) for row, h in enumerate(heads) if isinstance(h, Header)]
    skipped = [{"path": source.name_of(row), "reason": h} for row, h in enumerate(heads) if isinstance(h, str)]
    if not good:
        raise UserError(f"none of the {len(heads)} files of {source.uri} is a readable image ({skipped[0]['reason']})")
    counts = Counter(h.channels for _, h in good)
    channels = max(counts) if set(counts) <= {1, 3} else counts.most_common(1)[0][0]
    fits = [(row, h) for row, h in good if h.channels == channels or (h.channels == 1 and channels == 3)]
    for row, h in good:
        if not (h.channels == channels or (h.channels == 1 and channels == 3)):
            reason = f"has {h.channels} channels where the others have {channels}"
            skipped.append({"path": source.name_of(row), "reason": reason})
    depth = max(h.depth for _, h in fits)
    return Survey(np.array([row for row, _ in fits], dtype=np.int64), [h for _, h in fits], channels, depth, skipped)


# --- the cache ----------------------------------------------------------------------------------------------------


def decoded(source: Source, shorter: int | None) -> Images:
    """The images of a source from its cache, which is made if it is not there; without one where the disk has no room
    or the source wants none."""
    folder = cache_root() / "images" / key_of(source.fingerprint, shorter)
    if source.cached and source.fingerprint:
        found = _load(folder)
        if found is not None:
            return found
    surveyed = survey(source)
    sizes = np.array([stored_size(h.height, h.width, shorter) for h in surveyed.headers], dtype=np.int64)
    if not (source.cached and source.fingerprint):
        return _on_the_fly(source, surveyed, sizes, shorter)
    wanted = int(sizes.prod(axis=1).sum()) * surveyed.channels * np.dtype(_DTYPES[surveyed.depth]).itemsize
    problem = _no_room(folder.parent, wanted)
    if problem:
        print(f"decoded images are not kept: {problem}", file=sys.stderr)
        return _on_the_fly(source, surveyed, sizes, shorter)
    try:
        return _build(source, surveyed, sizes, shorter, folder)
    except OSError as error:
        print(f"decoded images are not kept: {folder.parent}: {error.strerror or error}", file=sys.stderr)
        return _on_the_fly(source, surveyed, sizes, shorter)


def _no_room(parent: Path, wanted: int) -> str:
    """Why ``wanted`` bytes should not be written there, or nothing. A fifth of the free space stays free."""
    try:
        parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(parent).free
    except OSError as error:
        return f"{parent}: {error.strerror or error}"
    if wanted > free * 0.8:
        return f"they need {wanted / 1e9:.1f} GB and {parent} has {free / 1e9:.1f} GB free (UNMASK_CACHE names another place)"
    return ""


def _load(folder: Path) -> Images | None:
    """A whole cache, or None. Only a renamed folder is whole."""
    try:
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        with np.load(folder / "index.npz") as index:
            rows, sizes, offsets, originals = (index[k] for k in ("rows", "sizes", "offsets", "originals"))
        dtype = np.dtype(_DTYPES[meta["depth"]])
        if (folder / "pixels.bin").stat().st_size != meta["bytes"]:
            return None
        flat = np.memmap(folder / "pixels.bin", dtype=dtype, mode="r")
    except (OSError, ValueError, KeyError):
        return None
    images = mapped(flat, rows, sizes, offsets, originals, meta)
    images._statistics = tuple(meta["mean"]), tuple(meta["std"])
    return images


def mapped(
    flat: np.ndarray,
    rows: np.ndarray,
    sizes: np.ndarray,
    offsets: np.ndarray,
    originals: np.ndarray,
    meta: dict[str, Any],
) -> Images:
    """Images that lie in one flat array at ``offsets`` (counted in values)."""
    channels = meta["channels"]

    def read(i: int) -> tuple[np.ndarray, int]:
        height, width = int(sizes[i, 0]), int(sizes[i, 1])
        start = int(offsets[i])
        return flat[start : start + height * width * channels].reshape(height, width, channels), i

    together = None
    each = int(sizes[0].prod()) * channels
    if (sizes == sizes[0]).all() and (offsets == np.arange(len(rows)) * each).all():
        together = flat[: len(rows) * each].reshape(len(rows), int(sizes[0, 0]), int(sizes[0, 1]), channels)
    return Images(rows, sizes, channels, meta["depth"], originals, meta["skipped"], read, together)


def _build(source: Source, found: Survey, sizes: np.ndarray, shorter: int | None, folder: Path) -> Images:
    from filelock import FileLock

    with FileLock(folder.with_suffix(".lock")):
        ready = _load(folder)
        if ready is not None:  # another process made it while this one waited
            return ready
        for left in folder.parent.glob(f"{folder.name}.part-*"):  # by a process that was killed
            shutil.rmtree(left, ignore_errors=True)
        aside = folder.with_name(f"{folder.name}.part-{os.getpid()}")
        aside.mkdir(parents=True)
        try:
            _write(source, found, sizes, shorter, aside)
            shutil.rmtree(folder, ignore_errors=True)
            aside.rename(folder)
        finally:
            shutil.rmtree(aside, ignore_errors=True)
    made = _load(folder)
    if made is None:
        raise OSError(f"{folder} was written and cannot be read")
    return made


def _write(source: Source, found: Survey, sizes: np.ndarray, shorter: int | None, aside: Path) -> None:
    dtype = np.dtype(_DTYPES[found.depth])
    counts = sizes.prod(axis=1) * found.channels
    offsets = np.concatenate(([0], np.cumsum(counts)[:-1]))
    total = int(counts.sum())
    sizes = sizes.copy()
    with open(aside / "pixels.bin", "wb") as file:
        if hasattr(os, "posix_fallocate"):  # a full disk is known now, not by a bus error later
            os.posix_fallocate(file.fileno(), 0, max(total * dtype.itemsize, 1))

        def place(i: int) -> str | None:
            try:
                pixels = fitted(
                    decode(source.encoded(int(found.rows[i])), shorter), found.channels, found.depth, shorter
                )
            except Unreadable as error:
                return str(error)
            if pixels.size != counts[i]:
                return "has another size than its header says"
            sizes[i] = pixels.shape[:2]
            os.pwrite(file.fileno(), pixels.tobytes(), int(offsets[i]) * dtype.itemsize)
            return None

        problems = list(_mapped(place, range(len(found.rows)), source.workers, f"decoding {source.uri}"))
    keep = np.array([p is None for p in problems])
    skipped = found.skipped + [
        {"path": source.name_of(int(row)), "reason": p}
        for row, p in zip(found.rows, problems, strict=True)
        if p is not None
    ]
    if not keep.any():
        raise UserError(f"none of the {len(source)} files of {source.uri} is a readable image ({skipped[0]['reason']})")
    if not keep.all():
        _close_gaps(aside / "pixels.bin", counts, offsets, keep, dtype)
        counts = counts[keep]
        offsets = np.concatenate(([0], np.cumsum(counts)[:-1]))
    rows, sizes = found.rows[keep], sizes[keep]
    originals = found.originals[keep]
    meta = {
        "format": FORMAT,
        "uri": source.uri,
        "channels": found.channels,
        "depth": found.depth,
        "shorter": shorter,
        "bytes": int(counts.sum()) * dtype.itemsize,
        "skipped": skipped,
    }
    images = mapped(np.memmap(aside / "pixels.bin", dtype=dtype, mode="r"), rows, sizes, offsets, originals, meta)
    meta["mean"], meta["std"] = images.statistics()
    np.savez(aside / "index.npz", rows=rows, sizes=sizes, offsets=offsets, originals=originals)
    (aside / "meta.json").write_text(json.dumps(meta), encoding="utf-8")


def _close_gaps(path: Path, counts: np.ndarray, offsets: np.ndarray, keep: np.ndarray, dtype: np.dtype) -> None:
    """Move the readable images together, over the places of those that could not be read."""
    flat = np.memmap(path, dtype=dtype, mode="r+")
    to = 0
    for count, offset, kept in zip(counts, offsets, keep, strict=True):
        if kept:
            if to != offset:
                flat[to : to + count] = flat[offset : offset + count].copy()
            to += int(count)
    flat.flush()
    del flat
    os.truncate(path, to * dtype.itemsize)


def _on_the_fly(source: Source, found: Survey, sizes: np.ndarray, shorter: int | None) -> Images:
    """Decoding at every reading. An image that turns out unreadable gives way to the next readable one, and is listed."""
    skipped = list(found.skipped)
    bad: set[int] = set()

    def read(i: int) -> tuple[np.ndarray, int]:
        for place in range(i, i + len(found.rows)):
            j = place % len(found.rows)
            if j in bad:
                continue
            try:
                encoded = source.encoded(int(found.rows[j]))
                return fitted(decode(encoded, shorter), found.channels, found.depth, shorter), j
            except Unreadable as error:
                bad.add(j)
                skipped.append({"path": source.name_of(int(found.rows[j])), "reason": str(error)})
                source.skipped.append(skipped[-1])
        raise UserError(f"none of the {len(source)} files of {source.uri} is a readable image ({skipped[0]['reason']})")

    return Images(found.rows, sizes, found.channels, found.depth, found.originals, skipped, read, parallel=True)


def _mapped(function: Callable[[int], Any], items: range, workers: int | None, words: str) -> Iterator[Any]:
    """``function`` of every item, in order, on threads: the decoders leave Python's lock while they work. Long work shows
    its progress on stderr."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    threads = workers or min(os.cpu_count() or 1, 16)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    quiet = len(items) < 500 or not sys.stderr.isatty()
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=quiet) as progress:
        task = progress.add_task(words, total=len(items))
        with ThreadPoolExecutor(threads) as pool:
            for first in range(0, len(items), 4096):  # in pieces, so that a million futures do not wait at once
                for result in pool.map(function, items[first : first + 4096]):
                    progress.advance(task)
                    yield result
