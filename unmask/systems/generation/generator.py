"""``ImageGenerator``: what all generators of images share.

A system writes ``sample`` (latents or pixels of a few images) and ``loss``; from here come its first stage, classes by
name or number, sizes, steps and guidance checked in one line, ``generate``, and previews of a training.

    class DiT(ImageGenerator):
        class Config(GeneratorConfig): ...
        def sample(self, n, draw, asked) -> Tensor: ...          # [n, C, H, W] in [-1, 1]

An image depends on the seed and its own number alone: everything in ``sample`` is asked of ``draw`` with the image's number
as the sample's address, and no sampler mixes the images of a batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from pydantic import field_validator
from torch import Tensor

from unmask import config as configs
from unmask.config import Field, validated
from unmask.contracts import Batch, DataFacts, Picture, Progress, Sample, Trainable
from unmask.draw import Draw
from unmask.errors import UserError, nearest
from unmask.systems.generation.first_stage import FirstStage, FirstStageConfig, open_first_stage
from unmask.systems.generation.guidance import check_guidance
from unmask.systems.generation.pictures import samples_picture, to_uint8

Tell = Callable[[str], None]


class GeneratorConfig(configs.Config):
    """What every generator of images is told; what is open comes from the data."""

    image_size: tuple[int, int] | None = Field(None, description="pixels (height, width); from the data if open")
    channels: int | None = Field(None, ge=1, description="of the images; from the data if open")
    classes: int | tuple[str, ...] | None = Field(
        None, description="their names or number, 0 for none; from the data if open"
    )
    first_stage: FirstStageConfig = Field(FirstStageConfig(), description="pixels, our vq or kl, or diffusers")

    @field_validator("image_size", mode="before")
    @classmethod
    def _one_side_is_a_square(cls, value: Any) -> Any:
        return (value, value) if isinstance(value, int) else value


@dataclass(frozen=True)
class Asked:
    """One call of ``generate``, checked. ``classes``: int64 ``[n]`` (``empty`` for none), or None for a model without classes;
    ``size``: pixels (height, width); ``ask``: the system's further options."""

    classes: Tensor | None
    size: tuple[int, int]
    steps: int
    guidance: float
    ask: Any
    tell: Tell | None = None


class NoFurtherOptions(configs.Config):
    """For generators that take none."""


