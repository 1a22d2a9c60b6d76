"""Our VQ tokenizer: a convolutional autoencoder whose middle is one entry of a code book a cell (van den Oord et al. 2017).

stages:
  - {name: tokenizer, entry: "unmask.systems.generation.first_stage.vq:VQTokenizer", data: ..., model: {codes: 256}}
  - {name: transformer, from: {tokenizer: tokenizer}, model: {first_stage: {kind: vq}}}
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unmask.config import Field
from unmask.contracts import Batch, Losses, Progress
from unmask.draw import Draw
from unmask.nn.collective import summed_over_processes
from unmask.systems.generation.first_stage.autoencoder import Autoencoder, AutoencoderConfig


class VQTokenizer(Autoencoder):
    slug = "vq_tokenizer"

    class Config(AutoencoderConfig):
        codes: int = Field(256, ge=2, description="entries of the code book")
        code_dim: int = Field(16, ge=1, description="width of an entry")
        commitment: float = Field(0.25, ge=0, description="pull of the encoder towards its entry")
        book: Literal["average", "gradient"] = Field(
            "average", description="entries follow the moving average of what chose them, or the gradient"
        )
        decay: float = Field(0.95, ge=0, lt=1, description="of the moving average")
        restart: float = Field(
            0.03, ge=0, description="an entry chosen by less than this share of an even use starts anew at some cell"
        )

    config: Config
    entries: Tensor
    uses: Tensor
    sums: Tensor

    def __init__(self, config: Config):
        super().__init__(config, config.code_dim, config.code_dim)
        entries = torch.randn(config.codes, config.code_dim) * config.code_dim**-0.5
        self._waiting: list[tuple[Tensor, Tensor, Tensor]] = []
        if config.book == "gradient":
            self.entries = nn.Parameter(entries)
            return
        self.register_buffer("entries", entries)
        self.register_buffer("uses", torch.ones(config.codes))
        self.register_buffer("sums", entries.clone())

    # --- the code book ---
    def nearest(self, cells: Tensor) -> Tensor:
        """int64 ``[B, h, w]``: the entry nearest to each cell of ``[B, D, h, w]``."""
        entries = self.entries.float()
        flat = cells.permute(0, 2, 3, 1).float()
        return (entries.square().sum(dim=1) - 2 * flat @ entries.T).argmin(dim=-1)

    def cells(self, ids: Tensor) -> Tensor:
        """``[B, D, h, w]``: the entries of ids ``[B, h, w]``."""
        return F.embedding(ids, self.entries).permute(0, 3, 1, 2)

    def ids(self, images: Tensor) -> Tensor:
        """int64 ``[B, h, w]``."""
        return self.nearest(self.down(images))

    def rebuilt(self, images: Tensor) -> Tensor:
        return self.up(self.cells(self.ids(images))).clamp(-1, 1)

    # --- learning ---
    def loss(self, batch: Batch, draw: Draw, progress: Progress | None = None, phase: str = "main") -> Losses:
        images = batch["image"]
        cells = self.down(images)
        ids = self.nearest(cells.detach())
        chosen = self.cells(ids)
        commitment = F.mse_loss(cells.float(), chosen.detach().float())
        through = cells + (chosen - cells).detach()  # the gradient passes as if nothing had been rounded
        pixels = self.pixel_loss(self.up(through), images)
        total = pixels + self.config.commitment * commitment
        if self.config.book == "gradient":
            total = total + F.mse_loss(chosen.float(), cells.detach().float())
        elif self.training:
            self._remember(cells.detach(), ids, draw)
        used = F.one_hot(ids.flatten(), self.config.codes).any(dim=0).float().mean()
        return {"loss": total, "pixels": pixels, "commitment": commitment, "codes_used": used}

    def _remember(self, cells: Tensor, ids: Tensor, draw: Draw) -> None:
        """What chose each entry, of all processes, until ``after_step``; and a cell for each entry to start anew at."""
        flat, picked = cells.permute(0, 2, 3, 1).flatten(0, 2).float(), ids.flatten()
        uses = torch.zeros_like(self.uses).index_add_(0, picked, torch.ones_like(picked, dtype=torch.float32))
        sums = torch.zeros_like(self.sums).index_add_(0, picked, flat)
        place = draw.integers("restart", 0, len(flat), (self.config.codes,), device=flat.device, shared=True)
        here = flat[place] * (1.0 if _first_process() else 0.0)
        self._waiting.append(tuple(summed_over_processes(t) for t in (uses, sums, here)))  # type: ignore[arg-type]

    @torch.no_grad()
    def after_step(self, progress: Progress) -> None:
        if not self._waiting:
            return
        kept, uses, sums = self.config.decay, self.uses, self.sums
        uses.lerp_(torch.stack([w[0] for w in self._waiting]).sum(dim=0), 1 - kept)
        sums.lerp_(torch.stack([w[1] for w in self._waiting]).sum(dim=0), 1 - kept)
        if self.config.restart:
            even = uses.mean()
            idle = (uses < self.config.restart * even)[:, None]
            sums.copy_(torch.where(idle, self._waiting[-1][2] * even, sums))
            uses.copy_(torch.where(idle[:, 0], even, uses))
        self._waiting.clear()
        self.entries.copy_(sums / uses.clamp(min=1e-5)[:, None])


def _first_process() -> bool:
    group = torch.distributed
    return not (group.is_available() and group.is_initialized()) or group.get_rank() == 0
