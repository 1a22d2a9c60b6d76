"""The authors' checkpoints of FiT and FiTv2 (``model_ema.bin``, ``.safetensors``), and the authors' numbers."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from unmask.config import validated
from unmask.draw import Replay
from unmask.errors import UserError
from unmask.nn.rotary import METHODS, rotary_tables
from unmask.official.load import load_strict, without_prefix
from unmask.systems.generation.dit.official import HEADS, stacked, unstacked
from unmask.systems.generation.first_stage import FirstStageConfig
from unmask.systems.generation.fitv2.model import FiTv2
from unmask.systems.generation.fitv2.tokens import Tokens, check_sizes

OPTIONS = (
    "num_heads", "context", "rotary", "first_stage", "classes", "image_size", "guidance_channels", "objective", "time_shift",
    "in_channels",
)  # fmt: skip
PREFER = ("ema", "model_ema")
COMPUTED = [r"rel_pos_embed", r"rope", r"freqs_", r"^pos_embed$"]  # tables that some files carry and we compute


def load_official(state: Mapping[str, Tensor], options: Mapping[str, Any] | None = None) -> FiTv2:
    """The system with the file's weights. Sizes and kinds are read off the tensors; options give what these do not tell
    (``num_heads``, ``context``, ``rotary``, ``first_stage``, ``classes``). Raises ``UserError`` for another system's state."""
    if "x_embedder.proj.weight" not in state or state["x_embedder.proj.weight"].ndim != 2:
        raise UserError(
            "fitv2: these are not the weights of a flexible transformer (no x_embedder.proj of a linear layer)"
        )
    given = dict(options or {})
    values = read_sizes(state, int(given.pop("in_channels", 4)))
    channels = values.pop("in_channels")
    stage = given.pop("first_stage", None)
    if stage is None:
        stage = {"kind": "diffusers", "weights": "stabilityai/sd-vae-ft-ema"} if channels == 4 else {"kind": "pixels"}
    parsed = validated(FirstStageConfig, {"kind": stage} if isinstance(stage, str) else stage, where="first_stage")
    factor = 1 if parsed.kind == "pixels" else 8
    side = values["patch_size"] * factor * int(int(given.get("context", 256)) ** 0.5)
    values |= {"image_size": (side, side), "first_stage": parsed.plain()}
    if parsed.kind == "pixels":
        values["channels"] = channels
    return load_fit(FiTv2(validated(FiTv2.Config, {**values, **given}, where="fitv2 checkpoint")), state)


