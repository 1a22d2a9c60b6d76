"""What predictions on alignments are: contact maps, mutation scores, embeddings, pairs, most with a table and a picture."""

from __future__ import annotations

import csv
import io
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from unmask.systems.prediction.result import Result, write_whole
from unmask.systems.proteins import drawing
from unmask.systems.proteins.alphabet import AMINO

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor


def csv_bytes(header: list[str], rows: list[list[Any]]) -> bytes:
    held = io.StringIO()
    writer = csv.writer(held, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    return held.getvalue().encode()


def opened(png: bytes) -> Image.Image:
    from PIL import Image

    return Image.open(io.BytesIO(png)).convert("RGB")


@dataclass
class _OfAlignment(Result):
    """rows: how many were looked at. notes: what a reader should know."""

    rows: int = field(default=0, kw_only=True)
    notes: list[str] = field(default_factory=list, kw_only=True)

    def plain(self) -> dict[str, Any]:
        return {**super().plain(), "rows": self.rows, **({"notes": self.notes} if self.notes else {})}

    def picture(self) -> bytes:
        raise NotImplementedError

    def overlay(self, *, size: int = 480) -> Image.Image:
        """The picture as it is drawn: its letters do not shrink with ``size``."""
        return opened(self.picture())


@dataclass
class ContactMap(_OfAlignment):
    """values: ``[L, L]`` in ``unit``: "probability" of a contact, or "attention" (APC-corrected, no scale of its own). target: the
    structure's contacts, precision: ``long_P@L`` and its kin, where a structure was given."""

    kind: ClassVar[str] = "contacts"
    values: Tensor
    query: str
    unit: str = "probability"
    target: Tensor | None = None
    precision: dict[str, float] = field(default_factory=dict)

    def pairs(self, least: int = 6) -> list[tuple[int, int, float]]:
        """Column pairs (from 1) at least ``least`` apart, the strongest first."""
        table = self.values.numpy()
        i, j = np.triu_indices(len(table), least)
        order = np.argsort(-table[i, j], kind="stable")
        return [(int(i[k]) + 1, int(j[k]) + 1, float(table[i[k], j[k]])) for k in order]

    def plain(self) -> dict[str, Any]:
        top = [{"i": i, "j": j, self.unit: round(v, 5)} for i, j, v in self.pairs()[:5]]
        return {
            **super().plain(),
            "columns": len(self.query),
            "strongest": top,
            **({"precision": self.precision} if self.precision else {}),
        }

    def files(self) -> dict[str, bytes]:
        rows = [[i, j, self.query[i - 1], self.query[j - 1], f"{v:.6g}", j - i] for i, j, v in self.pairs(1)]
        return {".csv": csv_bytes(["i", "j", "letter_i", "letter_j", self.unit, "separation"], rows)}

    def picture(self) -> bytes:
        target = None if self.target is None else self.target.numpy()
        title = f"{Path(self.source).name}: {self.rows} rows, the {len(self.query)} strongest pairs ringed"
        return drawing.contact_map_png(self.values.numpy(), unit=self.unit, target=target, title=title)


@dataclass
class MutationScores(_OfAlignment):
    """table: ``[L, 20]``, log-odds of each amino acid (order of ``AMINO``) against the wild type. asked: rows of the user's table
    under ``header`` with their ``scores``; none where every substitution was asked for."""

    kind: ClassVar[str] = "mutations"
    table: Tensor
    query: str
    strategy: str = "masked"
    header: list[str] = field(default_factory=list)
    asked: list[list[str]] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)

    def plain(self) -> dict[str, Any]:
        values: dict[str, Any] = {"strategy": self.strategy, "columns": len(self.query)}
        if self.asked:
            values["scores"] = {
                ",".join(row): round(s, 5) for row, s in list(zip(self.asked, self.scores, strict=True))[:20]
            }
        else:
            values["mean_score"] = round(float(self.table.mean()), 5)
        return {**super().plain(), **values}

    def files(self) -> dict[str, bytes]:
        if self.asked:
            rows: list[list[Any]] = [[*row, f"{s:.6g}"] for row, s in zip(self.asked, self.scores, strict=True)]
            table = csv_bytes([*self.header, "score"], rows)
        else:
            rows = [
                [f"{old}{place + 1}{new}", place + 1, old, new, f"{float(self.table[place, k]):.6g}"]
                for place, old in enumerate(self.query)
                if old in AMINO
                for k, new in enumerate(AMINO)
                if new != old
            ]
            table = csv_bytes(["mutant", "place", "wild_type", "amino_acid", "score"], rows)
        return {".csv": table}

    def picture(self) -> bytes:
        title = f"{Path(self.source).name}: {self.strategy} marginals in the context of {self.rows} rows"
        order = "GAVLIMCFYWHKRDESTNQP"
        where = [AMINO.index(letter) for letter in order]
        return drawing.heat_map_png(self.table.numpy()[:, where], self.query, order, title=title)


