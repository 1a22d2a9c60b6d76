import json
import platform
import subprocess
import sys

import pytest

from unmask.errors import UserError
from unmask.reports.report import report
from unmask.reports.runs import find_runs, read_run

KINDS = ["complete", "minimal", "failed", "interrupted", "running", "unlabelled", "stages"]


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_run_gives_a_well_formed_page_that_loads_nothing(make_run, kind, read_page):
    html = report(make_run(kind)).read_text(encoding="utf-8")
    page = read_page(html)
    assert page.wrong == []
    assert page.open == []
    assert all(where.startswith("data:") for where in page.loads), page.loads
    assert len(page.ids) == len(set(page.ids))
    assert "url(http" not in html
    assert "@import" not in html
    assert "{{" not in html
    assert "None" not in page.text


def test_the_headline_says_how_good_the_features_and_the_loss_are(make_run, read_page):
    text = read_page(report(make_run()).read_text()).text
    assert "78.3 % linear probe, top-1 accuracy 8.1 points above the same network at random initialisation" in text
    assert (
        "below the best trivial predictor, bilinear fill: 0.710 (mean of the visible: 0.960; nearest visible patch: 1.21)"
        in text
    )
    assert (
        "A vit_tiny_patch4 (1.23 M parameters) learned from 5 000 images of 28 × 28 pixels for 940 steps of 64 images"
        in text
    )


def test_a_loss_that_is_no_better_than_trivial_is_called_so(make_run, read_page):
    folder = make_run()
    lines = [{"kind": "train", "step": i, "loss": 0.95} for i in range(30)]
    lines.append({"kind": "reference", "step": 0, "values": {"mean of the visible": 0.76}})
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert (
        "25 % above what needs no learning: mean of the visible reaches 0.760"
        in read_page(report(folder).read_text()).text
    )


def test_features_worse_than_random_initialisation_are_called_so(make_run, read_page):
    assert "below the same network at random initialisation" in read_page(report(make_run(top1=0.65)).read_text()).text
    assert "within its noise" in read_page(report(make_run(name="near", top1=0.705)).read_text()).text


def test_a_failed_run_shows_its_error_and_how_to_replay_it(make_run, read_page):
    text = read_page(report(make_run("failed")).read_text()).text
    assert "This run failed at step 131 of 940" in text
    assert "first non-finite tensor: encoder.blocks.3.attn.qkv.weight" in text
    assert "unmask replay " in text


def test_an_interrupted_run_shows_the_command_that_goes_on(make_run, read_page):
    text = read_page(report(make_run("interrupted")).read_text()).text
    assert "Interrupted after step 387 of 940" in text
    assert "unmask train mae --data sample:fashion --out 'runs/my first run' --resume" in text


def test_a_run_that_says_running_is_not_called_done(make_run, read_page):
    assert "Still running, or stopped without a word" in read_page(report(make_run("running")).read_text()).text


