"""The authors' checkpoints and their numbers: how their state dict becomes ours, and how a fixture is run.

The rules know pre-training files with Swin (V1, V2) and with the BEiT-style ViT, and fine-tuned ViT files.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from unmask.backbones import BackboneConfig, build
from unmask.backbones.swin import official as swin
from unmask.contracts import Encoder
from unmask.draw import Replay
from unmask.errors import UserError
from unmask.masks.mask import Mask
from unmask.official.load import Rule, load_strict, rename, without_prefix
from unmask.systems.pretraining.simmim.model import SimMIM

SYSTEM_RULES = [
    Rule(r"(relative_position_index|relative_coords_table|attn_mask)$", None),
    Rule(r"^encoder\.mask_token$", "mask_token", convert=lambda t: t.flatten()),
    Rule(r"^decoder\.(?=\d)", "decoder.", convert=lambda t: t.flatten(1) if t.ndim == 4 else t),  # 1x1 convolutions
]
LINEAR = [Rule(r"^decoder\.0\.", "decoder.")]
MLP = [Rule(r"^decoder\.0\.", "decoder.fc1."), Rule(r"^decoder\.2\.", "decoder.fc2.")]
VIT_RULES = [
    Rule(r"^((?:encoder\.)?)blocks\.(\d+)\.attn\.relative_position_bias_table$",
         r"\1block_biases.\2.relative_position_bias_table"),
    Rule(r"\.gamma_([12])$", r".ls\1.gamma"),
]  # fmt: skip
BACK = [
    (r"^mask_token$", "encoder.mask_token"),
    (r"^encoder\.block_biases\.(\d+)\.", r"encoder.blocks.\1.attn."),
    (r"\.ls([12])\.gamma$", r".gamma_\1"),
    (r"^decoder\.fc1\.", "decoder.0."),
    (r"^decoder\.fc2\.", "decoder.2."),
    (r"^decoder\.(weight|bias)$", r"decoder.0.\1"),
]
OPTIONS = (
    *("num_heads", "image_size", "window_size", "pretrained_windows", "drop_path", "norm_eps", "mask_patch_size"),
    *("mask_ratio", "masking", "norm_target", "loss", "bins", "predict"),
)
HEADS = {192: 3, 384: 6, 768: 12, 1024: 16, 1280: 16}


def load_official(state: Mapping[str, Tensor], options: Mapping[str, Any] | None = None) -> SimMIM | Encoder:
    """The system with the file's weights, or the encoder alone of a fine-tuned file (whose head is left out).

    Sizes are read off the tensors; options override them in the authors' words: ``num_heads``, ``image_size``,
    ``window_size``, ``mask_patch_size``, ``mask_ratio``. Raises ``UserError`` when the state is of another system.
    """
    options = dict(options or {})
    if "decoder.0.weight" in state and "encoder.patch_embed.proj.weight" in state:
        return load_simmim(SimMIM(simmim_config(options, state)), state)
    if "layers.0.blocks.0.attn.qkv.weight" in state:
        return swin.load_official(state, options)
    if "blocks.0.attn.qkv.weight" not in state or "patch_embed.proj.weight" not in state:
        raise UserError(
            "simmim: these are not weights of SimMIM (neither encoder.patch_embed.proj and decoder.0 nor blocks)"
        )
    described = vit_options(options, state)
    described["final_norm"] = "norm.weight" in state
    encoder = build(described.pop("name"), **described)
    renamed = {k: v for k, v in rename(state, [*SYSTEM_RULES, *VIT_RULES]).items() if k != "mask_token"}
    load_strict(encoder, renamed, ignore=[r"^(head|fc_norm)\."], where="simmim checkpoint")
    return encoder


def load_simmim(model: SimMIM, state: Mapping[str, Tensor]) -> SimMIM:
    """Load a state dict with the authors' names, strictly; Swin's tables are resized where windows differ."""
    head = MLP if "decoder.2.weight" in state else LINEAR
    is_swin = "encoder.layers.0.blocks.0.attn.qkv.weight" in state
    renamed = rename(state, [*SYSTEM_RULES, *head, *([] if is_swin else VIT_RULES)])
    if is_swin:
        swin.load_encoder(model.encoder, without_prefix(renamed, "encoder."), where="simmim checkpoint")  # type: ignore[arg-type]
        rest = {k: v for k, v in renamed.items() if not k.startswith("encoder.")}
        load_strict(model, rest, ignore=[r"^encoder\."], where="simmim checkpoint")
    else:
        load_strict(model, renamed, where="simmim checkpoint")
    return model


def simmim_config(config: Mapping[str, Any], state: Mapping[str, Tensor]) -> SimMIM.Config:
    """Our config from the authors' options; what they leave open is read off the tensors, or has their default."""

    def get(*names: str, default: Any) -> Any:
        return next((config[n] for n in names if config.get(n) is not None), default)

    inner = without_prefix(state, "encoder.")
    is_swin = "layers.0.blocks.0.attn.qkv.weight" in inner
    backbone = swin_options(config, inner) if is_swin else vit_options(config, inner)
    target = get("norm_target", "NORM_TARGET", default=None)
    if isinstance(target, Mapping):
        window = target.get("patch_size", target.get("PATCH_SIZE", 47))
        target = window if target.get("enable", target.get("ENABLE", True)) else None
    elif target is True:
        target = 47
    target = get("norm_target_patch_size", "norm_target_window", default=target) if target else None
    words = {"l1": "l1", "l2": "l2", "mse": "l2", "smooth_l1": "smooth_l1", "smooth-l1": "smooth_l1"}
    kind = str(get("loss", "loss_type", default="l1")).lower().replace("cross-entropy", "cross_entropy")
    everything = bool(get("predict_all", default=False)) or get("predict", "loss_on", default="hidden") == "all"
    masking = str(get("masking", "mask_type", "mask", default="random")).replace("-", "").replace("wise", "")
    return SimMIM.Config(
        backbone=BackboneConfig(**backbone),
        mask_ratio=get("mask_ratio", default=0.6),
        cell_size=get("mask_patch_size", "cell_size", default=32),
        masking=masking if masking in ("square", "block") else "random",
        head="mlp" if "decoder.2.weight" in state else "linear",
        loss=words.get(kind, kind),
        bins=get("bins", "num_bins", default=8),
        predict="all" if everything else "hidden",
        local_norm=target,
    )


