"""ESM's checkpoints and numbers: how their state dict becomes ours, and how a fixture is run.

A public file (``esm_msa1b_t12_100M_UR50S.pt``) carries its options beside the weights, calls row attention column attention and
the other way round, and has its contact regression in a second file, which is merged in where it lies beside the first.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from unmask.data.alignments import aligned
from unmask.draw import Replay
from unmask.errors import UserError
from unmask.official.load import Rule, load_strict, read_checkpoint, rename
from unmask.systems.proteins.alphabet import tokens_of_batch, tokens_of_letters
from unmask.systems.proteins.msa_transformer.contacts import RANGES, precision_by_range
from unmask.systems.proteins.msa_transformer.model import MSATransformer
from unmask.systems.proteins.msa_transformer.mutations import masked_marginals, mutation_score
from unmask.systems.proteins.msa_transformer.network import MSANetwork, NetworkConfig
from unmask.systems.proteins.rows import greedy_rows

OPTIONS = (
    "attention_heads",
    "dropout",
    "attention_dropout",
    "activation_dropout",
    "max_tokens_per_msa",
    "contact_regression",
)

# The public files call row attention column attention and the other way round; their names also have a prefix.
SWAP = [
    Rule(r"^(encoder\.)?(sentence_encoder\.)?", ""),
    Rule(r"row(?=_self_attention)", "rÖw"),
    Rule(r"column(?=_self_attention)", "row"),
    Rule(r"rÖw(?=_self_attention)", "column"),
]
RULES = [
    Rule(r"^lm_head\.weight$", None),  # the token table once more
    Rule(r"^embed_tokens_oh\.weight$", None),
    Rule(r"^embed_out(_bias)?$", None),
    Rule(r"^msa_position_embedding$", "row_positions", lambda t: t.reshape(t.shape[1], t.shape[3])),
    Rule(r"^emb_layer_norm_(before|after)\.", r"norm_\1."),
    Rule(r"^lm_head\.dense\.", "head_dense."),
    Rule(r"^lm_head\.layer_norm\.", "head_norm."),
    Rule(r"^lm_head\.bias$", "head_bias"),
    Rule(r"^layers\.(\d+)\.(row|column)_self_attention\.layer_norm\.", r"layers.\1.\2.norm."),
    Rule(r"^layers\.(\d+)\.(row|column)_self_attention\.layer\.out_proj\.", r"layers.\1.\2.proj."),
    Rule(r"^layers\.(\d+)\.(row|column)_self_attention\.layer\.([qkv])_proj\.", r"layers.\1.\2.\3."),
    Rule(r"^layers\.(\d+)\.feed_forward_layer\.layer_norm\.", r"layers.\1.mlp.norm."),
    Rule(r"^layers\.(\d+)\.feed_forward_layer\.layer\.", r"layers.\1.mlp."),
]


def fused(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same state with the weights of queries, keys and values one above the other."""
    out, parts = {}, dict[str, dict[str, Tensor]]()
    for name, value in state.items():
        found = re.fullmatch(r"(layers\.\d+\.(?:row|column)\.)([qkv])\.(weight|bias)", name)
        if found:
            parts.setdefault(f"{found[1]}qkv.{found[3]}", {})[found[2]] = value
        else:
            out[name] = value
    for name, qkv in parts.items():
        if len(qkv) != 3:
            raise UserError(f"msa_transformer: {name} has only {', '.join(qkv)} of query, key and value in this file")
        out[name] = torch.cat([qkv[k] for k in "qkv"])
    return out


