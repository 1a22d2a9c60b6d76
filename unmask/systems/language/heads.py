"""What stands on a text encoder: words, swapped or not, one pair, several candidates."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from unmask.draw import Draw
from unmask.errors import UserError
from unmask.systems.language.encoder import ACTIVATIONS, EncoderConfig, dropped, initialise

PairKind = Literal["bert", "roberta", "electra"]
JointKind = Literal["IE_1", "AE_1", "IE_k", "AE_k", "RE_k"]
IGNORED = -100


class WordHead(nn.Module):
    """Linear, activation, LayerNorm, then the word table itself (tied) and a bias: ``[..., D] -> [..., V]``."""

    def __init__(self, config: EncoderConfig):
        super().__init__()
        self.dense = nn.Linear(config.embed_dim, config.word_dim)
        self.act = ACTIVATIONS[config.activation]()
        self.norm = nn.LayerNorm(config.word_dim, eps=config.norm_eps or 1e-12)
        self.bias = nn.Parameter(torch.zeros(config.vocabulary))
        initialise(self)

    def forward(self, hidden: Tensor, words: Tensor) -> Tensor:
        """words: the table ``[V, word_dim]``."""
        return F.linear(self.norm(self.act(self.dense(hidden))), words, self.bias)


class SwapHead(nn.Module):
    """Swapped or not, for every token: Linear, activation, LayerNorm, Linear to 2. RoBERTa's activation is always GELU."""

    def __init__(self, config: EncoderConfig):
        super().__init__()
        bert = config.style == "bert"
        self.dense = nn.Linear(config.embed_dim, config.embed_dim)
        self.act = ACTIVATIONS[config.activation if bert else "gelu"]()
        self.norm = nn.LayerNorm(config.embed_dim, eps=1e-12 if bert else config.norm_eps or 1e-5)
        self.decoder = nn.Linear(config.embed_dim, 2)
        initialise(self)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.decoder(self.norm(self.act(self.dense(hidden))))


class DiscriminatorHead(nn.Module):
    """ELECTRA's: Linear, GELU, Linear to one logit a token, ``[B, T, D] -> [B, T]``."""

    def __init__(self, config: EncoderConfig):
        super().__init__()
        self.dense = nn.Linear(config.embed_dim, config.embed_dim)
        self.act = ACTIVATIONS[config.activation]()
        self.decoder = nn.Linear(config.embed_dim, 1)
        initialise(self)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.decoder(self.act(self.dense(hidden)))[..., 0]


class PairHead(nn.Module):
    """Classes from a text's first token, ``[B, D] -> [B, labels]``. roberta: dropout, Linear, tanh, dropout, Linear;
    electra: GELU in its place; bert: no dropout before the first Linear (its pooler)."""

    def __init__(self, dim: int, labels: int = 2, kind: PairKind = "roberta", dropout: float = 0.1):
        super().__init__()
        self.kind, self.rate = kind, dropout
        self.dense = nn.Linear(dim, dim)
        self.out = nn.Linear(dim, labels)
        initialise(self)

    def forward(self, first: Tensor, draw: Draw | None = None) -> Tensor:
        if self.kind != "bert":
            first = dropped(first, self.rate, draw, "pair.in")
        inner = self.dense(first)
        inner = F.gelu(inner) if self.kind == "electra" else inner.tanh()
        return self.out(dropped(inner, self.rate, draw, "pair.inner"))


class JointHead(nn.Module):
    """Classes of a question and k candidates that stand in k + 1 slots of one row: dropout, Linear, tanh, dropout, Linear on

    IE_1 the question's start, one label; AE_1 the sum of all k + 1 starts, one label; IE_k each candidate's start; AE_k the
    question's start beside each candidate's; RE_k the question's start, k labels at once. ``[B, (k + 1) S, D] -> [B, labels]`` or
    ``[B, k, labels]``. (Di Liello et al. 2022, arXiv:2205.01228, and the framework of the thesis for RE_k.)
    """

    def __init__(self, kind: JointKind, dim: int, k: int, labels: int = 2, dropout: float = 0.1):
        super().__init__()
        if k < 1:
            raise UserError(f"k={k}: a joint head takes at least 1 candidate")
        self.kind, self.k, self.labels, self.rate = kind, k, labels, dropout
        width = 2 * dim if kind == "AE_k" else dim
        self.dense = nn.Linear(width, width)
        self.out = nn.Linear(width, labels * k if kind == "RE_k" else labels)
        initialise(self)

    @property
    def one_label(self) -> bool:
        return self.kind in ("IE_1", "AE_1")

    def forward(self, hidden: Tensor, draw: Draw | None = None) -> Tensor:
        if hidden.shape[1] % (self.k + 1):
            raise UserError(
                f"a row of {hidden.shape[1]} tokens has no {self.k + 1} equal slots (k={self.k}): use (k + 1) x slot"
            )
        starts = hidden[:, :: hidden.shape[1] // (self.k + 1)]
        question, candidates = starts[:, 0], starts[:, 1:]
        if self.kind in ("IE_1", "RE_k"):
            x = question
        elif self.kind == "AE_1":
            x = starts.sum(dim=1)
        elif self.kind == "AE_k":
            x = torch.cat((question[:, None].expand_as(candidates), candidates), dim=-1)
        else:
            x = candidates
        inner = self.dense(dropped(x, self.rate, draw, "joint.in")).tanh()
        logits = self.out(dropped(inner, self.rate, draw, "joint.inner"))
        return logits.unflatten(-1, (self.k, self.labels)) if self.kind == "RE_k" else logits

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Mean cross-entropy of the labelled candidates. labels: ``[B]`` for one label, else ``[B, k]``. Raises ``UserError``."""
        wanted = 1 if self.one_label else 2
        if labels.ndim != wanted:
            what = "one label a row" if wanted == 1 else f"a label for each of the {self.k} candidates"
            raise UserError(f"head {self.kind} takes {what}, these labels have shape {list(labels.shape)}")
        return mean_cross_entropy(logits.flatten(0, -2), labels.flatten())


def mean_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Over the labelled places (label not -100), float32; 0 where there is none. ``[N, K]``, ``[N]``."""
    total = F.cross_entropy(logits.float(), labels, ignore_index=IGNORED, reduction="sum")
    return total / (labels != IGNORED).sum().clamp(min=1)
