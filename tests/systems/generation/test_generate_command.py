"""``unmask generate`` on a toy: what it leaves, how it goes on, what it refuses."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from toy_generator import toy

import unmask
from unmask.cli.app import run
from unmask.draw import Seeded
from unmask.errors import UserError


def said(capfd, *words):
    capfd.readouterr()
    code = run([str(w) for w in words])
    out, err = capfd.readouterr()
    return code, out, [line for line in err.splitlines() if line.startswith("unmask: ")]


def pixels(path):
    return np.asarray(Image.open(path))


def test_the_command_leaves_images_a_grid_and_what_made_them(toy_folder, tmp_path, capfd):
    words = (
        "-n",
        5,
        "--class",
        "red",
        "--steps",
        3,
        "--guidance",
        2.0,
        "--seed",
        7,
        "--size",
        "8x12",
        "-o",
        tmp_path / "s",
    )
    code, out, _ = said(capfd, "generate", toy_folder, *words, "solver=heun")
    assert code == 0
    assert out.strip() == str(tmp_path / "s")
    assert sorted(p.name for p in (tmp_path / "s").iterdir()) == [
        *(f"{i:05d}.png" for i in range(5)), "grid.png", "made_by.json",
    ]  # fmt: skip
    assert pixels(tmp_path / "s" / "00000.png").shape == (8, 12, 3)
    told = json.loads((tmp_path / "s" / "made_by.json").read_text())
    assert (told["system"], told["state"], told["seed"], told["n"]) == ("toy_generator", "done", 7, 5)
    assert told["images"][4] == {
        "file": "00004.png", "number": 4, "seed": 7, "system": "toy_generator", "class": 1, "class_name": "red",
        "size": [8, 12], "steps": 3, "guidance": 2.0, "options": {"solver": "heun"},
    }  # fmt: skip


def test_an_image_depends_on_the_seed_and_its_number_alone(toy_folder):
    many = unmask.generate(toy_folder, 7, seed=3)
    few = unmask.generate(toy_folder, 3, seed=3, batch=2)
    other = unmask.generate(toy_folder, 3, seed=4)
    for a, b, c in zip(many, few, other, strict=False):
        assert np.abs(a.value.astype(int) - b.value).max() <= 1  # arithmetic of another batch size may round otherwise
        assert np.abs(a.value.astype(int) - c.value).max() > 1
    assert not np.array_equal(many[0].value, many[2].value)


def test_the_default_is_all_classes_in_turn_and_none_is_the_empty_class(toy_folder):
    assert [s.made_by["class"] for s in unmask.generate(toy_folder, 5)] == [0, 1, 0, 1, 0]
    assert [s.made_by["class"] for s in unmask.generate(toy_folder, 3, classes=[1, "BLUE"])] == [1, 0, 1]
    assert unmask.generate(toy_folder, 1, classes="none")[0].made_by["class"] is None


def test_a_stopped_call_goes_on_and_more_images_join(toy_folder, tmp_path):
    whole = unmask.generate(toy_folder, 6, out=tmp_path / "whole", batch=2)
    unmask.generate(toy_folder, 2, out=tmp_path / "parts", batch=2)
    before = (tmp_path / "parts" / "00000.png").stat().st_mtime_ns
    unmask.generate(toy_folder, 6, out=tmp_path / "parts", batch=2)
    assert (tmp_path / "parts" / "00000.png").stat().st_mtime_ns == before
    (tmp_path / "parts" / "00003.png").unlink()
    again = unmask.generate(toy_folder, 6, out=tmp_path / "parts", batch=2)
    for number, sample in enumerate(whole):
        assert np.array_equal(pixels(tmp_path / "parts" / f"{number:05d}.png"), sample.value)
        assert np.array_equal(again[number].value, sample.value)
    assert len(json.loads((tmp_path / "parts" / "made_by.json").read_text())["images"]) == 6


def test_nothing_is_written_over(toy_folder, tmp_path, capfd):
    unmask.generate(toy_folder, 2, out=tmp_path / "s")
    first = pixels(tmp_path / "s" / "00000.png")
    for words, message in (
        (("--seed", 1), "holds images made with seed 0, now seed 1"),
        (("--steps", 2), "now steps=2"),
        (("--class", "red"), "other classes"),
    ):
        code, _, lines = said(capfd, "generate", toy_folder, "-n", 2, "-o", tmp_path / "s", *words)
        assert code == 2
        assert message in lines[0]
    assert np.array_equal(pixels(tmp_path / "s" / "00000.png"), first)
    code, _, _ = said(capfd, "generate", toy_folder, "-n", 2, "-o", tmp_path / "s", "--seed", 1, "--overwrite")
    assert code == 0
    assert not np.array_equal(pixels(tmp_path / "s" / "00000.png"), first)
    (tmp_path / "s" / "made_by.json").unlink()
    code, _, lines = said(capfd, "generate", toy_folder, "-n", 2, "-o", tmp_path / "s")
    assert code == 2
    assert "00000.png exists and was made by something else" in lines[0]


def test_overwrite_leaves_no_image_of_the_call_before(toy_folder, tmp_path):
    unmask.generate(toy_folder, 4, out=tmp_path / "s")
    (tmp_path / "s" / "mine.png").touch()
    unmask.generate(toy_folder, 2, seed=1, out=tmp_path / "s", overwrite=True)
    assert {p.name for p in (tmp_path / "s").glob("*.png")} == {"00000.png", "00001.png", "grid.png", "mine.png"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--class", "5"), "no class 5: this toy_generator has classes 0 ... 1"),
        (("--class", "rde"), "did you mean red?"),
        (("--size", "16x16"), "size 16x16 cannot be made: this toy_generator makes 8x12"),
        (("--size", "wide"), "--size wide is no size"),
        (("--steps", "0"), "steps=0 must be at least 1"),
        (("-n", "0"), "n=0 must be at least 1"),
        (("--batch", "0"), "batch=0"),
        (("--guidance", "-1"), "takes a number from 0"),
        (("solvr=heun",), "did you mean solver?"),
        (("solver=hein",), "solver='hein' does not fit"),
    ],
)
def test_bad_input_is_one_clear_line(toy_folder, tmp_path, capfd, words, message):
    code, out, lines = said(capfd, "generate", toy_folder, "-o", tmp_path / "s", *words)
    assert code == 2
    assert out == ""
    assert len(lines) == 1
    assert message in lines[0]
    assert not (tmp_path / "s").exists()


def test_what_generates_nothing_says_so(tmp_path, capfd):
    code, _, lines = said(capfd, "generate", tmp_path / "none")
    assert code == 2
    assert "no model" in lines[0]


def test_a_model_without_classes_takes_none():
    system = toy(classes=0)
    assert unmask.generate(system, 2)[0].made_by["class"] is None
    with pytest.raises(UserError, match="has learned no classes"):
        unmask.generate(system, 1, classes=1)
    with pytest.raises(UserError, match="needs classes"):
        unmask.generate(system, 1, guidance=3.0)


def test_previews_show_the_same_noise_at_every_look():
    system = toy()
    first, again = (system.preview({}, Seeded(0))[0] for _ in range(2))
    assert len(first.rows) == 2
    assert np.array_equal(first.rows[0][0], again.rows[0][0])
    assert system.training is False


def test_open_options_come_from_the_data_or_are_asked_for():
    from toy_generator import ToyGenerator

    from unmask.contracts import DataFacts

    half = (0.5,) * 3
    facts = DataFacts(channels=3, image_size=(8, 8), classes=("a", "b"), mean=half, std=half)
    config = ToyGenerator.adapted(ToyGenerator.Config(), facts)
    assert (config.classes, config.image_size) == (("a", "b"), (8, 8))
    with pytest.raises(UserError, match="image_size is open"):
        ToyGenerator(ToyGenerator.Config())
    with pytest.raises(UserError, match="normalise=half"):
        ToyGenerator.adapted(ToyGenerator.Config(), DataFacts(mean=(0.1,) * 3, std=half))


DATA = {"image_size": [8, 12], "augment": "none", "normalise": "half", "cache": False}
TRAIN = {
    "steps": 6,
    "batch_size": 8,
    "lr": 1e-3,
    "device": "cpu",
    "precision": "fp32",
    "preview_every": 6,
    "probe_every": 0,
}


def test_a_run_generates_with_its_averaged_weights(installed, pictures, tmp_path):
    recipe = tmp_path / "toy.yaml"
    parts = {"system": "toy_generator", "data": {"uri": str(pictures), **DATA}, "train": {**TRAIN, "ema": 0.9}}
    recipe.write_text(yaml.safe_dump(parts))
    run_folder = unmask.train(str(recipe), out=tmp_path / "run", talk=lambda line: None, probe=False)
    assert list((run_folder / "previews").glob("*samples.png"))
    samples = unmask.generate(run_folder, 2, out=tmp_path / "s")
    from safetensors.torch import load_file

    saved = load_file(run_folder / "model" / "model.safetensors")
    last = max((run_folder / "checkpoints").glob("step-*"))
    average = load_file(last / "ema.safetensors")
    assert torch.equal(saved["outer.weight"], average["outer.weight"])
    assert not torch.equal(saved["outer.weight"], load_file(last / "model.safetensors")["outer.weight"])
    told = json.loads((tmp_path / "s" / "made_by.json").read_text())
    assert (told["step"], told["averaged"]) == (6, 0.9)
    assert samples[1].made_by["class_name"] == "red"


def test_a_tokenizer_is_trained_first_and_lies_in_the_generator(installed, pictures, tmp_path):
    recipe = tmp_path / "toy.yaml"
    tokenizer = {
        "name": "tokenizer",
        "entry": "unmask.systems.generation.first_stage.vq:VQTokenizer",
        "model": {"codes": 8, "code_dim": 4, "width": 8, "multipliers": [1, 2]},
    }
    second = {"name": "transformer", "from": {"tokenizer": "tokenizer"}, "model": {"first_stage": {"kind": "vq"}}}
    common = {"data": {"uri": str(pictures), **DATA}, "train": TRAIN}
    stages = [{**tokenizer, **common}, {**second, **common}]
    recipe.write_text(yaml.safe_dump({"system": "toy_generator", "stages": stages}))
    run_folder = unmask.train(str(recipe), out=tmp_path / "run", talk=lambda line: None, probe=False)
    (run_folder / "stages" / "tokenizer").rename(tmp_path / "elsewhere")  # the generator needs it no longer
    samples = unmask.generate(run_folder, 3)
    assert samples[0].value.shape == (8, 12, 3)
    wrong = [stages[0], {**stages[1], "model": {"first_stage": {"kind": "vq", "codes": 512}}}]
    recipe.write_text(yaml.safe_dump({"system": "toy_generator", "stages": wrong}))
    with pytest.raises(UserError, match="codes=512 does not match"):
        unmask.train(str(recipe), out=tmp_path / "wrong", talk=lambda line: None, probe=False)