def renamed(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our names from the authors' (of a module or of a public file)."""
    if any(name.startswith(("encoder.", "sentence_encoder.")) for name in state):
        state = rename(state, SWAP)
    return fused(rename(state, RULES))


def load_official(state: Mapping[str, Tensor], options: Mapping[str, Any] | None = None) -> MSATransformer:
    """The system with the file's weights. The sizes are read off the tensors, the heads off the contact regression; options give
    what tensors do not tell (``OPTIONS``); ``contact_regression`` is the second file, a path or its tensors.

    Raises ``UserError`` when the state is of another system.
    """
    options = dict(options or {})
    regression = options.pop("contact_regression", None)
    if regression is not None:
        state = {**state, **(read_checkpoint(regression) if isinstance(regression, (str, Path)) else regression)}
    network = network_of(state, options)
    model = MSATransformer(MSATransformer.Config(network=network.config))
    model.network = network
    return model.eval()


def load_file(path: str | Path, options: Mapping[str, Any] | None = None) -> MSATransformer:
    """A public file, with ``NAME-contact-regression.pt`` where it lies beside it. Raises ``UserError``."""
    path, options = Path(path), dict(options or {})
    second = path.with_name(f"{path.stem}-contact-regression.pt")
    if second.is_file():
        options.setdefault("contact_regression", second)
    return load_official(read_checkpoint(path), options)


def network_of(state: Mapping[str, Tensor], options: Mapping[str, Any] | None = None) -> MSANetwork:
    """The network alone, loaded strictly; a file without contact regression leaves that head unfitted."""
    ours = renamed(state)
    if "embed_tokens.weight" not in ours or "layers.0.row.qkv.weight" not in ours:
        raise UserError(
            "msa_transformer: these are not the weights of an MSA Transformer (no embed_tokens, row_self_attention)"
        )
    network = MSANetwork(network_config(ours, options or {}))
    has_contacts = any(name.startswith("contact_head.") for name in ours)
    ignore = [r"^contact_head\.fitted$"] if has_contacts else [r"^contact_head\."]
    load_strict(network, ours, ignore=ignore, where="msa_transformer checkpoint")
    network.contact_head.fitted.fill_(has_contacts)  # type: ignore[operator]
    return network


def network_config(ours: Mapping[str, Tensor], options: Mapping[str, Any]) -> NetworkConfig:
    """The config that fits renamed tensors."""
    dim = ours["embed_tokens.weight"].shape[1]
    depth = 1 + max(int(name.split(".")[1]) for name in ours if name.startswith("layers."))
    rows = ours.get("row_positions")
    heads = options.get("attention_heads")
    if heads is None:
        regression = ours.get("contact_head.regression.weight")
        heads = regression.shape[1] // depth if regression is not None else max(dim // 64, 1)
    return NetworkConfig(
        embed_dim=dim,
        depth=depth,
        num_heads=heads,
        mlp_dim=ours["layers.0.mlp.fc1.weight"].shape[0],
        max_positions=ours["embed_positions.weight"].shape[0] - 2,
        max_rows=1024 if rows is None else rows.shape[0],
        row_positions="none" if rows is None else "scalar" if rows.shape[1] == 1 else "full",
        dropout=options.get("dropout", 0.1),
        activation_dropout=options.get("activation_dropout", 0.1),
        max_tokens=options.get("max_tokens_per_msa", 2**14),
    )


# --- fixtures ---------------------------------------------------------------------------------------------------


def run_case(
    config: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], nn.Module | None, dict[str, Tensor]]:
    """Outputs and gradients of one fixture, under the authors' names."""
    if "in.tokens" in tensors:
        return _training(config, tensors)
    if "in.msa" in tensors or "in.single" in tensors:
        return _scores(config, tensors)
    return _tools(config, tensors), None, {}


def _model(
    config: Mapping[str, Any], tensors: Mapping[str, Tensor], masking: Mapping[str, Any] | None = None
) -> MSATransformer:
    state = {name.removeprefix("param."): value for name, value in tensors.items() if name.startswith("param.")}
    model = load_official(state, {k: config[k] for k in OPTIONS if k in config} | {"max_tokens_per_msa": 2**14})
    return MSATransformer.of(model.network, masking=dict(masking or {})).eval()


def _training(
    config: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], nn.Module, dict[str, Tensor]]:
    shares = ("mask_probability", "mask_share", "random_share", "keep_share")
    masking = {
        key.removeprefix("mask_") if key == "mask_probability" else key: config[key] for key in shares if key in config
    }
    model = _model(config, tensors, masking)
    tokens = tensors["in.tokens"]
    draw = Replay({k.removeprefix("draw."): v for k, v in tensors.items() if k.startswith("draw.")})
    masked, hidden = model.mask(tokens, draw)
    depth = model.network.config.depth
    seen = model.network(masked, need_maps=True, layers=tuple(range(depth + 1)))
    logits = model.network.letters(seen.last)
    loss = F.cross_entropy(logits[hidden], tokens[hidden])
    own = model.loss({"tokens": tokens}, draw)["loss"]
    if not torch.allclose(own, loss, atol=1e-5, rtol=1e-4):
        raise AssertionError("predicting the hidden letters alone changed the loss")
    contacts = model.network.contacts(seen.row_maps)
    (loss + 0.1 * contacts.square().sum()).backward()
    outputs = {
        "masked_tokens": masked,
        "hidden": hidden,
        "logits": logits,
        "loss": loss,
        "row_attentions": seen.row_maps,
        "col_attentions": seen.column_maps,
        "contacts": contacts,
        "representation_last": seen.last,
    } | {f"representation_{i}": value for i, value in seen.layers.items()}
    return outputs, model, official_gradients(model.network)


