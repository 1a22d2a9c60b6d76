"""Anyone's whole models: opened by a word, fed with a batch, saved so that others read them.

    model = open_model("timm/vit_tiny_patch16_224", pretrained=False, classes=10)
    scores = model.logits({"image": images})     # standardised [B, C, H, W] -> [B, K]
    model.save("folder")                         # open_model("folder") and unmask.load("folder") take it

A word is a run or an export of ours, ``timm/NAME``, ``torchvision/NAME``, a folder of transformers (BERT, GPT-2, LLaMA and
their kin), a folder that ``save`` wrote, or a module itself.
"""

from __future__ import annotations

from unmask.models.opening import open_model
from unmask.models.user import UserModel

__all__ = ["UserModel", "open_model"]