def killed(folder, host):
    """A run whose process is gone."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    info = json.loads((folder / "run.json").read_text())
    info |= {"process": {"pid": process.pid, "host": host}, "seconds": 0.0}
    (folder / "run.json").write_text(json.dumps(info))
    return folder


def test_a_run_whose_process_is_gone_is_called_stopped(make_run, read_page):
    folder = killed(make_run("running"), platform.node())
    run = read_run(folder)
    assert run.state == "stopped"
    assert run.seconds == run.last.train[-1]["seconds"] > 0
    assert "It goes on from its last checkpoint" in read_page(report(folder).read_text()).text
    assert read_run(killed(folder, "another machine")).state == "running"


def test_a_run_that_was_stopped_between_two_logs_knows_its_step(make_run):
    folder = make_run("interrupted")
    (folder / "checkpoints").mkdir()
    (folder / "checkpoints" / "latest").write_text("step-00000390\n")
    assert read_run(folder).last.steps_done == 390


def test_one_line_of_metrics_is_told_and_not_drawn(make_run, read_page):
    folder = make_run()
    (folder / "metrics.jsonl").write_text(
        json.dumps({"kind": "train", "step": 6, "epoch": 0.3, "loss": 0.95, "lr": 0.1})
    )
    html = report(folder).read_text()
    assert "One line of metrics was written, at step 6: loss 0.950." in read_page(html).text
    assert "<circle" not in html


def test_what_was_tested_on_what_is_shown(make_run, read_page):
    folder = make_run()
    path = next((folder / "evaluation").glob("linear.json"))
    path.write_text(json.dumps({**json.loads(path.read_text()), "split": "no test split: 80 % to train"}))
    assert "no test split: 80 % to train" in read_page(report(folder).read_text()).text


def test_shares_that_a_system_logs_are_drawn_in_per_cent(make_run):
    folder = make_run()
    lines = [{"kind": "train", "step": i, "loss": 0.95, "top1": 0.1 + 0.002 * i} for i in range(30)]
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert "12\u202f%" in report(folder).read_text()


def test_a_line_that_was_cut_short_is_left_out(make_run):
    assert read_run(make_run("interrupted")).last.train[-1]["step"] == 387


def test_the_first_and_the_last_preview_are_shown(make_run, read_page):
    page = read_page(report(make_run()).read_text())
    assert "Step 0 original what the model saw prediction pasted" in page.text
    assert "Step 940 original" in page.text
    assert "Step 470" not in page.text


def test_a_damaged_picture_is_left_out(make_run, read_page):
    folder = make_run()
    path = folder / "previews" / "00000940-reconstruction.png"
    path.write_bytes(path.read_bytes()[:200])
    assert "Step 940" not in read_page(report(folder).read_text()).text


def test_stages_are_shown_one_after_the_other_and_those_that_have_not_begun(make_run, read_page):
    text = read_page(report(make_run("stages")).read_text()).text
    assert (
        text.index("Stage 1: tokenizer done")
        < text.index("Stage 2: transformer interrupted")
        < text.index("Stage 3: upsampler has not begun")
    )


def test_names_of_files_are_escaped(make_run, read_page):
    html = report(make_run()).read_text()
    assert "<b>0" not in html
    assert "3 files were left out They were left out, each for the reason beside it" in read_page(html).text


def test_without_labels_rankme_is_the_headline(make_run, read_page):
    text = read_page(report(make_run("unlabelled")).read_text()).text
    assert "35.5 RankMe 23.5 above the same network at random initialisation" in text
    assert "top-1" not in text


def test_the_report_goes_where_it_is_asked_to(make_run, tmp_path):
    assert report(make_run(), tmp_path / "new" / "page.html") == tmp_path / "new" / "page.html"
    assert (tmp_path / "new" / "page.html").is_file()
    assert list((tmp_path / "new").iterdir()) == [tmp_path / "new" / "page.html"]


def test_a_folder_that_is_no_run_is_refused_in_one_line(tmp_path):
    with pytest.raises(UserError, match="is no run: it holds no run"):
        report(tmp_path)
    with pytest.raises(UserError, match="no run at"):
        report(tmp_path / "nowhere")
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(UserError, match="damaged"):
        report(tmp_path)


def test_runs_are_found_under_a_folder_and_their_stages_are_not_runs(make_run, tmp_path):
    make_run("complete")
    make_run("stages", name="deep/er/stages")
    assert [p.relative_to(tmp_path).as_posix() for p in find_runs(tmp_path)] == ["complete", "deep/er/stages"]


def test_reports_import_no_torch():
    code = (
        "import sys, unmask.reports.report, unmask.reports.comparison, unmask.reports.tables, unmask.reports.figures; "
        "sys.exit('torch' in sys.modules or 'matplotlib' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def own_metrics(folder, **values):
    for path in (folder / "evaluation").iterdir():
        path.unlink()
    found = {"probe": "own", "measures": {"loss": "nats a letter", "accuracy": "letters found, %"}, **values}
    (folder / "evaluation/own.json").write_text(json.dumps({"lower_is_better": ["loss"], **found}))
    return folder


def test_a_systems_own_metrics_stand_in_their_own_units_beside_the_best_baseline(make_run, read_page):
    baselines = {"one": {"loss": 2.0, "accuracy": 40.5, "inner": 3.0}, "two": {"loss": 1.3, "accuracy": 50.5}}
    run = own_metrics(make_run(), loss=1.5, accuracy=56.7, inner=4.0, baseline=baselines)
    text = read_page(report(run).read_text()).text
    assert "0.200 above two (1.30)" in text
    assert "letters found, % 56.7 40.5 50.5" in text
    assert "How good it is" in text
    assert "the features" not in text
    assert "inner" not in text


def test_data_without_pictures_are_samples(make_run, read_page):
    run = make_run()
    values = json.loads((run / "run.json").read_text())
    values["facts"] = {"count": 12, "columns": ["tokens"]}
    (run / "run.json").write_text(json.dumps(values))
    text = read_page(report(run).read_text()).text
    assert "learned from 12 samples" in text
    assert "samples per second" in text
    assert "images per second" not in text
