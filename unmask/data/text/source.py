"""``open_text``: files of text as rows. Files are read piece by piece whenever rows are asked for: no text is held in memory."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from unmask.data.folder import files_fingerprint
from unmask.data.order import shuffled, some_of
from unmask.data.source import find_split, no_split, read_split
from unmask.data.text.formats import (
    PACKED,
    SUFFIXES,
    Row,
    chosen_columns,
    columns_of,
    inner_splits,
    jsonl,
    kind,
    paragraphs,
    parquet,
    row_of,
)
from unmask.errors import UserError, nearest


@dataclass(frozen=True)
class TextSource:
    """One split of a body of text. ``rows()`` reads it anew each time. chosen: numbers of the rows that belong to it, all if
    None. whole: whether a file is one running text, so that its rows are joined as they stood."""

    uri: str
    split: str
    read: Callable[[], Iterator[Row]]
    fingerprint: str
    columns: tuple[str, ...] = ()
    chosen: np.ndarray | None = field(default=None, repr=False)
    names: tuple[str, ...] | None = None  # of integer labels, where the file has them
    running: bool = False
    separator: str = "\n\n"

    def rows(self) -> Iterator[Row]:
        """The rows in the file's order."""
        if self.chosen is None:
            yield from self.read()
            return
        wanted = iter(np.sort(self.chosen).tolist())
        following = next(wanted, None)
        for number, row in enumerate(self.read()):
            if following is None:
                return
            if number == following:
                yield row
                following = next(wanted, None)

    def texts(self) -> Iterator[str]:
        for row in self.rows():
            yield row.text
            if row.pair is not None:
                yield row.pair

    def count(self) -> int:
        return len(self.chosen) if self.chosen is not None else sum(1 for _ in self.read())

    def classes(self) -> tuple[str, ...] | None:
        """Names of the labels, sorted (by number where they are numbers); None for text without labels."""
        found = {row.label for row in self.rows() if row.label is not None}
        if not found:
            return None
        if self.names is not None and all(isinstance(v, int) and 0 <= v < len(self.names) for v in found):
            return self.names
        if all(isinstance(v, int) for v in found):
            return tuple(str(v) for v in range(max(found) + 1)) if min(found) >= 0 else tuple(map(str, sorted(found)))
        return tuple(sorted(map(str, found)))

    def part(self, numbers: np.ndarray, tag: str) -> TextSource:
        """The rows of these numbers (among its own). tag: tells this choice from others."""
        own = numbers if self.chosen is None else np.sort(self.chosen)[numbers]
        return replace(self, chosen=np.sort(own), fingerprint=f"{self.fingerprint}-{tag}")


def open_text(
    uri: str | Path,
    split: str = "train",
    *,
    columns: Mapping[str, str] | None = None,
    limit: int | None = None,
    separator: str = "\n\n",
) -> TextSource:
    """A file or folder of text, or a data set of the Hub (``hf:NAME``), as rows.

    Plain text gives a row a paragraph (or a line, where no paragraphs are). ``A-train.jsonl`` beside ``A-test.jsonl``, a folder's
    train/ and test/, and a column ``split`` are splits. Raises ``UserError`` in one line: not there, not UTF-8, empty, a column or
    split that is not there.
    """
    uri = str(uri)
    name, low, high = read_split(split)
    columns = dict(columns or {})
    if uri.startswith("hf:"):
        source = _hub(uri, name, columns)
    else:
        path = Path(uri).expanduser()
        if not path.exists():
            beside = [str(p) for p in path.parent.iterdir()] if path.parent.is_dir() else []
            raise UserError(f"no text {uri}: {nearest(uri, beside)}")
        source = _files(uri, _split_files(uri, path, name), name, columns, separator)
    if low or high:
        n = source.count()
        first, last = _place(low, 0, n), _place(high, n, n)
        if first >= last:
            raise UserError(f"split {split} of {uri} holds no row: it takes a rising range within 0 ... {n}")
        source = replace(source.part(np.sort(shuffled(n)[first:last]), f"{low}:{high}"), split=split)
    if limit is not None:
        n = source.count()
        source = source.part(some_of(n, limit), f"limit{limit}") if limit < n else source
    return source


def _place(text: str, default: int, n: int) -> int:
    if not text:
        return default
    return min(round(n * int(text[:-1]) / 100) if text.endswith("%") else int(text), n)


