"""PEM's transformer decoder: learned queries look at three maps in turn, and each predicts one class and one mask.

All layers that read a level share its projection and positions; the masks that guide attention are made from resized mask
features, which equals resizing the masks (both are linear), and only the last layer's masks are ever made in full.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from unmask.nn.positions import sine_map
from unmask.systems.prediction.mask_losses import MaskLayer
from unmask.systems.prediction.pem.attention import Attention, MaskedAttention, Memory, PrototypeAttention
from unmask.systems.prediction.pem.pixel_decoder import resized


@dataclass
class Predictions:
    """What the queries say before the first layer and after each: class logits ``[B, Q, K + 1]`` (the last: no object) and mask
    embeddings ``[B, Q, M]``, to be multiplied with ``features [B, M, h, w]``."""

    logits: list[Tensor]
    embeddings: list[Tensor]
    features: Tensor

    def layers(self, *, deep: bool = True) -> dict[str, MaskLayer]:
        """For the loss: "final", and (deep) "0", "1" ... from the bare queries on."""
        last = len(self.logits) - 1
        every = {
            "final" if i == last else str(i): MaskLayer(logits, embedding=embedding, features=self.features)
            for i, (logits, embedding) in enumerate(zip(self.logits, self.embeddings, strict=True))
        }
        return {"final": every.pop("final"), **(every if deep else {})}

    def masks(self, layer: int = -1) -> Tensor:
        """Mask logits ``[B, Q, h, w]``."""
        return torch.einsum("bqm,bmhw->bqhw", self.embeddings[layer], self.features)


class QueryDecoder(nn.Module):
    """``dim``: width of the queries; the other arguments as in :class:`~unmask.systems.prediction.pem.model.PEM.Config`."""

    def __init__(
        self,
        *,
        conv_dim: int,
        dim: int,
        mask_dim: int,
        num_heads: int,
        ffn_dim: int,
        layers: int,
        queries: int,
        classes: int,
        attention: Literal["prototype", "masked"] = "prototype",
        pre_norm: bool = True,
        project: bool = True,
        use_masks: bool = True,
        norm: str = "bn",
        normalise_over: Literal["queries", "channels"] = "queries",
        lift_mask: Literal["image", "query"] = "image",
        levels: int = 3,
    ):
        super().__init__()
        self.dim, self.use_masks = dim, use_masks
        self.query_feat = nn.Embedding(queries, dim)
        self.query_embed = nn.Embedding(queries, dim)
        self.level_embed = nn.Embedding(levels, dim)
        self.projections = nn.ModuleList(
            nn.Conv2d(conv_dim, dim, 1) if project or conv_dim != dim else nn.Identity() for _ in range(levels)
        )
        for module in self.projections:
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_uniform_(module.weight, a=1)
                nn.init.zeros_(module.bias)  # type: ignore[arg-type]

        def look() -> nn.Module:
            if attention == "masked":
                return MaskedAttention(dim, num_heads, pre_norm=pre_norm)
            return PrototypeAttention(dim, num_heads, norm=norm, normalise_over=normalise_over, lift_mask=lift_mask)

        self.layers = nn.ModuleList(DecoderLayer(look(), dim, num_heads, ffn_dim, pre_norm) for _ in range(layers))
        self.norm = nn.LayerNorm(dim)
        self.classify = nn.Linear(dim, classes + 1)
        self.embed_mask = nn.Sequential(
            nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, mask_dim)
        )

    def forward(self, memories: list[Tensor], features: Tensor) -> Predictions:
        """memories: ``[B, C, h, w]``, coarsest first; features: ``[B, M, H/4, W/4]``."""
        read = self.memories(memories)
        guides = [resized(features, m.size).flatten(2) for m in read] if self.use_masks else []
        queries = self.query_feat.weight.expand(len(features), -1, -1)
        position = self.query_embed.weight[None]
        found = Predictions([], [], features)
        for place, layer in enumerate(self.layers):
            self.predict(queries, found)
            level = place % len(read)
            guide = None
            if self.use_masks:
                guide = found.embeddings[-1].detach() @ guides[level].detach()
            queries = layer(queries, position, read[level], guide)
        self.predict(queries, found)
        return found

    def memories(self, maps: list[Tensor]) -> list[Memory]:
        out = []
        for level, (x, projection) in enumerate(zip(maps, self.projections, strict=True)):
            size = (x.shape[2], x.shape[3])
            tokens = projection(x).flatten(2).transpose(1, 2) + self.level_embed.weight[level]
            out.append(Memory(tokens, sine_map(self.dim, size).to(x.device, tokens.dtype), size))
        return out

    def predict(self, queries: Tensor, found: Predictions) -> None:
        normalised = self.norm(queries)
        found.logits.append(self.classify(normalised))
        found.embeddings.append(self.embed_mask(normalised))


class DecoderLayer(nn.Module):
    """A look at the pixels, self-attention among the queries, a feed-forward network."""

    def __init__(self, look: nn.Module, dim: int, num_heads: int, ffn_dim: int, pre_norm: bool):
        super().__init__()
        self.pre_norm = pre_norm
        self.look = look
        self.attention, self.attention_norm = Attention(dim, num_heads), nn.LayerNorm(dim)
        self.ffn = nn.Sequential(nn.Linear(dim, ffn_dim), nn.ReLU(), nn.Linear(ffn_dim, dim))
        self.ffn_norm = nn.LayerNorm(dim)
        for linear in (self.ffn[0], self.ffn[2]):
            nn.init.xavier_uniform_(linear.weight)  # type: ignore[arg-type]

    def forward(self, queries: Tensor, position: Tensor, memory: Memory, guide: Tensor | None) -> Tensor:
        queries = self.look(queries, position, memory, guide)
        if self.pre_norm:
            normalised = self.attention_norm(queries)
            placed = normalised + position
            queries = queries + self.attention(placed, placed, normalised)
            return queries + self.ffn(self.ffn_norm(queries))
        placed = queries + position
        queries = self.attention_norm(queries + self.attention(placed, placed, queries))
        return self.ffn_norm(queries + self.ffn(queries))
