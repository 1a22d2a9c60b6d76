"""``predict``: options, folders that can be gone on with, overlays, joint questions; nothing half-written."""

from __future__ import annotations

import json
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from PIL import Image

import unmask
from unmask import config as configs
from unmask.api.predicting import progress
from unmask.cli.commands.predicting import sorted_words
from unmask.config import Field
from unmask.contracts import Trainable
from unmask.errors import UserError
from unmask.systems.prediction.inputs import read_image
from unmask.systems.prediction.results import Result, Segmentation


class Ask(configs.Config):
    level: int = Field(100, ge=0, le=255, description="grey level from which a pixel is light")


class Lightness(Trainable):
    """Which pixels are light. Remembers what it was asked."""

    slug = "lightness"
    Ask = Ask
    predict_batch: ClassVar[int] = 2

    def __init__(self, value: float = 0.0):
        super().__init__(configs.Config())
        self.weight = torch.nn.Parameter(torch.tensor(value))
        self.seen: list[Any] = []
        self.stop_after: int | None = None

    def predict(self, inputs: list[Any], *, level: int) -> list[Result]:
        if self.stop_after is not None and len(self.seen) >= self.stop_after:
            raise KeyboardInterrupt
        self.seen += inputs
        out = []
        for place, item in enumerate(inputs):
            image, name = read_image(item, place)
            picture = np.repeat(image[..., :1], 3, -1)
            out.append(
                Segmentation((image[..., 0] >= level).astype(int), ("dark", "light"), source=name, image=picture)
            )
        return out


class Together(Lightness):
    joint = True
    suffixes = (".fasta",)
    Ask = None

    def predict(self, inputs: list[Any]) -> list[Result]:
        return [Result(source=f"pair-{i}") for i in range(len(inputs) + 1)]


@pytest.fixture
def photos(tmp_path):
    (tmp_path / "in").mkdir()
    for i in range(5):
        Image.fromarray(np.full((8, 12), 40 * i, np.uint8)).save(tmp_path / "in" / f"{i}.png")
    return tmp_path / "in"


def test_every_answer_is_saved_with_a_picture_and_a_line(photos, tmp_path):
    results = unmask.predict(Lightness(), photos, out=tmp_path / "out", level=70)
    assert [r.map.max() for _, r in results] == [0, 0, 1, 1, 1]
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"results.jsonl"} | {
        f"{i}{ending}" for i in range(5) for ending in (".json", ".png", ".overlay.png")
    }
    head, *rows = [json.loads(line) for line in (tmp_path / "out/results.jsonl").read_text().splitlines()]
    assert head["made_by"]["options"] == {"level": 70}
    assert [row["words"] for row in rows][:3] == ["dark 100 %", "dark 100 %", "light 100 %"]


def test_overlays_can_be_left_out(photos, tmp_path):
    unmask.predict(Lightness(), photos, out=tmp_path / "out", overlay=False)
    assert not list((tmp_path / "out").glob("*.overlay.png"))


def test_a_stopped_prediction_goes_on_where_it_was(photos, tmp_path):
    model = Lightness()
    model.stop_after = 2
    with pytest.raises(KeyboardInterrupt):
        unmask.predict(model, photos, out=tmp_path / "out")
    assert len(list((tmp_path / "out").glob("?.json"))) == 2
    again = Lightness()
    results = unmask.predict(again, photos, out=tmp_path / "out")
    assert [p.name for p in again.seen] == ["2.png", "3.png", "4.png"]
    assert [r.plain()["task"] for _, r in results] == ["semantic"] * 5
    assert results[0][1].words() == "dark 100 %"


def test_an_input_that_changed_is_looked_at_again(photos, tmp_path):
    unmask.predict(Lightness(), photos, out=tmp_path / "out")
    Image.fromarray(np.full((9, 12), 255, np.uint8)).save(photos / "0.png")
    again = Lightness()
    results = unmask.predict(again, photos, out=tmp_path / "out")
    assert [p.name for p in again.seen] == ["0.png"]
    assert results[0][1].words() == "light 100 %"


def test_another_question_is_not_mixed_in(photos, tmp_path):
    unmask.predict(Lightness(), photos, out=tmp_path / "out")
    with pytest.raises(UserError, match="level=100, now 7"):
        unmask.predict(Lightness(), photos, out=tmp_path / "out", level=7)
    with pytest.raises(UserError, match="other weights"):
        unmask.predict(Lightness(1.0), photos, out=tmp_path / "out")


def test_nothing_of_somebody_elses_is_written_over(photos):
    before = (photos / "0.png").read_bytes()
    with pytest.raises(UserError, match=r"0.png, which would be written over"):
        unmask.predict(Lightness(), photos, out=photos)
    assert (photos / "0.png").read_bytes() == before
    assert not (photos / "results.jsonl").exists()


def test_files_of_one_name_get_names_of_their_own(photos, tmp_path):
    (tmp_path / "more").mkdir()
    Image.new("L", (4, 4)).save(tmp_path / "more/0.png")
    Image.new("L", (4, 4)).save(tmp_path / "more/0.bmp")
    unmask.predict(Lightness(), [photos / "0.png", tmp_path / "more"], out=tmp_path / "out")
    assert {p.name for p in (tmp_path / "out").glob("*.json")} == {"0.json", "more-0.json", "more-0-png.json"}


