"""What the parts of the library promise one another.

The engine knows a system only as a :class:`Trainable`; systems know a backbone only as an :class:`Encoder`; the verbs
``predict``, ``generate``, ``compress`` and ``explain`` know the four protocols at the end. A batch is a mapping from
names to tensors or lists: images, token ids, alignments, graphs and clips all fit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from unmask import config as configs
from unmask.config import validated
from unmask.draw import Draw
from unmask.errors import UserError

Batch = Mapping[str, Any]
Losses = dict[str, Tensor]


@dataclass(frozen=True)
class Progress:
    """Where a training stands. ``step`` counts optimiser steps from 0; ``epoch`` is fractional."""

    step: int = 0
    steps: int = 1
    epoch: float = 0.0
    epochs: float = 1.0

    @property
    def fraction(self) -> float:
        """0 at the first step, below 1 at the last."""
        return self.step / max(self.steps, 1)


@dataclass(frozen=True)
class DataFacts:
    """What a data set is, as a system may need to know it at construction. Unknown things are None."""

    uri: str = ""
    count: int | None = None
    channels: int | None = None
    image_size: tuple[int, ...] | None = None  # what the batches will have, after transforms
    classes: tuple[str, ...] | None = None
    mean: tuple[float, ...] | None = None  # per channel, in units of the full range (8 bit: value / 255)
    std: tuple[float, ...] | None = None
    bit_depth: int | None = None
    sizes: tuple[tuple[int, int], tuple[int, int], tuple[int, int]] | None = None  # (h, w): smallest, median, largest
    columns: tuple[str, ...] = ()
    extra: Mapping[str, Any] = field(default_factory=dict)  # what only one kind of data has: vocabulary, things ...


@dataclass(frozen=True)
class Preprocessing:
    """How raw inputs become what a model was trained on: ``(pixels / full_range - mean) / std``, at ``image_size``."""

    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    image_size: tuple[int, ...] = (224, 224)
    channels: int = 3
    full_range: float = 255.0
    interpolation: str = "bicubic"
    crop: float = 1.0  # share of the shorter side that is looked at, from the centre

    def plain(self) -> dict[str, Any]:
        return asdict(self)

    def standardise(self, pixels: Tensor) -> Tensor:
        """``(pixels / full_range - mean) / std`` of ``[B, C, H, W]`` (or ``[C, H, W]``) that have ``image_size`` already."""
        mean, std = (torch.tensor(v, device=pixels.device)[:, None, None] for v in (self.mean, self.std))
        return (pixels.float() / self.full_range - mean) / std

    @staticmethod
    def of(values: Mapping[str, Any]) -> Preprocessing:
        lists: dict[str, Any] = {k: tuple(v) if isinstance(v, (list, tuple)) else v for k, v in values.items()}
        return Preprocessing(**{k: v for k, v in lists.items() if k in Preprocessing.__dataclass_fields__})


@dataclass
class Picture:
    """A table of images for a report: ``rows[r][c]`` is uint8 ``[H, W, 3]`` (a numpy array) under ``columns[c]``."""

    name: str
    columns: list[str]
    rows: list[list[Any]]
    caption: str = ""


@dataclass
class Group:
    """Parameters that share a learning rate and a decay. ``lr_scale`` and ``decay_scale`` multiply the schedule's."""

    names: list[str]
    parameters: list[nn.Parameter]
    lr_scale: float = 1.0
    decay_scale: float = 1.0


