"""``UserModel``: a whole model of anyone's, with what is needed to feed it, to save it and to make it again."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from unmask.contracts import Batch, Preprocessing
from unmask.errors import UserError
from unmask.official.reshaped import Surgery

Kind = Literal["image classifier", "text classifier", "causal lm", "image segmenter", "module"]
Family = Literal["timm", "torchvision", "transformers", "unmask", "module"]


@dataclass
class UserModel:
    """made: what makes the architecture again (arguments of timm or torchvision; empty for others). ``surgery``: what was cut
    from it since. ``logits`` always returns ``[B, K]`` (``[B, T, V]`` of a language model)."""

    module: nn.Module
    kind: Kind
    family: Family
    name: str
    classes: tuple[str, ...] | None = None
    preprocessing: Preprocessing | None = None
    tokenizer: Any | None = None
    made: dict[str, Any] = field(default_factory=dict)

    @property
    def surgery(self) -> Surgery:
        return getattr(self.module, "surgery", None) or Surgery()

    @property
    def device(self) -> torch.device:
        first = next(self.module.parameters(), None)
        return first.device if first is not None else torch.device("cpu")

    @property
    def text(self) -> bool:
        """Whether it reads tokens."""
        return self.kind in ("text classifier", "causal lm")

    def inputs(self, batch: Batch) -> dict[str, Tensor]:
        """What the module's forward is called with, by name (an image model's only input is named ``image``).

        Raises ``UserError`` where the batch lacks it: images as ``image [B, C, H, W]``, standardised; text as ``tokens
        [B, T]`` (or ``input_ids``) with ``attention_mask`` and ``token_type_ids`` where there are any.
        """
        if not self.text:
            if "image" not in batch:
                raise UserError(f"{self.name} takes images, this batch has {', '.join(batch) or 'nothing'}")
            return {"image": batch["image"].to(self.device)}
        tokens = batch.get("tokens", batch.get("input_ids"))
        if tokens is None:
            raise UserError(f"{self.name} takes tokens, this batch has {', '.join(batch) or 'nothing'}")
        kept = {"input_ids": tokens}
        kept |= {k: batch[k] for k in ("attention_mask", "token_type_ids") if batch.get(k) is not None}
        return {k: v.to(self.device) for k, v in kept.items()}

    def logits(self, batch: Batch) -> Tensor:
        """The scores of classes (or of next tokens), before any softmax."""
        return self.scores(**self.inputs(batch))

    def scores(self, **inputs: Tensor) -> Tensor:
        """The module's logits for what ``inputs`` gave."""
        if self.text and self.family == "unmask":
            return self.module.logits({"tokens": inputs["input_ids"], **inputs})  # type: ignore[operator]
        if self.text:
            no_cache = {"use_cache": False} if self.kind == "causal lm" else {}  # keys of a past that nobody asks for
            return _tensor(self.module(**inputs, **no_cache))
        image = inputs["image"]
        if self.family == "unmask" and hasattr(self.module, "logits"):
            return self.module.logits(image)  # type: ignore[operator]
        return _tensor(self.module(image))

    def example(self, batch: int = 2, length: int = 16) -> dict[str, Tensor]:
        """A made-up batch of the right shape: noise, or tokens below 100 without padding."""
        generator = torch.Generator().manual_seed(0)
        if self.text:
            size = int(getattr(getattr(self.module, "config", None), "vocab_size", 100))
            most = int(getattr(getattr(self.module, "config", None), "max_position_embeddings", length) or length)
            shape = (batch, min(length, most))
            tokens = torch.randint(1, min(size, 100), shape, generator=generator)
            return {"tokens": tokens.to(self.device), "attention_mask": torch.ones_like(tokens).to(self.device)}
        known = self.preprocessing or Preprocessing()
        image = torch.randn(batch, known.channels, *known.image_size, generator=generator)
        return {"image": image.to(self.device)}

    def eval(self) -> UserModel:
        self.module.eval()
        return self

    def save(self, folder: str | Path) -> Path:
        """Write the model so that ``open_model(folder)`` makes it again, whatever was cut from it. Raises ``UserError``."""
        from unmask.models.saving import save

        return save(self, Path(folder))

    def export_onnx(self, folder: str | Path) -> Path:
        """Write ``model.onnx``; onnxruntime's answers are compared with torch's first. Raises ``UserError``."""
        from unmask.models.onnx import export_onnx

        return export_onnx(self, Path(folder))


def _tensor(out: Any) -> Tensor:
    """The logits in whatever a forward returns."""
    if isinstance(out, Tensor):
        return out
    for name in ("logits", "class_queries_logits"):
        if isinstance(getattr(out, name, None), Tensor):
            return getattr(out, name)
    if isinstance(out, dict) and "out" in out:
        return out["out"]
    if isinstance(out, (tuple, list)) and out and isinstance(out[0], Tensor):
        return out[0]
    raise UserError(f"a model that returns {type(out).__name__} gives no scores: wrap it so that it returns a tensor")
