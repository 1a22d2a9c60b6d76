"""Correct pairs on held-out species, beside chance and what training pairs tell without a model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from unmask.data.alignments import Alignment
from unmask.draw import Draw, Scoped
from unmask.errors import UserError
from unmask.systems.proteins.batches import AlignmentSettings, families
from unmask.systems.proteins.diffpalm import scores
from unmask.systems.proteins.diffpalm.aggregation import correct_share
from unmask.systems.proteins.diffpalm.optimising import order_losses
from unmask.systems.proteins.diffpalm.pairing import pair_table
from unmask.systems.proteins.diffpalm.tables import Table, block_matrices, draw_species, make_table

if TYPE_CHECKING:
    from unmask.systems.proteins.diffpalm.model import DiffPALM

SHUFFLED, MASKS = 4, 8


def measure(
    model: DiffPALM,
    data: AlignmentSettings,
    draw: Draw,
    *,
    limit: int | None = None,
    device: torch.device | None = None,
    tell: Callable[[str], None] | None = None,
    folder: Path | None = None,
) -> dict[str, Any]:
    """``limit`` alignments of about ``test.rows`` rows of whole test species, left rows shuffled; the share of correct pairs."""
    from unmask.systems.proteins.diffpalm.model import Question

    if not data.partner:
        raise UserError("diffpalm is tested on known pairs: name the second alignment with data.partner=FILE")
    family = families(data)[0]
    rows = family.part(data.split)
    assert family.left is not None
    first = family.left
    if not len(rows) or family.species is None:
        raise UserError(f"no species of {data.uri} are held out (split {data.split}): use data.hold_out=species")
    if device is not None:
        model.to(device)
    whole_left = Alignment(family.whole.letters[:, :first], family.whole.names, "left")
    whole_right = Alignment(family.whole.letters[:, first:], family.whole.names, "right")
    left, right = model.cut(whole_left, whole_right)
    test = model.config.test
    tables = _tables(rows, family.species, draw, limit or test.tables, test.rows, test.largest)
    kind = model.config.score
    train = family.train
    ask = Question(score="language_model" if kind in ("nearest", "trained_mirrortree") else kind, runs=test.runs)
    found: dict[str, list[float]] = {
        "model": [],
        "chance": [],
        "nearest": [],
        "trained_mirrortree": [],
        "lower": [],
        "gap": [],
    }
    last = None
    for number, table in enumerate(tables):
        assert table.truth is not None
        sides = table.letters(left, table.left), table.letters(right, table.right)
        known = left.letters[train], right.letters[train]
        nearest = scores.paired_by(scores.nearest_pair_cost(*sides, *known), table.problem)[0]
        mirror = scores.paired_by(scores.profile_correlation_cost(*sides, *known), table.problem)[0]
        found["nearest"].append(correct_share(nearest, table.truth))
        found["trained_mirrortree"].append(correct_share(mirror, table.truth))
        found["chance"].append(len(table.species) / table.problem.rows)
        if kind in ("nearest", "trained_mirrortree"):
            found["model"].append(found[kind][-1])
        else:
            solved = pair_table(model, table, left, right, ask, Scoped(draw, f"table{number}"))
            found["model"].append(correct_share(solved.answer.left_of_right, table.truth))
            last = (table, solved)
            if kind == "language_model":
                gap = _order_gap(model, table, left, right, draw, number)
                found["lower"].append(float(gap > 0))
                found["gap"].append(gap)
        if tell is not None:
            tell(f"{number + 1} of {len(tables)} alignments: {100 * float(np.mean(found['model'])):.0f} % correct")
    out: dict[str, Any] = {
        "correct": 100 * float(np.mean(found["model"])),
        "true_lower": 100 * float(np.mean(found["lower"])) if found["lower"] else 0.0,
        "order_gap": float(np.mean(found["gap"])) if found["gap"] else 0.0,
        "samples": len(tables),
        "rows": sum(t.problem.rows for t in tables),
        "baseline": {
            "chance": {"correct": 100 * float(np.mean(found["chance"]))},
            "nearest training pair": {"correct": 100 * float(np.mean(found["nearest"]))},
            "mirrortree on training pairs": {"correct": 100 * float(np.mean(found["trained_mirrortree"]))},
        },
    }
    if folder is not None and last is not None:
        out["pictures"] = [_picture(folder, *last)]
    return out


def _tables(rows: np.ndarray, species: list[str], draw: Draw, count: int, wanted: int, largest: int) -> list[Table]:
    """Tables of whole species; of larger ones ``largest`` random rows."""
    groups: dict[str, np.ndarray] = {}
    for row in rows:
        groups.setdefault(species[row], []).append(row)  # type: ignore[attr-defined,arg-type]
    several = {name: np.array(some) for name, some in groups.items() if len(some) > 1}
    if not several:
        raise UserError("no held-out species has two rows: there is nothing to pair")
    out = []
    for number in range(count):
        cut = {}
        for place, (name, some) in enumerate(several.items()):
            order = draw.uniform(f"test{number}.cut_{place}", (1, len(some)))[0].argsort(stable=True).numpy()
            cut[name] = some[np.sort(order[:largest])]
        names = list(cut)
        chosen = draw_species([len(cut[n]) for n in names], wanted, draw, name=f"test{number}.species")
        picked = [names[i] for i in chosen] or names[:1]
        partner = {int(r): int(r) for n in picked for r in cut[n]}
        out.append(make_table(picked, cut, cut, draw, name=f"test{number}", partner_of=partner, keep_singles=True))
    return out


def _order_gap(model: DiffPALM, table: Table, left: Alignment, right: Alignment, draw: Draw, number: int) -> float:
    """How much lower the masked loss of the true order is than that of orders shuffled inside species, on the same masks."""
    truth = torch.from_numpy(table.truth)
    orders: list[Tensor] = [truth]
    orders += [scores.random_partners(table.problem, Scoped(draw, f"gap{number}.{k}")) for k in range(SHUFFLED)]
    losses = order_losses(
        model.network,
        *table.tokens(left, right),
        torch.stack(orders),
        Scoped(draw, f"gap{number}"),
        masks=MASKS,
        probability=model.config.descent.mask_probability,
    )
    return float(losses[1:].mean() - losses[0])


def _picture(folder: Path, table: Table, solved: Any) -> dict[str, str]:
    from unmask.systems.proteins.drawing import pairing_png

    order = solved.answer.left_of_right
    hard = torch.nn.functional.one_hot(order, len(order)).T.numpy()
    content = pairing_png(
        block_matrices([solved.answer.shares.numpy()])[table.truth],  # the true pairs along the diagonal, for the eye
        hard[table.truth],
        list(table.problem.sizes),
        losses=solved.losses,
        correct=solved.correct,
        chance=float(len(table.species)),
        title="one test alignment, left rows in the true order",
    )
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "pairs.png").write_bytes(content)
    return {"file": "pairs.png", "caption": "One test alignment: rows on the diagonal are true pairs; species framed"}