class Encoder(nn.Module):
    """A backbone that masking can work with. It says what it can do; systems say what they need.

    A batch of inputs ``x`` has shape ``[B, C, *size]``; a token grid is row-major over ``grid(size)``.
    ``tokens`` returns ``[B, prefix_tokens + L, embed_dim]``: class tokens first, then patch tokens.
    """

    name: str = ""  # what ``unmask.backbones.build`` takes to make this encoder again ...
    options: dict[str, Any]  # ... together with these
    can_drop: bool = False  # accepts keep=ids: hidden tokens never enter (ViT-like)
    can_replace: bool = False  # accepts hidden=bool and a mask token (ViT, Swin)
    embed_dim: int  # width of the tokens that ``tokens`` returns
    in_channels: int = 3
    image_size: tuple[int, ...] = (224, 224)
    patch_size: tuple[int, ...]  # pixels of one token where tokens enter
    strides: tuple[
        int, ...
    ]  # pixels of one cell of each map in ``maps`` (along the width, where patches are not square)
    map_dims: tuple[int, ...]  # channels of each map
    prefix_tokens: int = 0
    num_layers: int = 0  # blocks, for layer-wise decay: ids 0 (embeddings) ... num_layers, num_layers + 1 (head)
    preprocessing: Preprocessing | None = None

    def grid(self, size: Sequence[int] | None = None) -> tuple[int, ...]:
        """The token grid where tokens enter, for inputs of ``size`` (default: the encoder's own).

        Raises ``UserError`` when the patch does not divide the size.
        """
        size = tuple(size or self.image_size)
        for pixels, patch in zip(size, self.patch_size, strict=True):
            if pixels % patch:
                near = max(pixels // patch, 1) * patch
                raise UserError(
                    f"patch {patch} does not divide image size {pixels}: use --image-size {near} or another patch_size"
                )
        return tuple(p // q for p, q in zip(size, self.patch_size, strict=True))

    def tokens(
        self,
        x: Tensor,
        *,
        keep: Tensor | None = None,
        hidden: Tensor | None = None,
        mask_token: Tensor | None = None,
        draw: Draw | None = None,
    ) -> Tensor:
        """``[B, prefix + L, D]`` after the final norm.

        keep: int64 ``[B, V]``; only these tokens enter (needs ``can_drop``). hidden: bool ``[B, N]`` with mask_token
        ``[D_in]``: these tokens are replaced by it (needs ``can_replace``). draw: source of drop path; None = none.
        """
        raise NotImplementedError

    def maps(self, x: Tensor, *, draw: Draw | None = None) -> list[Tensor]:
        """Feature maps ``[B, map_dims[i], H / strides[i], W / strides[i]]``, finest first."""
        raise NotImplementedError

    def pooled(self, x: Tensor, *, draw: Draw | None = None) -> Tensor:
        """``[B, D]``: the mean of the patch tokens, unless the backbone has a better habit."""
        return self.tokens(x, draw=draw)[:, self.prefix_tokens :].mean(dim=1)

    def forward(self, x: Tensor) -> Tensor:
        """The pooled features; what an exported encoder computes."""
        return self.pooled(x)

    def layer_of(self, parameter: str) -> int:
        """Depth of a parameter for layer-wise decay: 0 for embeddings, i + 1 for block i."""
        return 0

    def no_weight_decay(self) -> set[str]:
        """Names of parameters (relative to the encoder) without decay besides those with fewer than two axes."""
        return set()

    def blocks_to_compile(self) -> list[nn.Module]:
        """The repeated blocks: what regional compilation compiles and FSDP wraps."""
        return []


class TrainingBatches(Protocol):
    """Training data as the engine reads it: raw batches in an order of their own, made ready on the device.

    ``unmask.data.batches.Batches`` is the one for images; ``unmask.data.mapped.Mapped`` is what other kinds build on.
    Optional besides: ``preprocessing`` (travels with an encoder), ``side_files`` (text by file name, saved with the model: a
    tokenizer), ``skipped`` (what could not be read), ``source``.
    """

    facts: DataFacts

    @property
    def steps_per_epoch(self) -> int | None: ...

    def iterate(
        self,
        start_step: int = 0,
        *,
        rank: int = 0,
        world: int = 1,
        accumulate: int = 1,
        state: Mapping[str, Any] | None = None,
    ) -> Iterator[Batch]: ...

    def transform(self, batch: Batch, draw: Draw | None = None, *, train: bool = True) -> Batch: ...

    def samples(self, n: int) -> Batch: ...

    def state_dict(self) -> dict[str, Any]: ...


class Trainable(nn.Module):
    """A system that learns. The engine knows nothing else about it.

    Usable in a bare PyTorch loop: ``model.loss({"image": images}, draw=Seeded(0, step))["loss"].backward()``.
    """

    Config: ClassVar[type[configs.Config]] = configs.Config
    slug: ClassVar[str] = ""
    phases: ClassVar[tuple[str, ...]] = ("main",)  # one optimiser each (a GAN has two)
    loss_units: str = ""  # what the loss is measured in, as a person reads it beside a number
    Data: ClassVar[type[configs.Config] | None] = None  # settings of its data; None: images (data.settings)
    measures: ClassVar[Mapping[str, str]] = {}  # what ``measure`` gives: key -> words; the first is the main one
    lower_is_better: ClassVar[frozenset[str]] = frozenset()  # among ``measures``
    encoder: Encoder | None  # what evaluation and export take away, if anything
    side_files: dict[
        str, str
    ]  # saved beside the weights, text by file name: a tokenizer. Comes from ``batches.side_files``

    def __init__(self, config: configs.Config):
        super().__init__()
        self.config = config
        self.encoder = None
        self.side_files = {}

    # --- construction ---
    @classmethod
    def adapted(cls, config: Any, facts: DataFacts) -> Any:
        """The config with what only the data tells (channels, size, classes) filled in where the user left it open."""
        backbone = getattr(config, "backbone", None)
        if hasattr(backbone, "fitted"):
            return config.model_copy(update={"backbone": backbone.fitted(facts)})
        return config

    @classmethod
    def open_batches(cls, config: Any, data: Any, batch_size: int, seed: int) -> TrainingBatches | None:
        """Training batches of a kind of its own, or None where image batches serve.

        config: as the user gave it; what the data tells comes after, through ``adapted(config, batches.facts)``. data: the
        validated ``Data``. Raises ``UserError`` for data that do not fit.
        """
        return None

    @classmethod
    def check_batch(cls, config: Any, size: int) -> None:
        """Raises ``UserError`` where micro-batches of ``size`` samples on a process cannot be trained on (pairs, say)."""

    @classmethod
    def build(cls, config: Any, sources: Mapping[str, Path] | None = None) -> Trainable:
        """Make the system. sources: folders of the earlier stages it reads, by the name its recipe gives them."""
        return cls(config)

    # --- learning ---
    def loss(self, batch: Batch, draw: Draw, progress: Progress | None = None, phase: str = "main") -> Losses:
        """At least ``{"loss": scalar}``; further scalars are logged beside it."""
        raise NotImplementedError

    def forward(self, batch: Batch, draw: Draw, progress: Progress | None = None, phase: str = "main") -> Losses:
        return self.loss(batch, draw, progress, phase)

    def parameter_groups(self, phase: str = "main", layer_decay: float = 1.0) -> list[Group]:
        """Groups for the optimiser. Default: no decay for parameters with fewer than two axes and those that
        ``no_weight_decay`` names; with ``layer_decay`` d, rate × d^(num_layers + 1 - depth) (BEiT, MAE)."""
        skipped = self.no_weight_decay()
        last = (self.encoder.num_layers if self.encoder is not None else 0) + 1
        groups: dict[tuple[float, float], Group] = {}
        for name, parameter in self.named_parameters():
            if not parameter.requires_grad:
                continue
            decay = 0.0 if parameter.ndim < 2 or name in skipped else 1.0
            scale = layer_decay ** (last - self.depth_of(name)) if layer_decay != 1.0 else 1.0
            group = groups.setdefault((scale, decay), Group([], [], scale, decay))
            group.names.append(name)
            group.parameters.append(parameter)
        return list(groups.values())

    def depth_of(self, parameter: str) -> int:
        """0 for embeddings, i + 1 for block i of the encoder, num_layers + 1 for everything behind the encoder."""
        if self.encoder is not None and parameter.startswith("encoder."):
            return self.encoder.layer_of(parameter.removeprefix("encoder."))
        return (self.encoder.num_layers if self.encoder is not None else 0) + 1

    def no_weight_decay(self) -> set[str]:
        """Full names of parameters with two axes or more that take no decay."""
        return {f"encoder.{n}" for n in self.encoder.no_weight_decay()} if self.encoder is not None else set()

    def after_step(self, progress: Progress) -> None:
        """Called after each optimiser step: momentum teachers, temperatures, mask updates."""

    def blocks_to_compile(self) -> list[nn.Module]:
        """Repeated blocks for regional compilation and FSDP wrapping."""
        return list(self.encoder.blocks_to_compile()) if self.encoder is not None else []

    def finish(self) -> Compressed | None:
        """A compressor that learns returns its result when training is over; everything else returns None."""
        return None

    # --- telling a person ---
    def preview(self, batch: Batch, draw: Draw, progress: Progress | None = None) -> list[Picture]:
        """Pictures for the report, of at most eight samples."""
        return []

    def references(self, batch: Batch, draw: Draw, progress: Progress | None = None) -> Losses:
        """The loss that trivial predictors reach on the same batch and the same hidden parts: name -> scalar.

        The key of each is words a person reads ("mean of the visible"). Empty where no such thing exists.
        """
        return {}

    def measure(
        self,
        data: Any,
        draw: Draw,
        *,
        limit: int | None = None,
        device: torch.device | None = None,
        tell: Callable[[str], None] | None = None,
        folder: Path | None = None,
    ) -> dict[str, Any]:
        """Its own metrics on test data: a number under each key of ``measures``.

        data: the validated ``Data`` (or image settings), its split the one to test on. Besides the numbers: ``samples`` (how
        many were looked at), ``baseline`` (name -> numbers under the same keys), ``pictures`` (``{"file", "caption"}`` of what was
        drawn into ``folder``). Raises ``UserError`` for data that do not fit.
        """
        raise NotImplementedError

    # --- keeping (the Hub's habits: config.json + model.safetensors) ---
    def save_pretrained(self, folder: str | Path) -> None:
        from unmask.official.hub import save_trainable

        save_trainable(self, Path(folder))

    @classmethod
    def from_pretrained(cls, folder_or_id: str | Path) -> Trainable:
        from unmask.official.hub import load_trainable

        return load_trainable(folder_or_id, expected=cls)

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> str:
        from unmask.official.hub import push_to_hub

        return push_to_hub(self, repo_id, **kwargs)


def configured(cls: type[Trainable], options: Mapping[str, Any] | None = None) -> configs.Config:
    """The validated config of a system, from plain options; errors name the system."""
    return validated(cls.Config, options, where=cls.slug or cls.__name__)


# --- the other verbs --------------------------------------------------------------------------------------------

Input = Any  # a path, a PIL image, a tensor, a text, an alignment: each predictor says which


class Result(Protocol):
    """What a prediction is (``Scores``, ``Segmentation``, ``Pairs`` ...)."""

    def save(self, path: str | Path) -> Path: ...


@runtime_checkable
class Predictor(Protocol):
    """Besides ``predict``: ``Ask``, a ``Config`` of the options that ``predict`` takes as keywords, and ``joint = True`` where all
    inputs belong to one question (two alignments) and the number of results is not theirs. ``suffixes``: endings of the files that
    folders are searched for, where they are not images; ``predict_batch``: how many inputs it wants at once (16). A ``predict``
    with a keyword ``tell`` is given one to call with words on its progress."""

    def predict(self, inputs: list[Input], **options: Any) -> list[Any]:
        """One result an input, in order."""
        ...


@dataclass
class Sample:
    """One generated thing and all that made it."""

    value: Any
    made_by: dict[str, Any] = field(default_factory=dict)


@runtime_checkable
class Generator(Protocol):
    """Besides ``generate``: ``Ask``, a ``Config`` of its further options. ``draw`` addresses samples by the number of the image, so
    that an image depends on the seed and its number alone, not on what is made beside it."""

    def generate(
        self,
        n: int,
        draw: Draw,
        *,
        condition: Any = None,
        size: Sequence[int] | None = None,
        steps: int | None = None,
        guidance: float | None = None,
        tell: Callable[[str], None] | None = None,
        **options: Any,
    ) -> list[Sample]: ...


@dataclass(frozen=True)
class Budget:
    """What a compressed model may cost. kind: macs | parameters | bytes | milliseconds.
    amount: a share of the original's where ``relative``, else an absolute number."""

    kind: str
    amount: float
    relative: bool = True


@dataclass
class Compressed:
    """A smaller model and what was gained. ``report`` holds, before and after: metric, parameters, macs, bytes
    (index bits included), latency. ``files``: what else is worth keeping (masks, a ranking), by name."""

    model: nn.Module
    report: dict[str, Any] = field(default_factory=dict)
    files: dict[str, bytes] = field(default_factory=dict)


@runtime_checkable
class Compressor(Protocol):
    """model: a ``unmask.models.UserModel``, which says how it is fed. One that learns is a ``Trainable`` with ``finish``."""

    def compress(
        self,
        model: Any,
        data: Iterable[Batch],
        budget: Budget,
        draw: Draw,
        *,
        tell: Callable[[str], None] | None = None,
    ) -> Compressed: ...


@dataclass
class Attribution:
    """How much each input position speaks for the target: ``heat [H, W]``, higher is more."""

    heat: Tensor
    target: int
    notes: dict[str, Any] = field(default_factory=dict)


@runtime_checkable
class Explainer(Protocol):
    """model: a ``unmask.models.UserModel``; image: standardised, ``[C, H, W]``; target: a class, None for the model's answer."""

    def explain(
        self,
        model: Any,
        image: Tensor,
        target: int | None,
        draw: Draw,
        *,
        tell: Callable[[str], None] | None = None,
    ) -> Attribution: ...


def need(encoder: Encoder, ability: str, *, system: str, instead: str = "") -> None:
    """Raise ``UserError`` in one line when an encoder lacks what a system needs ("can_drop", "can_replace")."""
    if getattr(encoder, ability):
        return
    verb = {"can_drop": "drops hidden tokens", "can_replace": "replaces hidden tokens"}.get(ability, ability)
    cannot = {"can_drop": "needs every token", "can_replace": "has no place for a mask token"}.get(ability, "cannot")
    hint = f": use {instead}" if instead else ""
    raise UserError(f"{system} {verb}, {encoder.name or type(encoder).__name__} {cannot}{hint}")


def default_device() -> torch.device:
    """The accelerator that torch finds, else the CPU."""
    return torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")  # type: ignore[return-value]
