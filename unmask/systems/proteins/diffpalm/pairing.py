"""Pairing tables and whole files: runs, rounds, baselines, and the typed result."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from unmask.data.alignments import Alignment
from unmask.draw import Draw, Scoped, Seeded
from unmask.errors import UserError
from unmask.systems.proteins.couplings import STATES, one_hot
from unmask.systems.proteins.diffpalm import scores
from unmask.systems.proteins.diffpalm.aggregation import Answer, aggregated, in_rounds, pair_counts
from unmask.systems.proteins.diffpalm.optimising import Record, optimise, order_losses, run_draws
from unmask.systems.proteins.diffpalm.problem import Problem
from unmask.systems.proteins.diffpalm.tables import (
    GAP_ROW,
    Table,
    block_matrices,
    check_same_species,
    joined_tokens,
    make_table,
    matched_species,
    named_pairs,
    packed,
    partners,
)
from unmask.systems.proteins.results import Pair, Pairs

if TYPE_CHECKING:
    from unmask.systems.proteins.diffpalm.model import DiffPALM, Question

NAMES = {
    "language_model": "language model",
    "mi": "mutual information",
    "mi_ipa": "MI-IPA",
    "dca_ipa": "DCA-IPA",
    "best_hits": "reciprocal best hits",
    "mirrortree": "mirrortree",
    "graph": "graph alignment",
    "chance": "chance",
}
Tell = Callable[[str], None] | None


@dataclass
class Solved:
    """The answer for a table; losses and correct pairs by step, means over the runs of the first round."""

    answer: Answer
    confidence: Tensor  # [D], of each right row's pair
    losses: list[float] = field(default_factory=list)
    correct: list[float] = field(default_factory=list)


def pair_table(
    model: DiffPALM,
    table: Table,
    left: Alignment,
    right: Alignment,
    ask: Question,
    draw: Draw,
    *,
    positive: Tensor | None = None,
    tell: Tell = None,
) -> Solved:
    """Pair one table, by the score that is asked for. left, right: cut to the network's columns."""
    problem = table.problem
    if max([*problem.free_sizes, 0]) < 2:  # each row has its partner already
        order = torch.zeros(problem.rows, dtype=torch.int64)
        for p, q in problem.known:
            order[q] = p
        for lefts, rights in zip(problem.free_left, problem.free_right, strict=True):
            order[rights] = torch.tensor(lefts, dtype=torch.int64)
        shares = torch.nn.functional.one_hot(order, problem.rows).T.double()
        return Solved(
            Answer(order, shares, [(p, q) for q, p in enumerate(order.tolist())], 0), torch.ones(problem.rows)
        )
    if ask.score == "language_model":
        return _by_model(model, table, left, right, ask, draw, positive, tell)
    return _by_baseline(table, left, right, ask, draw)


def _by_model(
    model: DiffPALM,
    table: Table,
    left: Alignment,
    right: Alignment,
    ask: Question,
    draw: Draw,
    positive: Tensor | None,
    tell: Tell,
) -> Solved:
    settings = model.settings(ask)
    first, second = table.tokens(left, right)
    kept: list[list[Record]] = []

    def solve(problem: Problem, number: int) -> Tensor:
        records = (
            optimise(
                model.network,
                first,
                second,
                problem,
                settings,
                run_draws(draw, ask.runs, f"round{number}.run"),
                positive=positive,
                tell=tell,
            )
            if ask.robust == "fixed" or number == 0
            else _on_top(model, first, second, problem, ask, settings, draw, number, positive, tell)
        )
        kept.append(records)
        return torch.stack([r.best if ask.pick == "lowest" else r.partner[-1] for r in records])

    answer = in_rounds(table.problem, solve, rounds=ask.rounds, cutoff=ask.cutoff, add=ask.add)
    shares = answer.shares[answer.left_of_right, torch.arange(len(answer.left_of_right))]
    records = kept[0]
    losses = np.mean([r.losses for r in records], axis=0)[:: settings.batch_size].tolist()
    correct: list[float] = []
    if table.truth is not None:
        truth = torch.from_numpy(table.truth)
        hits = [[float((p == truth).sum()) for p in r.partner[:: settings.batch_size]] for r in records]
        correct = np.mean(hits, axis=0).tolist()
    return Solved(answer, shares, losses, correct)


