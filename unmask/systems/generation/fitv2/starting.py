"""Where a FiTv2 training starts: weights of another, which of them learn, and the first stage's part in it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor, nn

from unmask.draw import Draw
from unmask.errors import UserError
from unmask.systems.generation.first_stage import FirstStage, FirstStageConfig, open_first_stage

if TYPE_CHECKING:
    from unmask.systems.generation.fitv2.model import FiTv2


def only_partial(network: nn.Module) -> None:
    """Leave to training the patch embedding, all biases, the norms and the last layer (the authors' "partial")."""
    for name, parameter in network.named_parameters():
        norm = "norm" in name.rpartition(".")[0].rpartition(".")[2]
        parameter.requires_grad_(name.startswith(("x_embedder.", "final_layer.")) or name.endswith(".bias") or norm)


def take_weights(model: FiTv2, init: str) -> None:
    """Copy the network's weights of a run, an export or an official file. Raises ``UserError`` where they do not fit."""
    from unmask.official.hub import load_trainable
    from unmask.official.load import load_strict, read_checkpoint

    path = Path(init).expanduser()
    if path.is_file():
        from unmask.systems.generation.fitv2.official import PREFER, load_fit

        load_fit(model, read_checkpoint(path, prefer=PREFER))
        return
    source = load_trainable(path / "model" if (path / "model").is_dir() else init)
    if not hasattr(source, "network") or source.slug != model.slug:
        raise UserError(f"init={init} is a {source.slug}, and {model.slug} starts from its own kind")
    load_strict(model.network, source.network.state_dict(), where=f"init={init}")


def factor_of(config: FirstStageConfig) -> int:
    """Pixels along a side of a latent cell. Raises ``UserError`` where the first stage is not at hand yet."""
    if config.kind == "pixels":
        return 1
    if config.weights is None and config.built is None:
        raise UserError(
            f"first_stage.kind={config.kind}: images of mixed shapes are cut to its cells, so it is needed before training: "
            "give first_stage.weights=RUN or FOLDER"
        )
    return open_first_stage(config)[0].factor


def encoded_apart(stage: FirstStage, canvas: Tensor, size: Tensor, draw: Draw | None) -> Tensor:
    """Latents of each sample's own rectangle, ``[B, c, h, w]``, 0 outside: what lies beside it must not leak in.

    Pixels need no care; for others samples of one size are encoded together, which asks the device for the sizes.
    """
    if stage.factor == 1:
        return stage.encode(canvas, draw)
    rows, columns = stage.grid(tuple(canvas.shape[2:]))
    out = canvas.new_zeros(len(canvas), stage.channels, rows, columns)
    for height, width in sorted({(int(h), int(w)) for h, w in size.tolist()}):
        same = ((size[:, 0] == height) & (size[:, 1] == width)).nonzero().squeeze(1)
        h, w = stage.grid((height, width))
        out[same, :, :h, :w] = stage.encode(canvas[same, :, :height, :width]).to(out.dtype)
    return out
