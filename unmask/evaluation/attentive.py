"""The attentive probe: one learned query looks at all frozen tokens (Chen et al., "Context Autoencoder", IJCV 2023).

Linear probes read the mean of the tokens, which masked pre-training never asked to be good; a query that chooses where to
look reads what the tokens hold.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from unmask.evaluation.training import HeadSettings, head_scores, train_heads
from unmask.nn.attention import attend

SETTINGS = HeadSettings(optimizer="sgd", base_lr=(0.03, 0.1, 0.3, 1.0), epochs=30, warmup_epochs=3)


class AttentiveHead(nn.Module):
    """``[B, L, D]`` -> ``[B, classes]``: a query attends to the tokens once; BatchNorm without affine part; Linear.

    query 0 at the start; a LayerNorm each for query, keys and values; separate projections, biases for queries and
    values only; no residual, no MLP.
    """

    def __init__(self, dim: int, classes: int, num_heads: int, norm_eps: float = 1e-6, std: float = 0.01):
        super().__init__()
        self.num_heads = num_heads
        self.query = nn.Parameter(torch.zeros(1, 1, dim))
        self.norm_q, self.norm_k, self.norm_v = (nn.LayerNorm(dim, eps=norm_eps) for _ in range(3))
        self.q, self.k, self.v = nn.Linear(dim, dim), nn.Linear(dim, dim, bias=False), nn.Linear(dim, dim)
        self.proj = nn.Linear(dim, dim)
        for linear in (self.q, self.k, self.v, self.proj):
            nn.init.trunc_normal_(linear.weight, std=0.02)
            if linear.bias is not None:
                nn.init.zeros_(linear.bias)
        self.norm = nn.BatchNorm1d(dim, affine=False)
        self.linear = nn.Linear(dim, classes)
        nn.init.trunc_normal_(self.linear.weight, std=std)
        nn.init.zeros_(self.linear.bias)

    def pooled(self, tokens: Tensor) -> Tensor:
        """``[B, D]``, the answer to the query."""
        query = self.q(self.norm_q(self.query)).expand(len(tokens), -1, -1)
        key, value = self.k(self.norm_k(tokens)), self.v(self.norm_v(tokens))
        heads = (x.unflatten(2, (self.num_heads, -1)).transpose(1, 2) for x in (query, key, value))
        return self.proj(attend(*heads).transpose(1, 2).flatten(2))[:, 0]

    def forward(self, tokens: Tensor) -> Tensor:
        return self.linear(self.norm(self.pooled(tokens)))


def heads_for(dim: int, encoder: nn.Module | None = None) -> int:
    """The encoder's own number of heads where it says it, else one head for about 64 channels; always a divisor."""
    wanted = getattr(getattr(encoder, "config", None), "num_heads", None) or max(dim // 64, 1)
    wanted = wanted[-1] if isinstance(wanted, (tuple, list)) else int(wanted)
    return max(h for h in range(1, wanted + 1) if dim % h == 0)


def attentive(
    train_tokens: Tensor,
    train_labels: Tensor,
    test_tokens: Tensor,
    *,
    classes: int,
    num_heads: int | None = None,
    settings: HeadSettings = SETTINGS,
    seed: int = 0,
    device: torch.device | str = "cpu",
    tell: Callable[[str], None] | None = None,
) -> tuple[Tensor, dict[str, float]]:
    """Scores ``[M, K]`` of the test samples and the chosen rate. Tokens: ``[N, L, D]``, kept in any float type.

    The learning rate is the best of the settings' on a tenth of the training samples held out.
    """
    dim = train_tokens.shape[-1]

    def make() -> nn.Module:
        return AttentiveHead(dim, classes, num_heads or heads_for(dim))

    head, chosen = train_heads(make, train_tokens, train_labels, settings, seed=seed, device=device, tell=tell)
    return head_scores(head, test_tokens, device), chosen
