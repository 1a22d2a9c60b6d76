"""How well held-out text is understood: hidden tokens found, pairs told, and which of five sentences belongs to a given one."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from unmask.draw import Draw, Scoped, Seeded
from unmask.errors import UserError
from unmask.systems.language.heads import IGNORED, PairHead, mean_cross_entropy
from unmask.systems.language.ranking import TfIdf, chance_metrics, ranking_metrics
from unmask.systems.language.structural_ssl.batches import JointBatches, PairBatches, StructuralSettings, TokenRows
from unmask.systems.language.structural_ssl.scoring import Text, joint_scores, on, pair_scores, vectors
from unmask.systems.language.structural_ssl.showing import pictures
from unmask.systems.language.structural_ssl.structure import Structure, uniforms

if TYPE_CHECKING:
    from unmask.systems.language.structural_ssl.model import StructuralSSL

QUESTIONS, ROWS, BATCH = 200, 512, 32
HARD, EASY = 2, 2  # candidates of the same document, and of others


@dataclass(frozen=True)
class Question:
    """A sentence and five others; labels: 1 for the one of its paragraph."""

    query: int
    candidates: tuple[int, ...]
    labels: tuple[int, ...]


def ranking_questions(structure: Structure, count: int, seed: int = 0) -> list[Question]:
    """At most ``count`` questions: a sentence, one of its paragraph, two of other paragraphs of the document, two of other
    documents, in random order. A function of the seed. Documents of one paragraph have other documents' sentences instead."""
    fitting = np.flatnonzero(structure.sizes >= 2)
    if len(structure.names) < 2 or not len(fitting):
        return []
    order = np.argsort(uniforms(seed, "questions", fitting, 1)[:, 0], kind="stable")
    out = []
    for anchor, u in zip(fitting[order][:count], uniforms(seed, "candidates", fitting[order][:count], 20), strict=True):
        draws = iter(u.tolist())
        inside = structure.sentences_of(int(anchor))
        query = int(next(draws) * len(inside))
        right = int(next(draws) * (len(inside) - 1))
        document = structure.document_of(int(anchor))
        others = [p for p in structure.paragraphs_of(document) if p != anchor]
        found = [inside[right + (right >= query)]]
        for _ in range(min(HARD, len(others))):
            paragraph = others.pop(int(next(draws) * len(others)))
            found.append(_one(structure.sentences_of(paragraph), next(draws)))
        while len(found) < 1 + HARD + EASY:
            other = int(next(draws) * (len(structure.names) - 1))
            paragraphs = structure.paragraphs_of(other + (other >= document))
            share = next(draws)
            picked = paragraphs[int(share * len(paragraphs))]
            found.append(_one(structure.sentences_of(picked), share * len(paragraphs) % 1))
        place = np.argsort(uniforms(seed, "order", np.array([anchor]), 5)[0], kind="stable")
        out.append(Question(inside[query], tuple(found[i] for i in place), tuple(int(i == 0) for i in place)))
    return out


def _one(sentences: range, uniform: float) -> int:
    return sentences[int(uniform * len(sentences))]


@torch.no_grad()
def measure(
    model: StructuralSSL,
    data: StructuralSettings,
    draw: Draw,
    *,
    limit: int | None = None,
    device: torch.device | None = None,
    tell: Callable[[str], None] | None = None,
    folder: Path | None = None,
) -> dict[str, Any]:
    """See ``StructuralSSL.measures``; baselines: tf-idf, the cosine of mean states, a random order, the commonest answer."""
    tokenizer, c = model.tokenizer(), model.config
    device = device or next(model.parameters()).device
    out: dict[str, Any] = {}
    baseline: dict[str, dict[str, float]] = {}
    settings = data.model_copy(update={"limit": None})
    if model.jointly:
        batches: Any = JointBatches(settings, c.joint, 1, tokenizer=tokenizer)
    elif model.structural:
        batches = PairBatches(settings, c.pairs, c.objective, 1, tokenizer=tokenizer)
    else:
        batches = TokenRows(settings, 1, tokenizer=tokenizer)
    rows = min(limit or ROWS, batches.count, ROWS if limit is None else limit)
    out |= _decisions(model, batches, rows, draw, device, baseline, tell)
    out["samples"] = rows
    if folder is not None:
        out["pictures"] = _drawn(model, batches, draw, device, folder)
    try:
        ranked = batches if model.structural else PairBatches(settings, c.pairs, "ssp", 1, tokenizer=tokenizer)
    except UserError:  # text without two sentences in a paragraph has masked accuracy alone
        return {**out, "baseline": baseline}
    questions = ranking_questions(ranked.structure, min(limit or QUESTIONS, QUESTIONS))
    if questions:
        out |= _ranking(model, ranked, questions, data, draw, baseline, tell)
    return {**out, "baseline": baseline}


