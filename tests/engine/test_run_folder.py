import errno
import json
import os
import subprocess
from pathlib import Path

import pytest
import torch

from unmask.engine import checkpoint, stages
from unmask.engine import run as folders
from unmask.engine.display import SilentDisplay
from unmask.engine.distributed import Place
from unmask.engine.stages import train
from unmask.errors import UserError

from .toys import losses, same, stage, weights


def run(out, *stages, **options):
    return train(list(stages), out, describe={"system": "toy"}, display=SilentDisplay(), **options)


def no_space(*_, **__):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_folders_that_are_not_ours_are_refused_and_left_alone(tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.txt").write_text("mine")
    with pytest.raises(UserError, match="no run of ours"):
        run(tmp_path / "photos", stage())
    assert [p.name for p in (tmp_path / "photos").iterdir()] == ["a.txt"]
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file"):
        run(tmp_path / "file", stage())


def test_a_run_is_not_overwritten_and_an_empty_folder_is_taken(tmp_path):
    (tmp_path / "run").mkdir()
    out = run(tmp_path / "run", stage(steps=2))
    with pytest.raises(UserError, match="--resume"):
        run(out, stage(steps=2))


def test_resume_needs_a_run(tmp_path):
    with pytest.raises(UserError, match="absent"):
        run(tmp_path / "none", stage(), resume=True)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="empty"):
        run(tmp_path / "empty", stage(), resume=True)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "run.json").write_text('{"kind": "jog"}')
    with pytest.raises(UserError, match="no run"):
        run(tmp_path / "other", stage(), resume=True)


def test_a_run_of_another_system_or_another_batch_is_not_resumed(tmp_path):
    out = run(tmp_path / "run", stage(steps=4))
    with pytest.raises(UserError, match="is a run of toy, not of mae"):
        train([stage(steps=8)], out, describe={"system": "mae"}, resume=True, display=SilentDisplay())
    before = (out / "run.json").read_text()
    with pytest.raises(UserError, match=r"batch_size was 8 .* resume with train\.batch_size=8"):
        run(out, stage(steps=8, batch_size=16), resume=True)
    assert (out / "run.json").read_text() == before  # a refusal changes nothing: it goes on as if nobody had asked
    run(out, stage(steps=8), resume=True)


def test_a_system_that_cannot_be_built_leaves_nothing(tmp_path):
    bad = stage()

    def build():
        raise UserError("patch 16 does not divide image size 225")

    bad.build = build
    with pytest.raises(UserError, match="patch 16"):
        run(tmp_path / "run", bad)
    assert not (tmp_path / "run").exists()


def test_an_unwritable_place_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(UserError, match="not writable"):
        run(tmp_path / "run", stage())
    assert not (tmp_path / "run").exists()


def test_metrics_are_cut_at_the_checkpoint(tmp_path):
    folder = folders.create(tmp_path / "run", {})
    for step in range(5):
        folder.log({"kind": "train", "step": step, "loss": float("nan")})
    with (folder.path / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "st')
    assert [r["step"] for r in folders.read_metrics(folder.path)] == list(range(5))
    folder.cut_metrics(2)
    assert [json.loads(line) for line in (folder.path / "metrics.jsonl").read_text().splitlines()] == [
        {"kind": "train", "step": s, "loss": None} for s in range(3)
    ]


def test_the_resume_command_is_the_command_with_resume():
    info = {"command": ["/usr/bin/unmask", "train", "mae", "--data", "my photos"]}
    assert folders.resume_command(info, Path("runs/x")) == "unmask train mae --data 'my photos' --out runs/x --resume"
    info["command"] += ["--out", "y", "--resume"]
    assert folders.resume_command(info, Path("y")) == "unmask train mae --data 'my photos' --out y --resume"


@pytest.mark.parametrize("broken", ["save_tensors", "save_plain", "replace_file", "_force"])
def test_a_full_disk_leaves_the_checkpoint_before_it_whole(tmp_path, monkeypatch, broken):
    straight = run(tmp_path / "straight", stage())
    out, real = tmp_path / "run", checkpoint.write

    def full(root, step, *rest):
        with monkeypatch.context() as m:
            if step == 8:
                m.setattr(checkpoint, broken, no_space)
            return real(root, step, *rest)

    with monkeypatch.context() as m:
        m.setattr(checkpoint, "write", full)
        with pytest.raises(UserError, match="the disk is full") as error:
            run(out, stage())
    assert "\n" not in str(error.value)
    assert checkpoint.whole_checkpoints(out / "checkpoints")[0].name == "step-00000004"
    assert not list((out / "checkpoints").glob(".writing*"))
    assert folders.read_run(out)["state"] == "failed"
    run(out, stage(), resume=True)
    assert same(weights(straight), weights(out))
    assert losses(straight) == losses(out)


@pytest.mark.parametrize("size", ["100k", "200k", "300k"])
def test_a_disk_that_really_fills_up_leaves_a_whole_checkpoint(tmp_path, size):
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(disk)], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting a small disk needs root")
    try:
        with pytest.raises(UserError, match="the disk is full"):
            run(disk / "run", stage(model={"hidden": 64}, save_every=1, keep_last=9, steps=30, preview_every=0))
        for folder in (disk / "run" / "checkpoints").glob("step-*"):
            assert checkpoint.is_whole(folder)
            assert checkpoint.load_tensors(folder / "model.safetensors")
            assert checkpoint.load_plain(folder / "rank-00000.pt")
        assert not list((disk / "run" / "checkpoints").glob(".writing*"))
        assert json.loads((disk / "run" / "run.json").read_text())
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_damaged_checkpoint_is_passed_over(tmp_path):
    straight = run(tmp_path / "straight", stage())
    out = run(tmp_path / "run", stage(steps=8))
    damaged = out / "checkpoints" / "step-00000008" / "model.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-10])
    assert [p.name for p in checkpoint.whole_checkpoints(out / "checkpoints")] == ["step-00000004"]
    for path in (out / "checkpoints").glob("step-*/state.json"):
        path.unlink()
    with pytest.raises(UserError, match="damaged"):
        run(out, stage(), resume=True)
    assert straight


