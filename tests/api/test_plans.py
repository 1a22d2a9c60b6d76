"""What a plan leaves out, refuses and lets win, before anything is written."""

from __future__ import annotations

import json
import shutil

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from small_runs import QUIET, SHORT

import unmask
from unmask import catalog
from unmask.api import measuring
from unmask.api.plan import plan
from unmask.data import open as open_data
from unmask.data.opening import train_and_test


def labelled(folder, count=40, name="data.parquet", labels=None):
    """Grey images of two classes in one parquet file, without a test split unless the name says so."""
    draw = np.random.default_rng(0)
    images = [Image.fromarray(draw.integers(0, 255, (16, 16), dtype=np.uint8)) for _ in range(count)]
    table = {"image": images, "label": labels or [i % 2 for i in range(count)]}
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    folder.mkdir(exist_ok=True)
    datasets.Dataset.from_dict(table, features=features).to_parquet(str(folder / name))
    return str(folder / name)


TINY = {"backbone": "vit_nano_patch4", "train.compile": "off", "train.probe_every": 0, "mixup": 0, "cutmix": 0}


def test_a_supervised_run_never_learns_from_the_images_it_is_probed_on(tmp_path):
    said: list[str] = []
    uri = labelled(tmp_path)
    run = unmask.train("classifier", uri, out=tmp_path / "run", overrides=TINY, talk=said.append, **SHORT)
    used = json.loads((run / "run.json").read_text())["config"]["data"]
    assert used["split"] == "train[:80%]"
    assert any("no test split" in line for line in said)
    test = train_and_test(uri)[1]
    learned = open_data(uri, used["split"])
    assert (len(learned), len(test)) == (32, 8)
    files = [{str(one["bytes"]) for one in part.dataset["image"]} for part in (learned, test)]
    assert not files[0] & files[1]
    result = json.loads((run / "evaluation/ridge.json").read_text())
    assert result["test_samples"] == 8
    assert "no test split" in result["split"]


def test_the_user_s_split_and_a_test_split_of_the_data_stand(tmp_path):
    words = {**TINY, "train.batch_size": 8, "train.steps": 2}
    uri = labelled(tmp_path)
    assert (
        plan("classifier", data=uri, overrides={**words, "data.split": "train[:50%]"}).last.data.split == "train[:50%]"
    )
    words.pop("mixup"), words.pop("cutmix")
    assert plan("mae", data=uri, overrides=words).last.data.split == "train"
    both = labelled(tmp_path / "both", name="x-train.parquet")
    labelled(tmp_path / "both", name="x-test.parquet")
    made = plan("classifier", data=both, overrides=words)
    assert (made.last.data.split, made.notes) == ("train", [])


def test_images_without_a_label_are_left_out_and_counted(tmp_path):
    uri = labelled(tmp_path, labels=[None if i % 4 == 0 else i % 2 for i in range(40)])
    made = plan("classifier", data=uri, overrides={**TINY, "train.batch_size": 8})
    assert (made.last.batches.labels >= 0).all()
    assert any("have no label and are left out" in note for note in made.notes)


def test_an_odd_batch_with_mixing_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    words = {"backbone": "vit_nano_patch4", "mixup": 0.8}
    asked = {"batch_size": 15, "steps": 2, "device": "cpu"}
    with pytest.raises(unmask.UserError, match="batch of 15 is odd"):
        unmask.train("classifier", out=tmp_path / "run", overrides=words, **asked, **QUIET)
    assert not (tmp_path / "run").exists()
    assert plan("classifier", overrides={**words, "mixup": 0}, **asked).last.train.batch_size == 15
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(unmask.UserError, match="batch of 5 is odd"):
        plan("classifier", overrides=words, **{**asked, "batch_size": 10})


def test_base_lr_wins_over_a_recipe_s_lr_and_over_auto_s():
    for recipe in ("tiny", "auto"):
        train = plan("mae", recipe=recipe, data="sample:fashion", overrides=["train.base_lr=3e-4"]).last.train
        assert train.lr is None
        assert train.peak_lr == pytest.approx(3e-4 * train.batch_size / 256)
    assert plan("mae", overrides=["train.base_lr=3e-4", "train.lr=2e-3"]).last.train.peak_lr == 2e-3


