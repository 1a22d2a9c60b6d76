"""Documents, paragraphs and sentences as one long row of tokens with offsets: spans of text are index arithmetic."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch

from unmask.data.text import Document, Tokenizer
from unmask.draw import philox
from unmask.errors import UserError

PIECE = 2048  # sentences that are tokenised at once


@dataclass(frozen=True)
class Structure:
    """Sentence s is ``ids[sentences[s] : sentences[s + 1]]``, paragraph p the sentences ``paragraphs[p] ... paragraphs[p +
    1] - 1``, document d the paragraphs ``documents[d] ... documents[d + 1] - 1``. words: numbered from 0 in each sentence."""

    ids: np.ndarray
    words: np.ndarray
    sentences: np.ndarray
    paragraphs: np.ndarray
    documents: np.ndarray
    names: tuple[str, ...]

    @property
    def sizes(self) -> np.ndarray:
        """Sentences in each paragraph."""
        return np.diff(self.paragraphs)

    def document_of(self, paragraph: int) -> int:
        return int(np.searchsorted(self.documents, paragraph, side="right")) - 1

    def sentences_of(self, paragraph: int) -> range:
        return range(int(self.paragraphs[paragraph]), int(self.paragraphs[paragraph + 1]))

    def paragraphs_of(self, document: int) -> range:
        return range(int(self.documents[document]), int(self.documents[document + 1]))

    def span(self, sentences: Iterable[int]) -> tuple[np.ndarray, np.ndarray]:
        """The tokens of these sentences behind one another, and their words, numbered on."""
        ids, words, last = [], [], 0
        for s in sentences:
            place = slice(int(self.sentences[s]), int(self.sentences[s + 1]))
            of_word = self.words[place]
            ids.append(self.ids[place])
            words.append(of_word + last)
            last += int(of_word.max(initial=-1)) + 1
        if not ids:
            return np.zeros(0, np.int64), np.zeros(0, np.int64)
        return np.concatenate(ids).astype(np.int64), np.concatenate(words).astype(np.int64)


def structure_of(
    documents: Iterable[Document], tokenizer: Tokenizer, min_chars: Sequence[int] = (20, 60, 200)
) -> Structure:
    """Tokenised documents. min_chars: shorter sentences, then paragraphs, then documents are left out."""
    texts: list[str] = []
    paragraphs, starts, names = [0], [0], []
    for document in documents:
        kept = []
        for paragraph in document.paragraphs:
            long_enough = [s for s in paragraph if len(s) >= min_chars[0]]
            if long_enough and sum(map(len, long_enough)) >= min_chars[1]:
                kept.append(long_enough)
        if kept and sum(len(s) for p in kept for s in p) >= min_chars[2]:
            for sentences in kept:
                texts += sentences
                paragraphs.append(len(texts))
            starts.append(len(paragraphs) - 1)
            names.append(document.name)
    ids, words, offsets = [], [], [0]
    rest = iter(texts)
    while piece := list(islice(rest, PIECE)):
        # a blank before each, so that sentences behind one another read as they stood
        for one in tokenizer.encode([f" {text}" for text in piece], special=False):
            ids.append(np.array(one.ids, dtype=np.int32))
            words.append(np.array(one.words, dtype=np.int32))
            offsets.append(offsets[-1] + len(one.ids))
    joined = [np.concatenate(a) if a else np.zeros(0, np.int32) for a in (ids, words)]
    numbers = [np.array(o, dtype=np.int64) for o in (offsets, paragraphs, starts)]
    return Structure(joined[0], joined[1], numbers[0], numbers[1], numbers[2], tuple(names))


def check_structure(structure: Structure, uri: str, *, needs: str = "sentences") -> None:
    """Raises ``UserError`` where no positive pair, or no negative of another document, can be made. needs: sentences (two in a
    paragraph) or paragraphs (two in a document)."""
    count = len(structure.names)
    longest = int(structure.sizes.max(initial=0))
    most = int(np.diff(structure.documents).max(initial=0))
    if needs == "sentences" and longest < 2:
        raise UserError(
            f"no positive pair can be made of {uri}: {count} documents, longest paragraph has {longest} sentence; "
            "check data.paragraph_separator and data.min_chars"
        )
    if needs == "paragraphs" and most < 2:
        raise UserError(
            f"no positive pair can be made of {uri}: {count} documents, longest has {most} paragraph; "
            "check data.paragraph_separator and data.min_chars"
        )
    if count < 2:
        raise UserError(
            f"{uri} is one document: pairs need text of others, too; give a folder of files, or data.columns.document=NAME"
        )


def uniforms(seed: int, name: str, numbers: np.ndarray, count: int) -> np.ndarray:
    """float64 ``[B, count]`` in [0, 1): those of example number n depend on (seed, name, n) alone."""
    import hashlib

    key = int.from_bytes(hashlib.blake2b(f"{seed}\0{name}".encode(), digest_size=8).digest(), "little")
    number = torch.from_numpy(np.asarray(numbers, dtype=np.int64))
    out = philox(
        torch.arange((count + 3) // 4)[None], number[:, None] & 0xFFFFFFFF, (0, 0), (key & 0xFFFFFFFF, key >> 32)
    )
    return (out.flatten(1)[:, :count] >> 8).double().numpy() * 2.0**-24


@dataclass
class Row:
    """One framed row before padding. start: where a text begins that has a label (0 unless packed)."""

    tokens: np.ndarray
    words: np.ndarray
    types: np.ndarray


def framed(parts: Sequence[tuple[np.ndarray, np.ndarray]], tokenizer: Tokenizer, length: int) -> Row:
    """``[CLS] A [SEP] B [SEP]`` or ``<s> A </s></s> B </s>``, for any number of texts, cut to ``length``: one token at a
    time from the end of the text that is longest at that moment, the first of equals."""
    special, double = tokenizer.special, tokenizer.style == "roberta"
    frame = 1 + len(parts) + (len(parts) - 1 if double else 0)
    sizes = shortened([len(ids) for ids, _ in parts], length - frame)
    cls, sep = np.array([special["cls"]]), np.array([special["sep"]])
    none = np.array([-100])
    tokens, words, types, last = [cls], [none], [np.zeros(1, np.int64)], 0
    for number, ((ids, of_word), size) in enumerate(zip(parts, sizes, strict=True)):
        before = [sep] if double and number else []
        tokens += [*before, ids[:size], sep]
        words += [*([none] if before else []), of_word[:size] + last, none]
        last += int(of_word[:size].max(initial=-1)) + 1
        types.append(np.full(size + 1 + len(before), number, np.int64))
    return Row(np.concatenate(tokens), np.concatenate(words), np.concatenate(types))


def shortened(sizes: Sequence[int], room: int) -> list[int]:
    """Longest-first truncation of several texts to ``room`` tokens together."""
    out = list(sizes)
    while sum(out) > max(room, 0):
        longest = max(out)
        second = max((s for s in out if s < longest), default=0)
        equal = [i for i, s in enumerate(out) if s == longest]
        spare = sum(out) - max(room, 0)
        if spare >= len(equal) * (longest - second):  # all of them come down to the next
            for i in equal:
                out[i] = second
            continue
        whole, rest = divmod(spare, len(equal))
        for place, i in enumerate(equal):
            out[i] = longest - whole - (place < rest)
    return out


def padded(rows: Sequence[Row], pad: int, longest: int | None = None) -> dict[str, Any]:
    """A batch: ``tokens``, ``words``, ``types``, ``attention_mask`` int64 ``[B, T]``."""
    longest = longest or max(len(r.tokens) for r in rows)
    batch: dict[str, Any] = {}
    for name, fill in (("tokens", pad), ("words", -100), ("types", 0)):
        out = np.full((len(rows), longest), fill, dtype=np.int64)
        for place, row in zip(out, rows, strict=True):
            values = getattr(row, name)
            place[: len(values)] = values
        batch[name] = torch.from_numpy(out)
    mask = np.zeros((len(rows), longest), dtype=np.int64)
    for place, row in zip(mask, rows, strict=True):
        place[: len(row.tokens)] = 1
    batch["attention_mask"] = torch.from_numpy(mask)
    return batch


def packed(rows: Sequence[Row], pad: int, length: int) -> dict[str, Any]:
    """The same rows behind one another, several in each row of ``length``: besides, ``segments`` and ``positions``, and ``starts``
    int64 ``[B, 2]``: row and place where each of the given rows begins."""
    from unmask.data.text.packing import packed_rows

    bins = packed_rows(np.array([len(r.tokens) for r in rows]), length)
    joined = [
        Row(*(np.concatenate([getattr(rows[i], n) for i in b]) for n in ("tokens", "words", "types"))) for b in bins
    ]
    batch = padded(joined, pad, length)
    segments, positions = (np.zeros((len(bins), length), dtype=np.int64) for _ in range(2))
    starts = np.zeros((len(rows), 2), dtype=np.int64)
    for number, chosen in enumerate(bins):
        at = 0
        for place, i in enumerate(chosen):
            size = len(rows[i].tokens)
            segments[number, at : at + size] = place + 1
            positions[number, at : at + size] = np.arange(size)
            starts[i] = number, at
            at += size
    return {
        **batch,
        **{k: torch.from_numpy(v) for k, v in (("segments", segments), ("positions", positions), ("starts", starts))},
    }
