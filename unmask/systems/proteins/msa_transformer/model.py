"""MSA Transformer. Rao, Liu, Verkuil, Meier, Canny, Abbeel, Sercu, Rives, ICML 2021.

Hide 15 % of the letters of an alignment, anywhere in it, and predict them. Row attention shares one map between all rows; column
attention lets each site look at the same site of the relatives.

    model = MSATransformer(MSATransformer.Config(network={"embed_dim": 96, "depth": 4, "num_heads": 4}))
    loss = model.loss({"tokens": tokens}, draw=Seeded(0))["loss"]        # tokens [B, R, C]

Legend: B tables, R rows, C columns with ``<cls>``, L without it, D width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from unmask import config as configs
from unmask.config import Field, validated
from unmask.contracts import Batch, DataFacts, Losses, Picture, Progress, Trainable, TrainingBatches
from unmask.data.alignments import SUFFIXES, Alignment, read_alignment
from unmask.draw import Draw, Seeded
from unmask.errors import UserError
from unmask.systems.proteins.alphabet import CLS, FIRST_AMINO, GAP, LAST_AMINO, MASK, PAD, VOCABULARY, tokens_of
from unmask.systems.proteins.batches import FEW, AlignmentBatches, AlignmentSettings
from unmask.systems.proteins.drawing import letters_picture
from unmask.systems.proteins.msa_transformer.contacts import (
    average_product_corrected,
    precision_by_range,
    true_contacts,
)
from unmask.systems.proteins.msa_transformer.network import MSANetwork, NetworkConfig
from unmask.systems.proteins.results import ContactMap, Embeddings
from unmask.systems.proteins.rows import Choice, choose_rows


class MaskingConfig(configs.Config):
    """Which letters are hidden, and what stands in their place (BERT's shares)."""

    probability: float = Field(0.15, gt=0, lt=1, description="share of letters hidden")
    mask_share: float = Field(0.8, ge=0, le=1, description="of them: replaced by <mask>")
    random_share: float = Field(
        0.1, ge=0, le=1, description="of them: replaced by a random amino acid; the rest is kept"
    )
    keep_share: float | None = Field(None, ge=0, le=1, description="of them: kept as they are; open: the rest")
    unit: Literal["letters", "columns"] = Field(
        "letters", description="letters anywhere, or whole columns (worse, the ablation)"
    )


class Question(configs.Config):
    """What to predict for an alignment."""

    task: Literal["contacts", "couplings", "embeddings", "mutations"] = Field(
        "contacts", description="contacts; couplings: attention alone, no regression needed; embeddings; mutations"
    )
    rows: int | None = Field(
        None, ge=1, description="rows that are looked at, the query among them; open: 256, or what the row table holds"
    )
    choice: Choice = Field("diverse", description="which: diverse, similar, random, first, nearest, filter")
    unknown: Literal["refuse", "ok"] = Field(
        "refuse", description='letters outside the alphabet; "ok" reads them as <unk>'
    )
    mutations: str = Field(
        "", description="A24G, several with commas, or a CSV with a column of them; empty: every substitution"
    )
    column: str = Field("mutant", description="the column of mutations in the CSV")
    strategy: Literal["masked", "wild_type"] = Field(
        "masked", description="hide each place in turn, or one pass with nothing hidden"
    )
    batch_size: int = Field(4, ge=1, description="tables computed at once for mutations")
    layer: int | None = Field(
        None, ge=0, description="whose representations: 0 embedding, i after layer i; open: the last"
    )
    structure: str = Field("", description="a PDB or mmCIF file of the query: how precise the contacts are")
    chain: str = Field("", description="chain of the structure; empty: its first")
    seed: int = Field(0, description="of choice=random")


class MSATransformer(Trainable):
    slug = "msa_transformer"
    loss_units = "nats a hidden letter"
    Data = AlignmentSettings
    Ask: ClassVar[type[configs.Config]] = Question
    joint: ClassVar[bool] = False
    suffixes: ClassVar[tuple[str, ...]] = (*SUFFIXES, *(f"{s}.gz" for s in SUFFIXES))
    predict_batch: ClassVar[int] = 1
    measures = {
        "loss": "cross-entropy of hidden letters, nats",
        "accuracy": "hidden letters found, %",
        "coupling_rho": "rank correlation of row maps with DCA couplings",
    }
    lower_is_better = frozenset({"loss"})

    class Config(configs.Config):
        network: NetworkConfig = Field(NetworkConfig(), description="sizes and variants of the network")
        masking: MaskingConfig = Field(MaskingConfig(), description="which letters are hidden")
        checkpointing: bool = Field(False, description="compute activations again instead of keeping them")

    config: Config

    def __init__(self, config: Config, network: MSANetwork | None = None):
        super().__init__(config)
        self.network = network if network is not None else MSANetwork(config.network)

    @classmethod
    def of(cls, network: MSANetwork, **options: Any) -> MSATransformer:
        """The system around a network that is there already."""
        return cls(validated(cls.Config, {**options, "network": network.config.plain()}, where=cls.slug), network)

    # --- data ---
    @classmethod
    def open_batches(cls, config: Config, data: AlignmentSettings, batch_size: int, seed: int) -> TrainingBatches:
        return AlignmentBatches(data, batch_size, seed)

    @classmethod
    def adapted(cls, config: Config, facts: DataFacts) -> Config:
        columns = int(facts.extra.get("columns", 0)) + 1
        if columns > config.network.max_positions:
            raise UserError(
                f"{facts.uri} has {columns - 1} columns, the model positions for {config.network.max_positions - 1}: "
                f"use network.max_positions={columns}"
            )
        return config

    # --- learning ---
    def mask(self, tokens: Tensor, draw: Draw) -> tuple[Tensor, Tensor]:
        """Tokens with letters hidden, and where (bool): never ``<cls>`` or padding; gaps may be."""
        masking, device = self.config.masking, tokens.device
        if masking.unit == "columns":
            select = draw.uniform("select", (len(tokens), 1, tokens.shape[2]), device=device).expand(tokens.shape)
        else:
            select = draw.uniform("select", tokens.shape, device=device)
        action = draw.uniform("action", tokens.shape, device=device)
        random = draw.integers("random_token", FIRST_AMINO, LAST_AMINO + 1, tokens.shape, device=device)
        hidden = (select < masking.probability) & (tokens != CLS) & (tokens != PAD)
        shares = masking.mask_share, masking.random_share
        whole = sum(shares) + masking.keep_share if masking.keep_share is not None else 1.0
        first = shares[0] / whole
        instead = torch.where(action < first, MASK, torch.where(action < first + shares[1] / whole, random, tokens))
        return torch.where(hidden, instead, tokens), hidden

    def loss(self, batch: Batch, draw: Draw, progress: Progress | None = None, phase: str = "main") -> Losses:
        tokens = batch["tokens"]
        masked, hidden = self.mask(tokens, draw)
        return self.hidden_loss(masked, tokens, hidden, draw)

    def hidden_loss(self, masked: Tensor, tokens: Tensor, hidden: Tensor, draw: Draw | None) -> Losses:
        """Cross-entropy and accuracy at the hidden places; the head is computed there alone."""
        seen = self.network(masked, draw=draw if self.training else None, checkpointing=self.config.checkpointing)
        logits, target = self.network.letters(seen.last[hidden]).float(), tokens[hidden]
        count = max(len(target), 1)
        loss = F.cross_entropy(logits, target, reduction="sum") / count
        return {"loss": loss, "accuracy": (logits.argmax(dim=-1) == target).sum().detach() / count}

    def references(self, batch: Batch, draw: Draw, progress: Progress | None = None) -> Losses:
        tokens = batch["tokens"]
        masked, hidden = self.mask(tokens, draw)
        guess = column_profile(masked, hidden, letter_frequencies(tokens))
        return {"column profile of the visible": -guess[hidden].gather(1, tokens[hidden][:, None]).log().mean()}

    @torch.no_grad()
    def preview(self, batch: Batch, draw: Draw, progress: Progress | None = None) -> list[Picture]:
        """The first tables: what was seen, what was said, what is true; right letters green, wrong ones red."""
        tokens = batch["tokens"][:2]
        masked, hidden = self.mask(tokens, draw)
        said = self.network.letters(self.network(masked).last).argmax(dim=-1)
        rows = []
        for one in range(len(tokens)):
            shown = torch.where(hidden[one], said[one], tokens[one])
            right = hidden[one] & (said[one] == tokens[one])
            rows.append(
                [
                    letters_picture(torch.where(hidden[one], MASK, tokens[one])),
                    letters_picture(shown, right=right, wrong=hidden[one] & ~right),
                    letters_picture(tokens[one]),
                ]
            )
        caption = "Letters by the chemistry of their side chains; hidden letters black, then green where found and red where not."
        return [Picture("alignment", ["seen", "said", "true"], rows, caption)]

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
        from unmask.systems.proteins.msa_transformer.measuring import measure

        return measure(self, data, draw, limit=limit, device=device, tell=tell, folder=folder)

    def blocks_to_compile(self) -> list[nn.Module]:
        return list(self.network.layers)

    # --- predicting ---
    @torch.no_grad()
    def predict(self, inputs: list[Any], **options: Any) -> list[Any]:
        """One result an alignment (a path, or an ``Alignment``): ``ContactMap``, ``MutationScores`` or ``Embeddings``."""
        ask = validated(Question, options, where=self.slug)
        was = self.training
        self.eval()
        try:
            return [self._predict_one(item, ask) for item in inputs]
        finally:
            self.train(was)

    def _predict_one(self, item: Any, ask: Question) -> Any:
        whole = item if isinstance(item, Alignment) else read_alignment(item, unknown=ask.unknown)
        config = self.network.config
        count = ask.rows or min(256, config.max_rows if config.row_positions != "none" else 256)
        chosen = whole.select(choose_rows(whole, count, ask.choice, Seeded(ask.seed)))
        notes = []
        if len(chosen) < FEW:
            notes.append(
                f"only {len(chosen)} rows: with fewer than {FEW} relatives little is known of contacts and mutations"
            )
        if whole.dropped:
            notes.append(f"{whole.dropped} inserted letters were left out")
        if whole.unknown:
            notes.append(f"read as <unk>: {' '.join(whole.unknown)}")
        tokens = tokens_of(chosen).to(next(self.parameters()).device)
        self.network.check(*tokens.shape[1:])
        query = chosen.texts()[0]
        if ask.task == "mutations":
            from unmask.systems.proteins.msa_transformer.scanning import scan

            result: Any = scan(self.network, tokens, query, ask)
        elif ask.task == "embeddings":
            result = self._embeddings(tokens, chosen, ask)
        else:
            result = self._contacts(tokens, query, ask)
        return replace(result, source=whole.source, rows=len(chosen), notes=notes + result.notes)

    def _contacts(self, tokens: Tensor, query: str, ask: Question) -> ContactMap:
        if ask.task == "contacts" and not bool(self.network.contact_head.fitted):
            raise UserError(
                "the contact head of this model was never fitted to structures: use task=couplings, or the published weights with "
                "their NAME-contact-regression.pt beside them"
            )
        maps = self.network(tokens, need_maps=True).row_maps
        if ask.task == "contacts":
            values, unit = self.network.contacts(maps)[0], "probability"
        else:
            values, unit = attention_couplings(maps)[0], "attention"
        values = values.float().cpu()
        result = ContactMap(values, query, unit)
        if ask.structure:
            target = true_contacts(ask.structure, len(query), chain=ask.chain)
            result.target, result.precision = target, precision_by_range(values, target)
        return result

    def _embeddings(self, tokens: Tensor, chosen: Alignment, ask: Question) -> Embeddings:
        layer = self.network.config.depth if ask.layer is None else ask.layer
        if layer > self.network.config.depth:
            raise UserError(f"layer={layer}: the model has 0 (the embedding) ... {self.network.config.depth}")
        seen = self.network(tokens, layers=(layer,)).layers[layer][0].float().cpu()
        return Embeddings(seen[:, 1:], seen[:, 1:].mean(dim=1), list(chosen.names), layer)


def attention_couplings(row_maps: Tensor) -> Tensor:
    """``[B, L, L]``: the row maps' symmetric parts, corrected by APC and added over layers and heads (untied: the mean of rows)."""
    maps = (row_maps.mean(dim=3) if row_maps.ndim == 6 else row_maps)[..., 1:, 1:]
    return average_product_corrected(maps + maps.transpose(-1, -2)).sum(dim=(1, 2))


def letter_frequencies(tokens: Tensor, *, add: float = 1.0) -> Tensor:
    """``[33]``: how often each letter stands in tables of tokens, ``add`` more of each letter, nothing of the other tokens."""
    counts = torch.bincount(tokens.flatten(), minlength=len(VOCABULARY)).double()
    letters = torch.zeros_like(counts)
    letters[FIRST_AMINO : GAP + 1] = 1
    counts = (counts + add) * letters
    return counts / counts.sum()


def column_profile(tokens: Tensor, hidden: Tensor, prior: Tensor, *, strength: float = 4.0) -> Tensor:
    """``[B, R, C, 33]``: the letters seen in each column of the same table, with ``strength`` times ``prior`` added."""
    seen = (
        F.one_hot(tokens, len(VOCABULARY)).double()
        * (~hidden)[..., None]
        * ((tokens != CLS) & (tokens != PAD))[..., None]
    )
    counts = seen.sum(dim=1, keepdim=True) + strength * prior.to(tokens.device)
    return (counts / counts.sum(dim=-1, keepdim=True)).expand(*tokens.shape, -1)
