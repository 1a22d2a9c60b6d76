"""DiffPALM: pairing interacting proteins by a masked language model. Lupo, Sgarbossa, Bitbol, PNAS 2024, arXiv:2308.07136.

Two families, several copies of each protein in each species: who goes with whom? Pairs are rows of one long alignment. Hide 70 %
of the left letters and descend, by the loss of an MSA Transformer, on the permutation of left rows within each species.

    model = DiffPALM.from_pretrained("runs/diffpalm-001")
    (pairs,) = model.predict(["malg.fasta", "malk.fasta"], runs=5)
    pairs.save("pairs.csv")

The network is ESM's (``weights=FILE``), that of another run (``model=RUN``), or one that ``unmask train diffpalm`` trained on
known pairs.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn

from unmask import config as configs
from unmask.config import Field, validated
from unmask.contracts import Batch, DataFacts, Losses, Picture, Progress, Trainable, TrainingBatches
from unmask.data.alignments import Alignment, read_alignment
from unmask.draw import Draw
from unmask.errors import UserError
from unmask.systems.proteins.alphabet import CLS, MASK, PAD
from unmask.systems.proteins.batches import AlignmentBatches, AlignmentSettings, families
from unmask.systems.proteins.couplings import mutual_information, sequence_weights, states_of
from unmask.systems.proteins.diffpalm.optimising import DescentSettings
from unmask.systems.proteins.drawing import letters_picture
from unmask.systems.proteins.msa_transformer.model import MSATransformer, column_profile, letter_frequencies
from unmask.systems.proteins.msa_transformer.network import MSANetwork, NetworkConfig

Score = Literal["language_model", "mi", "mi_ipa", "dca_ipa", "best_hits", "mirrortree", "graph", "chance"]


class HidingConfig(configs.Config):
    """What is hidden while a network of one's own learns from known pairs, always as <mask>."""

    left_share: float = Field(0.75, ge=0, le=1, description="share of steps that hide letters of the left part alone")
    left_probability: float = Field(0.7, gt=0, lt=1, description="share of left letters hidden there")
    probability: float = Field(0.15, gt=0, lt=1, description="share of all letters hidden in the other steps")


class TestConfig(configs.Config):
    """How held-out pairs are tested."""

    __test__ = False  # no test of pytest's
    tables: int = Field(12, ge=1, description="alignments of whole test species")
    rows: int = Field(24, ge=2, description="rows of each, about")
    largest: int = Field(5, ge=2, description="rows of a species; larger ones are cut to so many at random")
    runs: int = Field(3, ge=1, description="runs that are aggregated")


class Question(configs.Config):
    """How two alignments are paired."""

    score: Score = Field(
        "language_model", description="language_model, or a baseline: mi, mi_ipa, dca_ipa, best_hits, mirrortree, graph"
    )
    runs: int = Field(5, ge=1, description="runs with other draws, aggregated; the paper: 10 to 20")
    rounds: int = Field(
        1, ge=1, description="rounds that fix what the one before was sure of (IPA); the paper: 6 to 10"
    )
    cutoff: float = Field(1.0, gt=0, le=1, description="share of runs that makes a pair robust")
    add: int | None = Field(None, ge=1, description="fix at most so many pairs a round; open: all robust ones")
    robust: Literal["fixed", "positive"] = Field(
        "fixed", description="robust pairs stay in place, or become examples on top"
    )
    species_from: str = Field(
        "last_field", description="where a header names the species: last_field, field:N, uniprot, a regex"
    )
    pad: Literal["refuse", "gaps"] = Field(
        "refuse", description="unequal numbers of rows of a species: refuse, or fill with gaps"
    )
    table_rows: int = Field(50, ge=2, description="rows paired together; larger data are paired table by table")
    species: int | None = Field(None, ge=1, description="pair only so many species, a random choice")
    largest: int | None = Field(None, ge=2, description="leave species of more rows out")
    fixed: str = Field("", description="a CSV of pairs (left, right: headers) that are known and stay in place")
    positive: str = Field("", description="a CSV of known pairs, shown as examples and not paired again")
    truth: Literal["auto", "rows", "headers", "none"] = Field(
        "auto", description="what is known: equal rows, equal headers, nothing"
    )
    unknown: Literal["refuse", "ok"] = Field(
        "refuse", description='letters outside the alphabet; "ok" reads them as <unk>'
    )
    increment: int = Field(6, ge=1, description="pairs added in each round of mi_ipa and dca_ipa")
    descent: dict[str, Any] = Field({}, description="options of the optimisation, over the system's own")
    pick: Literal["lowest", "last"] = Field(
        "lowest", description="which step of a run counts: that of the lowest loss, or the last"
    )
    target_masks: int = Field(
        0, ge=0, description="masks for the loss of the true order, where it is known; 0: leave it out"
    )
    seed: int = Field(0, description="of everything random")


