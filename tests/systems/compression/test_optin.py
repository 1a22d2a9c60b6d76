"""OPTIN: its terms, its two ways of measuring, its files, and what it refuses."""

import json
import pickle
import warnings
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import nn

from unmask.config import validated
from unmask.contracts import Preprocessing
from unmask.draw import Seeded
from unmask.errors import UserError
from unmask.models import UserModel, open_model
from unmask.official.reshaped import merge_tokens
from unmask.systems.compression import measure
from unmask.systems.compression.budget import parse_budget
from unmask.systems.compression.optin.model import OPTIN, calibration_batch
from unmask.systems.compression.optin.terms import Manifold, combined, divergence, manifold, rows_of
from unmask.systems.compression.optin.tokens import schedule
from unmask.systems.compression.structure import find_structure


def vit(**options) -> UserModel:
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        arguments = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 3, "num_heads": 3, "mlp_ratio": 1.0}
        model = open_model("timm/vit_tiny_patch16_224", pretrained=False, classes=4, **(arguments | options))
    for p in model.module.parameters():
        if p.ndim > 1:
            p.data.mul_(3)  # answers that a hidden unit moves
    return model


class Tiny(nn.Module):
    def __init__(self) -> None:
        super().__init__()

        def stage(i: int, o: int) -> nn.Sequential:
            return nn.Sequential(nn.Conv2d(i, o, 3, padding=1), nn.BatchNorm2d(o), nn.ReLU(), nn.MaxPool2d(2))

        self.features = nn.Sequential(stage(3, 6), stage(6, 8), stage(8, 6))
        self.fc = nn.Linear(6 * 4, 4)

    def forward(self, x):
        return self.fc(self.features(x).flatten(1))


def convnet() -> UserModel:
    torch.manual_seed(0)
    return open_model(Tiny(), classes=4, preprocessing=Preprocessing(image_size=(16, 16)))


def run(model: UserModel, budget: str = "macs=0.7", batch: int = 6, **options):
    config = validated(OPTIN.Config, {"cache": False, **options}, where="optin")
    return OPTIN(config).compress(model, [model.example(batch)], parse_budget(budget), Seeded(0))


def scores(report) -> list[torch.Tensor]:
    return [torch.tensor(x["scores"], dtype=torch.float64) for x in report["importance"]["layers"]]


def test_the_closed_form_of_the_manifold_term_is_the_direct_one() -> None:
    teacher, student = torch.randn(4, 30, 8), torch.randn(4, 30, 8)
    closed = Manifold(rows_of(teacher, None))
    assert closed.closed
    assert torch.allclose(closed(rows_of(student, None)), manifold(teacher, student), rtol=1e-4)
    mean = Manifold(rows_of(teacher, None), "mean")(rows_of(student, None))
    assert torch.allclose(mean, manifold(teacher, student, aggregate="mean"), rtol=1e-4)
    assert not Manifold(rows_of(torch.randn(1, 9, 8), None)).closed


def test_the_kl_is_scaled_in_decades_and_by_the_running_mean() -> None:
    md = torch.tensor([-1000.0, -1.0, -50.0])
    kl = torch.tensor([-1.0, -5.0, -10.0])
    found = combined(md, kl, 10.0)
    # 10^(3 - 0 - 1) = 100; then the mean of [100]; then 10^int(0.69 - 1) = 1
    assert found.tolist() == pytest.approx([-1100, -501, -60])


def test_a_kl_of_almost_nothing_counts_as_nothing() -> None:
    logits = torch.randn(3, 5)
    assert float(divergence(logits, logits + 1e-7)) == 0
    assert float(divergence(logits, logits + torch.randn(3, 5))) < 0


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"feature": "mlp", "carry_head_masks": True, "index_weighting": True},
        {"feature": "hidden", "aggregate": "mean"},
        {"feature": "attention", "loss_type": "MMD", "sample_rows": 50},
        {"loss_type": "KL", "divide_logits_by_t": True},
        {"feature": "mlp", "neuron_include_last_layer": False, "candidates": 5},
    ],
    ids=str,
)
def test_fast_scores_are_those_of_the_plain_loop(options: dict) -> None:
    fast, plain = (run(vit(), search=how, **options).report for how in ("fast", "plain"))
    for a, b in zip(scores(fast), scores(plain), strict=True):
        assert torch.allclose(a, b, rtol=2e-3, atol=1e-5 * float(b.abs().max() + 1))
    assert [x["kept"] for x in fast["importance"]["layers"]] == [x["kept"] for x in plain["importance"]["layers"]]


