"""Networks that turn inputs into tokens or maps, behind one interface (:class:`unmask.contracts.Encoder`).

``build("vit_small_patch16", image_size=224)`` makes an encoder by name; which folder answers to a name stands in the
folders' cards.
"""

from __future__ import annotations

from typing import Any

from pydantic import ConfigDict, model_validator

from unmask.catalog import backbone_card, load_entry
from unmask.config import Config, Field
from unmask.contracts import DataFacts, Encoder

__all__ = ["BackboneConfig", "build", "build_encoder"]


class BackboneConfig(Config):
    """A backbone by name, and any option of its family (``backbone.depth=4``); a bare name is enough."""

    model_config = ConfigDict(extra="allow")  # the family's own Config refuses what it does not know

    name: str = Field("vit_base_patch16", description="vit_small_patch16, swin_tiny, timm/resnet18 ...")
    image_size: int | tuple[int, int] | None = Field(None, description="pixels (height, width); from the data if open")
    in_channels: int | None = Field(None, ge=1, description="channels of the input; from the data if open")

    @model_validator(mode="before")
    @classmethod
    def _name_alone(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value

    @property
    def options(self) -> dict[str, Any]:
        """Everything but the name, without what was left open."""
        return {k: v for k, v in self.model_dump().items() if k != "name" and v is not None}

    def fitted(self, facts: DataFacts) -> BackboneConfig:
        """With the data's image size and channels wherever these were left open."""
        size = self.image_size if self.image_size is not None else facts.image_size
        channels = self.in_channels if self.in_channels is not None else facts.channels
        return self.model_copy(update={"image_size": size, "in_channels": channels})


def build(name: str, **options: Any) -> Encoder:
    """An encoder by name. Raises ``UserError`` for unknown names and options, with the nearest known ones."""
    encoder: Encoder = load_entry(backbone_card(name).build)(name, **options)
    encoder.name, encoder.options = name, options
    return encoder


def build_encoder(config: BackboneConfig) -> Encoder:
    """An encoder from its config."""
    return build(config.name, **config.options)
