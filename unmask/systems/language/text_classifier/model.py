"""Classification of texts and of pairs of texts with any BERT, RoBERTa or ELECTRA encoder.

    model = TextClassifier(TextClassifier.Config(classes=2, encoder={"size": "tiny", "vocabulary": 8192, "positions": 128}))
    loss = model.loss({"tokens": tokens, "label": labels}, draw=Seeded(0))["loss"]

``init=FOLDER`` starts from a run of structural_ssl or a folder of transformers. Devlin et al. 2019, section 4.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from unmask import config as configs
from unmask.config import Field
from unmask.contracts import Batch, DataFacts, Losses, Picture, Progress, Trainable
from unmask.data.text import TextBatches, TextSettings, Tokenizer, open_text
from unmask.data.text.batches import everything
from unmask.data.text.formats import SUFFIXES
from unmask.draw import Draw
from unmask.errors import UserError
from unmask.systems.language.checkpoints import adopt, check_tokenizer, start_from
from unmask.systems.language.drawing import FAINT, RIGHT, WRONG, Piece, text_picture
from unmask.systems.language.encoder import EncoderConfig, TextEncoder, mean_pooled
from unmask.systems.language.heads import PairHead, mean_cross_entropy
from unmask.systems.language.ranking import chance_metrics, ranking_metrics
from unmask.systems.language.results import TextClasses
from unmask.systems.language.starting import encoder_for, tokenizer_of


class LabelledText(TextSettings):
    """Texts with labels, a row each."""

    rows: Literal["each"] = Field("each", description="a text a row")


class TextClassifier(Trainable):
    slug = "text_classifier"
    kind: ClassVar[str] = "text classifier"
    loss_units = "nats (cross-entropy)"
    Data = LabelledText
    measures: ClassVar[Mapping[str, str]] = {
        "top1": "accuracy, %",
        "f1": "F1, mean over classes, %",
        "map": "mean average precision of candidates, %",
        "mrr": "mean reciprocal rank, %",
        "p1": "right candidate first, %",
        "loss": "nats a text",
    }
    lower_is_better = frozenset({"loss"})
    suffixes: ClassVar[tuple[str, ...]] = (*SUFFIXES, ".txt.gz", ".txt.xz")
    predict_batch: ClassVar[int] = 1

    class Config(configs.Config):
        encoder: EncoderConfig = Field(EncoderConfig(), description="the network; size=tiny ... large")
        init: str | None = Field(
            None, description="a run, or a folder of transformers: its encoder and weights are taken"
        )
        classes: int | tuple[str, ...] | None = Field(None, description="their names or number; from the data if open")
        pool: Literal["cls", "mean"] = Field("cls", description="the first token, or the mean of all")
        head: Literal["", "bert", "roberta", "electra"] = Field("", description="its form; open: the encoder's family")
        freeze: bool = Field(False, description="train the head alone")

    config: Config

    def __init__(self, config: Config):
        super().__init__(config)
        if config.classes is None:
            raise UserError(
                "text_classifier: classes is open: give their number or names (classes=2), or data with labels"
            )
        self.network = TextEncoder(config.encoder)
        c = self.network.config
        kind: Any = config.head or ("electra" if c.word_dim != c.embed_dim else c.style)
        self.pair = PairHead(c.embed_dim, len(self.classes), kind, c.dropout)
        if config.freeze:
            self.network.requires_grad_(False)

    @property
    def classes(self) -> tuple[str, ...]:
        known = self.config.classes
        return tuple(str(i) for i in range(known)) if isinstance(known, int) else tuple(known or ())

    # --- construction ---
    @classmethod
    def open_batches(cls, config: Config, data: LabelledText, batch_size: int, seed: int) -> TextBatches:
        start = start_from(config.init) if config.init else None
        batches = TextBatches(data, batch_size, seed, tokenizer=tokenizer_of(data, start))
        if start is not None:
            check_tokenizer(batches.tokenizer, start)
        if batches.classes is None:
            raise UserError(
                f"text_classifier needs labels, {data.uri} has none: name their column: data.columns.label=NAME"
            )
        return batches

    @classmethod
    def adapted(cls, config: Config, facts: DataFacts) -> Config:
        given = config.classes
        count = len(given) if isinstance(given, tuple) else given
        if count is not None and facts.classes and count < len(facts.classes):
            raise UserError(f"text_classifier: {count} classes, the data has {len(facts.classes)}: leave classes out")
        encoder = encoder_for(config.encoder, config.init, facts.extra, int(facts.extra["length"]), slug=cls.slug)
        return config.model_copy(update={"encoder": encoder, "classes": given or facts.classes})

    @classmethod
    def build(cls, config: Config, sources: Mapping[str, Path] | None = None) -> TextClassifier:
        folder = (sources or {}).get("init") or config.init
        model = cls(config)
        if folder:
            start = start_from(folder)
            start.state = {k: v for k, v in start.state.items() if k.startswith("network.")}  # the head is fresh
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
    def logits(self, batch: Batch, draw: Draw | None = None) -> Tensor:
        """``[B, K]`` of ``tokens [B, T]`` with ``attention_mask`` and ``types`` where there are any."""
        alone = {k: v for k, v in batch.items() if k not in ("segments", "positions")}  # each row is one text
        hidden = self.network(alone, draw)
        return self.pair(hidden[:, 0] if self.config.pool == "cls" else mean_pooled(hidden, alone), draw)

    def forward(self, batch: Batch, draw: Draw | None = None, *args: Any, **kwargs: Any) -> Any:
        return self.logits(batch) if draw is None else self.loss(batch, draw, *args, **kwargs)

    def loss(self, batch: Batch, draw: Draw, progress: Progress | None = None, phase: str = "main") -> Losses:
        if batch.get("label") is None:
            raise UserError(
                "text_classifier needs labels, this data has none: name their column: data.columns.label=NAME"
            )
        label = torch.where(batch["label"] < 0, -100, batch["label"])
        logits = self.logits(batch, draw if self.training else None).float()
        top1 = (logits.detach().argmax(dim=1) == label).float().mean()
        return {"loss": mean_cross_entropy(logits, label), "top1": top1}

    @torch.no_grad()
    def references(self, batch: Batch, draw: Draw, progress: Progress | None = None) -> Losses:
        often = F.one_hot(batch["label"].clamp(min=0), len(self.classes)).float().mean(dim=0)
        entropy = -(often * often.clamp_min(1e-12).log()).sum()
        return {
            "all classes alike": torch.full_like(entropy, math.log(len(self.classes))),
            "how often each class occurs": entropy,
        }

    @torch.no_grad()
    def preview(self, batch: Batch, draw: Draw, progress: Progress | None = None) -> list[Picture]:
        if "tokenizer.json" not in self.side_files:
            return []
        tokenizer = self.tokenizer()
        few = {k: v[:6] if isinstance(v, Tensor) else v for k, v in batch.items()}
        chances = self.logits(few).float().softmax(dim=1)
        rows = []
        for tokens, chance, label in zip(few["tokens"], chances, few["label"].tolist(), strict=True):
            said = int(chance.argmax())
            ink = RIGHT if said == label else WRONG
            truth = "" if said == label else f", in truth {self.classes[label]}"
            answer = Piece(f"{self.classes[said]} {100 * float(chance[said]):.0f} %{truth}", ink)
            rows.append([text_picture([answer, Piece("\n"), Piece(tokenizer.decode(tokens.tolist())[:400], FAINT)])])
        return [Picture("answers", ["text and answer"], rows, "Green: right. Red: wrong.")]

    def tokenizer(self) -> Tokenizer:
        """The one it was trained with. Raises ``UserError`` where it was saved without one."""
        if "tokenizer.json" not in self.side_files:
            raise UserError(
                "this text_classifier was saved without its tokenizer: train it with unmask train text_classifier"
            )
        return Tokenizer.from_text(self.side_files["tokenizer.json"])

    # --- answering ---
    def measure(
        self,
        data: LabelledText,
        draw: Draw,
        *,
        limit: int | None = None,
        device: torch.device | None = None,
        tell: Callable[[str], None] | None = None,
        folder: Path | None = None,
    ) -> dict[str, Any]:
        """Accuracy and F1; of pairs with two classes also MAP, MRR and P@1 of the candidates of equal first texts."""
        settings = data.model_copy(update={"limit": limit or data.limit})
        batches = TextBatches(settings, 1, tokenizer=self.tokenizer())
        if batches.classes is None or batches.data.labels is None:
            raise UserError(f"{data.uri} has no labels to measure against: name their column: data.columns.label=NAME")
        device = device or next(self.parameters()).device
        chances = []
        for batch in everything(batches):
            moved = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}
            chances.append(self.logits(moved).float().log_softmax(dim=1).cpu())
            if tell is not None:
                tell(f"{sum(map(len, chances))} of {batches.count} texts")
        logs = torch.cat(chances).numpy()
        numbers = {name: i for i, name in enumerate(self.classes)}
        labels = np.array([-1 if i < 0 else numbers.get(batches.classes[i], -1) for i in batches.data.labels.tolist()])
        logs, known = logs[labels >= 0], labels[labels >= 0]
        if not len(known):
            raise UserError(f"none of the labels of {data.uri} is one of {', '.join(self.classes[:8])}")
        said = logs.argmax(axis=1)
        often = np.bincount(known, minlength=len(self.classes))
        out: dict[str, Any] = {
            "top1": 100 * float((said == known).mean()),
            "f1": 100 * mean_f1(said, known, len(self.classes)),
            "loss": float(-logs[np.arange(len(known)), known].mean()),
            "samples": len(known),
            "baseline": {"the commonest class": {"top1": 100 * often.max() / often.sum()}},
        }
        if len(self.classes) == 2:
            out |= self._ranked(batches, logs[:, 1], known, labels >= 0, out["baseline"])
        return out

    def _ranked(
        self, batches: TextBatches, scores: np.ndarray, labels: np.ndarray, kept: np.ndarray, baseline: dict[str, Any]
    ) -> dict[str, float]:
        rows = [row for row, k in zip(batches.text.rows(), kept, strict=True) if k]
        if any(row.pair is None for row in rows):
            return {}
        groups: dict[str, list[int]] = {}
        for number, row in enumerate(rows):
            groups.setdefault(row.text, []).append(number)
        asked = [g for g in groups.values() if len(g) > 1]
        if not asked:
            return {}
        truth = [labels[g].tolist() for g in asked]
        found, chance = ranking_metrics([scores[g].tolist() for g in asked], truth), chance_metrics(truth)
        baseline["a random order"] = {k: 100 * chance[k] for k in ("map", "mrr", "p1")}
        return {k: 100 * found[k] for k in ("map", "mrr", "p1")} if found["questions"] else {}

    @torch.no_grad()
    def predict(self, inputs: list[Any], **options: Any) -> list[Any]:
        """``TextClasses`` for each file: the class of each of its rows (of plain text: of each line or paragraph)."""
        tokenizer, device = self.tokenizer(), next(self.parameters()).device
        was = self.training
        self.eval()
        out = []
        for item in inputs:
            if isinstance(item, Path) or (
                isinstance(item, str) and "\n" not in item and len(item) < 1024 and Path(item).exists()
            ):
                rows = list(open_text(item).rows())
                texts, pairs = [r.text for r in rows], [r.pair for r in rows]
            else:
                texts, pairs = [str(item)], [None]
            if len(texts) == 1 and "\n" in texts[0]:  # plain text without paragraphs: line by line
                texts = [line for line in texts[0].splitlines() if line.strip()]
                pairs = [None] * len(texts)
            second = [p or "" for p in pairs] if any(pairs) else None
            encoded = tokenizer.encode(texts, second, length=self.network.config.positions)
            parts = []
            for start in range(0, len(encoded), 64):
                some = encoded[start : start + 64]
                longest = max(len(e.ids) for e in some)
                tokens = torch.full((len(some), longest), self.network.pad)
                types, mask = torch.zeros_like(tokens), torch.zeros_like(tokens)
                for i, e in enumerate(some):
                    size = len(e.ids)
                    tokens[i, :size], types[i, :size], mask[i, :size] = torch.tensor(e.ids), torch.tensor(e.types), 1
                batch = {"tokens": tokens.to(device), "types": types.to(device), "attention_mask": mask.to(device)}
                parts.append(self.logits(batch).float().softmax(dim=1).cpu().numpy())
            shown = texts if second is None else [f"{a} / {b}" for a, b in zip(texts, second, strict=True)]
            source = str(item) if isinstance(item, (str, Path)) and len(str(item)) < 1024 else "text"
            out.append(TextClasses(shown, np.concatenate(parts), self.classes, source=source))
        self.train(was)
        return out


def mean_f1(said: np.ndarray, labels: np.ndarray, classes: int) -> float:
    """F1 of each class that occurs, averaged."""
    values = []
    for c in range(classes):
        hit, claimed, true = ((said == c) & (labels == c)).sum(), (said == c).sum(), (labels == c).sum()
        if true:
            values.append(2 * hit / (claimed + true))
    return float(np.mean(values)) if values else 0.0
