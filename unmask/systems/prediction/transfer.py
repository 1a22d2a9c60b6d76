"""A pre-trained encoder's weights into the encoder that is to be fine-tuned, by rules (MAE, BEiT, SimMIM, Swin).

What only pre-training needs is left behind (mask tokens, a last norm that fine-tuning does without); what depends on the
grid is resized; everything else must fit exactly.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from unmask.contracts import Encoder
from unmask.errors import UserError
from unmask.nn.positions import RelativePositionBias, resize_relative_table, resize_table
from unmask.official.hub import load_encoder
from unmask.official.load import load_strict

TABLE = "relative_position_bias_table"
SHARED = f"rel_pos_bias.{TABLE}"


def transfer(encoder: Encoder, source: Encoder, *, where: str | Path = "the encoder") -> None:
    """Copy ``source``'s weights into ``encoder`` by the rules above. where: the source's name in errors.

    Raises ``UserError`` naming what is missing, left over, or of another shape; the encoder is then unchanged.
    """
    state = {n: v for n, v in source.state_dict().items() if not re.search(r"(^|\.)mask_token$", n)}
    wanted = encoder.state_dict()
    if SHARED in state and SHARED not in wanted:
        state = _shared_into_blocks(state, wanted)
    if "pos_embed" in wanted and "pos_embed" not in state and hasattr(source, "positions"):
        # MAE's fine-tuning goes on from the fixed table, and learns it
        table = source.positions(encoder.grid(), torch.device("cpu"))
        if table is not None:
            state["pos_embed"] = table[None].detach()
    if not any(n.startswith("norm.") for n in wanted):
        state = {n: v for n, v in state.items() if not n.startswith("norm.")}
    fitted = {n: _fit(n, v, wanted[n], source, encoder) if n in wanted else v for n, v in state.items()}
    channels = (source.in_channels, encoder.in_channels)
    if channels[0] != channels[1]:
        raise UserError(
            f"{where} was made for {channels[0]} channels, the data has {channels[1]}: train one on such data"
        )
    load_strict(
        encoder, fitted, ignore=[r"relative_position_index$", r"relative_coords_table$", r"attn_mask$"], where=where
    )


def transfer_from(encoder: Encoder, folder: str | Path) -> None:
    """:func:`transfer` from a run, an encoder's folder or an export."""
    transfer(encoder, load_encoder(folder), where=folder)


def backbone_of(
    folder: str | Path, wished: Mapping[str, Any], *, free: Sequence[str] = (), drop: Sequence[str] = ()
) -> dict[str, Any]:
    """The backbone that a run (or an encoder's folder) holds, as plain options: its name and options without the size. wished:
    what the user asked of a backbone; of it ``free`` options and the image size are taken. drop: options left out."""
    source = load_encoder(folder)
    own = getattr(source, "config", None)
    chosen = {k: v for k, v in wished.items() if k in free and hasattr(own, k)}
    kept = {k: v for k, v in source.options.items() if k not in ("image_size", *drop)}
    size = {"image_size": wished["image_size"]} if wished.get("image_size") is not None else {}
    return {"name": source.name, **kept, **chosen, **size}


def _shared_into_blocks(state: dict[str, Tensor], wanted: dict[str, Tensor]) -> dict[str, Tensor]:
    """SimMIM's ViT: the table that all blocks shared becomes each block's own."""
    table = state[SHARED]
    rest = {n: v for n, v in state.items() if n != SHARED}
    copies = {n: table for n in wanted if n.endswith(TABLE) and n not in rest}
    return rest | copies


def _fit(name: str, value: Tensor, wanted: Tensor, source: Encoder, encoder: Encoder) -> Tensor:
    """The tensor at the wanted shape where only the grid differs; otherwise as it is, for the strict loader to refuse."""
    if value.shape == wanted.shape:
        return value
    if name.endswith(TABLE) and value.shape[1:] == wanted.shape[1:]:
        old, extra = _window(source, name, value)
        new, _ = _window(encoder, name, wanted)
        # tables of a whole grid with class-token rows are BEiT's, which spaces old offsets geometrically
        return resize_relative_table(value, old, new, extra=extra, spacing="geometric" if extra else "even")
    if name in ("pos_embed", "absolute_pos_embed") and value.shape[-1] == wanted.shape[-1]:
        prefix = encoder.prefix_tokens if name == "pos_embed" else 0
        patches = resize_table(value[:, prefix:], source.grid(), encoder.grid())
        return torch.cat((value[:, :prefix], patches), dim=1)
    return value


def _window(encoder: Encoder, name: str, table: Tensor) -> tuple[Sequence[int], int]:
    """The window a relative table belongs to, and how many rows of it are for the class token."""
    owner: nn.Module | None = dict(encoder.named_modules()).get(name.rpartition(".")[0])
    if isinstance(owner, RelativePositionBias):
        return owner.window, 3 if owner.prefix else 0
    if hasattr(owner, "window"):
        return owner.window, 0  # type: ignore[return-value, union-attr]
    side = round((table.shape[0] ** 0.5 + 1) / 2)
    return (side, side), 0
