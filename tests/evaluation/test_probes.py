"""Closed-form and non-parametric probes against independent computations on real digits."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from unmask.draw import Seeded
from unmask.errors import UserError
from unmask.evaluation.knn import knn
from unmask.evaluation.metrics import measured
from unmask.evaluation.rankme import rankme
from unmask.evaluation.ridge import fit_ridge, ridge
from unmask.evaluation.subsets import few_labels, split


@pytest.fixture(scope="module")
def digits():
    data = pytest.importorskip("sklearn.datasets").load_digits()
    x, y = torch.tensor(data.data, dtype=torch.float32), torch.tensor(data.target)
    return x[:1200], y[:1200], x[1200:], y[1200:]


def test_ridge_gives_the_decision_function_of_sklearns_ridge_classifier(digits):
    from sklearn.linear_model import RidgeClassifier
    from sklearn.preprocessing import StandardScaler

    x, y, x_test, _ = digits
    scaler = StandardScaler().fit(x.double().numpy())
    theirs = RidgeClassifier(alpha=37.0).fit(scaler.transform(x.double().numpy()), y.numpy())
    expected = theirs.decision_function(scaler.transform(x_test.double().numpy()))
    ours = ridge(x, y, x_test, classes=10, strengths=[37.0])
    np.testing.assert_allclose(ours.numpy(), expected, rtol=0, atol=1e-8)


def test_ridge_is_the_same_with_more_features_than_samples(digits):
    from sklearn.linear_model import RidgeClassifier

    x, y, x_test, _ = digits
    few = slice(0, 40)
    fitted = fit_ridge(x[few], y[few], 10, strengths=[5.0])
    prepared = ((x[few].double() - fitted.mean) / fitted.scale).numpy()
    theirs = RidgeClassifier(alpha=5.0).fit(prepared, y[few].numpy())
    expected = theirs.decision_function(((x_test.double() - fitted.mean) / fitted.scale).numpy())
    np.testing.assert_allclose(fitted.scores(x_test).numpy(), expected, rtol=0, atol=1e-8)


def test_ridges_leave_one_out_equals_leaving_each_one_out(digits):
    x, y = digits[0][:60].double(), digits[1][:60]
    fitted = fit_ridge(x, y, 10, strengths=[9.0])
    z = (x - fitted.mean) / fitted.scale  # the scale is a choice made once, as in the probe
    right = 0
    for i in range(len(z)):
        rest = torch.arange(len(z)) != i
        part, targets = z[rest], torch.nn.functional.one_hot(y[rest], 10).double() * 2 - 1
        mean = part.mean(0)
        weight = torch.linalg.solve(
            (part - mean).T @ (part - mean) + 9.0 * torch.eye(z.shape[1]), (part - mean).T @ (targets - targets.mean(0))
        )
        right += int(((z[i] - mean) @ weight + targets.mean(0)).argmax() == y[i])
    assert fitted.leave_one_out == pytest.approx(right / len(z))


def test_ridge_chooses_a_strength_that_is_good_on_new_samples(digits):
    x, y, x_test, y_test = digits
    chosen = measured(ridge(x, y, x_test, classes=10), y_test)["top1"]
    others = [measured(ridge(x, y, x_test, classes=10, strengths=[s]), y_test)["top1"] for s in (1e-2, 1e5)]
    assert chosen > 0.85
    assert chosen >= max(others) - 0.02


def test_knn_equals_a_plain_loop(digits):
    x, y, x_test, _ = digits
    votes = knn(x, y, x_test[:50], classes=10, k=7, temperature=0.1, chunk=16)
    for row, sample in zip(votes, x_test[:50].double(), strict=True):
        similarity = [float(sample @ t / (sample.norm() * t.norm())) for t in x.double()]
        nearest = sorted(range(len(x)), key=lambda i: -similarity[i])[:7]
        expected = torch.zeros(10, dtype=torch.float64)
        for i in nearest:
            expected[y[i]] += math.exp(similarity[i] / 0.1)
        torch.testing.assert_close(row.double(), expected / expected.sum(), atol=1e-4, rtol=0)


def test_knn_with_fewer_samples_than_k_lets_all_vote(digits):
    x, y, x_test, y_test = digits
    votes = knn(x[:5], y[:5], x_test[:3], classes=10)
    assert torch.allclose(votes.sum(1), torch.ones(3))


@pytest.mark.parametrize("rank", [1, 3, 8])
def test_rankme_of_equal_singular_values_is_their_number(rank):
    basis = torch.linalg.qr(torch.randn(40, 8, generator=torch.Generator().manual_seed(0)).double()).Q
    x = (
        basis[:, :rank]
        @ torch.linalg.qr(torch.randn(12, 12, generator=torch.Generator().manual_seed(1)).double()).Q[:rank]
    )
    assert rankme(x) == pytest.approx(rank, rel=1e-4)


def test_rankme_of_a_known_spectrum_is_the_exponential_of_its_entropy():
    spectrum = torch.tensor([4.0, 2.0, 1.0, 1.0], dtype=torch.float64)
    share = spectrum / spectrum.sum()
    assert rankme(torch.diag(spectrum)) == pytest.approx(float((-(share * share.log()).sum()).exp()), rel=1e-4)


def test_rankme_refuses_features_that_are_not_finite():
    with pytest.raises(UserError, match="NaN"):
        rankme(torch.full((4, 4), float("nan")))


def test_metrics_count_as_by_hand():
    scores = torch.tensor([[3.0, 1, 0, 0, 0, 0], [0, 1, 2, 0, 0, 0], [9, 5, 4, 3, 2, 1]])
    found = measured(scores, torch.tensor([0, 1, 5]))
    assert found["top1"] == pytest.approx(1 / 3)
    assert found["top5"] == pytest.approx(2 / 3)
    assert found["confusion"][1][2] == 1
    assert found["confusion"][5][0] == 1
    assert found["per_class"][:2] == [1.0, 0.0]
    assert found["per_class"][3] is None


def test_few_labels_takes_the_same_share_of_every_class_and_grows_with_the_share():
    labels = torch.arange(1000) % 10
    one, ten = few_labels(labels, 0.01, Seeded(3)), few_labels(labels, 0.1, Seeded(3))
    assert torch.bincount(labels[one]).tolist() == [1] * 10
    assert torch.bincount(labels[ten]).tolist() == [10] * 10
    assert set(one.tolist()) <= set(ten.tolist())
    assert one.tolist() != few_labels(labels, 0.01, Seeded(4)).tolist()
    assert few_labels(torch.tensor([0, 0, 1]), 0.01, Seeded(0)).numel() == 2, "a class is never left without a sample"


def test_a_share_of_labels_outside_0_to_1_is_refused():
    with pytest.raises(UserError, match="labels=10"):
        few_labels(torch.zeros(4, dtype=torch.int64), 10, Seeded(0))


def test_split_covers_everything_once_by_class():
    labels = torch.arange(50) % 5
    train, test = split(labels, 50, Seeded(0))
    assert sorted(torch.cat((train, test)).tolist()) == list(range(50))
    assert torch.bincount(labels[train]).tolist() == [8] * 5
