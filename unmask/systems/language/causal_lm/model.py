"""A causal language model: every token is predicted from those before it (Radford et al. 2019, GPT-2; pre-norm, learned
positions, tied output)."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from unmask import config as configs
from unmask.config import Field
from unmask.contracts import Batch, DataFacts, Losses, Progress, Trainable
from unmask.data.text import TextBatches, TextSettings, Tokenizer
from unmask.draw import Draw
from unmask.errors import UserError
from unmask.models.perplexity import perplexity
from unmask.nn.block import Block
from unmask.nn.losses import next_token_loss


class CausalLM(Trainable):
    """``logits({"tokens": [B, T]}) -> [B, T, V]``; position t of it is for token t + 1."""

    slug = "causal_lm"
    kind: ClassVar[str] = "causal lm"
    loss_units = "nats a token"
    Data = TextSettings
    measures: ClassVar = {"perplexity": "perplexity", "loss": "nats a token"}
    lower_is_better = frozenset({"perplexity", "loss"})

    class Config(configs.Config):
        vocabulary: int = Field(0, ge=0, description="tokens; open: the data's")
        length: int = Field(0, ge=0, description="longest row; open: the data's")
        embed_dim: int = Field(128, ge=8, description="width")
        depth: int = Field(4, ge=1, description="blocks")
        num_heads: int = Field(4, ge=1, description="attention heads")
        mlp_ratio: float = Field(4.0, gt=0, description="hidden width of the MLP / width")

    def __init__(self, config: configs.Config):
        super().__init__(config)
        c: Any = config
        if not c.vocabulary or not c.length:
            raise UserError(
                "causal_lm needs vocabulary and length: they come from the data, or give vocabulary=256 length=128"
            )
        self.embed = nn.Embedding(c.vocabulary, c.embed_dim)
        self.positions = nn.Embedding(c.length, c.embed_dim)
        self.blocks = nn.ModuleList(
            Block(c.embed_dim, c.num_heads, mlp_ratio=c.mlp_ratio, norm_eps=1e-5) for _ in range(c.depth)
        )
        self.norm = nn.LayerNorm(c.embed_dim, eps=1e-5)
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        for block in self.blocks:  # what is added to the stream, in proportion to how often that happens
            assert isinstance(block, Block)
            for last in (block.attn.proj, block.mlp.fc2):
                nn.init.normal_(last.weight, std=0.02 / math.sqrt(2 * c.depth))

    # --- construction ---
    @classmethod
    def open_batches(cls, config: Any, data: Any, batch_size: int, seed: int) -> TextBatches:
        return TextBatches(data, batch_size, seed)

    @classmethod
    def adapted(cls, config: Any, facts: DataFacts) -> Any:
        told = {"vocabulary": facts.extra["vocabulary"], "length": facts.extra["length"]}
        for name, value in told.items():
            given = getattr(config, name)
            if given and given < value:
                raise UserError(f"causal_lm: {name}={given} is less than the data's {value}: leave it out")
        return config.model_copy(update={k: getattr(config, k) or v for k, v in told.items()})

    def blocks_to_compile(self) -> list[nn.Module]:
        return list(self.blocks)

    def no_weight_decay(self) -> set[str]:
        return {"embed.weight", "positions.weight"}

    # --- learning ---
    def hidden(self, batch: Batch) -> Tensor:
        """``[B, T, D]`` after the last norm. Padding is looked at by nobody; a packed row's texts see themselves alone."""
        tokens = batch["tokens"]
        length = tokens.shape[1]
        if length > self.config.length:
            raise UserError(f"a row of {length} tokens is longer than the {self.config.length} positions of this model")
        places = batch.get("positions")
        places = torch.arange(length, device=tokens.device)[None] if places is None else places
        x = self.embed(tokens) + self.positions(places)
        mask = torch.ones(length, length, dtype=torch.bool, device=tokens.device).tril()
        segments = batch.get("segments")
        if segments is not None and bool((segments != 1).any()):
            mask = mask & (segments[:, None, :, None] == segments[:, None, None, :])
        for block in self.blocks:
            x = block(x, bias=mask)
        return self.norm(x)

    def logits(self, batch: Batch) -> Tensor:
        """``[B, T, V]``."""
        return self.hidden(batch) @ self.embed.weight.T

    def loss(self, batch: Batch, draw: Draw, progress: Progress | None = None, phase: str = "main") -> Losses:
        total, count = next_token_loss(self.logits(batch), batch)
        return {"loss": total / count}

    @torch.no_grad()
    def references(self, batch: Batch, draw: Draw, progress: Progress | None = None) -> Losses:
        """How well one does who knows only how frequent tokens are in the same batch."""
        tokens = batch["tokens"]
        counts = torch.bincount(tokens[batch["attention_mask"] > 0], minlength=self.config.vocabulary).float()
        chances = counts / counts.sum()
        return {"frequencies of the batch": -(chances * chances.clamp_min(1e-12).log()).sum()}

    def measure(
        self,
        data: Any,
        draw: Draw,
        *,
        limit: int | None = None,
        device: torch.device | None = None,
        tell: Callable[[str], None] | None = None,
        folder: Path | None = None,
    ) -> dict[str, Any]:
        """Perplexity = exp of the mean negative log-likelihood over all tokens of the text, in windows of its length."""
        settings = data.model_copy(update={"limit": limit or data.limit})
        batches = TextBatches(settings, 1, tokenizer=self.tokenizer())
        return perplexity(lambda batch: self.logits(batch), batches, device)

    def tokenizer(self) -> Tokenizer:
        """The one it was trained with. Raises ``UserError`` where it was saved without one."""
        if "tokenizer.json" not in self.side_files:
            raise UserError("this causal_lm was saved without its tokenizer: train it with unmask train causal_lm")
        return Tokenizer.from_text(self.side_files["tokenizer.json"])
