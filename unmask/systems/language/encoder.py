"""One encoder for BERT, RoBERTa and ELECTRA: post-norm blocks over tokens; rows may hold several texts that do not see one another.

Devlin et al. 2019 (arXiv:1810.04805), Liu et al. 2019 (1907.11692), Clark et al. 2020 (2003.10555). Legend: B rows, T tokens, D
width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from pydantic import model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from unmask import config as configs
from unmask.config import Field
from unmask.contracts import Batch
from unmask.draw import Draw
from unmask.errors import UserError
from unmask.nn.attention import Attention, attention_map
from unmask.nn.block import Mlp

# width, depth, heads: the sizes that Turc et al. 2019 (arXiv:1908.08962) trained, and BERT's own two
SIZES = {
    "tiny": (128, 2, 2),
    "mini": (256, 4, 4),
    "small": (512, 4, 8),
    "medium": (512, 8, 8),
    "base": (768, 12, 12),
    "large": (1024, 24, 16),
}
Activation = Literal["gelu", "gelu_tanh", "relu", "silu"]
ACTIVATIONS: dict[str, Any] = {
    "gelu": nn.GELU,
    "gelu_tanh": lambda: nn.GELU(approximate="tanh"),
    "relu": nn.ReLU,
    "silu": nn.SiLU,
}
STANDARD_DEVIATION = 0.02


class EncoderConfig(configs.Config):
    """Sizes and habits of a text encoder; what is 0 or open comes from the data, or has its style's value."""

    size: Literal["", "tiny", "mini", "small", "medium", "base", "large"] = Field(
        "", description="width, depth and heads by a name"
    )
    style: Literal["bert", "roberta"] = Field(
        "bert", description="how positions are counted and padding is numbered; ELECTRA is of style bert"
    )
    vocabulary: int = Field(0, ge=0, description="tokens; 0: the data's")
    positions: int = Field(0, ge=0, description="longest row; 0: the data's")
    embed_dim: int = Field(768, ge=8, description="width")
    depth: int = Field(12, ge=1, description="blocks")
    num_heads: int = Field(12, ge=1, description="attention heads")
    mlp_dim: int = Field(0, ge=0, description="hidden width of the MLP; 0: four times the width")
    word_dim: int = Field(0, ge=0, description="width of the word table where it differs (ELECTRA); 0: the width")
    types: int = Field(
        0, ge=0, description="token types; 0: 2 for bert, 1 for roberta, more where the objective needs them"
    )
    activation: Activation = Field("gelu", description="of the MLPs and the language-model head")
    dropout: float = Field(0.1, ge=0, lt=1, description="of embeddings and residual branches")
    attention_dropout: float = Field(0.1, ge=0, lt=1, description="of attention maps")
    norm_eps: float | None = Field(None, gt=0, description="of LayerNorm; open: 1e-12 for bert, 1e-5 for roberta")
    pad: int | None = Field(
        None, ge=0, description="id of the padding token; open: the data's, else 0 for bert, 1 for roberta"
    )

    @model_validator(mode="before")
    @classmethod
    def _sized(cls, values: Any) -> Any:
        if isinstance(values, str):
            values = {"size": values}
        if isinstance(values, Mapping) and values.get("size") in SIZES:
            width, depth, heads = SIZES[values["size"]]
            return {"embed_dim": width, "depth": depth, "num_heads": heads, **values}
        return values

    def whole(self) -> EncoderConfig:
        """With every open value filled by its style's. Raises ``UserError`` where vocabulary or positions are open still."""
        if not self.vocabulary or not self.positions:
            raise UserError(
                "a text encoder needs its vocabulary and positions: they come from the data, or give "
                "encoder.vocabulary=8192 encoder.positions=128"
            )
        bert = self.style == "bert"
        filled = {
            "mlp_dim": self.mlp_dim or 4 * self.embed_dim,
            "word_dim": self.word_dim or self.embed_dim,
            "types": self.types or (2 if bert else 1),
            "norm_eps": self.norm_eps or (1e-12 if bert else 1e-5),
            "pad": self.pad if self.pad is not None else (0 if bert else 1),
        }
        return self.model_copy(update=filled)


def dropped(x: Tensor, rate: float, draw: Draw | None, name: str) -> Tensor:
    """Dropout whose uniforms are asked of ``draw``; None is evaluation."""
    if draw is None or rate == 0.0:
        return x
    return x * ((draw.uniform(name, x.shape, device=x.device) >= rate).to(x.dtype) / (1 - rate))


class PostNormBlock(nn.Module):
    """``LN(x + attention(x))``, then ``LN(x + mlp(x))``."""

    def __init__(self, config: EncoderConfig, name: str):
        super().__init__()
        c = config
        self.name, self.dropout, self.attention_dropout = name, c.dropout, c.attention_dropout
        self.attn = Attention(c.embed_dim, c.num_heads)
        self.norm1 = nn.LayerNorm(c.embed_dim, eps=c.norm_eps or 1e-12)
        self.mlp = Mlp(c.embed_dim, c.mlp_dim)
        self.mlp.act = ACTIVATIONS[c.activation]()
        self.norm2 = nn.LayerNorm(c.embed_dim, eps=c.norm_eps or 1e-12)

    def forward(self, x: Tensor, bias: Tensor | None = None, draw: Draw | None = None) -> Tensor:
        x = self.norm1(x + dropped(self._attended(x, bias, draw), self.dropout, draw, f"{self.name}.attention"))
        return self.norm2(x + dropped(self.mlp(x), self.dropout, draw, f"{self.name}.mlp"))

    def _attended(self, x: Tensor, bias: Tensor | None, draw: Draw | None) -> Tensor:
        if draw is None or self.attention_dropout == 0:
            return self.attn(x, bias=bias)
        query, key, value = self.attn.project(x)
        weights = attention_map(query, key, bias=bias).to(value.dtype)
        mixed = dropped(weights, self.attention_dropout, draw, f"{self.name}.map") @ value
        return self.attn.proj(mixed.transpose(1, 2).flatten(2))


