"""Training batches of the structural objectives: rows of running text, pairs of spans, or a premise with its candidates."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import groupby
from typing import Any

import numpy as np
import torch
from pydantic import model_validator

from unmask.config import Field
from unmask.contracts import Batch, DataFacts
from unmask.data.mapped import Mapped
from unmask.data.text import TextBatches, TextSettings, TextSource, Tokenizer, documents, open_text
from unmask.data.text.batches import tokenizer_for
from unmask.data.text.tokenizer import FILE
from unmask.draw import Seeded
from unmask.errors import UserError
from unmask.systems.language.checkpoints import check_tokenizer, start_from
from unmask.systems.language.starting import tokenizer_of
from unmask.systems.language.structural_ssl.clusters import check_map, learned_map, read_map, word_vectors
from unmask.systems.language.structural_ssl.joint import JointBuilder, JointConfig, slots
from unmask.systems.language.structural_ssl.pairs import Example, PairBuilder, PairConfig
from unmask.systems.language.structural_ssl.settings import TOKENS, StructuralConfig
from unmask.systems.language.structural_ssl.structure import Row, Structure, framed, packed, padded, structure_of

CLUSTERS = "clusters.json"


class StructuralSettings(TextSettings):
    """Text with its documents, paragraphs and sentences."""

    min_chars: tuple[int, int, int] = Field(
        (20, 60, 200),
        description="shorter sentences, paragraphs and documents are left out of pairs; small texts lose much",
    )
    hold_out: int = Field(
        0, ge=0, description='every so manieth document is the split "test" of text that has none; 0: none is held out'
    )
    pack: bool = Field(False, description="several pairs in a row, each seeing itself alone")

    @model_validator(mode="after")
    def _not_all(self) -> StructuralSettings:
        if self.hold_out == 1:
            raise ValueError("hold_out=1 leaves nothing to learn from: it takes 2 or more, or 0")
        return self


def open_source(settings: StructuralSettings) -> TextSource:
    """The rows of a split; of whole documents where ``hold_out`` parts them. Raises ``UserError``."""

    def opened(split: str, limit: int | None) -> TextSource:
        return open_text(
            settings.uri, split, columns=settings.columns, limit=limit, separator=settings.paragraph_separator
        )

    if not settings.hold_out:
        return opened(settings.split, settings.limit)
    if settings.split not in ("train", "test"):
        raise UserError(f"split={settings.split} with hold_out={settings.hold_out}: it takes train or test")
    source = opened("train", settings.limit)
    held = []
    keys = ((row.document if row.document is not None else number) for number, row in enumerate(source.rows()))
    for number, (_, rows) in enumerate(groupby(keys)):
        held += [number % settings.hold_out == settings.hold_out - 1] * sum(1 for _ in rows)
    chosen = np.flatnonzero(np.array(held, dtype=bool) == (settings.split == "test"))
    if not len(chosen):
        raise UserError(
            f"{settings.uri} has too few documents to hold out every {settings.hold_out}th: use a smaller hold_out"
        )
    return source.part(chosen, f"{settings.split}-{settings.hold_out}")


class TokenRows(TextBatches):
    """Rows of text for objectives of tokens; ``segments`` stay only where rows are packed."""

    def __init__(
        self, settings: StructuralSettings, batch_size: int, seed: int = 0, *, tokenizer: Tokenizer | None = None
    ):
        super().__init__(settings, batch_size, seed, tokenizer=tokenizer, source=open_source(settings))

    def fetch(self, indices: np.ndarray) -> Batch:
        batch = dict(super().fetch(indices))
        batch.pop("label", None)
        if self.settings.rows != "packed":
            del batch["segments"], batch["positions"]
        if self.settings.rows == "stream":
            del batch["attention_mask"]
        return batch


class _Built(Mapped):
    """Examples without end: their numbers go on from epoch to epoch, so that every epoch has spans of its own."""

    what = "examples"
    structure: Structure

    def __init__(self, settings: StructuralSettings, batch_size: int, seed: int, tokenizer: Tokenizer | None):
        self.settings = settings
        self.text = open_source(settings)
        self.tokenizer = tokenizer or tokenizer_for(settings, self.text)
        for role in ("pad", "cls", "sep"):
            if role not in self.tokenizer.special:
                raise UserError(
                    f"the tokenizer has no {role} token: pairs need data.style=bert or roberta, or another tokenizer"
                )
        self.structure = structure_of(documents(self.text), self.tokenizer, settings.min_chars)

    def begin(self, count: int, batch_size: int, seed: int, **extra: Any) -> None:
        super().__init__(count, batch_size, seed, uri=self.settings.uri)
        self.side_files = {FILE: self.tokenizer.text()}
        self.facts = DataFacts(
            uri=self.settings.uri,
            count=count,
            columns=self.text.columns,
            extra={
                **self.tokenizer.facts(),
                "length": self.settings.length,
                "tokens": len(self.structure.ids),
                "documents": len(self.structure.names),
                "settings": self.settings.plain(),
                **extra,
            },
        )

    def indices(self, step: int) -> np.ndarray:
        epoch = step // (self.steps_per_epoch or 1)
        return super().indices(step) + epoch * self.count


class PairBatches(_Built):
    """Besides the tokens of a row: ``label`` int64 ``[B]`` (1: the same unit), and, packed, ``starts [B, 2]``."""

    def __init__(
        self,
        settings: StructuralSettings,
        config: PairConfig,
        objective: str,
        batch_size: int,
        seed: int = 0,
        *,
        tokenizer: Tokenizer | None = None,
    ):
        super().__init__(settings, batch_size, seed, tokenizer)
        self.builder = PairBuilder(self.structure, config, objective, seed, settings.uri)
        self.begin(self.builder.count, batch_size, seed, types=3 if objective in ("sdc", "ddc", "dslc") else 2)

    def row(self, example: Example) -> Row:
        fields = [example.a, example.b, *([example.context] if example.context is not None else [])]
        return framed([self.structure.span(f) for f in fields], self.tokenizer, self.settings.length)

    def fetch(self, indices: np.ndarray) -> Batch:
        examples = self.builder.examples(indices)
        rows, pad = [self.row(e) for e in examples], self.tokenizer.special["pad"]
        batch = packed(rows, pad, self.settings.length) if self.settings.pack else padded(rows, pad)
        batch["label"] = torch.tensor([e.label for e in examples])
        return batch


class JointBatches(_Built):
    """Rows of (k + 1) slots: ``label`` int64 ``[B, k]``, -100 where a slot is empty."""

    def __init__(
        self,
        settings: StructuralSettings,
        config: JointConfig,
        batch_size: int,
        seed: int = 0,
        *,
        tokenizer: Tokenizer | None = None,
    ):
        super().__init__(settings, batch_size, seed, tokenizer)
        self.config = config
        self.builder = JointBuilder(self.structure, config, seed, settings.uri)
        whole = (config.k + 1) * config.slot
        self.begin(self.builder.count, batch_size, seed, types=config.k + 1, row=whole)

    def fetch(self, indices: np.ndarray) -> Batch:
        groups, c = self.builder.groups(indices), self.config
        texts = [[self.structure.span(t) for t in (g.premise, *g.candidates)] for g in groups]
        batch = slots(texts, self.tokenizer, c.k, c.slot)
        batch["label"] = torch.tensor([[*g.labels, *[-100] * (c.k - len(g.labels))] for g in groups])
        return batch


def add_clusters(batches: Any, clusters: int, seed: int, table: np.ndarray | None, given: torch.Tensor | None) -> None:
    """Put a cluster map among the files that are saved with the model: the given one, or clusters of a table of word vectors, or of
    vectors counted in the training rows. Raises ``UserError`` for a map that does not fit."""
    tokenizer: Tokenizer = batches.tokenizer
    special = tokenizer.special.values()
    if given is None:
        ids = np.asarray(batches.structure.ids if hasattr(batches, "structure") else batches.data.ids)
        draw = Seeded(seed)
        vectors = word_vectors(ids, tokenizer.size, draw) if table is None else table
        given = torch.from_numpy(learned_map(vectors, special, clusters, draw))
    count = check_map(given, tokenizer.size, special)
    batches.facts = replace(batches.facts, extra={**batches.facts.extra, "clusters": count})
    batches.side_files[CLUSTERS] = json.dumps({"token_to_cluster_map": given.tolist()}, separators=(",", ":"))


def open_structural(config: StructuralConfig, data: StructuralSettings, batch_size: int, seed: int) -> Any:
    """The batches of an objective: rows, pairs or groups; with the tokenizer of ``init`` where there is one, and a cluster map for
    crts. Raises ``UserError``."""
    start = start_from(config.init) if config.init else None
    tokenizer = tokenizer_of(data, start)
    batches: Any
    if config.objective in TOKENS:
        batches = TokenRows(data, batch_size, seed, tokenizer=tokenizer)
    elif config.objective == "mspp":
        batches = JointBatches(data, config.joint, batch_size, seed, tokenizer=tokenizer)
    else:
        batches = PairBatches(data, config.pairs, config.objective, batch_size, seed, tokenizer=tokenizer)
    if start is not None:
        check_tokenizer(batches.tokenizer, start)
    if (config.objective if config.objective in TOKENS else config.token) == "crts":
        c = config.clusters
        table = None
        if c.cluster_from:
            table = start_from(c.cluster_from).state["network.words.weight"].float().numpy()
            if len(table) < batches.tokenizer.size:
                raise UserError(
                    f"{c.cluster_from} has {len(table)} words, the tokenizer {batches.tokenizer.size}: it does not fit"
                )
            table = table[: batches.tokenizer.size]
        add_clusters(batches, c.count, seed, table, read_map(c.map) if c.map else None)
    return batches
