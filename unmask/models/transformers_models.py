"""Models of transformers: a folder read as data (config.json and weights), its head and its tokenizer."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from unmask.contracts import Preprocessing
from unmask.errors import MissingExtra, UserError
from unmask.models.user import Kind, UserModel
from unmask.official import hub
from unmask.official.load import load_strict, read_checkpoint
from unmask.official.reshaped import Surgery, reshape


def read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def open_transformers(folder: Path) -> UserModel:
    module, tokenizer = read_transformers(folder, Surgery())
    return wrap_transformers(module, str(folder), tokenizer)


def wrap_transformers(module: nn.Module, name: str, tokenizer: Any) -> UserModel:
    config: Any = module.config
    task = type(module).__name__
    if task.endswith("ForSequenceClassification"):
        kind: Kind = "text classifier"
    elif task.endswith(("ForCausalLM", "LMHeadModel")):
        kind = "causal lm"
    elif task.endswith("ForImageClassification"):
        kind = "image classifier"
    elif task.endswith(("ForUniversalSegmentation", "ForSemanticSegmentation")):
        kind = "image segmenter"
    else:
        raise UserError(f"{name} is a {task}, no classifier and no language model: it gives no scores to compare")
    labels = getattr(config, "id2label", None) or {}
    classes = tuple(str(labels[i]) for i in sorted(labels)) if kind != "causal lm" else None
    prepared = None
    if kind.startswith("image"):
        side = getattr(config, "image_size", 224)
        size = (side, side) if isinstance(side, int) else tuple(side)
        prepared = Preprocessing((0.5,) * 3, (0.5,) * 3, size, int(getattr(config, "num_channels", 3)))
    return UserModel(module.eval(), kind, "transformers", name, classes, prepared, tokenizer)


def read_transformers(folder: Path, surgery: Surgery) -> tuple[nn.Module, Any]:
    try:
        import transformers
    except ImportError:
        raise MissingExtra("a model of transformers", "transformers", "text") from None
    described = read_json(folder / hub.CONFIG)
    names = described.get("architectures") or []
    cls = getattr(transformers, names[0], None) if names else None
    if cls is None:
        raise UserError(f"{folder / hub.CONFIG} names no architecture of transformers ({', '.join(names) or 'none'})")
    weights = next((folder / n for n in (hub.WEIGHTS, "pytorch_model.bin") if (folder / n).is_file()), None)
    if weights is None:
        raise UserError(f"{folder} holds no {hub.WEIGHTS}")
    try:
        config = transformers.AutoConfig.from_pretrained(folder)
        module = cls(config)
    except Exception as error:  # configs of other versions fail in many ways
        raise UserError(f"transformers cannot build {folder}: {str(error).strip().splitlines()[0][:160]}") from None
    if surgery:
        reshape(module, surgery)
    _load_tied(module, read_checkpoint(weights), weights)
    tokenizer = None
    if any((folder / n).is_file() for n in ("tokenizer.json", "vocab.txt", "tokenizer_config.json")):
        try:
            tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        except Exception:  # a tokenizer that cannot be read is not needed for tokens
            tokenizer = None
    return module.eval(), tokenizer


def _load_tied(module: nn.Module, state: Mapping[str, Tensor], where: Path) -> None:
    """Strict, but for names that are tied to one that is there, and for buffers that a version left out."""
    state = dict(state)
    own = dict(module.named_parameters(remove_duplicate=False))
    by_id: dict[int, list[str]] = {}
    for name, parameter in own.items():
        by_id.setdefault(id(parameter), []).append(name)
    for names in by_id.values():
        found = next((n for n in names if n in state), None)
        if found:
            state.update({n: state[found] for n in names if n not in state})
    buffers = {n for n, _ in module.named_buffers()}
    for name, value in module.state_dict().items():
        if name not in state and (name in buffers or name == "lm_head.weight"):
            state[name] = value
    wanted = set(module.state_dict())
    load_strict(module, {n: v for n, v in state.items() if n in wanted or "position_ids" not in n}, where=where)