class TextEncoder(nn.Module):
    """``forward({"tokens": [B, T], ...}) -> [B, T, D]``.

    Besides ``tokens`` a batch may have ``attention_mask`` (1: a token), ``types`` (or ``token_type_ids``), and for packed rows
    ``segments`` (which text a token belongs to, from 1; tokens see their own text alone) with ``positions`` (from 0 in each text).
    Raises ``UserError`` for rows longer than the positions.
    """

    def __init__(self, config: EncoderConfig):
        super().__init__()
        self.config = c = config.whole()
        assert c.pad is not None
        assert c.norm_eps is not None
        self.pad: int = c.pad
        self.words = nn.Embedding(c.vocabulary, c.word_dim)
        self.places = nn.Embedding(c.positions + self.first_place, c.word_dim)
        self.kinds = nn.Embedding(c.types, c.word_dim)
        self.norm = nn.LayerNorm(c.word_dim, eps=c.norm_eps)
        self.widen = nn.Linear(c.word_dim, c.embed_dim) if c.word_dim != c.embed_dim else nn.Identity()
        self.blocks = nn.ModuleList(PostNormBlock(c, f"block{i}") for i in range(c.depth))
        initialise(self)

    @property
    def first_place(self) -> int:
        """The row of the position table that a text's first token takes: RoBERTa counts from behind the padding's."""
        return self.pad + 1 if self.config.style == "roberta" else 0

    def forward(self, batch: Batch, draw: Draw | None = None) -> Tensor:
        """draw: source of dropout; None in evaluation."""
        x = self.widen(dropped(self.embedded(batch), self.config.dropout, draw, "embeddings"))
        bias = self.visible(batch)
        for block in self.blocks:
            x = block(x, bias, draw)
        return x

    def embedded(self, batch: Batch) -> Tensor:
        """``[B, T, word_dim]``. The padding's rows of the tables get no gradient from here."""
        tokens = batch["tokens"]
        length = tokens.shape[1]
        places = self.places_of(batch)
        if length > self.config.positions and (batch.get("positions") is None or "segments" not in batch):
            raise UserError(
                f"a row of {length} tokens is longer than the {self.config.positions} positions of this model: "
                f"use data.length={self.config.positions}"
            )
        types = batch.get("types", batch.get("token_type_ids"))
        kinds = self.kinds.weight[0] if types is None or self.config.types == 1 else self.kinds(types)
        words = F.embedding(tokens, self.words.weight, padding_idx=self.pad)
        filler = self.pad if self.config.style == "roberta" else None
        return self.norm(words + kinds + F.embedding(places, self.places.weight, padding_idx=filler))

    def places_of(self, batch: Batch) -> Tensor:
        """Rows of the position table, int64, broadcastable to ``[B, T]``. BERT numbers every place of a row, RoBERTa its
        real tokens; padding is found by its id."""
        tokens, given = batch["tokens"], batch.get("positions")
        if self.config.style == "roberta":
            real = tokens != self.pad
            counted = real.long().cumsum(dim=1) - 1 if given is None else given
            return torch.where(real, counted + self.first_place, self.pad)
        return torch.arange(tokens.shape[1], device=tokens.device)[None] if given is None else given

    def visible(self, batch: Batch) -> Tensor | None:
        """bool, True where a token may look: ``[B, 1, 1, T]``, or ``[B, 1, T, T]`` for packed rows; None where all is seen."""
        segments, mask = batch.get("segments"), batch.get("attention_mask")
        if segments is not None:
            return segments[:, None, :, None] == segments[:, None, None, :]
        return None if mask is None else mask.bool()[:, None, None, :]


def initialise(module: nn.Module) -> None:
    """BERT's: normal with a deviation of 0.02, biases zero."""
    for part in module.modules():
        if isinstance(part, (nn.Linear, nn.Embedding)):
            nn.init.normal_(part.weight, std=STANDARD_DEVIATION)
        if isinstance(part, nn.Linear) and part.bias is not None:
            nn.init.zeros_(part.bias)


def grown(table: Tensor, rows: int, noise: Tensor) -> Tensor:
    """A table with more rows: the old ones first, the new ones from ``noise`` (standard normal) times 0.02."""
    fresh = noise[: rows - len(table)] * STANDARD_DEVIATION
    return torch.cat((table, fresh.to(table.dtype))) if rows > len(table) else table


def mean_pooled(hidden: Tensor, batch: Batch) -> Tensor:
    """``[B, D]``: the mean of a row's real tokens."""
    mask = batch.get("attention_mask")
    if mask is None:
        return hidden.mean(dim=1)
    weight = mask.to(hidden.dtype)[..., None]
    return (hidden * weight).sum(dim=1) / weight.sum(dim=1).clamp_min(1)
