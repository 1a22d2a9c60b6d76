"""``list``, ``info``, ``--help``: fast, without torch, and teaching."""

import json
import time

import pytest

# Processor time, not the clock's: other tests may be using the cores.
HEAVY = ("torch", "timm", "accelerate", "datasets", "numpy", "matplotlib", "transformers")


def test_import_unmask_imports_no_torch_and_takes_under_half_a_second(process):
    code = (
        "import time, sys; s = time.process_time(); import unmask; t = time.process_time() - s; "
        f"print(t, [m for m in {HEAVY} if m in sys.modules])"
    )
    seconds, modules = process(code).split(" ", 1)
    assert modules.strip() == "[]"
    assert float(seconds) < 0.5


def test_list_imports_no_torch_and_takes_under_half_a_second(process):
    code = (
        "import sys, time; s = time.process_time(); from unmask.cli.app import run; code = run(['list']); "
        f"t = time.process_time() - s; print(code, t, [m for m in {HEAVY} if m in sys.modules])"
    )
    best = 9.0
    for _ in range(3):
        code_, seconds, modules = process(code).strip().splitlines()[-1].split(" ", 2)
        assert code_ == "0"
        assert modules == "[]"
        best = min(best, float(seconds))
    assert best < 0.5


def test_list_shows_every_card_and_json_is_one_document(unmask):
    said = unmask("list")
    assert said.code == 0
    assert "mae" in said.out
    cards = json.loads(unmask("list", "--json").out)
    assert {"mae", "simmim", "colormae", "swin", "vit", "classifier"} <= {card["slug"] for card in cards}


def test_list_of_a_verb_nobody_serves_says_so_on_stderr(unmask, monkeypatch):
    monkeypatch.setattr("unmask.catalog.cards", dict)
    said = unmask("list", "--verb", "generate")
    assert (said.code, said.out) == (0, "")
    assert "no installed system" in said.err


def test_info_names_paper_recipes_and_options(unmask):
    said = unmask("info", "mae")
    assert said.code == 0
    for word in ("arxiv.org/abs/2111.06377", "tiny", "paper", "mask_ratio", "0.75", "decoder.depth"):
        assert word in said.out
    assert json.loads(unmask("info", "mae", "--json").out)["year"] == 2022


COMMANDS = [
    "list",
    "info",
    "train",
    "eval",
    "predict",
    "compare",
    "report",
    "runs",
    "replay",
    "export",
    "import",
    "reproduce",
    "demo",
    "doctor",
]


@pytest.mark.parametrize("command", COMMANDS)
def test_help_teaches_with_one_real_command(unmask, command):
    said = unmask(command, "--help")
    assert said.code == 0
    assert f"Example: unmask {command}" in " ".join(said.out.split())


def test_version(unmask):
    from unmask import __version__

    assert unmask("--version").out.strip() == __version__


def test_every_name_of_the_package_is_found_where_it_says():
    import unmask as package

    for name in package.__all__:
        assert getattr(package, name) is not None


def test_version_in_the_package_is_that_of_the_distribution():
    import tomllib
    from pathlib import Path

    import unmask as package

    project = tomllib.loads((Path(package.__file__).parents[1] / "pyproject.toml").read_text())
    assert project["project"]["version"] == package.__version__


def test_list_is_quick_in_this_process(unmask):
    start = time.process_time()
    unmask("list")
    assert time.process_time() - start < 0.5


def test_info_tells_what_a_prediction_and_its_data_take(unmask):
    said = unmask("info", "hat").out
    for words in ("option of predict", "ensemble", "option of its data", "data.degradation"):
        assert words in said
    said = unmask("info", "dit").out
    assert "option of generate" in said
    assert "option of its data" not in said
