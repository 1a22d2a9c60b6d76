import json
import time

import numpy as np
import pytest
import torch
from PIL import Image

from unmask.engine.display import SilentDisplay
from unmask.engine.run import Interrupted, read_run, stage_folder
from unmask.engine.stages import train
from unmask.errors import UserError

from .toys import Rivals, StopAfter, Toy, Width, lines, losses, same, stage, weights


def run(out, *stages, **options):
    return train(
        list(stages),
        out,
        describe={"system": "toy", "command": ["unmask", "train", "toy"]},
        display=SilentDisplay(),
        **options,
    )


def test_the_loss_falls_and_the_folder_holds_what_a_reader_needs(tmp_path):
    out = run(tmp_path / "run", stage(steps=60, preview_every=30))
    values = losses(out)
    assert np.mean(values[-8:]) < 0.5 * np.mean(values[:8])
    info = read_run(out)
    assert (info["state"], info["steps"], info["seed"], info["system"]) == ("done", 60, 0, "toy")
    assert info["parameters"] == sum(p.numel() for p in Toy(Toy.Config()).parameters())
    first = lines(out, "train")[0]
    assert {
        "step",
        "epoch",
        "loss",
        "lr",
        "grad_norm",
        "images_per_second",
        "memory_mb",
        "seconds",
        "size",
    } <= first.keys()
    assert lines(out, "reference")[0]["values"].keys() == {"zero", "one"}
    assert lines(out, "reference")[0]["units"] == "squared units"
    sheet = Image.open(out / "previews" / "00000030-values.png")
    about = json.loads((out / "previews" / "00000030-values.json").read_text())
    assert sheet.height == 2 * 96 + 4
    assert (about["columns"], about["rows"], about["caption"]) == (["input"], 2, "what went in")


def test_the_time_of_probes_is_not_taken_off_the_time_of_steps(tmp_path):
    def slow(model, progress):
        time.sleep(0.2)
        return {"width": 1.0}

    slow.every = lambda settings: settings.probe_every
    out = run(tmp_path / "run", stage(steps=3, log_every=100, probe_every=100, monitors=[slow]))
    (line,) = lines(out, "train")
    assert 0 < line["images_per_second"] < 1e7


@pytest.mark.parametrize("accumulate", [2, 4])
def test_accumulated_micro_batches_equal_one_batch(tmp_path, accumulate):
    whole = run(tmp_path / "whole", stage())
    parts = run(tmp_path / "parts", stage(accumulate=accumulate))
    assert losses(parts) == pytest.approx(losses(whole), abs=1e-5)


def test_metrics_of_many_steps_are_their_mean(tmp_path):
    each = losses(run(tmp_path / "each", stage()))
    some = losses(run(tmp_path / "some", stage(log_every=4)))
    assert some == pytest.approx([np.mean(each[i : i + 4]) for i in (0, 4, 8)], rel=1e-5)


@pytest.mark.parametrize(
    "options",
    [
        {"ema": 0.9, "log_every": 5},
        {"accumulate": 2, "optimizer": "lamb"},
        {"optimizer": "lars"},
        {"optimizer": "sgd", "data": {"streaming": True}},
        {"model": {"dropout": 0.3}, "precision": "bf16"},
    ],
)
def test_a_stopped_run_resumes_to_the_same_weights_and_metrics(tmp_path, options):
    straight = run(tmp_path / "straight", stage(**options))
    with pytest.raises(Interrupted, match="--resume") as left:
        run(tmp_path / "cut", stage(monitors=[StopAfter(7)], **options))
    assert left.value.exit_code == 130
    assert read_run(tmp_path / "cut")["state"] == "interrupted"
    cut = run(tmp_path / "cut", stage(**options), resume=True)
    assert same(weights(straight), weights(cut))
    assert losses(straight) == losses(cut)
    assert read_run(cut)["state"] == "done"


