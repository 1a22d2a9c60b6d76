"""The networks: ENAT, which treats visible and hidden tokens apart and reuses features, and NAT, which does neither.

Legend: B samples, N tokens of an image (row-major over the grid), V visible, M hidden, D width, K code book entries (K is also
the id of a hidden token). Positions are int64 indices of tokens in the grid: tokens travel in any order beside them, since
attention does not mind, so a step gathers only what is new.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from unmask.draw import Draw
from unmask.nn.patch import select
from unmask.systems.generation.enat.blocks import Block, PreviousProjection, TokenHead, normalised


@dataclass(frozen=True)
class State:
    """What a later step may reuse: ``features [B, V, D]`` of the visible tokens at ``positions [B, V]``."""

    features: Tensor
    positions: Tensor

    def detached(self) -> State:
        return State(self.features.detach(), self.positions)


class TokenNetwork(nn.Module):
    """Predicts hidden tokens of an image of a class.

    Blocks ``0 ... encoder_depth - 1`` see visible tokens, the others hidden ones, which look at the visible. With
    ``disentangled=False`` (NAT) all blocks see all tokens, and nothing can be reused.
    """

    def __init__(
        self,
        *,
        tokens: int,
        codebook_size: int,
        classes: int,
        embed_dim: int,
        encoder_depth: int,
        decoder_depth: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        dropout: float = 0.0,
        disentangled: bool = True,
    ):
        super().__init__()
        self.tokens, self.codebook_size, self.classes = tokens, codebook_size, classes
        self.encoder_depth, self.dropout, self.disentangled = encoder_depth, dropout, disentangled
        self.words = nn.Embedding(codebook_size + 1, embed_dim)
        self.places = nn.Embedding(tokens, embed_dim)
        self.embed_norm = nn.LayerNorm(embed_dim, eps=1e-6)
        self.class_table = nn.Embedding(classes + 1, embed_dim)
        self.previous = PreviousProjection(embed_dim, mlp_ratio) if disentangled else None
        self.blocks = nn.ModuleList(
            Block(embed_dim, num_heads, mlp_ratio, context=disentangled) for _ in range(encoder_depth + decoder_depth)
        )
        self.norm = nn.LayerNorm(embed_dim, eps=1e-5)
        self.head = TokenHead(embed_dim, codebook_size + 1)
        self.apply(_initialised)
        for block in self.blocks:
            nn.init.zeros_(block.modulate.weight)  # type: ignore[union-attr, arg-type]

    @property
    def empty_class(self) -> int:
        """The row of the class table that stands for "any"."""
        return self.classes

    # --- parts ---
    def embed(self, ids: Tensor, positions: Tensor, draw: Draw | None = None) -> Tensor:
        """``[B, L, D]`` of ``ids [B, L]`` standing at ``positions [B, L]``. draw: the source of dropout; None: none."""
        x = self.embed_norm(self.words(ids) + self.places(positions))
        if draw is None or not self.dropout:
            return x
        kept = draw.uniform("embedding dropout", x.shape, device=x.device) >= self.dropout
        return x * (kept.to(x.dtype) / (1 - self.dropout))

    def conditions(self, classes: Tensor) -> list[Tensor]:
        """What each block is told of the class ``[B]``: all the same, ``[B, D]``, and each makes its modulation of it."""
        return [F.silu(self.class_table(classes))] * len(self.blocks)

    def modulations(self, classes: Tensor) -> list[Tensor]:
        """The same, made once for many calls: each block's modulation, ``[8, B, 1, D]``."""
        return [b.modulation(c) for b, c in zip(self.blocks, self.conditions(classes), strict=True)]  # type: ignore[operator, union-attr]

    def encode(self, x: Tensor, conditions: list[Tensor], context: Tensor | None = None) -> Tensor:
        """Visible tokens ``x [B, L, D]`` through the encoder; they look at ``context [B, V, D]`` and at one another."""
        return self._through(0, self.encoder_depth, x, conditions, context)

    def decode(self, x: Tensor, conditions: list[Tensor], context: Tensor) -> Tensor:
        """Hidden tokens ``x [B, M, D]`` through the decoder; every block looks at the same ``context [B, V, D]``."""
        return self._through(self.encoder_depth, len(self.blocks), x, conditions, context)

    def together(self, x: Tensor, conditions: list[Tensor], queries: Tensor | None = None) -> Tensor:
        """All tokens ``x [B, N, D]`` through all blocks. queries: ``[B, Q]``, those that the last block computes."""
        x = self._through(0, len(self.blocks) - 1, x, conditions, None)
        return self.blocks[-1](x, conditions[-1], queries=queries)

    def logits(self, features: Tensor) -> Tensor:
        """``[B, L, K]`` of features ``[B, L, D]``."""
        return self.head(self.norm(features), self.words.weight)

    def projected(self, features: Tensor) -> Tensor:
        """Features of an earlier step as context of this one, ``[B, V, D]``."""
        assert self.previous is not None
        return self.previous(features) if features.shape[1] else features

    def _through(self, first: int, last: int, x: Tensor, conditions: list[Tensor], context: Tensor | None) -> Tensor:
        if not x.shape[1]:
            return x
        if context is not None:
            context = normalised(context) if context.shape[1] else None
        for block, condition in zip(self.blocks[first:last], conditions[first:last], strict=True):
            x = block(x, condition, context)
        return x

    # --- whole ---
    def state(self, ids: Tensor, classes: Tensor, visible: Tensor) -> State:
        """The state that a step with these visible positions ``[B, V]`` of ``ids [B, N]`` leaves, nothing reused."""
        seen = self.embed(ids.gather(1, visible), visible)
        return State(self.encode(seen, self.conditions(classes)), visible)

    def forward(
        self,
        ids: Tensor,
        classes: Tensor,
        visible: Tensor,
        hidden: Tensor,
        *,
        fresh: Tensor | None = None,
        previous: State | None = None,
        draw: Draw | None = None,
    ) -> tuple[Tensor, State]:
        """Features of the hidden tokens ``[B, M, D]`` (before the last norm), and the state of the visible ones.

        ids: ``[B, N]``, K where hidden. visible, hidden: positions ``[B, V]`` and ``[B, M]``, all of them together. previous: the
        state of an earlier step whose visible tokens are among these; fresh ``[B, F]``: then, the positions not in it.
        A network that does not tell visible from hidden (NAT) has an empty state.
        """
        conditions = self.conditions(classes)
        embedded = self.embed(ids, torch.arange(self.tokens, device=ids.device).expand_as(ids), draw)
        if not self.disentangled:
            return self.together(embedded, conditions, hidden), State(embedded[:, :0], visible[:, :0])
        if previous is None:
            state = State(self.encode(select(embedded, visible), conditions), visible)
        else:
            assert fresh is not None
            context = self.projected(previous.features.detach())
            new = select(embedded, fresh)
            features = torch.cat((context, self.encode(new, conditions, context)), dim=1)
            state = State(features, torch.cat((previous.positions, fresh), dim=1))
        return self.decode(select(embedded, hidden), conditions, state.features), state


def in_grid_order(parts: list[tuple[Tensor, Tensor]]) -> Tensor:
    """``[B, N, ...]`` from pieces (values ``[B, L, ...]``, positions ``[B, L]``) that cover the grid."""
    values, positions = (torch.cat(column, dim=1) for column in zip(*parts, strict=True))
    return select(values, positions.argsort(dim=1))


def _initialised(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
