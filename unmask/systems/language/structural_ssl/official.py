"""The authors' checkpoints and their numbers: transformers' own names, heads beside them; and how a fixture is run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from unmask.draw import Replay
from unmask.errors import UserError
from unmask.official.load import load_strict, without_prefix
from unmask.systems.language.checkpoints import config_of, ours, theirs
from unmask.systems.language.heads import JointHead
from unmask.systems.language.structural_ssl import tokens as objectives
from unmask.systems.language.structural_ssl.clusters import cluster_probabilities, count_changes
from unmask.systems.language.structural_ssl.model import StructuralSSL
from unmask.systems.language.structural_ssl.tokens import MaskingConfig

OPTIONS = (
    "backbone", "num_attention_heads", "layer_norm_eps", "pad_token_id", "head_type", "k", "sentence_length",
    "special", "objective",
    "hidden_act", "hidden_dropout_prob", "attention_probs_dropout_prob",
)  # fmt: skip
ROLES = {"pad_token_id": "pad", "bos_token_id": "cls", "eos_token_id": "sep", "mask_token_id": "mask"}


def load_official(state: Mapping[str, Tensor], options: Mapping[str, Any] | None = None) -> StructuralSSL:
    """The system with a checkpoint's weights: its heads say its objective. The sizes are read off the tensors; what they do
    not tell can
    be given as options of transformers' names: ``num_attention_heads``, ``pad_token_id``, ``layer_norm_eps``; of joint models ``k``
    and ``sentence_length``. Raises ``UserError`` for weights of another kind."""
    options = dict(options or {})
    sizes = {**read_sizes(state), **options}
    return model_of(sizes, state)


def read_sizes(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Transformers' option names, as far as tensors tell them."""
    family = next((f for f in ("roberta", "electra", "bert") if any(k.startswith(f"{f}.") for k in state)), "")
    base = f"{family}." if family else ""
    words = state.get(f"{base}embeddings.word_embeddings.weight")
    if words is None:
        raise UserError("structural_ssl: these are not the weights of a text encoder (no embeddings.word_embeddings)")
    width = state[f"{base}encoder.layer.0.attention.self.query.weight"].shape[0]
    return {
        "backbone": family or "bert",
        "vocab_size": words.shape[0],
        "embedding_size": words.shape[1],
        "hidden_size": width,
        "num_hidden_layers": 1 + max(int(k.split("layer.")[1].split(".")[0]) for k in state if "encoder.layer." in k),
        "num_attention_heads": max(width // 64, 1),
        "intermediate_size": state[f"{base}encoder.layer.0.intermediate.dense.weight"].shape[0],
        "max_position_embeddings": state[f"{base}embeddings.position_embeddings.weight"].shape[0],
        "type_vocab_size": state[f"{base}embeddings.token_type_embeddings.weight"].shape[0],
        "layer_norm_eps": 1e-5 if family == "roberta" else 1e-12,
        "pad_token_id": int(family == "roberta"),
    }


def model_of(options: Mapping[str, Any], state: Mapping[str, Tensor]) -> StructuralSSL:
    """The system of these options (transformers' names) with the state, loaded strictly."""
    named = ours(state)
    places = {name.partition(".")[0] for name in named}
    encoder = config_of(options)
    values: dict[str, Any] = {"encoder": encoder.plain()}
    if "words" in places:
        values["token"] = "mlm"
    elif "swap" in places:
        values["token"] = "rts"
    else:
        values["token"] = "none"
    family = str(options.get("backbone", "")).removeprefix("joint_")
    if "joint" in places:
        kind, k = str(options.get("head_type", "IE_k")), int(options.get("k", 5))
        slot = int(options.get("sentence_length", max(encoder.positions // (k + 1), 4)))
        values |= {"objective": "mspp", "joint": {"head": kind, "k": k, "slot": slot}}
        width = named["joint.out.weight"].shape[0]
        values["labels"] = width // k if kind == "RE_k" else width
    elif "pair" in places:
        values |= {
            "objective": "ssp",
            "labels": named["pair.out.weight"].shape[0],
            "pair_head": family if family == "electra" else "",
        }
    else:
        values["objective"] = str(options.get("objective", values["token"] if values["token"] != "none" else "ssp"))
        if values["token"] == "none" and "discriminator" not in places:
            values["objective"] = "mlm"  # an encoder alone; its word head stays as it is initialised
    special = {role: int(options[name]) for name, role in ROLES.items() if options.get(name) is not None}
    special |= dict(options.get("special") or {})
    special.setdefault("mask", 103 if encoder.style == "bert" else encoder.vocabulary - 1)
    values |= {
        "special": special,
        "token_weight": options.get("masked_lm_weight", 1.0),
        "pair_weight": options.get("pair_weight", 1.0),
    }
    model = StructuralSSL(StructuralSSL.Config.model_validate(values))
    heads = [p for p in ("words", "swap", "pair", "joint") if p not in places and getattr(model, p) is not None]
    held = {k: v for k, v in named.items() if not k.startswith(("pooler.", "discriminator."))}
    load_strict(model, held, ignore=[f"^{p}\\." for p in heads], where="structural_ssl checkpoint")
    return model


# --- fixtures -----------------------------------------------------------------------------------------------------


def run_case(
    config: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], nn.Module | None, dict[str, Tensor]]:
    """Outputs and gradients of one fixture, under the authors' names."""
    if "draw.select" in tensors:
        return token_case(config, tensors), None, {}
    if "in.hidden" in tensors:
        return head_case(config, tensors), None, {}
    model = model_of(config, without_prefix(tensors, "param.")).train()
    inputs = without_prefix(tensors, "in.")
    batch = {"tokens": inputs["input_ids"], "attention_mask": inputs["attention_mask"]}
    if "token_type_ids" in inputs:
        batch["types"] = inputs["token_type_ids"]
    if model.jointly:
        slot = model.config.joint.slot
        batch["types"] = torch.arange(model.config.joint.k + 1).repeat_interleave(slot).expand_as(batch["tokens"])
    hidden = model.network(batch)
    outputs: dict[str, Tensor] = {"hidden": hidden.detach()}
    if model.swap is not None:
        model.config.count_padding = True
        loss, _ = model.token_loss(hidden, inputs["labels"], batch)
        model.config.count_padding = False
        outputs["loss_without_padding"] = model.token_loss(hidden, inputs["labels"], batch)[0].detach().reshape(1)
        outputs["logits"] = model.swap(hidden).detach()
    else:
        loss = torch.zeros(())
    if model.words is not None and "masked_lm_labels" in inputs:
        masked, _ = model.token_loss(hidden, inputs["masked_lm_labels"], batch)
        loss = loss + model.config.token_weight * masked
        outputs["masked_lm_loss"] = masked.detach().reshape(1)
        with torch.no_grad():
            outputs["masked_lm_logits"] = model.word_logits(hidden)
    labels = next((inputs[n] for n in ("pair_labels", "candidate_labels", "group_labels") if n in inputs), None)
    if labels is not None:
        logits = model.structure_logits(hidden, batch)
        structural = model.structure_loss(logits, labels)
        loss = loss + model.config.pair_weight * structural
        name = "candidate" if model.jointly else "pair"
        outputs |= {f"{name}_loss": structural.detach().reshape(1), f"{name}_logits": logits.detach()}
    outputs["loss"] = loss.detach().reshape(1)
    loss.backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    family = str(config.get("backbone", "bert")).removeprefix("joint_")
    return outputs, model, theirs(gradients, family)


def head_case(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The joint heads on given hidden states."""
    outputs: dict[str, Tensor] = {}
    kinds = ("IE_1", "AE_1", "IE_k", "AE_k", "RE_k")
    unknown = [n for n in without_prefix(tensors, "param.") if n.partition(".")[0] not in kinds]
    if unknown:
        raise UserError(f"structural_ssl: {unknown[0]} belongs to no joint head: it takes {', '.join(kinds)}")
    for kind in kinds:
        state = without_prefix(tensors, f"param.{kind}.classifier.")
        if not state:
            continue
        head = JointHead(kind, config["hidden_size"], config["k"], config["num_labels"], 0.0)  # type: ignore[arg-type]
        load_strict(head, {k.replace("out_proj.", "out."): v for k, v in state.items()}, where=kind)
        logits = head(tensors["in.hidden"]).detach()
        labels = tensors["in.labels_group"] if head.one_label else tensors["in.labels_candidate"]
        outputs |= {f"{kind}_logits": logits, f"{kind}_loss": head.loss(logits, labels).reshape(1)}
    return outputs


def token_case(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The objectives of tokens on given draws, and the update of C-RTS's counts."""
    tokens, words, clusters = (tensors[f"in.{n}"] for n in ("input_ids", "word_ids", "token_cluster"))
    draw, special = Replay(without_prefix(tensors, "draw.")), config["special_ids"]
    known: dict[str, Any] = {"vocabulary": config["vocab_size"], "special": special}
    outputs: dict[str, Tensor] = {}

    def keep(name: str, ids: Tensor, labels: Tensor) -> None:
        outputs.update({f"{name}_ids": ids, f"{name}_labels": labels})

    for form, options in (
        ("", {}),
        ("_whole_word", {"unit": "word", "official_tails": True}),
        ("_full_word", {"unit": "word"}),
    ):
        masking = MaskingConfig(probability=config["probability"], **options)
        for name in ("mlm", "slm", "slm90"):
            split = config.get(f"{name}_split")
            if split is not None:
                mask = config["mask_token_id"]
                keep(
                    f"{name}{form}",
                    *objectives.predicted_words(tokens, words, draw, masking, split, mask_token=mask, **known),
                )
        keep(f"rts{form}", *objectives.swapped_words(tokens, words, draw, masking, **known))
        for name, official in (("crts", True), ("crts_rows", False)):
            chances = cluster_probabilities(tensors["in.counts"], config["beta"], official=official)
            keep(
                f"{name}{form}",
                *objectives.swapped_by_clusters(tokens, words, draw, masking, clusters, chances, special=special),
            )
            outputs["cluster_probabilities" if official else "cluster_probabilities_rows"] = chances.float()
    original, substituted = tensors["in.update_original"], tensors["in.update_substituted"]
    where = (
        original != substituted
        if config.get("update_only_changed", True)
        else torch.ones_like(original, dtype=torch.bool)
    )
    if "in.update_attention_mask" in tensors:
        where = where & (tensors["in.update_attention_mask"] > 0)
    wrong = tensors["in.update_predictions"] != tensors["in.update_labels"]
    changes = count_changes(original, substituted, wrong, where, clusters, len(tensors["in.counts"]))
    outputs["counts_after"] = tensors["in.counts"] + changes
    return outputs
