"""Any image classifier of torchvision by name, as an encoder: ``torchvision/resnet18``. Its last linear layers are left out;
parameters keep torchvision's names under ``model.``, so weights go in and out unchanged."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from unmask.backbones.timm.model import DrawnDropPath, _Draws
from unmask.config import Config, Field, validated
from unmask.contracts import Encoder, Preprocessing
from unmask.draw import Draw
from unmask.errors import UserError, nearest
from unmask.nn.patch import tuple_of
from unmask.official.hub import hub_reason
from unmask.official.load import load_strict, read_checkpoint

HEADS = ("fc", "classifier", "head", "heads")


class TorchvisionConfig(Config):
    """Options of ``torchvision/NAME``; ``arguments`` go to its builder as they are."""

    image_size: int | tuple[int, int] | None = Field(None, description="pixels; default 224")
    in_channels: int = Field(3, ge=1)
    pretrained: bool = Field(False, description="torchvision's published weights (needs the network once)")
    weights: str | None = Field(None, description="a checkpoint file with torchvision's names")
    arguments: dict[str, Any] = Field({}, description="further arguments of the builder (width_per_group=128)")


class TorchvisionEncoder(Encoder):
    """The features before the head: maps of the last stage of a convolutional network, or the class token of a ViT."""

    def __init__(self, model: nn.Module, config: TorchvisionConfig):
        super().__init__()
        self.model, self.config = model, config
        self.in_channels = config.in_channels
        self.image_size = tuple_of(config.image_size or 224, 2)
        self.draws = _take_over(model)
        with torch.no_grad(), _evaluating(model):
            found = self._map(torch.zeros(1, self.in_channels, *self.image_size))
        self.embed_dim = int(found.shape[1])
        stride = max(self.image_size[-1] // max(found.shape[-1], 1), 1)
        self.strides, self.map_dims, self.patch_size = (stride,), (self.embed_dim,), (stride, stride)
        self.num_layers = 1 + max((self.layer_of(f"model.{n}") for n, _ in model.named_parameters()), default=0)

    def grid(self, size: Any = None) -> tuple[int, ...]:
        size = tuple(size or self.image_size)
        return tuple(-(-s // p) for s, p in zip(size, self.patch_size, strict=True))

    def _map(self, x: Tensor) -> Tensor:
        """``[B, D, h, w]``: what the network pools. Heads are the identity, so that a forward runs the rest."""
        model: Any = self.model
        if hasattr(model, "features"):
            found = model.features(x)
            for name in ("norm", "permute"):  # Swin ends with both
                found = getattr(model, name)(found) if isinstance(getattr(model, name, None), nn.Module) else found
            return torch.nn.functional.relu(found) if type(model).__name__ == "DenseNet" else found
        if hasattr(model, "encoder") and hasattr(model, "_process_input"):
            tokens = model._process_input(x)
            tokens = torch.cat((model.class_token.expand(len(x), -1, -1), tokens), dim=1)
            tokens = model.encoder(tokens)[:, 1:]
            side = int(tokens.shape[1] ** 0.5)
            return tokens.transpose(1, 2).unflatten(2, (side, -1))
        for name, module in model.named_children():
            if name in HEADS or isinstance(module, nn.AdaptiveAvgPool2d):
                break
            x = module(x)
        return x

    def maps(self, x: Tensor, *, draw: Draw | None = None) -> list[Tensor]:
        with self.draws.of(draw, x):
            return [self._map(x)]

    def tokens(
        self,
        x: Tensor,
        *,
        keep: Tensor | None = None,
        hidden: Tensor | None = None,
        mask_token: Tensor | None = None,
        draw: Draw | None = None,
    ) -> Tensor:
        if keep is not None or hidden is not None:
            raise ValueError(f"{self.name} cannot hide tokens")
        with self.draws.of(draw, x):
            return self._map(x).flatten(2).transpose(1, 2)

    def layer_of(self, parameter: str) -> int:
        found = re.search(r"(?:layer|features\.|encoder_layer_)(\d+)", parameter)
        return int(found[1]) + 1 if found else 0

    def blocks_to_compile(self) -> list[nn.Module]:
        lists = [m for n, m in self.model.named_children() if isinstance(m, nn.Sequential) and n.startswith("layer")]
        return [b for m in lists for b in m.children()]


def _take_over(model: nn.Module) -> _Draws:
    """Stochastic depth whose uniforms are given, in place of torchvision's, which asks torch's generator."""
    from torchvision.ops import StochasticDepth

    found = []
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, StochasticDepth):
                found.append(DrawnDropPath(float(child.p)))
                setattr(parent, name, found[-1])
    return _Draws(found)


def build(name: str, **options: Any) -> TorchvisionEncoder:
    """``torchvision/NAME`` with the options of :class:`TorchvisionConfig`. Raises ``UserError``: unknown names (with the
    nearest), weights that cannot be had, networks that show no feature map."""
    from torchvision import models

    known = name.removeprefix("torchvision/")
    every = models.list_models(module=models)
    if known not in every:
        raise UserError(f"torchvision has no classifier {known!r}: {nearest(known, every)}")
    config = validated(TorchvisionConfig, options, where=f"backbone {name}")
    if config.pretrained and config.weights:
        raise UserError(f"{name}: weights come from one place: pretrained=true or weights=FILE, not both")
    arguments = dict(config.arguments)
    if known.startswith("vit_") and config.image_size is not None:
        arguments["image_size"] = tuple_of(config.image_size, 2)[0]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = models.get_model(known, weights=None, **arguments)
    except (TypeError, ValueError) as error:
        raise UserError(f"torchvision cannot build {name} with {arguments}: {error}") from None
    shown = models.get_model_weights(known).DEFAULT  # type: ignore[attr-defined]
    state = None
    if config.weights:
        state = read_checkpoint(Path(config.weights))
    elif config.pretrained:
        try:
            state = dict(shown.get_state_dict(progress=False, check_hash=True))
        except Exception as error:  # urllib's own errors, among them those of a machine without a network
            raise UserError(f"no weights for {name}: {hub_reason(error)}; or give weights=FILE") from None
    _without_head(model, name)
    if state is not None:
        load_strict(
            model, state, ignore=[rf"^({'|'.join(HEADS)})\b", "^AuxLogits", r"^aux\d"], where=config.weights or name
        )
    if config.in_channels != 3:
        _other_channels(model, config.in_channels)
    try:
        encoder = TorchvisionEncoder(model, config)
    except (RuntimeError, TypeError, NotImplementedError, IndexError) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(f"{name} shows no feature map at {config.image_size or 224} pixels: {lines[0][:120]}") from None
    encoder.name, encoder.options = name, options
    if state is not None:
        transforms = shown.transforms()
        mean, std = tuple(transforms.mean), tuple(transforms.std)
        if config.in_channels != 3:
            mean, std = (sum(mean) / 3,) * config.in_channels, (sum(std) / 3,) * config.in_channels
        encoder.preprocessing = Preprocessing(mean, std, encoder.image_size, config.in_channels)
    return encoder


def _without_head(model: nn.Module, name: str) -> None:
    found = [h for h in HEADS if hasattr(model, h)]
    if not found:
        raise UserError(f"{name} has no head that is known here: use the model of the same name in timm")
    for head in found:
        setattr(model, head, nn.Identity())
    for extra in ("AuxLogits", "aux1", "aux2"):
        if hasattr(model, extra):
            setattr(model, extra, None)


def _other_channels(model: nn.Module, channels: int) -> None:
    """The first convolution for another number of channels: its filters averaged over colours and repeated."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d) and module.in_channels == 3:
            new = nn.Conv2d(
                channels,
                module.out_channels,
                module.kernel_size,  # type: ignore[arg-type]
                module.stride,  # type: ignore[arg-type]
                module.padding,  # type: ignore[arg-type]
                bias=module.bias is not None,
            )
            with torch.no_grad():
                new.weight.copy_(module.weight.mean(1, keepdim=True).expand_as(new.weight) * 3 / channels)
                if module.bias is not None and new.bias is not None:
                    new.bias.copy_(module.bias)
            parent, _, last = name.rpartition(".")
            owner = model.get_submodule(parent)
            setattr(owner, last, new)
            return
    raise UserError(f"no first convolution with 3 channels was found: in_channels={channels} does not fit")


class _evaluating:
    def __init__(self, model: nn.Module):
        self.model = model

    def __enter__(self) -> None:
        self.was = self.model.training
        self.model.eval()

    def __exit__(self, *_: Any) -> None:
        self.model.train(self.was)
