"""Training a small head on features that were computed once: the loop under the linear and the attentive probe."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from pydantic import field_validator
from torch import Tensor, nn
from torch.nn import functional as F

from unmask.config import Config, Field
from unmask.draw import Seeded
from unmask.engine.optim import Lars
from unmask.evaluation.subsets import split

HELD_OUT = 0.1


class HeadSettings(Config):
    """How a probe's head is trained: half-cosine to 0 after a linear warm-up, rate = base_lr x batch / 256."""

    optimizer: Literal["lars", "sgd"] = "lars"
    base_lr: tuple[float, ...] = Field((0.1,), min_length=1, description="of several, the best on held-out samples")
    batch_size: int | None = Field(
        None, ge=2, description="open: a power of two with about 24 steps an epoch, 32 ... 16384"
    )
    epochs: int = Field(90, ge=1)
    warmup_epochs: float = Field(10, ge=0)
    momentum: float = Field(0.9, ge=0, lt=1)
    weight_decay: float = Field(0.0, ge=0)

    @field_validator("base_lr", mode="before")
    @classmethod
    def _one_rate_is_enough(cls, value: Any) -> Any:
        return (value,) if isinstance(value, (int, float)) else value

    def batch(self, count: int) -> int:
        """The batch size for ``count`` samples."""
        wanted = self.batch_size or 2 ** round(math.log2(max(count / 24, 1)))
        return min(max(wanted, 32) if self.batch_size is None else wanted, 16384, count)


def train_heads(
    make: Callable[[], nn.Module],
    inputs: Tensor,
    labels: Tensor,
    settings: HeadSettings,
    *,
    views: Sequence[Tensor] | None = None,
    seed: int = 0,
    device: torch.device | str = "cpu",
    tell: Callable[[str], None] | None = None,
) -> tuple[nn.Module, dict[str, float]]:
    """The trained head, and ``{"base_lr", "held_out_top1"?}``.

    inputs: ``[N, ...]``. views: V such tensors of the same samples (under augmentation), of which epoch e learns view e mod V
    instead of the inputs.
    Of several base rates the one with the best top-1 on a held-out tenth (by class, drawn from the seed) is taken, and
    the head trained again on all samples. Same seed, same head.
    """
    learned = list(views) if views else [inputs]
    count = len(labels)
    rates = settings.base_lr
    chosen: dict[str, float] = {"base_lr": rates[0]}
    if len(rates) > 1 and count >= 20:
        fit, held = split(labels, count, Seeded(seed), share=1 - HELD_OUT)
        heads = _trained(make, learned, labels, fit, settings, rates, seed, device, tell)
        right = [_top1(head_scores(h, inputs[held], device), labels[held]) for h in heads]
        best = max(range(len(rates)), key=lambda i: right[i])
        chosen = {"base_lr": rates[best], "held_out_top1": right[best]}
    everything = torch.arange(count)
    head = _trained(make, learned, labels, everything, settings, (chosen["base_lr"],), seed, device, tell)[0]
    return head, chosen


def _trained(
    make: Callable[[], nn.Module],
    views: list[Tensor],
    labels: Tensor,
    ids: Tensor,
    settings: HeadSettings,
    rates: Sequence[float],
    seed: int,
    device: torch.device | str,
    tell: Callable[[str], None] | None,
) -> list[nn.Module]:
    """One head for each rate, all from the same start and in one pass over the data."""
    heads = []
    for _ in rates:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            heads.append(make().to(device).train())
    batch = settings.batch(len(ids))
    each = max(len(ids) // batch, 1)
    optimizers = [_optimizer(h, settings) for h in heads]
    for epoch in range(settings.epochs):
        order = ids[Seeded(seed, epoch).uniform("order", (len(ids),)).argsort(stable=True)]
        view = views[epoch % len(views)]
        for i in range(each):
            part = order[i * batch : (i + 1) * batch]
            x, y = view[part].to(device).float(), labels[part].to(device)
            share = rate_at(epoch + i / each, settings)
            for head, optimizer, rate in zip(heads, optimizers, rates, strict=True):
                for group in optimizer.param_groups:
                    group["lr"] = share * rate * batch / 256
                optimizer.zero_grad(set_to_none=True)
                F.cross_entropy(head(x), y).backward()
                optimizer.step()
        if tell is not None:
            tell(f"probe: epoch {epoch + 1} of {settings.epochs}")
    return [h.eval() for h in heads]


def rate_at(epoch: float, settings: HeadSettings) -> float:
    """The share of the peak rate at a fractional epoch: linear from 0, then half a cosine to 0."""
    warmup = min(settings.warmup_epochs, settings.epochs / 2)
    if epoch < warmup:
        return epoch / warmup
    return 0.5 * (1 + math.cos(math.pi * (epoch - warmup) / (settings.epochs - warmup)))


def _optimizer(head: nn.Module, settings: HeadSettings) -> torch.optim.Optimizer:
    """Heads are small matrices: decay, if any, is theirs alone, as in the official probes."""
    groups = [
        {"params": [p for p in head.parameters() if p.ndim > 1], "weight_decay": settings.weight_decay},
        {"params": [p for p in head.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    if settings.optimizer == "lars":
        return Lars(groups, momentum=settings.momentum)
    return torch.optim.SGD(groups, lr=0.0, momentum=settings.momentum)


@torch.no_grad()
def head_scores(head: nn.Module, inputs: Tensor, device: torch.device | str = "cpu", chunk: int = 1024) -> Tensor:
    """Logits ``[M, K]`` float32 on the CPU; those of a head that diverged become 0."""
    head.eval()
    parts = [head(part.to(device).float()).float().cpu() for part in inputs.split(chunk)]
    return torch.cat(parts).nan_to_num(0.0, 0.0, 0.0)


def _top1(scores: Tensor, labels: Tensor) -> float:
    return float((scores.argmax(dim=1) == labels.cpu()).float().mean())
