"""How well hidden letters of held-out rows are found, beside column profiles; and whether row maps know the couplings."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from scipy.stats import spearmanr
from torch import Tensor

from unmask.draw import Draw
from unmask.errors import UserError
from unmask.systems.proteins import couplings as dca
from unmask.systems.proteins.alphabet import CLS, MASK, PAD, VOCABULARY, padded, tokens_of_letters
from unmask.systems.proteins.batches import AlignmentSettings, families
from unmask.systems.proteins.drawing import save_maps
from unmask.systems.proteins.msa_transformer.contacts import average_product_corrected

if TYPE_CHECKING:
    from unmask.systems.proteins.msa_transformer.model import MSATransformer

TABLES, SEPARATION = 30, 6
WIDEST = 600  # columns: the couplings of wider families take minutes


@torch.no_grad()
def measure(
    model: MSATransformer,
    data: AlignmentSettings,
    draw: Draw,
    *,
    limit: int | None = None,
    device: torch.device | None = None,
    tell: Callable[[str], None] | None = None,
    folder: Path | None = None,
) -> dict[str, Any]:
    """``limit`` tables (30) of at most 16 random rows of the split; 15 % of their letters as ``<mask>``, the same for all."""
    found = families(data)
    device = device or next(model.parameters()).device
    was = model.training
    model.to(device).eval()
    try:
        tables, training = _tables(found, data, draw, limit or TABLES)
        return _numbers(model, found, tables, training, draw, device, tell, folder)
    finally:
        model.train(was)


def _tables(
    found: list[Any], data: AlignmentSettings, draw: Draw, count: int
) -> tuple[list[tuple[int, Tensor]], list[Tensor]]:
    usable = [(i, f, f.part(data.split)) for i, f in enumerate(found) if len(f.part(data.split))]
    if not usable:
        raise UserError(f"no rows of {data.uri} are held out (split {data.split}): use data.hold_out=species or rows")
    noise = draw.uniform("measure.rows", (count, max(len(part) for _, _, part in usable)))
    tables = []
    for number in range(count):
        index, family, part = usable[number % len(usable)]
        rows = part[np.argsort(noise[number, : len(part)].numpy(), kind="stable")[: min(16, data.rows)]]
        tables.append((index, tokens_of_letters(family.whole.letters[rows])))
    return tables, [tokens_of_letters(f.whole.letters[f.train]) for f in found]


def _numbers(
    model: MSATransformer,
    found: list[Any],
    tables: list[tuple[int, Tensor]],
    training: list[Tensor],
    draw: Draw,
    device: torch.device,
    tell: Callable[[str], None] | None,
    folder: Path | None,
) -> dict[str, Any]:
    from unmask.systems.proteins.msa_transformer.model import attention_couplings, column_profile, letter_frequencies

    batch = padded([table for _, table in tables])
    select = draw.uniform("measure.select", batch.shape)
    prior = [letter_frequencies(t) for t in training]
    profiles = [_training_profile(t) for t in training]
    sums = {name: torch.zeros(3, dtype=torch.float64) for name in ("model", "visible", "training")}
    maps = torch.zeros(())
    seen_maps = 0
    narrow = len(found) == 1 and found[0].whole.columns <= WIDEST
    for number, (family, table) in enumerate(tables):
        tokens = table[None]
        hidden = (
            (select[number : number + 1, : table.shape[0], : table.shape[1]] < 0.15) & (tokens != CLS) & (tokens != PAD)
        )
        masked = torch.where(hidden, MASK, tokens)
        target = tokens[hidden]
        seen = model.network(masked.to(device), need_maps=narrow)
        logits = model.network.letters(seen.last[hidden.to(device)]).double().log_softmax(dim=-1).cpu()
        columns = hidden.nonzero()[:, 2]
        visible = column_profile(masked, hidden, prior[family])[hidden].log()
        known = profiles[family][columns].log()
        for name, logs in (("model", logits), ("visible", visible), ("training", known)):
            right = (logs.argmax(dim=-1) == target).sum()
            sums[name] += torch.tensor([-logs.gather(1, target[:, None]).sum(), right, len(target)])
        if narrow:
            maps = maps + attention_couplings(seen.row_maps)[0].double().cpu()
            seen_maps += 1
        if tell is not None and (number % 10 == 9 or number + 1 == len(tables)):
            tell(f"{number + 1} of {len(tables)} tables")

    def numbers(name: str) -> dict[str, float]:
        loss, right, count = sums[name].tolist()
        return {"loss": loss / max(count, 1), "accuracy": 100 * right / max(count, 1)}

    out: dict[str, Any] = numbers("model")
    out["samples"] = len(tables)
    out["hidden"] = int(sums["model"][2])
    out["baseline"] = {
        "column profile of the visible rows": numbers("visible"),
        "column profile of the training rows": numbers("training"),
    }
    if narrow:
        strength = family_couplings(found[0].whole.letters)
        out["coupling_rho"] = rank_agreement(maps / seen_maps, strength)
        if folder is not None:
            out["pictures"] = [save_maps(maps / seen_maps, strength, folder / "couplings.png")]
    else:
        out["coupling_rho"] = 0.0
    return out


def _training_profile(tokens: Tensor) -> Tensor:
    """``[C, 33]``: the letters of all training rows by column, 0.1 of each added."""
    from unmask.systems.proteins.alphabet import FIRST_AMINO, GAP

    counts = torch.stack([torch.bincount(column, minlength=len(VOCABULARY)) for column in tokens.T]).double()
    letters = torch.zeros(len(VOCABULARY), dtype=torch.float64)
    letters[FIRST_AMINO : GAP + 1] = 1
    counts = (counts + 0.1) * letters
    return counts / counts.sum(dim=1, keepdim=True)


def family_couplings(letters: np.ndarray) -> Tensor:
    """``[L, L]``: APC-corrected Frobenius norms of the mean-field DCA couplings of a family."""
    states = dca.states_of(letters)
    single, double = dca.frequencies(states, dca.STATES, weights=dca.sequence_weights(states))
    return average_product_corrected(dca.coupling_strength(dca.couplings(single, double)))


def rank_agreement(maps: Tensor, strength: Tensor) -> float:
    """Spearman's correlation over column pairs at least ``SEPARATION`` apart."""
    i, j = torch.triu_indices(*strength.shape, offset=SEPARATION)
    if len(i) < 3:
        return 0.0
    return float(spearmanr(maps[i, j].numpy(), strength[i, j].numpy()).statistic)
