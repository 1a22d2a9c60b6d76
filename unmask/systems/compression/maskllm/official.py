"""The authors' gates and masks: how their state dict becomes ours, and how a fixture is run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from unmask.draw import Replay
from unmask.errors import UserError
from unmask.official.load import Rule, load_strict, rename, without_prefix
from unmask.systems.compression.maskllm import priors
from unmask.systems.compression.maskllm.files import packed
from unmask.systems.compression.maskllm.gates import MaskedLinear
from unmask.systems.compression.maskllm.model import schedule

OPTIONS = ("model",)
RULES = [Rule(r"^language_model\.", ""), Rule(r"\.diff_mask\.mask_options$", ".diff_mask.options")]


def load_official(state: Mapping[str, Tensor], options: Mapping[str, Any] | None = None) -> Any:
    """Masks of a Megatron checkpoint (``*.mask``, or ``*.diff_mask.gate``) cannot become a model without the model they are of.

    Raises ``UserError`` that says how to use them.
    """
    if not any(name.endswith((".mask", ".diff_mask.gate")) for name in state):
        raise UserError("maskllm: these are no masks (no .mask, no .diff_mask.gate)")
    raise UserError(
        "maskllm: masks are applied to the model they are of: unmask compress MODEL --method maskllm masks=FILE -o DIR"
    )


class TwoLayers(nn.Module):
    """What the fixtures train: two masked linear layers with SiLU between."""

    def __init__(self, config: Mapping[str, Any]):
        super().__init__()
        keep, group = config.get("keep", 2), config.get("group", 4)
        first = nn.Linear(config["in_features"], config["hidden_features"], bias=False)
        second = nn.Linear(config["hidden_features"], config["out_features"], bias=False)
        self.up = MaskedLinear(first.requires_grad_(False), keep, group, layer="up")
        self.down = MaskedLinear(second.requires_grad_(False), keep, group, layer="down")

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.up(x)))


def run_case(
    config: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], nn.Module | None, dict[str, Tensor]]:
    """Outputs and gradients of one fixture, under the authors' names."""
    if "param.weight" in tensors:  # one layer
        return _priors(config, tensors), None, {}
    model = TwoLayers(config).train()
    state = rename(without_prefix(tensors, "param."), RULES)
    load_strict(model, state, where="maskllm fixture")
    layers = {"up": model.up, "down": model.down}
    outputs: dict[str, Tensor] = {}
    for name, layer in layers.items():
        if f"in.{name}.prior_mask" in tensors:
            layer.diff_mask.add_prior(tensors[f"in.{name}.prior_mask"], config.get("prior_strength", 3.0))
        outputs[f"{name}.gate_after_prior"] = layer.diff_mask.gate.detach().clone()
    draw = Replay(without_prefix(tensors, "draw."))
    fraction = config["iteration"] / config["iterations"]
    scale = schedule(config.get("scale_range", (1e2, 5e2)), fraction)
    temperature = schedule(config.get("temperature_range", (4.0, 0.05)), fraction)
    regulariser = torch.zeros(())
    for name, layer in layers.items():
        mask = layer.draw_mask(draw, scale, temperature, hard=config.get("hard", False), recompute=False)
        regulariser = regulariser + (layer.matrix * mask).square().sum()
        outputs[f"{name}.soft_mask"] = mask.detach()
    logits = model(tensors["in.x"])
    task = F.cross_entropy(logits.flatten(0, -2), tensors["in.target"].flatten())
    loss = task - config.get("weight_reg", 1e-5) * (1 - fraction) * regulariser
    loss.backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    model.eval()
    for name, layer in layers.items():
        final = layer.diff_mask.final()
        outputs[f"{name}.final_mask"] = final
        outputs[f"{name}.final_mask_packed"] = torch.from_numpy(packed(final))
    with torch.no_grad():
        outputs["logits_final"] = model(tensors["in.x"])
    outputs |= {
        "logits": logits.detach(),
        "lm_loss": task.detach(),
        "regulariser": regulariser.detach(),
        "loss": loss.detach(),
        "temperature": torch.tensor(temperature),
        "scale": torch.tensor(scale),
    }
    return outputs, model, gradients


def _priors(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    layer = nn.Linear(config["in_features"], config["out_features"], bias=False)
    load_strict(layer, without_prefix(tensors, "param."), where="maskllm fixture")
    weight, inputs = layer.weight.detach(), tensors["in.x"]
    group = config.get("group", 4)
    keep = group - config.get("prune_per_group", 2)  # the authors count what is removed
    known = priors.Statistics(weight.shape[1])
    for x in inputs:
        known.add(x if x.ndim > 2 else x[None])  # tokens alone are one sample
    assert known.hessian is not None
    options = {"block": config.get("block_size", priors.BLOCK), "damping": config.get("damping", 0.01)}
    sparsity = config.get("unstructured_sparsity", 0.5)
    frozen = priors.sparsegpt(weight, known.hessian, pattern=(keep, group), update=False, **options)
    moved = priors.sparsegpt(weight, known.hessian, pattern=(keep, group), **options)
    return {
        "magnitude_mask": priors.magnitude(weight, keep, group),
        "wanda_scaler": known.norms,
        "wanda_metric": priors.wanda_scores(weight, known.norms),
        "wanda_mask": priors.wanda(weight, known.norms, keep, group),
        "wanda_unstructured_mask": priors.wanda_unstructured(weight, known.norms, sparsity),
        "hessian": known.hessian,
        "sparsegpt_mask_frozen": frozen.mask,
        "sparsegpt_mask": moved.mask,
        "sparsegpt_weight": moved.weight,
        "sparsegpt_unstructured_weight": priors.sparsegpt(weight, known.hessian, sparsity=sparsity, **options).weight,
    }
