"""The authors' checkpoints (mmpretrain's layout) and their numbers.

The network is MAE's under other names, so the rules turn a state dict into the names of MAE's authors, and ``mae`` takes
it from there.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from unmask.contracts import Encoder
from unmask.draw import Replay
from unmask.masks.color import shared_crop_mask
from unmask.official.load import Rule, rename
from unmask.systems.pretraining.colormae.model import ColorMAE
from unmask.systems.pretraining.mae import official as mae

RULES = [
    Rule(r"^(head|data_preprocessor|teacher|momentum)\b.*", None),
    Rule(r"^backbone\.patch_embed\.projection\.", "patch_embed.proj."),
    Rule(r"^backbone\.(norm1|ln1)\.", "norm."),
    Rule(r"^backbone\.", ""),
    Rule(r"^neck\.", ""),
    Rule(r"^layers\.", "blocks."),
    Rule(r"^(decoder_)?blocks\.(\d+)\.ln([12])\.", r"\1blocks.\2.norm\3."),
    Rule(r"\.ffn\.layers\.0\.0\.", ".mlp.fc1."),
    Rule(r"\.ffn\.layers\.1\.", ".mlp.fc2."),
]


def load_official(state: Mapping[str, Tensor], options: Mapping[str, Any] | None = None) -> ColorMAE | Encoder:
    """The system (or the encoder alone, where the file has no decoder) with a checkpoint's weights.

    options: what tensors do not tell, by the authors' names (``num_heads``, ``mask_ratio``), and ours for the masks
    (``color``, ``bank_size``). Raises ``UserError`` when the state is of another system.
    """
    state, options = rename(state, RULES), dict(options or {})
    own = {key: options.pop(key) for key in list(options) if key in OWN}
    if "decoder_embed.weight" not in state:
        return mae.load_official(state, options)  # type: ignore[return-value]
    base = mae.mae_config({"norm_pix_loss": True, **mae.read_sizes(state), **options})
    model = ColorMAE(ColorMAE.Config(**{**base.model_dump(exclude={"masking"}), **own}))
    mae.load_mae(model, state)
    return model


OWN = set(ColorMAE.Config.model_fields) - set(ColorMAE.__mro__[1].Config.model_fields)  # type: ignore[attr-defined]
OPTIONS = (*mae.OPTIONS, *sorted(OWN))


# --- fixtures ---------------------------------------------------------------------------------------------------


def run_case(
    config: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], nn.Module | None, dict[str, Tensor]]:
    """The masks of a batch from a bank and recorded crops; there is no network in it, and no gradient."""
    side = config["grid_size"]
    grid = (side, side) if isinstance(side, int) else tuple(side)
    names = ("top", "left", "flip_horizontal", "flip_vertical")
    draw = Replay({name: tensors[f"draw.{name}"] for name in names})
    mask = shared_crop_mask(tensors["in.bank"], draw, config["batch_size"], grid, config["mask_ratio"])
    return {"mask": mask.hidden.to(torch.float32), "visible_ids": mask.keep}, None, {}
