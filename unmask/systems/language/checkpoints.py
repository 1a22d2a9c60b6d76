"""Checkpoints of transformers' BERT, RoBERTa and ELECTRA families, read and written by rules; and folders that training
starts from."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from unmask.data.text import Tokenizer
from unmask.errors import UserError
from unmask.official.hub import CONFIG, is_ours, load_trainable, snapshot, write_folder
from unmask.official.load import Rule, State, read_checkpoint, rename
from unmask.systems.language.encoder import EncoderConfig

FAMILIES = {"bert": "bert", "roberta": "roberta", "xlm-roberta": "roberta", "camembert": "roberta", "electra": "bert"}
_ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
}
_BASE = r"^(?:bert|roberta|electra|deberta|joint_\w+)\."

RULES = [
    Rule(r"LayerNorm\.gamma$", "LayerNorm.weight"),  # names of TensorFlow's time
    Rule(r"LayerNorm\.beta$", "LayerNorm.bias"),
    Rule(r"(^|\.)(position_ids|token_type_ids)$", None),
    Rule(r"^cls\.seq_relationship\.", None),  # BERT's next-sentence head
    Rule(_BASE + r"pooler\.dense\.", "pooler.dense."),
    Rule(_BASE, "network."),
    Rule(r"^network\.embeddings\.word_embeddings\.", "network.words."),
    Rule(r"^network\.embeddings\.position_embeddings\.", "network.places."),
    Rule(r"^network\.embeddings\.token_type_embeddings\.", "network.kinds."),
    Rule(r"^network\.embeddings\.LayerNorm\.", "network.norm."),
    Rule(r"^network\.embeddings_project\.", "network.widen."),
    Rule(r"^network\.encoder\.layer\.(\d+)\.attention\.self\.", r"network.blocks.\1.attn."),
    Rule(r"^network\.encoder\.layer\.(\d+)\.attention\.output\.dense\.", r"network.blocks.\1.attn.proj."),
    Rule(r"^network\.encoder\.layer\.(\d+)\.attention\.output\.LayerNorm\.", r"network.blocks.\1.norm1."),
    Rule(r"^network\.encoder\.layer\.(\d+)\.intermediate\.dense\.", r"network.blocks.\1.mlp.fc1."),
    Rule(r"^network\.encoder\.layer\.(\d+)\.output\.dense\.", r"network.blocks.\1.mlp.fc2."),
    Rule(r"^network\.encoder\.layer\.(\d+)\.output\.LayerNorm\.", r"network.blocks.\1.norm2."),
    # heads over words
    Rule(r"^(lm_head\.decoder|cls\.predictions\.decoder|generator_lm_head)\.weight$", "words.tied"),
    Rule(r"^(lm_head\.decoder|cls\.predictions\.decoder)\.bias$", "words.copied"),
    Rule(r"^cls\.predictions\.transform\.dense\.", "words.dense."),
    Rule(r"^cls\.predictions\.transform\.LayerNorm\.", "words.norm."),
    Rule(r"^cls\.predictions\.dense\.", "words.dense."),
    Rule(r"^cls\.predictions\.layer_norm\.", "words.norm."),
    Rule(r"^cls\.predictions\.bias$", "words.bias"),
    Rule(r"^lm_head\.layer_norm\.", "words.norm."),
    Rule(r"^lm_head\.", "words."),
    Rule(r"^generator_predictions\.dense\.", "words.dense."),
    Rule(r"^generator_predictions\.LayerNorm\.", "words.norm."),
    Rule(r"^generator_lm_head\.bias$", "words.bias"),
    # the other heads
    Rule(r"^discriminator_predictions\.dense\.", "discriminator.dense."),
    Rule(r"^discriminator_predictions\.dense_prediction\.", "discriminator.decoder."),
    Rule(r"^classifier\.classifier\.dense\.", "joint.dense."),
    Rule(r"^classifier\.classifier\.out_proj\.", "joint.out."),
    Rule(r"^classifier\.dense\.", "pair.dense."),
    Rule(r"^classifier\.out_proj\.", "pair.out."),
    Rule(r"^classifier\.(weight|bias)$", r"pair.out.\1"),
]
_QKV = re.compile(r"^(.*\.attn)\.(query|key|value)\.(weight|bias)$")


def ours(state: Mapping[str, Tensor]) -> State:
    """An official state under our names: ``network.*``, ``words.*`` (word head), ``swap.*``, ``pair.*``, ``joint.*``,
    ``discriminator.*``, ``pooler.*``. A state without a base name (BertModel alone) is taken as the encoder."""
    if "embeddings.word_embeddings.weight" in state:
        state = {f"bert.{name}": value for name, value in state.items()}
    # the head of swapped tokens has the names of BERT's word head, and another size
    bias = state.get("cls.predictions.bias")
    swapped = bias is not None and len(bias) == 2
    if swapped:
        state = {
            k.replace("cls.predictions.", "swap_head."): v
            for k, v in state.items()
            if k != "cls.predictions.decoder.bias"
        }
    named = rename(
        state,
        [
            *RULES,
            Rule(r"^swap_head\.(?:transform\.)?dense\.", "swap.dense."),
            Rule(r"^swap_head\.(?:transform\.LayerNorm|layer_norm)\.", "swap.norm."),
            Rule(r"^swap_head\.decoder\.weight$", "swap.decoder.weight"),
            Rule(r"^swap_head\.bias$", "swap.decoder.bias"),
        ],
    )
    if "words.bias" not in named and "words.copied" in named:
        named["words.bias"] = named["words.copied"]
    named = {k: v for k, v in named.items() if k not in ("words.tied", "words.copied")}
    if (
        "pooler.dense.weight" in named and "pair.out.weight" in named
    ):  # BERT's pooler is the first half of its pair head
        named |= {f"pair.dense.{p}": named.pop(f"pooler.dense.{p}") for p in ("weight", "bias")}
    return fused(named)


def fused(state: Mapping[str, Tensor]) -> State:
    """Query, key and value in one matrix, as attention here holds them."""
    out: State = {}
    parts: dict[str, dict[str, Tensor]] = {}
    for name, value in state.items():
        match = _QKV.match(name)
        if match:
            parts.setdefault(f"{match[1]}.qkv.{match[3]}", {})[match[2]] = value
        else:
            out[name] = value
    for name, three in parts.items():
        if len(three) != 3:
            raise UserError(f"checkpoint: {name} has {', '.join(three)} only: the file is damaged or of another system")
        out[name] = torch.cat([three[p] for p in ("query", "key", "value")])
    return out


def theirs(state: Mapping[str, Tensor], family: str) -> State:
    """Our state (or gradients by name) under transformers' names. family: bert, roberta, electra."""
    out: State = {}
    bert = family == "bert"
    for name, value in state.items():
        if ".attn.qkv." in name:
            stem, _, kind = name.partition(".attn.qkv.")
            for part, piece in zip(("query", "key", "value"), value.chunk(3), strict=True):
                out[f"{_back(stem, family)}.attention.self.{part}.{kind}"] = piece
            continue
        place = name.partition(".")[0]
        if place == "network":
            out[_back(name, family)] = value
        elif place == "words":
            head = {"bert": "cls.predictions.", "roberta": "lm_head.", "electra": "generator_predictions."}[family]
            rest = name.removeprefix("words.")
            if bert:
                rest = re.sub(r"^(dense)\.", r"transform.\1.", re.sub(r"^norm\.", "transform.LayerNorm.", rest))
            elif family == "roberta":
                rest = re.sub(r"^norm\.", "layer_norm.", rest)
            else:
                rest = re.sub(r"^norm\.", "LayerNorm.", rest)
            out["generator_lm_head.bias" if family == "electra" and rest == "bias" else head + rest] = value
        elif place == "swap":
            rest = name.removeprefix("swap.")
            before = "transform." if family != "roberta" else ""
            rest = rest.replace("dense.", f"{before}dense.")
            rest = rest.replace("norm.", "transform.LayerNorm." if before else "layer_norm.")
            out["cls.predictions." + rest.replace("decoder.bias", "bias")] = value
        elif place == "pair":
            rest = name.removeprefix("pair.")
            if bert:
                out[rest.replace("dense.", "bert.pooler.dense.").replace("out.", "classifier.")] = value
            else:
                out["classifier." + rest.replace("out.", "out_proj.")] = value
        elif place == "joint":
            out["classifier.classifier." + name.removeprefix("joint.").replace("out.", "out_proj.")] = value
        elif place == "pooler":
            out[f"{family}.{name}"] = value
        elif place == "discriminator":
            out[
                "discriminator_predictions."
                + name.removeprefix("discriminator.").replace("decoder.", "dense_prediction.")
            ] = value
    return out


