"""The hybrid attention transformer's network, without losses and data. Chen et al. 2023, section 3.

Maps are kept as ``[B, h, w, D]`` throughout: tokens are a view of them, and so is what a convolution wants with its channels
last, so nothing is moved between the two. Legend: w the side of a window, W of an overlapping window.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from unmask.data.bicubic import resize_bicubic
from unmask.draw import Draw
from unmask.errors import UserError
from unmask.nn.block import Mlp, drop_path, drop_path_rates
from unmask.nn.windows import cut, overlapping_attention, overlapping_index, window_attention, window_index

if TYPE_CHECKING:
    from unmask.systems.prediction.hat.config import HATConfig

MEAN = (0.4488, 0.4371, 0.4040)  # of DIV2K, red green blue


def convolved(conv: nn.Module, x: Tensor) -> Tensor:
    """A convolution of ``[B, h, w, C]``; its channels lie last, as the convolution likes them."""
    return conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


def conv3(inside: int, outside: int) -> nn.Conv2d:
    return nn.Conv2d(inside, outside, 3, padding=1)


class ChannelAttention(nn.Module):
    """CAB: two convolutions through a narrow middle, then a gate a channel from the mean of the whole map. Section 3.2.

    ``forward(x [B, h, w, D])`` gives ``[B, h, w, D]`` times ``scale``, which is multiplied into the gate.
    """

    def __init__(self, dim: int, compress_ratio: int, squeeze_factor: int, scale: float):
        super().__init__()
        self.scale = scale
        self.compress, self.expand = conv3(dim, dim // compress_ratio), conv3(dim // compress_ratio, dim)
        self.squeeze = nn.Conv2d(dim, dim // squeeze_factor, 1)
        self.excite = nn.Conv2d(dim // squeeze_factor, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.expand(F.gelu(self.compress(x.permute(0, 3, 1, 2))))
        gate = self.excite(F.relu(self.squeeze(x.mean(dim=(2, 3), keepdim=True)))).sigmoid()
        return (x * (gate * self.scale)).permute(0, 2, 3, 1)


class BiasTable(nn.Module):
    """An attention with a learned table of biases; in evaluation the gathered biases are kept until the table changes."""

    def __init__(self, config: HATConfig, heads: int, rows: int):
        super().__init__()
        dim = config.embed_dim
        self.num_heads, self.window, self.scale = heads, config.window_size, config.qk_scale or (dim // heads) ** -0.5
        self.relative_position_bias_table = nn.Parameter(torch.zeros(rows, heads))
        nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)
        self.qkv, self.proj = nn.Linear(dim, 3 * dim, bias=config.qkv_bias), nn.Linear(dim, dim)
        self._kept: tuple[tuple[object, ...], Tensor] | None = None

    def index(self, device: torch.device) -> Tensor:
        """int64 ``[K, M]`` rows of the table."""
        raise NotImplementedError

    def bias(self) -> Tensor:
        """``[heads, K, M]``."""
        table = self.relative_position_bias_table
        key = (table._version, table.data_ptr(), table.device, table.dtype)
        if not torch.is_grad_enabled() and self._kept is not None and self._kept[0] == key:
            return self._kept[1]
        index = self.index(table.device)
        found = table.index_select(0, index.flatten()).view(*index.shape, -1).permute(2, 0, 1).contiguous()
        self._kept = None if torch.is_grad_enabled() or torch.compiler.is_compiling() else (key, found)
        return found

    def heads(self, x: Tensor) -> Tensor:
        """``[B, h, w, D]`` -> ``[B, N, 3, heads, d]``."""
        return self.qkv(x).flatten(1, 2).unflatten(2, (3, self.num_heads, -1))


class ShiftedWindowAttention(BiasTable):
    """(S)W-MSA as in Swin, with windows that are never clamped to the map."""

    def __init__(self, config: HATConfig, heads: int, shift: int):
        super().__init__(config, heads, (2 * config.window_size - 1) ** 2)
        self.shift = shift

    def index(self, device: torch.device) -> Tensor:
        side = (self.window, self.window)
        return window_index(side, side, str(device)).view(self.window**2, self.window**2)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(self.mix(self.heads(x), x.shape[1:3]).view(x.shape))

    @torch.compiler.disable  # cached tables and in-place products gain nothing from a compiler; all around them does
    def mix(self, qkv: Tensor, size: tuple[int, int]) -> Tensor:
        windows = cut(tuple(size), (self.window,) * 2, (self.shift,) * 2, qkv.device)
        return window_attention(qkv, self.bias(), windows, scale=self.scale)


class OverlappingAttention(BiasTable):
    """The attention of an OCAB: queries of plain windows, keys and values of larger ones around the same centres."""

    def __init__(self, config: HATConfig, heads: int):
        window = config.window_size
        larger = window + int(window * config.overlap_ratio)
        super().__init__(config, heads, (window + larger - 1) ** 2)
        self.larger = larger

    def index(self, device: torch.device) -> Tensor:
        return overlapping_index((self.window,) * 2, (self.larger,) * 2, str(device))

    def forward(self, x: Tensor) -> Tensor:
        window, larger = (self.window,) * 2, (self.larger,) * 2
        mixed = overlapping_attention(self.heads(x), self.bias(), x.shape[1:3], window, larger, scale=self.scale)
        return self.proj(mixed.view(x.shape))


class HybridBlock(nn.Module):
    """HAB: window attention and channel attention beside one another, then the perceptron. Section 3.2, equation 2."""

    def __init__(self, config: HATConfig, heads: int, shift: int, rate: float):
        super().__init__()
        dim = config.embed_dim
        self.drop_path_rate = rate
        self.norm1 = nn.LayerNorm(dim)
        self.attn = ShiftedWindowAttention(config, heads, shift)
        self.channels = (
            ChannelAttention(dim, config.compress_ratio, config.squeeze_factor, config.conv_scale)
            if config.channel_attention
            else None
        )
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, int(dim * config.mlp_ratio))

    def forward(self, x: Tensor, drop: Tensor | None = None) -> Tensor:
        """drop: uniforms ``[B, 2]`` for drop path of the attention and of the perceptron; the convolutions have none."""
        first, second = (None, None) if drop is None else drop.unbind(1)
        u = self.norm1(x)
        x = x + drop_path(self.attn(u), first, self.drop_path_rate)
        if self.channels is not None:
            x = x + self.channels(u)
        return x + drop_path(self.mlp(self.norm2(x)), second, self.drop_path_rate)


class OverlappingBlock(nn.Module):
    """OCAB: the overlapping attention and a perceptron, without drop path. Section 3.2."""

    def __init__(self, config: HATConfig, heads: int):
        super().__init__()
        dim = config.embed_dim
        self.norm1 = nn.LayerNorm(dim)
        self.attn = OverlappingAttention(config, heads)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, int(dim * config.mlp_ratio))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Group(nn.Module):
    """RHAG: hybrid blocks, one overlapping block, a convolution, all beside a skip."""

    def __init__(self, config: HATConfig, heads: int, shift: int, rates: list[float]):
        super().__init__()
        self.blocks = nn.ModuleList(
            HybridBlock(config, heads, shift if i % 2 else 0, rate) for i, rate in enumerate(rates)
        )
        self.overlap = OverlappingBlock(config, heads) if config.overlapping_attention else None
        self.conv = conv3(config.embed_dim, config.embed_dim) if config.resi_connection == "1conv" else nn.Identity()

    def forward(self, x: Tensor, drop: Tensor | None = None) -> Tensor:
        """drop: uniforms ``[B, blocks, 2]``."""
        y = x
        for i, block in enumerate(self.blocks):
            y = block(y, None if drop is None else drop[:, i])
        return x + convolved(self.conv, y if self.overlap is None else self.overlap(y))


class Reconstruction(nn.Module):
    """From features ``[B, D, h, w]`` to ``[B, C, h s, w s]``: convolutions and pixel shuffles, or one convolution (s = 1)."""

    def __init__(self, config: HATConfig, channels: int):
        super().__init__()
        width, scale = config.reconstruction_dim, config.scale
        self.before = conv3(config.embed_dim, width) if config.upsampler == "pixelshuffle" else None
        steps = [scale] if scale == 3 else [2] * round(math.log2(scale))
        # numbered as in a sequence with the shuffles between them, which have no weights
        self.upsample = nn.ModuleDict({str(2 * i): conv3(width, width * s * s) for i, s in enumerate(steps)})
        self.last = conv3(width if self.before is not None else config.embed_dim, channels)
        self.steps = steps

    def forward(self, x: Tensor) -> Tensor:
        if self.before is not None:
            x = F.leaky_relu(self.before(x), 0.01)
            for conv, factor in zip(self.upsample.values(), self.steps, strict=True):
                x = F.pixel_shuffle(conv(x), factor)
        with torch.autocast(x.device.type, enabled=False):  # pixels need more digits than bf16 has
            return self.last(x.to(self.last.weight.dtype))


class HATNetwork(nn.Module):
    """``forward(low [B, C, h, w] in 0 ... 1)`` gives ``[B, C, h s, w s]``, not clamped. h and w are multiples of the window.

    Raises ``UserError`` for sizes and channels that do not fit.
    """

    mean: Tensor

    def __init__(self, config: HATConfig):
        super().__init__()
        self.config, channels = config, config.in_channels or 3
        self.channels = channels
        mean = torch.tensor(MEAN if channels == 3 else (0.0,) * channels).view(-1, 1, 1)
        self.register_buffer("mean", mean, persistent=False)
        dim, size = config.embed_dim, config.training_size
        self.shallow = conv3(channels, dim)
        self.patch_norm = nn.LayerNorm(dim) if config.patch_norm else None
        self.absolute_pos_embed = nn.Parameter(torch.zeros(1, math.prod(size), dim)) if config.ape else None
        # official: a training size of one window switches every shift off
        shift = 0 if min(size) <= config.window_size else config.window_size // 2
        rates = drop_path_rates(config.drop_path_rate, sum(config.depths))
        self.groups = nn.ModuleList()
        for depth, heads in zip(config.depths, config.heads, strict=True):
            self.groups.append(Group(config, heads, shift, rates[:depth]))
            rates = rates[depth:]
        self.norm = nn.LayerNorm(dim)
        self.after = conv3(dim, dim) if config.resi_connection == "1conv" else nn.Identity()
        self.reconstruct = Reconstruction(config, channels)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        if self.absolute_pos_embed is not None:
            nn.init.trunc_normal_(self.absolute_pos_embed, std=0.02)
        if config.residual == "bicubic":  # it begins as bicubic
            nn.init.zeros_(self.reconstruct.last.weight)
            nn.init.zeros_(self.reconstruct.last.bias)  # type: ignore[arg-type]
        self.to(memory_format=torch.channels_last)

    def forward(self, low: Tensor, draw: Draw | None = None) -> Tensor:
        self.check(low)
        config = self.config
        x = (low - self.mean) * config.img_range
        shallow = self.shallow(x.contiguous(memory_format=torch.channels_last))
        features = self.deep(shallow, draw)
        y = self.reconstruct(convolved(self.after, features).permute(0, 3, 1, 2) + shallow)
        if config.upsampler == "none" and config.residual == "none":
            y = y + x
        if config.residual == "bicubic":  # the picture's own range: what is learnt is added to it
            up = resize_bicubic(low.float(), config.scale) if config.scale > 1 else low
            return up + y / config.img_range
        return y / config.img_range + self.mean

    def deep(self, shallow: Tensor, draw: Draw | None = None) -> Tensor:
        """Deep features ``[B, h, w, D]`` after the last norm. draw: source of drop path; None: none."""
        x = shallow.permute(0, 2, 3, 1)
        if self.patch_norm is not None:
            x = self.patch_norm(x)
        if self.absolute_pos_embed is not None:
            x = x + self.absolute_pos_embed.view(1, *x.shape[1:])
        drop = None
        if draw is not None and self.training and self.config.drop_path_rate:
            drop = draw.uniform("drop_path", (len(x), sum(self.config.depths), 2), device=x.device)
        done = 0
        for group, depth in zip(self.groups, self.config.depths, strict=True):
            x = group(x, None if drop is None else drop[:, done : done + depth])
            done += depth
        return self.norm(x)

    def check(self, low: Tensor) -> None:
        """Raise ``UserError`` for an input that the network cannot take."""
        window, config = self.config.window_size, self.config
        _, channels, height, width = low.shape
        if channels != self.channels:
            raise UserError(f"hat: the input has {channels} channels, the network takes {self.channels}")
        if height % window or width % window or not height * width:
            raise UserError(
                f"hat: a size of {height}x{width} is no multiple of window_size={window}: pad it (predict does)"
            )
        if config.ape and (height, width) != config.training_size:
            raise UserError(
                f"hat: with ape the size is fixed to image_size={config.training_size}, not {height}x{width}: use tiles of it"
            )
        if not low.is_floating_point():
            raise UserError(f"hat: the input is {low.dtype}, it takes floats in 0 ... 1: divide 8-bit values by 255")
