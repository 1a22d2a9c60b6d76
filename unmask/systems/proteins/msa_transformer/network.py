"""The network of the MSA Transformer: axial attention over the rows and columns of an alignment. Rao et al., ICML 2021.

Tokens ``[B, R, C]`` (R rows, C = columns + 1) keep the layout ``[B, R, C, D]`` throughout. Row attention shares one map between
all rows of a table: a plain attention over ``[B, H, C, R d]``; column attention is one with batch ``B C``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from unmask import config as configs
from unmask.config import Field
from unmask.draw import Draw
from unmask.errors import UserError
from unmask.systems.proteins.alphabet import PAD, VOCABULARY
from unmask.systems.proteins.msa_transformer.contacts import ContactHead

FAR = -10000.0  # the authors' logit of a padded key: finite, so that a column of padding has numbers


class NetworkConfig(configs.Config):
    """Sizes and variants of the network; the defaults are the published model's."""

    embed_dim: int = Field(768, ge=1, description="width")
    depth: int = Field(12, ge=1, description="layers")
    num_heads: int = Field(12, ge=1, description="heads of both attentions")
    mlp_dim: int | None = Field(
        None, ge=1, description="width inside the feed-forward part; open: four times embed_dim"
    )
    max_positions: int = Field(1024, ge=1, description="most columns, <cls> included")
    max_rows: int = Field(1024, ge=1, description="most rows, where there is a row table")
    row_positions: Literal["full", "scalar", "none"] = Field(
        "full", description="row table: of embed_dim, of one number a row (the first release), or none"
    )
    dropout: float = Field(0.1, ge=0, lt=1, description="of embeddings, attention maps and residual branches")
    activation_dropout: float = Field(0.1, ge=0, lt=1, description="inside the feed-forward part")
    tied: bool = Field(True, description="one row attention map for all rows of a table")
    tie_scale: Literal["sqrt", "mean"] = Field(
        "sqrt", description="tied logits divided by the root of the rows, or by the rows"
    )
    order: Literal["row_column", "column_row"] = Field("row_column", description="which attention comes first")
    column_attention: bool = Field(True, description="off: rows meet in the shared map alone")
    count_padded_rows: bool = Field(True, description="rows of padding count in the scale, as in the authors' code")
    max_tokens: int = Field(
        2**14, ge=1, description="tokens of a table above which work without gradients goes in pieces"
    )
    embedding_std: float | None = Field(None, gt=0, description="deviation of new token and position tables; open: 1")


@dataclass
class Seen:
    """What a forward pass gives. ``row_maps [B, layer, H, C, C]`` (untied: ``[B, layer, H, R, C, C]``), ``column_maps
    [B, layer, H, C, R, R]`` and ``layers`` only where asked for."""

    last: Tensor  # [B, R, C, D], after the last LayerNorm
    layers: dict[int, Tensor] = field(default_factory=dict)
    row_maps: Tensor | None = None
    column_maps: Tensor | None = None


def dropped(x: Tensor, rate: float, draw: Draw | None, name: str) -> Tensor:
    """Dropout whose uniforms are asked of ``draw``; None is evaluation."""
    if draw is None or rate == 0.0:
        return x
    return x * ((draw.uniform(name, x.shape, device=x.device) >= rate).to(x.dtype) / (1 - rate))


