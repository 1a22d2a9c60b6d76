"""What a person sees of a training: sentences with what was hidden or swapped, and what the model said; and trivial losses."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from unmask.contracts import Batch, Losses, Picture
from unmask.data.text import Tokenizer
from unmask.draw import Draw
from unmask.systems.language.drawing import FAINT, RIGHT, WRONG, Piece, shade, text_picture
from unmask.systems.language.heads import IGNORED

SHOWN, LONGEST = 6, 80  # rows, and tokens of each


def entropy(labels: Tensor) -> Tensor:
    """Nats of knowing only how often each label occurs."""
    counts = torch.bincount(labels.flatten())
    chances = counts[counts > 0] / counts.sum().clamp(min=1)
    return -(chances * chances.log()).sum()


def trivial_losses(model: Any, batch: Batch, draw: Draw) -> Losses:
    """The loss of answering the same everywhere, as often as each answer occurs in the same batch; weighted as the loss is."""
    _, labels = model.changed(batch, draw)
    c, total = model.config, torch.zeros((), device=labels.device)
    if model.task in ("mlm", "slm", "rts", "crts"):
        target = labels if model.words is not None else model._decided(labels, batch)
        total = total + c.token_weight * entropy(target[target != IGNORED])
    if model.structural:
        total = total + c.pair_weight * entropy(batch["label"][batch["label"] != IGNORED])
    return {} if model.task == "electra" else {"how often each answer occurs": total}


def pictures(model: Any, batch: Batch, draw: Draw) -> list[Picture]:
    """At most six rows; none without a tokenizer."""
    if "tokenizer.json" not in model.side_files:
        return []
    tokenizer = model.tokenizer()
    few = {k: v[:SHOWN] if isinstance(v, Tensor) and k != "starts" else v for k, v in batch.items()}
    if "starts" in batch:  # packed: the pairs whose rows are shown
        inside = batch["starts"][:, 0] < SHOWN
        few |= {"starts": batch["starts"][inside], "label": batch["label"][inside]}
    tokens, labels = model.changed(few, draw)
    if model.task == "electra":
        tokens, labels, _ = model._generated(few, tokens, labels, draw, None)
    hidden = model.network({**few, "tokens": tokens})
    rows = []
    for one in range(len(tokens)):
        if model.words is not None:
            pieces = _words_said(model, tokenizer, few["tokens"][one], labels[one], hidden[one])
        elif model.task == "none":
            pieces = _plain(tokenizer, tokens[one], model)
        else:
            pieces = _swaps_told(model, tokenizer, few["tokens"][one], tokens[one], labels[one], hidden[one])
        rows.append([text_picture([*_answer(model, few, hidden, one), *pieces])])
    what = {
        "mlm": "Hidden tokens in colour: what the model said, green where right, red with the truth below where wrong.",
        "slm": "Swapped tokens in colour: what the model said stood there, green where right, else red above the truth.",
        "none": "Rows as the model saw them.",
    }.get(
        model.task,
        "The deeper the colour, the surer the model is of a swap. Swapped tokens are green where told and red where not, the true "
        "ones below.",
    )
    if model.structural:
        what += " Above each row: whether its texts belong together, and how sure of it the model is."
    return [Picture("sentences", ["what was hidden, what was said"], rows, what)]


def _places(tokens: Tensor, model: Any) -> list[int]:
    return [i for i, t in enumerate(tokens.tolist()) if t != model.network.pad][:LONGEST]


def _piece(tokenizer: Tokenizer, token: int, model: Any) -> str:
    if token in (model.special.get("cls"), model.special.get("sep")):
        return " | "
    return tokenizer.piece(token)


def _plain(tokenizer: Tokenizer, tokens: Tensor, model: Any) -> list[Piece]:
    return [Piece(_piece(tokenizer, int(tokens[i]), model)) for i in _places(tokens, model)]


def _words_said(model: Any, tokenizer: Tokenizer, original: Tensor, labels: Tensor, hidden: Tensor) -> list[Piece]:
    said = torch.full_like(original, -1)
    chosen = labels != IGNORED
    said[chosen] = model.word_logits(hidden[chosen]).argmax(dim=-1)
    pieces = []
    for i in _places(original, model):
        truth = _piece(tokenizer, int(original[i]), model)
        if not chosen[i]:
            pieces.append(Piece(truth))
            continue
        right = int(said[i]) == int(original[i])
        ink = RIGHT if right else WRONG
        pieces.append(Piece(_piece(tokenizer, int(said[i]), model), ink, shade(0.5), "" if right else truth.strip()))
    return pieces


def _swaps_told(
    model: Any, tokenizer: Tokenizer, original: Tensor, tokens: Tensor, labels: Tensor, hidden: Tensor
) -> list[Piece]:
    chances = swap_chances(model, hidden)
    pieces = []
    for i in _places(original, model):
        shown, chance = _piece(tokenizer, int(tokens[i]), model), float(chances[i])
        if int(labels[i]) == 1:
            truth = _piece(tokenizer, int(original[i]), model).strip()
            pieces.append(Piece(shown, RIGHT if chance > 0.5 else WRONG, shade(chance), truth))
        else:
            pieces.append(Piece(shown, fill=shade(chance) if chance > 0.02 else None))
    return pieces


def swap_chances(model: Any, hidden: Tensor) -> Tensor:
    """How sure the model is that each token was swapped, ``[..., T]``."""
    if model.discriminator is not None:
        return model.discriminator(hidden).float().sigmoid()
    return model.swap(hidden).float().softmax(dim=-1)[..., 1]


def _answer(model: Any, batch: Batch, hidden: Tensor, one: int) -> list[Piece]:
    if not model.structural:
        return []
    if model.joint is not None:
        chances = model.structure_logits(hidden[one : one + 1], batch).float().softmax(dim=-1)[0]
        shown = (
            [
                f"{float(c[1]):.2f}{'*' if int(t) == 1 else ''}"
                for c, t in zip(chances, batch["label"][one], strict=False)
            ]
            if chances.ndim == 2
            else []
        )
        return [Piece(f"candidates (* the same paragraph): {'  '.join(shown)}", FAINT), Piece("\n")]
    starts = batch.get("starts")
    which = [one] if starts is None else [i for i, (row, _) in enumerate(starts.tolist()) if row == one]
    chances = model.structure_logits(hidden, batch).float().softmax(dim=-1)[:, 1]
    pieces = []
    for i in which:
        label, chance = int(batch["label"][i]), float(chances[i])
        words = "belong together" if label == 1 else "do not belong together"
        pieces.append(
            Piece(f"{words}; the model: {100 * chance:.0f} %", RIGHT if (chance > 0.5) == (label == 1) else WRONG)
        )
        pieces.append(Piece("\n"))
    return pieces
