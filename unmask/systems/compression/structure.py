"""What of a model can be cut: attention heads, MLP neurons and convolution channels, with every weight that goes with each.

Nothing is listed by hand: channels come from :mod:`.graph`, heads from :mod:`.heads`.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from unmask.errors import UserError
from unmask.models import UserModel
from unmask.systems.compression.graph import Graph, follow
from unmask.systems.compression.heads import heads_of
from unmask.systems.compression.units import Slice, Structure, Units, blocks_of, listed, owner_of

__all__ = ["Slice", "Structure", "Units", "find_structure"]


def find_structure(model: UserModel) -> Structure:
    """Everything that can be cut. Raises ``UserError`` naming a layer where nothing can be."""
    module = model.module
    training = module.training
    module.eval()
    example = model.inputs(model.example(2, 8))
    graph = follow(module, model.scores, example, model.name)
    found = Structure(layers=graph.layers)
    for units in heads_of(module, graph, found.refused):
        found.heads.append(units)
    blocks = blocks_of(module, found.heads)
    for units in _channels(module, graph, found.refused):
        units.block = next((b for b in blocks if all(p.startswith(b + ".") for p in _paths(units))), "")
        linear = units.kind == "neuron"
        if linear and not blocks:
            units.block = listed(module, _paths(units))
        (found.neurons if linear and units.block else found.channels).append(units)
    if found.heads and not all(_can_lose_heads(model, found.heads, found.refused)):
        found.heads = []
    if found.neurons and blocks:  # a transformer: what stands outside its blocks (a pooler, an embedding) stays whole
        for units in found.channels:
            found.refused.setdefault(units.name, "stands outside the repeated blocks")
        found.channels = []
    if not found.all():
        layer, why = next(iter(found.refused.items()), (model.name, "no layer was found that another one consumes"))
        raise UserError(f"nothing of {model.name} can be cut: {layer} {why}")
    module.train(training)
    return found


# --- channels and neurons -----------------------------------------------------------------------------------------


def _channels(module: nn.Module, graph: Graph, refused: dict[str, str]) -> Iterable[Units]:
    for space in graph.spaces:
        out = [r for r in space.roles if r[2] == "out"]
        into = [r for r in space.roles if r[2] == "in"]
        if not out:
            continue
        name = owner_of(out[0][0])
        if space.frozen or not into:
            refused.setdefault(name, space.frozen or "is consumed by no layer")
            continue
        base = torch.arange(space.size)
        slices = [
            Slice(p, axis, base[:, None] * copies + torch.arange(copies)[None] if role == "in" else base[:, None])
            for p, axis, role, copies in space.roles
        ]
        sinks = []
        for p, *_ in into:
            owner = module.get_submodule(owner_of(p))
            sinks.append((owner_of(p), 1 if isinstance(owner, (nn.Conv1d, nn.Conv2d, nn.Conv3d)) else -1))
        linear = all(not _is_conv(module.get_submodule(owner_of(r[0]))) for r in (*out, *into))
        yield Units(
            "neuron" if linear else "channel",
            name,
            space.size,
            slices,
            list(dict.fromkeys(owner_of(r[0]) for r in out)),
            list(dict.fromkeys(sinks)),
            base[:, None] * into[0][3] + torch.arange(into[0][3])[None],
            space=space,
        )


def _is_conv(module: nn.Module) -> bool:
    return isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d))


def _paths(units: Units) -> list[str]:
    return [*units.sources, *(s for s, _ in units.sinks)]


# --- heads that can go ---


def _can_lose_heads(model: UserModel, heads: list[Units], refused: dict[str, str]) -> Iterable[bool]:
    """Whether the modules' own code works with fewer heads: one head of every layer is cut from a copy, and the answers are
    compared with those of the masked model."""
    from unmask.systems.compression.surgery import cut, masked

    keep: dict[Units, Tensor] = {}
    for units in heads:
        kept = torch.ones(units.count, dtype=torch.bool)
        kept[0] = units.count == 1
        keep[units] = kept
    example = model.inputs(model.example(2, 8))
    why = ""
    try:
        with torch.no_grad():
            smaller = cut(model, keep)
            ours = smaller.scores(**example)
            with masked(model.module, keep):
                theirs = model.scores(**example)
        if not torch.allclose(ours, theirs, atol=1e-3 * max(float(theirs.abs().max()), 1e-3), rtol=1e-3):
            why = "answers otherwise without a head than with the head hidden"
    except (RuntimeError, ValueError, AssertionError, UserError, AttributeError, TypeError) as error:
        why = f"does not work with fewer heads ({str(error).strip().splitlines()[0][:80]})"
    if why:
        for units in heads:
            refused.setdefault(units.name, why)
    yield not why