class RowAttention(nn.Module):
    """Attention along the columns of each row, with one map for all rows (``tied``) or one for each."""

    def __init__(self, config: NetworkConfig):
        super().__init__()
        self.config, self.heads = config, config.num_heads
        self.norm = nn.LayerNorm(config.embed_dim)
        self.qkv = nn.Linear(config.embed_dim, 3 * config.embed_dim)
        self.proj = nn.Linear(config.embed_dim, config.embed_dim)

    def forward(
        self, x: Tensor, padding: Tensor | None, draw: Draw | None, name: str, need_map: bool
    ) -> tuple[Tensor, Tensor | None]:
        rows, columns = x.shape[1:3]
        normed = self.norm(x)
        if self.config.tied and not torch.is_grad_enabled() and rows * columns > self.config.max_tokens:
            return self._in_pieces(normed, padding)
        query, key, value = self._heads(self.qkv(normed))  # each [B, H, C, R, d]
        if not self.config.tied:
            return self._untied(query, key, value, padding, draw, name, need_map)
        logits = self._logits(query, key, padding)
        weights = self._weights(logits, padding, rows, query.shape[-1])
        mixed = dropped(weights, self.config.dropout, draw, f"{name}.map") @ value.flatten(3)
        mixed = mixed.unflatten(3, (rows, -1)).permute(0, 3, 2, 1, 4).flatten(3)
        return self.proj(mixed), weights if need_map else None

    def _heads(self, x: Tensor) -> tuple[Tensor, ...]:
        parts = x.shape[-1] // self.config.embed_dim
        return x.unflatten(3, (parts, self.heads, -1)).permute(3, 0, 4, 2, 1, 5).unbind(0)

    def _logits(self, query: Tensor, key: Tensor, padding: Tensor | None) -> Tensor:
        """Sums over rows and width, ``[B, H, C, C]``, without scale; padded positions ask nothing."""
        if padding is not None:
            query = query * (~padding).transpose(1, 2)[:, None, :, :, None]
        return query.flatten(3) @ key.flatten(3).transpose(2, 3)

    def _weights(self, logits: Tensor, padding: Tensor | None, rows: int, width: int) -> Tensor:
        scale: Tensor | float
        if padding is None or self.config.count_padded_rows:
            scale = width**-0.5 / (math.sqrt(rows) if self.config.tie_scale == "sqrt" else rows)
        else:
            there = (~padding).any(dim=2).sum(dim=1).to(logits.dtype)
            scale = width**-0.5 / (there.sqrt() if self.config.tie_scale == "sqrt" else there)[:, None, None, None]
        logits = logits * scale
        if padding is not None:
            logits = logits.masked_fill(padding[:, 0][:, None, None], FAR)
        return logits.softmax(dim=-1)

    def _in_pieces(self, normed: Tensor, padding: Tensor | None) -> tuple[Tensor, Tensor]:
        """The same numbers with the memory of a few rows: logits of pieces are summed, masked once, then applied."""
        dim, rows = self.config.embed_dim, normed.shape[1]
        step = max(self.config.max_tokens // normed.shape[2], 1)
        weight, bias = self.qkv.weight, self.qkv.bias
        logits: Tensor | float = 0.0
        for start in range(0, rows, step):
            query, key = self._heads(F.linear(normed[:, start : start + step], weight[: 2 * dim], bias[: 2 * dim]))
            logits = logits + self._logits(query, key, None if padding is None else padding[:, start : start + step])
        weights = self._weights(logits, padding, rows, dim // self.heads)  # type: ignore[arg-type]
        out = []
        for start in range(0, rows, step):
            (value,) = self._heads(F.linear(normed[:, start : start + step], weight[2 * dim :], bias[2 * dim :]))
            mixed = (weights @ value.flatten(3)).unflatten(3, (value.shape[3], -1))
            out.append(self.proj(mixed.permute(0, 3, 2, 1, 4).flatten(3)))
        return torch.cat(out, dim=1), weights

    def _untied(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        padding: Tensor | None,
        draw: Draw | None,
        name: str,
        need_map: bool,
    ) -> tuple[Tensor, Tensor | None]:
        query, key, value = (t.permute(0, 3, 1, 2, 4) for t in (query, key, value))  # [B, R, H, C, d]
        far = None if padding is None else padding[:, :1, None, None, :]
        if (draw is None or self.config.dropout == 0) and not need_map:
            look = None if far is None else ~far.expand(-1, query.shape[1], 1, query.shape[3], -1).flatten(0, 1)
            flat = F.scaled_dot_product_attention(
                query.flatten(0, 1), key.flatten(0, 1), value.flatten(0, 1), attn_mask=look
            )
            mixed, weights = flat.unflatten(0, query.shape[:2]), None
        else:
            logits = (query * query.shape[-1] ** -0.5) @ key.transpose(-1, -2)
            weights = (logits if far is None else logits.masked_fill(far, FAR)).softmax(dim=-1)
            mixed = dropped(weights, self.config.dropout, draw, f"{name}.map") @ value
        out = self.proj(mixed.transpose(2, 3).flatten(3))
        return out, weights.transpose(1, 2) if need_map and weights is not None else None


class ColumnAttention(nn.Module):
    """Attention along the rows of each column."""

    def __init__(self, config: NetworkConfig):
        super().__init__()
        self.config, self.heads = config, config.num_heads
        self.norm = nn.LayerNorm(config.embed_dim)
        self.qkv = nn.Linear(config.embed_dim, 3 * config.embed_dim)
        self.proj = nn.Linear(config.embed_dim, config.embed_dim)

    def forward(
        self, x: Tensor, padding: Tensor | None, draw: Draw | None, name: str, need_map: bool
    ) -> tuple[Tensor, Tensor | None]:
        rows, columns = x.shape[1:3]
        normed = self.norm(x)
        if rows == 1:  # a row alone looks at itself, padded or not
            dim = self.config.embed_dim
            out = self.proj(F.linear(normed, self.qkv.weight[2 * dim :], self.qkv.bias[2 * dim :]))
            return out, x.new_ones(len(x), self.heads, columns, 1, 1) if need_map else None
        if not torch.is_grad_enabled() and rows * columns > self.config.max_tokens:
            step = max(self.config.max_tokens // rows, 1)
            parts = [
                self._attend(
                    normed[:, :, i : i + step],
                    None if padding is None else padding[:, :, i : i + step],
                    None,
                    name,
                    need_map,
                )
                for i in range(0, columns, step)
            ]
            maps = torch.cat([m for _, m in parts if m is not None], dim=2) if need_map else None
            return torch.cat([out for out, _ in parts], dim=2), maps
        return self._attend(normed, padding, draw, name, need_map)

    def _attend(
        self, normed: Tensor, padding: Tensor | None, draw: Draw | None, name: str, need_map: bool
    ) -> tuple[Tensor, Tensor | None]:
        query, key, value = (
            self.qkv(normed).unflatten(3, (3, self.heads, -1)).permute(3, 0, 2, 4, 1, 5)
        )  # [B, C, H, R, d]
        if (draw is None or self.config.dropout == 0) and not need_map:
            look = None
            if padding is not None:
                # A column of padding alone has equal weights everywhere in the authors' code: it asks nothing, and may look.
                empty = padding.all(dim=1)  # [B, C]
                look = (~padding.transpose(1, 2) | empty[:, :, None])[:, :, None, None].flatten(0, 1)
                query = query * (~empty)[:, :, None, None, None]
            flat = F.scaled_dot_product_attention(*(t.flatten(0, 1) for t in (query, key, value)), attn_mask=look)
            mixed, weights = flat.unflatten(0, query.shape[:2]), None
        else:
            logits = (query * query.shape[-1] ** -0.5) @ key.transpose(-1, -2)
            if padding is not None:
                logits = logits.masked_fill(padding.transpose(1, 2)[:, :, None, None], FAR)
            weights = logits.softmax(dim=-1)
            mixed = dropped(weights, self.config.dropout, draw, f"{name}.map") @ value
        out = self.proj(mixed.permute(0, 3, 1, 2, 4).flatten(3))
        return out, weights.transpose(1, 2) if need_map and weights is not None else None


class FeedForward(nn.Module):
    """LayerNorm, Linear, GELU (erf), dropout, Linear."""

    def __init__(self, config: NetworkConfig):
        super().__init__()
        hidden = config.mlp_dim or 4 * config.embed_dim
        self.rate = config.activation_dropout
        self.norm = nn.LayerNorm(config.embed_dim)
        self.fc1 = nn.Linear(config.embed_dim, hidden)
        self.fc2 = nn.Linear(hidden, config.embed_dim)

    def forward(self, x: Tensor, draw: Draw | None, name: str) -> Tensor:
        return self.fc2(dropped(F.gelu(self.fc1(self.norm(x))), self.rate, draw, f"{name}.inner"))


class Layer(nn.Module):
    """Three pre-norm residual blocks: row attention, column attention, feed-forward."""

    def __init__(self, config: NetworkConfig, number: int):
        super().__init__()
        self.config, self.name = config, f"layers.{number}"
        self.row = RowAttention(config)
        self.column = ColumnAttention(config) if config.column_attention else None
        self.mlp = FeedForward(config)

    def forward(
        self, x: Tensor, padding: Tensor | None, draw: Draw | None = None, need_maps: bool = False
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        maps: dict[str, Tensor | None] = {"row": None, "column": None}
        first = ("row", "column") if self.config.order == "row_column" else ("column", "row")
        for kind in first:
            attention = getattr(self, kind)
            if attention is not None:
                name = f"{self.name}.{kind}"
                out, maps[kind] = attention(x, padding, draw, name, need_maps)
                x = x + dropped(out, self.config.dropout, draw, name)
        out = self.mlp(x, draw, f"{self.name}.mlp")
        return x + dropped(out, self.config.dropout, draw, f"{self.name}.mlp"), maps["row"], maps["column"]


class MSANetwork(nn.Module):
    """Tokens (or one-hot rows that need not be whole) of an alignment to representations, letters and contacts."""

    def __init__(self, config: NetworkConfig):
        super().__init__()
        if config.embed_dim % config.num_heads:
            fits = [h for h in range(1, config.embed_dim + 1) if config.embed_dim % h == 0]
            near = sorted(fits, key=lambda h: abs(h - config.num_heads))[:2]
            fitting = " or ".join(map(str, sorted(near)))
            raise UserError(f"num_heads={config.num_heads} does not divide embed_dim={config.embed_dim}: use {fitting}")
        self.config, dim = config, config.embed_dim
        self.embed_tokens = nn.Embedding(len(VOCABULARY), dim, padding_idx=PAD)
        self.embed_positions = nn.Embedding(config.max_positions + 2, dim, padding_idx=PAD)
        width = {"full": dim, "scalar": 1, "none": 0}[config.row_positions]
        self.row_positions = nn.Parameter(0.01 * torch.randn(config.max_rows, width)) if width else None
        self.norm_before, self.norm_after = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.layers = nn.ModuleList(Layer(config, i) for i in range(config.depth))
        self.contact_head = ContactHead(config.depth * config.num_heads)
        self.head_dense, self.head_norm = nn.Linear(dim, dim), nn.LayerNorm(dim)
        self.head_bias = nn.Parameter(torch.zeros(len(VOCABULARY)))
        if config.embedding_std is not None:
            with torch.no_grad():
                for table in (self.embed_tokens, self.embed_positions):
                    table.weight.normal_(0, config.embedding_std)
                    table.weight[PAD] = 0

    # --- forward ---
    def check(self, rows: int, columns: int) -> None:
        """Raises ``UserError`` for more rows or columns (``<cls>`` included) than there are positions for."""
        if columns > self.config.max_positions:
            raise UserError(
                f"{columns - 1} columns are more than the model has positions for "
                f"({self.config.max_positions - 1}): cut the alignment"
            )
        if self.row_positions is not None and rows > self.config.max_rows:
            raise UserError(
                f"{rows} rows are more than the model's row table holds ({self.config.max_rows}): choose some with "
                f"rows={min(256, self.config.max_rows)}"
            )

    def positions(self, tokens: Tensor, jump_from: int | None = None, jump_by: int = 200) -> Tensor:
        """Embedded positions ``[B, R, C, D]``: the place among what is no padding, counted in each row. From column
        ``jump_from`` on they are ``jump_by`` further (a chain break)."""
        there = tokens != PAD
        places = there.cumsum(dim=2) * there + PAD
        if jump_from is not None:
            places = torch.cat(
                (places[:, :, :jump_from], places[:, :, jump_from:] + jump_by * there[:, :, jump_from:]), dim=2
            )
        return self.embed_positions(places)

    def embed(
        self, tokens: Tensor, embedded: Tensor | None = None, *, jump_from: int | None = None, jump_by: int = 200
    ) -> Tensor:
        """What enters the first LayerNorm. embedded: rows embedded by the caller instead of the tokens' own."""
        x = self.embed_tokens(tokens) if embedded is None else embedded
        x = x + self.positions(tokens, jump_from, jump_by)
        return x if self.row_positions is None else x + self.row_positions[: tokens.shape[1], None]

    def forward(
        self,
        tokens: Tensor,
        embedded: Tensor | None = None,
        *,
        draw: Draw | None = None,
        need_maps: bool = False,
        layers: tuple[int, ...] = (),
        jump_from: int | None = None,
        jump_by: int = 200,
        checkpointing: bool = False,
    ) -> Seen:
        """tokens ``[B, R, C]``. draw: source of dropout, None in evaluation. layers: which representations to keep: 0 after the
        embedding's LayerNorm, i after layer i, the last after the final LayerNorm. checkpointing: activations of a layer are
        computed again in the backward pass instead of kept."""
        self.check(*tokens.shape[1:])
        padding = tokens == PAD
        somewhere = bool(padding.any()) if tokens.device.type == "cpu" else True  # no waiting for an accelerator
        x = dropped(
            self.norm_before(self.embed(tokens, embedded, jump_from=jump_from, jump_by=jump_by)),
            self.config.dropout,
            draw,
            "embed",
        )
        mask = padding if somewhere else None
        if mask is not None:
            x = x * (~mask)[..., None]
        kept = {0: x} if 0 in layers else {}
        row_maps, column_maps = [], []
        for number, layer in enumerate(self.layers, start=1):
            if checkpointing and torch.is_grad_enabled():
                x, row, column = torch.utils.checkpoint.checkpoint(layer, x, mask, draw, need_maps, use_reentrant=False)  # type: ignore[misc]
            else:
                x, row, column = layer(x, mask, draw, need_maps)
            row_maps.append(row)
            column_maps.append(column)
            if number in layers:
                kept[number] = x
        last = self.norm_after(x)
        if len(self.layers) in layers:
            kept[len(self.layers)] = last
        if not need_maps:
            return Seen(last, kept)
        columns = torch.stack(column_maps, dim=1) if column_maps[0] is not None else None
        return Seen(last, kept, torch.stack(row_maps, dim=1), columns)

    def letters(self, representations: Tensor) -> Tensor:
        """Logits over the vocabulary, ``[..., D]`` -> ``[..., 33]``; the product with the token table."""
        x = self.head_norm(F.gelu(self.head_dense(representations)))
        return F.linear(x, self.embed_tokens.weight, self.head_bias)

    def contacts(self, row_maps: Tensor) -> Tensor:
        """Probabilities ``[B, L, L]`` from row maps (untied: their mean over rows)."""
        return self.contact_head(row_maps.mean(dim=3) if row_maps.ndim == 6 else row_maps)