_BACK = [
    (r"^network\.words\.", "embeddings.word_embeddings."),
    (r"^network\.places\.", "embeddings.position_embeddings."),
    (r"^network\.kinds\.", "embeddings.token_type_embeddings."),
    (r"^network\.norm\.", "embeddings.LayerNorm."),
    (r"^network\.widen\.", "embeddings_project."),
    (r"^network\.blocks\.(\d+)\.attn\.proj\.", r"encoder.layer.\1.attention.output.dense."),
    (r"^network\.blocks\.(\d+)\.norm1\.", r"encoder.layer.\1.attention.output.LayerNorm."),
    (r"^network\.blocks\.(\d+)\.mlp\.fc1\.", r"encoder.layer.\1.intermediate.dense."),
    (r"^network\.blocks\.(\d+)\.mlp\.fc2\.", r"encoder.layer.\1.output.dense."),
    (r"^network\.blocks\.(\d+)\.norm2\.", r"encoder.layer.\1.output.LayerNorm."),
    (r"^network\.blocks\.(\d+)$", r"encoder.layer.\1"),
]


def _back(name: str, family: str) -> str:
    for pattern, new in _BACK:
        if re.search(pattern, name):
            return f"{family}.{re.sub(pattern, new, name)}"
    raise KeyError(name)


