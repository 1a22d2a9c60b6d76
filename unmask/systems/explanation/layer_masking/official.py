"""The authors' numbers: single layers, blocks, a bottleneck network, and LIME, all on torchvision's parameter names.

There are no checkpoints of the method's own: it takes a classifier as it is.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unmask.errors import UserError
from unmask.official.load import load_strict, without_prefix
from unmask.systems.explanation import lime
from unmask.systems.explanation.layer_masking import networks
from unmask.systems.explanation.layer_masking.masked_map import Padding, Rules
from unmask.systems.explanation.layer_masking.propagate import masked, values
from unmask.systems.explanation.layer_masking.visible import Visible, filled
from unmask.systems.explanation.regions import visible_of

OPTIONS: tuple[str, ...] = ()
MODES: dict[str, Padding] = {"neighbour": "neighbour", "nopad": "none", "partial": "partial"}
Numbers = dict[str, Tensor]


def load_official(state: Mapping[str, Tensor], options: Mapping[str, Any] | None = None) -> nn.Module:
    """There is nothing to load. Raises ``UserError``."""
    raise UserError(
        "layer_masking has no checkpoints of its own: unmask explain torchvision/resnet50 photo.png weights=FILE"
    )


def run_case(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> tuple[Numbers, nn.Module | None, Numbers]:
    """Outputs and gradients of one fixture, under its names."""
    if "in.presence" in tensors:
        return lime_case(config, tensors)
    if config.get("architecture"):
        return resnet_case(config, tensors)
    if "maxpool" in config or "batchnorm" in config:
        return layers_case(config, tensors)
    return blocks_case(config, tensors)


def given(tensors: Mapping[str, Tensor], prefix: str = "") -> Numbers:
    """Weights and running statistics below a prefix, without it."""
    found: Numbers = {}
    for kind in ("param.", "buffer."):
        found |= without_prefix(tensors, kind + prefix)
    return found


def filled_module(module: nn.Module, tensors: Mapping[str, Tensor], prefix: str) -> nn.Module:
    """The module with its weights, in evaluation mode. Batch norm's counts are not in fixtures."""
    counts = [n for n, _ in module.named_buffers() if n.endswith("num_batches_tracked")]
    load_strict(module, given(tensors, prefix), ignore=counts, where=prefix or "the fixture")
    return module.eval()


# --- single layers ---


