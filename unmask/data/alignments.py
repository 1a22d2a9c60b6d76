"""Alignments of proteins: aligned FASTA, a3m and Stockholm, plain or gzipped, in and out, with their checks.

    family = read_alignment("family.a3m")            # letters uint8 [R, L], names, how many insertions were dropped
    family.species("last_field")                     # of every row, from its header

An alignment is a table: rows are sequences, columns are sites. Insertions (lower case, "." and "*") are deleted on reading,
in every format.
"""

from __future__ import annotations

import gzip
import io
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import numpy as np

from unmask.errors import UserError

SUFFIXES = (".fasta", ".fa", ".fas", ".faa", ".afa", ".aln", ".a3m", ".a2m", ".sto", ".stk", ".stockholm")
LETTERS = "LAGVSERTIDPKQNFYMHWCXBUZO-"  # what an alignment may hold after the insertions are gone
GAP = ord("-")
_INSERTED = re.compile(r"[a-z.*]")
_WEIGHING = 2**26  # places compared at once


@dataclass
class Alignment:
    """letters: uint8 ``[R, L]``, ASCII of ``LETTERS`` (and "?" for unknown ones). names: the header of each row without ">".
    dropped: how many inserted letters were deleted on reading."""

    letters: np.ndarray
    names: list[str]
    source: str = ""
    dropped: int = 0
    unknown: dict[str, int] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.letters)

    @property
    def columns(self) -> int:
        return int(self.letters.shape[1])

    def texts(self) -> list[str]:
        """The rows as strings."""
        return [row.tobytes().decode("ascii") for row in self.letters]

    def select(self, rows: Sequence[int] | np.ndarray) -> Alignment:
        """Some rows, in the order given."""
        rows = np.asarray(rows, dtype=np.int64)
        return replace(self, letters=self.letters[rows], names=[self.names[i] for i in rows])

    def cut(self, columns: Sequence[int] | np.ndarray) -> Alignment:
        """Some columns, in the order given."""
        return replace(self, letters=np.ascontiguousarray(self.letters[:, np.asarray(columns, dtype=np.int64)]))

    def species(self, rule: str = "last_field") -> list[str]:
        """The species of every row, by ``species_of``."""
        return [species_of(name, rule, self.source) for name in self.names]


def read_alignment(path: str | Path, *, unknown: Literal["refuse", "ok"] = "refuse") -> Alignment:
    """An alignment file: FASTA, a3m, a2m or Stockholm, also with .gz behind it. unknown: "ok" reads letters outside the
    alphabet as "?" (the token ``<unk>``).

    Raises ``UserError`` in one line: no file, no rows, rows of unequal length (which, and both lengths), unknown letters.
    """
    path = located(path)
    text = read_text(path)
    rows = _stockholm(text, path) if text.lstrip().startswith("# STOCKHOLM") else _fasta(text, path)
    return aligned(rows, source=str(path), unknown=unknown)


def aligned(
    rows: Iterable[tuple[str, str]], *, source: str = "alignment", unknown: Literal["refuse", "ok"] = "refuse"
) -> Alignment:
    """Pairs of header and sequence, cleaned and checked. Raises ``UserError`` as ``read_alignment`` does."""
    names, cleaned, dropped = [], [], 0
    for name, sequence in rows:
        whole = _INSERTED.sub("", sequence)
        dropped += len(sequence) - len(whole)
        names.append(name)
        cleaned.append(whole)
    if cleaned and not cleaned[0] and dropped:
        raise UserError(
            f"{source} holds no aligned letters: lower case, '.' and '*' are insertions, which are left out: write upper case"
        )
    if not cleaned or not cleaned[0]:
        raise UserError(f"{source} holds no sequences: give an aligned FASTA, a3m or Stockholm file")
    length = len(cleaned[0])
    for number, sequence in enumerate(cleaned):
        if len(sequence) != length:
            raise UserError(
                f"{source} is not aligned: row {number + 1} ({names[number].split() and names[number].split()[0]}) has "
                f"{len(sequence)} letters where row 1 has {length} (lower case, '.' and '*' do not count): align it first"
            )
    try:
        letters = np.frombuffer("".join(cleaned).encode("ascii"), dtype=np.uint8).reshape(-1, length).copy()
    except UnicodeEncodeError:
        strange = sorted({c for s in cleaned for c in s if not c.isascii()})
        raise UserError(f"{source} holds letters that no alphabet has: {' '.join(strange[:8])}") from None
    known = np.zeros(256, dtype=bool)
    known[np.frombuffer((LETTERS + "?").encode(), dtype=np.uint8)] = True
    bad = ~known[letters]
    found = {chr(c): int((letters == c).sum()) for c in np.unique(letters[bad])}
    if found and unknown == "refuse":
        row = int(bad.any(axis=1).argmax())
        raise UserError(
            f"{source} holds letters outside the alphabet: {' '.join(found)} (first in row {row + 1}): it takes "
            f"{LETTERS}; unknown=ok reads others as <unk>"
        )
    letters[bad] = ord("?")
    return Alignment(letters, names, source, dropped, found)