def read_sizes(state: Mapping[str, Tensor], channels: int = 4) -> dict[str, Any]:
    """Our options, as far as tensors tell them; the channels of a token are told apart from its patch by ``channels``."""
    width, values = state["x_embedder.proj.weight"].shape
    patch = round((values / channels) ** 0.5)
    if patch * patch * channels != values:
        raise UserError(
            f"fitv2: tokens of {values} values are no square patches of {channels} channels: give in_channels="
        )
    rows = state.get("y_embedder.embedding_table.weight")
    sizes: dict[str, Any] = {
        "embed_dim": width,
        "in_channels": channels,
        "patch_size": patch,
        "depth": 1 + max((int(n.split(".")[1]) for n in state if n.startswith("blocks.")), default=0),
        "num_heads": HEADS.get(width, max(width // 64, 1)),
        "classes": 0 if rows is None else rows.shape[0] - 1,
        "qk_norm_weight": "blocks.0.attn.q_norm.weight" in state,
    }
    if "blocks.0.adaLN_modulation.fc2.weight" in state:
        sizes["adaln"] = "swiglu"
    elif "blocks.0.adaLN_modulation.2.weight" in state:
        sizes |= {"adaln": "lora", "adaln_rank": state["blocks.0.adaLN_modulation.1.weight"].shape[0]}
    else:
        sizes["adaln"] = "normal"
    gated = state.get("blocks.0.mlp.fc1_g.weight")
    if gated is not None:
        sizes["feed_forward"] = "swiglu_large" if gated.shape[0] == 4 * width else "swiglu"
    else:
        sizes["feed_forward"] = "gelu"
    if "final_layer.linear.weight" in state and state["final_layer.linear.weight"].shape[0] == 2 * values:
        sizes |= {"learn_sigma": True, "objective": "diffusion", "qk_norm": False}  # FiT v1
    return sizes


def load_fit(model: FiTv2, state: Mapping[str, Tensor]) -> FiTv2:
    """Load weights with the authors' names, strictly."""
    kept = {n: v for n, v in state.items() if not any(re.search(p, n) for p in COMPUTED)}
    load_strict(model.network, stacked(kept), where="fitv2 checkpoint")
    return model


# --- fixtures ---------------------------------------------------------------------------------------------------


def case_config(config: Mapping[str, Any]) -> FiTv2.Config:
    """Our options from the authors'."""
    get = config.get
    flow = bool(get("use_sit", True))
    lora = get("adaln_type", "normal") == "lora"
    kind = "gelu" if not get("use_swiglu", False) else "swiglu_large" if get("use_swiglu_large", False) else "swiglu"
    return FiTv2.Config.model_validate(
        {
            "context": get("context_size", 256),
            "patch_size": get("patch_size", 2),
            "channels": get("in_channels", 4),
            "image_size": (get("patch_size", 2),) * 2,
            "embed_dim": get("hidden_size", 1152),
            "depth": get("depth", 36),
            "num_heads": get("num_heads", 16),
            "mlp_ratio": get("mlp_ratio", 4.0),
            "classes": get("num_classes", 1000),
            "class_dropout": get("class_dropout_prob", 0.1),
            "feed_forward": kind,
            "qk_norm": get("q_norm") is not None,
            "qk_norm_weight": bool(get("qk_norm_weight", False)),
            "adaln": get("adaln_type", "normal"),
            **({"adaln_rank": get("adaln_lora_dim")} if lora and get("adaln_lora_dim") else {}),
            "objective": "flow" if flow else "diffusion",
            "learn_sigma": bool(get("learn_sigma", False)) and not flow,
            "time_shift": get("time_shifting", 1.0),
            "rotary": {
                "theta": get("theta", 10000.0),
                "method": get("custom_freqs") or "normal",
                "decouple": bool(get("decouple", False)),
                "online": bool(get("online_rope", False)),
                "trained": get("ori_max_pe_len"),
                "max_rows": get("max_pe_len_h"),
                "max_columns": get("max_pe_len_w"),
                "values": bool(get("add_rel_pe_to_v", False)),
            },
        }
    )


def run_case(
    config: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], nn.Module | None, dict[str, Tensor]]:
    """Outputs and gradients of one fixture, under the authors' names."""
    if "methods" in config:
        return rotary_case(config, tensors["in.grid"]), None, {}
    model = load_fit(FiTv2(case_config(config)), without_prefix(tensors, "param.")).eval()
    data, grid, mask = tensors["in.data"], tensors["in.grid"].long(), tensors["in.mask"].long()
    size, classes = tensors["in.size"].long(), tensors["in.classes"].long()
    check_sizes(grid, mask, size)
    tokens = Tokens(data, grid, mask, size)
    draws = {"noise": tensors["draw.noise"]}
    if "draw.normal_time" in tensors:
        draws["time"] = tensors["draw.normal_time"]
    if "in.time" in tensors:
        draws["time"] = tensors["in.time"]
    terms = model.terms(tokens, classes, Replay(draws))
    terms["loss"].backward()
    cos, sin = model.network.rotary(grid, size, mask)
    outputs = {
        "time": terms["time"],
        "velocity": terms["output"].detach(),
        "output": terms["output"].detach(),
        "loss": terms["loss"].detach(),
        "loss_per_sample": terms["each"].detach(),
        "rope_cos": cos,
        "rope_sin": sin,
    }
    named = {n: p.grad for n, p in model.network.named_parameters() if p.grad is not None}
    return outputs, model, unstacked(named)


def rotary_case(config: Mapping[str, Any], grid: Tensor) -> dict[str, Tensor]:
    """The tables of every method, coupled and decoupled."""
    outputs: dict[str, Tensor] = {}
    for method in config.get("methods", METHODS):
        for decouple in (False, True):
            cos, sin = rotary_tables(
                grid,
                head_dim=int(config["head_dim"]),
                theta=float(config.get("theta", 10000.0)),
                method=method,
                decouple=decouple,
                trained=int(config["trained_len"]),
                lengths=(int(config["max_len_rows"]), int(config["max_len_columns"])),
            )
            name = method.replace("-", "_") + ("_decoupled" if decouple else "")
            outputs |= {f"{name}_cos": cos, f"{name}_sin": sin}
    return outputs