def test_keyword_options_of_python_are_taken_as_they_are(monkeypatch):
    seen = {}
    monkeypatch.setattr("unmask.api.training.plan", lambda system, **asked: seen.update(asked) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        unmask.train(
            "mae", overrides=["mask_ratio=0.6", "train.steps=3"], cell_size=None, betas=(0.9, 0.99), name="123", **QUIET
        )
    words = {"mask_ratio": 0.6, "train.steps": 3, "cell_size": None, "betas": (0.9, 0.99), "name": "123"}
    assert seen["overrides"] == words


def test_the_probe_at_the_end_looks_at_a_limited_number_of_images_and_says_so(mae_run, tmp_path, monkeypatch):
    run = tmp_path / "run"
    shutil.copytree(mae_run, run)
    monkeypatch.setattr(measuring, "TRAIN", 50)
    monkeypatch.setattr(measuring, "TEST", 20)
    result = measuring.probe_run(run, lambda line: None)
    assert (result["train_samples"], result["test_samples"]) == (50, 20)
    assert "50 of the " in result["split"]


@pytest.mark.parametrize("option", ["num_headz", "backbone"])
def test_an_option_that_a_checkpoint_does_not_take_names_those_it_does(option, tmp_path):
    torch.save({"model": {"x": torch.zeros(1)}}, tmp_path / "mae.pth")
    with pytest.raises(unmask.UserError, match=rf'no option "{option}".*num_heads'):
        unmask.import_checkpoint("mae", tmp_path / "mae.pth", tmp_path / "model", overrides={option: 4})


def test_every_adapter_says_which_options_it_takes():
    for card in catalog.cards().values():
        rules = card.module("official")
        if rules is not None and hasattr(rules, "load_official"):
            assert isinstance(rules.OPTIONS, tuple)
            assert all(isinstance(name, str) for name in rules.OPTIONS)


def test_the_supervised_baseline_is_found_by_its_card():
    assert catalog.supervised().slug == "classifier"
    assert catalog.supervised().learns_from == "labels"
    assert catalog.card("mae").learns_from == "hidden parts"


def test_doctor_names_the_cache_that_is_used(monkeypatch, tmp_path):
    from unmask.data.cache import cache_root

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("UNMASK_CACHE", raising=False)
    (row,) = [row for row in unmask.doctor() if row["what"] == "cache"]
    assert row["found"].startswith(f"{cache_root()} (")


def test_a_folder_to_predict_on_is_read_with_every_suffix_that_data_reads(tmp_path):
    from unmask.api.predicting import expand

    for name in ("a.jfif", "b.ppm", "c.txt", ".d.png"):
        (tmp_path / name).touch()
    assert [path.name for path in expand(tmp_path)] == ["a.jfif", "b.ppm"]


def test_all_images_are_learned_from_where_the_user_says_so_and_the_plan_tells(tmp_path):
    words = {**TINY, "train.batch_size": 8, "train.steps": 2, "data.split": "train"}
    made = plan("classifier", data=labelled(tmp_path), overrides=words)
    assert made.last.batches.facts.count == 40
    assert any("those of the probe among them" in note for note in made.notes)


def test_a_start_without_an_encoder_is_refused_in_a_line(tmp_path, monkeypatch):
    class Maker:
        slug = "maker"

    labelled(tmp_path)
    monkeypatch.setattr("unmask.api.loading.load", lambda *_, **__: Maker())
    with pytest.raises(unmask.UserError, match="init=runs/maker: maker has no encoder to start from"):
        plan("classifier", data=str(tmp_path / "data.parquet"), overrides={"init": "runs/maker"})


def test_a_run_is_no_system(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text("{}")
    with pytest.raises(unmask.UserError, match=r"is a run: go on with unmask train .* --resume"):
        unmask.train(tmp_path / "run", **QUIET)
