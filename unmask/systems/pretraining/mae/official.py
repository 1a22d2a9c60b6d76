"""The authors' checkpoints and their numbers: how their state dict becomes ours, and how a fixture is run.

The rules know three kinds of files: pre-training with decoder (``mae_visualize_*``), encoder only (``mae_pretrain_*``),
and whatever a run of the authors' code saves.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from unmask.backbones import BackboneConfig, build
from unmask.contracts import Encoder
from unmask.draw import Replay
from unmask.errors import UserError
from unmask.nn.decoder import PatchDecoder
from unmask.nn.patch import patchify, select
from unmask.nn.positions import sincos_table
from unmask.official.load import Rule, load_strict, rename, without_prefix
from unmask.systems.pretraining.mae.model import MAE

OPTIONS = ("num_heads", "decoder_num_heads", "image_size", "mask_ratio", "norm_pix_loss", "layer_norm_eps")
HEADS = {192: 3, 384: 6, 768: 12, 1024: 16, 1280: 16}

RULES = [
    Rule(r"^mask_token$", "decoder.mask_token"),
    Rule(r"^decoder_pos_embed$", "decoder_positions"),
    Rule(r"^decoder_embed\.", "decoder.embed."),
    Rule(r"^decoder_blocks\.", "decoder.blocks."),
    Rule(r"^decoder_norm\.", "decoder.norm."),
    Rule(r"^decoder_pred\.", "decoder.predict."),
    Rule(r"^(cls_token|pos_embed|patch_embed|blocks|norm)\b", r"encoder.\1"),
]
FIXED = ["encoder.pos_embed", "decoder_positions"]  # tables that we compute


def load_official(state: Mapping[str, Tensor], options: Mapping[str, Any] | None = None) -> MAE | Encoder:
    """The system (or the encoder alone, where the file has no decoder) with the file's weights.

    The sizes are read off the tensors; what they do not tell can be given as options: ``num_heads``,
    ``decoder_num_heads``, ``image_size``, ``mask_ratio``, ``norm_pix_loss``.
    Raises ``UserError`` when the state is of another system.
    """
    options = dict(options or {})
    if "patch_embed.proj.weight" not in state or "blocks.0.attn.qkv.weight" not in state:
        raise UserError(
            "mae: these are not the weights of a masked autoencoder (no patch_embed.proj, blocks.0.attn.qkv)"
        )
    if "decoder_embed.weight" in state:
        return load_mae(MAE(mae_config({**read_sizes(state), **options})), state)
    return load_encoder(state, options)


def read_sizes(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """The authors' option names, as far as tensors tell them."""
    weight = state["patch_embed.proj.weight"]
    width, patch = weight.shape[0], weight.shape[2]
    sizes: dict[str, Any] = {
        "embed_dim": width,
        "in_chans": weight.shape[1],
        "patch_size": patch,
        "depth": 1 + max(int(k.split(".")[1]) for k in state if k.startswith("blocks.")),
        "num_heads": HEADS.get(width, max(width // 64, 1)),
        "mlp_ratio": state["blocks.0.mlp.fc1.weight"].shape[0] / width,
    }
    if "pos_embed" in state:
        sizes["image_size"] = patch * math.isqrt(state["pos_embed"].shape[1] - 1)
    if "decoder_embed.weight" in state:
        sizes["decoder_embed_dim"] = state["decoder_embed.weight"].shape[0]
        sizes["decoder_depth"] = 1 + max(int(k.split(".")[1]) for k in state if k.startswith("decoder_blocks."))
    return sizes


def mae_config(sizes: Mapping[str, Any]) -> MAE.Config:
    """Our config from the authors' options; what is silent has their ViT-B default."""
    get = sizes.get
    eps, mlp_ratio = get("layer_norm_eps", 1e-6), get("mlp_ratio", 4.0)
    return MAE.Config(
        backbone=BackboneConfig(**backbone_options(sizes)),
        mask_ratio=get("mask_ratio", 0.75),
        target="standardised" if get("norm_pix_loss", False) else "pixels",
        decoder=PatchDecoder.Config(
            embed_dim=get("decoder_embed_dim", 512),
            depth=get("decoder_depth", 8),
            num_heads=get("decoder_num_heads", 16),
            mlp_ratio=mlp_ratio,
            norm_eps=eps,
        ),
    )


def backbone_options(sizes: Mapping[str, Any]) -> dict[str, Any]:
    get = sizes.get
    size = get("image_size", get("img_size", 224))
    patch = get("patch_size", 16)
    return {
        "name": f"vit_base_patch{patch if isinstance(patch, int) else patch[0]}",
        "image_size": tuple(size) if isinstance(size, (list, tuple)) else size,
        "patch_size": tuple(patch) if isinstance(patch, (list, tuple)) else patch,
        "in_channels": get("in_chans", get("in_channels", 3)),
        "embed_dim": get("embed_dim", 768),
        "depth": get("depth", 12),
        "num_heads": get("num_heads", 12),
        "mlp_ratio": get("mlp_ratio", 4.0),
        "norm_eps": get("layer_norm_eps", 1e-6),
        "position": get("position", "sincos"),
    }


def load_mae(model: MAE, state: Mapping[str, Tensor]) -> MAE:
    """Load a state dict with the authors' names, strictly; the fixed tables in it must be the ones we compute."""
    renamed = rename(state, RULES)
    for name, width in (
        ("encoder.pos_embed", model.encoder.embed_dim),
        ("decoder_positions", model.config.decoder.embed_dim),
    ):
        if name in renamed and not torch.allclose(renamed[name][0, 1:], sincos_table(width, model.grid), atol=1e-5):
            raise UserError(f"mae: {name} in this file is not the fixed sine-cosine table of grid {model.grid}")
    load_strict(model, renamed, ignore=FIXED, where="mae checkpoint")
    return model


def load_encoder(state: Mapping[str, Tensor], options: Mapping[str, Any]) -> Encoder:
    """The encoder of a file without decoder; positions that were trained on (after fine-tuning) stay learned."""
    sizes = {**read_sizes(state), **options}
    table = state.get("pos_embed")
    if table is not None:
        side = math.isqrt(table.shape[1] - 1)
        fixed = sincos_table(table.shape[2], (side, side)) if table.shape[2] % 4 == 0 else table[0, 1:] * torch.nan
        sizes["position"] = "sincos" if torch.allclose(table[0, 1:], fixed, atol=1e-5) else "learned"
    described = backbone_options(sizes)
    if "norm.weight" not in state:
        described["final_norm"] = False
    encoder = build(described.pop("name"), **described)
    renamed = without_prefix(rename(state, RULES), "encoder.")
    load_strict(
        encoder, renamed, ignore=["pos_embed"] if sizes.get("position") != "learned" else [], where="mae checkpoint"
    )
    return encoder


# --- fixtures ---------------------------------------------------------------------------------------------------


def run_case(
    config: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], nn.Module, dict[str, Tensor]]:
    """Outputs and gradients of one fixture, under the authors' names."""
    model = load_mae(MAE(mae_config(config)), without_prefix(tensors, "param.")).train()
    images, draw = tensors["in.images"], Replay({"noise": tensors["draw.noise"]})
    mask = model.mask(images, draw)
    loss = model.loss({"image": images}, draw)["loss"]
    loss.backward()
    with torch.no_grad():
        encoded = model.encode(images, mask)
        features = model.encoder.tokens(images)
        predicted = model.decoder.all_tokens(encoded, mask.keep, mask.hide, mask.grid)
        alone, scale = model.predict_hidden(images, mask), float(predicted.abs().max())
        if not torch.allclose(select(predicted, mask.hide), alone, atol=1e-5 * max(scale, 1.0)):
            raise AssertionError("predicting the hidden tokens alone changed their values")
    prefix = model.encoder.prefix_tokens
    zero = torch.zeros(1, 1, 1)
    outputs = {
        "loss": loss.detach(),
        "pred": predicted,
        "mask": mask.hidden.float(),
        "latent_cls": encoded[:, 0],
        "features": features[:, prefix:],
        "features_cls": features[:, 0],
        "patches": patchify(images, model.encoder.patch_size),
        "pos_embed": torch.cat((zero.expand(1, 1, model.encoder.embed_dim), table(model.encoder.embed_dim, model)), 1),
        "decoder_pos_embed": torch.cat(
            (zero.expand(1, 1, model.config.decoder.embed_dim), table(model.config.decoder.embed_dim, model)), 1
        ),
    }
    return outputs, model, official_gradients(model)


def table(width: int, model: MAE) -> Tensor:
    return sincos_table(width, model.grid)[None]


BACK = [
    (r"encoder.", ""),
    (r"decoder.embed.", "decoder_embed."),
    (r"decoder.blocks.", "decoder_blocks."),
    (r"decoder.norm.", "decoder_norm."),
    (r"decoder.predict.", "decoder_pred."),
    (r"decoder.mask_token", "mask_token"),
]


def official_gradients(model: nn.Module) -> dict[str, Tensor]:
    """Gradients by the authors' names and shapes."""
    found = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is None:
            continue
        official = next((new + name.removeprefix(old) for old, new in BACK if name.startswith(old)), name)
        found[official] = parameter.grad
    return found
