"""A system that learns from something else than images, and measures itself: planned, trained, evaluated, claimed."""

import json
import textwrap

import pytest

import unmask
from unmask import catalog
from unmask.api.plan import plan
from unmask.errors import UserError

MODEL = """
import numpy as np
import torch
from torch import nn

from unmask.config import Config, Field
from unmask.contracts import DataFacts, Trainable
from unmask.data.mapped import Mapped
from unmask.errors import UserError


class LineData(Config):
    uri: str = Field("lines:64", description="lines:COUNT")
    split: str = "train"
    limit: int | None = None
    slope: float = 2.0


class Lines(Mapped):
    what = "points"

    def __init__(self, settings, batch_size, seed):
        if settings.split not in ("train", "test"):
            raise UserError(f"no split {settings.split!r}")
        super().__init__(int(settings.uri.partition(":")[2]), batch_size, seed, uri=settings.uri)
        self.settings = settings
        self.facts = DataFacts(uri=settings.uri, count=self.count, extra={"width": 3})

    def fetch(self, indices):
        x = torch.from_numpy(indices.astype(np.float32))[:, None] / self.count
        return {"x": x, "y": self.settings.slope * x}


class Fit(Trainable):
    slug = "fit_a_line"
    Data = LineData
    measures = {"error": "squared error", "slope": "slope found"}
    lower_is_better = frozenset({"error"})

    class Config(Config):
        width: int = 1
        scale: float = 1.0

    def __init__(self, config):
        super().__init__(config)
        self.line = nn.Linear(1, config.width)

    @classmethod
    def open_batches(cls, config, data, batch_size, seed):
        return Lines(data, batch_size, seed)

    @classmethod
    def adapted(cls, config, facts):
        return config.model_copy(update={"width": facts.extra["width"]})

    def loss(self, batch, draw, progress=None, phase="main"):
        return {"loss": (self.line(batch["x"]).mean(1, keepdim=True) - batch["y"]).square().mean()}

    def measure(self, data, draw, *, limit=None, device=None, tell=None, folder=None):
        batch = Lines(data, 8, 0).samples(limit or 16)
        error = float((self.line(batch["x"]).mean(1, keepdim=True) - batch["y"]).square().mean())
        zero = float(batch["y"].square().mean())
        return {"error": error, "slope": float(self.line.weight.mean()), "samples": len(batch["x"]),
                "baseline": {"always zero": {"error": zero}}}
"""
CARD = """
slug = "fit_a_line"
title = "A line"
room = "elsewhere"
entry = "line_system.model:Fit"
hides = "nothing"
"""
RECIPES = """
tiny:
  about: a line
  data: {uri: "lines:64"}
  train: {steps: 60, batch_size: 16, lr: 0.1}
"""


@pytest.fixture
def line(tmp_path, monkeypatch):
    folder = tmp_path / "line_system"
    folder.mkdir()
    (folder / "__init__.py").write_text("")
    (folder / "model.py").write_text(textwrap.dedent(MODEL))
    (folder / "card.toml").write_text(CARD)
    (folder / "recipes.yaml").write_text(RECIPES)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(catalog.cards(), "fit_a_line", catalog.read_card(folder / "card.toml"))
    return tmp_path


def test_it_is_planned_with_its_own_data(line):
    chosen = plan("fit_a_line", overrides=["data.slope=3", "scale=2"])
    stage = chosen.last
    assert stage.data.slope == 3
    assert stage.source is None
    assert stage.model.width == 3, "what the data tells"
    assert stage.batches.steps_per_epoch == 4
    assert plan("fit_a_line", data="lines:32").last.batches.count == 32


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"image_size": 32}, "reads no images"),
        ({"backbone": "vit_nano_patch4"}, "takes no --backbone"),
        ({"overrides": ["data.sloep=3"]}, "did you mean slope"),
        ({"overrides": ["slope=3"]}, "write data.slope=3"),
        ({"overrides": ["data.crop_scale=[0.5,1]"]}, "crop_scale"),
        ({"batch_size": 100}, "more than the 64 points"),
    ],
)
def test_what_does_not_fit_is_said_in_a_line(line, asked, words):
    with pytest.raises(UserError) as error:
        plan("fit_a_line", **asked)
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_it_is_trained_measured_and_reported(line):
    run = unmask.train("fit_a_line", out=line / "run", talk=lambda _: None)
    numbers = json.loads((run / "evaluation" / "own.json").read_text())
    assert numbers["main"] == "error"
    assert numbers["error"] < numbers["baseline"]["always zero"]["error"] / 10
    assert numbers["split"] == "test split"
    report = (run / "report.html").read_text()
    assert "squared error" in report
    assert "always zero" in report
    from unmask.api.closing import screen

    assert "squared error" in screen(run)
    assert "encoder" not in screen(run)


def test_it_is_evaluated_on_other_data_of_its_kind(line):
    run = unmask.train("fit_a_line", out=line / "run", probe=False, talk=lambda _: None)
    assert unmask.evaluate(run)["test_samples"] == 16
    other = unmask.evaluate(run, "lines:20", limit=8, out=line / "elsewhere")
    assert (other["data"], other["test_samples"]) == ("lines:20", 8)
    assert (line / "elsewhere" / "own.json").is_file()
    with pytest.raises(UserError, match="encoder"):
        unmask.evaluate(run, probe="ridge")


def test_a_resume_continues_its_own_data(line):
    run = unmask.train("fit_a_line", out=line / "run", steps=20, probe=False, talk=lambda _: None)
    unmask.train("fit_a_line", out=run, steps=40, resume=True, probe=False, talk=lambda _: None)
    straight = unmask.train("fit_a_line", out=line / "straight", steps=40, probe=False, talk=lambda _: None)
    steps = [json.loads(x) for x in (run / "metrics.jsonl").read_text().splitlines()]
    assert max(s["step"] for s in steps if s["kind"] == "train") == 40
    assert (straight / "model" / "model.safetensors").is_file()
    with pytest.raises(UserError, match="slope"):
        unmask.train("fit_a_line", out=run, resume=True, overrides=["data.slope=5"], talk=lambda _: None)
