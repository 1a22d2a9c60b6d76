"""Which options make a library build a cut architecture by itself: only where every layer was cut alike."""

from __future__ import annotations

from typing import Any

from unmask.models.user import UserModel


def options(model: UserModel) -> tuple[dict[str, Any] | None, str]:
    """Options for ``timm.create_model``, the torchvision builder or the transformers config; or None and the reason."""
    if model.family == "transformers":
        return _transformers(model)
    if model.family == "timm":
        return _timm(model)
    if model.family == "torchvision":
        return _torchvision(model)
    return None, "a model of this kind has no config in another library"


def _one(values: list[int]) -> int | None:
    return values[0] if values and len(set(values)) == 1 else None


def _transformers(model: UserModel) -> tuple[dict[str, Any] | None, str]:
    config: Any = model.module.config
    state = model.module.state_dict()
    cut_heads = any(k.startswith(("num_", "all_head", "split")) for v in model.surgery.attributes.values() for k in v)
    ends = {"bert": "intermediate.dense.weight", "gpt2": "mlp.c_fc.weight", "llama": "mlp.up_proj.weight"}
    kind = str(config.model_type)
    width_of = {"bert": "intermediate_size", "gpt2": "n_inner", "llama": "intermediate_size"}.get(kind)
    if width_of is None:
        return None, f"{kind} is not known well enough here"
    axis = 1 if kind == "gpt2" else 0
    width = _one([int(v.shape[axis]) for n, v in state.items() if n.endswith(ends[kind])])
    if width is None:
        return None, "its layers keep different numbers of neurons, and its config has one for all"
    out: dict[str, Any] = {width_of: width}
    if kind == "llama":
        d = int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
        q = _one([int(v.shape[0]) for n, v in state.items() if n.endswith("q_proj.weight")])
        kv = _one([int(v.shape[0]) for n, v in state.items() if n.endswith("k_proj.weight")])
        if q is None or kv is None:
            return None, "its layers keep different numbers of heads, and its config has one for all"
        return out | {"head_dim": d, "num_attention_heads": q // d, "num_key_value_heads": kv // d}, ""
    if cut_heads:
        return None, f"{kind}'s config cannot have fewer heads at the same head size"
    return out, ""


def _timm(model: UserModel) -> tuple[dict[str, Any] | None, str]:
    module: Any = model.module
    if not hasattr(module, "blocks") or not hasattr(module.blocks[0] if len(module.blocks) else None, "attn"):
        return None, "its config has no widths of single layers"
    heads = _one([int(b.attn.num_heads) for b in module.blocks])
    width = _one([int(b.mlp.fc1.out_features) for b in module.blocks])
    if heads is None or width is None:
        return None, "its blocks keep different numbers of heads or neurons, and its config has one for all"
    first = module.blocks[0].attn
    told: dict[str, Any] = {"mlp_ratio": (width + 0.5) / module.embed_dim}
    if hasattr(first, "attn_dim") and first.head_dim * heads != module.embed_dim:
        # the head's width goes in by attn_layer: a subclass of timm.layers.Attention that passes attn_head_dim on
        return told | {"num_heads": heads, "attn_head_dim": int(first.head_dim)}, ""
    return told | {"num_heads": heads}, ""


def _torchvision(model: UserModel) -> tuple[dict[str, Any] | None, str]:
    from torchvision.models import ResNet
    from torchvision.models.resnet import Bottleneck

    module: Any = model.module
    if isinstance(module, ResNet) and isinstance(module.layer1[0], Bottleneck):
        shares = [
            b.conv1.out_channels / (64 * 2**i)
            for i, layer in enumerate((module.layer1, module.layer2, module.layer3, module.layer4))
            for b in layer
        ]
        inner_only = all(".conv3" not in n or n.endswith("weight") for n in model.surgery.shapes)
        if len(set(shares)) == 1 and inner_only:
            return {"width_per_group": shares[0] * 64}, ""
    return None, "its layers keep different numbers of channels, and torchvision's builder has one width for all"