def located(name: str | Path) -> Path:
    """A path, or the file of that name under ``$UNMASK_DATA``."""
    path, folder = Path(name), os.environ.get("UNMASK_DATA", "").strip()
    if not path.exists() and folder and (Path(folder).expanduser() / path).exists():
        return Path(folder).expanduser() / path
    return path


def read_text(path: Path, wanted: str = "an aligned FASTA, a3m or Stockholm file") -> str:
    """A text file, unzipped where it is gzipped. wanted: what it should have been. Raises ``UserError``."""
    if path.is_dir():
        raise UserError(f"{path} is a folder: give {wanted}")
    if not path.is_file():
        raise UserError(f"no file {path}: give {wanted}")
    try:
        content = path.read_bytes()
        if content[:2] == b"\x1f\x8b":
            content = gzip.decompress(content)
        return content.decode("utf-8-sig")
    except (OSError, EOFError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    except UnicodeDecodeError:
        raise UserError(f"{path} is no text: give {wanted}") from None


def _fasta(text: str, path: Path) -> list[tuple[str, str]]:
    rows: list[tuple[str, list[str]]] = []
    for number, raw in enumerate(io.StringIO(text)):
        line = raw.strip()
        if not line or (line.startswith(("#", ";")) and not rows):
            continue  # a3m files of some tools begin with a comment
        if line.startswith(">"):
            rows.append((line[1:].strip(), []))
        elif rows:
            rows[-1][1].append(line.replace(" ", ""))
        else:
            raise UserError(f"{path} is no FASTA: line {number + 1} comes before the first header (>name)")
    return [(name, "".join(parts)) for name, parts in rows]


def _stockholm(text: str, path: Path) -> list[tuple[str, str]]:
    rows: dict[str, list[str]] = {}
    for line in text.splitlines():
        if line.startswith("//"):
            break
        if line.strip() and not line.startswith("#"):
            name, _, sequence = line.partition(" ")
            rows.setdefault(name, []).append(sequence.replace(" ", ""))
    return [(name, "".join(parts)) for name, parts in rows.items()]


def write_alignment(alignment: Alignment, path: str | Path) -> Path:
    """As aligned FASTA, one line a sequence; gzipped where the name ends in .gz. Raises ``UserError``."""
    path = Path(path)
    lines = [f">{name}\n{text}\n" for name, text in zip(alignment.names, alignment.texts(), strict=True)]
    content = "".join(lines).encode()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(gzip.compress(content, mtime=0) if path.suffix == ".gz" else content)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from None
    return path


def alignment_files(uri: str | Path) -> list[Path]:
    """The alignments behind a file or a folder, sorted. Raises ``UserError`` where there are none."""
    path = located(uri)
    if not path.is_dir():
        return [path]
    found = sorted(p for p in path.rglob("*") if p.is_file() and p.name.lower().removesuffix(".gz").endswith(SUFFIXES))
    if not found:
        raise UserError(f"no alignment in {path}: it takes {', '.join(SUFFIXES)}, also with .gz")
    return found


# --- species ----------------------------------------------------------------------------------------------------

RULES = "last_field (after the last _), field:N (between |, from 1), uniprot (OX=, OS= or NAME_SPECIES), or a regular expression"


def species_of(name: str, rule: str = "last_field", source: str = "") -> str:
    """The species in a header. rule: "last_field" is what stands behind the last "_" of the first word; "field:N" the N-th
    part between "|"; "uniprot" the OX= or OS= of UniProt's headers, or the mnemonic; anything else is a regular expression
    whose first group (or whole match) is the species. Raises ``UserError`` where the header has none."""
    word = name.split()[0] if name.split() else ""
    found = ""
    if rule == "last_field":
        found = word.rpartition("_")[2] if "_" in word else ""
    elif re.fullmatch(r"field:\d+", rule):
        parts, number = name.split("|"), int(rule[6:])
        found = parts[number - 1].strip() if 1 <= number <= len(parts) else ""
    elif rule == "uniprot":
        match = re.search(r"\bOX=(\d+)", name) or re.search(r"\bOS=(.+?)(?: [A-Z]{2}=|$)", name)
        found = match.group(1) if match else (word.rpartition("_")[2].split("/")[0] if "_" in word else "")
    else:
        try:
            match = re.search(rule, name)
        except re.error as error:
            raise UserError(f"species_from={rule!r} is no rule ({error}): it takes {RULES}") from None
        found = match.group(1 if match.re.groups else 0) if match else ""
    if not found:
        where = f" of {source}" if source else ""
        raise UserError(f"no species in the header {name[:60]!r}{where} by species_from={rule}: it takes {RULES}")
    return found


def rows_by_species(alignment: Alignment, rule: str = "last_field") -> dict[str, np.ndarray]:
    """The rows of each species, species in the order in which they first appear."""
    out: dict[str, list[int]] = {}
    for row, species in enumerate(alignment.species(rule)):
        out.setdefault(species, []).append(row)
    return {species: np.array(rows, dtype=np.int64) for species, rows in out.items()}


def joined(left: Alignment, right: Alignment) -> Alignment:
    """Row by row side by side. Raises ``UserError`` where the numbers of rows differ."""
    if len(left) != len(right):
        raise UserError(f"{left.source} has {len(left)} rows, {right.source} {len(right)}: pairs need one of each")
    return replace(
        left,
        letters=np.concatenate((left.letters, right.letters), axis=1),
        source=f"{left.source}+{right.source}",
        dropped=left.dropped + right.dropped,
        unknown={**left.unknown, **right.unknown},
    )


# --- likeness ---------------------------------------------------------------------------------------------------


def identity(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """float32 ``[n, m]``: share of equal columns between rows of ``a [n, L]`` and ``b [m, L]``; gaps count as letters."""
    out = np.empty((len(a), len(b)), dtype=np.float32)
    step = max(_WEIGHING // max(b.size, 1), 1)
    for start in range(0, len(a), step):
        out[start : start + step] = (a[start : start + step, None] == b[None]).mean(axis=2, dtype=np.float32)
    return out


def hold_out(
    alignment: Alignment, groups: Mapping[str, np.ndarray], *, test: int, max_identity: float, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Rows to learn from and rows to test on. ``test`` groups (species), drawn among those of two rows or more, are tested on;
    every other row that is ``max_identity`` identical to a test row, or more, is left out of both.

    A split by species alone leaks: closely related species hold nearly the same sequences. Raises ``UserError`` where nothing is
    left to learn from.
    """
    from unmask.data.order import shuffled

    several = [name for name, rows in groups.items() if len(rows) >= 2] or list(groups)
    if len(several) <= test:
        raise UserError(
            f"{alignment.source}: {len(several)} species can be held out, test_species={test} asks for more: use fewer"
        )
    chosen = [several[i] for i in np.sort(shuffled(len(several), seed)[:test])]
    tested = np.sort(np.concatenate([groups[name] for name in chosen]))
    others = np.setdiff1d(np.arange(len(alignment)), tested)
    near = identity(alignment.letters[others], alignment.letters[tested]).max(axis=1) >= max_identity
    if near.all():
        raise UserError(
            f"{alignment.source}: every row is {max_identity:g} identical to a test row or more, nothing is left to learn "
            "from: use data.max_identity=0.95, fewer data.test_species, or data.hold_out=none"
        )
    return others[~near], tested
