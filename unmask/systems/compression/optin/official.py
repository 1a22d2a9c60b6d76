"""The released code's quantities for parity cases. It has no checkpoints of its own: it prunes anybody's classifier."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from unmask.errors import MissingExtra, UserError
from unmask.models import open_model
from unmask.official.load import State, load_strict, without_prefix
from unmask.official.reshaped import merge_tokens
from unmask.systems.compression.optin.importance import Setting, Trajectories
from unmask.systems.compression.optin.scores import Factors, scored
from unmask.systems.compression.optin.terms import divergence, manifold, manifold_by_position
from unmask.systems.compression.search import mac_units, order_of, search, spent
from unmask.systems.compression.structure import find_structure
from unmask.systems.compression.surgery import masked

OPTIONS = ("num_heads",)


def load_official(state: State, options: Mapping[str, Any] | None = None) -> nn.Module:
    """A BERT classifier from its weights alone. options: ``num_heads``, which they do not tell."""
    depth = 1 + max(int(k.split(".")[3]) for k in state if k.startswith("bert.encoder.layer."))
    words = state["bert.embeddings.word_embeddings.weight"]
    heads = (options or {}).get("num_heads")
    if heads is None:
        raise UserError("a BERT's weights do not tell its heads: give num_heads=12")
    return _bert(
        {
            "vocab_size": words.shape[0],
            "embed_dim": words.shape[1],
            "depth": depth,
            "num_heads": int(heads),
            "mlp_dim": state["bert.encoder.layer.0.intermediate.dense.weight"].shape[0],
            "max_positions": state["bert.embeddings.position_embeddings.weight"].shape[0],
            "num_classes": state["classifier.weight"].shape[0],
        },
        state,
    )


def _bert(c: Mapping[str, Any], state: Mapping[str, Tensor]) -> nn.Module:
    try:
        from transformers import BertConfig, BertForSequenceClassification
    except ImportError:
        raise MissingExtra("a BERT", "transformers", "text") from None
    types = state["bert.embeddings.token_type_embeddings.weight"].shape[0]
    model = BertForSequenceClassification(
        BertConfig(  # type: ignore[call-arg]
            vocab_size=c["vocab_size"],
            hidden_size=c["embed_dim"],
            num_hidden_layers=c["depth"],
            num_attention_heads=c["num_heads"],
            intermediate_size=c["mlp_dim"],
            max_position_embeddings=c["max_positions"],
            type_vocab_size=types,
            num_labels=c["num_classes"],
        )
    )
    ignore = [] if any("position_ids" in k for k in state) else [r"position_ids$", r"token_type_ids$"]
    load_strict(model, state, ignore=ignore, where="BERT")
    return model.eval()


def run_case(
    config: dict[str, Any], tensors: dict[str, Tensor]
) -> tuple[dict[str, Tensor], nn.Module | None, dict[str, Tensor]]:
    """Outputs of a parity case: the terms and the search alone, or a whole ranking of a BERT."""
    if any(k.startswith("param.") for k in tensors):
        return _ranking(config, tensors)
    return _components(config, tensors), None, {}


def _components(config: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    given, out = without_prefix(tensors, "in."), {}
    if "features_teacher" in given:
        teacher, student = given["features_teacher"], given["features_student"]
        rows = tensors.get("draw.row_permutation")
        most = int(config.get("sample_rows", 768))
        rows = rows[:most] if rows is not None else None
        out["manifold_sum"] = manifold(teacher, student, rows, "sum")
        out["manifold_mean"] = manifold(teacher, student, rows, "mean")
        out["manifold_patch"] = manifold_by_position(teacher, student)
    if "logits_teacher" in given:
        out["kl"] = divergence(given["logits_teacher"], given["logits_student"], float(config.get("temperature", 4)))
    s = config.get("search")
    if s:
        costs = mac_units(
            float(s["sequence_length_for_macs"]),
            int(s["embed_dim"]),
            int(s["embed_dim"]) // int(s["num_heads"]),
            int(s["depth"]),
            int(s["num_heads"]),
            int(s["mlp_dim"]),
        )
        masks = [
            search(given["head_score"], given["neuron_score"], r * costs.base, costs) for r in s["mac_constraints"]
        ]
        out["search_head_masks"] = torch.stack([h for h, _ in masks])
        out["search_neuron_masks"] = torch.stack([n for _, n in masks])
        out["search_macs"] = torch.tensor([spent(h, n, costs) for h, n in masks])
        out["mac_units"] = torch.tensor([costs.base, costs.head, costs.neuron])
    m = config.get("merge")
    if m:
        merged, away = merge_tokens(given["tokens"], int(m["tokens_kept"]), int(bool(m.get("class_token", True))))
        out["merged_tokens"], out["merged_away"] = merged, away
    return out


def _ranking(c: dict[str, Any], tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], nn.Module, dict[str, Tensor]]:
    module = _bert(c, without_prefix(tensors, "param."))
    model = open_model(module)
    inputs = without_prefix(tensors, "in.")
    structure = find_structure(model)
    loss = str(c.get("loss_type", "MMD+KL"))
    batch = inputs["input_ids"].numel()
    rows = tensors.get("draw.row_permutation")
    setting = Setting(
        aggregate=c.get("aggregate", "sum"),
        temperature=float(c.get("temperature", 4)),
        head_last=bool(c.get("head_include_last_layer", True)),
        neuron_last=bool(c.get("neuron_include_last_layer", True)),
        need_md=loss != "KL",
        need_kl="KL" in loss,
        once_more=loss == "MMD",
        carry=bool(c.get("carry_head_masks", False)),
        rows=rows[: int(c.get("sample_rows", 768))] if rows is not None and batch > int(c["sample_rows"]) else None,
    )
    work = Trajectories(model, structure, inputs, setting)
    out: dict[str, Tensor] = {}
    base = work.base()
    out["base_logits"], out["base_features"] = base.logits, torch.stack(base.features)
    weighted = bool(c.get("index_weighting", False))
    contribution = float(c.get("lambda_contribution", 10))
    scores = {}
    for kind, most in (("head", 10.0), ("neuron", 100.0)):
        md, kl = work.run(kind)
        factors = Factors(
            factor=float(c.get(f"{kind}_factor", 1)),
            last_layer=float(c.get(f"last_layer_factor_{kind}", 1)),
            index_most=most if weighted else 1.0,
        )
        scores[kind] = scored(md, kl, loss, contribution, factors)
        out[f"{kind}_md"], out[f"{kind}_kl"], out[f"{kind}_score"] = md, kl, scores[kind]
        out[f"{kind}_order"] = order_of(scores[kind])
    costs = mac_units(
        float(c["sequence_length_for_macs"]),
        int(c["embed_dim"]),
        int(c["embed_dim"]) // int(c["num_heads"]),
        int(c["depth"]),
        int(c["num_heads"]),
        int(c["mlp_dim"]),
    )
    heads, neurons = search(scores["head"], scores["neuron"], float(c["mac_constraint"]) * costs.base, costs)
    out["head_mask"], out["neuron_mask"] = heads, neurons
    out["macs"] = torch.tensor([costs.base, costs.head, costs.neuron, spent(heads, neurons, costs)])
    keep = {u: heads[i] for i, u in enumerate(work.heads) if u is not None}
    keep |= {u: neurons[i] for i, u in enumerate(work.neurons)}
    with torch.no_grad(), masked(module, keep):
        out["pruned_logits"] = model.scores(**inputs)
    return out, module, {}
