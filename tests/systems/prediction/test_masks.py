"""Mask classification: targets, matching, point-sampled losses, and the way back to pictures."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from unmask.config import validated
from unmask.draw import Recorder, Replay, Seeded
from unmask.systems.prediction.mask_inference import MergeRules, class_map, instances, merge, panoptic, semantic
from unmask.systems.prediction.mask_losses import MaskLayer, MaskLoss, MaskLossConfig, by_image, point_sample
from unmask.systems.prediction.mask_targets import MaskTargets
from unmask.systems.prediction.matching import assign

POINTS = MaskLossConfig(num_points=64)


def maps(seed: int = 0, count: int = 3) -> torch.Tensor:
    coarse = torch.randint(-1, 4, (count, 4, 6), generator=torch.Generator().manual_seed(seed))
    return coarse.repeat_interleave(8, 1).repeat_interleave(8, 2)


def predictions(queries: int = 7, seed: int = 1) -> dict[str, MaskLayer]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: MaskLayer(
            torch.randn(3, queries, 5, generator=generator, requires_grad=True),
            torch.randn(3, queries, 8, 12, generator=generator, requires_grad=True),
        )
        for name in ("final", "0")
    }


# --- targets ---


def test_a_map_gives_one_mask_a_class_and_ignored_pixels_lie_in_none():
    classes = maps()
    targets = MaskTargets.of_map(classes, 4)
    for i, count in enumerate(targets.counts):
        present = [c for c in classes[i].unique().tolist() if c >= 0]
        assert targets.labels[i, :count].tolist() == present
        for label, mask in zip(present, targets.masks[i], strict=False):
            assert torch.equal(mask, classes[i] == label)
        assert not targets.masks[i, count:].any()


def test_an_image_of_ignored_pixels_has_no_mask():
    targets = MaskTargets.of_map(torch.full((2, 4, 4), 255), 4)
    assert targets.counts == [0, 0]
    assert targets.masks.shape == (2, 0, 4, 4)


def test_segments_out_of_sight_and_crowds_are_no_targets():
    ids = torch.tensor([[[1, 1, 2], [0, 3, 3]]])
    targets = MaskTargets.of_segments(ids, torch.tensor([[5, 5, -1, 7]]))
    assert targets.counts == [2]
    assert targets.labels.tolist() == [[5, 5]]
    assert torch.equal(targets.masks[0, 1], ids[0] == 2)


# --- matching ---


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 5), st.lists(st.integers(0, 4), min_size=1, max_size=3), st.integers(0, 99))
def test_the_assignment_is_the_cheapest_of_all(queries, counts, seed):
    costs = torch.rand(2, len(counts), queries, max(counts), generator=torch.Generator().manual_seed(seed))
    for layer, pairs in enumerate(assign(costs, counts)):
        assert pairs.counts == [min(queries, n) for n in counts]
        for image, n in enumerate(counts):
            mine = pairs.image == image
            chosen = costs[layer, image, pairs.query[mine], pairs.target[mine]].sum()
            table = costs[layer, image, :, :n]
            if n <= queries:
                best = min(
                    (table[list(p), range(n)].sum() for p in itertools.permutations(range(queries), n)), default=0
                )
            else:
                best = min(table[range(queries), list(p)].sum() for p in itertools.permutations(range(n), queries))
            assert float(chosen) == pytest.approx(float(best), abs=1e-5)
            assert pairs.query[mine].tolist() == sorted(pairs.query[mine].tolist())


def test_costs_that_are_not_finite_do_not_stop_a_training():
    pairs = assign(torch.full((1, 1, 3, 2), float("nan")), [2])
    assert len(pairs[0]) == 2


# --- losses ---


def test_points_are_sampled_as_torch_samples_grids():
    x = torch.rand(2, 3, 5, 7)
    middle = torch.tensor([[[0.5 / 7, 0.5 / 5], [6.5 / 7, 4.5 / 5]]]).expand(2, -1, -1)
    torch.testing.assert_close(point_sample(x, middle), torch.stack((x[..., 0, 0], x[..., -1, -1]), -1))


def test_a_perfect_prediction_costs_next_to_nothing_and_a_wrong_one_much():
    classes = maps()
    targets = MaskTargets.of_map(classes, 4)
    masks = torch.full((3, 6, 32, 48), -8.0)
    logits = torch.full((3, 6, 5), -30.0)
    logits[..., 4] = 30
    for i, n in enumerate(targets.counts):
        masks[i, :n][targets.masks[i, :n]] = 8
        logits[i, range(n), targets.labels[i, :n]] = 60
    everywhere = MaskLossConfig(num_points=256, importance_sample_ratio=0)  # not only where masks end
    loss = MaskLoss(everywhere, 4)
    right = loss({"final": MaskLayer(logits, masks)}, targets, Seeded(0))
    wrong = loss({"final": MaskLayer(-logits, -masks)}, targets, Seeded(0))
    assert float(right["loss_ce"]) < 1e-6
    assert float(right["loss"]) < 0.05 * float(wrong["loss"])


def test_products_of_embeddings_and_features_give_the_same_losses_and_gradients():
    generator = torch.Generator().manual_seed(0)
    embedding = torch.randn(3, 7, 6, generator=generator, requires_grad=True)
    features = torch.randn(3, 6, 8, 12, generator=generator, requires_grad=True)
    logits = torch.randn(3, 7, 5, generator=generator)
    targets = MaskTargets.of_map(maps(), 4)
    loss = MaskLoss(POINTS, 4)
    whole = MaskLayer(logits, torch.einsum("bqm,bmhw->bqhw", embedding, features))
    parts = MaskLayer(logits, embedding=embedding, features=features)
    gradients = []
    values = []
    for layer in (whole, parts):
        value = loss({"final": layer}, targets, Seeded(3))["loss"]
        gradients.append(torch.autograd.grad(value, (embedding, features), retain_graph=True))
        values.append(value)
    torch.testing.assert_close(values[0], values[1])
    for one, two in zip(*gradients, strict=True):
        torch.testing.assert_close(one, two, atol=1e-5, rtol=1e-4)


def test_the_loss_of_an_image_does_not_depend_on_who_else_is_in_the_batch():
    targets = MaskTargets.of_map(maps(), 4)
    layer = predictions()["final"]
    loss = MaskLoss(POINTS, 4)
    recorder = Recorder(Seeded(5, 2))
    loss({"final": layer}, targets, recorder)
    alone = Recorder(Seeded(5, 2, first_sample=2))
    last = MaskTargets.of_map(maps()[2:], 4)
    loss({"final": MaskLayer(layer.logits[2:], layer.masks[2:])}, last, alone)
    for name, value in alone.recorded.items():
        rows = value.shape[1]
        assert torch.equal(recorder.recorded[name][2, :rows], value[0])


def test_every_layer_draws_its_own_points_and_a_replay_gives_the_same_numbers():
    targets = MaskTargets.of_map(maps(), 4)
    layers = predictions()
    recorder = Recorder(Seeded(0))
    loss = MaskLoss(POINTS, 4)
    first = loss(layers, targets, recorder)
    assert set(recorder.recorded) == {
        f"{k}.{n}" for k in ("match_points", "loss_points", "loss_random") for n in layers
    }
    again = loss(layers, targets, Replay(recorder.recorded))
    assert all(torch.equal(first[k], again[k]) for k in first)
    assert set(first) == {"loss", *(f"loss_{k}{e}" for k in ("ce", "mask", "dice") for e in ("", "_0"))}


def test_a_batch_without_any_mask_still_learns_to_answer_nothing():
    layers = predictions()
    targets = MaskTargets.of_map(torch.full((3, 32, 48), -1), 4)
    out = MaskLoss(POINTS, 4)(layers, targets, Seeded(0))
    out["loss"].backward()
    assert float(out["loss_mask"]) == float(out["loss_dice"]) == 0
    assert float(layers["final"].logits.grad.abs().sum()) > 0
    assert float(layers["final"].masks.grad.abs().sum()) == 0


def test_more_targets_than_queries_leave_some_unmatched():
    out = MaskLoss(POINTS, 4)(predictions(queries=2), MaskTargets.of_map(maps(), 4), Seeded(0))
    assert torch.isfinite(out["loss"])


def test_all_points_by_uncertainty_need_no_fresh_ones():
    recorder = Recorder(Seeded(0))
    config = validated(MaskLossConfig, {"num_points": 16, "importance_sample_ratio": 1.0}, where="loss")
    MaskLoss(config, 4)(predictions(), MaskTargets.of_map(maps(), 4), recorder)
    assert not any("loss_random" in name for name in recorder.recorded)


def test_rows_of_published_draws_are_sorted_to_their_images():
    rows = torch.arange(5.0)[:, None]
    assert by_image(rows, [2, 0, 3])[..., 0].tolist() == [[0, 1, 0], [0, 0, 0], [2, 3, 4]]


# --- inference ---


def clear(
    classes: list[int], boxes: list[tuple[int, int, int, int]], size=(16, 24)
) -> tuple[torch.Tensor, torch.Tensor]:
    logits = torch.full((len(classes), 4), -6.0)
    masks = torch.full((len(classes), *size), -8.0)
    for i, (label, (top, left, bottom, right)) in enumerate(zip(classes, boxes, strict=True)):
        logits[i, label] = 6
        masks[i, top:bottom, left:right] = 8
    return logits, masks


def test_stuff_of_one_class_joins_and_things_stay_apart():
    logits, masks = clear([0, 0, 1, 1], [(0, 0, 4, 24), (12, 0, 16, 24), (5, 0, 11, 8), (5, 12, 11, 20)])
    ids, segments = panoptic(logits, masks, things=(1,), rules=MergeRules())
    assert [(s.label, s.thing, s.area) for s in segments] == [(0, False, 192), (1, True, 48), (1, True, 48)]
    assert sorted(ids.unique().tolist()) == [0, 1, 2, 3]
    assert torch.equal(class_map(ids, segments) == 1, ids >= 2)


def test_a_segment_that_is_mostly_covered_is_left_out():
    logits, masks = clear([1, 1, 0], [(0, 0, 10, 10), (0, 0, 10, 9), (0, 10, 16, 24)])
    masks[1] *= 2  # the surer mask owns what both claim ...
    masks[2, 10:] = 8  # ... and the ground owns what neither does
    _, segments = panoptic(logits, masks, (1,), MergeRules())
    assert [s.label for s in segments] == [1, 0]
    _, segments = panoptic(logits, masks, (1,), MergeRules(overlap_threshold=0.05))
    assert [(s.label, s.area) for s in segments] == [(1, 10), (1, 90), (0, 284)]


def test_nothing_kept_is_an_empty_picture():
    logits, masks = clear([3, 3], [(0, 0, 4, 4), (4, 4, 8, 8)])
    ids, segments = panoptic(logits, masks, (1,), MergeRules())
    assert segments == []
    assert not ids.any()


def test_instances_are_few_when_there_are_few_and_sorted_by_score():
    logits, masks = clear([0, 1], [(0, 0, 4, 4), (4, 4, 8, 8)])
    logits[1, 1] = 3
    found = instances(logits, masks, top_k=100)
    assert len(found.scores) == 6
    assert found.classes[:2].tolist() == [0, 1]
    assert (found.scores.diff() <= 0).all()
    assert [s.label for s in instances(logits, masks, 100, things=(1,)).segments((1,))] == [1, 1]


def test_semantic_answers_follow_the_masks_at_the_size_asked_for():
    logits, masks = clear([0, 2], [(0, 0, 16, 12), (0, 12, 16, 24)])
    found = merge(logits[None], masks[None], padded=(32, 48), sizes=[(32, 40)], outputs=[(64, 80)], rules=MergeRules())[
        0
    ]
    label = found.scores.argmax(0)
    assert label.shape == (64, 80)
    assert (label[:, :40] == 0).all()
    assert (label[:, 56:] == 2).all()
    assert semantic(logits, masks).shape == (3, 16, 24)
    early = MergeRules(resize_masks_before_merging=True)
    again = merge(logits[None], masks[None], padded=(32, 48), sizes=[(32, 40)], outputs=[(64, 80)], rules=early)[0]
    assert (again.scores.argmax(0) == label).float().mean() > 0.95
    assert np.isfinite(again.scores.numpy()).all()
