"""``TextBatches``: text as rows of tokens, in training order. Text is read once, in pieces; tokens lie in memory-mapped files."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from unmask.contracts import Batch, DataFacts
from unmask.data.cache import cache_root
from unmask.data.mapped import Mapped
from unmask.data.text.packing import packed_rows
from unmask.data.text.settings import TextSettings
from unmask.data.text.source import TextSource, open_text
from unmask.data.text.tokenizer import FILE, Tokenizer
from unmask.errors import UserError

PIECE = 1024  # rows that are tokenised at once
FORMAT = 1


@dataclass(frozen=True)
class Tokens:
    """All rows behind one another: row r is ``ids[offsets[r] : offsets[r + 1]]``. words: which word a token is a piece of, -100
    for special tokens. types: 0 / 1 for the texts of a pair."""

    ids: np.ndarray
    words: np.ndarray
    types: np.ndarray
    offsets: np.ndarray
    labels: np.ndarray | None

    @property
    def lengths(self) -> np.ndarray:
        return np.diff(self.offsets)


class TextBatches(Mapped):
    """Training batches of text, by :class:`TextSettings`.

    A batch: ``tokens``, ``words``, ``types``, ``positions``, ``segments`` int64 ``[B, T]`` (segments: which text of a packed row a
    token belongs to, from 1; 0 padding), ``attention_mask`` int64 ``[B, T]`` (1: a token, 0: padding), and ``label`` int64 ``[B]``
    where rows have labels and are not packed. tokenizer, source: ones to use instead of the settings'. Raises ``UserError``.
    """

    def __init__(
        self,
        settings: TextSettings,
        batch_size: int,
        seed: int = 0,
        *,
        tokenizer: Tokenizer | None = None,
        source: TextSource | None = None,
    ):
        self.settings = settings
        self.text: TextSource = source or open_text(
            settings.uri,
            settings.split,
            columns=settings.columns,
            limit=settings.limit,
            separator=settings.paragraph_separator,
        )
        self.tokenizer = tokenizer or tokenizer_for(settings, self.text)
        self.classes = None if settings.rows == "stream" else self.text.classes()
        self.data = tokens_of(self.text, self.tokenizer, settings, self.classes)
        self.what = {"stream": f"windows of {settings.length} tokens", "each": "rows", "packed": "packed rows"}[
            settings.rows
        ]
        self.bins: list[list[int]] | None = None
        if settings.rows == "stream":
            count = len(self.data.ids) // self.inside
            if count < 1:
                raise UserError(
                    f"{settings.uri} has {len(self.data.ids)} tokens, fewer than a row of {settings.length}: "
                    "give more text, or a smaller data.length"
                )
        elif settings.rows == "packed":
            self.bins = packed_rows(self.data.lengths, settings.length)
            count = len(self.bins)
        else:
            count = len(self.data.lengths)
        super().__init__(count, batch_size, seed, uri=settings.uri)
        self.side_files = {FILE: self.tokenizer.text()}
        self.facts = DataFacts(
            uri=settings.uri,
            count=count,
            classes=self.classes,
            columns=self.text.columns,
            extra={
                **self.tokenizer.facts(),
                "length": settings.length,
                "tokens": len(self.data.ids),
                "settings": settings.plain(),
            },
        )

    @property
    def inside(self) -> int:
        """Tokens of text in a window of a stream: the frame of special tokens takes the rest."""
        return self.settings.length - (0 if self.tokenizer.style == "gpt" else 2)

    def fetch(self, indices: np.ndarray) -> Batch:
        """The rows of these numbers; a class of the documentation of :class:`TextBatches`."""
        rows = [self._row(int(i)) for i in indices]
        longest = self.settings.length if self.settings.rows != "each" else max(len(r["tokens"]) for r in rows)
        fill = {"tokens": self.tokenizer.special["pad"], "words": -100}
        batch: dict[str, Any] = {}
        for name in ("tokens", "words", "types", "positions", "segments"):
            out = np.full((len(rows), longest), fill.get(name, 0), dtype=np.int64)
            for place, row in zip(out, rows, strict=True):
                place[: len(row[name])] = row[name]
            batch[name] = torch.from_numpy(out)
        batch["attention_mask"] = (batch["segments"] > 0).long()
        if self.data.labels is not None and self.settings.rows == "each":
            batch["label"] = torch.from_numpy(self.data.labels[indices])
        batch["index"] = torch.from_numpy(np.asarray(indices, dtype=np.int64).copy())
        return batch

    def _row(self, number: int) -> dict[str, np.ndarray]:
        data = self.data
        if self.settings.rows == "stream":
            ids, words = (a[number * self.inside : (number + 1) * self.inside] for a in (data.ids, data.words))
            if self.tokenizer.style != "gpt":
                special = self.tokenizer.special
                ids = np.concatenate(([special["cls"]], ids, [special["sep"]]))
                words = np.concatenate(([-100], words, [-100]))
            parts = [(ids, words, np.zeros_like(ids))]
        else:
            chosen = self.bins[number] if self.bins is not None else [number]
            parts = [
                tuple(a[data.offsets[r] : data.offsets[r + 1]] for a in (data.ids, data.words, data.types))  # type: ignore[misc]
                for r in chosen
            ]
        return {
            "tokens": np.concatenate([p[0] for p in parts]),
            "words": np.concatenate([p[1] for p in parts]),
            "types": np.concatenate([p[2] for p in parts]),
            "positions": np.concatenate([np.arange(len(p[0])) for p in parts]),
            "segments": np.concatenate([np.full(len(p[0]), i + 1) for i, p in enumerate(parts)]),
        }


def tokenizer_for(settings: TextSettings, source: TextSource) -> Tokenizer:
    """The tokenizer that the settings ask for: learned from the source, or loaded."""
    if settings.tokenizer not in ("bpe", "chars"):
        return Tokenizer.load(settings.tokenizer)
    asked = (settings.tokenizer, settings.vocabulary, settings.style, settings.lowercase)
    place = cache_root() / "text" / f"{_digest(source.fingerprint, asked)}.tokenizer.json"
    if settings.cache and place.is_file():
        return Tokenizer.load(place)
    made = Tokenizer.learned(
        source.texts(),
        kind=settings.tokenizer,  # type: ignore[arg-type]
        vocabulary=settings.vocabulary,
        style=settings.style,
        lowercase=settings.lowercase,
    )
    if settings.cache:
        _kept(place, lambda aside: aside.write_text(made.text(), encoding="utf-8"))
    return made


def tokens_of(
    source: TextSource, tokenizer: Tokenizer, settings: TextSettings, classes: tuple[str, ...] | None
) -> Tokens:
    """The tokens of all rows, from the cache where they lie there. Raises ``UserError`` for text of one line or less."""
    stream = settings.rows == "stream"
    asked = (FORMAT, tokenizer.text(), stream, settings.length if not stream else 0, source.separator, classes)
    folder = cache_root() / "text" / _digest(source.fingerprint, asked)
    if settings.cache and folder.is_dir():
        return _loaded(folder)
    with tempfile.TemporaryDirectory() as temporary:
        made = Path(temporary) / "tokens"
        made.mkdir()
        _write(made, source, tokenizer, settings, classes)
        if settings.cache and _kept(folder, lambda aside: shutil.copytree(made, aside)):
            return _loaded(folder)
        return _loaded(made, memory=True)


def _write(
    folder: Path, source: TextSource, tokenizer: Tokenizer, settings: TextSettings, classes: tuple[str, ...] | None
) -> None:
    stream = settings.rows == "stream"
    offsets, labels, number, last = [0], [], 0, 0
    numbers = {name: i for i, name in enumerate(classes or ())}
    between = tokenizer.special.get("sep") if tokenizer.style == "gpt" else None
    joined = f"{source.separator}" if source.running else ""
    with (
        (folder / "ids.bin").open("wb") as ids,
        (folder / "words.bin").open("wb") as words,
        (folder / "types.bin").open("wb") as types,
    ):
        rows = source.rows()
        while piece := list(islice(rows, PIECE)):
            number += len(piece)
            texts = [row.text + joined if stream else row.text for row in piece]
            pairs = [row.pair or "" for row in piece] if any(row.pair for row in piece) and not stream else None
            encoded = tokenizer.encode(texts, pairs, length=None if stream else settings.length, special=not stream)
            for row, one in zip(piece, encoded, strict=True):
                own, of_word = list(one.ids), list(one.words)
                if stream and not source.running and between is not None:
                    own, of_word = [*own, between], [*of_word, -100]
                if stream:  # words go on being numbered, so that neighbours of two rows differ
                    of_word = [w if w < 0 else w + last for w in of_word]
                    last = max((w for w in of_word), default=last) + 1
                ids.write(np.array(own, dtype=np.int32).tobytes())
                words.write(np.array(of_word, dtype=np.int32).tobytes())
                types.write(np.array(one.types if not stream else [0] * len(own), dtype=np.int8).tobytes())
                offsets.append(offsets[-1] + len(own))
                labels.append(-1 if row.label is None else _label(row.label, numbers, classes))
    if number == 1 and not stream:
        raise UserError(f"{source.uri} is one line long: there is nothing to learn from a single row")
    np.save(folder / "offsets.npy", np.array(offsets, dtype=np.int64))
    if classes is not None:
        np.save(folder / "labels.npy", np.array(labels, dtype=np.int64))
    (folder / "meta.json").write_text(json.dumps({"format": FORMAT, "rows": number}), encoding="utf-8")


def _label(value: Any, numbers: dict[str, int], classes: tuple[str, ...] | None) -> int:
    return (
        value
        if isinstance(value, int) and classes is not None and 0 <= value < len(classes)
        else numbers.get(str(value), -1)
    )


def _loaded(folder: Path, memory: bool = False) -> Tokens:
    def mapped(name: str, kind: Any) -> np.ndarray:
        path = folder / name
        if path.stat().st_size == 0:
            return np.zeros(0, dtype=kind)
        return np.fromfile(path, dtype=kind) if memory else np.memmap(path, dtype=kind, mode="r")

    labels = folder / "labels.npy"
    return Tokens(
        mapped("ids.bin", np.int32),
        mapped("words.bin", np.int32),
        mapped("types.bin", np.int8),
        np.load(folder / "offsets.npy"),
        np.load(labels) if labels.is_file() else None,
    )


def _digest(*values: Any) -> str:
    return hashlib.blake2b(repr(values).encode(), digest_size=16).hexdigest()


def _kept(place: Path, write: Any) -> bool:
    """Write aside, then rename; a cache that cannot be written is none."""
    aside = place.with_name(f"{place.name}.{os.getpid()}")
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        write(aside)
        aside.rename(place)
    except OSError:
        shutil.rmtree(aside, ignore_errors=True)
        return place.exists()
    return True


def everything(batches: TextBatches, batch_size: int = 64) -> Iterator[Batch]:
    """Every row once, in the text's order. The last batch may be smaller."""
    for first in range(0, batches.count, batch_size):
        yield batches.fetch(np.arange(first, min(first + batch_size, batches.count)))
