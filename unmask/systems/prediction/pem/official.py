"""The authors' checkpoints (detectron2's names) and their numbers: how a state dict becomes ours, and how a fixture is run."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from unmask.config import validated
from unmask.draw import Replay
from unmask.errors import UserError
from unmask.official.load import Rule, load_strict, rename, without_prefix
from unmask.systems.prediction.mask_inference import MergeRules, merge
from unmask.systems.prediction.mask_losses import MaskLoss, MaskLossConfig, by_image
from unmask.systems.prediction.mask_targets import MaskTargets
from unmask.systems.prediction.pem.attention import Memory, PrototypeAttention
from unmask.systems.prediction.pem.head import HeadConfig, PEMHead
from unmask.systems.prediction.pem.model import PEM

OPTIONS = ("num_heads", "classes", "things", "pre_norm", "normalise_over", "lift_mask", "backbone", "image_size")

LOOK = [  # inside one prototype attention
    Rule(r"\bfeature_proj\.bn\.", "memory_norm."),
    Rule(r"\bfeature_proj\.to_query_3x3\.", "memory_conv."),
    Rule(r"\bfeature_proj\.out\.", "memory_out."),
    Rule(r"\bquery_proj\.0\.", "query_norm."),
    Rule(r"\bquery_proj\.1\.", "query_out."),
]
ATTENTION = [  # torch's MultiheadAttention
    Rule(r"\bin_proj_(weight|bias)$", r"qkv.\1"),
    Rule(r"\bout_proj\.", "proj."),
]
HEAD = [
    Rule(r"^sem_seg_head\.pixel_decoder\.", "head.pixel_decoder."),
    Rule(r"^sem_seg_head\.predictor\.", "head.decoder."),
    Rule(r"\.in_projections\.(\d+)\.bn\.", r".projections.\1.norm."),
    Rule(r"\.in_projections\.", ".projections."),
    Rule(r"\.conv_avg\.bn\.", ".context.norm."),
    Rule(r"\.conv_avg\.", ".context."),
    Rule(r"\.csm\.(\d+)\.mlp\.0\.mlp\.0\.", r".modulations.\1.reduce."),
    Rule(r"\.csm\.(\d+)\.mlp\.0\.mlp\.1\.", r".modulations.\1.norm."),
    Rule(r"\.csm\.(\d+)\.mlp\.0\.mlp\.3\.", r".modulations.\1.expand."),
    Rule(r"\.dcn\.(\d+)\.dcn_offset\.", r".refinements.\1.offset."),
    Rule(r"\.dcn\.(\d+)\.dcn_bn\.", r".refinements.\1.norm."),
    Rule(r"\.dcn\.(\d+)\.dcn\.", r".refinements.\1.conv."),
    Rule(r"\.dcn\.(\d+)\.up_sample\.", r".refinements.\1.up."),
    Rule(r"\.dcn\.(\d+)\.up_bn\.", r".refinements.\1.up_norm."),
    Rule(r"^head\.pixel_decoder\.out\.bn\.", "head.pixel_decoder.out.norm."),
    Rule(r"\.input_proj\.", ".projections."),
    Rule(r"\.transformer_cross_attention_layers\.(\d+)\.multihead_attn\.", r".layers.\1.look.attention."),
    Rule(r"\.transformer_cross_attention_layers\.(\d+)\.", r".layers.\1.look."),
    Rule(r"\.transformer_self_attention_layers\.(\d+)\.self_attn\.", r".layers.\1.attention."),
    Rule(r"\.transformer_self_attention_layers\.(\d+)\.norm\.", r".layers.\1.attention_norm."),
    Rule(r"\.transformer_ffn_layers\.(\d+)\.linear1\.", r".layers.\1.ffn.0."),
    Rule(r"\.transformer_ffn_layers\.(\d+)\.linear2\.", r".layers.\1.ffn.2."),
    Rule(r"\.transformer_ffn_layers\.(\d+)\.norm\.", r".layers.\1.ffn_norm."),
    Rule(r"\.decoder_norm\.", ".norm."),
    Rule(r"\.class_embed\.", ".classify."),
    Rule(r"\.mask_embed\.layers\.0\.", ".embed_mask.0."),
    Rule(r"\.mask_embed\.layers\.1\.", ".embed_mask.2."),
    Rule(r"\.mask_embed\.layers\.2\.", ".embed_mask.4."),
    *LOOK,
    *ATTENTION,
]
RESNET = [  # detectron2's names -> timm's
    Rule(r"^backbone\.stem\.conv1\.norm\.", "encoder.model.bn1."),
    Rule(r"^backbone\.stem\.conv1\.", "encoder.model.conv1."),
    *(Rule(rf"^backbone\.res{i + 1}\.", f"encoder.model.layer{i}.") for i in range(1, 5)),
    Rule(r"^(encoder\.model\.layer\d\.\d+)\.shortcut\.norm\.", r"\1.downsample.1."),
    Rule(r"^(encoder\.model\.layer\d\.\d+)\.shortcut\.", r"\1.downsample.0."),
    Rule(r"^(encoder\.model\.layer\d\.\d+)\.conv(\d)\.norm\.", r"\1.bn\2."),
]
STDC = [Rule(r"^backbone\.x(2|4|8|16|32)\.", None), Rule(r"^backbone\.", "encoder.")]  # x...: the same modules again
OTHERS = [Rule(r"num_batches_tracked$", None), Rule(r"^(pixel_mean|pixel_std)$", None)]
RULES = [*OTHERS, *RESNET, *STDC, *HEAD]
RESNETS = {(2, 2, 2, 2): "resnet18", (3, 4, 6, 3): "resnet50", (3, 4, 23, 3): "resnet101", (3, 8, 36, 3): "resnet152"}


def load_official(state: Mapping[str, Tensor], options: Mapping[str, Any] | None = None) -> PEM:
    """The system with the file's weights; its sizes are read off the tensors.

    options: what they do not tell: ``num_heads`` (8), ``pre_norm`` (true), names of ``classes``, which of them are ``things``.
    Raises ``UserError`` when the state is of another system.
    """
    if "sem_seg_head.pixel_decoder.conv_avg.conv.weight" not in state:
        other = "sem_seg_head.predictor.query_feat.weight" in state
        raise UserError(
            "pem: these are not the weights of PEM (no sem_seg_head.pixel_decoder.conv_avg)"
            + (": of Mask2Former the pixel decoder is another" if other else "")
        )
    given = dict(options or {})
    size = given.pop("image_size", None)
    config = {**head_sizes(state), "backbone": backbone_of(state), **given}
    if size is not None:
        config["backbone"] = {**config["backbone"], "image_size": size}
    model = PEM(validated(PEM.Config, config, where="pem"))
    load_strict(model, rename(state, RULES), ignore=[r"num_batches_tracked$", r"empty_weight$"], where="pem checkpoint")
    return model.eval()


def head_sizes(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Our options, as far as tensors under the authors' names tell them."""
    decoder, predictor = "sem_seg_head.pixel_decoder", "sem_seg_head.predictor"
    looks = f"{predictor}.transformer_cross_attention_layers"
    return {
        "classes": state[f"{predictor}.class_embed.weight"].shape[0] - 1,
        "conv_dim": state[f"{decoder}.conv_avg.conv.weight"].shape[0],
        "mask_dim": state[f"{decoder}.out.conv.weight"].shape[0],
        "hidden_dim": state[f"{predictor}.query_feat.weight"].shape[1],
        "queries": state[f"{predictor}.query_feat.weight"].shape[0],
        "ffn_dim": state[f"{predictor}.transformer_ffn_layers.0.linear1.weight"].shape[0],
        "layers": 1 + max(int(k.split(".")[3]) for k in state if k.startswith(f"{looks}.")),
        "attention": "prototype" if f"{looks}.0.alpha" in state else "masked",
        "enforce_input_projection": f"{predictor}.input_proj.0.weight" in state,
        "csm": any(k.startswith(f"{decoder}.csm.") for k in state),
        "deformable": f"{decoder}.dcn.0.dcn_offset.weight" in state,
    }


