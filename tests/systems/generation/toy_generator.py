"""A generator small enough to be trained in a second: a flow (or a guess of token ids) by two convolutions."""

from __future__ import annotations

from typing import Literal

import torch
from torch import nn

from unmask.catalog import Card
from unmask.config import Config as BaseConfig
from unmask.systems.generation import flow, samplers
from unmask.systems.generation.decoding import decode
from unmask.systems.generation.generator import GeneratorConfig, ImageGenerator, dropped_classes
from unmask.systems.generation.guidance import combined, doubled, with_empty

CARD = Card(
    slug="toy_generator",
    title="A toy",
    folder="",
    verb="generate",
    room="generation",
    entry="toy_generator:ToyGenerator",
)


class ToyGenerator(ImageGenerator):
    slug = "toy_generator"
    default_steps = 4
    default_guidance = 1.5
    preview_steps = 2

    class Config(GeneratorConfig):
        width: int = 8

    class Ask(BaseConfig):
        solver: Literal["euler", "heun", "dopri5"] = "euler"

    def __init__(self, config, sources=None):
        super().__init__(config, sources)
        channels = self.first_stage.codes or self.first_stage.channels
        self.classes = nn.Embedding(self.num_classes + 1, config.width)
        self.inner = nn.Conv2d(self.first_stage.channels, config.width, 3, padding=1)
        self.outer = nn.Conv2d(config.width, channels, 3, padding=1)
        self.tokens = nn.Embedding(channels + 1, self.first_stage.channels) if self.first_stage.discrete else None

    def network(self, x, classes):
        if self.tokens is not None:
            x = self.tokens(x).permute(0, 3, 1, 2)
        return self.outer(torch.tanh(self.inner(x) + self.classes(classes)[:, :, None, None]))

    def loss(self, batch, draw, progress=None, phase="main"):
        data = self.first_stage.encode(batch["image"])
        classes = batch.get("label", torch.zeros(len(data), dtype=torch.int64))
        classes = dropped_classes(classes, draw, 0.1, self.empty)
        if self.tokens is not None:
            hidden = draw.uniform("hidden", data.shape) < 0.5
            ids = data.masked_fill(hidden, self.first_stage.codes)
            return {"loss": nn.functional.cross_entropy(self.network(ids, classes), data)}
        noise = draw.normal("noise", data.shape)
        time = draw.uniform("time", (len(data),))
        v = self.network(flow.interpolate(data, noise, time), classes)
        return {"loss": flow.flow_loss(v, data, noise).mean()}

    def sample(self, n, draw, asked):
        grid = self.first_stage.grid(asked.size)
        classes = asked.classes
        if classes is None:
            classes = torch.full((n,), self.empty)
        if self.tokens is not None:
            return self.first_stage.decode(self.sampled_ids(n, grid, classes, draw, asked))

        def field(x, time):
            both = self.network(doubled(x), with_empty(classes, self.empty))
            return combined(both, asked.guidance)

        start = samplers.start_noise(draw, (n, self.first_stage.channels, *grid))
        return self.first_stage.decode(
            samplers.ode(field, start, solver=asked.ask.solver, steps=asked.steps, tell=asked.tell)
        )

    def sampled_ids(self, n, grid, classes, draw, asked):
        def logits(ids, hidden, step):
            found = self.network(ids.reshape(n, *grid), classes).flatten(2).transpose(1, 2)
            return found.gather(1, hidden[..., None].expand(-1, -1, found.shape[2]))

        codes = self.first_stage.codes
        return decode(logits, n, grid[0] * grid[1], codes, draw, steps=asked.steps, tell=asked.tell).reshape(n, *grid)


def toy(**options) -> ToyGenerator:
    """Of two classes, 8 x 12 pixels, at random initialisation."""
    torch.manual_seed(0)
    return ToyGenerator(ToyGenerator.Config(**{"image_size": (8, 12), "classes": ("blue", "red"), **options})).eval()