def test_generators_come_back(tmp_path):
    import random

    import numpy as np

    checkpoint.save_plain(checkpoint.generators(torch.device("cpu")), tmp_path / "g.pt")
    drawn = (torch.rand(3).tolist(), np.random.rand(3).tolist(), random.random())
    checkpoint.restore_generators(checkpoint.load_plain(tmp_path / "g.pt"), torch.device("cpu"))
    assert drawn == (torch.rand(3).tolist(), np.random.rand(3).tolist(), random.random())


def test_tied_weights_are_saved(tmp_path):
    shared = torch.arange(6.0)
    checkpoint.save_tensors({"a": shared, "b": shared, "part": shared[:3], "word": "x"}, tmp_path / "s.safetensors")
    state = checkpoint.load_tensors(tmp_path / "s.safetensors")
    assert torch.equal(state["a"], state["b"])
    assert state["part"].tolist() == [0, 1, 2]
    assert state["word"] == "x"


def test_a_damaged_checkpoint_takes_no_place_of_a_whole_one(tmp_path):
    for step in (1, 2, 3):
        folder = tmp_path / checkpoint.step_name(step)
        folder.mkdir()
        folders.write_json(folder / "state.json", {"files": {}, "step": step})
    (tmp_path / "step-00000003" / "state.json").write_text("{")
    checkpoint.prune(tmp_path, 2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000001", "step-00000002"]


def test_who_writes_a_run_is_told_while_it_runs(tmp_path):
    folder = folders.create(tmp_path / "begun", {})
    assert folder.info["process"]["pid"] == os.getpid()
    done = run(tmp_path / "done", stage(steps=2))
    assert folders.read_run(done)["process"] is None


@pytest.mark.parametrize("first", [True, False])
def test_every_process_leaves_when_the_first_cannot_write_a_run(tmp_path, first):
    class Two(Place):
        world = 2
        rank = 0 if first else 1

        def gathered(self, value):
            return [value if first else "the disk is full", None]

    place = Two(None, "fp32", sharded=False)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file" if first else "the disk is full"):
        stages._created(tmp_path / "file", {}, place)


@pytest.mark.parametrize("first", [True, False])
def test_every_process_leaves_when_the_first_cannot_make_the_folder(tmp_path, first):
    (tmp_path / "checkpoints").write_text("a file in the way")

    class Two:
        """One of two processes; the first one met a read-only disk."""

        world = 2

        def barrier(self):
            raise AssertionError("the other process never comes here")

        def gathered(self, value):
            return [("Read-only file system", True), value]

    place = Two()
    place.first = first
    with pytest.raises(UserError, match="the disk refuses"):
        checkpoint.write(tmp_path / "checkpoints", 1, lambda _folder: pytest.fail("nothing to fill"), {}, place)
