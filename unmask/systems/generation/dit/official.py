"""The authors' checkpoints, diffusers' names for them, and the authors' numbers.

Known: ``DiT-XL-2-256x256.pt`` and its kin (a plain state dict, or one under "ema"), and diffusers'
``transformer/diffusion_pytorch_model.safetensors``. The authors keep a modulation layer in every block; ours are stacked.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from unmask.config import validated
from unmask.draw import Replay
from unmask.errors import UserError
from unmask.nn.positions import sincos_table
from unmask.official.load import load_strict, without_prefix
from unmask.systems.generation import samplers
from unmask.systems.generation.dit.diffusers_names import from_diffusers, is_diffusers
from unmask.systems.generation.dit.model import DiT
from unmask.systems.generation.first_stage import FirstStageConfig

OPTIONS = (
    "num_heads",
    "image_size",
    "first_stage",
    "classes",
    "guidance_channels",
    "diffusion_steps",
    "noise_schedule",
)
HEADS = {384: 6, 768: 12, 1024: 16, 1152: 16, 2304: 24}
PREFER = ("ema",)  # the wrapper of a training checkpoint whose weights are wanted

# the authors' layer of a block's modulation -> the stacked one of ours
STACKED = {"1": "linear", "fc1_g": "fc1_g", "fc1_x": "fc1_x", "fc2": "fc2"}
LORA = {"1": "down", "2": "up"}
_BLOCK = re.compile(r"^blocks\.(\d+)\.adaLN_modulation\.(\w+)\.(weight|bias)$")
_FINAL = re.compile(r"^final_layer\.adaLN_modulation\.(\w+)\.(weight|bias)$")
_EVERYWHERE = "global_adaLN_modulation.1."


def stacked(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The authors' state with the modulation layers of all blocks put together, under our names. Raises ``UserError`` where
    the layers of a block are missing or of another shape."""
    out: dict[str, Tensor] = {}
    layers: dict[str, dict[int, Tensor]] = {}
    low_rank = any(re.match(r"^blocks\.\d+\.adaLN_modulation\.2\.", name) for name in state)
    for name, value in state.items():
        if found := _BLOCK.match(name):
            number, layer, kind = found.groups()
            known = LORA if low_rank else STACKED
            layers.setdefault(f"modulations.{known.get(layer, layer)}.{kind}", {})[int(number)] = value
        elif found := _FINAL.match(name):
            out[f"final_layer.modulations.{STACKED.get(found[1], found[1])}.{found[2]}"] = value[None]
        elif name.startswith(_EVERYWHERE):
            out["modulations.everywhere." + name.removeprefix(_EVERYWHERE)] = value
        else:
            out[name] = value
    for name, parts in layers.items():
        if sorted(parts) != list(range(len(parts))) or len({p.shape for p in parts.values()}) != 1:
            raise UserError(f"checkpoint: the blocks do not all have the same adaLN_modulation ({name.split('.')[-1]})")
        out[name] = torch.stack([parts[i] for i in range(len(parts))])
    return out


