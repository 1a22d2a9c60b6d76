"""``unmask compress`` from one end to the other."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

import unmask
from unmask.contracts import Preprocessing
from unmask.errors import UserError
from unmask.models import open_model
from unmask.official.hub import save_trainable
from unmask.systems.prediction.classifier.model import Classifier

FEW = {"calibration": 8, "cache": False}


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    from unmask.data import open as open_data

    names = open_data("sample:fashion", "test").classes
    backbone = {
        "name": "vit_nano_patch4",
        "image_size": 28,
        "in_channels": 1,
        "embed_dim": 32,
        "depth": 2,
        "num_heads": 4,
    }
    model = Classifier(Classifier.Config(backbone=backbone, classes=names))
    model.encoder.preprocessing = Preprocessing((0.3,), (0.3,), (28, 28), 1)
    folder = tmp_path_factory.mktemp("m") / "classifier"
    save_trainable(model, folder)
    return folder


def test_a_folder_holds_the_smaller_model_the_table_and_the_page(classifier: Path, tmp_path: Path) -> None:
    out = tmp_path / "smaller"
    report = unmask.compress(classifier, data="sample:fashion", budget="macs=0.6", out=out, limit=64, overrides=FEW)
    names = [row["name"] for row in report["rows"]]
    assert names[:4] == ["original", "optin", "magnitude", "random"]
    first, second = report["rows"][:2]
    assert second["macs"] <= 0.6 * first["macs"]
    assert {"median", "low", "high"} <= set(second["milliseconds"])
    assert json.loads((out / "report.json").read_text())["method"] == "optin"
    assert "<table>" in (out / "report.html").read_text()
    assert (out / "importance.png").stat().st_size > 1000
    again = unmask.load(out, whole=True)
    batch = report["model"].example(2)
    assert torch.equal(again.logits(batch["image"]), report["model"].logits(batch))
    with pytest.raises(UserError, match="does not exist yet"):
        unmask.compress(classifier, data="sample:fashion", out=out, overrides=FEW)


def test_batches_of_ones_own_are_enough() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.ReLU(),
        nn.Conv2d(8, 6, 3),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(6, 3),
    )
    model = open_model(net, classes=3, preprocessing=Preprocessing(image_size=(12, 12)))
    batches = [{"image": torch.randn(8, 3, 12, 12), "label": torch.randint(0, 3, (8,))}]
    report = unmask.compress(model, data=batches, budget="macs=0.5", baselines=["magnitude"], overrides=FEW)
    assert [r["name"] for r in report["rows"]] == ["original", "optin", "magnitude"]


def test_data_with_other_classes_than_the_model_is_told(classifier: Path, tmp_path: Path) -> None:
    from PIL import Image

    for name in ("cat", "dog"):
        (tmp_path / "d" / name).mkdir(parents=True)
        for i in range(6):
            Image.new("L", (28, 28), 20 * i).save(tmp_path / "d" / name / f"{i}.png")
    with pytest.raises(UserError, match="'cat'"):
        unmask.compress(classifier, data=str(tmp_path / "d"), overrides=FEW)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"method": "optim"}, "did you mean optin"),
        ({"method": "mae"}, "mae does not compress"),
        ({"budget": "macs=0.0001"}, "the smallest that can be reached"),
        ({"data": None}, "which data"),
        ({"overrides": {"calibrate": 3}}, "no option"),
        ({"baselines": ["magnitute"]}, "did you mean magnitude"),
    ],
)
def test_what_cannot_work_is_one_line(classifier: Path, changed: dict, said: str) -> None:
    options = {
        "data": "sample:fashion",
        "budget": "macs=0.6",
        "overrides": {**FEW, "importance": "magnitude"},
    } | changed
    with pytest.raises(UserError, match=said):
        unmask.compress(classifier, **options)
