"""Formats of text: plain, JSON lines, parquet; each read piece by piece into rows."""

from __future__ import annotations

import gzip
import json
import lzma
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unmask.errors import UserError, nearest

PLAIN = (".txt", ".text", ".md")
PACKED = (".gz", ".xz")
TABLES = (".jsonl", ".json", ".parquet")
SUFFIXES = (*PLAIN, *TABLES)
_TEXT = ("text", "sentence", "content", "document", "question", "sentence1", "body", "description")
_PAIR = ("pair", "sentence2", "answer", "candidate", "hypothesis")
_LABEL = ("label", "labels", "class", "target", "intent", "category")
_DOCUMENT = ("document_id", "doc_id", "document", "chapter_id", "article", "title")


@dataclass(frozen=True)
class Row:
    """One text. label: its class as the file says it. sentences: where the file has them cut already. document: rows in
    succession with the same value belong together."""

    text: str
    pair: str | None = None
    label: Any = None
    sentences: tuple[str, ...] | None = None
    document: Any = None


def kind(path: Path) -> str | None:
    """The suffix that says how to read a file, None for what is no text."""
    suffixes = [s.lower() for s in path.suffixes]
    last = suffixes[-1] if suffixes else ""
    if last in PACKED and len(suffixes) > 1:
        last = suffixes[-2]
    return ".txt" if last in PLAIN else last if last in TABLES else None


def inner_splits(path: Path) -> list[str]:
    """The values of a column ``split`` of a table, in order; none where there is no such column."""
    if kind(path) == ".parquet":
        import pyarrow.parquet as pq

        schema = _schema(path)
        if "split" in schema.names:
            return list(dict.fromkeys(pq.read_table(path, columns=["split"])["split"].to_pylist()))
    elif kind(path) in (".jsonl", ".json"):
        first = next(_objects(path), {})
        if "split" in first:
            return list(dict.fromkeys(str(o.get("split")) for o in _objects(path)))
    return []


def _schema(path: Path) -> Any:
    import pyarrow.parquet as pq

    try:
        return pq.read_schema(path)
    except Exception as error:  # whatever pyarrow says about a broken file
        raise UserError(f"{path} cannot be read as parquet: {str(error).splitlines()[0]}") from None


def _opened(path: Path) -> Any:
    opener = {".gz": gzip.open, ".xz": lzma.open}.get(path.suffix.lower(), open)
    return opener(path, "rt", encoding="utf-8", newline="\n")


def _lines(path: Path) -> Iterator[str]:
    number = 0
    try:
        with _opened(path) as file:
            for line in file:
                number += 1
                yield line
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path} is not UTF-8: byte 0x{error.object[error.start]:02x} after line {number}: save it as UTF-8"
        ) from None
    except (OSError, EOFError, lzma.LZMAError) as error:
        raise UserError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from None


def paragraphs(path: Path, separator: str) -> Iterator[Row]:
    """Rows of plain text: what stands between two separators. A separator of blank lines is found line by line."""
    document = str(path)
    if set(separator) == {"\n"} and len(separator) > 1:
        held: list[str] = []
        for line in _lines(path):
            if line.strip():
                held.append(line.rstrip("\r\n"))
            elif held:
                yield Row("\n".join(held), document=document)
                held = []
        if held:
            yield Row("\n".join(held), document=document)
        return
    rest = ""
    for line in _lines(path):
        rest += line
        *whole, rest = rest.split(separator)
        for text in whole:
            if text.strip():
                yield Row(text, document=document)
    if rest.strip():
        yield Row(rest.rstrip("\n"), document=document)


def _objects(path: Path) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(_lines(path), 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except ValueError:
            raise UserError(f"{path}, line {number} is not JSON: it takes one object a line") from None
        if not isinstance(value, dict):
            raise UserError(f"{path}, line {number} is a {type(value).__name__}: it takes one object a line")
        yield value


def jsonl(path: Path, columns: Mapping[str, str], only: str | None) -> Iterator[Row]:
    for value in _objects(path):
        if only is None or str(value.get("split")) == only:
            yield row_of(value, columns, path)


def parquet(path: Path, columns: Mapping[str, str], only: str | None) -> Iterator[Row]:
    import pyarrow.parquet as pq

    wanted = sorted({*_real(columns), *(["split"] if only is not None else [])})
    with pq.ParquetFile(path) as file:
        for batch in file.iter_batches(2048, columns=wanted):
            for value in batch.to_pylist():
                if only is None or str(value.get("split")) == only:
                    yield row_of(value, columns, path)


def _real(columns: Mapping[str, str]) -> list[str]:
    return [name for value in columns.values() for name in value.split("+")]


def row_of(value: Mapping[str, Any], columns: Mapping[str, str], path: Path) -> Row:
    text: Any = [value.get(c) for c in columns["text"].split("+")]
    sentences = None
    if len(text) == 1 and isinstance(text[0], list):
        sentences = tuple(str(s) for s in text[0])
        text = " ".join(sentences)
    else:
        if any(not isinstance(t, str) for t in text):
            raise UserError(f"{path}: column {columns['text']} holds {type(text[0]).__name__}, not text")
        text = " ".join(text)
    document = tuple(value.get(c) for c in columns["document"].split("+")) if "document" in columns else None
    pair = value.get(columns["pair"]) if "pair" in columns else None
    label = value.get(columns["label"]) if "label" in columns else None
    return Row(text, pair, label, sentences, document)


def columns_of(path: Path) -> tuple[tuple[str, ...], tuple[str, ...] | None]:
    """The columns of a table, and the names of its integer labels where its metadata holds them."""
    if kind(path) != ".parquet":
        return tuple(next(_objects(path), {})), None
    schema = _schema(path)
    meta = {k.decode(): v.decode(errors="replace") for k, v in (schema.metadata or {}).items()}
    names = None
    try:
        if "huggingface" in meta:
            features = json.loads(meta["huggingface"])["info"]["features"]
            names = next((tuple(f["names"]) for f in features.values() if isinstance(f, dict) and f.get("names")), None)
    except (ValueError, KeyError, TypeError):
        names = None
    return tuple(schema.names), names


def chosen_columns(uri: str, known: Sequence[str], columns: Mapping[str, str]) -> dict[str, str]:
    """Which column is what; ``title+description`` joins two. Raises ``UserError`` where none looks like text."""
    for role, value in columns.items():
        for name in value.split("+"):
            if name not in known:
                raise UserError(f"{uri} has no column {name!r} (for {role}): {nearest(name, known)}")
    out = dict(columns)
    if "text" not in out:
        found = next((c for c in ("sentences", *_TEXT) if c in known), None)
        if found is None:
            raise UserError(
                f"{uri} has no column of text: name it with data.columns.text=NAME (one of {', '.join(known)})"
            )
        out["text"] = (
            "title+description" if {"title", "description"} <= set(known) and found == "description" else found
        )
    for role, usual in (("pair", _PAIR), ("label", _LABEL), ("document", _DOCUMENT)):
        taken = _real(out)
        found = next((c for c in usual if c in known and c not in taken), None)
        if role not in out and found is not None:
            out[role] = f"book+{found}" if role == "document" and "book" in known else found
    return out
