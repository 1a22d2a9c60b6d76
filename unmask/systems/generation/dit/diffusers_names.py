"""diffusers' names for DiT's weights (``DiTTransformer2DModel``), both ways.

diffusers keeps q, k and v apart, a copy of the time and class embedding in every block (all equal, of which the first counts),
and its final modulation as ``proj_out_1``. Its time sinusoid divides by 127 where the authors divide by 128: the same weights
give slightly other numbers there.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from unmask.errors import UserError

_FIRST = "transformer_blocks.0.norm1.emb."
_EMBEDDINGS = {
    "timestep_embedder.linear_1": "t_embedder.mlp.0",
    "timestep_embedder.linear_2": "t_embedder.mlp.2",
    "class_embedder.embedding_table": "y_embedder.embedding_table",
}
_OUTER = {
    "pos_embed.proj": "x_embedder.proj",
    "proj_out_1": "final_layer.adaLN_modulation.1",
    "proj_out_2": "final_layer.linear",
}
_INNER = {
    "attn1.to_out.0": "attn.proj",
    "norm1.linear": "adaLN_modulation.1",
    "ff.net.0.proj": "mlp.fc1",
    "ff.net.2": "mlp.fc2",
}
_QKV = ("to_q", "to_k", "to_v")
_BLOCK = re.compile(r"^transformer_blocks\.(\d+)\.(.+)\.(weight|bias)$")


def is_diffusers(state: Mapping[str, Tensor]) -> bool:
    return "proj_out_1.weight" in state and "transformer_blocks.0.attn1.to_q.weight" in state


def from_diffusers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """diffusers' state under the authors' names. Raises ``UserError`` for a name that is neither's, or blocks whose
    embeddings differ."""
    out: dict[str, Tensor] = {}
    apart: dict[str, dict[str, Tensor]] = {}
    for name, value in state.items():
        stem, _, kind = name.rpartition(".")
        if stem in _OUTER:
            out[f"{_OUTER[stem]}.{kind}"] = value
            continue
        found = _BLOCK.match(name)
        if name == "pos_embed.pos_embed":
            out["pos_embed"] = value
        elif found is None:
            raise UserError(f"dit: {name!r} is no weight of diffusers' DiT")
        elif found[2].startswith("norm1.emb."):
            if not torch.equal(value, state.get(_FIRST + name.split(".norm1.emb.")[1], value)):
                raise UserError(
                    f"dit: {name} differs from block 0: these embeddings were trained apart and are no DiT's"
                )
            out[f"{_EMBEDDINGS[found[2].removeprefix('norm1.emb.')]}.{kind}"] = value
        elif found[2].removeprefix("attn1.") in _QKV:
            apart.setdefault(f"blocks.{found[1]}.attn.qkv.{kind}", {})[found[2].removeprefix("attn1.")] = value
        elif found[2] in _INNER:
            out[f"blocks.{found[1]}.{_INNER[found[2]]}.{kind}"] = value
        else:
            raise UserError(f"dit: {name!r} is no weight of diffusers' DiT")
    return out | {name: torch.cat([parts[p] for p in _QKV]) for name, parts in apart.items()}


def to_diffusers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The authors' names to diffusers'. The position table, which diffusers computes, stays out."""
    out: dict[str, Tensor] = {}
    depth = 1 + max(int(n.split(".")[1]) for n in state if n.startswith("blocks."))
    outer = {theirs: ours for ours, theirs in _OUTER.items()}
    embeddings = {theirs: ours for ours, theirs in _EMBEDDINGS.items()}
    inner = {theirs: ours for ours, theirs in _INNER.items()}
    for name, value in state.items():
        stem, _, kind = name.rpartition(".")
        if name == "pos_embed":
            continue
        if stem in outer:
            out[f"{outer[stem]}.{kind}"] = value
        elif stem in embeddings:
            for i in range(depth):
                out[f"transformer_blocks.{i}.norm1.emb.{embeddings[stem]}.{kind}"] = value
        else:
            _, number, part = stem.split(".", 2)
            if part == "attn.qkv":
                for own, rows in zip(_QKV, value.chunk(3), strict=True):
                    out[f"transformer_blocks.{number}.attn1.{own}.{kind}"] = rows
            else:
                out[f"transformer_blocks.{number}.{inner[part]}.{kind}"] = value
    return out
