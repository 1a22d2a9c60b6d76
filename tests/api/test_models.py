"""``load``, ``evaluate``, ``predict``, ``export``, ``import_checkpoint``, ``report``, ``runs`` on real runs."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image

import unmask
from unmask.contracts import Encoder, Trainable


def test_load_takes_a_run_an_export_and_a_name(mae_run, tmp_path):
    encoder = unmask.load(mae_run)
    assert isinstance(encoder, Encoder)
    images = torch.randn(2, 1, 28, 28)
    exported = unmask.export(mae_run, to="safetensors", out=tmp_path / "export")
    with torch.no_grad():
        assert torch.equal(encoder(images), unmask.load(exported)(images))
    assert isinstance(unmask.load(mae_run, whole=True), Trainable)
    assert unmask.load("vit_nano_patch4", image_size=28).embed_dim == 128


def test_evaluate_of_a_run_uses_its_own_data_and_writes_beside_it(mae_run):
    scores = unmask.evaluate(mae_run, probe="knn", limit=200, baseline=1)
    assert 0 < scores["top1"] <= 1
    assert (mae_run / "evaluation/knn.json").is_file()
    assert "knn" in (mae_run / "report.html").read_text()


def test_few_labels_are_few(mae_run, tmp_path):
    scores = unmask.evaluate(mae_run, "sample:fashion", "ridge", labels=0.1, limit=500, baseline=False, out=tmp_path)
    assert scores["train_samples"] == pytest.approx(50, abs=10)


def test_a_classifier_predicts_files_and_folders(classifier_run, tmp_path):
    (tmp_path / "shoes").mkdir()
    for number in range(3):
        pixels = np.random.default_rng(number).integers(0, 255, (28, 28), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "shoes" / f"{number}.png")
    results = unmask.predict(classifier_run, tmp_path / "shoes", out=tmp_path / "out")
    assert len(results) == 3
    assert len(list((tmp_path / "out").glob("*.json"))) == 3
    assert results[0][1].answer in {
        "T-shirt/top",
        "Trouser",
        "Pullover",
        "Dress",
        "Coat",
        "Sandal",
        "Shirt",
        "Sneaker",
        "Bag",
        "Ankle boot",
    }


def test_a_masked_autoencoder_does_not_predict_and_says_what_does(mae_run, tmp_path):
    Image.new("L", (28, 28)).save(tmp_path / "a.png")
    with pytest.raises(unmask.UserError, match="unmask train classifier"):
        unmask.predict(mae_run, tmp_path / "a.png")


def test_an_export_is_never_written_over_something_else(mae_run, tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(unmask.UserError, match="no run of ours"):
        unmask.export(mae_run, out=tmp_path)


def test_timm_and_onnx_exports_are_written(mae_run, tmp_path):
    pytest.importorskip("onnxruntime")
    unmask.export(mae_run, to="timm", out=tmp_path / "timm")
    unmask.export(mae_run, to="onnx", out=tmp_path / "onnx")
    assert json.loads((tmp_path / "timm/config.json").read_text())["architecture"].startswith("vit")
    assert (tmp_path / "onnx/encoder.onnx").is_file()


def test_several_runs_make_one_page(mae_run, classifier_run, tmp_path):
    page = unmask.report(mae_run, classifier_run, out=tmp_path / "both.html")
    assert "mae" in page.read_text()
    rows = unmask.runs(mae_run.parent.parent)
    assert {"mae", "classifier"} <= {row["system"] for row in rows}


def test_nothing_to_replay_is_said(mae_run):
    with pytest.raises(unmask.UserError, match="nothing to replay"):
        unmask.replay(mae_run)


def official_mae(width=32, depth=1, heads=4, patch=8, grid=4):
    """The authors' names for a tiny encoder without decoder."""
    from unmask.nn.positions import sincos_table

    generator = torch.Generator().manual_seed(0)

    def some(*shape):
        return torch.randn(*shape, generator=generator) * 0.02

    positions = torch.cat((torch.zeros(1, width), sincos_table(width, (grid, grid))))[None]
    state = {
        "cls_token": some(1, 1, width),
        "pos_embed": positions,
        "patch_embed.proj.weight": some(width, 3, patch, patch),
        "patch_embed.proj.bias": some(width),
        "norm.weight": some(width),
        "norm.bias": some(width),
    }
    shapes = {
        "norm1": (),
        "attn.qkv": (3 * width, width),
        "attn.proj": (width, width),
        "norm2": (),
        "mlp.fc1": (4 * width, width),
        "mlp.fc2": (width, 4 * width),
    }
    for block in range(depth):
        for name, shape in shapes.items():
            state[f"blocks.{block}.{name}.weight"] = some(*(shape or (width,)))
            state[f"blocks.{block}.{name}.bias"] = some(shape[0] if shape else width)
    return {"model": state}


def test_an_official_checkpoint_becomes_a_model_that_every_command_takes(tmp_path):
    torch.save(official_mae(), tmp_path / "mae.pth")
    folder = unmask.import_checkpoint("mae", tmp_path / "mae.pth", tmp_path / "model", overrides={"num_heads": 4})
    encoder = unmask.load(folder)
    assert encoder(torch.randn(2, 3, 32, 32)).shape == (2, 32)
    assert encoder.preprocessing.mean == (0.485, 0.456, 0.406)


def test_a_checkpoint_with_something_left_over_is_refused_whole(tmp_path):
    state = official_mae()
    state["model"]["blocks.0.attn.extra"] = torch.zeros(3)
    torch.save(state, tmp_path / "mae.pth")
    with pytest.raises(unmask.UserError, match="extra"):
        unmask.import_checkpoint("mae", tmp_path / "mae.pth", tmp_path / "model", overrides={"num_heads": 4})
    assert not (tmp_path / "model").exists()