def _on_top(
    model: DiffPALM,
    first: Tensor,
    second: Tensor,
    problem: Problem,
    ask: Question,
    settings: Any,
    draw: Draw,
    number: int,
    positive: Tensor | None,
    tell: Tell,
) -> list[Record]:
    """A later round with robust pairs as examples on top: they leave the table, and come back into every run's pairing."""
    taken = problem.known
    lefts = [p for p in range(problem.rows) if p not in {a for a, _ in taken}]
    rights = [q for q in range(problem.rows) if q not in {b for _, b in taken}]
    known = torch.cat((first[[p for p, _ in taken]], second[[q for _, q in taken]][:, 1:]), dim=1)
    above = known if positive is None else torch.cat((positive, known))
    smaller = Problem([m for m in problem.free_sizes if m], [[] for m in problem.free_sizes if m])
    draws = run_draws(draw, ask.runs, f"round{number}.run")
    records = optimise(model.network, first[lefts], second[rights], smaller, settings, draws, positive=above, tell=tell)
    places = torch.tensor(lefts)
    for record in records:
        whole = []
        for partner in record.partner:
            order = torch.zeros(problem.rows, dtype=torch.int64)
            for p, q in taken:
                order[q] = p
            order[rights] = places[partner]
            whole.append(order)
        record.partner = whole
    return records


def _by_baseline(table: Table, left: Alignment, right: Alignment, ask: Question, draw: Draw) -> Solved:
    problem = table.problem
    a, b = table.states(left, right)
    if ask.score in ("mi_ipa", "dca_ipa"):
        kind = "mi" if ask.score == "mi_ipa" else "dca"
        partner, confidence, rounds = scores.iterative_scores(a, b, problem, draw, kind=kind, increment=ask.increment)  # type: ignore[arg-type]
        shares = torch.nn.functional.one_hot(partner, problem.rows).T.double()
        return Solved(Answer(partner, shares, list(problem.known), rounds), confidence)
    runs, losses = [], []
    for number in range(ask.runs):
        source = Scoped(draw, f"run{number}")
        if ask.score == "chance":
            runs.append(scores.random_partners(problem, source))
            continue
        if ask.score == "mi":
            loss = scores.information_loss(one_hot(a, STATES), one_hot(b, STATES))
        else:
            loss = scores.likeness_loss(one_hot(a, STATES), one_hot(b, STATES), problem.sizes, ask.score)  # type: ignore[arg-type]
        found, course = scores.descend(loss, problem, source)
        runs.append(found)
        losses.append(course)
    counts = pair_counts(torch.stack(runs)).double()
    order = aggregated(counts, problem.sizes)
    shares = counts / len(runs)
    shortest = min((len(c) for c in losses), default=0)
    mean = np.mean([c[:shortest] for c in losses], axis=0).tolist() if shortest > 1 else []
    return Solved(Answer(order, shares, list(problem.known)), shares[order, torch.arange(len(order))], mean)


# --- files ------------------------------------------------------------------------------------------------------


def pair_files(model: DiffPALM, left: Alignment, right: Alignment, ask: Question, *, tell: Tell = None) -> Pairs:
    """Pair two alignments. Raises ``UserError`` for species that do not fit, pairs that are not there, nothing to optimise."""
    draw: Draw = Seeded(ask.seed)
    cut_left, cut_right = model.cut(left, right)
    if ask.score == "language_model":
        model.network.check(1, cut_left.columns + cut_right.columns + 1)
    rows_left, rows_right = matched_species(left, right, rule=ask.species_from, pad=ask.pad)
    truth = partners(left, right, ask.truth)
    fixed, examples = (named_pairs(p, left, right, w) for p, w in ((ask.fixed, "fixed"), (ask.positive, "positive")))
    for pairs, what in ((fixed, "fixed"), (examples, "positive")):
        if pairs:
            check_same_species(pairs, left.species(ask.species_from), right.species(ask.species_from), what)
    above = None
    if examples:
        above = joined_tokens(cut_left.letters[list(examples)], cut_right.letters[list(examples.values())])
        rows_left, rows_right = _without(rows_left, set(examples)), _without(rows_right, set(examples.values()))
    names = _chosen(rows_left, ask, draw)
    if all(len(rows_left[n]) < 2 for n in names):
        raise UserError("every species has one row: there is nothing to pair, each row has its partner already")
    tables = []
    room = model.network.config.max_rows - (0 if above is None else len(above))
    for number, group in enumerate(packed([len(rows_left[n]) for n in names], min(ask.table_rows, max(room, 1)))):
        some = [names[i] for i in group]
        tables.append(
            make_table(some, rows_left, rows_right, draw, name=f"table{number}", partner_of=truth, fixed=fixed)
        )
    if fixed and not any(max([*t.problem.free_sizes, 0]) > 1 for t in tables):
        raise UserError("every pair is fixed already: there is nothing to optimise")
    solved = []
    for number, table in enumerate(tables):
        said = None if tell is None else (lambda line, n=number: tell(f"table {n + 1} of {len(tables)}, {line}"))
        solved.append(
            pair_table(
                model, table, cut_left, cut_right, ask, Scoped(draw, f"table{number}"), positive=above, tell=said
            )
        )
    return _result(model, tables, solved, left, right, ask, examples, above, (cut_left, cut_right))


