"""The authors' and timm's checkpoints, and the authors' numbers: how a state dict becomes ours, and how a fixture is run.

Our parameters have the authors' names; timm's differ in where merging stands and in the head. Tables of other windows
and absolute positions of other grids are resized as in the authors' ``load_pretrained``.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from unmask.backbones import build
from unmask.backbones.swin.attention import CosineWindowAttention, WindowAttention
from unmask.backbones.swin.model import Swin
from unmask.draw import Draw, Replay
from unmask.errors import UserError
from unmask.nn.positions import resize_relative_table, resize_table
from unmask.official.load import Rule, load_strict, rename, without_prefix

BUFFERS = Rule(r"(relative_position_index|relative_coords_table|attn_mask|table_coordinates|k_bias)$", None)
RULES = [BUFFERS]
OPTIONS = tuple(Swin.Config.model_fields)
KEEP = 1 - 2**-24  # the largest uniform: below no rate
SIMMIM_RULES = [  # a pre-training file: the encoder alone, without the token and the head
    Rule(r"^(decoder\.|mask_token$|encoder\.mask_token$)", None),
    Rule(r"^encoder\.", ""),
]


def timm_rules(state: Mapping[str, Tensor]) -> list[Rule]:
    """Merging stands before a stage there, behind it here: ``layers.{i+1}.downsample`` -> ``layers.{i}.downsample``."""
    stages = sorted({int(found[1]) for k in state if (found := re.match(r"layers\.(\d+)\.downsample\.", k))})
    # ascending: a number that was lowered is never met again
    lowered = [Rule(rf"^layers\.{i}\.downsample\.", f"layers.{i - 1}.downsample.") for i in stages]
    return [BUFFERS, Rule(r"^head\.fc\.", "head."), *lowered]


def is_timm(state: Mapping[str, Tensor]) -> bool:
    """timm's layout has no merging in the first stage."""
    return not any(k.startswith("layers.0.downsample.") for k in state) and any(".downsample." in k for k in state)


def load_official(state: Mapping[str, Tensor], options: Mapping[str, Any] | None = None) -> Swin:
    """The encoder with the file's weights (of classification or SimMIM's pre-training; the authors' layout or timm's).

    Sizes are read off the tensors; options override them or say what tensors do not tell (``image_size``,
    ``window_size``, ``pretrained_windows``): tables are then resized. Raises ``UserError`` for weights of another system.
    """
    state = encoder_state(state)
    config = {**read_sizes(state), **(options or {})}
    encoder = build("swinv2_tiny" if config.pop("version") == 2 else "swin_tiny", **config)
    assert isinstance(encoder, Swin)
    return load_encoder(encoder, state)


def encoder_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our encoder's names, from any of the known layouts; heads are left out. Raises ``UserError`` for another system."""
    if "encoder.patch_embed.proj.weight" in state:
        state = rename(state, SIMMIM_RULES)
    if "patch_embed.proj.weight" not in state or "layers.0.blocks.0.attn.qkv.weight" not in state:
        raise UserError("swin: these are not the weights of a Swin Transformer (no layers.0.blocks.0.attn.qkv)")
    renamed = rename(state, timm_rules(state) if is_timm(state) else RULES)
    return {k: v for k, v in renamed.items() if not k.startswith("head.")}


