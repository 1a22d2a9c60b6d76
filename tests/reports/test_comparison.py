import json

import pytest

from unmask.errors import UserError
from unmask.reports.comparison import arms_of, compare, differing, ranked, runs_table
from unmask.reports.runs import read_run


@pytest.fixture
def three(make_run):
    return [
        make_run(name="a", system="mae", top1=0.783),
        make_run(name="b", system="simmim", top1=0.765),
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
    assert (
        "mae has the best features: linear probe, top-1 accuracy 78.3 %, +8.1 points over its random initialisation"
        in page.text
    )
    assert "1.8 points ahead of simmim. Supervised training of the same backbone reaches 87.2 %" in page.text
    assert (
        page.text.index("supervised uses labels 87.2 %")
        < page.text.index("mae 78.3 %")
        < page.text.index("simmim 76.5 %")
    )


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
