"""Starting from another network of the same kind: ``init=RUN`` (same-task pre-training, x4 from x2, the stage before)."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from unmask.errors import UserError

if TYPE_CHECKING:
    from unmask.systems.prediction.hat.model import HAT


def start_from(model: HAT, place: str | Path) -> None:
    """Copy the weights at ``place`` (a run, a model's folder, an official file) into ``model``.

    Everything but the reconstruction must fit; of that, layers of the same name and shape are taken: another scale or
    task keeps the others as they were made. A discriminator is taken where both have one of the same shape. Raises ``UserError``.
    """
    state, other = source_state(place)
    wanted = model.network.state_dict()
    missing = [n for n in wanted if n not in state and not n.startswith("reconstruct.")]
    left = [n for n in state if n not in wanted and not n.startswith("reconstruct.")]
    shapes = [
        n for n in wanted if n in state and state[n].shape != wanted[n].shape and not n.startswith("reconstruct.")
    ]
    if missing or left or shapes:
        name = (missing or left or shapes)[0]
        what = "lacks" if missing else "has besides" if left else f"has another shape ({tuple(state[name].shape)}) for"
        raise UserError(f"hat: init={place} {what} {name}: start from a network of the same size and options")
    taken = {n: v for n, v in state.items() if n in wanted and v.shape == wanted[n].shape}
    model.network.load_state_dict(taken, strict=False)
    if model.discriminator is not None and other:
        own = model.discriminator.state_dict()
        if {n: v.shape for n, v in own.items()} == {n: v.shape for n, v in other.items()}:
            model.discriminator.load_state_dict(other)


def source_state(place: str | Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The network's and the discriminator's weights at a place, by our names."""
    if Path(place).is_file():
        from unmask.official.load import read_checkpoint
        from unmask.systems.prediction.hat.official import load_official

        return load_official(read_checkpoint(place, prefer=("params_ema", "params"))).network.state_dict(), {}
    from unmask.official.hub import load_trainable
    from unmask.systems.prediction.hat.model import HAT

    loaded = load_trainable(place, expected=HAT)
    assert isinstance(loaded, HAT)
    return loaded.network.state_dict(), {} if loaded.discriminator is None else loaded.discriminator.state_dict()