def _decisions(
    model: StructuralSSL,
    batches: Any,
    rows: int,
    draw: Draw,
    device: torch.device,
    baseline: dict[str, dict[str, float]],
    tell: Callable[[str], None] | None,
) -> dict[str, Any]:
    """Loss and accuracies over the first rows of a fixed order, with draws that belong to each batch."""
    order = batches.order(0)[:rows]
    sums: dict[str, float] = {}
    right = told = count = 0
    labels = np.zeros(model.config.labels, dtype=int)
    swaps = np.zeros(2, dtype=int)
    for number, start in enumerate(range(0, rows, BATCH)):
        some = order[start : start + BATCH]
        batch = on(batches.fetch(some), device)
        losses = model.loss(batch, Scoped(draw, f"rows{number}"))
        for key in ("loss", "accuracy"):
            if key in losses:
                sums[key] = sums.get(key, 0.0) + float(losses[key]) * len(some)
        if model.structural:
            known = batch["label"][batch["label"] != IGNORED]
            labels += np.bincount(known.cpu().numpy(), minlength=len(labels))
            told += len(known)
            right += round(float(losses["pair_accuracy"]) * len(known))
        elif model.swap is not None:
            _, target = model.changed(batch, Scoped(draw, f"rows{number}"))
            target = model._decided(target, batch)
            swaps += np.bincount(target[target != IGNORED].cpu().numpy(), minlength=2)
        count += len(some)
        if tell is not None:
            tell(f"{count} of {rows} rows")
    out: dict[str, Any] = {"loss": sums["loss"] / count}
    if "accuracy" in sums and model.task != "none":
        out["accuracy"] = 100 * sums["accuracy"] / count
    if model.structural:
        out["pair_accuracy"] = 100 * right / max(told, 1)
        baseline["the commonest answer"] = {"pair_accuracy": 100 * labels.max() / max(labels.sum(), 1)}
    elif swaps.sum():
        baseline["the commonest answer"] = {"accuracy": 100 * swaps.max() / swaps.sum()}
    return out


def _percent(metrics: dict[str, Any]) -> dict[str, float]:
    return {k: 100 * metrics[k] for k in ("map", "mrr", "p1")}


def _ranking(
    model: StructuralSSL,
    batches: Any,
    questions: Sequence[Question],
    data: StructuralSettings,
    draw: Draw,
    baseline: dict[str, dict[str, float]],
    tell: Callable[[str], None] | None,
) -> dict[str, Any]:
    structure: Structure = batches.structure
    tokenizer, length = batches.tokenizer, data.length
    labels = [q.labels for q in questions]
    spans: dict[int, Text] = {s: structure.span([s]) for q in questions for s in (q.query, *q.candidates)}
    frequencies = TfIdf(structure.span(structure.sentences_of(p))[0].tolist() for p in range(len(structure.sizes)))
    baseline["tf-idf"] = _percent(
        ranking_metrics(
            [
                [frequencies.similarity(spans[q.query][0].tolist(), spans[s][0].tolist()) for s in q.candidates]
                for q in questions
            ],
            labels,
        )
    )
    baseline["a random order"] = _percent(chance_metrics(labels))
    places = {s: i for i, s in enumerate(spans)}
    known = vectors(model, list(spans.values()), tokenizer, length)
    cosine = [[float(known[places[q.query]] @ known[places[s]]) for s in q.candidates] for q in questions]
    by_cosine = _percent(ranking_metrics(cosine, labels))
    if model.joint is not None and not model.joint.one_label:
        scores: Any = [
            joint_scores(model, spans[q.query], [spans[s] for s in q.candidates], tokenizer) for q in questions
        ]
        found = _percent(ranking_metrics(scores, labels))
        baseline["cosine of its mean states"] = by_cosine
    elif model.pair is not None:
        found = _percent(ranking_metrics(_by_pairs(model, questions, spans, tokenizer, length), labels))
        baseline["cosine of its mean states"] = by_cosine
    else:
        found = {f"cosine_{k}": v for k, v in by_cosine.items()}
        for name in ("tf-idf", "a random order"):  # under the same keys
            baseline[name] = {f"cosine_{k}": v for k, v in baseline[name].items()}
    found["questions"] = len(questions)
    few = model.config.few_labels
    if few.pairs:
        tuned = _tuned(model, data, draw, tell)
        found["few_map"] = _percent(ranking_metrics(_by_pairs(tuned, questions, spans, tokenizer, length), labels))[
            "map"
        ]
    return found