# --- files ---


def _split_files(uri: str, path: Path, split: str) -> list[tuple[Path, str | None]]:
    """The files of a split, each with the value its rows must have in a column ``split`` (None: all rows)."""
    if path.is_file():
        if kind(path) is None:
            raise UserError(
                f"{uri} is no text: it takes {', '.join(SUFFIXES)}, plain text also as {' or '.join(PACKED)}"
            )
        return _of_file(uri, path, split)
    files = sorted(p for p in path.rglob("*") if p.is_file() and kind(p) is not None)
    if not files:
        raise UserError(f"no text in {uri}: it takes {', '.join(SUFFIXES)}")
    groups: dict[str, list[Path]] = {}
    for file in files:
        inside = file.relative_to(path).parts[:-1]
        words = (*inside, *re.split(r"[-_.]", file.name))
        word = next((w for w in words if find_split("train", [w]) or find_split("test", [w])), "")
        groups.setdefault(word or "train", []).append(file)
    found = find_split(split, list(groups))
    if found is None:
        raise no_split(uri, split, list(groups))
    return [(file, None) for file in groups[found]]


def _of_file(uri: str, path: Path, split: str) -> list[tuple[Path, str | None]]:
    inside = inner_splits(path)
    if inside:
        found = find_split(split, inside)
        if found is None:
            raise no_split(uri, split, inside)
        return [(path, found)]
    match = re.search(r"(?:^|[-_.])(train|training|test|val|validation|valid|dev)(?=[-_.])", path.name)
    if match:
        siblings = {}
        for file in path.parent.iterdir():
            before, after = re.escape(path.name[: match.start(1)]), re.escape(path.name[match.end(1) :])
            other = re.fullmatch(before + r"(\w+?)" + after, file.name)
            if other:
                siblings[other[1]] = file
        found = find_split(split, list(siblings))
        if split == "train" and found is None:
            return [(path, None)]
        if found is None:
            raise no_split(uri, split, list(siblings))
        return [(siblings[found], None)]
    if split != "train":
        raise no_split(uri, split, ["train"])
    return [(path, None)]


def _files(
    uri: str, files: Sequence[tuple[Path, str | None]], split: str, columns: dict[str, str], separator: str
) -> TextSource:
    paths = [path for path, _ in files]
    plain = all(kind(path) == ".txt" for path in paths)
    known: tuple[str, ...] = ()
    names = None
    if not plain:
        first = next(path for path in paths if kind(path) != ".txt")
        known, names = columns_of(first)
        columns = chosen_columns(uri, known, columns)

    def read() -> Iterator[Row]:
        empty = True
        for path, only in files:
            rows = (
                paragraphs(path, separator)
                if kind(path) == ".txt"
                else parquet(path, columns, only)
                if kind(path) == ".parquet"
                else jsonl(path, columns, only)
            )
            for row in rows:
                empty = False
                yield row
        if empty:
            raise UserError(f"{uri} holds no text: it is empty")

    key = (
        files_fingerprint(paths) + "".join(sorted(f"-{k}={v}" for k, v in columns.items())) + f"-{split}-{separator!r}"
    )
    return TextSource(uri, split, read, key, known, names=names, running=plain, separator=separator)


# --- the hub ---


def _hub(uri: str, split: str, columns: dict[str, str]) -> TextSource:
    """A data set of the Hub, streamed: nothing but what is read is downloaded."""
    import datasets

    from unmask.official.hub import hub_reason

    name, _, config = uri.removeprefix("hf:").partition(":")

    def stream() -> Any:
        try:
            return datasets.load_dataset(name, config or None, split=split, streaming=True)
        except Exception as error:  # the client raises many kinds for what is one fact to a user
            raise UserError(f"the Hub does not give {name} ({split}): {hub_reason(error)}") from None

    first = stream()
    known = tuple(first.column_names or next(iter(first)).keys())
    chosen = chosen_columns(uri, known, columns)
    features = first.features or {}
    label = features.get(chosen.get("label", ""))
    names = tuple(label.names) if hasattr(label, "names") else None

    def read() -> Iterator[Row]:
        for value in stream():
            yield row_of(value, chosen, Path(name))

    return TextSource(uri, split, read, f"{uri}-{split}-{sorted(chosen.items())}", known, names=names)
