import json

import pytest
from PIL import Image

from unmask.errors import UserError
from unmask.reports.figures import arm_values, claim_figure
from unmask.reports.tables import BEGIN, END, refresh_systems, systems_table

RESULT = {
    "slug": "mae",
    "tier": "tiny",
    "verdict": "shown",
    "metric": "ridge",
    "method": "ratio 0.75",
    "seeds": [0, 1, 2],
    "numbers": {"ridge": {"ratio 0.25": [71.2, 72.0, 70.8], "ratio 0.75": [74.8, 75.9, 75.1]}},
}


def test_the_table_names_every_system_with_its_verdict(tmp_path):
    (tmp_path / "mae.json").write_text(json.dumps(RESULT))
    (tmp_path / "notes.json").write_text("[]")
    table = systems_table(tmp_path, link="systems/{slug}.md")
    row = next(line for line in table.splitlines() if line.startswith("| [`mae`]"))
    assert "(systems/mae.md)" in row
    assert "75 % of an image's patches" in row
    assert "https://arxiv.org/abs/2111.06377" in row
    assert row.endswith("| shown (tiny) |")
    assert len({line.count("|") for line in table.split("\n\n")[0].splitlines()}) == 1


def test_a_system_that_was_not_reproduced_is_not_called_shown(tmp_path):
    assert "shown" not in systems_table(tmp_path)


def test_the_table_is_refreshed_between_its_markers_and_only_there(tmp_path):
    page = tmp_path / "README.md"
    page.write_text(f"above\n{BEGIN}\nold\n{END}\nbelow\n")
    assert refresh_systems(page, tmp_path)
    assert page.read_text().startswith(f"above\n{BEGIN}\n| System")
    assert page.read_text().endswith(f"|\n{END}\nbelow\n")
    assert not refresh_systems(page, tmp_path)


def test_a_page_without_markers_is_refused_in_one_line(tmp_path):
    page = tmp_path / "README.md"
    page.write_text("nothing")
    with pytest.raises(UserError, match="no place for the table of systems"):
        refresh_systems(page, tmp_path)


def test_a_claim_is_drawn_as_png_and_svg(tmp_path):
    assert min(Image.open(claim_figure(RESULT, tmp_path / "mae.png")).size) > 300
    assert "<svg" in claim_figure(RESULT, tmp_path / "mae.svg").read_text()
    with pytest.raises(UserError, match=r"ends in \.png"):
        claim_figure(RESULT, tmp_path / "mae.txt")


def test_the_seeds_of_an_arm_are_paired_by_their_numbers():
    runs = [
        {"arm": "a", "seed": 1, "value": 2.0},
        {"arm": "b", "seed": 1, "value": 1.0},
        {"arm": "a", "seed": 0, "value": 3.0},
    ]
    assert arm_values({"metric": "m", "runs": runs}) == {"a": {"1": 2.0, "0": 3.0}, "b": {"1": 1.0}}
    assert arm_values(RESULT)["ratio 0.25"]["2"] == 70.8


def test_a_result_without_values_is_refused_in_one_line():
    with pytest.raises(UserError, match="holds no values of its metric 'top1'"):
        arm_values({"slug": "mae", "metric": "top1"})
