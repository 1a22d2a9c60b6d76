"""From noise to an image of any size: the guided field over tokens, and the samplers that follow it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from unmask.draw import Draw
from unmask.errors import UserError
from unmask.systems.generation import samplers
from unmask.systems.generation.fitv2.network import RotarySettings
from unmask.systems.generation.fitv2.tokens import full_grid, image_of
from unmask.systems.generation.generator import Asked
from unmask.systems.generation.guidance import combined, doubled, power_cosine, with_empty

if TYPE_CHECKING:
    from unmask.systems.generation.fitv2.model import FiTv2

FLOW, DIFFUSION = ("heun", "euler", "dopri5", "sde"), ("ddpm", "ddim")


def sampled(model: FiTv2, n: int, draw: Draw, asked: Asked) -> Tensor:
    """float ``[n, C, H, W]`` in [-1, 1]. Raises ``UserError`` for a sampler of the other objective."""
    sampler = checked_sampler(asked.ask.sampler, model.config.objective)
    grid = (asked.size[0] // model.cell, asked.size[1] // model.cell)
    values = model.first_stage.channels * model.config.patch_size**2
    start = samplers.start_noise(draw, (n, grid[0] * grid[1], values), device=model.device)
    field = guided_field(model, asked.classes, grid, asked.guidance, asked.ask)
    x = follow(model, field, start, draw, sampler, asked)
    return model.first_stage.decode(image_of(x, grid, model.config.patch_size))


def follow(model: FiTv2, field: samplers.Field, start: Tensor, draw: Draw, sampler: str, asked: Asked) -> Tensor:
    ask, tell = asked.ask, asked.tell
    if sampler in DIFFUSION:
        process = model.diffusion.respaced(asked.steps)
        clip = model.first_stage.kind == "pixels" if ask.clip is None else ask.clip
        if sampler == "ddim":
            return samplers.ddim(field, process, start, draw, eta=ask.eta, axis=2, clip=clip, tell=tell)
        return samplers.ddpm(field, process, start, draw, axis=2, clip=clip, tell=tell)
    if sampler == "sde":
        return samplers.sde(field, start, draw, steps=asked.steps, diffusivity=ask.diffusivity, tell=tell)
    return samplers.ode(field, start, solver=sampler, steps=asked.steps, atol=ask.atol, rtol=ask.rtol, tell=tell)


def checked_sampler(name: str | None, objective: str) -> str:
    """The sampler's name. Raises ``UserError`` for one of the other objective."""
    known = FLOW if objective == "flow" else DIFFUSION
    if name is None:
        return known[0]
    if name not in known:
        raise UserError(f"sampler={name} does not follow a {objective}: it takes {', '.join(known)}")
    return name


def rotary_of(model: FiTv2, ask: Any) -> RotarySettings | None:
    """The positions to use where others were asked for than those of training."""
    changed = {"method": ask.rotary, "decouple": ask.decouple}
    changed = {k: v for k, v in changed.items() if v is not None}
    if not changed:
        return None
    if model.network.position_table is not None:
        raise UserError("fitv2: this model has learned its positions (position=learned): leave rotary and decouple out")
    return model.config.rotary.model_copy(update={**changed, "online": True})


def guided_field(
    model: FiTv2, classes: Tensor | None, grid: tuple[int, int], guidance: float, ask: Any
) -> Callable[[Tensor, Tensor], Tensor]:
    """The network on images that all have ``grid`` (rows, columns), guidance in the same forward."""
    rotary, some = rotary_of(model, ask), model.config.guidance_channels
    patch, flowing = model.config.patch_size, model.config.objective == "flow"

    def network(x: Tensor, t: Tensor, ids: Tensor | None) -> Tensor:
        places, size = full_grid(len(x), grid, x.device)
        return model.network(x, t, ids, places, None, size, rotary).float()

    if classes is None or guidance == 1:
        return lambda x, t: network(x, t, classes)
    both = with_empty(classes, model.empty)

    def guided(x: Tensor, t: Tensor) -> Tensor:
        out = network(doubled(x), doubled(t), both)
        channels = x.shape[2] if some == "all" else min(int(some) * patch**2, x.shape[2])
        weight: Any = guidance
        if ask.scale_pow is not None:
            time = t if flowing else 1 - t.float() / len(model.diffusion)
            weight = power_cosine(guidance, time, ask.scale_pow)
        return combined(out, weight if isinstance(weight, torch.Tensor) else float(weight), channels=channels, axis=2)

    return guided