def _chosen(rows: dict[str, np.ndarray], ask: Question, draw: Draw) -> list[str]:
    names = [n for n in rows if len(rows[n]) and (ask.largest is None or len(rows[n]) <= ask.largest)]
    if not names:
        raise UserError(f"no species has at most largest={ask.largest} rows")
    if ask.species is not None and ask.species < len(names):
        several = [n for n in names if len(rows[n]) > 1] or names  # single rows need no pairing
        order = draw.uniform("species", (1, len(several)))[0].argsort(stable=True)[: ask.species]
        names = [several[i] for i in sorted(order.tolist())]
    return names


def _without(rows: dict[str, np.ndarray], gone: set[int]) -> dict[str, np.ndarray]:
    return {name: np.array([r for r in some if int(r) not in gone], dtype=np.int64) for name, some in rows.items()}


def _result(
    model: DiffPALM,
    tables: list[Table],
    solved: list[Solved],
    left: Alignment,
    right: Alignment,
    ask: Question,
    examples: dict[int, int],
    above: Tensor | None,
    cut: tuple[Alignment, Alignment],
) -> Pairs:
    found: list[Pair] = []
    hard = []
    for table, done in zip(tables, solved, strict=True):
        order = done.answer.left_of_right
        hard.append(torch.nn.functional.one_hot(order, len(order)).T.numpy())
        species = np.repeat(table.species, table.problem.sizes)
        settled = set(done.answer.fixed) | set(table.problem.known)
        for q, p in enumerate(order.tolist()):
            ours, theirs = int(table.left[p]), int(table.right[q])
            known = None if table.truth is None or table.truth[q] < 0 else bool(table.truth[q] == p)
            found.append(
                Pair(
                    str(species[q]),
                    left.names[ours] if ours != GAP_ROW else "(gaps)",
                    right.names[theirs] if theirs != GAP_ROW else "(gaps)",
                    ours,
                    theirs,
                    float(done.confidence[q]),
                    (p, q) in settled,
                    known,
                )
            )
    facts: dict[str, Any] = {"seed": ask.seed, "tables": len(tables)}
    if ask.score == "language_model":
        facts |= {"runs": ask.runs, "rounds": max(done.answer.rounds for done in solved)}
    if examples:
        facts["examples"] = len(examples)
    if (
        ask.target_masks
        and ask.score == "language_model"
        and all(t.truth is not None and (t.truth >= 0).all() for t in tables)
    ):
        facts["target_loss"] = float(np.mean([_target(model, t, cut, ask, above) for t in tables]))
    return Pairs(
        found,
        block_matrices([done.answer.shares.numpy() for done in solved]),
        block_matrices(hard),
        [size for t in tables for size in t.problem.sizes],
        NAMES[ask.score],
        _summed([done.losses for done in solved], mean=True),
        _summed([done.correct for done in solved], mean=False),
        facts,
        source="+".join(Path(side.source).name.split(".")[0] for side in (left, right)),
        rows=sum(t.problem.rows for t in tables),
    )


def _target(
    model: DiffPALM, table: Table, cut: tuple[Alignment, Alignment], ask: Question, above: Tensor | None
) -> float:
    first, second = table.tokens(*cut)
    truth = torch.from_numpy(table.truth)[None]
    probability = model.settings(ask).mask_probability
    return float(
        order_losses(
            model.network,
            first,
            second,
            truth,
            Seeded(ask.seed),
            masks=ask.target_masks,
            probability=probability,
            positive=above,
        )[0]
    )


def _summed(courses: list[list[float]], *, mean: bool) -> list[float]:
    courses = [c for c in courses if c]
    if not courses:
        return []
    shortest = min(len(c) for c in courses)
    together = np.array([c[:shortest] for c in courses])
    return (together.mean(axis=0) if mean else together.sum(axis=0)).tolist()
