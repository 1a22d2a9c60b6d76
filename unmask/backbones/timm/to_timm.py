"""A network of timm back in timm: the architecture and the arguments it was made with, and its weights as they are."""

from __future__ import annotations

from typing import cast

from unmask.backbones.timm.model import TimmEncoder
from unmask.contracts import Encoder
from unmask.official.export import TimmTwin


def timm_twin(encoder: Encoder) -> TimmTwin:
    own = cast(TimmEncoder, encoder)
    architecture = own.name.removeprefix("timm/").partition(".")[0]
    return TimmTwin(architecture, dict(own.arguments), dict(own.model.state_dict()))
