"""The authors' checkpoints and their numbers: how their state dict becomes ours, and how a fixture is run.

Files hold ``params_ema`` and sometimes ``params``; all sizes are read off the tensors. What they do not tell (``conv_scale``,
``img_range``, ``qk_scale``, whether a training size of one window switched shifts off) has the published values unless given
as options.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from unmask.data.bicubic import resize_bicubic
from unmask.errors import UserError
from unmask.nn.windows import cut, overlapping_index, window_index
from unmask.official.load import Rule, load_strict, rename, without_prefix
from unmask.systems.prediction.hat.config import HATConfig
from unmask.systems.prediction.hat.discriminator import UNetDiscriminator, adversarial_loss
from unmask.systems.prediction.hat.model import HAT
from unmask.systems.prediction.metrics import psnr, ssim

PREFER = ("params_ema", "params")  # where a file keeps its weights, averaged ones first
OPTIONS = ("conv_scale", "img_range", "image_size", "drop_path_rate", "qk_scale", "residual")

RULES = [
    Rule(r"relative_position_index_(SA|OCA)$", None),  # computed
    Rule(r"attn_mask$", None),
    Rule(r"^(mean)$", None),
    Rule(
        r"^layers\.(\d+)\.residual_group\.blocks\.(\d+)\.conv_block\.cab\.0\.",
        r"groups.\1.blocks.\2.channels.compress.",
    ),
    Rule(
        r"^layers\.(\d+)\.residual_group\.blocks\.(\d+)\.conv_block\.cab\.2\.", r"groups.\1.blocks.\2.channels.expand."
    ),
    Rule(
        r"^layers\.(\d+)\.residual_group\.blocks\.(\d+)\.conv_block\.cab\.3\.attention\.1\.",
        r"groups.\1.blocks.\2.channels.squeeze.",
    ),
    Rule(
        r"^layers\.(\d+)\.residual_group\.blocks\.(\d+)\.conv_block\.cab\.3\.attention\.3\.",
        r"groups.\1.blocks.\2.channels.excite.",
    ),
    Rule(r"^layers\.(\d+)\.residual_group\.blocks\.", r"groups.\1.blocks."),
    Rule(
        r"^layers\.(\d+)\.residual_group\.overlap_attn\.(relative_position_bias_table|qkv|proj)\b",
        r"groups.\1.overlap.attn.\2",
    ),
    Rule(r"^layers\.(\d+)\.residual_group\.overlap_attn\.", r"groups.\1.overlap."),
    Rule(r"^layers\.(\d+)\.conv\.", r"groups.\1.conv."),
    Rule(r"^conv_first\.", "shallow."),
    Rule(r"^patch_embed\.norm\.", "patch_norm."),
    Rule(r"^conv_after_body\.", "after."),
    Rule(r"^conv_before_upsample\.0\.", "reconstruct.before."),
    Rule(r"^upsample\.", "reconstruct.upsample."),
    Rule(r"^conv_last\.", "reconstruct.last."),
]


def load_official(state: Mapping[str, Tensor], options: Mapping[str, Any] | None = None) -> HAT:
    """The system with a published file's weights, every size read off the tensors. options: ``OPTIONS``.

    Raises ``UserError`` when the state is of another system.
    """
    config = HATConfig(**{**read_sizes(state), **dict(options or {})})
    model = HAT(config)
    load_strict(model.network, rename(state, RULES), where="hat checkpoint")
    return model.eval()


def read_sizes(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Our options, as far as tensors tell them. Raises ``UserError``."""
    first = "layers.0.residual_group.blocks.0"
    if "conv_first.weight" not in state or f"{first}.attn.relative_position_bias_table" not in state:
        raise UserError("hat: these are not the weights of a HAT (no conv_first, layers.0.residual_group)")
    dim, channels = state["conv_first.weight"].shape[:2]
    groups = 1 + max(int(k.split(".")[1]) for k in state if k.startswith("layers."))
    depths = tuple(
        1 + max(int(k.split(".")[4]) for k in state if k.startswith(f"layers.{g}.residual_group.blocks."))
        for g in range(groups)
    )
    table = "layers.{}.residual_group.blocks.0.attn.relative_position_bias_table"
    window = (math.isqrt(state[table.format(0)].shape[0]) + 1) // 2
    larger = "layers.0.residual_group.overlap_attn.relative_position_bias_table"
    overlapping = larger in state
    wide = math.isqrt(state[larger].shape[0]) + 1 - window if overlapping else window
    convs = f"{first}.conv_block.cab.0.weight" in state
    sizes: dict[str, Any] = {
        "embed_dim": dim,
        "in_channels": channels,
        "depths": depths,
        "num_heads": tuple(state[table.format(g)].shape[1] for g in range(groups)),
        "window_size": window,
        "overlap_ratio": ratio_of(wide - window, window),
        "channel_attention": convs,
        "overlapping_attention": overlapping,
        "mlp_ratio": ratio_of(state[f"{first}.mlp.fc1.weight"].shape[0], dim),
        "qkv_bias": f"{first}.attn.qkv.bias" in state,
        "patch_norm": "patch_embed.norm.weight" in state,
        "ape": "absolute_pos_embed" in state,
        "resi_connection": "1conv" if "conv_after_body.weight" in state else "identity",
        "image_size": max(64 // window, 2) * window,
        **upsampling(state),
    }
    if convs:
        sizes["compress_ratio"] = dim // state[f"{first}.conv_block.cab.0.weight"].shape[0]
        sizes["squeeze_factor"] = dim // state[f"{first}.conv_block.cab.3.attention.1.weight"].shape[0]
    if "absolute_pos_embed" in state:
        sizes["image_size"] = math.isqrt(state["absolute_pos_embed"].shape[1])
    return sizes


def ratio_of(part: int, whole: int) -> float:
    """The share whose product with ``whole``, cut to an integer, is ``part`` again: a quotient may fall just short of it."""
    ratio = part / whole
    return ratio if int(whole * ratio) == part else (part + 0.5) / whole


def upsampling(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Scale and reconstruction."""
    if "conv_before_upsample.0.weight" not in state:
        return {"upsampler": "none", "scale": 1}
    width = state["conv_before_upsample.0.weight"].shape[0]
    convs = [k for k in state if k.startswith("upsample.") and k.endswith(".weight")]
    if not convs:
        return {"upsampler": "pixelshuffle", "scale": 1, "reconstruction_dim": width}
    three = state[convs[0]].shape[0] == 9 * width
    return {"upsampler": "pixelshuffle", "scale": 3 if three else 2 ** len(convs), "reconstruction_dim": width}


def config_of(values: Mapping[str, Any]) -> HATConfig:
    """Our config from the authors' option names."""
    get = values.get
    upsampler = get("upsampler", "pixelshuffle")
    size, patch = pair(get("img_size", 64)), pair(get("patch_size", 1))
    heads = get("num_heads", (6,) * 4)
    return HATConfig(
        scale=get("upscale", 2) if upsampler == "pixelshuffle" else 1,
        upsampler="pixelshuffle" if upsampler == "pixelshuffle" else "none",
        in_channels=get("in_chans", 3),
        image_size=(size[0] // patch[0], size[1] // patch[1]),  # all that theirs divides by a patch
        embed_dim=get("embed_dim", 96),
        depths=tuple(get("depths", (6,) * 4)),
        num_heads=tuple(heads) if isinstance(heads, (list, tuple)) else heads,
        window_size=get("window_size", 7),
        compress_ratio=get("compress_ratio", 3),
        squeeze_factor=get("squeeze_factor", 30),
        conv_scale=get("conv_scale", 0.01),
        overlap_ratio=get("overlap_ratio", 0.5),
        mlp_ratio=get("mlp_ratio", 4.0),
        qkv_bias=get("qkv_bias", True),
        qk_scale=get("qk_scale"),
        patch_norm=get("patch_norm", True),
        ape=get("ape", False),
        drop_path_rate=get("drop_path_rate", 0.1),
        resi_connection=get("resi_connection", "1conv"),
        img_range=get("img_range", 1.0),
        reconstruction_dim=get("num_feat", 64),
    )


def pair(value: Any) -> tuple[int, int]:
    """(height, width) of a side or of both."""
    return (value[0], value[1]) if isinstance(value, (list, tuple)) else (value, value)


# --- fixtures ---------------------------------------------------------------------------------------------------

Case = tuple[dict[str, Tensor], nn.Module | None, dict[str, Tensor]]


def run_case(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Case:
    """Outputs and gradients of one fixture, under the authors' names: a network, a discriminator, or resizing and metrics."""
    if "scales" in config:
        return resizing_case(config, tensors)
    if "in.image" in tensors:
        return discriminator_case(config, tensors)
    return network_case(config, tensors)


def network_case(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Case:
    ours = config_of(config)
    model = HAT(ours)
    load_strict(model.network, rename(without_prefix(tensors, "param."), RULES), where="hat case")
    low = tensors["in.low"]
    outputs: dict[str, Tensor] = {}
    if "tile_size" in config or any(side % ours.window_size for side in low.shape[2:]):
        model.eval()
        with torch.no_grad():
            outputs["whole"] = model.restored(low)
            if config.get("tile_size"):
                outputs["tiled"] = model.restored(low, tile=config["tile_size"], overlap=config.get("tile_pad", 32))
        return outputs, model, {}
    network, window = model.network, (ours.window_size,) * 2
    network.train(bool(ours.drop_path_rate) and any(k.startswith("draw.") for k in tensors))
    features: list[Tensor] = []
    handle = network.norm.register_forward_hook(lambda _m, _i, out: features.append(out))
    restored = network(low)
    handle.remove()
    larger = (ours.window_size + int(ours.window_size * ours.overlap_ratio),) * 2
    base = ours.window_size + larger[0] - 1
    lowest = (2 - larger[0]) * (base + 1)  # of key - query + w - W + 1 on both axes
    index = overlapping_index(window, larger)
    slots = ours.window_size**2
    outputs = {
        "restored": restored.detach(),
        "deep_features": features[0].detach().permute(0, 3, 1, 2),
        "index_sa": window_index(window, window, "cpu").view(slots, slots),
        # theirs counts below zero, ours from the table's end
        "index_oca": torch.where(index >= base**2 + lowest, index - base**2, index),
    }
    windows = cut(low.shape[2:], window, (ours.window_size // 2,) * 2)
    outputs["attn_mask"] = torch.zeros(windows.count, slots, slots) if windows.mask is None else windows.mask
    if "in.high" not in tensors:
        return outputs, model, {}
    loss = model.pixel_loss(restored, tensors["in.high"])
    loss.backward()
    return outputs | {"loss": loss.detach()}, model, official_gradients(network)


def discriminator_case(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Case:
    image = tensors["in.image"]
    model = UNetDiscriminator(
        config.get("num_in_ch", 3), config.get("num_feat", 64), config.get("skip_connection", True)
    )
    load_strict(model, {**without_prefix(tensors, "param."), **without_prefix(tensors, "buffer.")}, where="hat case")
    model.train(bool(config.get("training", False)))
    scores = model(image)
    fake = adversarial_loss(scores, real=False)
    fake.backward()
    outputs = {"scores": scores, "loss_as_real": adversarial_loss(scores, real=True), "loss_as_fake": fake}
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return {k: v.detach() for k, v in outputs.items()}, model, gradients


def resizing_case(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Case:
    high, border = tensors["in.high"][None], config.get("crop_border", 0)
    outputs = {f"low_x{s}": resize_bicubic(high, 1 / s) for s in config["scales"]}
    for s in config["scales"]:
        outputs[f"up_x{s}"] = resize_bicubic(outputs[f"low_x{s}"], s)
    first = outputs[f"up_x{2 if 2 in config['scales'] else config['scales'][0]}"]
    height, width = (
        min(a, b) for a, b in zip(first.shape[2:], high.shape[2:], strict=True)
    )  # odd sides come back larger
    first, true = first[..., :height, :width], high[..., :height, :width]
    for name, function in (("psnr", psnr), ("ssim", ssim)):
        outputs[f"{name}_y"] = function(first, true, border=border, luma=True)
        outputs[f"{name}_rgb"] = function(first, true, border=0, luma=False)
    return {k: v[0] for k, v in outputs.items()}, None, {}


BACK = [
    (r"channels.compress.", "conv_block.cab.0."),
    (r"channels.expand.", "conv_block.cab.2."),
    (r"channels.squeeze.", "conv_block.cab.3.attention.1."),
    (r"channels.excite.", "conv_block.cab.3.attention.3."),
    (r"overlap.attn.", "residual_group.overlap_attn."),
    (r"overlap.", "residual_group.overlap_attn."),
    (r"blocks.", "residual_group.blocks."),
    (r"groups.", "layers."),
    (r"shallow.", "conv_first."),
    (r"patch_norm.", "patch_embed.norm."),
    (r"after.", "conv_after_body."),
    (r"reconstruct.before.", "conv_before_upsample.0."),
    (r"reconstruct.upsample.", "upsample."),
    (r"reconstruct.last.", "conv_last."),
]


def official_gradients(module: nn.Module) -> dict[str, Tensor]:
    """Gradients by the authors' names."""
    return {official_name(n): p.grad for n, p in module.named_parameters() if p.grad is not None}


def official_name(name: str) -> str:
    for ours, theirs in BACK:
        name = name.replace(ours, theirs)
    return name
