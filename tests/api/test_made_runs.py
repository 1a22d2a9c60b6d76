"""``unmask.train``: layers of options, folders, and what a run leaves."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image
from small_runs import QUIET, SHORT, SMALL

import unmask
from unmask.api.plan import plan
from unmask.api.training import _free_folder


def test_a_run_leaves_model_encoder_probe_and_report(mae_run):
    for name in (
        "run.json",
        "metrics.jsonl",
        "model/model.safetensors",
        "encoder/config.json",
        "report.html",
        "evaluation/ridge.json",
    ):
        assert (mae_run / name).is_file()
    info = json.loads((mae_run / "run.json").read_text())
    assert (info["system"], info["state"], info["recipe"], info["steps"]) == ("mae", "done", "tiny", 4)
    assert info["config"]["data"]["limit"] == 64
    scores = json.loads((mae_run / "evaluation/ridge.json").read_text())
    assert "random initialisation" in scores["baseline"]


def test_words_win_over_options_and_options_over_the_recipe():
    recipe = plan("mae").last.train
    assert plan("mae", batch_size=32).last.train.batch_size == 32 != recipe.batch_size
    assert plan("mae", batch_size=32, overrides=["train.batch_size=16"]).last.train.batch_size == 16
    assert plan("mae", overrides={"mask_ratio": 0.6}).last.model.mask_ratio == 0.6
    assert plan("mae", overrides=["backbone.depth=2"]).last.model.backbone.depth == 2


def test_epochs_replace_the_recipe_s_steps_and_steps_its_epochs():
    assert plan("mae", epochs=3).last.train.steps is None
    assert plan("mae", steps=3).last.train.epochs is None
    assert plan("mae", overrides=["train.epochs=2"]).last.train.steps is None


def test_a_shorter_run_of_a_recipe_has_a_warm_up_in_proportion():
    whole, half = plan("mae").last.train, plan("mae", steps=plan("mae").last.train.steps // 2).last.train
    assert half.warmup_steps == whole.warmup_steps / 2
    assert plan("mae", steps=100, overrides=["train.warmup_steps=7"]).last.train.warmup_steps == 7


def test_another_backbone_brings_its_own_options():
    backbone = plan("mae", backbone="vit_micro_patch7").last.model.backbone
    assert (backbone.name, backbone.model_extra) == ("vit_micro_patch7", {})


def test_channels_and_size_come_from_the_data():
    backbone = plan("mae").last.model.backbone
    assert (backbone.in_channels, tuple(backbone.image_size)) == (1, (28, 28))


def test_a_recipe_file_is_a_recipe(tmp_path):
    lines = [
        "system: mae",
        "data: {uri: 'sample:fashion', image_size: 32}",
        "model: {backbone: vit_nano_patch8}",
        "train: {steps: 3, batch_size: 8}",
    ]
    (tmp_path / "mine.yaml").write_text("\n".join(lines))
    made = plan(tmp_path / "mine.yaml")
    assert made.recipe == "mine"
    assert (made.last.train.steps, made.last.data.image_size) == (3, 32)


def test_runs_are_numbered_from_the_last(tmp_path):
    assert _free_folder("mae", tmp_path).name == "mae-001"
    (tmp_path / "mae-007").mkdir()
    assert _free_folder("mae", tmp_path).name == "mae-008"


@pytest.fixture
def grey_folder(tmp_path):
    folder = tmp_path / "grey"
    folder.mkdir()
    for number in range(40):
        pixels = np.random.default_rng(number).integers(0, 65535, (150, 200), dtype=np.uint16)
        Image.fromarray(pixels).save(folder / f"{number:02d}.png")
    return folder


def test_auto_on_a_folder_of_grey_16_bit_images_trains_and_says_why_in_three_lines(grey_folder, tmp_path):
    said = []
    words = {"decoder.depth": 1, "backbone.depth": 1, "train.probe_every": 0, "train.compile": "off"}
    run = unmask.train(
        "mae", grey_folder, out=tmp_path / "run", steps=2, device="cpu", overrides=words, talk=said.append
    )
    assert len([line for line in said if line.startswith("auto: ")]) == 3
    info = json.loads((run / "run.json").read_text())
    assert info["recipe"] == "auto"
    assert len(info["auto"]) == 3
    backbone = info["config"]["model"]["backbone"]
    assert (backbone["in_channels"], backbone["image_size"]) == (1, [88, 112])
    assert (run / "evaluation/rankme.json").is_file()


def test_a_longer_run_goes_on_where_it_was_and_says_the_same_twice(tmp_path):
    run = unmask.train("mae", out=tmp_path / "run", overrides=SMALL, probe=False, **SHORT, **QUIET)
    again = unmask.train("mae", out=run, resume=True, steps=6, probe=False, **QUIET)
    assert again == run
    info = json.loads((run / "run.json").read_text())
    assert (info["state"], info["steps"]) == ("done", 6)
    assert info["config"]["model"]["backbone"]["depth"] == 1


def test_a_run_alone_says_what_to_resume(tmp_path):
    run = unmask.train("mae", out=tmp_path / "run", overrides=SMALL, probe=False, **SHORT, **QUIET)
    unmask.train(run, resume=True, steps=5, probe=False, **QUIET)
    assert json.loads((run / "run.json").read_text())["steps"] == 5


def test_resuming_as_another_system_is_refused(mae_run):
    with pytest.raises(unmask.UserError, match="is a run of mae, not of classifier"):
        unmask.train("classifier", out=mae_run, resume=True)


def test_the_same_seed_trains_the_same_weights(tmp_path):
    states = []
    for name in ("a", "b"):
        run = unmask.train("mae", out=tmp_path / name, overrides=SMALL, probe=False, **SHORT, **QUIET)
        states.append(unmask.load(run).state_dict())
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


def test_python_and_command_line_make_the_same_run(tmp_path, monkeypatch):
    from unmask.cli.app import run as command

    monkeypatch.chdir(tmp_path)
    words = [f"{key}={value}" for key, value in SMALL.items()]
    assert (
        command(["train", "mae", "--steps", "4", "--batch-size", "16", "--device", "cpu", "--out", "typed", *words])
        == 0
    )
    called = unmask.train("mae", out="called", overrides=SMALL, probe=False, **SHORT, **QUIET)
    typed, called = unmask.load("typed").state_dict(), unmask.load(called).state_dict()
    assert all(torch.equal(typed[key], called[key]) for key in typed)


STAGES = """
system: classifier
stages:
- name: learn
  entry: unmask.systems.pretraining.mae.model:MAE
  data: {uri: "sample:fashion", image_size: 28, limit: 64}
  model: {backbone: {name: vit_nano_patch4, depth: 1}, decoder: {embed_dim: 32, depth: 1, num_heads: 2}}
  train: {steps: 3, batch_size: 16, compile: off, probe_every: 0, device: cpu}
- name: tune
  from: {init: learn}
  data: {uri: "sample:fashion", image_size: 28, limit: 64}
  model: {backbone: {name: vit_nano_patch4, depth: 1}, mixup: 0, cutmix: 0}
  train: {steps: 3, batch_size: 16, compile: off, probe_every: 0, device: cpu}
"""


def test_a_recipe_of_two_stages_hands_on_what_it_learned_and_goes_on(tmp_path):
    (tmp_path / "two.yaml").write_text(STAGES)
    run = unmask.train(tmp_path / "two.yaml", out=tmp_path / "run", probe=False, **QUIET)
    info = json.loads((run / "run.json").read_text())
    assert (info["state"], info["stages"]) == ("done", ["learn", "tune"])
    assert unmask.load(run, whole=True).slug == "classifier"
    before = (run / "stages/learn/model/model.safetensors").read_bytes()
    unmask.train(tmp_path / "two.yaml", out=run, resume=True, overrides=["tune.train.steps=5"], probe=False, **QUIET)
    assert json.loads((run / "stages/tune/run.json").read_text())["steps"] == 5
    assert (run / "stages/learn/model/model.safetensors").read_bytes() == before
    assert (run / "report.html").is_file()
