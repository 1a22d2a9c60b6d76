"""Units: what goes together when something is cut, and where it stands in a model."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from unmask.systems.compression.axes import Space
from unmask.systems.compression.graph import Layer

Kind = Literal["head", "neuron", "channel"]


@dataclass(frozen=True, eq=False)
class Slice:
    """The places ``index [units, each]`` on one axis of a parameter (or buffer) that go with each unit."""

    parameter: str
    axis: int
    index: Tensor


@dataclass(eq=False)
class Units:
    """Units of one kind in one layer. sources: modules that produce them. sinks: modules whose input they are, with the
    axis of their channels. columns: places ``[units, each]`` in the first sink's input. core: of heads, the smallest
    module around their projections. size: of heads, the width of one. block: the repeated block that holds them."""

    kind: Kind
    name: str
    count: int
    slices: list[Slice]
    sources: list[str]
    sinks: list[tuple[str, int]]
    columns: Tensor
    block: str = ""
    core: str = ""
    size: int = 1
    members: int = 1  # query heads that share one unit (grouped queries)
    space: Space | None = None

    def parameters(self, shapes: dict[str, torch.Size]) -> int:
        """Numbers that go with one unit."""
        total = 0
        for one in self.slices:
            shape = shapes[one.parameter]
            total += one.index.shape[1] * (shape.numel() // max(shape[one.axis], 1))
        return total


@dataclass
class Structure:
    """heads and neurons: by layer, in the order of the network; channels: of convolutional networks (and of whatever else is
    no part of a transformer's block). refused: layer -> why it cannot be cut."""

    heads: list[Units] = field(default_factory=list)
    neurons: list[Units] = field(default_factory=list)
    channels: list[Units] = field(default_factory=list)
    refused: dict[str, str] = field(default_factory=dict)
    layers: list[Layer] = field(default_factory=list)

    @property
    def blocks(self) -> list[str]:
        """The repeated blocks that hold heads or neurons, in order."""
        return list(dict.fromkeys(u.block for u in (self.heads or self.neurons) if u.block))

    @property
    def transformer(self) -> bool:
        """Whether its heads and neurons stand in repeated blocks."""
        return bool(self.blocks) and bool(self.neurons)

    def all(self) -> list[Units]:
        return [*self.heads, *self.neurons, *self.channels]


def owner_of(parameter: str) -> str:
    return parameter.rpartition(".")[0]


def common(paths: list[str], module: nn.Module) -> str:
    """The smallest module around several."""
    parts = [p.split(".") for p in paths]
    shared: list[str] = []
    for level in zip(*parts, strict=False):
        if len(set(level)) != 1:
            break
        shared.append(level[0])
    here = ".".join(shared)
    owner = module.get_submodule(here)
    return (
        here.rpartition(".")[0] if (len(set(paths)) == 1 and isinstance(owner, nn.Linear)) or is_leaf(owner) else here
    )


def is_leaf(module: nn.Module) -> bool:
    return not any(True for _ in module.children())


def listed(module: nn.Module, paths: list[str]) -> str:
    """The innermost member of a list of modules that holds all of these paths."""
    shared = common(paths, module) if len(paths) > 1 else paths[0]
    while shared:
        parent, _, _ = shared.rpartition(".")
        if isinstance(module.get_submodule(parent), (nn.ModuleList, nn.Sequential)) and all(
            p == shared or p.startswith(shared + ".") for p in paths
        ):
            return shared
        shared = parent
    return ""


def blocks_of(module: nn.Module, heads: list[Units]) -> list[str]:
    return list(dict.fromkeys(u.block for u in heads if u.block))
