"""Which model of timm computes what our Swin computes: ``SwinTransformer`` or ``SwinTransformerV2``."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any, cast

from torch import Tensor

from unmask.backbones.swin.model import Swin
from unmask.contracts import Encoder
from unmask.errors import UserError
from unmask.nn.patch import tuple_of
from unmask.nn.windows import clamp_window
from unmask.official.export import TimmTwin


def timm_twin(encoder: Encoder) -> TimmTwin:
    """Raises ``UserError`` naming the option that timm does not have."""
    swin = cast(Swin, encoder)
    c = swin.config
    unknown = {
        "absolute_positions=true": c.absolute_positions,
        "patch_norm=false": not c.patch_norm,
        "out_norm=true": c.out_norm,
        "shift=false": not c.shift,
        f"norm_eps={c.norm_eps}": c.norm_eps != 1e-5,
        f"qk_scale={c.qk_scale}": c.qk_scale is not None,
        "biases only in places (qkv_bias=false) of version 2": c.version == 2 and not c.qkv_bias,
    }
    for option, present in unknown.items():
        if present:
            raise UserError(f"timm has no Swin with {option}: export --to safetensors or onnx")
    _refuse_other_windows(swin)
    _refuse_padding(swin)
    arguments: dict[str, Any] = {
        "img_size": list(swin.image_size),
        "patch_size": swin.patch_size[0] if len(set(swin.patch_size)) == 1 else list(swin.patch_size),
        "in_chans": c.in_channels,
        "embed_dim": c.embed_dim,
        "depths": list(c.depths),
        "num_heads": list(c.num_heads),
        "window_size": c.window_size if isinstance(c.window_size, int) else list(c.window_size),
        "mlp_ratio": c.mlp_ratio,
        "qkv_bias": c.qkv_bias,
        "num_classes": 0,
    }
    if c.version == 2:
        arguments["pretrained_window_sizes"] = list(c.pretrained_windows or (0,) * len(c.depths))
        return TimmTwin("swinv2_tiny_window8_256", arguments, _state(swin))
    return TimmTwin("swin_tiny_patch4_window7_224", arguments, _state(swin))


def _refuse_other_windows(swin: Swin) -> None:
    """On a map smaller than the window, the authors shrink both sides to the shorter one, timm each side to its own."""
    size, window = swin.grid(), tuple_of(swin.config.window_size, 2)
    for stage in range(len(swin.config.depths)):
        ours = clamp_window(size, window, (0, 0))[0]
        theirs = tuple(min(s, w) for s, w in zip(size, window, strict=True))
        if ours != theirs:
            height, width = swin.image_size
            raise UserError(
                f"timm would cut stage {stage + 1} of a {height}x{width} Swin into windows of {theirs}, this one has {ours}: "
                "export --to onnx or safetensors, or train with a square --image-size"
            )
        size = tuple((s + 1) // 2 for s in size)


def _refuse_padding(swin: Swin) -> None:
    """Where windows do not divide a map, padding is masked here and attended to in timm."""
    size, window = swin.grid(), tuple_of(swin.config.window_size, 2)
    if _divided(size, window, len(swin.config.depths)):
        return
    height, width = swin.image_size
    raise UserError(
        f"windows of {' x '.join(map(str, window))} do not divide the maps of a {height}x{width} Swin, and timm lets tokens "
        f"attend to the padding: export --to onnx or safetensors{_size_that_fits(swin, window)}"
    )


def _divided(size: Sequence[int], window: tuple[int, ...], stages: int) -> bool:
    for _ in range(stages):
        if any(s % w for s, w in zip(size, clamp_window(size, window, (0, 0))[0], strict=True)):
            return False
        size = [(s + 1) // 2 for s in size]
    return True


def _size_that_fits(swin: Swin, window: tuple[int, ...]) -> str:
    """The nearest square image whose maps are whole windows."""
    patch, now, stages = swin.patch_size, max(swin.image_size), len(swin.config.depths)
    step = math.lcm(*patch)
    sides = sorted(range(step, 2 * now + step, step), key=lambda s: (abs(s - now), -s))
    fits = (s for s in sides if _divided([s // p for p in patch], window, stages))
    found = next((s for s in fits if s >= step * max(window)), None)
    return f", or train with --image-size {found}" if found else ""


def _state(swin: Swin) -> dict[str, Tensor]:
    """timm keeps the merging at the beginning of the stage it leads to."""

    def later(found: re.Match[str]) -> str:
        return f"layers.{int(found[1]) + 1}.downsample."

    return {re.sub(r"^layers\.(\d+)\.downsample\.", later, name): value for name, value in swin.state_dict().items()}
