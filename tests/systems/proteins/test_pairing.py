"""DiffPALM: permutations, problems, aggregation, baselines, files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from unmask.data.alignments import Alignment, aligned, write_alignment
from unmask.draw import Seeded
from unmask.errors import UserError
from unmask.systems.proteins import couplings as dca
from unmask.systems.proteins.diffpalm.aggregation import aggregated, in_rounds, pair_counts, robust_pairs
from unmask.systems.proteins.diffpalm.model import DiffPALM
from unmask.systems.proteins.diffpalm.optimising import DescentSettings, optimise, order_losses, run_draws
from unmask.systems.proteins.diffpalm.problem import Problem
from unmask.systems.proteins.diffpalm.scores import (
    descend,
    information_loss,
    iterative_scores,
    likeness_loss,
    paired_by,
)
from unmask.systems.proteins.diffpalm.sinkhorn import inside, matching, sinkhorn, spread
from unmask.systems.proteins.diffpalm.tables import draw_species, named_pairs, packed

SIZES = st.lists(st.integers(1, 5), min_size=1, max_size=4)
NETWORK = {"embed_dim": 16, "depth": 2, "num_heads": 2, "max_positions": 40, "max_rows": 32}


@given(SIZES, st.integers(0, 99))
@settings(max_examples=20, deadline=None)
def test_padded_species_give_what_each_gives_alone(sizes: list[int], seed: int) -> None:
    there = inside(sizes)
    x = torch.randn(there.shape, generator=torch.Generator().manual_seed(seed)) * there
    soft, hard = sinkhorn(x, there, tau=0.7, iterations=6), matching(x, sizes)
    for number, size in enumerate(sizes):
        alone = sinkhorn(x[number : number + 1, :size, :size], inside([size]), tau=0.7, iterations=6)[0]
        assert torch.allclose(soft[number, :size, :size], alone, atol=1e-6)
        assert torch.allclose(soft[number, :size, :size].sum(dim=0), torch.ones(size), atol=1e-5)
        block = hard[number, :size, :size]
        assert torch.equal(block.sum(dim=0), torch.ones(size))
        assert torch.equal(block.sum(dim=1), torch.ones(size))
    assert float((soft * ~there).abs().sum()) == 0


@given(st.integers(2, 6), st.integers(0, 99))
@settings(max_examples=20, deadline=None)
def test_relabelling_does_not_change_the_best_assignment(size: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(1, size, size, generator=generator)
    orders = [(torch.randperm(size, generator=generator), torch.randperm(size, generator=generator))]
    assert torch.equal(matching(x, [size]), matching(x, [size], orders))


def test_the_spread_of_constant_entries_has_no_gradient() -> None:
    log_alpha = torch.zeros(1, 3, 3, requires_grad=True)
    spread(log_alpha, inside([3])).sum().backward()
    assert log_alpha.grad is not None
    assert torch.equal(log_alpha.grad, torch.zeros(1, 3, 3))


def test_a_species_with_one_row_left_is_a_pair() -> None:
    problem = Problem([2, 1, 3], [[(0, 1)], [], []])
    assert problem.free_sizes == [0, 0, 3]
    assert sorted(problem.known) == [(0, 1), (1, 0), (2, 2)]
    assert Problem([2, 1]).free_sizes == [2, 1]


@given(SIZES)
@settings(max_examples=20, deadline=None)
def test_assembled_blocks_are_permutations(sizes: list[int]) -> None:
    problem = Problem(sizes, [[(0, n - 1)] for n in sizes])
    blocks = matching(torch.rand(problem.there().shape), problem.free_sizes)
    whole = problem.assemble(blocks)
    assert torch.equal(whole.sum(dim=0), torch.ones(sum(sizes)))
    assert torch.equal(whole.sum(dim=1), torch.ones(sum(sizes)))


@pytest.mark.parametrize(
    ("pairs", "words"), [([(0, 2)], "out of range"), ([(0, 0), (0, 1)], "use a row twice"), ([(-1, 0)], "out of range")]
)
def test_fixed_pairs_that_do_not_fit_are_told(pairs: list, words: str) -> None:
    with pytest.raises(UserError, match=words):
        Problem([2], [pairs])


def sides(seed: int = 0, rows: int = 7, left: int = 5, right: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    tokens = [torch.randint(4, 24, (rows, n + 1), generator=generator) for n in (left, right)]
    for table in tokens:
        table[:, 0] = 0
    return tokens[0], tokens[1]


def test_runs_together_are_the_runs_alone() -> None:
    model = DiffPALM(DiffPALM.Config(network=NETWORK))
    problem = Problem([3, 4])
    several = DescentSettings(steps=3, parallel=3, batch_size=2)
    together = optimise(model.network, *sides(), problem, several, run_draws(Seeded(0), 3))
    alone = optimise(
        model.network, *sides(), problem, several.model_copy(update={"parallel": 1}), run_draws(Seeded(0), 3)
    )
    for a, b in zip(together, alone, strict=True):
        assert a.losses == pytest.approx(b.losses, abs=1e-4)
        assert len(a.losses) == 8
        assert len(a.lr) == 3
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


def test_a_descent_works_where_gradients_are_off() -> None:
    model = DiffPALM(DiffPALM.Config(network=NETWORK))
    with torch.inference_mode():
        (record,) = optimise(model.network, *sides(), Problem([3, 4]), DescentSettings(steps=1), [Seeded(0)])
    assert float(record.gradients[0].abs().sum()) > 0


def test_fixed_rows_are_not_hidden() -> None:
    model = DiffPALM(DiffPALM.Config(network=NETWORK))
    problem = Problem([3, 4], [[(0, 0), (1, 1), (2, 2)], []])
    (one,) = optimise(model.network, *sides(), problem, DescentSettings(steps=1, mask_probability=1.0), [Seeded(0)])
    assert all(torch.equal(p[:3], torch.arange(3)) for p in one.partner)


def test_nothing_to_optimise_is_told() -> None:
    model = DiffPALM(DiffPALM.Config(network=NETWORK))
    for problem, words in (
        (Problem([2], [[(0, 0)]]), "every pair is fixed"),
        (Problem([1, 1]), "every species has one row"),
    ):
        with pytest.raises(UserError, match=words):
            optimise(model.network, *sides(rows=problem.rows), problem, DescentSettings(steps=1), [Seeded(0)])


def test_the_same_masks_score_every_order() -> None:
    model = DiffPALM(DiffPALM.Config(network=NETWORK))
    orders = torch.stack([torch.arange(7), torch.arange(7)])
    losses = order_losses(model.network, *sides(), orders, Seeded(0), masks=2)
    assert float(losses[0]) == float(losses[1])


def test_robust_pairs_that_share_a_row_are_dropped() -> None:
    runs = torch.tensor([[0, 1], [0, 1], [1, 0], [1, 0]])
    assert robust_pairs(runs, [2], 0.5) == [[]]
    assert len(robust_pairs(runs, [2], 0.5, collisions=True)[0]) == 4
    assert robust_pairs(runs[:2], [2]) == [[(0, 0), (1, 1)]]
    assert torch.equal(aggregated(pair_counts(runs[:3]), [2]), torch.tensor([0, 1]))


def test_rounds_fix_what_is_sure_and_stop() -> None:
    seen = []

    def solve(problem: Problem, number: int) -> torch.Tensor:
        seen.append(list(problem.known))
        first = torch.tensor([0, 1, 2, 3])
        return torch.stack([first, first[[0, 1, 3, 2]]])

    answer = in_rounds(Problem([2, 2]), solve, rounds=5)
    assert seen == [[], [(0, 0), (1, 1)]]
    assert answer.rounds == 2
    assert answer.fixed == [(0, 0), (1, 1)]


def families(species: int = 10, per: int = 3, seed: int = 0) -> tuple[Alignment, Alignment]:
    """Right letters follow from left ones column by column."""
    random = np.random.default_rng(seed)
    letters = np.frombuffer(b"LAGV", dtype=np.uint8)
    left = letters[random.integers(0, 4, (species * per, 8))]
    right = np.where(left == ord("L"), ord("K"), np.where(left == ord("A"), ord("D"), left)).astype(np.uint8)
    names = [f"p{i}_{i // per}" for i in range(species * per)]
    return Alignment(left, names, "left"), Alignment(right, list(names), "right")


def test_mutual_information_pairs_what_follows_from_one_another() -> None:
    left, right = families()
    problem = Problem([3] * 10)
    a, b = dca.states_of(left.letters), dca.states_of(right.letters)
    known = (a[:15], b[:15])
    for kind in ("mi", "dca"):
        partner, confidence, _ = iterative_scores(a, b, problem, Seeded(0), kind=kind, known=known)  # type: ignore[arg-type]
        assert float((partner == torch.arange(30)).float().mean()) > 0.8
        assert confidence.min() >= -1e-9
    one_left, one_right = dca.one_hot(a, 21), dca.one_hot(b, 21)
    true, other = torch.eye(30).double(), torch.eye(30).double().roll(1, 0)
    for loss in (information_loss(one_left, one_right), likeness_loss(one_left, one_right, problem.sizes, "graph")):
        assert float(loss(true)) < float(loss(other))


@pytest.mark.parametrize("kind", ["best_hits", "mirrortree", "graph"])
def test_likeness_descends_to_a_pairing(kind: str) -> None:
    left, right = families(4)
    loss = likeness_loss(*(dca.one_hot(dca.states_of(s.letters), 21) for s in (left, right)), [3] * 4, kind)  # type: ignore[misc,arg-type]
    found, losses = descend(loss, Problem([3] * 4), Seeded(0))
    assert sorted(found.tolist()) == list(range(12))
    assert min(losses) <= losses[0]


def test_couplings_are_symmetric_and_centred() -> None:
    states = torch.randint(0, 4, (60, 5), generator=torch.Generator().manual_seed(0))
    single, double = dca.frequencies(states, 4, weights=dca.sequence_weights(states))
    table = dca.couplings(single, double)
    assert torch.allclose(table, table.permute(2, 3, 0, 1), atol=1e-9)
    assert table.sum(dim=1).abs().max() < 1e-9
    assert torch.allclose(single.sum(dim=1), torch.ones(5, dtype=torch.float64))


def test_confidence_is_the_price_of_doing_without_a_pair() -> None:
    cost = torch.tensor([[0.0, 5.0], [5.0, 1.0]])
    partner, confidence = paired_by(cost, Problem([2]))
    assert partner.tolist() == [0, 1]
    assert confidence.tolist() == [9.0, 9.0]


def test_species_are_packed_whole_and_drawn_to_a_total() -> None:
    assert packed([3, 3, 9, 1], 6) == [[0, 1], [2], [3]]
    sizes = [1, 4, 6, 9, 3, 5, 2, 7]
    taken = draw_species(sizes, 20, Seeded(0), largest=7)
    assert all(2 <= sizes[i] <= 7 for i in taken)
    assert 18 <= sum(sizes[i] for i in taken) <= 22


def paired(tmp_path: Path, **options: object) -> object:
    left, right = families(4)
    model = DiffPALM(DiffPALM.Config(network=NETWORK, descent={"steps": 2}))
    files = [write_alignment(a, tmp_path / f"{n}.fasta") for a, n in ((left, "left"), (right, "right"))]
    return model.predict(files, runs=2, **options)[0]  # type: ignore[arg-type]


def test_two_files_become_a_table_of_pairs(tmp_path: Path) -> None:
    found = paired(tmp_path, table_rows=6, target_masks=1)
    assert len(found.pairs) == 12
    assert {p.left.split("_")[1] for p in found.pairs if p.species == "0"} == {"0"}
    assert found.plain()["chance_share"] == pytest.approx(4 / 12)
    found.save(tmp_path / "pairs.csv")
    assert (tmp_path / "pairs.csv").read_text().splitlines()[0].startswith("species,left,right")
    assert (tmp_path / "pairs.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize("robust", ["fixed", "positive"])
def test_rounds_and_known_pairs_go_through_files(tmp_path: Path, robust: str) -> None:
    (tmp_path / "fixed.csv").write_text("left,right\np0_0,p0_0\n")
    (tmp_path / "known.csv").write_text("left,right\np3_1,p3_1\n")
    found = paired(
        tmp_path,
        rounds=2,
        cutoff=0.5,
        robust=robust,
        fixed=str(tmp_path / "fixed.csv"),
        positive=str(tmp_path / "known.csv"),
    )
    assert len(found.pairs) == 11
    first = next(p for p in found.pairs if p.left == "p0_0")
    assert first.right == "p0_0"
    assert first.fixed


@pytest.mark.parametrize("score", ["mi", "mi_ipa", "dca_ipa", "best_hits", "chance"])
def test_baselines_pair_the_same_files(tmp_path: Path, score: str) -> None:
    assert len(paired(tmp_path, score=score, species=2).pairs) == 6


def two(left: list[tuple[str, str]], right: list[tuple[str, str]], **options: object) -> object:
    model = DiffPALM(DiffPALM.Config(network=NETWORK, descent={"steps": 1}))
    return model.predict([aligned(left, source="A"), aligned(right, source="B")], runs=1, **options)[0]  # type: ignore[arg-type]


def test_bad_pairs_of_files_are_told() -> None:
    good = [("a_1", "MK"), ("b_1", "ME"), ("c_2", "KE")]
    cases = [
        (good, good[:2], {}, "species 2 of A is not in B"),
        (good, [*good, ("d_1", "MM")], {}, "species 1 has 2 rows in A and 3 in B .*pad=gaps"),
        ([("a", "MK")], good, {}, "no species in the header 'a' of A"),
        ([("a_1", "MK"), ("b_2", "ME")], [("a_1", "MK"), ("b_2", "ME")], {}, "every species has one row"),
        (good, good, {"truth": "sideways"}, "truth"),
    ]
    for left, right, options, words in cases:
        with pytest.raises(UserError, match=words):
            two(left, right, **options)
    with pytest.raises(UserError, match="columns are more than the model has positions for"):
        two([(n, s * 20) for n, s in good], good)
    with pytest.raises(UserError, match="pairs two alignments, got 1"):
        DiffPALM(DiffPALM.Config(network=NETWORK)).predict([aligned(good)])


def test_missing_copies_can_be_filled_with_gaps() -> None:
    found = two([("a_1", "MK"), ("b_1", "ME")], [("a_1", "MK"), ("b_1", "ME"), ("d_1", "MM")], pad="gaps")
    assert sum(p.left == "(gaps)" for p in found.pairs) == 1


def test_named_pairs_that_are_not_there_are_told(tmp_path: Path) -> None:
    left, right = families(2)
    path = tmp_path / "pairs.csv"
    for text, words in (
        ("left,right\nnobody,p0_0\n", "no header 'nobody'"),
        ("a,b\n1,2\n", "columns left and right"),
        ("left,right\np0_0,p0_0\np0_0,p1_0\n", "one to one"),
    ):
        path.write_text(text)
        with pytest.raises(UserError, match=words):
            named_pairs(str(path), left, right, "fixed")