def test_fast_channel_scores_are_those_of_the_plain_loop() -> None:
    fast, plain = (run(convnet(), search=how).report for how in ("fast", "plain"))
    for a, b in zip(scores(fast), scores(plain), strict=True):
        assert torch.allclose(a, b, rtol=2e-3, atol=1e-5 * float(b.abs().max() + 1))


def test_rows_may_be_drawn_anew_for_every_comparison() -> None:
    a, b = (run(vit(), resample_rows=on, sample_rows=20) for on in (True, False))
    assert any(not torch.allclose(x, y) for x, y in zip(scores(a.report), scores(b.report), strict=True))


@pytest.mark.parametrize("budget", ["macs=0.6", "parameters=0.7", "bytes=0.7"])
@pytest.mark.parametrize("make", [vit, convnet])
def test_the_whole_model_keeps_its_budget(make, budget: str) -> None:
    model = make()
    smaller = run(model, budget).model
    kind, share = budget.split("=")
    before, after = measure.costs(model)[kind], measure.costs(smaller)[kind]
    assert 0.8 * float(share) * before < after <= float(share) * before * 1.0001


def test_a_budget_of_the_layers_alone_is_the_papers() -> None:
    kept = run(vit(), "macs=0.6", counts="layers").report["importance"]["layers"]
    frame_heads = sum(sum(x["kept"]) for x in kept if x["kind"] == "head")
    neurons = sum(sum(x["kept"]) for x in kept if x["kind"] == "neuron")
    s, width, d = 17, 24, 8
    head, neuron = 4 * s * width * d + 2 * s * s * d, 2 * s * width
    base = 3 * (3 * head + 24 * neuron)
    assert 0.5 * base < frame_heads * head + neurons * neuron <= 0.6 * base * 1.0001


def test_tokens_are_merged_within_the_budget_and_after_loading(tmp_path: Path) -> None:
    model = vit(mlp_ratio=2.0)
    made = run(model, "macs=0.6", units=("heads", "neurons", "tokens"))
    kept = made.report["importance"]["tokens"]
    assert kept[0] == 17
    assert kept[-1] < 17
    assert measure.macs(made.model) <= 0.6 * measure.macs(model) * 1.0001
    made.model.save(tmp_path / "m")
    batch = model.example(3)
    assert torch.allclose(open_model(tmp_path / "m").logits(batch), made.model.logits(batch), atol=1e-5)


def test_merging_keeps_the_class_token_and_the_mean() -> None:
    tokens = torch.randn(2, 17, 6)
    merged, away = merge_tokens(tokens, 12, 1)
    assert merged.shape == (2, 12, 6)
    assert torch.equal(merged[:, 0], tokens[:, 0])
    assert (away > 0).all()
    assert (away % 2 == 0).all()
    assert merge_tokens(tokens, 3, 1)[0].shape[1] == 9  # no more than half at once


def test_the_schedule_of_tokens_never_rises_and_stops_at_a_quarter() -> None:
    values = -torch.rand(4, 20, dtype=torch.float64)
    values[0] = -torch.inf
    kept = schedule(values, float("inf"), lambda lengths: float(sum(lengths)))
    assert kept[0] == 20
    assert all(a >= b for a, b in pairwise(kept))
    assert min(kept) >= 5