class ImageGenerator(Trainable):
    """Base of the generators. ``default_steps``, ``most_steps`` and ``default_guidance`` are the system's."""

    Config = GeneratorConfig
    Ask: ClassVar[type[configs.Config]] = NoFurtherOptions
    default_steps: ClassVar[int] = 50
    most_steps: int | None = None
    default_guidance: ClassVar[float] = 1.0
    preview_steps: ClassVar[int] = 20
    first_stage: FirstStage
    config: GeneratorConfig

    def __init__(self, config: GeneratorConfig, sources: Mapping[str, Path] | None = None):
        """sources: folders of earlier stages, of which "tokenizer" is the first stage's."""
        if config.image_size is None or config.classes is None:
            name = type(self).slug or type(self).__name__
            missing = "image_size" if config.image_size is None else "classes"
            raise UserError(f"{name}: {missing} is open: give {missing}=..., or data")
        stage, described = open_first_stage(config.first_stage, sources=sources, channels=config.channels or 3)
        super().__init__(config.model_copy(update={"first_stage": described, "channels": stage.image_channels}))
        self.first_stage = stage
        stage.grid(config.image_size)  # complains early

    # --- construction ---
    @classmethod
    def adapted(cls, config: Any, facts: DataFacts) -> Any:
        values: dict[str, Any] = {}
        if config.image_size is None and facts.image_size:
            values["image_size"] = tuple(facts.image_size)
        if config.channels is None and facts.channels:
            values["channels"] = facts.channels
        if config.classes is None:
            values["classes"] = tuple(facts.classes) if facts.classes else 0
        if facts.mean and facts.std and any(abs(v - 0.5) > 1e-6 for v in (*facts.mean, *facts.std)):
            raise UserError(f"{cls.slug} wants pixels in [-1, 1]: use data.normalise=half")
        return config.model_copy(update=values)

    @classmethod
    def build(cls, config: Any, sources: Mapping[str, Path] | None = None) -> ImageGenerator:
        return cls(config, sources)

    # --- classes ---
    @property
    def class_names(self) -> tuple[str, ...]:
        """The names of the classes; numbers where only their number is known; empty without classes."""
        known = self.config.classes
        return tuple(str(i) for i in range(known)) if isinstance(known, int) else tuple(known or ())

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @property
    def empty(self) -> int:
        """The id of the empty class: the row after the last."""
        return self.num_classes

    def class_id(self, name: int | str) -> int:
        """The id of a class by name or number; "none" is the empty class. Raises ``UserError`` with the nearest name."""
        names, slug = self.class_names, type(self).slug or type(self).__name__
        if not names:
            raise UserError(f"class {name} asked of a {slug} that has learned no classes: leave --class out")
        text = str(name).strip()
        if text in names:
            return names.index(text)
        lowered = [n.lower() for n in names]
        if lowered.count(text.lower()) == 1:
            return lowered.index(text.lower())
        if text.lower() == "none":
            return self.empty
        number = int(text) if text.isdecimal() else None
        if number is not None and number < len(names):
            return number
        if number is not None or text.lstrip("-").isdecimal():
            raise UserError(f"no class {text}: this {slug} has classes 0 ... {len(names) - 1}")
        raise UserError(f"no class {text!r} in this {slug}: {nearest(text, names)}")

    def class_ids(self, condition: Any, n: int, draw: Draw) -> Tensor | None:
        """int64 ``[n]``. condition: None (drawn at random, under the name ``class``), one class, or one for each image."""
        device = self.device
        if condition is None:
            return draw.integers("class", 0, self.num_classes, (n,), device=device) if self.num_classes else None
        if isinstance(condition, Tensor):
            condition = condition.tolist()
        if isinstance(condition, (int, str)):
            condition = [condition] * n
        ids = [self.empty if c is None or c == self.empty else self.class_id(c) for c in condition]
        if len(ids) != n:
            raise UserError(f"{len(ids)} classes for {n} images: give one, or one for each")
        return torch.tensor(ids, dtype=torch.int64, device=device)

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    # --- checks ---
    def check_size(self, size: Sequence[int] | None) -> tuple[int, int]:
        """Pixels (height, width). Here: only the size that the model was trained at; a system that makes others says so.

        Raises ``UserError``.
        """
        own = cast(tuple[int, int], tuple(self.config.image_size or ()))
        wanted = own if size is None else cast(tuple[int, int], tuple(int(s) for s in size))
        if wanted != own:
            raise UserError(
                f"size {'x'.join(map(str, wanted))} cannot be made: this {type(self).slug or type(self).__name__} makes "
                f"{own[0]}x{own[1]} (height x width) alone"
            )
        return own

    def check_steps(self, steps: int | None) -> int:
        """Raises ``UserError`` for fewer than one step, or more than the method has."""
        steps = min(self.default_steps, self.most_steps or self.default_steps) if steps is None else int(steps)
        if steps < 1 or (self.most_steps is not None and steps > self.most_steps):
            takes = "at least 1" if self.most_steps is None else f"1 ... {self.most_steps}"
            raise UserError(f"steps={steps} does not fit: it takes {takes}")
        return steps

    def asked(
        self,
        n: int,
        draw: Draw,
        *,
        condition: Any = None,
        size: Sequence[int] | None = None,
        steps: int | None = None,
        guidance: float | None = None,
        tell: Tell | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> Asked:
        """A call of ``generate``, checked; raises ``UserError`` for whatever does not fit."""
        if n < 1:
            raise UserError(f"n={n} must be at least 1")
        where = f"generate with {type(self).slug or type(self).__name__}"
        return Asked(
            classes=self.class_ids(condition, n, draw),
            size=self.check_size(size),
            steps=self.check_steps(steps),
            guidance=check_guidance(guidance, classes=self.num_classes, default=self.default_guidance),
            ask=validated(self.Ask, options, where=where),
            tell=tell,
        )

    # --- generation ---
    def sample(self, n: int, draw: Draw, asked: Asked) -> Tensor:
        """float ``[n, C, H, W]`` in [-1, 1]: what a system writes. Ends with ``self.first_stage.decode``."""
        raise NotImplementedError

    @torch.no_grad()
    def generate(
        self,
        n: int,
        draw: Draw,
        *,
        condition: Any = None,
        size: Sequence[int] | None = None,
        steps: int | None = None,
        guidance: float | None = None,
        tell: Tell | None = None,
        **options: Any,
    ) -> list[Sample]:
        """``n`` images, uint8 ``[H, W, 3]``. condition: a class by name or number, or one for each image."""
        asked = self.asked(
            n, draw, condition=condition, size=size, steps=steps, guidance=guidance, tell=tell, options=options
        )
        with evaluating(self):
            images = self.sample(n, draw, asked)
        return [Sample(pixels, self.made_by(asked, i)) for i, pixels in enumerate(to_uint8(images))]

    def made_by(self, asked: Asked, number: int) -> dict[str, Any]:
        """What made an image, as plain values."""
        label = None if asked.classes is None else int(asked.classes[number])
        named = label is not None and label < self.num_classes
        return {
            "system": type(self).slug,
            "class": label if named else None,
            "class_name": self.class_names[cast(int, label)] if named else None,
            "size": list(asked.size),
            "steps": asked.steps,
            "guidance": asked.guidance,
            "options": asked.ask.plain(),
        }

    # --- telling a person ---
    def preview_options(self) -> dict[str, Any]:
        """Further options of ``generate`` for previews: what a system needs to show something in few steps."""
        return {}

    @torch.no_grad()
    def preview(self, batch: Batch, draw: Draw, progress: Progress | None = None) -> list[Picture]:
        """Eight samples, the same noise and classes at every look, so that a training can be watched."""
        count = 8
        condition = [i % self.num_classes for i in range(count)] if self.num_classes else None
        steps = min(self.preview_steps, self.most_steps or self.preview_steps)
        made = self.generate(count, draw, condition=condition, steps=steps, **self.preview_options())
        names = [str(s.made_by["class_name"] or "") for s in made]
        caption = f"{steps} steps, the same noise at every look."
        if self.num_classes:
            caption += f" Row by row: {', '.join(names)}."
        return [samples_picture([s.value for s in made], caption=caption)]


@contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """While inside, the model is in evaluation mode."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def dropped_classes(classes: Tensor, draw: Draw, probability: float, empty: int, name: str = "class_drop") -> Tensor:
    """int64 ``[B]``: each class with this probability replaced by the empty one (for guidance). Nothing is drawn at 0."""
    if probability <= 0:
        return classes
    dropped = draw.uniform(name, (len(classes),), device=classes.device) < probability
    return torch.where(dropped, torch.full_like(classes, empty), classes)


def chunked(
    model: Any,
    n: int,
    draw_at: Callable[[int], Draw],
    *,
    chunk: int = 16,
    condition: Sequence[Any] | None = None,
    **asked: Any,
) -> Iterator[tuple[int, list[Sample]]]:
    """(number of the first, samples) of each chunk. draw_at: gives the draw whose first sample has this number."""
    for first in range(0, n, chunk):
        count = min(chunk, n - first)
        some = None if condition is None else list(condition[first : first + count])
        yield first, model.generate(count, draw_at(first), condition=some, **asked)