def config_of(described: Mapping[str, Any], where: str | Path = "config.json") -> EncoderConfig:
    """Our sizes from a transformers config. Raises ``UserError`` for another family."""
    family = str(described.get("model_type", described.get("backbone", ""))).removeprefix("joint_")
    if family not in FAMILIES:
        raise UserError(f"{where} is of a {family or 'nameless'} model: it takes {', '.join(FAMILIES)}")
    if described.get("position_embedding_type", "absolute") != "absolute":
        raise UserError(f"{where}: position_embedding_type={described['position_embedding_type']}: it takes absolute")
    get = described.get
    activation = _ACTIVATIONS.get(str(get("hidden_act", "gelu")))
    if activation is None:
        raise UserError(f"{where}: hidden_act={get('hidden_act')}: it takes {', '.join(_ACTIVATIONS)}")
    style = FAMILIES[family]
    given_pad: Any = get("pad_token_id")
    pad = int(given_pad if given_pad is not None else style == "roberta")
    return EncoderConfig(
        style=style,  # type: ignore[arg-type]
        vocabulary=get("vocab_size", 30522),
        positions=get("max_position_embeddings", 512) - (pad + 1 if style == "roberta" else 0),
        embed_dim=get("hidden_size", 768),
        depth=get("num_hidden_layers", 12),
        num_heads=get("num_attention_heads", 12),
        mlp_dim=get("intermediate_size", 3072),
        word_dim=get("embedding_size", 0) if family == "electra" else 0,
        types=get("type_vocab_size", 2),
        activation=activation,  # type: ignore[arg-type]
        dropout=get("hidden_dropout_prob", 0.1),
        attention_dropout=get("attention_probs_dropout_prob", 0.1),
        norm_eps=get("layer_norm_eps", 1e-12),
        pad=pad,
    )


def their_config(config: EncoderConfig, family: str, labels: tuple[str, ...] = ()) -> dict[str, Any]:
    """``config.json`` of transformers for an encoder of ours."""
    c = config.whole()
    assert c.pad is not None
    act = {v: k for k, v in reversed(_ACTIVATIONS.items())}[c.activation]
    out: dict[str, Any] = {
        "model_type": family,
        "vocab_size": c.vocabulary,
        "hidden_size": c.embed_dim,
        "num_hidden_layers": c.depth,
        "num_attention_heads": c.num_heads,
        "intermediate_size": c.mlp_dim,
        "max_position_embeddings": c.positions + (c.pad + 1 if c.style == "roberta" else 0),
        "type_vocab_size": c.types,
        "hidden_act": act,
        "hidden_dropout_prob": c.dropout,
        "attention_probs_dropout_prob": c.attention_dropout,
        "layer_norm_eps": c.norm_eps,
        "pad_token_id": c.pad,
    }
    if family == "electra":
        out["embedding_size"] = c.word_dim
    if labels:
        out |= {"id2label": dict(enumerate(labels)), "label2id": {n: i for i, n in enumerate(labels)}}
    return out


@dataclass
class Start:
    """What a folder gives a training to start from: sizes, weights by our names, and its tokenizer where it has one."""

    config: EncoderConfig
    state: State
    tokenizer: Tokenizer | None
    family: str
    where: str
    special: dict[str, int] = field(default_factory=dict)


def start_from(folder: str | Path) -> Start:
    """A transformers folder of the BERT, RoBERTa or ELECTRA family, or a run or model of ours that holds such an encoder.

    Raises ``UserError`` in one line.
    """
    path = Path(folder).expanduser()
    if not path.is_dir():
        if path.exists() or path.parent.is_dir() or not re.fullmatch(r"[\w.-]+/[\w.-]+", str(folder)):
            raise UserError(
                f"no folder {folder} to start from: give a folder of transformers, a run, or a hub id (name/model)"
            )
        path = snapshot(str(folder))
    inner = next(
        (p for p in (path, path / "model", *sorted(path.glob("stages/*/model"), reverse=True)) if is_ours(p)), None
    )
    if inner is not None:
        model: Any = load_trainable(inner)
        if not isinstance(getattr(getattr(model, "network", None), "config", None), EncoderConfig):
            raise UserError(
                f"{folder} holds a {model.slug}, not a text encoder: it takes structural_ssl or text_classifier"
            )
        text = model.side_files.get("tokenizer.json")
        config = model.network.config
        family = (
            "roberta" if config.style == "roberta" else "electra" if config.word_dim != config.embed_dim else "bert"
        )
        return Start(config, dict(model.state_dict()), Tokenizer.from_text(text) if text else None, family, str(folder))
    described = described_in(path)
    config = config_of(described, path / CONFIG)
    state = ours(read_checkpoint(path))
    if "network.words.weight" not in state:
        raise UserError(f"{folder} holds no word embeddings: these are not the weights of a text encoder")
    known = any((path / n).is_file() for n in ("tokenizer.json", "vocab.txt", "vocab.json"))
    return Start(config, state, Tokenizer.load(path) if known else None, str(described.get("model_type")), str(folder))


