"""The authors' checkpoints (ImageNet classifiers, and whatever holds the same network under ``backbone.``), by rules."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from unmask.backbones.stdc.model import STDC, build
from unmask.errors import UserError
from unmask.official.load import Rule, load_strict, rename

OPTIONS = tuple(STDC.Config.model_fields)
RULES = [
    Rule(r"^(module\.)?(cp\.)?backbone\.", ""),
    Rule(r"^x(2|4|8|16|32)\.", None),  # the same modules a second time
    Rule(r"^(conv_last|gap|fc|bn|relu|dropout|linear)\.", None),  # the classifier
    Rule(r"num_batches_tracked$", None),
]


def load_official(state: Mapping[str, Tensor], options: Mapping[str, Any] | None = None) -> STDC:
    """The encoder with the file's weights; its sizes are read off the tensors. Raises ``UserError`` for another network."""
    sizes = read_sizes(rename(state, RULES)) | dict(options or {})
    deep = sum(sizes["layers"]) > 6
    encoder = build("stdc2" if deep else "stdc1", **sizes)
    encoder.name, encoder.options = "stdc2" if deep else "stdc1", sizes
    load_encoder(encoder, state)
    return encoder.eval()


def read_sizes(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Options of :class:`STDC.Config` from tensors under our names."""
    first, second = state.get("features.0.conv.weight"), state.get("features.1.conv.weight")
    if first is None or second is None:
        raise UserError("stdc: these are not the weights of an STDC network (no features.0.conv, features.1.conv)")
    strided = sorted(int(f[1]) for k in state if (f := re.match(r"features\.(\d+)\.avd_layer\.0\.weight$", k)))
    blocks = 1 + max(int(f[1]) for k in state if (f := re.match(r"features\.(\d+)\.", k)))
    if len(strided) != 3 or strided[0] != 2:
        raise UserError("stdc: these weights have other stages than an STDC network (three, each begun with stride 2)")
    convolutions = {int(f[1]) for k in state if (f := re.match(r"features\.2\.conv_list\.(\d+)\.", k))}
    return {
        "in_channels": first.shape[1],
        "base": second.shape[0],
        "layers": (strided[1] - 2, strided[2] - strided[1], blocks - strided[2]),
        "block_num": len(convolutions),
    }


def load_encoder(encoder: STDC, state: Mapping[str, Tensor], *, where: str = "stdc checkpoint") -> None:
    """Load a state with the authors' names, strictly. Raises ``UserError``."""
    load_strict(encoder, rename(state, RULES), ignore=[r"num_batches_tracked$"], where=where)