@dataclass
class Embeddings(_OfAlignment):
    """sites: ``[R, L, D]``; sequences: their mean over columns ``[R, D]``; names: the headers; layer: after which."""

    kind: ClassVar[str] = "embeddings"
    sites: Tensor
    sequences: Tensor
    names: list[str] = field(default_factory=list)
    layer: int = 0

    def plain(self) -> dict[str, Any]:
        return {
            **super().plain(),
            "layer": self.layer,
            "sites": list(self.sites.shape),
            "query": self.names[0] if self.names else "",
        }

    def files(self) -> dict[str, bytes]:
        held = io.BytesIO()
        np.savez_compressed(
            held, sites=self.sites.numpy(), sequences=self.sequences.numpy(), names=np.array(self.names, dtype=np.str_)
        )
        return {".npz": held.getvalue()}

    def overlay(self, *, size: int = 480) -> Image.Image:
        return Result.overlay(self, size=size)


@dataclass
class Pair:
    """One pair. left, right: headers; left_row, right_row: rows of the files (from 0; -1: a row of gaps); confidence: share
    of runs, or a gap of scores; correct: where the truth is known."""

    species: str
    left: str
    right: str
    left_row: int
    right_row: int
    confidence: float
    fixed: bool = False
    correct: bool | None = None


@dataclass
class Pairs(_OfAlignment):
    """Who goes with whom. shares: ``[D, D]`` left against right, shares of runs; sizes: rows of each species, in order; losses and
    correct by step, means over runs; facts: whatever else is told."""

    kind: ClassVar[str] = "pairs"
    pairs: list[Pair]
    shares: np.ndarray
    hard: np.ndarray
    sizes: list[int]
    score: str = "language model"
    losses: list[float] = field(default_factory=list)
    correct: list[float] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def chance(self) -> float:
        """Pairs that are right by chance: one a species."""
        return float(len(self.sizes))

    def plain(self) -> dict[str, Any]:
        values: dict[str, Any] = {"score": self.score, "pairs": len(self.pairs), "species": len(self.sizes)}
        known = [p.correct for p in self.pairs if p.correct is not None]
        if known:
            values |= {
                "correct": sum(known),
                "correct_share": sum(known) / len(known),
                "chance_share": self.chance / len(known),
            }
        return {**super().plain(), **values, **self.facts}

    def table(self) -> bytes:
        known = any(p.correct is not None for p in self.pairs)
        header = ["species", "left", "right", "left_row", "right_row", "confidence", "fixed"] + (
            ["correct"] if known else []
        )
        rows = [
            [p.species, p.left, p.right, p.left_row + 1, p.right_row + 1, f"{p.confidence:.6g}", int(p.fixed)]
            + ([int(bool(p.correct))] if known else [])
            for p in self.pairs
        ]
        return csv_bytes(header, rows)

    def files(self) -> dict[str, bytes]:
        return {".csv": self.table()}

    def save(self, path: str | Path) -> Path:
        """As other results; with a name that ends in .csv the table has it, and the picture lies beside it."""
        path = Path(path)
        if path.suffix != ".csv":
            return super().save(path)
        super().save(path.with_suffix(".json"))
        write_whole(path.with_suffix(".png"), self.picture())
        return path

    def words(self) -> str:
        """What it says in one line."""
        values = self.plain()
        told = f"{values['pairs']} pairs of {values['species']} species by {self.score}"
        if "correct" in values:
            share, chance = 100 * values["correct_share"], 100 * values["chance_share"]
            told += f", {values['correct']} correct ({share:.0f} %, chance {chance:.0f} %)"
        return told

    def picture(self) -> bytes:
        title = f"{len(self.pairs)} pairs of {len(self.sizes)} species by {self.score}"
        return drawing.pairing_png(
            self.shares,
            self.hard,
            self.sizes,
            losses=self.losses,
            correct=self.correct,
            chance=self.chance,
            title=title,
        )
