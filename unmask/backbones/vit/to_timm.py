"""Which model of timm computes what our ViT computes: ``VisionTransformer``, or ``Beit`` for the variants of BEiT."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from unmask.backbones.vit.model import ViT
from unmask.contracts import Encoder
from unmask.errors import UserError
from unmask.official.export import TimmTwin


def timm_twin(encoder: Encoder) -> TimmTwin:
    """Raises ``UserError`` naming the option that timm does not have."""
    vit = cast(ViT, encoder)
    c = vit.config
    if len(vit.patch_size) != 2:
        raise _none(f"patches of {len(vit.patch_size)} axes")
    if c.qk_scale is not None:
        raise _none(f"qk_scale={c.qk_scale}")
    if c.norm_eps != 1e-6:
        raise _none(f"norm_eps={c.norm_eps}")
    if not c.final_norm:
        raise _none("final_norm=false")
    arguments: dict[str, Any] = {
        "img_size": list(vit.image_size),
        "patch_size": list(vit.patch_size),
        "in_chans": c.in_channels,
        "embed_dim": c.embed_dim,
        "depth": c.depth,
        "num_heads": c.num_heads,
        "mlp_ratio": c.mlp_ratio,
        "init_values": c.init_values,
        "num_classes": 0,
        "global_pool": "avg",  # with the norm in front of it: our pooled features
    }
    return _beit(vit, arguments) if c.relative or c.qkv_bias == "qv" else _plain(vit, arguments)


def _plain(vit: ViT, arguments: dict[str, Any]) -> TimmTwin:
    c = vit.config
    arguments |= {"fc_norm": False, "final_norm": True, "class_token": c.class_token}
    arguments |= {"qkv_bias": bool(c.qkv_bias), "qk_norm": c.qk_norm}
    if c.position == "none":
        arguments["pos_embed"] = "none"
    state = _with_positions(vit, dict(vit.state_dict()))
    return TimmTwin("vit_base_patch16_224", arguments, state)


def _beit(vit: ViT, arguments: dict[str, Any]) -> TimmTwin:
    c = vit.config
    if c.qkv_bias is True:
        raise _none("relative positions with a bias of the keys (qkv_bias=qv has none)")
    if c.qk_norm or not c.class_token:
        raise _none("relative positions with qk_norm, or without a class token,")
    arguments |= {
        "qkv_bias": c.qkv_bias == "qv",
        "use_abs_pos_emb": c.position != "none",
        "use_rel_pos_bias": "per_block" in c.relative,
        "use_shared_rel_pos_bias": "shared" in c.relative,
        "use_fc_norm": False,
    }
    state = {}
    if c.init_values is None:  # timm's always scales its branches
        arguments["init_values"] = 1.0
        state = {f"blocks.{i}.gamma_{k}": torch.ones(c.embed_dim) for i in range(c.depth) for k in (1, 2)}
    for name, tensor in _with_positions(vit, dict(vit.state_dict())).items():
        if name.startswith("block_biases."):
            _, block, rest = name.split(".", 2)
            name = f"blocks.{block}.attn.{rest}"
        state[name.replace(".ls1.gamma", ".gamma_1").replace(".ls2.gamma", ".gamma_2")] = tensor
    return TimmTwin("beit_base_patch16_224", arguments, state)


def _with_positions(vit: ViT, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """timm keeps every table as a weight: the fixed one is written out."""
    position = vit.positions(vit.grid(), torch.device("cpu"))
    if position is not None:
        state["pos_embed"] = position.detach()[None].clone()
    return state


def _none(what: str) -> UserError:
    return UserError(f"timm has no ViT with {what}: export --to safetensors or onnx")
