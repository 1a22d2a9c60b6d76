"""Perplexity of a language model on a text."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from unmask.contracts import Batch
from unmask.data.text import TextBatches
from unmask.data.text.batches import everything
from unmask.nn.losses import next_token_loss


@torch.no_grad()
def perplexity(
    logits: Callable[[Batch], Tensor], batches: TextBatches, device: torch.device | None = None, batch_size: int = 16
) -> dict[str, Any]:
    """``{"perplexity", "loss", "samples", "baseline"}`` of a language model on all rows; the baseline knows only frequencies."""
    total, count = torch.zeros((), dtype=torch.float64), 0
    frequency = torch.zeros(batches.tokenizer.size, dtype=torch.float64)
    for batch in everything(batches, batch_size):
        moved = {k: v.to(device) if isinstance(v, Tensor) and device is not None else v for k, v in batch.items()}
        nats, tokens = next_token_loss(logits(moved), moved)
        total += nats.double().cpu()
        count += int(tokens)
        frequency += torch.bincount(batch["tokens"][batch["attention_mask"] > 0], minlength=len(frequency)).double()
    chances = frequency / frequency.sum()
    entropy = float(-(chances * chances.clamp_min(1e-12).log()).sum())
    loss = float(total) / max(count, 1)
    return {
        "perplexity": math.exp(min(loss, 700.0)),
        "loss": loss,
        "samples": batches.count,
        "tokens": count,
        "baseline": {"frequencies of tokens": {"perplexity": math.exp(entropy), "loss": entropy}},
    }