def read_sizes(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Options of :class:`Swin.Config`, as far as tensors tell them. Square windows and images are assumed."""
    weight = state["patch_embed.proj.weight"]
    blocks = [(int(f[1]), int(f[2])) for k in state if (f := re.match(r"layers\.(\d+)\.blocks\.(\d+)\.", k))]
    stages = 1 + max(s for s, _ in blocks)
    depths = [1 + max(b for s, b in blocks if s == i) for i in range(stages)]
    second = "layers.0.blocks.0.attn.logit_scale" in state
    key = "logit_scale" if second else "relative_position_bias_table"
    tables = [state[f"layers.{i}.blocks.0.attn.{key}"] for i in range(stages)]
    bias = "layers.0.blocks.0.attn.q_bias" if second else "layers.0.blocks.0.attn.qkv.bias"
    sizes: dict[str, Any] = {
        "version": 2 if second else 1,
        "patch_size": weight.shape[2] if weight.shape[2] == weight.shape[3] else tuple(weight.shape[2:]),
        "in_channels": weight.shape[1],
        "embed_dim": weight.shape[0],
        "depths": tuple(depths),
        "num_heads": tuple(t.shape[0] if second else t.shape[1] for t in tables),
        "mlp_ratio": state["layers.0.blocks.0.mlp.fc1.weight"].shape[0] / weight.shape[0],
        "qkv_bias": bias in state,
        "patch_norm": "patch_embed.norm.weight" in state,
        "absolute_positions": "absolute_pos_embed" in state,
    }
    if not second:
        sizes["window_size"] = (math.isqrt(tables[0].shape[0]) + 1) // 2
    if "absolute_pos_embed" in state:
        sizes["image_size"] = math.isqrt(state["absolute_pos_embed"].shape[1]) * weight.shape[2]
    return sizes


def load_encoder(encoder: Swin, state: Mapping[str, Tensor], *, where: str = "swin checkpoint") -> Swin:
    """Load a state with our names, strictly; tables made for other windows and grids are resized.

    V1's tables bicubically over (2 w - 1)^2, absolute positions bicubically; V2 has nothing to resize.
    Raises ``UserError`` for a V1 checkpoint into V2 and the other way round.
    """
    theirs = 2 if any(k.endswith("logit_scale") for k in state) else 1
    if theirs != encoder.config.version:
        raise UserError(
            f"{where} is of Swin V{theirs}, this model of V{encoder.config.version}: "
            f"use backbone {'swinv2' if theirs == 2 else 'swin'}_*"
        )
    fitted = dict(state)
    for name, module in encoder.named_modules():
        key = f"{name}.relative_position_bias_table"
        if isinstance(module, WindowAttention) and not isinstance(module, CosineWindowAttention) and key in fitted:
            fitted[key] = fitted_table(fitted[key], module.window, key)
    if encoder.absolute_pos_embed is not None and "absolute_pos_embed" in fitted:
        table = fitted["absolute_pos_embed"]
        side = math.isqrt(table.shape[1])
        if table.shape[1] != math.prod(encoder.grid()) and side**2 == table.shape[1]:
            fitted["absolute_pos_embed"] = resize_table(table, (side, side), encoder.grid())
    load_strict(encoder, fitted, ignore=[r"^out_norms\."], where=where)
    return encoder


def fitted_table(table: Tensor, window: tuple[int, ...], key: str) -> Tensor:
    """A V1 table for another window; the old one must have been square."""
    if table.shape[0] == math.prod(2 * w - 1 for w in window):
        return table
    side = math.isqrt(table.shape[0])
    if side**2 != table.shape[0]:
        raise UserError(f"{key}: a table of {table.shape[0]} rows is of no square window and cannot be resized")
    return resize_relative_table(table, ((side + 1) // 2,) * 2, window)


# --- fixtures ---------------------------------------------------------------------------------------------------


def encoder_options(config: Mapping[str, Any]) -> dict[str, Any]:
    """Our options from the authors'; what is silent has their default (ape off, patch_norm on, ratio 4 ...)."""

    def get(*names: str, default: Any) -> Any:
        return next((as_tuple(config[n]) for n in names if config.get(n) is not None), default)

    depths = get("depths", default=(2, 2, 6, 2))
    second = int(get("version", default=2 if "pretrained_window_sizes" in config else 1)) == 2
    options = {
        "image_size": get("image_size", "img_size", default=224),
        "patch_size": get("patch_size", default=4),
        "in_channels": get("in_chans", "in_channels", default=3),
        "embed_dim": get("embed_dim", default=96),
        "depths": depths,
        "num_heads": get("num_heads", default=(3, 6, 12, 24)),
        "window_size": get("window_size", default=7),
        "mlp_ratio": get("mlp_ratio", default=4.0),
        "qkv_bias": get("qkv_bias", default=True),
        "qk_scale": get("qk_scale", default=None),
        "absolute_positions": get("ape", "use_absolute_positions", "absolute_positions", default=False),
        "patch_norm": get("patch_norm", default=True),
        "drop_rate": get("drop_rate", default=0.0),
        "drop_path": get("drop_path_rate", "drop_path", default=0.0),
        "shift": get("shift", default=True),
        "out_norm": get("out_norm", default=False),
        "norm_eps": get("layer_norm_eps", "norm_eps", default=1e-5),
    }
    before = get("pretrained_window_sizes", "pretrained_windows", "pretrained_window_size", default=0)
    options["pretrained_windows"] = before if isinstance(before, tuple) else (before,) * len(depths)
    return {"version": 2 if second else 1, **options}


def as_config(sizes: Mapping[str, Any]) -> dict[str, Any]:
    """What :func:`read_sizes` found, in the authors' words."""
    words = {"absolute_positions": "ape", "in_channels": "in_chans"}
    return {words.get(k, k): v for k, v in sizes.items() if k != "version"}


def as_tuple(value: Any) -> Any:
    return tuple(as_tuple(v) for v in value) if isinstance(value, (list, tuple)) else value


def drop_path_draw(tensors: Mapping[str, Tensor], batch: int, depth: int) -> Draw | None:
    """What a case recorded of drop path, as the encoder asks for it: uniforms ``[B, depth, 2]``; and of "dropout" behind
    the patches. None where a case has neither.

    A recording holds batch, blocks and branches in any order of axes, or one tensor a block or a branch (numbered names).
    The first block, whose rate is 0, may be absent: the authors make it an identity that draws nothing. Values are
    uniforms, or say what was kept: booleans, 0 and 1, or 0 and 1 / (1 - rate). Raises ``UserError`` for other shapes.
    """
    found = {k.removeprefix("draw."): v for k, v in tensors.items() if k.startswith("draw.") and "drop" in k}
    out = {"dropout": as_uniform(found.pop("dropout"))} if "dropout" in found else {}
    if found:
        names = sorted(found, key=lambda k: ([int(n) for n in re.findall(r"\d+", k)], k))
        if len({found[k].shape for k in names}) > 1:
            raise UserError(f"the recorded drop paths {', '.join(names)} differ in shape: record all of them alike")
        value = torch.stack([found[k] for k in names]) if len(names) > 1 else found[names[0]]
        out["drop_path"] = blocks_and_branches(as_uniform(value), batch, depth)
    return Replay(out) if out else None


def as_uniform(value: Tensor) -> Tensor:
    """Uniforms in [0, 1) as they are; of what says what was kept, numbers that keep and drop the same at any rate."""
    value = value.float()
    if bool(((value == 0) | (value >= 1)).all()):
        return (value > 0) * KEEP
    if bool(((value < 0) | (value >= 1)).any()):
        raise UserError("recorded draws of dropping are neither uniforms in [0, 1) nor 0 and 1 (or 1 / (1 - rate))")
    return value


def blocks_and_branches(value: Tensor, batch: int, depth: int) -> Tensor:
    """``[B, depth, 2]`` from any order of these axes, or a block's two branches following one another; 1s may stand last."""
    shape = tuple(value.shape)
    for blocks, first in ((depth, "bds"), (depth - 1, "dsb")):
        sizes = {"b": batch, "d": blocks, "s": 2}
        orders = (first, "dsb", "dbs", "sdb", "bds", "bsd", "sbd")
        order = next((o for o in orders if shape == tuple(sizes[axis] for axis in o)), "dsb")
        if shape == (batch, 2 * blocks) != (2 * blocks, batch):
            value = value.T
        if shape in ((2 * blocks, batch), (batch, 2 * blocks)):
            value = value.reshape(blocks, 2, batch)
        if tuple(value.shape) == tuple(sizes[axis] for axis in order):
            value = value.permute([order.index(axis) for axis in "bds"])
            return torch.cat((torch.full((batch, depth - blocks, 2), KEEP), value), dim=1)
    if shape and shape[-1] == 1:
        return blocks_and_branches(value.squeeze(-1), batch, depth)
    raise UserError(
        f"a recorded drop path of shape {list(shape)} does not fit {depth} blocks and {batch} samples: "
        f"it takes {[2 * depth, batch]}, or {[2 * (depth - 1), batch]} without the first block"
    )


class SwinWithHead(nn.Module):
    """The authors' classifier: mean of the normalised tokens, Linear."""

    def __init__(self, encoder: Swin, classes: int):
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(encoder.embed_dim, classes) if classes else nn.Identity()

    def forward(self, images: Tensor, draw: Draw | None = None) -> Tensor:
        return self.head(self.encoder.pooled(images, draw=draw))


def load_with_head(model: SwinWithHead, state: Mapping[str, Tensor]) -> None:
    """Encoder and head from one state with the authors' names, strictly."""
    load_encoder(model.encoder, encoder_state(state))
    load_strict(model.head, without_prefix(rename(state, [Rule(r"^head\.fc\.", "head.")]), "head."), where="swin head")


def run_case(
    config: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], nn.Module, dict[str, Tensor]]:
    """Outputs and gradients of one fixture, under the authors' names."""
    state = without_prefix(tensors, "param.")
    images = tensors["in.images"]
    told = read_sizes(state)
    options = encoder_options({**as_config(told), "image_size": tuple(images.shape[2:]), **config})
    options.pop("version")
    version = told["version"]
    encoder = build("swinv2_tiny" if version == 2 else "swin_tiny", **options)
    assert isinstance(encoder, Swin)
    classes = state["head.weight"].shape[0] if "head.weight" in state else 0
    model = SwinWithHead(encoder, classes).train()
    load_with_head(model, state)
    draw = drop_path_draw(tensors, len(images), encoder.num_layers)
    logits = model(images, draw)
    outputs = {"logits": logits, "features": encoder.pooled(images, draw=draw)}
    outputs |= {f"stage{i}": m for i, m in enumerate(encoder.maps(images, draw=draw))}
    if "in.labels" in tensors:
        smoothing = float(config.get("label_smoothing") or 0.0)
        outputs["loss"] = F.cross_entropy(logits, tensors["in.labels"].long(), label_smoothing=smoothing)
        outputs["loss"].backward()
    gradients = {n.removeprefix("encoder."): p.grad for n, p in model.named_parameters() if p.grad is not None}
    return {k: v.detach() for k, v in outputs.items()}, model, gradients
