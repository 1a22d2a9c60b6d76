"""The documentation builds without a warning and loads nothing from elsewhere."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from unmask import catalog

ROOT = Path(__file__).resolve().parents[2]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("material") is None,
        reason="mkdocs-material is not installed: pip install 'unmask[docs]'",
    ),
]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    out = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(out)]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, check=False, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return out


def test_every_system_has_a_page(site):
    for card in catalog.list_systems():
        assert card.title.split(":")[0][:20] in (site / "systems" / card.slug / "index.html").read_text(
            encoding="utf-8"
        )


def test_every_command_has_its_section(site):
    text = (site / "reference" / "cli" / "index.html").read_text(encoding="utf-8")
    for command in ("train", "eval", "compare", "report", "runs", "reproduce", "replay"):
        assert f'id="unmask-{command}"' in text


def test_no_page_loads_anything_from_elsewhere(site):
    for page in site.rglob("*.html"):
        text = page.read_text(encoding="utf-8")
        assert not re.search(r'<(?:script|img|iframe)[^>]+src="(?:https?:)?//', text), page
        assert not re.search(r'<link[^>]+rel="(?:stylesheet|preload|preconnect)[^>]+href="(?:https?:)?//', text), page
