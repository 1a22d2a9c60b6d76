"""Token dropping: a vision transformer that gets only the tokens with a visible pixel (timm's, torchvision's, transformers',
ours)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unmask.errors import UserError
from unmask.models import UserModel


def entrance(model: UserModel) -> tuple[nn.Module, int, tuple[int, int]] | None:
    """The module whose output is the sequence that enters the blocks (positions added), how many tokens before the patches it has,
    and the pixels of a patch; None for a network that cannot drop tokens."""
    module: Any = model.module
    if model.family == "timm" or type(module).__module__.startswith("timm."):
        from timm.models.vision_transformer import VisionTransformer

        if isinstance(module, VisionTransformer):
            return module.patch_drop, int(module.num_prefix_tokens), _pair(module.patch_embed.patch_size)
        return None
    from torchvision.models import VisionTransformer as OfTorchvision

    if isinstance(module, OfTorchvision):
        return module.encoder.dropout, 1, _pair(module.patch_size)
    config = getattr(module, "config", None)
    for place in ("vit", "deit"):
        inner = getattr(module, place, None)
        if model.family == "transformers" and inner is not None and hasattr(inner, "embeddings"):
            prefix = 2 if hasattr(inner.embeddings, "distillation_token") else 1
            return inner.embeddings, prefix, _pair(config.patch_size)  # type: ignore[union-attr]
    return None


def drops(model: UserModel) -> bool:
    """Whether tokens of the model can be dropped."""
    encoder = getattr(model.module, "encoder", None)
    return bool(getattr(encoder, "can_drop", False)) or entrance(model) is not None


class TokenDropping:
    """A token is kept if any of its pixels is visible. Images with equally many kept tokens go through together.

    An image without any visible pixel is answered as a grey one. Raises ``UserError`` for a network that needs every token.
    """

    def __init__(self, model: UserModel):
        self.model = model
        self.encoder: Any = getattr(model.module, "encoder", None)
        self.ours = bool(getattr(self.encoder, "can_drop", False))
        self.entrance = None if self.ours else entrance(model)
        if not self.ours and self.entrance is None:
            raise UserError(
                f"{model.name} needs every token or pixel, it cannot drop any: token_dropping is for plain vision transformers; "
                "layer_masking is for convolutional networks, grey for any model"
            )
        self.patch = _pair(self.encoder.patch_size if self.ours else self.entrance[2])  # type: ignore[index]

    def __call__(self, images: Tensor, visible: Tensor) -> Tensor:
        visible = visible if visible.ndim == 4 else visible[:, None]
        kept = F.max_pool2d(visible.float(), self.patch, self.patch).flatten(1) > 0
        kept = kept.expand(len(images), -1)
        counts = kept.sum(dim=1)
        out: Tensor | None = None
        for count in counts.unique().tolist():
            rows = (counts == count).nonzero().flatten()
            if count == 0:
                logits = self.model.scores(image=torch.zeros_like(images[rows]))
            else:
                ids = kept[rows].float().argsort(dim=1, descending=True, stable=True)[:, :count].sort(dim=1).values
                logits = self._with(images[rows], ids, whole=count == kept.shape[1])
            out = logits.new_zeros(len(images), logits.shape[1]) if out is None else out
            out = out.index_copy(0, rows, logits)
        assert out is not None
        return out

    def _with(self, images: Tensor, keep: Tensor, whole: bool) -> Tensor:
        if whole:
            return self.model.scores(image=images)
        if self.ours:
            return self._ours(images, keep)
        assert self.entrance is not None
        place, prefix, _ = self.entrance

        def select(_module: nn.Module, _inputs: Any, out: Any) -> Any:
            if not isinstance(out, Tensor):
                raise UserError(f"{self.model.name}: its embeddings give {type(out).__name__}, no sequence of tokens")
            first = out[:, :prefix]
            rest = out[:, prefix:].gather(1, keep[:, :, None].expand(-1, -1, out.shape[2]))
            return torch.cat((first, rest), dim=1)

        hook = place.register_forward_hook(select)
        try:
            return self.model.scores(image=images)
        finally:
            hook.remove()

    def _ours(self, images: Tensor, keep: Tensor) -> Tensor:
        system: Any = self.model.module
        tokens = self.encoder.tokens(images, keep=keep)
        by_class = getattr(getattr(system, "config", None), "pool", "mean") == "cls"
        pooled = tokens[:, 0] if by_class else tokens[:, self.encoder.prefix_tokens :].mean(dim=1)
        if getattr(system, "fc_norm", None) is not None:
            pooled = system.fc_norm(pooled)
        return system.head(pooled)


def _pair(value: Any) -> tuple[int, int]:
    return (int(value), int(value)) if isinstance(value, int) else (int(value[0]), int(value[1]))