def _by_pairs(model: Any, questions: Sequence[Question], spans: dict[int, Text], tokenizer: Any, length: int) -> Any:
    a = [spans[q.query] for q in questions for _ in q.candidates]
    b = [spans[s] for q in questions for s in q.candidates]
    return pair_scores(model, a, b, tokenizer, length).reshape(len(questions), -1)


@torch.enable_grad()
def _tuned(model: StructuralSSL, data: StructuralSettings, draw: Draw, tell: Callable[[str], None] | None) -> Any:
    """A copy with a fresh pair head, trained on few labelled sentence pairs: one right and one wrong of each question."""
    few = model.config.few_labels
    settings = data.model_copy(update={"split": _half(data), "limit": None})
    batches = PairBatches(settings, model.config.pairs, "ssp", 1, tokenizer=model.tokenizer())
    structure = batches.structure
    pairs = []
    for number, q in enumerate(ranking_questions(structure, (few.pairs + 1) // 2, seed=1)):
        wrong = [s for s, right in zip(q.candidates, q.labels, strict=True) if not right]
        pairs += [(q.query, q.candidates[q.labels.index(1)], 1), (q.query, wrong[number % len(wrong)], 0)]
    tuned: Any = copy.deepcopy(model)
    device = next(model.parameters()).device
    dim = model.network.config.embed_dim
    tuned.pair = PairHead(dim, 2, "bert" if model.network.config.style == "bert" else "roberta", 0.0).to(device)
    noise = draw.normal("fresh head", (dim * dim + 2 * dim,), shared=True).to(device) * 0.02
    with torch.no_grad():
        tuned.pair.dense.weight.copy_(noise[: dim * dim].view(dim, dim))
        tuned.pair.out.weight.copy_(noise[dim * dim :].view(2, dim))
    learned = [*tuned.network.parameters(), *tuned.pair.parameters()]
    optimizer = torch.optim.AdamW(learned, lr=few.lr, weight_decay=0.01)
    for step in range(few.steps):
        picked = Seeded(0, step).integers("pairs", 0, len(pairs), (few.batch_size,), shared=True).tolist()
        rows = [pairs[i] for i in picked]
        from unmask.systems.language.structural_ssl.structure import framed, padded

        fed = padded(
            [framed([structure.span([a]), structure.span([b])], batches.tokenizer, data.length) for a, b, _ in rows],
            tuned.network.pad,
        )
        hidden = tuned.network(on(fed, device))
        loss = mean_cross_entropy(tuned.pair(hidden[:, 0]), torch.tensor([y for *_, y in rows], device=device))
        for group in optimizer.param_groups:
            group["lr"] = few.lr * min((step + 1) / (0.1 * few.steps), (few.steps - step) / few.steps)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(learned, 1.0)
        optimizer.step()
        if tell is not None:
            tell(f"fine-tuning, step {step + 1} of {few.steps}")
    return tuned.eval()


def _half(data: StructuralSettings) -> str:
    """Where the few labels come from: the training text, which the test split never touches."""
    if data.hold_out:
        return "train"
    from unmask.data.text import open_text

    for split in ("train", "validation"):
        try:
            open_text(data.uri, split, columns=data.columns)
        except UserError:
            continue
        return split
    return data.split


def _drawn(model: StructuralSSL, batches: Any, draw: Draw, device: torch.device, folder: Path) -> list[dict[str, str]]:
    from PIL import Image

    out = []
    batch = on(batches.fetch(batches.order(0)[:6]), device)
    for picture in pictures(model, batch, Scoped(draw, "pictures")):
        cells = [row[0] for row in picture.rows]
        name = f"{picture.name}.png"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.concatenate(cells)).save(folder / name)
        out.append({"file": name, "caption": picture.caption})
    return out
