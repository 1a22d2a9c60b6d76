"""Documents, paragraphs, sentences: the structure of a text."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from unmask.data.text.source import TextSource

# a stop, then blanks, then something that can begin a sentence; quotes and brackets close with the sentence before
_BREAK = re.compile(r"(?<=[.!?…。！？])(?:[\"'”’)\]]*)\s+(?=[\"'“‘(\[]*[^\W\d_a-z]|[\"'“‘(\[]*\d)")
_ABBREVIATION = re.compile(r"(?:\b(?:Mr|Mrs|Ms|Dr|Prof|St|vs|etc|e\.g|i\.e|No|vol|Fig|cf|al)|\b[A-Z])\.$")


@dataclass(frozen=True)
class Document:
    """paragraphs: each a tuple of sentences."""

    name: str
    paragraphs: tuple[tuple[str, ...], ...]

    @property
    def characters(self) -> int:
        return sum(len(s) for p in self.paragraphs for s in p)


def sentences_of(text: str) -> tuple[str, ...]:
    """Sentences by rule: a stop, blanks, then a capital, a digit, a quote or a bracket. Known abbreviations and initials do not
    end one. For languages that mark sentences otherwise give a table with a column ``sentences``."""
    parts: list[str] = []
    start = 0
    for match in _BREAK.finditer(text):
        before = text[start : match.start()].rstrip()
        if _ABBREVIATION.search(before):
            continue
        end = match.start() + len(match.group().rstrip())
        parts.append(text[start:end].strip())
        start = match.end()
    parts.append(text[start:].strip())
    return tuple(p for p in parts if p)


def documents(source: TextSource) -> Iterator[Document]:
    """The documents of a source: rows in succession with the same ``document``, each row a paragraph; where no column says so, each
    row is a document and its paragraphs stand between separators. A plain text file is one document."""
    held: list[tuple[str, ...]] = []
    key: object = None
    number = 0
    for row in source.rows():
        paragraph = row.sentences if row.sentences is not None else None
        if row.document is None:
            pieces = [paragraph] if paragraph else [sentences_of(t) for t in row.text.split(source.separator)]
            yield Document(f"row {number}", tuple(p for p in pieces if p))
            number += 1
            continue
        if held and row.document != key:
            yield Document(_name(key), tuple(held))
            held = []
        key = row.document
        for piece in [paragraph] if paragraph else [sentences_of(t) for t in row.text.split(source.separator)]:
            if piece:
                held.append(tuple(piece))
    if held:
        yield Document(_name(key), tuple(held))


def _name(key: object) -> str:
    return " / ".join(map(str, key)) if isinstance(key, tuple) else str(key)
