"""The pages in a real browser: no console error, every picture drawn."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from PIL import Image

from unmask.reports.comparison import compare
from unmask.reports.report import report

CHROMIUM = "/usr/bin/chromium"
QUIET = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
    "--enable-logging=stderr",
    "--v=0",
]
MARKER = """<script>addEventListener("load", () => {
  const broken = [...document.images].filter((i) => !(i.complete && i.naturalWidth > 0)).length;
  const charts = [...document.querySelectorAll("svg.chart")].filter((s) => s.getBoundingClientRect().width > 0);
  const empty = charts.filter((s) => s.getBBox().width === 0).length;
  const wide = document.documentElement.scrollWidth > document.documentElement.clientWidth ? 1 : 0;
  document.body.dataset.seen =
    `images ${document.images.length} broken ${broken} charts ${charts.length} empty ${empty} overflow ${wide}`;
});</script></body>"""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not Path(CHROMIUM).exists(), reason="no /usr/bin/chromium here: the pages are not seen in a browser"
    ),
]


def browse(page: Path, folder: Path, *flags: str) -> tuple[str, str]:
    """What chromium prints on stdout and stderr."""
    profile = folder / "profile"
    done = subprocess.run(
        [CHROMIUM, *QUIET, f"--user-data-dir={profile}", *flags, page.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    shutil.rmtree(profile, ignore_errors=True)
    return done.stdout, done.stderr


@pytest.fixture(params=["complete", "stages", "failed", "comparison"])
def page(request, make_run, tmp_path):
    if request.param == "comparison":
        runs = [make_run(name=f"runs/{s}", system=s) for s in ("mae", "simmim", "classifier")]
        return compare(runs, tmp_path / "comparison.html")
    return report(make_run(request.param))


@pytest.mark.parametrize("width", [1200, 375])
def test_every_picture_is_drawn_without_a_console_error(page, tmp_path, width):
    copy = tmp_path / "copy.html"
    copy.write_text(page.read_text(encoding="utf-8").replace("</body>", MARKER), encoding="utf-8")
    frame = tmp_path / "frame.html"  # a window of chromium is never narrower than 500 pixels, a frame may be
    frame.write_text(
        f'<iframe src="copy.html" style="width:{width}px;height:6000px;border:0"></iframe>'
        "<script>onload = () => setTimeout(() => { document.body.dataset.seen = "
        "document.querySelector('iframe').contentDocument.body.dataset.seen; }, 50);</script>",
        encoding="utf-8",
    )
    dom, log = browse(frame, tmp_path, "--dump-dom", "--allow-file-access-from-files", "--virtual-time-budget=5000")
    seen = re.search(r"images (\d+) broken (\d+) charts (\d+) empty (\d+) overflow (\d)", dom)
    assert seen, log[-2000:]
    images, broken, charts, empty, overflow = map(int, seen.groups())
    assert (broken, empty, overflow) == (0, 0, 0)
    assert images >= 2
    assert charts >= 3
    assert "CONSOLE" not in log


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_follows_light_and_dark(make_run, tmp_path, scheme):
    picture = tmp_path / "page.png"
    flag = f"--blink-settings=preferredColorScheme={1 if scheme == 'light' else 0}"
    browse(report(make_run("unlabelled")), tmp_path, f"--screenshot={picture}", "--window-size=1200,900", flag)
    corner = Image.open(picture).convert("L").getpixel((5, 5))
    assert corner > 240 if scheme == "light" else corner < 40


def test_the_page_prints(make_run, tmp_path):
    paper = tmp_path / "page.pdf"
    _, log = browse(report(make_run()), tmp_path, f"--print-to-pdf={paper}")
    assert paper.read_bytes().startswith(b"%PDF")
    assert "CONSOLE" not in log
