import json

import pytest
import torch
from safetensors.torch import save_file

from unmask.engine import failure
from unmask.engine.checkpoint import whole_checkpoints
from unmask.engine.display import SilentDisplay
from unmask.engine.failure import StepFailed, replay
from unmask.engine.run import read_run
from unmask.engine.stages import train
from unmask.errors import UserError

from .toys import Toy, lines, stage


def fails(out, *stages, **options) -> StepFailed:
    with pytest.raises(StepFailed) as error:
        train(list(stages), out, describe={"system": "toy"}, display=SilentDisplay(), **options)
    assert "\n" not in str(error.value)
    return error.value


class Sick(Toy):
    """A block whose output is infinite once its input passes a bound."""

    slug = "sick"

    def __init__(self, config):
        super().__init__(config)
        self.calls = 0
        self.blocks[1].register_forward_hook(lambda m, a, o: o / 0 if self.calls >= 6 else o)

    def loss(self, batch, draw, progress=None, phase="main"):
        self.calls = progress.step
        return super().loss(batch, draw, progress, phase)


class Steep(Toy):
    """A loss that is finite and whose gradient is not."""

    slug = "steep"

    def loss(self, batch, draw, progress=None, phase="main"):
        out = super().loss(batch, draw, progress, phase)
        if progress.step == 6:
            zero = (self.head.bias * 0).sum()
            out["loss"] = out["loss"] + zero.sqrt() * 0
        return out


@pytest.mark.parametrize("accumulate", [1, 2])
def test_an_infinite_loss_stops_at_its_step_and_keeps_the_checkpoint_before(tmp_path, accumulate):
    error = fails(tmp_path / "run", stage(model={"break_at": 6}, accumulate=accumulate))
    assert (error.step, error.tensor) == (7, "loss 'loss'")
    assert "unmask replay" in str(error)
    assert "checkpoint of step 4 is kept" in str(error)
    assert read_run(tmp_path / "run")["state"] == "failed"
    assert [line["step"] for line in lines(tmp_path / "run", "train")] == list(range(1, 7))
    kept = whole_checkpoints(tmp_path / "run" / "checkpoints")
    assert kept[0].name == "step-00000004"


def test_the_failed_step_is_repeated_from_its_file(tmp_path):
    fails(tmp_path / "run", stage(model={"break_at": 6}))
    again = replay(tmp_path / "run")
    assert (again["step"], again["found"], again["same"]) == (7, "loss 'loss'", True)
    healthy = replay(tmp_path / "run", model=Toy(Toy.Config()))
    assert (healthy["found"], healthy["same"]) == (None, False)
    assert torch.isfinite(torch.tensor(healthy["loss"]))


def test_the_repeated_loss_is_the_loss_of_that_step(tmp_path):
    """With the weights, the batch and the draws of the step, a healthy model gives what the run without the fault logged."""
    straight = train([stage()], tmp_path / "straight", describe={}, display=SilentDisplay())
    fails(tmp_path / "run", stage(model={"break_at": 6}))
    healthy = replay(tmp_path / "run", model=Toy(Toy.Config()))
    assert healthy["loss"] == pytest.approx(lines(straight, "train")[6]["loss"], rel=1e-6)


def test_the_first_culprit_is_named(tmp_path):
    assert fails(tmp_path / "a", stage(data={"poison": 5})).tensor == "batch.image"
    assert fails(tmp_path / "b", stage(Sick)).tensor == "output of blocks.1"
    assert fails(tmp_path / "c", stage(Steep)).tensor == "gradient of head.bias"


def test_a_broken_parameter_is_named():
    model = Toy(Toy.Config())
    with torch.no_grad():
        model.head.weight[0, 0] = float("inf")
    from unmask.contracts import Progress
    from unmask.draw import Seeded

    found = failure.examine(model, {"image": torch.ones(2, 8)}, Seeded(0), Progress(), "main")
    assert found.tensor == "parameter head.weight"


def test_a_failed_run_goes_on_from_its_checkpoint(tmp_path):
    fails(tmp_path / "run", stage(model={"break_at": 6}))
    out = train([stage()], tmp_path / "run", describe={"system": "toy"}, display=SilentDisplay(), resume=True)
    assert [line["step"] for line in lines(out, "train")] == list(range(1, 13))
    assert read_run(out)["state"] == "done"


def test_nothing_to_replay_is_told(tmp_path):
    out = train([stage(steps=2)], tmp_path / "run", describe={}, display=SilentDisplay())
    with pytest.raises(UserError, match="nothing to replay"):
        replay(out)


def test_a_device_that_is_read_late_names_the_right_step_and_keeps_the_weights(tmp_path, monkeypatch):
    """On a GPU flags are read when a line of metrics is due; here the CPU plays the GPU."""
    from unmask.engine import loop

    class LateDevice:
        type = "late"

    real = loop.Training.apply

    def late(self, *args):
        device, self.device = self.device, LateDevice()
        try:
            real(self, *args)
        finally:
            self.device = device

    def check(self):
        if int(self.first_bad) >= 0:
            self.fail(int(self.first_bad), "main", None)

    monkeypatch.setattr(loop.Training, "apply", late)
    monkeypatch.setattr(loop.Training, "check", check)
    error = fails(tmp_path / "run", stage(model={"break_at": 5}, log_every=4))
    assert error.step == 6
    assert replay(tmp_path / "run")["same"]
    straight = train([stage()], tmp_path / "straight", describe={}, display=SilentDisplay())
    healthy = replay(tmp_path / "run", model=Toy(Toy.Config()))
    assert healthy["loss"] == pytest.approx(lines(straight, "train")[5]["loss"], rel=1e-6)


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ("someones_module:System", "no installed system"),
        ("unmask.errors:nearest", "no system that can be trained"),
    ],
)
def test_a_foreign_failed_step_runs_no_code_of_its_own(tmp_path, monkeypatch, entry, words):
    (tmp_path / "someones_module.py").write_text("raise SystemError('foreign code ran')")
    monkeypatch.syspath_prepend(tmp_path)
    about = {"entry": entry, "config": {}, "precision": "fp32"}
    save_file({"batch.image": torch.zeros(1)}, tmp_path / failure.STEP_FILE, metadata={"unmask": json.dumps(about)})
    with pytest.raises(UserError, match=words):
        replay(tmp_path)
