"""Every bad input gives one clear line on stderr, exit code 2, and leaves nothing half-written."""

from __future__ import annotations

import os
import pickle

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from unmask.cli.app import run

FAST = ("--steps", "1", "--batch-size", "16", "--device", "cpu", "data.limit=32")


def images(folder, count=4, size=(32, 32)):
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        noise = np.random.default_rng(number).integers(0, 255, (*size, 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / f"{number}.png")
    return folder


def rest(words):
    """Options that would keep the training short if, against all hope, it began."""
    if words[0] != "train":
        return ()
    return tuple(w for i in range(0, 6, 2) if FAST[i] not in words for w in FAST[i : i + 2]) + FAST[6:]


def everything_in(folder):
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*"))


TRAIN = {
    "an unknown system": (["train", "maw"], ["no system", "maw", "mae"]),
    "an unknown recipe": (["train", "mae", "--recipe", "tny"], ['no recipe "tny" in mae', "tiny"]),
    "an unknown option": (["train", "mae", "mask_ration=0.5"], ['no option "mask_ration" in mae', "mask_ratio"]),
    "an unknown nested option": (["train", "mae", "decoder.dept=4"], ["decoder.dept", "mae", "depth"]),
    "an unknown option of the backbone": (["train", "mae", "backbone.dept=4"], ["dept", "depth"]),
    "an unknown option of train": (["train", "mae", "train.stps=4"], ["stps", "train", "steps"]),
    "a bare option of train": (["train", "mae", "lr=0.1"], ["train.lr=0.1"]),
    "a bare option of data": (["train", "mae", "crop_scale=[0.5,1]"], ["data.crop_scale"]),
    "a word without =": (["train", "mae", "mask_ratio"], ["mask_ratio", "key=value"]),
    "an unknown command line option": (["train", "mae", "--stepps", "3"], ["--stepps", "--steps"]),
    "an unknown command": (["trian", "mae"], ['no command "trian"', "train"]),
    "a command line value of the wrong type": (["train", "mae", "--steps", "many"], ["--steps", "integer"]),
    "a size that is none": (["train", "mae", "--image-size", "big"], ["--image-size big", "96x128"]),
    "a value of the wrong type": (["train", "mae", "mask_ratio=high"], ["mask_ratio", "high", "number"]),
    "a training value of the wrong type": (["train", "mae", "train.clip_norm=soft"], ["clip_norm", "soft"]),
    "a rate that is none, with data": (["train", "mae", "--data", "plain", "train.lr=abc"], ["lr", "abc", "number"]),
    "steps that are none, with data": (["train", "mae", "--data", "plain", "train.steps=x"], ["steps", "x", "integer"]),
    "a backbone that is none, with data": (
        ["train", "mae", "--data", "plain", "--backbone", "vit_giant"],
        ["vit_giant"],
    ),
    "a patch that does not divide": (["train", "mae", "--image-size", "30"], ["patch 4 does not divide", "30", "28"]),
    "a ratio above one": (["train", "mae", "mask_ratio=1.5"], ["mask_ratio", "1.5", "less than 1"]),
    "a ratio of zero": (["train", "mae", "mask_ratio=0"], ["mask_ratio", "0", "greater than 0"]),
    "heads that do not divide": (["train", "mae", "backbone.num_heads=5"], ["5", "divide"]),
    "heads of the decoder that do not divide": (["train", "mae", "decoder.num_heads=5"], ["5", "divide"]),
    "an unknown backbone": (
        ["train", "mae", "--backbone", "vit_smal_patch16"],
        ["vit_smal_patch16", "vit_small_patch16"],
    ),
    "an impossible pair": (
        ["train", "mae", "--backbone", "swin_tiny", "--image-size", "64"],
        ["mae", "swin_tiny", "simmim"],
    ),
    "a backbone as a system": (["train", "vit"], ["vit", "backbone", "--backbone"]),
    "a negative length": (["train", "mae", "--steps", "-3"], ["steps", "-3"]),
    "an unknown device": (["train", "mae", "--device", "quantum"], ["quantum", "cpu"]),
    "missing data": (["train", "mae", "--data", "nowhere/photos"], ["nowhere/photos"]),
    "an unknown sample": (["train", "mae", "--data", "sample:fashon"], ["fashon", "fashion"]),
    "a missing recipe file": (["train", "mine.yaml"], ["mine.yaml"]),
    "resume of nothing": (["train", "mae", "--out", "absent", "--resume"], ["absent"]),
    "resume without a run": (["train", "mae", "--resume"], ["--out"]),
    "data without labels for a classifier": (["train", "classifier", "--data", "plain"], ["classifier", "labels"]),
    "an unwritable disk": (["train", "mae", "--out", "/proc/here/run"], ["/proc"]),
    "an output path through a file": (["train", "mae", "--out", "a-file/run"], ["a-file"]),
}


@pytest.mark.parametrize("case", TRAIN)
def test_training(case, unmask, tmp_path):
    words, expected = TRAIN[case]
    images(tmp_path / "plain", count=20)
    (tmp_path / "a-file").write_text("mine")
    before = everything_in(tmp_path)
    said = unmask(*words, *rest(words))
    one_line(said, expected)
    assert everything_in(tmp_path) == before


def one_line(said, expected):
    assert said.code == 2, said.err
    assert said.out == ""
    assert len(said.lines) == 1, said.err
    assert said.lines[0] == said.err.strip().splitlines()[-1]
    for word in expected:
        assert word in said.lines[0], said.lines[0]


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has the GPU that the test asks for in vain")
@pytest.mark.parametrize("device", ["cuda", "cuda:3"])
def test_a_gpu_asked_for_and_absent(unmask, tmp_path, device):
    one_line(unmask("train", "mae", "--device", device), [device, "cpu"])
    assert everything_in(tmp_path) == []


def test_a_recipe_file_with_an_unknown_key(unmask, tmp_path):
    (tmp_path / "mine.yaml").write_text("system: mae\nmodle: {mask_ratio: 0.5}\n")
    one_line(unmask("train", "mine.yaml"), ['no key "modle" in mine.yaml', "model"])


def test_a_recipe_file_without_a_system(unmask, tmp_path):
    (tmp_path / "mine.yaml").write_text("model: {mask_ratio: 0.5}\n")
    one_line(unmask("train", "mine.yaml"), ["mine.yaml", "system"])


def test_a_recipe_file_that_is_not_yaml(unmask, tmp_path):
    (tmp_path / "mine.yaml").write_text("system: [mae\n")
    one_line(unmask("train", "mine.yaml"), ["mine.yaml", "YAML"])


def test_an_empty_folder_of_data(unmask, tmp_path):
    (tmp_path / "photos").mkdir()
    one_line(unmask("train", "mae", "--data", "photos", *FAST), ["photos", "empty"])
    assert everything_in(tmp_path) == ["photos"]


def test_a_folder_where_no_image_can_be_read(unmask, tmp_path):
    (tmp_path / "photos").mkdir()
    for number in range(3):
        (tmp_path / "photos" / f"{number}.png").write_bytes(b"\x89PNG\r\n\x1a\nbroken")
    one_line(unmask("train", "mae", "--data", "photos", *FAST), ["photos"])
    assert not (tmp_path / "runs").exists()


def test_an_output_folder_that_is_not_ours(unmask, tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1.txt").write_text("years of work")
    one_line(unmask("train", "mae", "--out", "thesis", *FAST), ["thesis", "--out"])
    assert everything_in(tmp_path) == ["thesis", "thesis/chapter1.txt"]


def test_resume_from_an_empty_folder(unmask, tmp_path):
    (tmp_path / "empty").mkdir()
    one_line(unmask("train", "mae", "--out", "empty", "--resume"), ["empty"])
    assert everything_in(tmp_path) == ["empty"]


def test_resume_from_a_folder_of_something_else(unmask, tmp_path):
    images(tmp_path / "photos")
    one_line(unmask("train", "mae", "--out", "photos", "--resume"), ["photos"])


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission(unmask, tmp_path):
    (tmp_path / "locked").mkdir(mode=0o500)
    one_line(unmask("train", "mae", "--out", "locked/run", *FAST), ["locked"])


# --- checkpoints ---


def test_a_checkpoint_of_another_system(unmask, tmp_path):
    save_file({"layers.0.blocks.0.attn.qkv.weight": torch.zeros(6, 2)}, tmp_path / "swin.safetensors")
    one_line(unmask("import", "mae", "swin.safetensors", "-o", "model"), ["mae"])
    assert everything_in(tmp_path) == ["swin.safetensors"]


def test_truncated_safetensors(unmask, tmp_path):
    save_file({"patch_embed.proj.weight": torch.zeros(64, 3, 16, 16)}, tmp_path / "whole.safetensors")
    whole = (tmp_path / "whole.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(whole[: len(whole) // 2])
    one_line(unmask("import", "mae", "cut.safetensors", "-o", "model"), ["cut.safetensors"])
    assert not (tmp_path / "model").exists()


def test_corrupted_safetensors(unmask, tmp_path):
    (tmp_path / "bad.safetensors").write_bytes(b"\xff" * 400)
    one_line(unmask("import", "mae", "bad.safetensors", "-o", "model"), ["bad.safetensors"])


class Payload:
    def __reduce__(self):
        return os.mkdir, ("the-code-ran",)


@pytest.mark.parametrize("writer", ["torch", "pickle"])
def test_a_pickle_that_wants_to_run_code(unmask, tmp_path, writer):
    path = tmp_path / "gift.pth"
    if writer == "torch":
        torch.save({"model": Payload()}, path)
    else:
        path.write_bytes(pickle.dumps({"model": Payload()}))
    one_line(unmask("import", "mae", path, "-o", "model"), ["gift.pth"])
    assert everything_in(tmp_path) == ["gift.pth"]


def test_a_missing_checkpoint(unmask):
    one_line(unmask("import", "mae", "absent.pth", "-o", "model"), ["absent.pth"])


def test_a_system_without_official_checkpoints(unmask, tmp_path):
    save_file({"a": torch.zeros(1)}, tmp_path / "a.safetensors")
    one_line(unmask("import", "classifier", "a.safetensors", "-o", "model"), ["classifier"])


# --- the other commands ---

OTHERS = {
    "info of an unknown system": (["info", "colormea"], ["colormea", "colormae"]),
    "list of an unknown verb": (["list", "--verb", "trian"], ["trian", "train"]),
    "eval of nothing": (["eval", "runs/absent", "--data", "sample:fashion"], ["runs/absent"]),
    "eval of nothing on its own data": (["eval", "runs/absent"], ["no folder runs/absent"]),
    "eval without data": (["eval", "vit_nano_patch4"], ["--data"]),
    "eval with an unknown probe": (
        ["eval", "vit_nano_patch4", "--data", "sample:fashion", "--probe", "ridg"],
        ['"ridg"', "ridge"],
    ),
    "eval with an impossible share": (
        ["eval", "vit_nano_patch4", "--data", "sample:fashion", "--labels", "1.5"],
        ["1.5"],
    ),
    "eval of a run with options of a backbone": (
        ["eval", "here.png", "pretrained=false", "--data", "sample:fashion"],
        ["here.png", "pretrained"],
    ),
    "eval of an unknown model of timm": (
        ["eval", "timm/resnet19", "--data", "sample:fashion"],
        ["resnet19", "resnet18"],
    ),
    "eval of a library we do not read": (
        ["eval", "torchvision/resnet81", "--data", "x"],
        ["torchvision", "resnet18"],
    ),
    "predict without a file": (["predict", "vit_nano_patch4", "absent.png"], ["absent.png"]),
    "predict with a backbone": (["predict", "vit_nano_patch4", "here.png"], ["vit_nano_patch4", "run"]),
    "export to an unknown format": (["export", "runs/x", "--to", "onx", "-o", "e"], ['"onx"', "onnx"]),
    "export to nowhere": (["export", "vit_nano_patch4", "--to", "onnx"], ["-o"]),
    "export of nothing": (["export", "runs/absent", "-o", "e"], ["runs/absent"]),
    "report of nothing": (["report", "runs/absent"], ["runs/absent"]),
    "runs of nothing": (["runs", "absent"], ["absent"]),
    "replay of nothing": (["replay", "absent"], ["absent"]),
    "reproduce of an unknown system": (["reproduce", "mea"], ["mea", "mae"]),
    "reproduce of an unknown tier": (["reproduce", "mae", "--tier", "tiniest"], ["tiniest", "tiny"]),
    "compare with an unknown budget": (["compare", "mae", "simmim", "--budget", "5 parsecs"], ["5 parsecs", "5m"]),
    "compare of an unknown system": (["compare", "mae", "simim"], ["simim", "simmim"]),
    "compare of one twice": (["compare", "mae", "mae"], ["twice"]),
    "generate from nothing": (["generate", "runs/x", "-n", "2"], ["runs/x"]),
    "generate with a backbone": (["generate", "vit_nano_patch4"], ["vit_nano_patch4", "run"]),
    "generate no image": (["generate", "runs/x", "-n", "0"], ["n=0", "at least 1"]),
    "generate in no step": (["generate", "runs/x", "--steps", "0"], ["steps=0", "at least 1"]),
    "generate without a size": (["generate", "runs/x", "--size", "wide"], ["wide", "32x48"]),
    "compress": (["compress", "runs/x", "--data", "."], ["no model runs/x"]),
    "explain": (["explain", "runs/x", "here.png"], ["no model runs/x"]),
    "train without a system": (["train"], ["SYSTEM"]),
}


@pytest.mark.parametrize("case", OTHERS)
def test_other_commands(case, unmask, tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "here.png")
    words, expected = OTHERS[case]
    one_line(unmask(*words), expected)
    assert everything_in(tmp_path) == ["here.png"]


def test_something_nobody_foresaw_shows_where_and_exits_with_1(unmask, monkeypatch):
    import unmask as package

    def broken(*_):
        raise RuntimeError("out of ideas")

    monkeypatch.setattr(package, "list_systems", broken, raising=False)
    said = unmask("list")
    assert said.code == 1
    assert "RuntimeError: out of ideas" in said.err
    assert len(said.err.splitlines()) <= 6


@pytest.mark.parametrize("error", [KeyboardInterrupt, KeyboardInterrupt("saved at step 3: go on with --resume")])
def test_ctrl_c_leaves_with_130_and_one_line(unmask, monkeypatch, error):
    import unmask as package

    def stopped(*_):
        raise error

    monkeypatch.setattr(package, "list_systems", stopped, raising=False)
    said = unmask("list")
    assert said.code == 130
    assert len(said.lines) == 1


def test_run_returns_zero_for_help_without_arguments():
    assert run([]) == 0
