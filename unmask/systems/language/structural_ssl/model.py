"""Structural self-supervised objectives for transformers. Di Liello, PhD thesis, University of Trento 2023, arXiv:2309.08272.

Swap tokens and ask which (RTS, C-RTS) or what stood there (SLM), beside masking (MLM) and ELECTRA; show two or more spans of
text and ask whether they come from one paragraph or document (SSP, SP, PSD, joint MSPP, contextual SDC, DDC, DSLC).

    model = StructuralSSL(StructuralSSL.Config(objective="rts", encoder={"size": "tiny", "vocabulary": 8192, "positions": 128}))
    loss = model.loss({"tokens": tokens}, draw=Seeded(0))["loss"]        # tokens [B, T]

``init=FOLDER`` goes on from any checkpoint of transformers' BERT, RoBERTa and ELECTRA families, or from a run.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from unmask import config as configs
from unmask.config import validated
from unmask.contracts import Batch, DataFacts, Losses, Picture, Progress, Trainable, TrainingBatches
from unmask.data.text import Tokenizer
from unmask.data.text.formats import SUFFIXES
from unmask.draw import Draw
from unmask.errors import UserError
from unmask.nn.collective import summed_over_processes
from unmask.systems.language.checkpoints import adopt, start_from
from unmask.systems.language.encoder import EncoderConfig, TextEncoder
from unmask.systems.language.heads import (
    IGNORED,
    DiscriminatorHead,
    JointHead,
    PairHead,
    SwapHead,
    WordHead,
    mean_cross_entropy,
)
from unmask.systems.language.starting import encoder_for
from unmask.systems.language.structural_ssl import tokens as objectives
from unmask.systems.language.structural_ssl.batches import (
    CLUSTERS,
    StructuralSettings,
    open_structural,
)
from unmask.systems.language.structural_ssl.clusters import (
    check_map,
    cluster_probabilities,
    count_changes,
)
from unmask.systems.language.structural_ssl.pairs import CONTEXTUAL, PAIRS
from unmask.systems.language.structural_ssl.settings import TOKENS, Ask, StructuralConfig


class StructuralSSL(Trainable):
    slug = "structural_ssl"
    loss_units = "nats"
    Data = StructuralSettings
    measures: ClassVar[Mapping[str, str]] = {
        "map": "mean average precision of 5 candidate sentences, %",
        "accuracy": "hidden tokens found (swaps told, for rts), %",
        "pair_accuracy": "pairs told, %",
        "mrr": "mean reciprocal rank, %",
        "p1": "right candidate first, %",
        "cosine_map": "MAP by the cosine of mean states, %",
        "loss": "nats a decision",
        "few_map": "MAP after fine-tuning on few labelled pairs, %",
    }
    lower_is_better = frozenset({"loss"})
    suffixes: ClassVar[tuple[str, ...]] = (*SUFFIXES, ".txt.gz", ".txt.xz")
    predict_batch: ClassVar[int] = 1

    Config = StructuralConfig
    Ask: ClassVar[type[configs.Config]] = Ask
    config: StructuralConfig

    token_to_cluster_map: Tensor
    pending: Tensor
    counts: Tensor

    def __init__(self, config: StructuralConfig):
        super().__init__(config)
        self.network = TextEncoder(config.encoder)
        full, dim = self.network.config, self.network.config.embed_dim
        if (
            self.task in ("mlm", "slm", "electra")
            and self.task != "none"
            and "mask" not in self.special
            and self.split[0] > 0
        ):
            raise UserError(f"{self.task} needs a mask token: special='{{mask: 4}}', or a tokenizer that has one")
        self.words = WordHead(full) if self.task in ("mlm", "slm") else None
        self.swap = SwapHead(full) if self.task in ("rts", "crts") else None
        self.discriminator = DiscriminatorHead(full) if self.task == "electra" else None
        if self.task == "electra":
            self._build_generator(full)
        kind: Any = config.pair_head or ("electra" if full.word_dim != dim else full.style)
        pairs = config.objective in (*PAIRS, "all", *CONTEXTUAL)
        self.pair = PairHead(dim, config.labels, kind, full.dropout) if pairs else None
        joint = config.joint
        self.joint = JointHead(joint.head, dim, joint.k, config.labels, full.dropout) if self.jointly else None
        if self.jointly and (joint.k + 1) * joint.slot > full.positions:
            raise UserError(
                f"(k + 1) x slot = {(joint.k + 1) * joint.slot} tokens are more than the {full.positions} positions: "
                "use a smaller joint.k or joint.slot"
            )
        if self.task == "crts":
            count = config.clusters.count
            self.register_buffer("token_to_cluster_map", torch.zeros(full.vocabulary, dtype=torch.int64))
            self.register_buffer("counts", torch.ones(count, count, dtype=torch.int64))
            self.register_buffer("pending", torch.zeros(count, count, dtype=torch.int64), persistent=False)

    def _build_generator(self, full: EncoderConfig) -> None:
        g = self.config.generator
        small = g.sizes(full)
        self.generator = TextEncoder(small)
        self.generated = WordHead(small)
        if g.tie != "none":
            self.generator.words = self.network.words
        if g.tie == "embeddings":
            self.generator.places, self.generator.kinds = self.network.places, self.network.kinds

    # --- what is asked ---
    @property
    def task(self) -> str:
        """The objective of tokens."""
        return self.config.objective if self.config.objective in TOKENS else self.config.token

    @property
    def jointly(self) -> bool:
        return self.config.objective == "mspp"

    @property
    def structural(self) -> bool:
        return self.config.objective not in TOKENS

    @property
    def split(self) -> tuple[float, float, float]:
        return self.config.masking.split_for(self.task)

    @property
    def special(self) -> dict[str, int]:
        return self.config.special

    # --- construction ---
    @classmethod
    def open_batches(
        cls, config: StructuralConfig, data: StructuralSettings, batch_size: int, seed: int
    ) -> TrainingBatches:
        return open_structural(config, data, batch_size, seed)

    @classmethod
    def adapted(cls, config: StructuralConfig, facts: DataFacts) -> StructuralConfig:
        extra = facts.extra
        objective = config.objective
        types = config.joint.k + 1 if objective == "mspp" else 3 if objective in CONTEXTUAL else 0
        length = max(int(extra["length"]), int(extra.get("row", 0)))
        if objective == "mspp":
            length = int(extra["row"])
        encoder = encoder_for(config.encoder, config.init, extra, length, types, slug=cls.slug)
        clusters = config.clusters
        if "clusters" in extra:
            clusters = clusters.model_copy(update={"count": int(extra["clusters"])})
        return config.model_copy(update={"encoder": encoder, "special": dict(extra["special"]), "clusters": clusters})

    @classmethod
    def build(cls, config: StructuralConfig, sources: Mapping[str, Path] | None = None) -> StructuralSSL:
        folder = (sources or {}).get("init") or config.init
        model = cls(config)
        if folder:
            start = start_from(folder)
            adopt(model, start)
            model.config = config.model_copy(update={"init": None})
        return model

    def blocks_to_compile(self) -> list[nn.Module]:
        return list(self.network.blocks)

    def depth_of(self, parameter: str) -> int:
        if parameter.startswith("network.blocks."):
            return int(parameter.split(".")[2]) + 1
        return 0 if parameter.startswith("network.") else self.network.config.depth + 1

    # --- learning ---
    def words_of(self, batch: Batch) -> Tensor:
        """``words`` of the batch; where it has none each token is a word, special ones below 0."""
        words = batch.get("words")
        if words is not None:
            return words
        tokens = batch["tokens"]
        ids = torch.tensor(sorted(set(self.special.values())) or [self.network.pad], device=tokens.device)
        places = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
        return torch.where(torch.isin(tokens, ids), -100, places)

    def changed(self, batch: Batch, draw: Draw) -> tuple[Tensor, Tensor]:
        """Token ids with some changed, and labels: see :mod:`.tokens`. For electra those of its generator."""
        tokens, words, c = batch["tokens"], self.words_of(batch), self.config
        vocabulary, special = self.network.config.vocabulary, self.special.values()
        if self.task == "none":
            return tokens, torch.full_like(tokens, IGNORED)
        if self.task == "rts":
            return objectives.swapped_words(tokens, words, draw, c.masking, vocabulary=vocabulary, special=special)
        if self.task == "crts":
            chances = cluster_probabilities(self.counts, c.clusters.beta, official=c.clusters.official_normalisation)
            return objectives.swapped_by_clusters(
                tokens, words, draw, c.masking, self.cluster_map(), chances, special=special
            )
        return objectives.predicted_words(
            tokens,
            words,
            draw,
            c.masking,
            self.split,
            vocabulary=vocabulary,
            special=special,
            mask_token=self.special.get("mask", 0),
        )

    def loss(self, batch: Batch, draw: Draw, progress: Progress | None = None, phase: str = "main") -> Losses:
        """``loss``, with ``token``, ``accuracy`` (of hidden tokens, or of decisions), ``pair`` and ``pair_accuracy`` where
        asked."""
        tokens, labels = self.changed(batch, draw)
        dropout = draw if self.training else None
        out: Losses = {}
        total = torch.zeros((), device=tokens.device)
        if self.task == "electra":
            tokens, labels, generated = self._generated(batch, tokens, labels, draw, dropout)
            out["generator"] = generated.detach()
            total = total + self.config.token_weight * generated
        hidden = self.network({**batch, "tokens": tokens}, dropout)
        if self.task != "none":
            loss, right = self.token_loss(hidden, labels, batch)
            weight = self.config.discriminator_weight if self.task == "electra" else self.config.token_weight
            total = total + weight * loss
            out |= {"token": loss.detach(), "accuracy": right}
            if self.task == "crts" and self.training:
                self._count(batch, tokens, labels, hidden)
        if self.structural:
            logits = self.structure_logits(hidden, batch, dropout)
            loss = self.structure_loss(logits, batch["label"])
            answers, target = logits.detach().argmax(dim=-1), batch["label"]
            out |= {
                "pair": loss.detach(),
                "pair_accuracy": (answers == target).sum() / (target != IGNORED).sum().clamp(min=1),
            }
            total = total + self.config.pair_weight * loss
        return {"loss": total, **out}

    def word_logits(self, hidden: Tensor) -> Tensor:
        assert self.words is not None
        return self.words(hidden, self.network.words.weight)

    def token_loss(self, hidden: Tensor, labels: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """The loss of the token objective and the share of right decisions. Words are scored at chosen places alone."""
        if self.words is not None:
            chosen = labels != IGNORED
            logits, target = self.word_logits(hidden[chosen]), labels[chosen]
            right = (logits.detach().argmax(dim=-1) == target).sum() / max(len(target), 1)
            return mean_cross_entropy(logits, target), right
        target = self._decided(labels, batch)
        counted = target != IGNORED
        if self.discriminator is not None:
            scores = self.discriminator(hidden).float()
            each = F.binary_cross_entropy_with_logits(scores, target.clamp(min=0).float(), reduction="none")
            loss = (each * counted).sum() / counted.sum().clamp(min=1)
            right = ((scores.detach() > 0).long() == target) & counted
        else:
            assert self.swap is not None
            swapped = self.swap(hidden)
            loss = mean_cross_entropy(swapped.flatten(0, -2), target.flatten())
            right = swapped.detach().argmax(dim=-1) == target
        return loss, right.sum() / counted.sum().clamp(min=1)

    def _decided(self, labels: Tensor, batch: Batch) -> Tensor:
        mask = batch.get("attention_mask")
        if self.config.count_padding or mask is None:
            return labels
        return labels.masked_fill(mask == 0, IGNORED)

    def structure_logits(self, hidden: Tensor, batch: Batch, draw: Draw | None = None) -> Tensor:
        """``[B, labels]`` of pairs, ``[B, k, labels]`` of candidates."""
        if self.joint is not None:
            return self.joint(hidden, draw)
        assert self.pair is not None
        starts = batch.get("starts")
        return self.pair(hidden[:, 0] if starts is None else hidden[starts[:, 0], starts[:, 1]], draw)

    def structure_loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        if self.joint is not None:
            if self.joint.one_label and labels.ndim == 2:
                raise UserError(
                    f"head {self.joint.kind} takes one label a row, this objective labels each candidate: use joint.head=IE_k"
                )
            return self.joint.loss(logits, labels)
        return mean_cross_entropy(logits, labels)

    def _generated(
        self, batch: Batch, masked: Tensor, labels: Tensor, draw: Draw, dropout: Draw | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """ELECTRA's generator: tokens with its samples at chosen places, whether each differs from the original, its own loss."""
        from unmask.draw import Scoped

        inner = Scoped(dropout, "generator") if dropout is not None else None
        chosen = labels != IGNORED
        hidden = self.generator({**batch, "tokens": masked}, inner)
        logits = self.generated(hidden[chosen], self.generator.words.weight).float()
        loss = mean_cross_entropy(logits, labels[chosen])
        with torch.no_grad():
            # one uniform a place, by the inverse of the distribution: the same law as Gumbel-argmax with V times fewer draws
            uniform = draw.uniform("sample", masked.shape, device=masked.device)[chosen].double()
            edges = logits.double().softmax(dim=-1).cumsum(dim=-1)
            sampled = (edges <= uniform[:, None]).sum(dim=-1).clamp(max=logits.shape[-1] - 1)
            tokens = batch["tokens"].masked_scatter(chosen, sampled)
        return tokens, (tokens != batch["tokens"]).long(), loss

    # --- c-rts ---
    def cluster_map(self) -> Tensor:
        """int64 ``[V]``, which comes with the data's files. Raises ``UserError`` where it does not fit."""
        known = self.token_to_cluster_map
        if CLUSTERS in self.side_files and not getattr(self, "_map_is_read", False):
            read = torch.tensor(json.loads(self.side_files[CLUSTERS])["token_to_cluster_map"])
            known[: len(read)] = read.to(known.device)
            self._map_is_read = True
        return known

    def set_clusters(self, cluster_of: Tensor) -> None:
        """Use this map. Raises ``UserError`` for one that does not fit."""
        count = check_map(cluster_of, self.network.config.vocabulary, self.special.values())
        if count > len(self.counts):
            raise UserError(f"the map has {count} clusters, the model {len(self.counts)}: use clusters.count={count}")
        self.token_to_cluster_map.copy_(cluster_of)
        self._map_is_read = True

    @torch.no_grad()
    def _count(self, batch: Batch, tokens: Tensor, labels: Tensor, hidden: Tensor) -> None:
        assert self.swap is not None
        wrong = self.swap(hidden.detach()).argmax(dim=-1) != labels
        mask = batch.get("attention_mask")
        where = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask > 0
        if self.config.clusters.update_only_changed:
            where = where & (tokens != batch["tokens"])
        self.pending += count_changes(batch["tokens"], tokens, wrong, where, self.cluster_map(), len(self.counts))

    def after_step(self, progress: Progress) -> None:
        if self.task == "crts":
            self.counts += summed_over_processes(self.pending)
            self.pending.zero_()

    # --- telling a person ---
    @torch.no_grad()
    def references(self, batch: Batch, draw: Draw, progress: Progress | None = None) -> Losses:
        from unmask.systems.language.structural_ssl.showing import trivial_losses

        return trivial_losses(self, batch, draw)

    @torch.no_grad()
    def preview(self, batch: Batch, draw: Draw, progress: Progress | None = None) -> list[Picture]:
        """Sentences with what was hidden or swapped and what the model said; pairs with its answer."""
        from unmask.systems.language.structural_ssl.showing import pictures

        return pictures(self, batch, draw)

    def measure(
        self,
        data: StructuralSettings,
        draw: Draw,
        *,
        limit: int | None = None,
        device: torch.device | None = None,
        tell: Callable[[str], None] | None = None,
        folder: Path | None = None,
    ) -> dict[str, Any]:
        from unmask.systems.language.structural_ssl.measuring import measure

        return measure(self, data, draw, limit=limit, device=device, tell=tell, folder=folder)

    def tokenizer(self) -> Tokenizer:
        """The one it was trained with. Raises ``UserError`` where it was saved without one."""
        if "tokenizer.json" not in self.side_files:
            raise UserError(
                "this structural_ssl was saved without its tokenizer: train it with unmask train structural_ssl"
            )
        return Tokenizer.from_text(self.side_files["tokenizer.json"])

    @torch.no_grad()
    def predict(self, inputs: list[Any], **options: Any) -> list[Any]:
        """``SentenceScores`` for each text file (or text): by the pair or joint head against ``query`` or the rest of the
        paragraph; by
        the mean vectors' cosine where a token model gets a query; else how likely or how swapped its tokens look."""
        from unmask.systems.language.structural_ssl.scoring import sentence_scores

        ask = validated(self.Ask, options, where=self.slug)
        was = self.training
        self.eval()
        try:
            return [sentence_scores(self, item, ask.query) for item in inputs]
        finally:
            self.train(was)
