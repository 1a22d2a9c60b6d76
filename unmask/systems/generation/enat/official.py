"""The authors' checkpoints (``nnet_ema.pth``) and their numbers: how their state dict becomes ours, and how a fixture is run."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from unmask.draw import Draw
from unmask.errors import UserError
from unmask.official.load import Rule, load_strict, rename, without_prefix
from unmask.systems.generation.enat.masking import Split
from unmask.systems.generation.enat.model import ENAT
from unmask.systems.generation.enat.network import State, in_grid_order
from unmask.systems.generation.enat.sampling import SamplingSettings
from unmask.systems.generation.first_stage import FirstStageConfig, open_first_stage

OPTIONS = (
    "num_heads",
    "decoder_depth",
    "grid",
    "tokenizer",
    "steps",
    "cfg_scale",
    "mask_temperature",
    "sampling_temperature",
)
HEAD_DIM = 64  # of all published sizes
HALF_A_STEP = 2.0**-25  # what ``draw.gumbel`` adds to a uniform number
UNUSED = "prev_embedder."  # an MLP that the authors build and never call

RULES = [
    Rule(r"^prev_embedder\.", None),
    Rule(r"^x_embedder\.word_embeddings\.", "network.words."),
    Rule(r"^x_embedder\.position_embeddings\.", "network.places."),
    Rule(r"^x_embedder\.LayerNorm\.", "network.embed_norm."),
    Rule(r"^y_embedder\.embedding_table\.", "network.class_table."),
    Rule(r"^prev_proj\.", "network.previous."),
    Rule(r"^mlm_layer\.fc\.", "network.head.fc."),
    Rule(r"^mlm_layer\.ln\.", "network.head.norm."),
    Rule(r"^mlm_layer\.bias$", "network.head.bias", lambda bias: bias.flatten()),
    Rule(r"^blocks\.(\d+)\.attn\.kv\.A\.", r"network.blocks.\1.attn.context_kv."),
    Rule(r"^blocks\.(\d+)\.adaLN_modulation\.1\.", r"network.blocks.\1.modulate."),
    Rule(r"^(blocks|norm)\.", r"network.\1."),
]


def load_official(state: Mapping[str, Tensor], options: Mapping[str, Any] | None = None) -> ENAT:
    """The system with the file's weights. Sizes are read off the tensors; what these do not tell can be given as options:
    ``num_heads``, ``decoder_depth``, ``grid``, ``tokenizer`` (a run of a VQ tokenizer, whose code book must match), and how
    images are made. Raises ``UserError`` when the state is of another system.
    """
    options = dict(options or {})
    if "x_embedder.word_embeddings.weight" not in state or "mlm_layer.bias" not in state:
        raise UserError(
            "enat: these are not the weights of ENAT or NAT (no x_embedder.word_embeddings, mlm_layer.bias)"
        )
    return load_enat(state, {**read_sizes(state), **options})


def read_sizes(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """The fixtures' option names, as far as tensors tell them."""
    words, width = state["x_embedder.word_embeddings.weight"].shape
    depth = 1 + max((int(k.split(".")[1]) for k in state if k.startswith("blocks.")), default=-1)
    hidden = state["blocks.0.mlp.fc1.weight"].shape[0] if depth and "blocks.0.mlp.fc1.weight" in state else 4 * width
    positions = state.get("x_embedder.position_embeddings.weight")
    classes = state.get("y_embedder.embedding_table.weight")
    return {
        "network": "enat" if any(".attn.kv.A." in k for k in state) else "nat",
        "codebook_size": words - 1,
        "embed_dim": width,
        "num_heads": max(width // HEAD_DIM, 1),
        "encoder_depth": None,
        "blocks": depth,
        "mlp_ratio": hidden / width,
        "grid_size": math.isqrt(len(positions)) if positions is not None else 16,
        "num_classes": len(classes) - 1 if classes is not None else 1000,
    }


def enat_config(sizes: Mapping[str, Any]) -> ENAT.Config:
    """Our config from the fixtures' option names; what is silent has ENAT-L's value."""
    get = sizes.get
    decoder = get("decoder_depth") or min(2, get("blocks", 24))
    encoder = get("encoder_depth")
    sampling = {"steps": get("steps"), "cfg_scale": get("cfg_scale"), "reuse": get("reuse")}
    sampling |= {
        "mask_temperature": get("mask_temperature", get("mask_temp")),
        "sampling_temperature": get("sampling_temperature", get("samp_temp")),
        "schedule": get("mask_schedule", get("schedule")),
        "guidance_schedule": get("cfg_schedule", get("guidance_schedule")),
        "top_k": get("top_k"),
        "top_p": get("top_p"),
    }
    return ENAT.Config(
        network=get("network", "enat"),
        embed_dim=get("embed_dim", 1024),
        encoder_depth=get("blocks", 24) - decoder if encoder is None else encoder,
        decoder_depth=decoder,
        num_heads=get("num_heads", 16),
        mlp_ratio=get("mlp_ratio", 4.0),
        codebook_size=get("codebook_size", 1024),
        grid=get("grid", get("grid_size", 16)),
        classes=get("num_classes", 1000),
        label_smoothing=get("label_smoothing", 0.1),
        first_stage=None,
        ema=0.0,
        sampling=SamplingSettings(**{k: v for k, v in sampling.items() if v is not None}),
    )


def load_enat(state: Mapping[str, Tensor], options: Mapping[str, Any]) -> ENAT:
    """A model with a state dict under the authors' names, strictly."""
    config = enat_config(options)
    if options.get("tokenizer"):
        wanted = FirstStageConfig(kind="vq", weights=str(options["tokenizer"]), codes=config.codebook_size)
        stage, _ = open_first_stage(wanted)
        grid = config.grid if isinstance(config.grid, tuple) else (config.grid, config.grid)
        size = tuple(int(g or 0) * stage.factor for g in grid)
        config = config.model_copy(update={"first_stage": wanted, "image_size": size})
    model = ENAT(config)
    places = state.get("x_embedder.position_embeddings.weight")
    if places is not None and len(places) != model.tokens:
        raise UserError(
            f"enat: this checkpoint has {len(places)} positions, and a grid of {model.grid[0]}x{model.grid[1]} needs "
            f"{model.tokens}: use grid={math.isqrt(len(places))}"
        )
    _refuse_partial(state)
    renamed = rename(fused(state), RULES)
    load_strict(model, renamed, ignore=[r"^first_stage\."], where="enat checkpoint")
    return model


def _refuse_partial(state: Mapping[str, Tensor]) -> None:
    """The unused MLP is there as a whole or not at all."""
    found = {k.removeprefix(UNUSED) for k in state if k.startswith(UNUSED)}
    parts = {f"{layer}.{kind}" for layer in ("fc1", "fc2") for kind in ("weight", "bias")}
    if found and found != parts:
        wrong = sorted(found ^ parts)[0]
        raise UserError(f"enat checkpoint does not fit: {UNUSED}{wrong} is missing or left over")


def fused(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Queries and the keys and values of a token's own (``attn.q``, ``attn.kv.B`` or, where no context is, ``attn.kv``) as one."""
    out = dict(state)
    for name in state:
        match = re.fullmatch(r"(blocks\.\d+\.attn\.)q\.(weight|bias)", name)
        if match:
            attn, kind = match.groups()
            own = next((n for n in (f"{attn}kv.B.{kind}", f"{attn}kv.{kind}") if n in state), None)
            if own is not None:
                out[f"{attn}qkv.{kind}"] = torch.cat((out.pop(name), out.pop(own)))
    return out


# --- fixtures ---------------------------------------------------------------------------------------------------


def run_case(
    config: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], nn.Module, dict[str, Tensor]]:
    """Outputs and gradients of one fixture, under the authors' names."""
    state = without_prefix(tensors, "param.")
    model = load_enat(state, {"network": read_sizes(state)["network"], **config})
    if "in.ids" not in tensors:
        return sampled(model, config, tensors), model, {}
    tokens, ids, classes = tensors["in.tokens"], tensors["in.ids"], tensors["in.classes"]
    outputs: dict[str, Tensor] = {}
    _, _, outputs["logits"], outputs["features"], outputs["loss"] = whole(model, tokens, ids, classes)
    loss = outputs["loss"]
    if "in.ids_previous" in tensors and model.network.disentangled:
        before, _, _, outputs["previous_features"], _ = whole(model, tokens, tensors["in.ids_previous"], classes)
        _, _, outputs["logits_reuse"], outputs["features_reuse"], loss = whole(model, tokens, ids, classes, before)
        outputs["loss_reuse"] = loss
    loss.backward()
    return {n: v.detach() for n, v in outputs.items()}, model, official_gradients(model)


def whole(
    model: ENAT, tokens: Tensor, ids: Tensor, classes: Tensor, previous: State | None = None
) -> tuple[State, Split, Tensor, Tensor, Tensor]:
    """State, split, logits ``[B, N, K]``, features ``[B, N, D]`` in grid order and loss of one step."""
    net, split = model.network, split_of(ids, model.codebook_size)
    fresh = None
    if previous is not None:
        known = torch.zeros_like(ids).scatter(1, previous.positions, 1)
        apart = known.gather(1, split.visible).argsort(dim=1, stable=True)
        fresh = split.visible.gather(1, apart)[:, : split.visible.shape[1] - previous.positions.shape[1]]
    if net.disentangled:
        hidden, state = net(ids, classes, split.visible, split.hidden, fresh=fresh, previous=previous)
        features = in_grid_order([(state.features, state.positions), (hidden, split.hidden)])
    else:
        positions = torch.arange(net.tokens, device=ids.device).expand_as(ids)
        features = net.together(net.embed(ids, positions), net.conditions(classes))
        state = State(features[:, :0], positions[:, :0])
        hidden = net(ids, classes, split.visible, split.hidden)[0]
    target = tokens.gather(1, split.hidden).flatten()
    loss = F.cross_entropy(net.logits(hidden).flatten(0, 1), target, label_smoothing=model.config.label_smoothing)
    return state, split, net.logits(features), features, loss


def split_of(ids: Tensor, mask_id: int) -> Split:
    """The positions hidden in ``ids [B, N]`` and the others, in grid order. Raises ``UserError`` for rows of unequal number."""
    hidden = ids == mask_id
    counts = hidden.sum(dim=1)
    if bool((counts != counts[0]).any()):
        raise UserError(f"enat: every sample must hide as many tokens, got {sorted(set(counts.tolist()))}")
    order = hidden.long().argsort(dim=1, stable=True)
    visible = ids.shape[1] - int(counts[0])
    return Split(order[:, visible:], order[:, :visible])


class OfficialNoise:
    """A fixture's ``token_gumbel [steps, B, N, K]`` and ``mask_gumbel [steps, B, N]`` as the decoding asks for them: the
    uniform numbers whose Gumbel noise they are, in float64, which keeps them exact."""

    def __init__(self, tensors: Mapping[str, Tensor]):
        self.noise = {"token": tensors["draw.token_gumbel"], "confidence": tensors["draw.mask_gumbel"]}

    def uniform(
        self, name: str, shape: Sequence[int], *, device: torch.device | str = "cpu", shared: bool = False
    ) -> Tensor:
        kind, _, step = name.partition(".")
        return (-(-self.noise[kind][int(step)].double()).exp()).exp().reshape(tuple(shape)) - HALF_A_STEP

    def normal(self, *_: Any, **__: Any) -> Tensor:
        raise KeyError("the decoding draws no normal numbers")

    integers = normal


def sampled(model: ENAT, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The whole decoding on the fixture's noise: the ids that each step begins with, and the last ones."""
    trace: list[Tensor] = []
    settings = model.config.sampling.model_copy(update={"token_draw": "gumbel"})
    draw: Draw = OfficialNoise(tensors)
    ids = model.eval().sample_ids(tensors["in.classes"], draw, settings, trace=trace)
    return {"ids_by_step": torch.stack(trace), "tokens": ids.unflatten(1, model.grid)}


def official_gradients(model: ENAT) -> dict[str, Tensor]:
    """Gradients by the authors' names and shapes."""
    found: dict[str, Tensor] = {}
    for name, parameter in model.network.named_parameters():
        if parameter.grad is None:
            continue
        for ours, theirs in BACK:
            name = re.sub(ours, theirs, name)
        if ".attn.qkv." in name:
            own = "kv.B" if model.network.disentangled else "kv"
            query, rest = parameter.grad.split((len(parameter) // 3, 2 * (len(parameter) // 3)))
            found[name.replace("qkv", "q")], found[name.replace("qkv", own)] = query, rest
        else:
            found[name] = parameter.grad[None, None] if name == "mlm_layer.bias" else parameter.grad
    return found


BACK = [
    (r"^words\.", "x_embedder.word_embeddings."),
    (r"^places\.", "x_embedder.position_embeddings."),
    (r"^embed_norm\.", "x_embedder.LayerNorm."),
    (r"^class_table\.", "y_embedder.embedding_table."),
    (r"^previous\.", "prev_proj."),
    (r"^head\.norm\.", "mlm_layer.ln."),
    (r"^head\.", "mlm_layer."),
    (r"\.context_kv\.", ".kv.A."),
    (r"\.modulate\.", ".adaLN_modulation.1."),
]
