"""Scores of sentences: against a query, against the rest of their paragraph, or by their own tokens."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from unmask.data.text import Tokenizer, documents, open_text, sentences_of
from unmask.errors import UserError
from unmask.systems.language.encoder import mean_pooled
from unmask.systems.language.results import SentenceScores
from unmask.systems.language.structural_ssl.joint import slots
from unmask.systems.language.structural_ssl.showing import swap_chances
from unmask.systems.language.structural_ssl.structure import Row, framed, padded

AT_ONCE = 64
EVERY = 7  # tokens between two that are hidden at once, for likelihoods

Text = tuple[np.ndarray, np.ndarray]


def tokenised(texts: Sequence[str], tokenizer: Tokenizer) -> list[Text]:
    """Tokens and words of each text, without special tokens."""
    return [
        (np.array(e.ids, dtype=np.int64), np.array(e.words, dtype=np.int64))
        for e in tokenizer.encode([f" {t}" for t in texts], special=False)
    ]


def on(batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
    return {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}


def length_of(model: Any) -> int:
    return int(model.network.config.positions)


@torch.no_grad()
def pair_scores(
    model: Any, a: Sequence[Text], b: Sequence[Text], tokenizer: Tokenizer, length: int | None = None
) -> np.ndarray:
    """The chance that each pair belongs together, by the pair head."""
    device = next(model.parameters()).device
    rows = [
        framed(pair, tokenizer, min(length or length_of(model), length_of(model))) for pair in zip(a, b, strict=True)
    ]
    out = []
    for batch in _sorted_batches(rows, tokenizer.special["pad"]):
        at, fed = batch
        hidden = model.network(on(fed, device))
        out.append((at, model.pair(hidden[:, 0]).float().softmax(dim=-1)[:, 1].cpu().numpy()))
    return _restored(out, len(rows))


@torch.no_grad()
def vectors(model: Any, texts: Sequence[Text], tokenizer: Tokenizer, length: int | None = None) -> Tensor:
    """``[N, D]``: mean states of each text, of unit length."""
    device = next(model.parameters()).device
    rows = [framed([t], tokenizer, min(length or length_of(model), length_of(model))) for t in texts]
    out = torch.zeros(len(rows), model.network.config.embed_dim)
    for at, fed in _sorted_batches(rows, tokenizer.special["pad"]):
        moved = on(fed, device)
        out[torch.from_numpy(at)] = F.normalize(mean_pooled(model.network(moved), moved).float(), dim=-1).cpu()
    return out


def _sorted_batches(rows: Sequence[Row], pad: int) -> Any:
    """Rows of like length together: (their numbers, the batch)."""
    order = np.argsort([len(r.tokens) for r in rows], kind="stable")
    for start in range(0, len(rows), AT_ONCE):
        at = order[start : start + AT_ONCE]
        yield at, padded([rows[i] for i in at], pad)


def _restored(parts: list[tuple[np.ndarray, np.ndarray]], count: int) -> np.ndarray:
    out = np.zeros(count)
    for at, values in parts:
        out[at] = values
    return out


@torch.no_grad()
def token_scores(model: Any, texts: Sequence[Text], tokenizer: Tokenizer) -> np.ndarray:
    """A number a text: of models of swaps the mean chance that a token was swapped; else the mean log-probability of its
    tokens, each hidden once (Salazar et al. 2020, arXiv:1910.14659, several hidden at once)."""
    device = next(model.parameters()).device
    rows = [framed([t], tokenizer, length_of(model)) for t in texts]
    out = []
    for at, fed in _sorted_batches(rows, tokenizer.special["pad"]):
        moved = on(fed, device)
        usable = moved["words"] >= 0
        count = usable.sum(dim=1).clamp(min=1)
        if model.words is None:
            chances = swap_chances(model, model.network(moved))
            out.append((at, ((chances * usable).sum(dim=1) / count).cpu().numpy()))
            continue
        total = torch.zeros(len(at), device=device)
        places = torch.arange(usable.shape[1], device=device) % EVERY
        for turn in range(EVERY):
            hide = usable & (places == turn)
            tokens = moved["tokens"].masked_fill(hide, model.special["mask"])
            hidden = model.network({**moved, "tokens": tokens})
            logits = model.word_logits(hidden[hide]).float().log_softmax(dim=-1)
            known = logits.gather(1, moved["tokens"][hide][:, None])[:, 0]
            total = total.index_add(0, hide.nonzero()[:, 0], known)
        out.append((at, (total / count).cpu().numpy()))
    return _restored(out, len(rows))


@torch.no_grad()
def joint_scores(model: Any, query: Text, texts: Sequence[Text], tokenizer: Tokenizer) -> np.ndarray:
    """The chance of each text by the joint head, k at a time."""
    device, c = next(model.parameters()).device, model.config.joint
    if model.joint.one_label:
        raise UserError(f"head {c.head} gives one answer for all candidates: train joint.head=IE_k to score each")
    out = []
    for start in range(0, len(texts), c.k):
        some = texts[start : start + c.k]
        batch = on(slots([[query, *some]], tokenizer, c.k, c.slot), device)
        chances = model.structure_logits(model.network(batch), batch).float().softmax(dim=-1)[0, :, 1]
        out += chances[: len(some)].tolist()
    return np.array(out)


def read_sentences(item: Any) -> tuple[list[str], list[int], str]:
    """The sentences of a file or text, the paragraph of each, and the source's name. Raises ``UserError`` for text without a
    sentence."""
    if isinstance(item, Path) or (
        isinstance(item, str) and "\n" not in item and len(item) < 1024 and Path(item).exists()
    ):
        sentences: list[Any] = []
        paragraphs: list[Any] = []
        for document in documents(open_text(item)):
            for paragraph in document.paragraphs:
                paragraphs += [paragraphs[-1] + 1 if paragraphs else 0] * len(paragraph)
                sentences += paragraph
        name = str(item)
    else:
        pieces = [sentences_of(p) for p in str(item).split("\n\n")]
        sentences = [s for p in pieces for s in p]
        paragraphs = [i for i, p in enumerate(pieces) for _ in p]
        name = "text"
    if not sentences:
        raise UserError(f"{name} holds no sentence: it is empty")
    return sentences, paragraphs, name


def sentence_scores(model: Any, item: Any, query: str = "") -> SentenceScores:
    """The result of a prediction; see ``StructuralSSL.predict``."""
    sentences, paragraphs, source = read_sentences(item)
    tokenizer = model.tokenizer()
    texts = tokenised(sentences, tokenizer)
    asked = tokenised([query], tokenizer)[0] if query else None
    if model.joint is not None:
        if asked is None:
            raise UserError("a joint model scores sentences against a query: give query='a sentence'")
        scores, unit = joint_scores(model, asked, texts, tokenizer), "chance of the same paragraph"
    elif model.pair is not None:
        first = [asked] * len(texts) if asked is not None else [_rest(texts, paragraphs, i) for i in range(len(texts))]
        scores, unit = pair_scores(model, first, texts, tokenizer), "chance of the same unit"
    elif asked is not None:
        known = vectors(model, [asked, *texts], tokenizer)
        scores, unit = (known[1:] @ known[0]).numpy(), "cosine of mean states"
    else:
        scores = token_scores(model, texts, tokenizer)
        unit = "mean log-probability of its tokens" if model.words is not None else "mean chance of a swapped token"
    return SentenceScores(sentences, [float(s) for s in scores], unit, query, paragraphs, source=source)


def _rest(texts: Sequence[Text], paragraphs: Sequence[int], number: int) -> Text:
    """The other sentences of the paragraph; of one that is alone, the sentences before and behind it."""
    same = [i for i, p in enumerate(paragraphs) if p == paragraphs[number] and i != number]
    near = same or [i for i in (number - 1, number + 1) if 0 <= i < len(texts)]
    if not near:
        raise UserError("a text of one sentence has nothing to compare it with: give query='a sentence'")
    return np.concatenate([texts[i][0] for i in near]), np.concatenate([texts[i][1] for i in near])