def unstacked(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The way back: our names (without "network.") to the authors', for weights or gradients."""
    out: dict[str, Tensor] = {}
    low_rank = any(name.startswith("modulations.down.") for name in tensors)
    back = {ours: theirs for theirs, ours in (LORA if low_rank else STACKED).items()}
    for name, value in tensors.items():
        parts = name.split(".")
        if name.startswith("modulations.everywhere."):
            out[_EVERYWHERE + parts[-1]] = value
        elif name.startswith("modulations."):
            for number, own in enumerate(value.unbind(0)):
                out[f"blocks.{number}.adaLN_modulation.{back[parts[1]]}.{parts[2]}"] = own
        elif name.startswith("final_layer.modulations."):
            layer = {ours: theirs for theirs, ours in STACKED.items()}[parts[2]]
            out[f"final_layer.adaLN_modulation.{layer}.{parts[3]}"] = value[0]
        else:
            out[name] = value
    return out


def load_official(state: Mapping[str, Tensor], options: Mapping[str, Any] | None = None) -> DiT:
    """The system with the file's weights, under the authors' or diffusers' names.

    Sizes are read off the tensors; options give what these do not tell (``num_heads``, ``first_stage``, ``classes``: names,
    ``image_size``). Without a first stage given, four channels mean diffusers' f8 autoencoder, three mean pixels.
    Raises ``UserError`` when the state is of another system.
    """
    if is_diffusers(state):
        state = from_diffusers(state)
    if "x_embedder.proj.weight" not in state or state["x_embedder.proj.weight"].ndim != 4:
        raise UserError(
            "dit: these are not the weights of a diffusion transformer (no x_embedder.proj of a convolution)"
        )
    return load_dit(DiT(config_of({**read_sizes(state), **(options or {})})), state)


def read_sizes(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Our options, as far as tensors tell them."""
    weight = state["x_embedder.proj.weight"]
    width, channels, patch = weight.shape[0], weight.shape[1], weight.shape[2]
    table, rows = state.get("pos_embed"), state.get("y_embedder.embedding_table.weight")
    sizes: dict[str, Any] = {
        "embed_dim": width,
        "in_channels": channels,
        "patch_size": patch,
        "depth": 1 + max((int(n.split(".")[1]) for n in state if n.startswith("blocks.")), default=0),
        "num_heads": HEADS.get(width, max(width // 64, 1)),
        "classes": 0 if rows is None else rows.shape[0] - 1,
    }
    if "blocks.0.mlp.fc1.weight" in state:
        sizes["mlp_ratio"] = state["blocks.0.mlp.fc1.weight"].shape[0] / width
    if "final_layer.linear.weight" in state:
        sizes["learn_sigma"] = state["final_layer.linear.weight"].shape[0] == 2 * channels * patch**2
    if table is not None:
        sizes["latent_size"] = patch * math.isqrt(table.shape[1])
    return sizes


def config_of(sizes: Mapping[str, Any]) -> DiT.Config:
    """The system's options from sizes; latents of four channels come from diffusers' autoencoder unless said otherwise."""
    values = dict(sizes)
    channels, latent = values.pop("in_channels", 4), values.pop("latent_size", 32)
    stage = values.pop("first_stage", None)
    stage = stage if stage is not None else {"kind": "diffusers"} if channels == 4 else {"kind": "pixels"}
    stage = validated(FirstStageConfig, {"kind": stage} if isinstance(stage, str) else stage, where="first_stage")
    factor = 1 if stage.kind == "pixels" else 8
    values.setdefault("image_size", (latent * factor,) * 2)
    if stage.kind == "pixels":
        values.setdefault("channels", channels)
    elif stage.kind == "diffusers" and stage.weights is None and stage.built is None:
        stage = stage.model_copy(update={"weights": "stabilityai/sd-vae-ft-ema"})
    return validated(DiT.Config, {**values, "first_stage": stage.plain()}, where="dit checkpoint")


def load_dit(model: DiT, state: Mapping[str, Tensor]) -> DiT:
    """Load weights with the authors' names, strictly; the fixed table among them must be the one we compute."""
    load_network(model.network, state)
    return model


def load_network(network: Any, state: Mapping[str, Tensor], where: str = "dit checkpoint") -> None:
    state = dict(state)
    table = state.pop("pos_embed", None)
    if table is not None:
        own = sincos_table(network.config.embed_dim, network.grid)
        if table.shape[1:] != own.shape:
            raise UserError(
                f"{where}: its positions are {list(table.shape[1:])}, a grid of {network.grid[0]}x{network.grid[1]} "
                f"tokens of width {own.shape[1]} needs {list(own.shape)}: give the image_size it was trained at"
            )
        if not torch.allclose(table[0].float(), own, atol=1e-5):
            raise UserError(f"{where}: pos_embed is not the fixed sine-cosine table of {network.grid}")
    load_strict(network, stacked(state), ignore=[r"^pos_embed$"], where=where)


# --- fixtures ---------------------------------------------------------------------------------------------------


def case_config(config: Mapping[str, Any]) -> DiT.Config:
    """Our options from the authors'."""
    get = config.get
    size = get("input_size", 32)
    return DiT.Config.model_validate(
        {
            "image_size": tuple(size) if isinstance(size, (list, tuple)) else (size, size),
            "channels": get("in_channels", 4),
            "classes": get("num_classes", 1000),
            "patch_size": get("patch_size", 2),
            "embed_dim": get("hidden_size", 1152),
            "depth": get("depth", 28),
            "num_heads": get("num_heads", 16),
            "mlp_ratio": get("mlp_ratio", 4.0),
            "learn_sigma": get("learn_sigma", True),
            "class_dropout": get("class_dropout_prob", 0.1),
            "diffusion_steps": get("diffusion_steps", 1000),
            "noise_schedule": get("noise_schedule", "linear"),
            "fixed_variance": "small" if get("sigma_small", False) else "large",
            "guidance_channels": get("guidance_channels", 3),
        }
    )


def run_case(
    config: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], nn.Module, dict[str, Tensor]]:
    """Outputs and gradients of one fixture, under the authors' names."""
    model = load_dit(DiT(case_config(config)), without_prefix(tensors, "param.")).eval()
    x0, classes, t = tensors["in.images"], tensors["in.classes"], tensors["in.time"].long()
    draws = {"noise": tensors["draw.noise"], "time": t}
    terms = model.loss({"image": x0, "label": classes}, Replay(draws))
    terms["loss"].backward()
    outputs: dict[str, Tensor] = {"loss": terms["loss"].detach()}
    with torch.no_grad():
        outputs["noisy"] = model.diffusion.noisy(x0, t, draws["noise"])
        outputs["output"] = model.network(outputs["noisy"], t, classes)
        outputs |= model.loss_terms(x0, t, draws["noise"], classes)
        if "draw.start" in tensors:
            outputs |= case_samples(model, config, tensors)
    named = {n: p.grad for n, p in model.network.named_parameters() if p.grad is not None}
    return outputs, model, unstacked(named)


def case_samples(model: DiT, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Guided samples by both samplers. The recorded noise has a row for either half of the doubled batch: ours is the first."""
    start, noise = tensors["draw.start"], tensors["draw.step_noise"]
    steps = int(config.get("sampling_steps", len(noise)))
    diffusion = model.diffusion.respaced(steps)
    field = model.field(tensors["in.sample_classes"].long(), float(config.get("cfg_scale", 1.0)))
    draw = Replay({f"step.{number}": noise[number, : len(start)] for number in range(len(noise))})
    return {
        "samples_ddpm": samplers.ddpm(field, diffusion, start, draw),
        "samples_ddim": samplers.ddim(field, diffusion, start, draw, eta=float(config.get("eta", 0.0))),
        "timesteps": torch.tensor(diffusion.timesteps),
        "betas": torch.from_numpy(diffusion.betas).float(),
    }
