"""timm's plain vision transformers, with hidden tokens dropped or replaced."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from unmask.backbones.timm.model import TimmConfig, TimmEncoder
from unmask.draw import Draw
from unmask.nn.patch import replace_hidden, select


class TimmViT(TimmEncoder):
    """``timm.models.VisionTransformer``: class, distillation and register tokens stand in front and are never dropped."""

    can_drop = True

    def __init__(self, model: nn.Module, config: TimmConfig):
        super().__init__(model, config)
        self.can_replace = True
        depth = len(model.blocks)  # type: ignore[arg-type]
        self.out_indices = config.out_indices or (depth - 1,)
        self.strides = (self.patch_size[-1],) * len(self.out_indices)
        self.map_dims = (self.embed_dim,) * len(self.out_indices)

    def tokens(
        self,
        x: Tensor,
        *,
        keep: Tensor | None = None,
        hidden: Tensor | None = None,
        mask_token: Tensor | None = None,
        draw: Draw | None = None,
    ) -> Tensor:
        with self.draws.of(draw, x):
            last = len(self.model.blocks) - 1  # type: ignore[arg-type]
            return self._outputs(x, (last,), keep, hidden, mask_token)[0]

    def maps(self, x: Tensor, *, draw: Draw | None = None) -> list[Tensor]:
        with self.draws.of(draw, x):
            return [self._map(t, x) for t in self._outputs(x, self.out_indices, None, None, None)]

    def _outputs(
        self,
        x: Tensor,
        wanted: tuple[int, ...],
        keep: Tensor | None,
        hidden: Tensor | None,
        mask_token: Tensor | None,
    ) -> list[Tensor]:
        vit: Any = self.model
        self.grid(x.shape[2:])
        x = vit.patch_embed(x)  # [B, h, w, D]: with dynamic sizes timm flattens later
        if hidden is not None:
            if mask_token is None:
                raise ValueError("hidden needs mask_token")
            shape = x.shape
            x = replace_hidden(x.reshape(shape[0], -1, shape[-1]), hidden, mask_token).reshape(shape)
        x = vit._pos_embed(x)
        if keep is not None:
            first = self.prefix_tokens
            x = torch.cat((x[:, :first], select(x[:, first:], keep)), dim=1)
        x = vit.norm_pre(x)
        outputs = []
        for i, block in enumerate(vit.blocks):
            x = block(x)
            if i in wanted:
                outputs.append(self._normed(x))
        return outputs

    def _normed(self, x: Tensor) -> Tensor:
        # models that pool before their norm keep it behind the pooling, as fc_norm: tokens are normed by it all the same
        norm = self.model.norm if not isinstance(self.model.norm, nn.Identity) else self.model.fc_norm
        return norm(x)
