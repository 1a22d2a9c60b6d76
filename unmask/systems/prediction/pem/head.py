"""PEM without its backbone: four maps in, the queries' predictions out."""

from __future__ import annotations

from typing import Literal

from pydantic import model_validator
from torch import Tensor, nn

from unmask.config import Config, Field
from unmask.nn.norm import NormName
from unmask.systems.prediction.pem.pixel_decoder import PixelDecoder
from unmask.systems.prediction.pem.query_decoder import Predictions, QueryDecoder


class HeadConfig(Config):
    """Sizes and parts of pixel decoder and transformer decoder."""

    conv_dim: int = Field(128, ge=2, description="channels of the pixel decoder")
    hidden_dim: int = Field(256, ge=4, description="width of the queries")
    mask_dim: int = Field(256, ge=1, description="channels of the mask features")
    num_heads: int = Field(8, ge=1, description="heads; each picks a prototype of its own")
    ffn_dim: int = Field(2048, ge=1, description="inner width of the feed-forward networks")
    layers: int = Field(6, ge=1, description="layers of the transformer decoder")
    queries: int = Field(100, ge=1, description="queries: at most so many masks an image")
    attention: Literal["prototype", "masked"] = Field(
        "prototype", description="PEM's prototypes, or Mask2Former's masked attention (the baseline)"
    )
    normalise_over: Literal["queries", "channels"] = Field(
        "queries", description="axis of the norm inside the prototype attention; the authors' code takes the queries"
    )
    lift_mask: Literal["image", "query"] = Field(
        "image", description="an empty mask is lifted where all of an image's are empty (authors), or for each query"
    )
    attention_mask: bool = Field(
        True, description="look only inside the mask predicted before; the ablation: everywhere"
    )
    pre_norm: bool = Field(True, description="norms in front of self-attention and feed-forward network, or behind")
    enforce_input_projection: bool = Field(True, description="project memories even where conv_dim equals hidden_dim")
    csm: bool = Field(True, description="context-based self-modulation in the pixel decoder")
    deformable: bool = Field(True, description="deformable convolutions in the pixel decoder, or plain ones")
    norm: NormName = Field("bn", description="batch norm, or group norm, which trains with one image a step")

    @model_validator(mode="after")
    def _widths(self) -> HeadConfig:
        if self.hidden_dim % self.num_heads:
            fits = [h for h in range(1, self.hidden_dim + 1) if self.hidden_dim % h == 0]
            near = min(fits, key=lambda h: abs(h - self.num_heads))
            raise ValueError(f"num_heads={self.num_heads} does not divide hidden_dim={self.hidden_dim}: use {near}")
        if self.hidden_dim % 4:
            raise ValueError(
                f"hidden_dim={self.hidden_dim} must be divisible by 4, for sine and cosine of rows and columns: "
                f"use {-(-self.hidden_dim // 4) * 4}"
            )
        return self


class PEMHead(nn.Module):
    """``map_dims``: channels of the four maps, finest first; each map half as fine as the one before."""

    def __init__(self, config: HeadConfig, map_dims: tuple[int, ...], classes: int):
        super().__init__()
        c = config
        self.pixel_decoder = PixelDecoder(
            map_dims, c.conv_dim, c.mask_dim, norm=c.norm, modulate=c.csm, deformable=c.deformable
        )
        self.decoder = QueryDecoder(
            conv_dim=c.conv_dim,
            dim=c.hidden_dim,
            mask_dim=c.mask_dim,
            num_heads=c.num_heads,
            ffn_dim=c.ffn_dim,
            layers=c.layers,
            queries=c.queries,
            classes=classes,
            attention=c.attention,
            pre_norm=c.pre_norm,
            project=c.enforce_input_projection,
            use_masks=c.attention_mask,
            norm=c.norm,
            normalise_over=c.normalise_over,
            lift_mask=c.lift_mask,
        )

    def forward(self, maps: list[Tensor]) -> Predictions:
        features, memories = self.pixel_decoder(maps)
        return self.decoder(memories, features)