def backbone_of(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Name and options of the backbone: STDC in the authors' names, a ResNet in detectron2's. Raises ``UserError``."""
    own = without_prefix(state, "backbone.")
    if "features.0.conv.weight" in own:
        from unmask.backbones.stdc.official import read_sizes

        return {"name": "stdc1", **read_sizes(own)}
    blocks = [(int(f[1]), int(f[2])) for k in own if (f := re.match(r"res(\d)\.(\d+)\.", k))]
    depths = tuple(1 + max((b for s, b in blocks if s == stage), default=-1) for stage in (2, 3, 4, 5))
    if depths not in RESNETS:
        raise UserError(
            f"pem: this backbone is neither STDC nor a known ResNet (blocks {depths}): give its weights apart"
        )
    return {"name": f"timm/{RESNETS[depths]}"}


# --- fixtures ---------------------------------------------------------------------------------------------------

Answer = tuple[dict[str, Tensor], nn.Module | None, dict[str, Tensor]]


def run_case(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Answer:
    """Outputs and gradients of one fixture, under the authors' names."""
    if "in.pred_masks" in tensors:
        return inference_case(config, tensors)
    if "in.memory" in tensors:
        return attention_case(config, tensors)
    return training_case(config, tensors)


def inference_case(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Answer:
    """Predictions -> semantic, panoptic, instance answers."""
    names = ("object_mask_threshold", "overlap_threshold", "top_k", "resize_masks_before_merging")
    tasks = [task for task in ("semantic", "panoptic", "instance") if config.get(task, True)]
    found = merge(
        tensors["in.pred_logits"],
        tensors["in.pred_masks"],
        padded=tuple(config["padded_size"]),  # type: ignore[arg-type]
        sizes=[tuple(s) for s in config["image_sizes"]],  # type: ignore[misc]
        outputs=[tuple(s) for s in config.get("output_sizes", config["image_sizes"])],  # type: ignore[misc]
        rules=MergeRules(**{n: config[n] for n in names if n in config}),
        things=config.get("thing_classes", ()),
        tasks=tasks,
    )
    out: dict[str, Tensor] = {}
    for i, one in enumerate(found):
        if one.scores is not None:
            out[f"semantic.{i}"] = one.scores
        if one.ids is not None:
            rows = [[s.id, s.label, int(s.thing)] for s in one.segments or []]
            out[f"panoptic.{i}"] = one.ids
            out[f"segments.{i}"] = torch.tensor(rows, dtype=torch.int64).reshape(-1, 3)
        if one.instances is not None:
            out[f"instance_scores.{i}"] = one.instances.scores
            out[f"instance_classes.{i}"] = one.instances.classes
            out[f"instance_area.{i}"] = one.instances.masks.flatten(1).sum(1).float()
    return out, None, {}


def attention_case(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Answer:
    """The prototype attention alone; the authors put queries before images."""
    state = weights(tensors)
    names = {key: next(iter(rename({key: value}, LOOK))) for key, value in state.items()}
    options = {k: config[k] for k in ("normalise_over", "lift_mask") if k in config}
    module = PrototypeAttention(config["hidden_dim"], config["num_heads"], **options)
    load_strict(module, rename(state, LOOK), ignore=[r"num_batches_tracked$"], where="prototype attention")
    module.train(not is_eval(config, default=True))
    queries = tensors["in.queries"].clone().requires_grad_()
    memory = tensors["in.memory"].clone().requires_grad_()
    size = (memory.shape[2], memory.shape[3])
    position = tensors["in.memory_pos"].flatten(2).transpose(1, 2)

    def look(mask: Tensor | None) -> Tensor:
        read = Memory(memory.flatten(2).transpose(1, 2), position, size)
        where = tensors["in.query_pos"].transpose(0, 1)
        return module(queries.transpose(0, 1), where, read, mask).transpose(0, 1)

    masked = look(tensors["in.mask_logits"].flatten(2))
    loss = (masked * tensors["in.weight"]).sum()
    loss.backward()
    with torch.no_grad():
        out = {"masked": masked.detach(), "unmasked": look(None), "loss": loss.detach()}
    found = {"in.queries": queries.grad, "in.memory": memory.grad} | gradients(module, names)
    return out, module, {k: v for k, v in found.items() if v is not None}


def training_case(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Answer:
    """Network, matching, losses of all layers, gradients; with a backbone, or with its maps given."""
    state = weights(tensors)
    names = {key: found for key, value in state.items() for found in rename({key: value}, RULES)}
    own = {k: v for k, v in state.items() if k.startswith("sem_seg_head.")}
    options = head_sizes(own)
    classes = int(options.pop("classes"))
    told = {
        "num_heads": config.get("num_heads", 8),
        "pre_norm": config.get("pre_norm", True),
        **{k: config[k] for k in ("normalise_over", "lift_mask", "attention_mask") if k in config},
    }
    losses = MaskLossConfig(**{k: config[k] for k in MaskLossConfig.model_fields if k in config})
    shared = {**options, **told}
    system: nn.Module
    if "in.images" in tensors:
        system = PEM(PEM.Config(**shared, classes=classes, backbone=backbone_of(state), loss=losses))
        head, criterion = system.head, system.criterion
    else:
        dims = tuple(tensors[f"in.features.res{i}"].shape[1] for i in (2, 3, 4, 5))
        head, criterion = PEMHead(HeadConfig(**shared), dims, classes), MaskLoss(losses, classes)
        system = nn.ModuleDict({"head": head, "criterion": criterion})
    renamed = rename(state, RULES)
    load_strict(system, renamed, ignore=[r"num_batches_tracked$", r"empty_weight$"], where="pem case")
    system.train(not is_eval(config))
    maps = (
        system.maps(tensors["in.images"])
        if isinstance(system, PEM)
        else [tensors[f"in.features.res{i}"] for i in (2, 3, 4, 5)]
    )
    features, memories = head.pixel_decoder(maps)
    found = head.decoder(memories, features)
    count = len(features)
    labels, masks = ([tensors[f"in.{k}.{i}"] for i in range(count)] for k in ("labels", "masks"))
    targets = MaskTargets.of_lists([label.long() for label in labels], masks)
    pairs = [min(options["queries"], n) for n in targets.counts]
    draws = {k.removeprefix("draw."): v for k, v in tensors.items() if k.startswith("draw.")}
    draws = {k: v if k.startswith("match_points") else by_image(v, pairs) for k, v in draws.items()}
    loss = criterion(found.layers(deep=bool(config.get("deep_supervision", True))), targets, Replay(draws))
    loss["loss"].backward()
    with torch.no_grad():
        last = len(found.logits) - 1
        out = {
            "loss": loss["loss"].detach(),
            "pred_logits": found.logits[-1],
            "pred_masks": found.masks(),
            "mask_features": features,
            **{f"scale{32 >> i}": memory for i, memory in enumerate(memories)},
            **{f"aux_logits.{i}": found.logits[i] for i in range(last)},
            **{f"aux_masks.{i}": found.masks(i) for i in range(last)},
            **{f"losses.{k}": v.detach() for k, v in loss.items() if k != "loss"},
        }
        context = head.pixel_decoder.context.norm
        out["running_var_after"], out["running_mean_after"] = context.running_var, context.running_mean
    return out, system, gradients(system, names)


def weights(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Parameters and running statistics under the authors' names."""
    return without_prefix(tensors, "param.") | without_prefix(tensors, "buffer.")


def is_eval(config: Mapping[str, Any], *, default: bool = False) -> bool:
    """Whether a case uses running statistics instead of the batch's."""
    told = config.get("batch_norm")
    return default if told is None else str(told).startswith("running")


def gradients(module: nn.Module, names: Mapping[str, str]) -> dict[str, Tensor]:
    """By the authors' names. names: theirs -> ours."""
    own = {n: p.grad for n, p in module.named_parameters() if p.grad is not None}
    return {theirs: own[ours] for theirs, ours in names.items() if ours in own}
