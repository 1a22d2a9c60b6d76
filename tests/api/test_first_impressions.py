"""What a person who never used the library sees: warnings before a training, the last screen, going on, loading again."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image
from small_runs import QUIET

import unmask
from unmask.api.auto import Machine, choose
from unmask.api.closing import facts, screen
from unmask.api.plan import plan
from unmask.contracts import DataFacts, Preprocessing
from unmask.reports.runs import read_run

LAPTOP = Machine("cpu", cores=2)
BASE = {"data": {"augment": "shift_flip"}, "model": {}, "train": {"batch_size": 128, "lr": 1e-3}}
NANO = {"backbone": "vit_nano_patch8", "train.compile": "off", "train.probe_every": 0}


def photos(folder, count, plain=False):
    folder.mkdir()
    for number in range(count):
        noise = np.random.default_rng(number).integers(0, 255, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(np.full_like(noise, 7 * number) if plain else noise).save(folder / f"{number}.png")
    return folder


def doubts(folder):
    return plan("mae", data=folder, batch_size=2, overrides=NANO).notes


def test_plain_and_few_and_unreadable_images_are_told_before_the_training(tmp_path):
    assert "one plain colour" in doubts(photos(tmp_path / "plain", 20, plain=True))[0]
    assert "3 images are few" in doubts(photos(tmp_path / "few", 3))[0]
    broken = photos(tmp_path / "broken", 20)
    for number in range(2):
        path = broken / f"{number}.png"
        path.write_bytes(path.read_bytes()[:100])
    (note,) = doubts(broken)
    assert note.startswith("skipped 2 of 20 images: ")
    assert note.endswith("(2): see skipped.json in the run")


@pytest.mark.parametrize(
    ("given", "said", "unsaid"),
    [
        ({"data": {"image_size": 96}}, "the image size is yours", "affordable"),
        ({"data": {"image_size": [96, 90]}, "model": {"backbone": "vit_tiny_patch32"}}, "yours", "(0 patches"),
        ({"model": {"init": "runs/x", "backbone": "vit_tiny_patch4"}}, "starts from", "you asked"),
        ({"train": {"lr": 1e-3}}, "your rate stands", "the recipe's"),
    ],
)
def test_auto_says_because_only_of_what_it_chose(given, said, unsaid):
    known = DataFacts("folder", 300, 3, sizes=((150, 200),) * 3, bit_depth=8)
    lines = choose(known, LAPTOP, BASE, {"data": {}, "model": {}, "train": {}, **given}).lines
    assert said in "\n".join(lines)
    assert unsaid not in "\n".join(lines)


def test_one_loss_everywhere(mae_run):
    loss = read_run(mae_run).last.final_loss()[0]
    assert facts(mae_run)["loss"] == loss
    assert f"loss {loss:.4g}" in screen(mae_run)


def test_a_classifier_says_first_how_often_it_is_right(classifier_run):
    kept = json.loads((classifier_run / "evaluation/accuracy.json").read_text())
    assert kept["probe"] == "accuracy"
    assert sum(map(sum, kept["confusion"])) == kept["test_samples"]
    lines = screen(classifier_run).splitlines()
    (place,) = [i for i, line in enumerate(lines) if "right on" in line]
    assert f"{100 * kept['top1']:.1f} %" in lines[place]
    assert "ridge probe" in lines[place + 1]
    assert "--to onnx" in screen(classifier_run)  # its encoder has no last norm, timm's has


@pytest.mark.parametrize("word", ["mask_ratio=0.5", "data.flip=0.1"])
def test_a_run_goes_on_with_the_options_it_began_with(mae_run, word):
    with pytest.raises(unmask.UserError, match=f"goes on with {word.split('=')[0]}="):
        unmask.train(mae_run, resume=True, overrides=[word], **QUIET)


def test_a_run_that_is_done_is_not_probed_again(mae_run):
    before = {p: p.stat().st_mtime_ns for p in (mae_run / "evaluation").iterdir()}
    said: list[str] = []
    unmask.train(mae_run, resume=True, talk=said.append)
    assert len(said) == 1
    assert "already done" in said[0]
    assert {p: p.stat().st_mtime_ns for p in (mae_run / "evaluation").iterdir()} == before


def test_an_export_for_timm_comes_back_with_the_same_features(tmp_path):
    encoder = unmask.load("vit_nano_patch8", image_size=16)
    encoder.preprocessing = Preprocessing((0.5,) * 3, (0.25,) * 3, (16, 16))
    unmask.export(encoder, to="timm", out=tmp_path / "timm")
    again = unmask.load(tmp_path / "timm")
    images = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(again(images), encoder(images), rtol=1e-4, atol=1e-4)
    assert again.preprocessing == encoder.preprocessing
    with pytest.raises(unmask.UserError, match="holds a model already"):
        unmask.export(encoder, out=tmp_path / "timm")


def test_an_onnx_export_is_for_onnxruntime(tmp_path):
    (tmp_path / "config.json").write_text('{"format": "onnx"}')
    with pytest.raises(unmask.UserError, match="onnxruntime"):
        unmask.load(tmp_path)


def test_preprocessing_standardises_pixels():
    known = Preprocessing((0.5,) * 3, (0.25,) * 3, (4, 4))
    out = known.standardise(torch.full((1, 3, 4, 4), 255, dtype=torch.uint8))
    torch.testing.assert_close(out, torch.full((1, 3, 4, 4), 2.0))


def test_steps_of_the_wrong_type_are_refused_in_one_line():
    with pytest.raises(unmask.UserError, match="steps='x' does not fit"):
        unmask.train("mae", "sample:fashion", steps="x", **QUIET)


def test_weights_that_cannot_be_had_name_the_way_without_them(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(unmask.UserError, match="pretrained=false"):
        unmask.load("timm/resnet10t")
