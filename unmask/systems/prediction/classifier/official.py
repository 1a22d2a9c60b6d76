"""Published classifiers with a plain vision transformer: MAE's fine-tuned files, DeiT's and timm's, by rules.

MAE's ``mae_finetuned_vit_*`` hold ``fc_norm`` and no ``norm``: the mean of the patch tokens is classified. Files with
``norm`` classify the class token.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from unmask.config import validated
from unmask.errors import UserError
from unmask.official.load import Rule, load_strict, rename
from unmask.systems.prediction.classifier.model import Classifier

OPTIONS = ("num_heads", "classes")
HEADS = {192: 3, 384: 6, 768: 12, 1024: 16, 1280: 16}
RULES = [Rule(r"^(cls_token|pos_embed|patch_embed|blocks|norm)\b", r"encoder.\1")]


def load_official(state: Mapping[str, Tensor], options: Mapping[str, Any] | None = None) -> Classifier:
    """The classifier with the file's weights; its sizes are read off the tensors.

    options: what tensors do not tell: ``num_heads``, ``classes`` (their names). Raises ``UserError`` when the state is of
    something else.
    """
    for name in ("patch_embed.proj.weight", "blocks.0.attn.qkv.weight", "pos_embed", "head.weight"):
        if name not in state:
            raise UserError(f"classifier: these are not the weights of a classifying vision transformer (no {name})")
    config = validated(Classifier.Config, described(state, dict(options or {})), where="classifier")
    model = Classifier(config)
    load_strict(model, rename(state, RULES), where="classifier checkpoint")
    return model.eval()


def described(state: Mapping[str, Tensor], options: dict[str, Any]) -> dict[str, Any]:
    """Our options from the tensors."""
    width, channels, *patch = state["patch_embed.proj.weight"].shape
    prefix = 1 if "cls_token" in state else 0
    side = math.isqrt(state["pos_embed"].shape[1] - prefix)
    by_mean = "fc_norm.weight" in state
    backbone = {
        "name": f"vit_base_patch{patch[0]}",
        "image_size": [side * p for p in patch],
        "patch_size": list(patch),
        "in_channels": channels,
        "embed_dim": width,
        "depth": 1 + max(int(k.split(".")[1]) for k in state if k.startswith("blocks.")),
        "num_heads": options.pop("num_heads", HEADS.get(width, max(width // 64, 1))),
        "mlp_ratio": state["blocks.0.mlp.fc1.weight"].shape[0] / width,
        "qkv_bias": "blocks.0.attn.qkv.bias" in state,
        "class_token": bool(prefix),
        "position": "learned",
    }
    classes = len(state["head.weight"])
    return {
        "classes": classes,
        **options,
        "backbone": backbone,
        "pool": "mean" if by_mean else "cls",
        "fc_norm": by_mean,
    }
