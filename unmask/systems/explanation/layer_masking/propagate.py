"""``LayerMasked``: any convolutional classifier, its own weights and code, answering for what a mask leaves visible."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from unmask.errors import UserError
from unmask.models import UserModel, open_model
from unmask.systems.explanation.layer_masking.masked_map import CLEAN, LAZY, RAW, MaskedMap, Rules, as_it_is, wrap
from unmask.systems.explanation.layer_masking.visible import Visible

OLDER = ("AlexNet", "SqueezeNet", "Fire")  # whose masked layers in the authors' code are of the older variant
PLAIN_POOL = ("DenseNet",)
NORMS_OVER_PLACES = (nn.GroupNorm, nn.InstanceNorm2d, nn.LocalResponseNorm)
NOT_KNOWN = (*NORMS_OVER_PLACES, nn.ConvTranspose2d, nn.Conv3d, nn.RNNBase, nn.Fold, nn.Unfold)


def rules_for(module: nn.Module, **given: Any) -> Rules:
    """The rules of a network: those given, and for the rest what its family has in the authors' code."""
    names = {type(m).__name__ for m in module.modules()}
    found: dict[str, Any] = {}
    if names & set(OLDER):
        found["variant"] = "older"
    if names & set(PLAIN_POOL):
        found["global_pool"] = "plain"
    return Rules(**{**found, **{k: v for k, v in given.items() if v is not None}})


def is_transformer(module: nn.Module) -> bool:
    """Whether some of its parts attend: attention has heads, a gate of channels has none."""
    return any(
        isinstance(m, nn.MultiheadAttention) or isinstance(getattr(m, "num_heads", None), int) for m in module.modules()
    )


def check(module: nn.Module, name: str = "") -> None:
    """Raises ``UserError`` for what layer masking cannot go through, naming it."""
    name = name or type(module).__name__
    training = next((n for n, m in module.named_modules() if m.training), None)
    if training is not None:
        where = f" (in {training})" if training else ""
        raise UserError(f"layer masking is for inference, {name} is in training mode{where}: call model.eval() first")
    if is_transformer(module):
        raise UserError(
            f"{name} has attention, which mixes all places: layer masking is for convolutional networks; "
            "a vision transformer hides tokens instead: method token_dropping (or grey, which works with any model)"
        )
    for place, part in module.named_modules():
        if isinstance(part, NOT_KNOWN):
            why = ", whose statistics would include hidden zeros" if isinstance(part, NORMS_OVER_PLACES) else ""
            raise UserError(
                f"layer masking has no rule for {type(part).__name__} ({place}){why}; it knows Conv2d, Linear, BatchNorm2d, "
                "LayerNorm over channels, activations, pools and squeeze-and-excitation; grey, black, blur work with any model"
            )


class LayerMasked:
    """``LayerMasked(model)(images, visible) -> logits [B, K]``.

    model: an ``nn.Module`` or a ``UserModel``; its state dict and its tensors are never changed. images: standardised ``[B, C, H,
    W]``; visible: ``[B or 1, 1, H, W]`` (or without the 1), ones and zeros. What stands at hidden pixels has no influence. Where
    nothing is visible the answer is the classifier's bias. Raises ``UserError`` for a model with a layer that has no rule.
    """

    def __init__(self, model: nn.Module | UserModel, rules: Rules | None = None, **given: Any):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.model = open_model(model)
        self.rules = rules or rules_for(self.model.module, **given)
        check(self.model.module, self.model.name)

    def __call__(self, images: Tensor, visible: Tensor) -> Tensor:
        out = self.model.scores(image=masked(images, visible, self.rules))
        if isinstance(out, MaskedMap):
            raise UserError(f"{self.model.name} gives a map for each place, no scores of classes: give a classifier")
        return out

    def verify(self, image: Tensor) -> None:
        """Raises ``UserError`` unless an image ``[1, C, H, W]`` that is all visible gets the answer of the plain network: a model
        that changes tensors in place, aside of what its layers return, would not."""
        with torch.no_grad():
            ours = self(image, torch.ones_like(image[:, :1]))
            theirs = self.model.scores(image=image)
        gap, size = float((ours - theirs).abs().max()), float(theirs.abs().max())
        if gap > 1e-3 * max(size, 1e-3):
            raise UserError(
                f"layer masking does not follow {self.model.name}: with all visible its answers differ by {gap:.3g} "
                "(does a layer change a tensor in place without returning it?): use grey, black or blur"
            )


def masked(x: Tensor, visible: Tensor | Visible, rules: Rules | None = None, *, hide: bool = True) -> MaskedMap:
    """A tensor ``[B, C, H, W]`` with its mask, to be handed to any module. hide: multiply by the mask first (else what stands at
    hidden places counts until a layer takes it away)."""
    mask = visible if isinstance(visible, Visible) else Visible.of(visible, x)
    return wrap(x, mask, LAZY if hide else RAW, rules or Rules())


def values(x: MaskedMap | Tensor) -> tuple[Tensor, Tensor | None]:
    """What a layer gave: its values, and its mask ``[B or 1, 1, H, W]`` (None of a plain tensor)."""
    if not isinstance(x, MaskedMap):
        return x, None
    with torch._C.DisableTorchFunctionSubclass():
        return as_it_is(x).as_subclass(Tensor), x.visible.map


__all__ = ["CLEAN", "LayerMasked", "Rules", "masked", "rules_for", "values"]
