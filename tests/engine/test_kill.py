import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from .toys import lines, losses, same, weights

TESTS = Path(__file__).parents[1]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(TESTS), str(TESTS.parent)])}


def started(script: str, *words: str) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-c", script, *words], env=ENVIRONMENT, stderr=subprocess.PIPE, text=True)


RUN = """
import sys
from pathlib import Path
from engine.toys import stage
from unmask.engine.stages import train
out = Path(sys.argv[1])
made = stage(steps=int(sys.argv[2]), save_every=100000, compile="off")
describe = {"system": "toy", "command": ["unmask", "train", "toy"]}
train([made], out, describe=describe, resume=(out / "run.json").exists())
"""


@pytest.mark.slow
def test_twenty_kills_at_random_moments_change_no_bit(tmp_path):
    words = [sys.executable, "-m", "engine.kill_and_resume", str(tmp_path), "20"]
    done = subprocess.run(words, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout.split()[0]) >= 15, done.stdout


def until(found, seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not found():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def at_step(run: Path, step: int):
    return lambda: (run / "metrics.jsonl").exists() and len((run / "metrics.jsonl").read_text().splitlines()) > step


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_tells_how_to_go_on(tmp_path, number):
    out = tmp_path / "run"
    process = started(RUN, str(out), "3000")
    until(at_step(out, 20))
    process.send_signal(number)
    _, talk = process.communicate(timeout=60)
    assert process.returncode != 0
    assert f"unmask train toy --out {out} --resume" in talk
    saved = int((out / "checkpoints" / "latest").read_text().strip().split("-")[1])
    assert saved == lines(out, "train")[-1]["step"]


@pytest.mark.slow
def test_a_second_interrupt_leaves_at_once(tmp_path):
    script = RUN.replace(
        "train([", "import time\nfrom engine import toys\ntoys.Toy.after_step = lambda s, p: time.sleep(30)\ntrain(["
    )
    out = tmp_path / "run"
    process = started(script, str(out), "10")
    until(lambda: (out / "run.json").exists())
    time.sleep(1.5)
    process.send_signal(signal.SIGINT)
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=10)
    assert process.returncode == 130


@pytest.mark.slow
def test_a_process_of_its_own_resumes_after_a_kill(tmp_path):
    out, straight = tmp_path / "run", tmp_path / "straight"
    script = RUN.replace("save_every=100000", "save_every=50")
    assert started(script, str(straight), "600").wait() == 0
    process = started(script, str(out), "600")
    until(at_step(out, 120))
    process.kill()
    process.wait()
    assert started(script, str(out), "600").wait() == 0
    assert same(weights(straight), weights(out))
    assert losses(straight) == losses(out)
