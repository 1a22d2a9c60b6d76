"""Any network of timm by name, as an encoder with tokens and feature maps: ``timm/resnet18``, ``timm/vit_small_patch16_224``.

Plain vision transformers become :class:`TimmViT`, which drops or replaces hidden tokens; everything else a
:class:`TimmEncoder`. Parameters keep timm's names under ``model.``, so weights go in and out unchanged.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import timm
import torch
from timm.layers import DropPath
from timm.models import model_entrypoint
from timm.models._manipulate import group_parameters
from torch import Tensor, nn

from unmask.config import Config, Field, validated
from unmask.contracts import Encoder, Preprocessing
from unmask.draw import Draw
from unmask.errors import UserError, nearest
from unmask.nn.block import drop_path
from unmask.nn.patch import replace_hidden, tuple_of
from unmask.official.hub import hub_reason
from unmask.official.load import load_strict, read_checkpoint

MAX_MAPS = 4  # a pyramid of more stages than this starts where strides are useful


class TimmConfig(Config):
    """Options of ``timm/NAME``; ``arguments`` go to timm as they are."""

    image_size: int | tuple[int, int] | None = Field(None, description="pixels; default the model's own in timm")
    in_channels: int = Field(3, ge=1)
    patch_size: int | tuple[int, int] | None = Field(None, description="pixels of a patch, where the model has any")
    drop_path: float = Field(0.0, ge=0, lt=1, description="rate in the last block")
    pretrained: bool = Field(False, description="timm's published weights (needs the network once)")
    weights: str | None = Field(None, description="a checkpoint file with timm's names")
    pool: Literal["mean", "timm"] = Field("mean", description="pooled features: mean over places, or timm's own habit")
    out_indices: tuple[int, ...] | None = Field(None, description="stages (blocks of a ViT) that maps returns")
    arguments: dict[str, Any] = Field({}, description="further arguments of timm.create_model")


class TimmEncoder(Encoder):
    """A network of timm that shows its stages: convolutional networks, Swin, and most others.

    Networks that start with a patch embedding can have hidden tokens replaced right behind it; dropping needs a plain
    vision transformer (:class:`~unmask.backbones.timm.vit.TimmViT`).
    """

    arguments: dict[str, Any]  # of timm.create_model

    def __init__(self, model: nn.Module, config: TimmConfig):
        super().__init__()
        self.model, self.config = model, config
        self.in_channels = config.in_channels
        self.image_size = _image_size(model, config)
        self.embed_dim = int(model.num_features)  # type: ignore[arg-type]
        self.prefix_tokens = int(getattr(model, "num_prefix_tokens", 0))  # type: ignore[arg-type]
        info = _stages(model)
        plain = len({int(i["reduction"]) for i in info}) == 1  # all blocks at one resolution: the last says it all
        chosen = config.out_indices or range(len(info))[-1 if plain else -MAX_MAPS :]
        if any(i not in range(len(info)) for i in chosen):
            raise UserError(f"out_indices={list(chosen)} does not fit: the model has stages 0 ... {len(info) - 1}")
        self.out_indices = tuple(chosen)
        self.strides = tuple(int(info[i]["reduction"]) for i in chosen)
        self.map_dims = tuple(int(info[i]["num_chs"]) for i in chosen)
        entry = _entry_patch(model, self.in_channels, self.image_size)
        self.can_replace = entry is not None
        self.patch_size = entry or (int(info[-1]["reduction"]),) * 2
        self.draws = DrawnDropPath.take_over(model)
        self._depths = _depths(model)
        self.num_layers = max(self._depths.values(), default=0)

    def grid(self, size: Any = None) -> tuple[int, ...]:
        if self.can_replace:
            return super().grid(size)
        size = tuple(size or self.image_size)  # a convolution takes any size and rounds up
        return tuple(-(-s // p) for s, p in zip(size, self.patch_size, strict=True))

    def tokens(
        self,
        x: Tensor,
        *,
        keep: Tensor | None = None,
        hidden: Tensor | None = None,
        mask_token: Tensor | None = None,
        draw: Draw | None = None,
    ) -> Tensor:
        if keep is not None:
            raise ValueError(f"{self.name} cannot drop tokens")
        with self.draws.of(draw, x), self._replacing(hidden, mask_token):
            return self._sequence(self.model.forward_features(x))

    def maps(self, x: Tensor, *, draw: Draw | None = None) -> list[Tensor]:
        with self.draws.of(draw, x):
            if hasattr(self.model, "forward_intermediates"):
                return self.model.forward_intermediates(
                    x, indices=list(self.out_indices), output_fmt="NCHW", intermediates_only=True
                )
            return [self._map(self.model.forward_features(x), x)]

    def pooled(self, x: Tensor, *, draw: Draw | None = None) -> Tensor:
        if self.config.pool == "mean":
            return super().pooled(x, draw=draw)
        with self.draws.of(draw, x):
            return self.model.forward_head(self.model.forward_features(x), pre_logits=True)

    def layer_of(self, parameter: str) -> int:
        return self._depths.get(parameter.removeprefix("model."), 0)

    def no_weight_decay(self) -> set[str]:
        skipped = self.model.no_weight_decay() if hasattr(self.model, "no_weight_decay") else ()
        return {f"model.{name}" for name in skipped}

    def blocks_to_compile(self) -> list[nn.Module]:
        lists = [m for n, m in self.model.named_modules() if n.rpartition(".")[2] in ("blocks", "layer1", "layer2")]
        lists += [m for n, m in self.model.named_modules() if n.rpartition(".")[2] in ("layer3", "layer4")]
        return [b for m in lists if isinstance(m, nn.ModuleList | nn.Sequential) for b in m.children()]

    def _sequence(self, features: Tensor) -> Tensor:
        """``[B, L, D]`` from whatever layout the family of networks has."""
        if features.ndim == 3:
            return features
        if getattr(self.model, "output_fmt", "NCHW") == "NHWC":
            return features.flatten(1, 2)
        return features.flatten(2).transpose(1, 2)

    def _map(self, features: Tensor, x: Tensor) -> Tensor:
        tokens = self._sequence(features)[:, self.prefix_tokens :]
        return tokens.transpose(1, 2).unflatten(2, self.grid(x.shape[2:]))

    @contextmanager
    def _replacing(self, hidden: Tensor | None, mask_token: Tensor | None) -> Iterator[None]:
        """While open, hidden tokens leave the patch embedding as the mask token."""
        if hidden is None:
            yield
            return
        if mask_token is None or not self.can_replace:
            raise ValueError(f"{self.name}: hidden needs mask_token and an encoder that can replace")

        def replace(_module: nn.Module, _inputs: Any, out: Tensor) -> Tensor:
            flat = out if out.ndim == 3 else out.flatten(1, 2)
            return replace_hidden(flat, hidden, mask_token).reshape(out.shape)

        hook = self.model.patch_embed.register_forward_hook(replace)
        try:
            yield
        finally:
            hook.remove()


class DrawnDropPath(nn.Module):
    """Stochastic depth whose uniforms are given from outside, in place of timm's, which asks torch's generator."""

    def __init__(self, rate: float):
        super().__init__()
        self.rate = rate
        self.uniform: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        return drop_path(x, self.uniform if self.training else None, self.rate)

    @staticmethod
    def take_over(model: nn.Module) -> _Draws:
        found = []
        for parent in list(model.modules()):
            for name, child in list(parent.named_children()):
                if isinstance(child, DropPath):
                    found.append(DrawnDropPath(float(child.drop_prob or 0)))
                    setattr(parent, name, found[-1])
        return _Draws(found)


class _Draws:
    """The drop paths of a network, fed from one draw a step: ``uniform("drop_path", [B, branches])``."""

    def __init__(self, paths: list[DrawnDropPath]):
        self.paths = [p for p in paths if p.rate > 0]

    @contextmanager
    def of(self, draw: Draw | None, x: Tensor) -> Iterator[None]:
        if draw is None or not self.paths or not self.paths[0].training:
            yield
            return
        uniform = draw.uniform("drop_path", (len(x), len(self.paths)), device=x.device)
        for path, column in zip(self.paths, uniform.unbind(1), strict=True):
            path.uniform = column
        try:
            yield
        finally:
            for path in self.paths:
                path.uniform = None


def build(name: str, **options: Any) -> TimmEncoder:
    """``timm/NAME`` with the options of :class:`TimmConfig`. Raises ``UserError``: unknown names (with the nearest), sizes
    that do not fit, weights that cannot be had."""
    from timm.models.vision_transformer import PatchEmbed, VisionTransformer

    from unmask.backbones.timm.vit import TimmViT

    known = name.removeprefix("timm/")
    if not timm.is_model(known):
        raise UserError(f"timm has no model {known!r}: {_nearest_models(known)}")
    config = validated(TimmConfig, options, where=f"backbone {name}")
    if config.pretrained and config.weights:
        raise UserError(f"{name}: weights come from one place: pretrained=true or weights=FILE, not both")
    model, arguments = _create(known, config)
    plain = type(model) is VisionTransformer or type(model).__name__ == "VisionTransformerDistilled"
    cls = TimmViT if plain and isinstance(model.patch_embed, PatchEmbed) else TimmEncoder
    encoder = cls(model, config)
    encoder.name, encoder.options, encoder.arguments = name, options, arguments
    encoder.grid()  # complains about sizes that do not fit
    if config.weights:
        _load_weights(model, known, Path(config.weights))
    if config.pretrained or config.weights:
        encoder.preprocessing = _preprocessing(model, encoder)
    return encoder


def _nearest_models(name: str) -> str:
    architecture = name.partition(".")[0]
    if timm.is_model(architecture) and architecture != name:
        return f"of {architecture} it has the weights {', '.join(timm.list_pretrained(f'{architecture}*')[:6])}"
    return nearest(name, timm.list_models())


def _create(name: str, config: TimmConfig) -> tuple[nn.Module, dict[str, Any]]:
    """The network, and the arguments with which timm makes it again (without where its weights came from)."""
    arguments: dict[str, Any] = {"in_chans": config.in_channels, "num_classes": 0, "pretrained": config.pretrained}
    if config.drop_path:
        arguments["drop_path_rate"] = config.drop_path
    if config.patch_size is not None:
        arguments["patch_size"] = config.patch_size
    arguments |= config.arguments
    sized = {} if config.image_size is None else {"img_size": tuple_of(config.image_size, 2)}
    # each family takes what it knows: sizes where the network has one, any size at run time where it can
    for optional in ({"dynamic_img_size": True, **sized}, sized, {}):
        try:
            model = timm.create_model(name, **arguments, **optional)
            return model, {k: v for k, v in (arguments | optional).items() if k != "pretrained"}
        except TypeError as error:
            if "unexpected keyword" not in str(error) or not any(k in str(error) for k in optional):
                raise UserError(f"timm/{name} does not take these options: {error}") from None
        except (RuntimeError, ValueError, AssertionError, OSError, KeyError) as error:
            raise UserError(_why_not(name, config, error)) from None
        except Exception as error:  # the hub client's own errors
            raise UserError(_why_not(name, config, error)) from None
    raise UserError(f"timm/{name} cannot be built with {config.plain()}")


def _why_not(name: str, config: TimmConfig, error: Exception) -> str:
    if config.pretrained:
        return f"no weights for timm/{name}: {hub_reason(error)}; or give weights=FILE"
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return f"timm/{name} cannot be built with image_size={config.image_size}, {config.arguments or 'no arguments'}: {lines[0]}"


def _load_weights(model: nn.Module, name: str, path: Path) -> None:
    """Weights with timm's names, or those that timm's own filter of the family understands; the classifier is left out."""
    state = read_checkpoint(path)
    family = importlib.import_module(model_entrypoint(name).__module__)
    reshape = getattr(family, "checkpoint_filter_fn", None)
    if reshape is not None:
        try:
            state = reshape(state, model)
        except Exception as error:
            raise UserError(f"{path} does not fit timm/{name}: {type(error).__name__} {error}") from None
    load_strict(model, state, ignore=[r"^(head|fc|classifier|head_dist)\b", r"^head\.fc\.", "^mask_token$"], where=path)


def _preprocessing(model: nn.Module, encoder: Encoder) -> Preprocessing:
    known: dict[str, Any] = dict(model.pretrained_cfg)  # type: ignore[arg-type]
    mean, std = tuple(known.get("mean", (0.485, 0.456, 0.406))), tuple(known.get("std", (0.229, 0.224, 0.225)))
    channels = encoder.in_channels
    if channels != len(mean):  # timm folds or repeats the three input filters: the mean colour is what they saw
        mean, std = (sum(mean) / len(mean),) * channels, (sum(std) / len(std),) * channels
    how = known.get("interpolation") or "bicubic"
    return Preprocessing(mean, std, encoder.image_size, channels, interpolation=how)


def _image_size(model: nn.Module, config: TimmConfig) -> tuple[int, ...]:
    if config.image_size is not None:
        return tuple_of(config.image_size, 2)
    return tuple(int(s) for s in model.pretrained_cfg.get("input_size", (3, 224, 224))[1:])


def _stages(model: nn.Module) -> list[dict[str, Any]]:
    """What timm says of each stage; of a network that shows none, its last features alone."""
    info = list(getattr(model, "feature_info", None) or [])
    if info and hasattr(model, "forward_intermediates"):
        return info
    reduction = info[-1]["reduction"] if info else 32
    return [{"num_chs": int(model.num_features), "reduction": reduction}]  # type: ignore[arg-type]


def _entry_patch(model: nn.Module, channels: int, size: tuple[int, ...]) -> tuple[int, ...] | None:
    """The patch where tokens enter, if the network starts with a patch embedding: that alone is tried on an empty image."""
    embed = getattr(model, "patch_embed", None)
    patch = getattr(embed, "patch_size", None)
    if embed is None or patch is None:
        return None
    patch = tuple_of(patch, 2)
    with torch.no_grad():
        try:
            out = embed(torch.zeros(1, channels, *size))
        except (RuntimeError, AssertionError, TypeError):
            return None
    grid = tuple(s // p for s, p in zip(size, patch, strict=True))
    if not isinstance(out, Tensor) or out.shape[1:-1] not in (grid, (grid[0] * grid[1],)):
        return None
    return patch


def _depths(model: nn.Module) -> dict[str, int]:
    """Parameter -> depth, by timm's own grouping; 0 for all where the network has none."""
    if not hasattr(model, "group_matcher"):
        return {}
    return {n: int(d) for n, d in group_parameters(model, model.group_matcher(coarse=False), reverse=True).items()}
