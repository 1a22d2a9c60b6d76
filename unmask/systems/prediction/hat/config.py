"""The options of HAT: sizes, the network, what it learns from."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import model_validator

from unmask.config import Config, Field

SIZES: dict[str, dict[str, Any]] = {
    "hat_s": {"embed_dim": 144, "depths": (6,) * 6, "num_heads": 6, "compress_ratio": 24, "squeeze_factor": 24},
    "hat": {"embed_dim": 180, "depths": (6,) * 6, "num_heads": 6, "compress_ratio": 3, "squeeze_factor": 30},
    "hat_l": {"embed_dim": 180, "depths": (6,) * 12, "num_heads": 6, "compress_ratio": 3, "squeeze_factor": 30},
}


class Adversarial(Config):
    """The second stage of real-world training: perceptual loss and a U-Net discriminator (Real-ESRGAN, Wang et al. 2021)."""

    pixel_weight: float = Field(1.0, ge=0, description="weight of the L1 loss")
    perceptual_weight: float = Field(1.0, ge=0, description="weight of the VGG-19 feature loss; 0: no VGG is needed")
    gan_weight: float = Field(0.1, ge=0, description="weight of the generator's adversarial loss")
    num_feat: int = Field(64, ge=1, description="width of the discriminator's first convolution")
    skip_connection: bool = Field(True, description="the discriminator adds what went down to what comes up")
    vgg_weights: str | None = Field(
        None, description="file of torchvision's VGG-19 weights; open: torchvision's own download"
    )


class HATConfig(Config):
    """The network's defaults are the paper's HAT x4."""

    size: Literal["hat_s", "hat", "hat_l"] = Field("hat", description="a published size; single options win over it")
    scale: int = Field(
        4, description="how many times larger each side becomes: 3 or a power of two; 1 with upsampler=none"
    )
    upsampler: Literal["pixelshuffle", "none"] = Field(
        "pixelshuffle", description="pixelshuffle: super-resolution; none: same size (noise, JPEG artefacts)"
    )
    in_channels: int | None = Field(None, ge=1, description="3 colour, 1 grey; open: from the data, else 3")
    image_size: int | tuple[int, int] = Field(
        64,
        description="side of the training input in pixels; ape ties the network to it, one window switches shifts off",
    )
    embed_dim: int = Field(180, ge=1, description="width (D)")
    depths: tuple[int, ...] = Field((6,) * 6, min_length=1, description="hybrid blocks of each group")
    num_heads: int | tuple[int, ...] = Field(6, description="attention heads, of all groups or of each")
    window_size: int = Field(16, ge=1, description="side of an attention window (w)")
    compress_ratio: int = Field(3, ge=1, description="narrowing inside the channel attention (beta)")
    squeeze_factor: int = Field(30, ge=1, description="narrowing of its gate (gamma)")
    conv_scale: float = Field(0.01, description="weight of the channel attention beside the window attention (alpha)")
    overlap_ratio: float = Field(0.5, ge=0, description="how much wider windows of keys are (rho)")
    mlp_ratio: float = Field(2.0, gt=0, description="hidden width of the perceptrons over D")
    qkv_bias: bool = Field(True, description="a bias on queries, keys and values")
    qk_scale: float | None = Field(None, description="factor on queries x keys; open: 1 / sqrt(head width)")
    patch_norm: bool = Field(True, description="a LayerNorm before the first group")
    ape: bool = Field(False, description="learned absolute positions; the input's size is then fixed")
    drop_path_rate: float = Field(0.1, ge=0, lt=1, description="stochastic depth, rising from 0 to this")
    resi_connection: Literal["1conv", "identity"] = Field("1conv", description="what ends a group and the body")
    img_range: float = Field(1.0, gt=0, description="factor on the pixels inside the network (R)")
    reconstruction_dim: int = Field(64, ge=1, description="channels of the reconstruction")
    residual: Literal["none", "bicubic"] = Field(
        "none", description="bicubic: the network learns what bicubic misses, and starts as bicubic (short trainings)"
    )
    channel_attention: bool = Field(True, description="the channel attention beside the windows (CAB)")
    overlapping_attention: bool = Field(True, description="the overlapping attention that ends a group (OCAB)")
    adversarial: Adversarial | None = Field(None, description="second stage of real-world training; open: L1 alone")
    init: str | None = Field(
        None,
        description="a run, a folder or an official file to start from; another scale keeps all but its last layers",
    )

    @model_validator(mode="before")
    @classmethod
    def _a_size_fills_in(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        if values.get("adversarial") is True:
            values = {**values, "adversarial": {}}
        if values.get("adversarial") is False:
            values = {**values, "adversarial": None}
        own = SIZES.get(values.get("size", "hat"), {})
        return {**own, **values}

    @model_validator(mode="after")
    def _fits_together(self) -> HATConfig:
        if self.upsampler == "none" and self.scale != 1:
            raise ValueError(f"scale={self.scale} does not fit upsampler=none, which keeps the size: use scale=1")
        # the published head without a shuffle exists, too, but who asks for scale=1 alone hardly means it
        if self.scale == 1 and "upsampler" not in self.model_fields_set:
            raise ValueError("scale=1 must be 2, 3, 4 or 8: use upsampler=none")
        if self.scale != 3 and (self.scale < 1 or self.scale & (self.scale - 1)):
            raise ValueError(f"scale={self.scale} must be 2, 3, 4 or 8 (or a larger power of two)")
        if self.embed_dim % min(self.heads, default=1) or any(h < 1 or self.embed_dim % h for h in self.heads):
            raise ValueError(f"num_heads={self.num_heads} does not divide embed_dim={self.embed_dim}")
        if len(self.heads) != len(self.depths):
            raise ValueError(
                f"num_heads={self.num_heads} has {len(self.heads)} groups, depths={self.depths} has {len(self.depths)}"
            )
        if min(self.depths) < 1:
            raise ValueError(f"depths={self.depths} must be at least 1 each")
        if self.overlapping_attention and int(self.window_size * self.overlap_ratio) % 2:
            even = max(round(self.window_size * self.overlap_ratio / 2) * 2, 2) / self.window_size
            raise ValueError(
                f"window_size={self.window_size} x overlap_ratio={self.overlap_ratio} is "
                f"{int(self.window_size * self.overlap_ratio)} pixels, which must be even: use overlap_ratio={even:g}"
            )
        if min(self.training_size) < self.window_size:
            raise ValueError(f"image_size={self.image_size} is smaller than window_size={self.window_size}")
        for name, value in (("compress_ratio", self.compress_ratio), ("squeeze_factor", self.squeeze_factor)):
            if self.channel_attention and value > self.embed_dim:
                raise ValueError(f"{name}={value} leaves no channel of embed_dim={self.embed_dim}")
        return self

    @property
    def heads(self) -> tuple[int, ...]:
        """Heads of each group."""
        return (self.num_heads,) * len(self.depths) if isinstance(self.num_heads, int) else self.num_heads

    @property
    def training_size(self) -> tuple[int, int]:
        """(height, width) of the training input."""
        return (self.image_size, self.image_size) if isinstance(self.image_size, int) else self.image_size
