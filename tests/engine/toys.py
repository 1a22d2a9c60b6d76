"""A small system and a small source of batches, for the engine's tests: nothing here knows images."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from unmask.config import Config
from unmask.contracts import DataFacts, Picture, Trainable
from unmask.draw import Draw
from unmask.engine.settings import TrainSettings
from unmask.engine.stages import Stage

COUNT, WIDTH = 64, 8


class Block(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.fc = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.nn.functional.gelu(self.fc(self.norm(x)))


class Toy(Trainable):
    """Rebuilds hidden values of a vector from the others."""

    class Config(Config):
        width: int = WIDTH
        hidden: int = 16
        depth: int = 2
        ratio: float = 0.5
        break_at: int = -1  # the step whose loss is made infinite
        unused: bool = False
        dropout: float = 0.0

    slug = "toy"
    loss_units = "squared units"

    def __init__(self, config: Any):
        super().__init__(config)
        self.embed = nn.Linear(config.width, config.hidden)
        self.blocks = nn.ModuleList(Block(config.hidden) for _ in range(config.depth))
        self.head = nn.Linear(config.hidden, config.width)
        self.dropout = nn.Dropout(config.dropout)
        self.register_buffer("momentum", torch.zeros(config.width))
        if config.unused:
            self.extra = nn.Parameter(torch.zeros(3))

    def predict(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return self.head(self.dropout(x))

    def mask(self, x: Tensor, draw: Draw) -> Tensor:
        return draw.uniform("mask", tuple(x.shape), device=x.device) < self.config.ratio

    def loss(self, batch, draw, progress=None, phase="main"):
        x = batch["image"]
        hidden = self.mask(x, draw)
        error = (self.predict(x.masked_fill(hidden, 0)) - x).square()
        loss = (error * hidden).sum() / (hidden.numel() * self.config.ratio)
        if progress is not None and progress.step == self.config.break_at:
            loss = loss / (loss.detach() * 0)
        return {"loss": loss, "size": x.abs().mean()}

    def after_step(self, progress):
        bias = self.head.bias.detach()
        self.momentum.lerp_(bias.full_tensor() if hasattr(bias, "full_tensor") else bias, 0.1)

    def references(self, batch, draw, progress=None):
        x = batch["image"]
        hidden, share = self.mask(x, draw), x.numel() * self.config.ratio
        return {"zero": (x.square() * hidden).sum() / share, "one": ((x - 1).square() * hidden).sum() / share}

    def preview(self, batch, draw, progress=None):
        cell = (batch["image"][:2, :4].abs() * 50).to(torch.uint8).numpy()[:, None, :, None].repeat(3, -1).repeat(4, 1)
        return [Picture("values", ["input"], [[c] for c in cell], "what went in")]

    def blocks_to_compile(self):
        return list(self.blocks)

    def save_pretrained(self, folder):
        from safetensors.torch import save_file

        Path(folder).mkdir(parents=True, exist_ok=True)
        save_file({n: t.contiguous() for n, t in self.state_dict().items()}, Path(folder) / "model.safetensors")


class Rivals(Toy):
    """Two phases: the second learns to say how wrong the first is."""

    slug = "rivals"
    phases = ("main", "critic")

    def __init__(self, config: Any):
        super().__init__(config)
        self.critic = nn.Linear(config.width, 1)

    def parameter_groups(self, phase="main", layer_decay=1.0):
        groups = super().parameter_groups(phase, layer_decay)
        for group in groups:
            keep = [i for i, n in enumerate(group.names) if n.startswith("critic") == (phase == "critic")]
            group.parameters = [group.parameters[i] for i in keep]
            group.names = [group.names[i] for i in keep]
        return groups

    def loss(self, batch, draw, progress=None, phase="main"):
        if phase == "main":
            return super().loss(batch, draw, progress, phase)
        return {"loss": (self.critic(batch["image"]).squeeze(-1) - batch["image"].sum(-1)).square().mean()}


class Batches:
    """Vectors in an order that depends on (seed, epoch) alone."""

    def __init__(
        self, batch_size: int, *, seed: int = 0, count: int = COUNT, poison: int | None = None, streaming: bool = False
    ):
        self.batch_size, self.seed, self.streaming = batch_size, seed, streaming
        generator = np.random.default_rng(1)
        base = generator.normal(size=(count, 2)) @ generator.normal(size=(2, WIDTH))
        self.values = torch.tensor(base, dtype=torch.float32)
        if poison is not None:
            self.values[poison, 0] = float("nan")
        self.facts = DataFacts(uri="toy:", count=count)
        self.steps_per_epoch = count // batch_size
        self.position = 0

    def iterate(self, start_step: int, *, rank=0, world=1, accumulate=1, state=None) -> Iterator[dict[str, Any]]:
        step = state["position"] if state else start_step
        share = self.batch_size // (world * accumulate)
        while True:
            epoch, inside = divmod(step, self.steps_per_epoch)
            order = np.random.default_rng((self.seed, epoch)).permutation(len(self.values))
            ids = order[inside * self.batch_size : (inside + 1) * self.batch_size]
            step += 1
            for micro in range(accumulate):
                first = (micro * world + rank) * share
                chosen = torch.from_numpy(ids[first : first + share])
                self.position = step
                yield {"image": self.values[chosen], "index": chosen}

    def state_dict(self):
        return {"position": self.position} if self.streaming else {}

    def transform(self, batch, draw, *, train=True):
        noise = draw.normal("noise", tuple(batch["image"].shape), device=batch["image"].device)
        return {**batch, "image": batch["image"] + (0.01 * noise if train else 0)}

    def samples(self, n):
        return {"image": self.values[:n]}


class Width:
    """A monitor that consumes randomness, as a careless probe may."""

    def __init__(self):
        self.seen = []

    def every(self, settings):
        return settings.probe_every or 0

    def __call__(self, model, progress):
        torch.randn(3)
        np.random.rand()
        assert not model.training
        self.seen.append(progress.step)
        return {"width": float(model.head.weight.detach().norm()), "at": progress.step}


class Spoil:
    """Puts a folder in the place of ``metrics.jsonl``, as a disk that takes nothing more."""

    def __init__(self, run: Path):
        self.path = run / "metrics.jsonl"

    def every(self, settings: TrainSettings) -> int:
        return 3

    def __call__(self, model, progress):
        if progress.step >= 3 and self.path.is_file():
            self.path.unlink()
            self.path.mkdir()
        return {}


class StopAfter:
    """A monitor that asks to stop, as Ctrl-C does, after a number of steps."""

    def __init__(self, step: int):
        self.step = step

    def every(self, settings):
        return 1

    def __call__(self, model, progress):
        if progress.step == self.step:
            signal.raise_signal(signal.SIGINT)
        return {}


def settings(**options: Any) -> TrainSettings:
    base = {
        "steps": 12,
        "batch_size": 8,
        "lr": 1e-2,
        "precision": "fp32",
        "device": "cpu",
        "log_every": 1,
        "save_every": 4,
    }
    return TrainSettings(**{**base, **options})


def stage(
    kind: type[Toy] = Toy,
    *,
    name: str = "toy",
    data: dict[str, Any] | None = None,
    model=None,
    monitors=(),
    **options: Any,
):
    chosen = settings(**options)
    return Stage(
        name, lambda: kind(kind.Config(**(model or {}))), Batches(chosen.batch_size, **(data or {})), chosen, monitors
    )


def lines(run: Path, kind: str) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in found if line["kind"] == kind]


def losses(run: Path) -> list[float]:
    return [line["loss"] for line in lines(run, "train")]


def weights(run: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return load_file(run / "model" / "model.safetensors")


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)