def layers_case(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> tuple[Numbers, nn.Module, Numbers]:
    x, mask = tensors["in.x"].clone().requires_grad_(True), tensors["in.mask"]
    visible = Visible.of(mask, x)
    out: Numbers = {}
    for rounds in range(8):
        out[f"pad{rounds}"] = filled(x * mask, visible, rounds)
    convolutions = nn.ModuleDict(
        {k: networks.convolution(v) for k, v in config.items() if isinstance(v, Mapping) and "in" in v and "out" in v}
    )
    parts = nn.ModuleDict({**convolutions, "batchnorm": networks.norm(x.shape[1], config.get("batchnorm") or {})})
    names = {n for n, _ in parts.named_parameters()} | {n for n, _ in parts.named_buffers()}
    known = dict(given(tensors).items())
    load_strict(parts, known, ignore=[n for n in names if n.endswith("num_batches_tracked")], where="the fixture")
    parts.eval()
    for name, layer in convolutions.items():
        for word, padding in MODES.items():
            got, after = values(layer(masked(x, mask, Rules(padding))))
            out[f"{name}.{word}"] = got
            out[f"{name}.mask"] = _mask(after)
    simple: dict[str, Callable[[Tensor], Tensor]] = {
        "batchnorm": parts["batchnorm"],
        "relu": F.relu,
        "hardswish": F.hardswish,
        "sigmoid": torch.sigmoid,
        "hardsigmoid": F.hardsigmoid,
        "silu": F.silu,
        "gelu": F.gelu,
        "identity": nn.Identity(),
        "maxpool": networks.pool(nn.MaxPool2d, config.get("maxpool") or {}),
        "avgpool": networks.pool(nn.AvgPool2d, config.get("avgpool") or {}),
        "global_avgpool": nn.AdaptiveAvgPool2d(1),
    }
    for name, function in simple.items():
        got, after = values(function(masked(x, mask, Rules(), hide=False)))
        out[name] = got
        out[f"{name}.mask"] = mask if after is None else _mask(after)
    gradients: Numbers = {}
    if "in.grad_weight" in tensors:
        (out["conv_stride1.neighbour"] * tensors["in.grad_weight"]).sum().backward()
        gradients = {n: p.grad for n, p in parts.named_parameters() if p.grad is not None}
        gradients["x"] = x.grad if x.grad is not None else torch.zeros_like(x)
    return {k: v.detach() for k, v in out.items()}, parts, gradients


def _mask(after: Tensor | None) -> Tensor:
    assert after is not None
    return after


# --- blocks ---


def blocks_case(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> tuple[Numbers, nn.Module, Numbers]:
    x, mask = tensors["in.x"], tensors["in.mask"]
    blocks = networks.blocks(dict(config.items()))
    out: Numbers = {}
    used: set[str] = set()
    with torch.no_grad():
        for name, block in blocks.items():
            filled_module(block, tensors, f"{name}.")
            used |= {k for k in tensors if k.startswith((f"param.{name}.", f"buffer.{name}."))}
            out[f"{name}.plain"] = block(x.clone())
            rules = Rules(variant="older" if name in ("fire", "alex_stack") else "main")
            got, after = values(block(masked(x, mask, rules, hide=False)))
            out[name] = got
            if after is not None:
                out[f"{name}.mask"] = after
    left = [k for k in tensors if k.startswith(("param.", "buffer.")) and k not in used]
    if left:
        raise UserError(f"no block takes {', '.join(sorted(left)[:3])}")
    return out, nn.ModuleDict(blocks), {}


# --- a network ---


def resnet_case(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> tuple[Numbers, nn.Module, Numbers]:
    network = networks.SmallResNet.described(config)
    filled_module(network, tensors, "")
    image, mask = tensors["in.image"].clone().requires_grad_(True), tensors["in.mask"]
    out: Numbers = {"logits_unmasked": network(image), "logits_replaced": network(image * mask)}
    for name, padding in MODES.items():
        out[f"logits_{name}"] = network(masked(image, mask, Rules(padding)))
    stem = network.stem(masked(image, mask, Rules()))
    out["stem"], stem_mask = values(stem)
    out["last"], last_mask = values(network.stages(stem))
    out["stem_mask"], out["last_mask"] = _mask(stem_mask), _mask(last_mask)
    out["logits_neighbour"].log_softmax(dim=1)[:, 1].sum().backward()
    gradients = {n: p.grad for n, p in network.named_parameters() if p.grad is not None}
    gradients["image"] = image.grad if image.grad is not None else torch.zeros_like(image)
    return {k: v.detach() for k, v in out.items()}, network, gradients


# --- LIME ---


def lime_case(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> tuple[Numbers, None, Numbers]:
    presence, probabilities = tensors["in.presence"], tensors["in.probabilities"]
    segments, labels = tensors["in.segments"].long(), int(config.get("top_labels", 1))
    told = re.search(r"alpha ([\d.]+)", str(config.get("regressor", "")))
    alpha, width = float(told[1]) if told else 1.0, float(config.get("kernel_width", 0.25))
    fit = lime.fit(presence, probabilities, labels, kernel_width=width, alpha=alpha)
    first = fit.weights[0]
    out = {
        "top_labels": fit.labels,
        "weights": fit.weights,
        "intercept": fit.intercept,
        "distance": fit.distance,
        "sample_weight": fit.sample_weight,
        "score_last": fit.score[0],
        "local_prediction_last": fit.prediction[0],
    }
    for count in range(1, min(len(presence), 16) + 1):
        out[f"hidden_first{count}"] = 1 - visible_of(presence[:count], segments)[:, 0].float()
        out[f"top{count}_signed"] = lime.signed_top(first, segments, count)
    if "in.object" in tensors:
        out["coverage"] = lime.coverage(first, segments, tensors["in.object"])
    return out, None, {}