def test_probes_and_previews_leave_the_training_as_it_was(tmp_path):
    options = {"model": {"dropout": 0.3}}
    plain = run(tmp_path / "plain", stage(preview_every=0, probe_every=0, reference_every=0, **options))
    looked = run(
        tmp_path / "looked", stage(preview_every=1, reference_every=1, probe_every=1, monitors=[Width()], **options)
    )
    assert same(weights(plain), weights(looked))


def test_monitors_run_before_the_first_step_at_their_interval_and_at_the_end(tmp_path):
    monitor = Width()
    out = run(tmp_path / "run", stage(probe_every=5, monitors=[monitor]))
    assert monitor.seen == [0, 5, 10, 12]
    assert [line["step"] for line in lines(out, "probe")] == [0, 5, 10, 12]


def test_averaged_weights_are_what_is_exported_and_probed(tmp_path):
    out = run(tmp_path / "run", stage(ema=0.9))
    state = tmp_path / "run" / "checkpoints" / "step-00000012"
    from safetensors.torch import load_file

    average, present = load_file(state / "ema.safetensors"), load_file(state / "model.safetensors")
    assert same(weights(out), present | average)
    assert not same(weights(out), present)
    assert present.keys() - average.keys() == {"momentum"}, "buffers are not averaged"


def test_the_average_is_the_written_formula(tmp_path):
    from unmask.engine.ema import Ema

    model = Toy(Toy.Config())
    ema, expected = Ema(model, 0.75), model.head.weight.detach().clone()
    for _ in range(3):
        with torch.no_grad():
            model.head.weight.add_(1.0)
        ema.update()
        expected = 0.75 * expected + 0.25 * model.head.weight.detach()
    present = model.head.weight.detach().clone()
    with ema.in_place():
        torch.testing.assert_close(model.head.weight.detach(), expected)
    assert torch.equal(model.head.weight.detach(), present)


def test_each_phase_has_its_optimiser(tmp_path):
    out = run(tmp_path / "run", stage(Rivals, steps=40))
    told = lines(out, "train")
    assert {"loss", "critic.loss", "critic.grad_norm"} <= told[0].keys()
    assert told[-1]["critic.loss"] < told[0]["critic.loss"]
    names = {p.name for p in (out / "checkpoints" / "step-00000040").iterdir()}
    assert {"optimizer-main.pt", "optimizer-critic.pt"} <= names


def test_the_last_checkpoints_and_the_best_are_kept(tmp_path):
    monitor = Width()
    monitor.__class__ = type("Peak", (Width,), {"__call__": lambda s, m, p: {"top1": -abs(p.step - 4)}})
    out = run(tmp_path / "run", stage(steps=12, save_every=2, probe_every=2, best="top1", monitors=[monitor]))
    kept = sorted(p.name for p in (out / "checkpoints").glob("step-*"))
    assert kept == ["step-00000004", "step-00000010", "step-00000012"]
    assert (out / "checkpoints" / "best").read_text().strip() == "step-00000004"
    assert read_run(out)["exported_step"] == 4
    from safetensors.torch import load_file

    assert same(weights(out), load_file(out / "checkpoints" / "step-00000004" / "model.safetensors"))


def test_the_best_loss_is_the_loss_of_the_step_that_is_kept(tmp_path):
    out = run(tmp_path / "run", stage(steps=9, save_every=3, log_every=4, best="loss"))
    told = {line["step"]: line["loss"] for line in lines(out, "train")}
    kept = json.loads((out / "checkpoints" / "step-00000009" / "state.json").read_text())["best"]
    assert told.keys() >= {3, 6, 9}
    assert kept["value"] == told[kept["step"]] == min(told[step] for step in (3, 6, 9))


def test_stages_that_are_done_are_skipped_and_the_others_resumed(tmp_path):
    built = []

    def two(**last):
        first, second = stage(name="first", steps=5), stage(name="second", **last)
        for s in (first, second):
            s.build = lambda s=s, make=s.build: built.append(s.name) or make()
        return first, second

    straight = run(tmp_path / "straight", *two())
    with pytest.raises(Interrupted):
        run(tmp_path / "cut", *two(monitors=[StopAfter(7)]))
    built.clear()
    cut = run(tmp_path / "cut", *two(), resume=True)
    assert built == ["second"]
    assert read_run(cut)["stages"] == ["first", "second"]
    assert read_run(cut)["state"] == "done"
    folders = [stage_folder(out, "second", ["first", "second"]) for out in (straight, cut)]
    assert same(*(weights(f) for f in folders))
    assert read_run(cut / "stages" / "first")["steps"] == 5