@torch.no_grad()
def _scores(
    config: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], nn.Module, dict[str, Tensor]]:
    model = _model(config, tensors)
    outputs: dict[str, Tensor] = {}
    for given, name in (("single", "single"), ("msa", "msa"), ("msa_row_padded", "row_padded")):
        if f"in.{given}" not in tensors:
            continue
        seen = model.network(tensors[f"in.{given}"], need_maps=True)
        outputs[f"{name}_logits"] = model.network.letters(seen.last)
        outputs[f"{name}_contacts"] = model.network.contacts(seen.row_maps)
        outputs[f"{name}_col_attentions"] = seen.column_maps
        outputs[f"{name}_row_attentions"] = seen.row_maps
    if "in.msa" in tensors:
        msa = tensors["in.msa"]
        if "max_tokens_per_msa_chunked" in config:
            model.network.config.max_tokens = int(config["max_tokens_per_msa_chunked"])
            pieces = model.network.letters(model.network(msa).last)
            model.network.config.max_tokens = 2**14
            if not torch.allclose(pieces, outputs["msa_logits"], atol=1e-5, rtol=1e-4):
                raise AssertionError("working in pieces changed the logits")
        outputs["masked_marginals"] = table = masked_marginals(model.network, msa, batch_size=4)
        if "in.mutation_column" in tensors:
            columns, mutants = tensors["in.mutation_column"], tensors["in.mutation_token"]
            outputs["mutation_score"] = mutation_score(table, msa[0, 0], columns, mutants)
    return outputs, model, {}


def _tools(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    outputs: dict[str, Tensor] = {}
    tables = [
        aligned([(str(i), row) for i, row in enumerate(rows)], source=key, unknown="ok")
        for key, rows in config.items()
        if key.startswith("raw_")
    ]
    if tables:
        outputs["tokens"] = tokens_of_batch([table.texts() for table in tables])
        letters, count = tables[0].letters, int(config.get("select", len(tables[0])))
        outputs["select_max"] = torch.from_numpy(greedy_rows(letters, count))
        outputs["select_min"] = torch.from_numpy(greedy_rows(letters, count, largest=False))
        if not np.array_equal(tokens_of_letters(letters), tokens_of_batch([tables[0].texts()])[0]):
            raise AssertionError("letters and text give different tokens")
    if "in.predicted" in tensors:
        ranges = {k: tuple(v) for k, v in config.get("contact_ranges", RANGES).items()}
        found = precision_by_range(tensors["in.predicted"], tensors["in.target"], count_outside=True, ranges=ranges)
        outputs["metrics"] = torch.tensor([found[name] for name in config.get("metric_names", found)])
    return outputs


BACK = [
    (r"^norm_(before|after)\.", r"emb_layer_norm_\1."),
    (r"^head_dense\.", "lm_head.dense."),
    (r"^head_norm\.", "lm_head.layer_norm."),
    (r"^head_bias$", "lm_head.bias"),
    (r"^row_positions$", "msa_position_embedding"),
    (r"^layers\.(\d+)\.(row|column)\.norm\.", r"layers.\1.\2_self_attention.layer_norm."),
    (r"^layers\.(\d+)\.(row|column)\.proj\.", r"layers.\1.\2_self_attention.layer.out_proj."),
    (r"^layers\.(\d+)\.mlp\.norm\.", r"layers.\1.feed_forward_layer.layer_norm."),
    (r"^layers\.(\d+)\.mlp\.fc", r"layers.\1.feed_forward_layer.layer.fc"),
]


def official_gradients(network: MSANetwork) -> dict[str, Tensor]:
    """Gradients by the authors' names and shapes."""
    found = {}
    for name, parameter in network.named_parameters():
        if parameter.grad is None:
            continue
        parts = re.fullmatch(r"layers\.(\d+)\.(row|column)\.qkv\.(weight|bias)", name)
        if parts:
            for letter, piece in zip("qkv", parameter.grad.chunk(3), strict=True):
                found[f"layers.{parts[1]}.{parts[2]}_self_attention.layer.{letter}_proj.{parts[3]}"] = piece
            continue
        official = name
        for pattern, new in BACK:
            official = re.sub(pattern, new, official)
        gradient = parameter.grad
        found[official] = gradient[None, :, None] if name == "row_positions" else gradient
    return found
