"""Contacts from attention: the head, its fit to known structures, and how well a map hits them. Rao et al. 2021."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from unmask.errors import MissingExtra, UserError

RANGES: dict[str, tuple[int, int | None]] = {"local": (3, 6), "short": (6, 12), "medium": (12, 24), "long": (24, None)}


def average_product_corrected(maps: Tensor) -> Tensor:
    """``[..., L, L]`` minus the product of its row and column sums over its total (APC, Dunn et al. 2008)."""
    rows, columns = maps.sum(dim=-1, keepdim=True), maps.sum(dim=-2, keepdim=True)
    return maps - rows * columns / maps.sum(dim=(-1, -2), keepdim=True)


def contact_features(row_maps: Tensor) -> Tensor:
    """``[B, layer, H, C, C]`` -> ``[B, L, L, layer x H]``: without ``<cls>``, symmetric, APC."""
    maps = row_maps[..., 1:, 1:].flatten(1, 2)
    return average_product_corrected(maps + maps.transpose(-1, -2)).permute(0, 2, 3, 1)


class ContactHead(nn.Module):
    """A logistic regression on the row maps of all layers and heads (layer-major). ``fitted`` says whether it has been fitted to
    structures, or loaded."""

    def __init__(self, features: int):
        super().__init__()
        self.regression = nn.Linear(features, 1)
        self.register_buffer("fitted", torch.zeros((), dtype=torch.bool))

    def forward(self, row_maps: Tensor) -> Tensor:
        return self.regression(contact_features(row_maps)).squeeze(-1).sigmoid()

    @torch.no_grad()
    def fit(
        self,
        row_maps: Sequence[Tensor],
        targets: Sequence[Tensor],
        *,
        strength: float = 0.15,
        separation: int = 6,
        steps: int = 500,
    ) -> None:
        """Logistic regression with an L1 penalty of ``strength`` (scikit-learn's C = 1 / strength) by proximal gradients.

        row_maps: one ``[layer, H, C, C]`` a protein; targets: ``[L, L]``, 1 contact, 0 none, below 0 unknown; pairs nearer
        than ``separation`` are left out.
        """
        xs, ys = [], []
        for maps, target in zip(row_maps, targets, strict=True):
            i, j = torch.triu_indices(*target.shape, offset=separation)
            known = target[i, j] >= 0
            xs.append(contact_features(maps[None])[0][i, j][known].double())
            ys.append(target[i, j][known].double())
        x, y = torch.cat(xs), torch.cat(ys)
        scale = x.std(dim=0).clamp_min(1e-12)  # the penalty is of the unscaled weights
        z = torch.cat((x / scale, x.new_ones(len(x), 1)), dim=1)
        rate = 4.0 / float(torch.linalg.matrix_norm(z, 2) ** 2)
        weight = z.new_zeros(z.shape[1])
        penalty = torch.cat((strength / scale, scale.new_zeros(1))) * rate
        ahead, momentum = weight, 1.0
        for _ in range(steps):  # FISTA
            moved = ahead - rate * (z.T @ ((z @ ahead).sigmoid() - y))
            new = moved.sign() * (moved.abs() - penalty).clamp_min(0)
            following = (1 + (1 + 4 * momentum**2) ** 0.5) / 2
            ahead = new + (momentum - 1) / following * (new - weight)
            weight, momentum = new, following
        self.regression.weight.copy_((weight[:-1] / scale)[None])
        self.regression.bias.copy_(weight[-1:])
        self.fitted.fill_(True)  # type: ignore[operator]


def contact_precision(
    predicted: Tensor,
    target: Tensor,
    *,
    least: int = 6,
    below: int | None = None,
    count_outside: bool = False,
    length: int | None = None,
) -> dict[str, float]:
    """Precision of the likeliest pairs of columns: ``P@L``, ``P@L2``, ``P@L5`` and ``AUC``, the mean at a tenth of L, two ... L.

    predicted, target: ``[L, L]``; target 1 contact, 0 none, below 0 unknown. Pairs ``least <= j - i < below`` count once. L is
    ``length``, or the number of known entries in the target's first row. Where there are fewer candidates than L, the rest are
    misses; with ``count_outside`` (the authors' code) pairs farther apart fill the list, with whatever their target says.
    """
    size = len(target)
    i, j = torch.triu_indices(size, size, offset=least)
    inside = target[i, j] >= 0
    if below is not None:
        inside &= j - i < below
    length = int((target[0] >= 0).sum()) if length is None else length
    wanted = max(length, size, 1)
    scores = torch.where(inside, predicted[i, j].float(), torch.tensor(-torch.inf))
    top = scores.sort(descending=True, stable=True).indices[:wanted]
    label = target[i, j].double() if count_outside else ((target[i, j] == 1) & inside).double()
    hits = F.pad(label[top], (0, wanted - len(top)))
    running = hits.cumsum(0) / torch.arange(1, wanted + 1, dtype=torch.float64)
    at = [float(running[max(tenth * length // 10, 1) - 1]) for tenth in range(1, 11)]
    return {"AUC": sum(at) / 10, "P@L": at[9], "P@L2": at[4], "P@L5": at[1]}


def precision_by_range(
    predicted: Tensor,
    target: Tensor,
    *,
    count_outside: bool = False,
    ranges: Mapping[str, tuple[int, int | None]] = RANGES,
) -> dict[str, float]:
    """``contact_precision`` of every range, as ``long_P@L`` and its kin."""
    found: dict[str, float] = {}
    for name, (least, below) in ranges.items():
        numbers = contact_precision(predicted, target, least=least, below=below, count_outside=count_outside)
        found |= {f"{name}_{key}": value for key, value in numbers.items()}
    return found


def true_contacts(structure: str | Path, length: int, *, chain: str = "", distance: float = 8.0) -> Tensor:
    """``[L, L]`` of a PDB or mmCIF file: 1 where the C-beta atoms (C-alpha in glycine) are nearer than ``distance`` ångström,
    0 else, -1 where a residue is not resolved. Residue i of the chain is column i. Raises ``UserError``."""
    try:
        from biotite.structure import get_chains
        from biotite.structure.io import load_structure
    except ImportError:
        raise MissingExtra("reading structures", "biotite", "proteins") from None
    if not Path(structure).is_file():
        raise UserError(f"no structure {structure}: give a .pdb or .cif file")
    try:
        atoms = load_structure(str(structure), model=1)
    except Exception as error:  # biotite raises its own and ValueError for what is one fact to a user
        raise UserError(f"{structure} cannot be read as a structure: {error}") from None
    chain = chain or str(get_chains(atoms)[0])
    atoms = atoms[(atoms.chain_id == chain) & (~atoms.hetero)]
    atoms = atoms[(atoms.atom_name == "CB") | ((atoms.res_name == "GLY") & (atoms.atom_name == "CA"))]
    places = [int(r) - 1 for r in atoms.res_id]
    if not any(0 <= p < length for p in places):
        raise UserError(
            f"{structure}: chain {chain} has no residue 1 ... {length}: number it by the alignment's columns"
        )
    where = torch.full((length, 3), torch.nan)
    for place, coordinate in zip(places, atoms.coord, strict=True):
        if 0 <= place < length:
            where[place] = torch.from_numpy(coordinate)
    apart = (where[:, None] - where[None]).norm(dim=-1)
    return torch.where(apart.isnan(), -1, (apart < distance).long())