def test_resuming_a_finished_run_does_nothing_and_more_steps_go_on(tmp_path):
    out = run(tmp_path / "run", stage(schedule="constant"))
    before = weights(out)
    run(out, stage(schedule="constant"), resume=True)
    assert same(before, weights(out))
    run(out, stage(schedule="constant", steps=20), resume=True)
    assert [line["step"] for line in lines(out, "train")] == list(range(1, 21))


def test_resuming_a_finished_run_with_more_epochs_goes_on(tmp_path):
    out = run(tmp_path / "run", stage(steps=None, epochs=1))
    steps = read_run(out)["steps"]
    run(out, stage(steps=None, epochs=1), resume=True)
    assert len(losses(out)) == steps
    run(out, stage(steps=None, epochs=2), resume=True)
    assert [line["step"] for line in lines(out, "train")] == list(range(1, 2 * steps + 1))


def test_processes_that_disagree_on_the_folder_are_refused(tmp_path, monkeypatch):
    from unmask.engine.distributed import Place

    monkeypatch.setattr(Place, "gathered", lambda self, value: [value, "/elsewhere"])
    with pytest.raises(UserError, match=r"disagree on the run's folder .*/elsewhere.*give all of them one --out"):
        run(tmp_path / "run", stage())
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_compiled_blocks_give_the_same_losses_and_resume_exactly(tmp_path):
    plain = run(tmp_path / "plain", stage(compile="off"))
    straight = run(tmp_path / "straight", stage(compile="on", monitors=[Width()]))
    with pytest.raises(Interrupted):
        run(tmp_path / "cut", stage(compile="on", monitors=[Width(), StopAfter(7)]))
    cut = run(tmp_path / "cut", stage(compile="on", monitors=[Width()]), resume=True)
    assert losses(straight) == pytest.approx(losses(plain), abs=1e-5)
    assert same(weights(straight), weights(cut))
    assert read_run(cut)["machine"]["compiled"]


def test_bf16_trains(tmp_path):
    values = losses(run(tmp_path / "run", stage(precision="bf16", steps=40)))
    assert np.mean(values[-8:]) < np.mean(values[:8])


def test_an_uneven_batch_is_told_before_anything_is_written(tmp_path):
    bad = stage()
    bad.settings = bad.settings.model_copy(update={"accumulate": 3})
    with pytest.raises(UserError, match="does not divide"):
        run(tmp_path / "run", bad)
    assert not (tmp_path / "run").exists()


def test_an_absent_device_is_told(tmp_path):
    if torch.accelerator.is_available():
        pytest.skip("this machine has an accelerator")
    with pytest.raises(UserError, match="use --device cpu"):
        run(tmp_path / "run", stage(device="cuda"))
    with pytest.raises(UserError, match="is no device"):
        run(tmp_path / "run", stage(device="gpu7"))
    with pytest.raises(UserError, match="fp16 needs a GPU"):
        run(tmp_path / "run", stage(precision="fp16"))
    assert not (tmp_path / "run").exists()


def test_tensorboard_gets_the_metrics(tmp_path):
    pytest.importorskip("tensorboard")
    out = run(tmp_path / "run", stage(trackers=["tensorboard"]))
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(next((out / "trackers").rglob("events*")).parent))
    events.Reload()
    assert [round(e.value, 5) for e in events.Scalars("train/loss")] == [round(x, 5) for x in losses(out)]


def test_a_tracker_without_its_package_names_the_extra(tmp_path, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match=r"pip install 'unmask\[track\]'"):
        run(tmp_path / "run", stage(trackers=["wandb"]))
