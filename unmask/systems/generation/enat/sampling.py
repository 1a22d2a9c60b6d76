"""How ids are sampled: the options, and the few lines that join network, guidance and the room's decoding."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from unmask.config import Config, Field
from unmask.draw import Draw
from unmask.errors import UserError
from unmask.systems.generation.decoding import TokenDraw, decode
from unmask.systems.generation.enat.network import TokenNetwork
from unmask.systems.generation.enat.reuse import Anew, Guided, Reused, Together
from unmask.systems.generation.guidance import GuidanceSchedule


class SamplingSettings(Config):
    """Defaults: the paper's for 256 pixels. ``cfg_scale`` is the paper's w; what ``generate`` calls guidance is 1 + w."""

    steps: int = Field(8, ge=1, description="steps of the decoding")
    cfg_scale: float = Field(2.5, ge=-1, description="w of l_c + w (l_c - l_empty) when the schedule ends; 0: none")
    guidance_schedule: GuidanceSchedule = Field("linear", description="cfg_scale over the steps")
    schedule: Literal["cosine", "linear", "square", "log"] = Field("cosine", description="share that stays hidden")
    mask_temperature: float = Field(1.5, ge=0, description="Gumbel noise on the order in which guesses are kept")
    sampling_temperature: float = Field(6.0, ge=0, description="temperature of the guesses at the beginning")
    top_k: int | None = Field(None, ge=1, description="guess among so many likeliest ids only")
    top_p: float | None = Field(None, gt=0, le=1, description="guess among the likeliest ids that hold this share only")
    token_draw: TokenDraw = Field("uniform", description="one random number a token, or Gumbel noise on every id")
    reuse: bool | None = Field(None, description="reuse features of earlier steps; open: where the network learned it")


class Ask(Config):
    """Options of ``generate`` besides steps and guidance; open: the model's own."""

    guidance_schedule: GuidanceSchedule | None = Field(None, description="guidance over the steps")
    schedule: Literal["cosine", "linear", "square", "log"] | None = Field(None, description="share that stays hidden")
    mask_temperature: float | None = Field(None, ge=0, description="noise on the order in which guesses are kept")
    sampling_temperature: float | None = Field(None, ge=0, description="temperature of the guesses at the beginning")
    top_k: int | None = Field(None, ge=1, description="guess among so many likeliest ids only")
    top_p: float | None = Field(None, gt=0, le=1, description="guess among the likeliest ids that hold this share only")
    token_draw: TokenDraw | None = Field(None, description="uniform: one random number a token; gumbel: one an id")
    reuse: bool | None = Field(None, description="reuse features of earlier steps (false: encode all visible anew)")


@torch.no_grad()
def sample_ids(
    network: TokenNetwork,
    classes: Tensor,
    draw: Draw,
    settings: SamplingSettings,
    *,
    trace: list[Tensor] | None = None,
    tell: Callable[[str], None] | None = None,
) -> Tensor:
    """Ids ``[B, N]`` for classes ``[B]``. trace: gets the ids that each step begins with (K where hidden).

    Raises ``UserError`` where reuse is asked of a network that has nothing to reuse, or a class is none.
    """
    s = settings
    if classes.numel() and not 0 <= int(classes.min()) <= int(classes.max()) <= network.empty_class:
        wrong = int(classes.min()) if int(classes.min()) < 0 else int(classes.max())
        raise UserError(f"enat: class {wrong} does not exist: it takes 0 ... {network.classes - 1}")
    way = predictor(network, s.reuse)
    return decode(
        way(network, classes, cfg_scale=s.cfg_scale if network.classes else 0.0, schedule=s.guidance_schedule),
        len(classes),
        network.tokens,
        network.codebook_size,
        draw,
        steps=s.steps,
        schedule=s.schedule,
        mask_temperature=s.mask_temperature,
        sampling_temperature=s.sampling_temperature,
        top_k=s.top_k,
        top_p=s.top_p,
        token_draw=s.token_draw,
        device=classes.device,
        trace=trace,
        tell=tell,
    )


def predictor(network: TokenNetwork, reuse: bool | None) -> type[Guided]:
    """How a step comes to its features. Raises ``UserError`` for reuse with NAT."""
    if not network.disentangled:
        if reuse:
            raise UserError(
                "enat: this is a NAT network (network=nat), which has nothing to reuse: leave reuse=true out"
            )
        return Together
    return Anew if reuse is False else Reused