class DiffPALM(Trainable):
    slug = "diffpalm"
    loss_units = "nats a hidden letter"
    Data = AlignmentSettings
    Ask: ClassVar[type[configs.Config]] = Question
    joint: ClassVar[bool] = True
    suffixes: ClassVar[tuple[str, ...]] = MSATransformer.suffixes
    measures = {
        "correct": "correct pairs, %",
        "true_lower": "alignments whose true order has a lower loss than shuffled ones, %",
    }

    class Config(configs.Config):
        model: str = Field(
            "", description="a run or an export whose MSA Transformer is asked; empty: a network of its own"
        )
        network: NetworkConfig = Field(NetworkConfig(), description="sizes and variants of the network")
        hiding: HidingConfig = Field(HidingConfig(), description="what is hidden in training on known pairs")
        descent: DescentSettings = Field(DescentSettings(), description="the optimisation of one run")
        columns: int | None = Field(
            None, ge=1, description="columns of each side that are kept, by mutual information; open: all"
        )
        kept: list[list[int]] | None = Field(None, description="the kept columns of each side, from the training data")
        lengths: list[int] | None = Field(None, description="columns of each side before that, from the training data")
        score: Literal["language_model", "mi", "mi_ipa", "nearest", "trained_mirrortree", "chance"] = Field(
            "language_model", description="what eval pairs by: the network, or a baseline on the same tables"
        )
        test: TestConfig = Field(TestConfig(), description="how held-out pairs are tested")

    config: Config

    def __init__(self, config: Config, network: MSANetwork | None = None):
        brought = network is not None or bool(config.model)
        if network is None and config.model:
            from unmask.official.hub import load_trainable

            trained = load_trainable(config.model)
            network = getattr(trained, "network", None)
            if not isinstance(network, MSANetwork):
                raise UserError(
                    f"{config.model} is a {trained.slug}, which has no MSA Transformer: give a run of msa_transformer"
                )
            more = {k: getattr(trained.config, k) for k in ("kept", "lengths") if hasattr(trained.config, k)}
            # what is saved later stands by itself
            config = config.model_copy(update={"model": "", "network": network.config, **more})
        super().__init__(config)
        self.brings_weights = brought  # not at random initialisation
        self.network = network if network is not None else MSANetwork(config.network)

    @classmethod
    def of(cls, network: MSANetwork, **options: Any) -> DiffPALM:
        """The system around a network that is there already."""
        return cls(validated(cls.Config, {**options, "network": network.config.plain()}, where=cls.slug), network)

    # --- data ---
    @classmethod
    def open_batches(cls, config: Config, data: AlignmentSettings, batch_size: int, seed: int) -> TrainingBatches:
        """Joined rows, cut to the columns that tell most about the other side."""
        if not data.partner:
            raise UserError(
                "diffpalm learns from pairs: name the second alignment with data.partner=FILE (row i goes with row i)"
            )
        kept = config.kept or chosen_columns(data, config.columns)
        left = families(data)[0].left
        assert left is not None
        cut = None if kept is None else np.array([*kept[0], *(left + c for c in kept[1])], dtype=np.int64)
        batches = AlignmentBatches(data, batch_size, seed, cut=cut)
        whole = int(batches.facts.extra["whole"])
        batches.facts.extra.update(  # type: ignore[attr-defined]
            kept=kept, lengths=[left, whole - left], left=left if kept is None else len(kept[0])
        )
        return batches

    @classmethod
    def adapted(cls, config: Config, facts: DataFacts) -> Config:
        MSATransformer.adapted(config, facts)  # type: ignore[arg-type]  # the same check of positions
        extra = facts.extra
        return config.model_copy(update={"kept": extra.get("kept"), "lengths": extra.get("lengths")})

    def left_columns(self, default: int | None = None) -> int:
        """Columns of the left part as the network sees it."""
        if self.config.kept is not None:
            return len(self.config.kept[0])
        if self.config.lengths is not None:
            return self.config.lengths[0]
        if default is None:
            raise UserError(
                "diffpalm: it is not known how many columns are the left protein's: train it with data.partner=FILE"
            )
        return default

    # --- learning ---
    def mask(self, tokens: Tensor, draw: Draw) -> tuple[Tensor, Tensor]:
        """Three steps in four hide 70 % of the left part, one in four 15 % anywhere; a step is one table."""
        hiding, device = self.config.hiding, tokens.device
        select = draw.uniform("select", tokens.shape, device=device)
        kind = draw.uniform("kind", (len(tokens),), device=device)[:, None, None] < hiding.left_share
        left = torch.arange(tokens.shape[2], device=device)[None, None] <= self.left_columns(tokens.shape[2] // 2)
        limit = torch.where(kind, hiding.left_probability * left, hiding.probability)
        hidden = (select < limit) & (tokens != CLS) & (tokens != PAD)
        return torch.where(hidden, MASK, tokens), hidden

    def loss(self, batch: Batch, draw: Draw, progress: Progress | None = None, phase: str = "main") -> Losses:
        tokens = batch["tokens"]
        masked, hidden = self.mask(tokens, draw)
        seen = self.network(masked, draw=draw if self.training else None)
        logits, target = self.network.letters(seen.last[hidden]).float(), tokens[hidden]
        count = max(len(target), 1)
        loss = nn.functional.cross_entropy(logits, target, reduction="sum") / count
        return {"loss": loss, "accuracy": (logits.argmax(dim=-1) == target).sum().detach() / count}

    def references(self, batch: Batch, draw: Draw, progress: Progress | None = None) -> Losses:
        tokens = batch["tokens"]
        masked, hidden = self.mask(tokens, draw)
        guess = column_profile(masked, hidden, letter_frequencies(tokens))
        return {"column profile of the visible": -guess[hidden].gather(1, tokens[hidden][:, None]).log().mean()}

    @torch.no_grad()
    def preview(self, batch: Batch, draw: Draw, progress: Progress | None = None) -> list[Picture]:
        tokens = batch["tokens"][:2]
        masked, hidden = self.mask(tokens, draw)
        said = self.network.letters(self.network(masked).last).argmax(dim=-1)
        rows = []
        for seen, truth, gone, guess in zip(masked, tokens, hidden, said, strict=True):
            right = gone & (guess == truth)
            shown = letters_picture(torch.where(gone, guess, truth), right=right, wrong=gone & ~right)
            rows.append([letters_picture(seen), shown, letters_picture(truth)])
        caption = (
            "Rows are pairs, the left protein first. Hidden letters black, then green where found and red where not."
        )
        return [Picture("pairs", ["seen", "said", "true"], rows, caption)]

    def measure(
        self,
        data: AlignmentSettings,
        draw: Draw,
        *,
        limit: int | None = None,
        device: torch.device | None = None,
        tell: Callable[[str], None] | None = None,
        folder: Path | None = None,
    ) -> dict[str, Any]:
        from unmask.systems.proteins.diffpalm.measuring import measure

        return measure(self, data, draw, limit=limit, device=device, tell=tell, folder=folder)

    def blocks_to_compile(self) -> list[nn.Module]:
        return list(self.network.layers)

    # --- predicting ---
    def predict(self, inputs: list[Any], *, tell: Callable[[str], None] | None = None, **options: Any) -> list[Any]:
        """One ``Pairs`` for two alignments (paths, or ``Alignment``), left first. options: those of ``Question``."""
        from unmask.systems.proteins.diffpalm.pairing import pair_files

        ask = validated(Question, options, where=self.slug)
        if len(inputs) != 2:
            raise UserError(
                f"diffpalm pairs two alignments, got {len(inputs)}: unmask predict diffpalm LEFT.fasta RIGHT.fasta"
            )
        left, right = (i if isinstance(i, Alignment) else read_alignment(i, unknown=ask.unknown) for i in inputs)
        return [pair_files(self, left, right, ask, tell=tell)]

    def cut(self, left: Alignment, right: Alignment) -> tuple[Alignment, Alignment]:
        """Both alignments with the columns that the network was trained on. Raises ``UserError`` for other proteins'."""
        if self.config.lengths is not None and self.config.kept is not None:
            for side, length in zip((left, right), self.config.lengths, strict=True):
                if side.columns != length:
                    raise UserError(
                        f"{side.source} has {side.columns} columns, the network was trained on {length}: align to the same"
                    )
            return left.cut(self.config.kept[0]), right.cut(self.config.kept[1])
        return left, right

    def settings(self, ask: Question) -> DescentSettings:
        return validated(DescentSettings, {**self.config.descent.plain(), **ask.descent}, where="descent")


def chosen_columns(data: AlignmentSettings, count: int | None) -> list[list[int]] | None:
    """Of each side the ``count`` columns that tell most about the other: each by its largest mutual information with a column of
    the other side, in the training rows. None where all are kept."""
    family = families(data)[0]
    first = family.left or 0
    if count is None or (count >= first and count >= family.whole.columns - first):
        return None
    states = states_of(family.whole.letters[family.train])
    table = mutual_information(states[:, :first], states[:, first:], weights=sequence_weights(states))

    def best(scores: Tensor) -> list[int]:
        return sorted(scores.argsort(descending=True, stable=True)[:count].tolist())

    return [best(table.amax(dim=1)), best(table.amax(dim=0))]
