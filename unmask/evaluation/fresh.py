"""The baseline of every probe: the same network before it learned anything."""

from __future__ import annotations

import copy
import math

import torch
from torch import nn

from unmask.contracts import Encoder


def fresh(encoder: Encoder, seed: int) -> Encoder:
    """The same architecture with random weights, from the seed alone; the caller's random state is left as it was.

    Built again from its name and options where it has them (without any pretrained weights); otherwise a copy whose
    modules are reset one by one.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made = _rebuilt(encoder) if encoder.name else None
        if made is None:
            made = _reset(copy.deepcopy(encoder))
    made.preprocessing = encoder.preprocessing
    device = next((p.device for p in encoder.parameters()), torch.device("cpu"))
    return made.to(device).requires_grad_(False).eval()


def _rebuilt(encoder: Encoder) -> Encoder | None:
    from unmask.backbones import build
    from unmask.errors import UserError

    options = {k: v for k, v in getattr(encoder, "options", {}).items() if k not in ("weights", "checkpoint")}
    if options.get("pretrained"):
        options["pretrained"] = False
    try:
        return build(encoder.name, **options)
    except UserError:  # an encoder of another package, or one whose name is only a label
        return None


@torch.no_grad()
def _reset(encoder: Encoder) -> Encoder:
    """Every module's own ``reset_parameters``; parameters of modules without one become normal, std 0.02, or 0 for vectors."""
    for module in encoder.modules():
        own = list(module.parameters(recurse=False))
        reset = getattr(module, "reset_parameters", None)
        if callable(reset):
            reset()
        elif isinstance(module, nn.MultiheadAttention):
            module._reset_parameters()
        else:
            for parameter in own:
                if parameter.ndim < 2:
                    parameter.fill_(1.0 if bool((parameter > 0).all()) and math.prod(parameter.shape) > 1 else 0.0)
                else:
                    parameter.normal_(std=0.02)
    return encoder