def swin_options(config: Mapping[str, Any], state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Swin's own part of a config; tensors say what it leaves open."""
    told = swin.read_sizes(state)
    options = {**swin.encoder_options({**swin.as_config(told), **config}), "version": told["version"]}
    second = options.pop("version") == 2
    return {"name": "swinv2_tiny" if second else "swin_tiny", **options}


def vit_options(config: Mapping[str, Any], state: Mapping[str, Tensor]) -> dict[str, Any]:
    """The BEiT-style ViT's options; tensors say what a config leaves open."""

    def get(*names: str, default: Any) -> Any:
        return next((swin.as_tuple(config[n]) for n in names if config.get(n) is not None), default)

    weight = state["patch_embed.proj.weight"]
    width, patch = weight.shape[0], tuple(weight.shape[2:])
    size: Any = 224
    if "pos_embed" in state:
        size = math.isqrt(state["pos_embed"].shape[1] - 1) * patch[0]
    elif "rel_pos_bias.relative_position_bias_table" in state:
        rows = state["rel_pos_bias.relative_position_bias_table"].shape[0]
        size = (math.isqrt(rows - 3) + 1) // 2 * patch[0]
    relative = []
    if "rel_pos_bias.relative_position_bias_table" in state:
        relative.append("shared")
    if "blocks.0.attn.relative_position_bias_table" in state:
        relative.append("per_block")
    bias = "qv" if "blocks.0.attn.q_bias" in state else "blocks.0.attn.qkv.bias" in state
    return {
        "name": "vit_base_patch16",
        "image_size": get("image_size", "img_size", default=size),
        "patch_size": get("patch_size", default=patch),
        "in_channels": weight.shape[1],
        "embed_dim": width,
        "depth": 1 + max(int(f[1]) for k in state if (f := re.match(r"blocks\.(\d+)\.", k))),
        "num_heads": get("num_heads", default=HEADS.get(width, max(width // 64, 1))),
        "mlp_ratio": state["blocks.0.mlp.fc1.weight"].shape[0] / width,
        "qkv_bias": bias,
        "qk_scale": get("qk_scale", default=None),
        "init_values": get("init_values", default=0.1) if "blocks.0.gamma_1" in state else None,
        "position": "learned" if "pos_embed" in state else "none",
        "relative": relative,
        "drop_path": get("drop_path_rate", "drop_path", default=0.0),
        "final_norm": "norm.weight" in state,
        "norm_eps": get("layer_norm_eps", "norm_eps", default=1e-6),
        "init": "beit",
    }


# --- fixtures ---------------------------------------------------------------------------------------------------


def run_case(
    config: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], nn.Module, dict[str, Tensor]]:
    """Outputs and gradients of one fixture, under the authors' names."""
    state, images = without_prefix(tensors, "param."), tensors["in.images"]
    told = {"image_size": tuple(images.shape[2:]), **config}
    model = load_simmim(SimMIM(simmim_config(told, state)), state).train()
    draw = replay(model, tensors)
    mask = given_mask(model, tensors) or model.mask(images, draw)
    places = model.places(mask, images) if given_mask(model, tensors) is None else None
    loss = model.compare(model.features(images, mask, draw), model.wanted(images), places, mask)
    loss.backward()
    with torch.no_grad():
        features = model.features(images, mask, draw)
        shape = (len(images), -1, *model.grid(images))
        outputs = {
            "loss": loss.detach(),
            "reconstruction": model.reconstruction(features, images),
            "features": features.transpose(1, 2).reshape(shape),
            "mask": mask.on_grid().long(),
            "target": model.target.of(images, model._preprocessing()),
        }
    gradients = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is None:
            continue
        official = name
        for pattern, word in BACK:
            official = re.sub(pattern, word, official)
        shape = state[official].shape if official in state else parameter.shape
        gradients[official] = parameter.grad.reshape(shape)
    return outputs, model, gradients


def given_mask(model: SimMIM, tensors: Mapping[str, Tensor]) -> Mask | None:
    """The mask of a case that gives one instead of draws, ``[B, N]`` or ``[B, H/p, W/p]``."""
    value = tensors.get("in.mask", tensors.get("draw.mask"))
    if value is None:
        return None
    grid = model.encoder.grid(tuple(tensors["in.images"].shape[2:]))
    return Mask(value.flatten(1).bool(), grid)


def replay(model: SimMIM, tensors: Mapping[str, Tensor]) -> Replay:
    """The case's draws in the form the system asks for: uniforms whose order is the official permutation."""
    found = {k.removeprefix("draw."): v for k, v in tensors.items() if k.startswith("draw.") and "drop" not in k}
    if "permutation" in found:
        order = found["permutation"]
        found["permutation"] = order.argsort(dim=1).float() / order.shape[1]
    dropped = swin.drop_path_draw(tensors, len(tensors["in.images"]), model.encoder.num_layers)
    return Replay(found | (dropped.tensors if isinstance(dropped, Replay) else {}))