def described_in(path: Path) -> dict[str, Any]:
    try:
        value = json.loads((path / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise UserError(
            f"{path} holds no {CONFIG} that can be read: give a folder of transformers or a run of unmask"
        ) from None
    if not isinstance(value, dict):
        raise UserError(f"{path / CONFIG} is no mapping: give a folder of transformers or a run of unmask")
    return value


def check_tokenizer(tokenizer: Tokenizer, start: Start) -> None:
    """Raises ``UserError`` where ids of the tokenizer mean nothing, or something else, to the checkpoint."""
    vocabulary = start.config.vocabulary
    if tokenizer.size > vocabulary:
        raise UserError(
            f"the tokenizer has {tokenizer.size} tokens, {start.where} has {vocabulary}: it does not fit this checkpoint; "
            "leave data.tokenizer out to take the folder's own"
        )
    own = start.tokenizer
    pad = start.config.whole().pad
    differs = (
        own is not None and own.text() != tokenizer.text() and own.backend.get_vocab() != tokenizer.backend.get_vocab()
    )
    if differs or tokenizer.special.get("pad") != pad:
        raise UserError(
            f"the tokenizer is not the one of {start.where}"
            + (
                f" (padding is {tokenizer.special.get('pad')}, there {pad})"
                if tokenizer.special.get("pad") != pad
                else ""
            )
            + ": its ids mean other words; leave data.tokenizer out to take the folder's own"
        )


def adopt(model: nn.Module, start: Start, noise: Tensor | None = None) -> list[str]:
    """Copy what fits of a start into the model, in place: the encoder whole, heads that both have. Tables that the model has more
    rows of (token types) keep their own in the new ones. Returns the names that were taken. Raises ``UserError``."""
    state = model.state_dict()
    taken = []
    for name, value in start.state.items():
        if name not in state or name == "token_to_cluster_map" or name == "counts":
            continue
        here = state[name]
        if here.shape != value.shape:
            table = name in ("network.kinds.weight", "network.places.weight")
            if table and here.shape[1:] == value.shape[1:] and len(here) >= len(value):
                here[: len(value)].copy_(value)
                taken.append(name)
                continue
            if name.startswith("network."):
                raise UserError(f"{start.where}: {name} is {list(value.shape)} where {list(here.shape)} is needed")
            continue
        here.copy_(value)
        taken.append(name)
    missing = [n for n in state if n.startswith("network.") and n not in taken]
    if missing:
        raise UserError(f"{start.where} has no {missing[0]}: these are not the weights of this encoder")
    return taken


def save_transformers(model: Any, folder: str | Path) -> Path:
    """Write a system of this room as a folder of transformers: ``AutoModel.from_pretrained`` (or the class named in
    ``architectures``) loads it. What transformers has no class for (swap and joint heads) is written under the authors' names."""
    config: EncoderConfig = model.network.config
    family = "roberta" if config.style == "roberta" else "electra" if config.word_dim != config.embed_dim else "bert"
    state = theirs(model.state_dict(), family)
    base = {"bert": "Bert", "roberta": "Roberta", "electra": "Electra"}[family]
    kind = "Model"
    words = f"{family}.embeddings.word_embeddings.weight"
    if any(k.startswith("words.") for k in model.state_dict()):
        kind = "ForMaskedLM"
        for name in {"bert": ("cls.predictions",), "roberta": ("lm_head",), "electra": ()}[family]:
            state[f"{name}.decoder.weight"] = state[words]
            state[f"{name}.decoder.bias"] = state[f"{name}.bias"]
        if family == "electra":
            state["generator_lm_head.weight"] = state[words]
    elif any(k.startswith("discriminator.") for k in model.state_dict()):
        kind = "ForPreTraining"
    elif any(k.startswith("pair.") for k in model.state_dict()):
        kind = "ForSequenceClassification"
    described = their_config(config, family, tuple(getattr(model, "classes", None) or ()))
    described["architectures"] = [base + kind]
    files = {name: text.encode() for name, text in model.side_files.items() if name == "tokenizer.json"}
    return write_folder(Path(folder), described, state, files=files)