def test_other_scores_go_through_the_same_search() -> None:
    model = vit()
    batch = {**model.example(6), "label": torch.tensor([0, 1, 2, 3, 0, 1])}
    for name in ("magnitude", "random", "fisher"):
        config = OPTIN.Config(importance=name)
        made = OPTIN(config).compress(model, [batch], parse_budget("macs=0.7"), Seeded(0))
        assert measure.macs(made.model) <= 0.7 * measure.macs(model) * 1.0001


# --- files ---


def test_a_ranking_is_kept_by_all_options_and_read_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UNMASK_CACHE", str(tmp_path))
    first = run(vit(), cache=True)
    assert len(list((tmp_path / "rankings").glob("*.safetensors"))) == 1
    again = run(vit(), cache=True)
    assert all(torch.equal(a, b) for a, b in zip(scores(first.report), scores(again.report), strict=True))
    run(vit(), cache=True, contribution=3)
    assert len(list((tmp_path / "rankings").glob("*.safetensors"))) == 2


def test_rankings_of_plain_tuples_are_imported_and_pickles_are_not(tmp_path: Path) -> None:
    rows = [[-float(3 * layer + i + 1), layer, i, "head"] for layer in range(3) for i in range(3)]
    rows += [[-float(i + 1), layer, i, "neuron"] for layer in range(3) for i in range(24)]
    (tmp_path / "r.json").write_text(json.dumps(rows))
    made = run(vit(), ranking=str(tmp_path / "r.json"))
    assert made.report["importance"]["layers"][0]["scores"] == [-1, -2, -3]
    (tmp_path / "r.pkl").write_bytes(pickle.dumps(rows))
    with pytest.raises(UserError, match="a pickled ranking is not read"):
        run(vit(), ranking=str(tmp_path / "r.pkl"))
    (tmp_path / "short.json").write_text(json.dumps(rows[:-1]))
    (tmp_path / "other.json").write_text(json.dumps([r for r in rows if r[1] < 2]))
    with pytest.raises(UserError, match="2 x 3 heads, the model has 3 layers x 3"):
        run(vit(), ranking=str(tmp_path / "other.json"))


# --- bad input ---


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"temperature": 0}, "temperature"),
        ({"contribution": -1}, "contribution"),
        ({"sample_rows": 1}, "sample_rows"),
        ({"mask_ratio": 0.6}, "no option"),
        ({"units": ["tokens"]}, "tokens alone"),
    ],
)
def test_options_that_do_not_fit_are_told(options: dict, said: str) -> None:
    with pytest.raises(UserError, match=said):
        run(vit(), **options)


def test_a_budget_out_of_reach_names_the_smallest() -> None:
    with pytest.raises(UserError, match=r"the smallest that can be reached is macs=0\.\d+"):
        run(vit(), "macs=0.01", importance="magnitude")
    with pytest.raises(UserError, match="one channel of every layer stays; the smallest"):
        run(convnet(), "macs=0.001", importance="magnitude")


def test_the_smallest_budget_that_is_named_can_be_reached() -> None:
    with pytest.raises(UserError) as error:
        run(vit(), "macs=0.01", importance="magnitude")
    run(vit(), str(error.value).split(" is ")[-1], importance="magnitude")


def test_empty_and_uneven_calibration_is_told() -> None:
    with pytest.raises(UserError, match="no sample"):
        calibration_batch([], 4)
    uneven = [{"tokens": torch.ones(2, 4, dtype=torch.int64)}, {"tokens": torch.ones(2, 6, dtype=torch.int64)}]
    with pytest.raises(UserError, match="attention mask"):
        calibration_batch(uneven, 4)


def test_tokens_of_a_convnet_are_refused() -> None:
    with pytest.raises(UserError, match="no tokens"):
        run(convnet(), units=("channels", "tokens"))


def test_a_bert_of_a_given_batch_is_cut_without_its_pooler() -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=40,
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=3,
        intermediate_size=24,
        max_position_embeddings=16,
        num_labels=3,
    )
    model = open_model(transformers.BertForSequenceClassification(config))
    assert find_structure(model).refused["bert.pooler.dense"] == "stands outside the repeated blocks"
    made = run(model, "macs=0.7")
    assert measure.macs(made.model) < measure.macs(model)
