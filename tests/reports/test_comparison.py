import json

import pytest

from unmask.errors import UserError
from unmask.reports.comparison import arms_of, best_of, compare, differing, ranked, runs_table, verdict
from unmask.reports.findings import beside
from unmask.reports.runs import read_run


@pytest.fixture
def three(make_run):
    return [
        make_run(name="a", system="mae", top1=0.783),
        make_run(name="b", system="simmim", top1=0.725),
        make_run(name="c", system="classifier", top1=0.872),
    ]


def test_the_page_ranks_the_methods_and_sets_supervised_training_apart(three, tmp_path, read_page):
    path = compare(three, tmp_path / "both.html")
    page = read_page(path.read_text())
    assert page.wrong == []
    assert page.open == []
    assert all(where.startswith("data:") for where in page.loads)
    assert len(page.ids) == len(set(page.ids))
    assert page.text.startswith("mae and simmim on sample:fashion")
    assert "2 methods and the supervised arm of vit_tiny_patch4" in page.text
    assert (
        "mae has the best features: linear probe, top-1 accuracy 78.3 %, +8.1 points over its random initialisation"
        in page.text
    )
    assert "5.8 points ahead of simmim. Supervised training of the same backbone reaches 87.2 %" in page.text
    assert (
        page.text.index("supervised uses labels 87.2 %")
        < page.text.index("mae 78.3 %")
        < page.text.index("simmim 72.5 %")
    )


def sentence(make_run, *values, **edits):
    runs = [make_run(name=f"{i}", system=("mae", "simmim")[i], top1=v) for i, v in enumerate(values)]
    for folder in runs:
        path = folder / "evaluation" / "linear.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **edits}))
    measured = ranked(arms_of([read_run(r) for r in runs]))
    return verdict(measured).replace("\u202f", " "), best_of(measured)


def test_nothing_is_best_that_does_not_beat_its_random_initialisation(make_run):
    text, best = sentence(make_run, 0.6, 0.65)
    assert best is None
    assert text.startswith(
        "Neither simmim nor mae beats random initialisation: linear probe, top-1 accuracy 65.0 % "
        "(−5.2 points over its random initialisation) and 60.0 % (−10.2 points)"
    )


def test_nothing_is_best_by_less_than_the_noise(make_run):
    text, best = sentence(make_run, 0.79, 0.785)
    assert best is None
    assert text.startswith("No difference that this test can show between mae and simmim: linear probe")


def test_few_test_images_show_no_small_gain(make_run):
    text, best = sentence(make_run, 0.75, 0.725, test_samples=40)
    assert best is None
    assert "Neither mae nor simmim beats random initialisation by more than the noise" in text
    assert "Measured on 40 test images: ± 13.9 points each" in text


def test_a_loss_is_below_or_above_without_a_sign():
    assert [beside(x, 1.0) for x in (0.59, 1.7, 1.001)] == ["41 % below", "70 % above", "level"]


def test_a_folder_as_target_gets_comparison_html(three, tmp_path):
    assert compare(three, tmp_path / "page") == tmp_path / "page" / "comparison.html"


def test_runs_of_one_system_are_told_apart_by_their_folders(make_run):
    runs = [read_run(make_run(name=n)) for n in ("ratio-25", "ratio-75")]
    assert [a.label for a in arms_of(runs)] == ["ratio-25", "ratio-75"]


def test_options_that_differ_are_listed_and_others_are_not(make_run):
    folders = [make_run(name=n) for n in ("one", "two")]
    info = json.loads((folders[1] / "run.json").read_text())
    info["config"]["model"]["mask_ratio"] = 0.25
    info["config"]["model"]["extra"] = True
    (folders[1] / "run.json").write_text(json.dumps(info))
    shared, own = differing(arms_of([read_run(f) for f in folders]))
    assert shared == [("model.mask_ratio", ["0.75", "0.25"])]
    assert own == [("model.extra", ["–", "yes"])]


def test_runs_without_a_shared_probe_come_last(make_run):
    arms = ranked(arms_of([read_run(make_run("minimal", system="simmim")), read_run(make_run(system="mae"))]))
    assert [(a.label, a.probe is not None) for a in arms] == [("mae", True), ("simmim", False)]


def test_a_comparison_of_runs_that_did_not_end_is_still_a_page(make_run, tmp_path, read_page):
    path = compare([make_run("failed"), make_run("minimal", system="simmim"), make_run("stages")], tmp_path / "x.html")
    assert read_page(path.read_text()).wrong == []


def test_one_run_is_no_comparison(make_run, tmp_path):
    with pytest.raises(UserError, match="two runs or more, got 1"):
        compare([make_run()], tmp_path)


def test_the_table_of_runs_holds_the_key_numbers_and_is_plain_json(make_run, tmp_path):
    make_run()
    make_run("stages", name="deep/stages")
    make_run("minimal")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "run.json").write_text("{")
    rows = {r["run"]: r for r in json.loads(json.dumps(runs_table(tmp_path)))}
    assert set(rows) == {"complete", "deep/stages", "minimal", "broken"}
    complete = rows["complete"]
    assert (complete["system"], complete["backbone"], complete["data"], complete["state"]) == (
        "mae",
        "vit_tiny_patch4",
        "sample:fashion",
        "done",
    )
    assert (complete["steps"], complete["reference"], complete["probe"], complete["score"]) == (
        940,
        0.71,
        "linear probe, top-1 accuracy",
        0.783,
    )
    assert complete["margin"] == pytest.approx(0.081)
    assert rows["broken"]["state"] == "unreadable"
    assert rows["minimal"]["loss"] is None


def test_the_table_of_a_folder_that_is_not_there_is_one_clear_line(tmp_path):
    with pytest.raises(UserError, match="no folder"):
        runs_table(tmp_path / "nowhere")


def test_of_a_loss_the_lower_is_better(make_run):
    runs = [make_run(name=name, system=name) for name in ("mae", "simmim")]
    for run, value in zip(runs, (14.0, 12.5), strict=True):
        for path in (run / "evaluation").iterdir():
            path.unlink()
        found = {"probe": "own", "measures": {"perplexity": "perplexity"}, "perplexity": value}
        (run / "evaluation/own.json").write_text(json.dumps({**found, "lower_is_better": ["perplexity"]}))
    arms = ranked(arms_of([read_run(r) for r in runs]))
    assert [a.label for a in arms] == ["simmim", "mae"]
    assert verdict(arms).startswith("simmim is best: perplexity 12.5, 1.50 ahead of mae.")
    assert verdict(arms[:1]).startswith("simmim was measured alone: perplexity 12.5.")
