"""The examples do what they say."""

from __future__ import annotations

import runpy
from pathlib import Path

from unmask.api.plan import plan

EXAMPLES = Path(__file__).parents[2] / "examples"


def test_the_bare_loop_learns(capsys):
    runpy.run_path(str(EXAMPLES / "bare_loop.py"), run_name="__main__")
    losses = [float(line.rpartition(" ")[2]) for line in capsys.readouterr().out.splitlines()]
    assert losses[-1] < losses[0]


def test_the_recipe_file_is_valid():
    made = plan(EXAMPLES / "my_recipe.yaml")
    assert made.last.model.mask_ratio == 0.6
