"""The commands on real, very short runs: results on stdout, talk on stderr, exit code 0."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

from unmask.cli.app import run as command

SMALL = [
    "data.limit=64",
    "backbone.depth=1",
    "decoder.depth=1",
    "train.compile=off",
    "train.precision=fp32",
    "train.probe_every=0",
]
SHORT = ["--steps", "3", "--batch-size", "16", "--device", "cpu"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of MAE and one of the classifier that starts from it, made by the command line."""
    folder = tmp_path_factory.mktemp("made")
    assert command(["train", "mae", *SHORT, *SMALL, "--out", str(folder / "mae")]) == 0
    words = [word for word in SMALL if not word.startswith(("backbone", "decoder"))]
    assert (
        command(["train", "classifier", *SHORT, *words, f"init={folder / 'mae'}", "--out", str(folder / "classifier")])
        == 0
    )
    return folder


@pytest.fixture
def made(finished, tmp_path):
    """The runs, copied into the test's own folder."""
    shutil.copytree(finished, tmp_path / "runs")
    return tmp_path / "runs"


def test_train_ends_with_a_screen_of_numbers_places_and_next_commands(unmask):
    said = unmask("train", "mae", *SHORT, *SMALL)
    assert said.code == 0, said.err
    for words in (
        "3 steps",
        "trivial guess",
        "ridge probe",
        "random initialisation",
        "runs/mae-001/report.html",
        "unmask export runs/mae-001",
    ):
        assert words in said.out
    assert "step 0 of 3" in said.err


def test_train_json_is_one_document(unmask):
    said = unmask("train", "mae", *SHORT, *SMALL, "--out", "here", "--json")
    facts = json.loads(said.out)
    assert (facts["system"], facts["state"], facts["steps"], facts["run"]) == ("mae", "done", 3, "here")
    assert facts["references"]


def test_resume_goes_on(unmask, made):
    said = unmask("train", "mae", "--out", "runs/mae", "--resume", "--steps", "5", "--json")
    assert said.code == 0, said.err
    assert json.loads(said.out)["steps"] == 5


@pytest.mark.slow
def test_eval_shows_the_model_beside_its_random_initialisation(unmask, made):
    said = unmask("eval", "runs/mae", "--probe", "knn")
    assert said.code == 0, said.err
    assert "this model" in said.out
    assert "random initialisation" in said.out
    numbers = json.loads(unmask("eval", "runs/mae", "--probe", "rankme", "--no-baseline", "--json").out)
    assert numbers["rankme"] >= 1


def test_predict_names_the_likeliest_classes(unmask, made, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 255, (28, 28), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "shoe.png")
    said = unmask("predict", "runs/classifier", "shoe.png", "-o", "answers")
    assert said.code == 0, said.err
    assert "shoe.png" in said.out
    assert "%" in said.out
    assert (tmp_path / "answers/shoe.json").is_file()
    assert json.loads(unmask("predict", "runs/classifier", "shoe.png", "--json").out)[0]["file"] == "shoe.png"


def test_predict_of_a_file_that_is_no_image_is_one_line(unmask, made, tmp_path):
    (tmp_path / "notes.png").write_text("not an image")
    said = unmask("predict", "runs/classifier", "notes.png")
    assert said.code == 2
    assert "notes.png" in said.lines[0]


def test_export_import_and_eval_follow_one_another(unmask, made):
    assert unmask("export", "runs/mae", "-o", "taken").out.strip() == "taken"
    assert unmask("eval", "taken", "--data", "sample:fashion", "--probe", "rankme", "--no-baseline").code == 0


def test_report_and_runs_read_what_is_there(unmask, made):
    assert unmask("report", "runs/mae", "runs/classifier", "-o", "both.html").out.strip() == "both.html"
    rows = json.loads(unmask("runs", "runs", "--json").out)
    assert {row["system"] for row in rows} == {"mae", "classifier"}
    assert "mae" in unmask("runs", "runs").out