def test_a_bad_file_is_found_before_anything_is_predicted(photos, tmp_path):
    (photos / "9.png").write_text("no picture")
    model = Lightness()
    with pytest.raises(UserError, match=r"9.png cannot be read"):
        unmask.predict(model, photos, out=tmp_path / "out")
    assert model.seen == []
    assert not (tmp_path / "out").exists()


def test_an_unknown_option_is_one_line(photos):
    with pytest.raises(UserError, match="did you mean level"):
        unmask.predict(Lightness(), photos, levle=3)
    with pytest.raises(UserError, match="level=300"):
        unmask.predict(Lightness(), photos, level=300)
    with pytest.raises(UserError, match="takes none"):
        unmask.predict(Together(), photos, level=300)


def test_a_joint_question_takes_all_files_and_names_its_answers(tmp_path):
    for name in ("a.fasta", "b.fasta", "c.txt"):
        (tmp_path / name).write_text(">x\nAC\n")
    results = unmask.predict(Together(), tmp_path, out=tmp_path / "out")
    assert [name for name, _ in results] == ["pair-0", "pair-1", "pair-2"]
    assert {p.name for p in (tmp_path / "out").glob("*.json")} == {f"pair-{i}.json" for i in range(3)}
    assert len(unmask.predict(Together(), tmp_path, out=tmp_path / "out")) == 3


def test_arrays_are_numbered(tmp_path):
    results = unmask.predict(Lightness(), [np.zeros((4, 4), np.uint8), Image.new("L", (5, 5))], out=tmp_path / "out")
    assert len(results) == 2
    assert (tmp_path / "out/input-1.json").is_file()
    with pytest.raises(UserError, match="input-0 already"):
        unmask.predict(Lightness(), [np.zeros((4, 4), np.uint8)], out=tmp_path / "out")


def test_a_system_by_name_is_built_from_its_options(photos):
    with pytest.raises(UserError, match='no option "clases" in classifier: did you mean classes'):
        unmask.predict("classifier", photos, clases=3)
    with pytest.raises(UserError, match="predicts nothing"):
        unmask.predict("mae", photos)
    with pytest.raises(UserError, match=r"no checkpoint absent\.pth"):
        unmask.predict("classifier", photos, weights="absent.pth")
    with pytest.raises(UserError, match="goes with the name of a system"):
        unmask.predict(photos, photos, weights="absent.pth")
    said: list[str] = []
    from unmask.api.predicting import predict_each

    options = {"backbone.name": "vit_nano_patch4", "backbone.image_size": 16, "classes": 3}
    results = list(predict_each("classifier", photos / "0.png", options=options, talk=said.append))
    assert len(results[0][1].probabilities) == 3
    assert "random initialisation" in said[0]


def test_words_with_an_equals_sign_are_options_unless_there_is_such_a_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "k=1.png").touch()
    options, files = sorted_words(["a.png", "task=panoptic", "k=1.png", "model.depth=3"])
    assert options == {"task": "panoptic", "model.depth": 3}
    assert [str(f) for f in files] == ["a.png", "k=1.png"]
    with pytest.raises(UserError, match="give files"):
        sorted_words(["task=panoptic"])


def test_progress_tells_the_rate_and_the_time_left():
    assert progress(10, 40, 5.0) == "10 of 40, 2.0 a second, 15 s left"
    assert progress(1, 101, 4.0) == "1 of 101, 4.0 s each, 7 min left"


class Slow(Lightness):
    def predict(self, inputs: list[Any], *, level: int, tell: Any = None) -> list[Result]:
        if tell is not None:
            tell(f"{inputs[0].name}: 1 of 2 tiles")
        return super().predict(inputs, level=level)


def test_a_system_that_tells_of_its_progress_is_heard(photos):
    told: list[str] = []
    unmask.predict(Slow(), photos, tell=told.append)
    assert told[0] == "1 of 5: 0.png: 1 of 2 tiles"
    assert told[1].startswith("1 of 5, ")
    assert [t for t in told if "tiles" in t] == [f"{i + 1} of 5: {i}.png: 1 of 2 tiles" for i in (0, 2, 4)]
    told.clear()
    unmask.predict(Slow(), photos / "3.png", tell=told.append)
    assert told[0] == "3.png: 1 of 2 tiles"


def test_what_a_model_that_predicts_nothing_is_for(photos):
    class Maker(Trainable):
        slug = "maker"

        def generate(self, n: int, draw: Any) -> list[Any]:
            return []

    with pytest.raises(UserError, match="maker predicts nothing by itself, it makes: unmask generate"):
        unmask.predict(Maker(configs.Config()), photos)


def test_a_joint_answer_in_one_file_is_not_written_over_another(tmp_path):
    (tmp_path / "a.fasta").write_text(">x\nAC\n")
    (tmp_path / "mine.csv").write_text("mine")
    with pytest.raises(UserError, match=r"mine\.csv exists and would be written over"):
        unmask.predict(Together(), tmp_path / "a.fasta", out=tmp_path / "mine.csv")
    assert (tmp_path / "mine.csv").read_text() == "mine"
