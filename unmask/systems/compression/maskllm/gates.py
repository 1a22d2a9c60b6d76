"""Learnable masks: a categorical distribution over the candidates of every group (Fang et al. 2024, arXiv:2409.17481)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from unmask.draw import Draw, gumbel
from unmask.errors import UserError
from unmask.systems.compression.maskllm.patterns import candidates


class MaskGate(nn.Module):
    """Logits ``gate [out * in / group, K]``, float32 whatever the model's type, and the masks they stand for.

    Raises ``UserError`` where the group does not divide the inputs.
    """

    def __init__(
        self, out_features: int, in_features: int, keep: int, group: int, *, layer: str = "", std: float = 0.01
    ):
        super().__init__()
        if in_features % group:
            raise UserError(
                f"{layer or 'a layer'} has {in_features} inputs, which groups of {group} do not divide: leave it out"
            )
        self.shape, self.keep, self.group, self.std = (out_features, in_features), keep, group, std
        options = candidates(keep, group)
        self.gate = nn.Parameter(torch.empty(out_features * in_features // group, len(options)))
        self.options: Tensor
        self.register_buffer("options", options, persistent=False)
        nn.init.normal_(self.gate, std=std)

    @torch.no_grad()
    def add_prior(self, prior: Tensor, strength: float) -> None:
        """Lean towards a 0/1 mask ``[out, in]``: each candidate by how many kept places it shares, in units of the logits' spread
        over the layer (unbiased, before the addition)."""
        agreement = prior.reshape(-1, self.group).to(self.gate) @ self.options.T
        self.gate += (agreement - 1) * self.gate.std() * strength

    def sampled(self, noise: Tensor, scale: float, temperature: float, *, hard: bool = False) -> Tensor:
        """A mask ``[out, in]`` with gradient: softmax((gate * scale + noise) / temperature) over the candidates; values in 0 ... 1
        that sum to ``keep`` a group. hard: the likeliest candidate, with the soft one's gradient. noise: standard Gumbel,
        ``[groups, K]``."""
        # [K, groups]: a softmax over the first axis reads memory in order
        chances = ((self.gate.T * scale + noise.T) / temperature).softmax(dim=0)
        if hard:
            one = F.one_hot(chances.argmax(dim=0), len(chances)).T.to(chances)
            chances = one + (chances - chances.detach())  # exactly one, with the gradient of the chances
        return (self.options.T @ chances).T.reshape(self.shape)

    @torch.no_grad()
    def final(self) -> Tensor:
        """The likeliest mask, float32 ``[out, in]`` of zeros and ones; of equal logits the first candidate."""
        return self.options[self.gate.argmax(dim=1)].reshape(self.shape)

    @torch.no_grad()
    def certainty(self, scale: float, temperature: float) -> Tensor:
        """The mean over groups of the largest chance, without noise: near 1 the masks are decided."""
        return (self.gate * (scale / temperature)).softmax(dim=1).amax(dim=1).mean()


class MaskedLinear(nn.Module):
    """A linear layer whose weight is multiplied by a mask of its gate: sampled by :meth:`draw_mask` in training, the likeliest
    otherwise.

    ``weight`` is what everyone sees, also an attention that reads it instead of calling the layer: the masked weight, ``[out,
    in]``, or ``[in, out]`` of a transformers ``Conv1D``; groups lie along the inputs. The parameter of that name is ``dense``.
    """

    def __init__(self, linear: nn.Module, keep: int, group: int, *, layer: str = "", std: float = 0.01):
        super().__init__()
        self._parameters["weight"] = linear.weight  # type: ignore[assignment]  # the name is taken by the property below
        self.bias: nn.Parameter | None = linear.bias  # type: ignore[assignment]
        self.layer = layer
        self.transposed = not isinstance(linear, nn.Linear)
        out_features, in_features = self.matrix.shape
        self.in_features, self.out_features = in_features, out_features
        self.diff_mask = MaskGate(out_features, in_features, keep, group, layer=layer, std=std)
        self.current: Tensor | None = None  # this step's mask
        self.fixed: Tensor | None = None  # a masked weight to use instead, [out, in]

    @property
    def dense(self) -> nn.Parameter:
        """The weight without its mask."""
        weight = self._parameters["weight"]
        assert weight is not None
        return weight

    @property
    def matrix(self) -> Tensor:
        """The weight without its mask, as ``[out, in]``."""
        return self.dense.T if self.transposed else self.dense

    @property
    def masked(self) -> Tensor:
        """The weight that is used, ``[out, in]``."""
        if self.fixed is not None:
            return self.fixed.to(self.dense.dtype)
        mask = self.current if self.training and self.current is not None else self.diff_mask.final()
        return self.matrix * mask.to(self.dense.dtype)

    @property
    def weight(self) -> Tensor:
        return self.masked.T if self.transposed else self.masked

    def draw_mask(self, draw: Draw, scale: float, temperature: float, *, hard: bool, recompute: bool) -> Tensor:
        """Sample this step's mask, from the noise ``<layer>``; returns it. recompute: save memory, not time."""
        gate = self.diff_mask
        noise = gumbel(draw, self.layer, tuple(gate.gate.shape), device=gate.gate.device, shared=True)
        if recompute and torch.is_grad_enabled():
            self.current = checkpoint(gate.sampled, noise, scale, temperature, hard=hard, use_reentrant=False)
        else:
            self.current = gate.sampled(noise, scale, temperature, hard=hard)
        return self.current

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.masked, self.bias)