def test_report_of_a_run_imports_no_torch(made, process):
    code = (
        "import sys; from unmask.cli.app import run; code = run(['report', 'runs/mae']) or run(['runs', 'runs']); "
        "print(code, 'torch' in sys.modules)"
    )
    assert process(code, cwd=made.parent).strip().splitlines()[-1] == "0 False"


def test_doctor_finds_versions_device_and_cache(unmask):
    rows = json.loads(unmask("doctor", "--json").out)
    assert {"unmask", "torch", "device", "matrix product", "UNMASK_DATA", "cache"} <= {row["what"] for row in rows}


@pytest.mark.slow
def test_demo_learns_something_and_says_one_number(unmask):
    said = unmask("demo", "--seconds", "15", "--device", "cpu", "--out", "here", "--json")
    outcome = json.loads(said.out)
    assert outcome["headline"].startswith("A ridge probe")
    assert outcome["loss"] < 1.5


@pytest.mark.slow
def test_compare_trains_each_for_the_same_steps_and_writes_one_page(unmask, tmp_path):
    said = unmask("compare", "mae", "colormae", "--budget", "3steps", "--device", "cpu", "--out", "both", "--json")
    outcome = json.loads(said.out)
    names = [row["name"] for row in outcome["rows"]]
    assert names == ["mae", "colormae", "classifier (trained on labels)", "random initialisation"]
    assert {row["steps"] for row in outcome["rows"][:3]} == {3}
    assert all(0 < row["score"] <= 100 for row in outcome["rows"])
    page = (tmp_path / "both/report.html").read_text()
    for word in ("mae", "colormae", "supervised"):
        assert word in page
    assert (tmp_path / "both/compare.json").is_file()


@pytest.mark.slow
def test_compare_in_time_spends_about_the_same_on_each(unmask):
    said = unmask("compare", "mae", "--budget", "4s", "--device", "cpu", "--out", "timed", "--json")
    rows = json.loads(said.out)["rows"]
    assert [row["name"] for row in rows] == ["mae", "classifier (trained on labels)", "random initialisation"]
    assert all(row["steps"] >= 1 for row in rows[:2])


def test_ctrl_c_saves_says_how_to_go_on_and_the_run_goes_on(tmp_path):
    """A real process and a real signal."""
    words = [
        "train",
        "mae",
        "--steps",
        "100000",
        "--batch-size",
        "16",
        "--device",
        "cpu",
        "--out",
        "run",
        "train.log_every=1",
        *SMALL,
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-m", "unmask", *words],
        cwd=tmp_path,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    metrics = tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not (metrics.is_file() and len(metrics.read_text().splitlines()) > 3):
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert out == ""
    assert "--resume" in err.splitlines()[-1]
    info = json.loads((tmp_path / "run/run.json").read_text())
    assert info["state"] == "interrupted"
    done = int((tmp_path / "run/checkpoints/latest").read_text().strip().removeprefix("step-"))
    assert command(["train", "mae", "--out", str(tmp_path / "run"), "--resume", "--steps", str(done + 1)]) == 0
    assert json.loads((tmp_path / "run/run.json").read_text())["state"] == "done"


def test_eval_takes_options_of_the_probe(unmask, made):
    words = ["probe.k=3", "probe.limit=50"]
    said = unmask("eval", "runs/mae", "--data", "sample:fashion", "--probe", "knn", "--no-baseline", "--json", *words)
    assert said.code == 0, said.err
    scores = json.loads(said.out)
    assert (scores["settings"]["k"], scores["train_samples"], scores["test_samples"]) == (3, 50, 50)
    assert "did you mean k" in unmask("eval", "runs/mae", "--probe", "knn", "probe.kk=3").err
    assert "write --seed" in unmask("eval", "runs/mae", "--probe", "knn", "probe.seed=3").err
