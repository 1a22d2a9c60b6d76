"""One folder through all verbs, by commands alone: examples/chain.sh."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Photographs of two kinds, and streets: drawn scenes with label maps in the layout of CamVid."""
    at = tmp_path_factory.mktemp("own")
    noise = np.random.default_rng(0)
    for kind, low in (("dark", 0), ("light", 120)):
        (at / "photos" / kind).mkdir(parents=True)
        for i in range(24):
            pixels = noise.integers(low, low + 120, (40, 40, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(at / "photos" / kind / f"{i}.png")
    for split, count in (("train", 12), ("test", 3)):
        for part in ("images", "labels"):
            (at / "streets" / split / part).mkdir(parents=True)
        for i in range(count):
            labels = np.zeros((64, 64), dtype=np.uint8)
            labels[32:] = 1
            labels[40:56, 8 + i : 24 + i] = 2
            colours = np.array([[90, 140, 220], [100, 100, 100], [200, 40, 40]], dtype=np.uint8)
            Image.fromarray(colours[labels]).save(at / "streets" / split / "images" / f"{i}.png")
            Image.fromarray(labels).save(at / "streets" / split / "labels" / f"{i}.png")
    (at / "streets" / "classes.txt").write_text("sky\nroad\ncar\n")
    return at


def test_an_encoder_becomes_a_segmenter_and_a_small_explained_classifier(folders):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("lime")
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "UNMASK_QUICK": "1",
        "UNMASK_CACHE": str(folders / "cache"),
        "OMP_NUM_THREADS": "1",
    }
    out = folders / "out"
    words = ["sh", str(ROOT / "examples" / "chain.sh"), str(folders / "photos"), str(folders / "streets"), str(out)]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(list((out / "seen").glob("*.png"))) >= 3
    report = json.loads((out / "smaller" / "report.json").read_text())
    rows = {row["name"]: row for row in report["rows"]}
    assert rows["optin"]["macs"] <= 0.6 * rows["original"]["macs"] * 1.001
    assert list((out / "why").glob("*.html"))

    from unmask.models import open_model

    small = open_model(out / "smaller")
    images = small.example(2)["image"]
    session = onnxruntime.InferenceSession(str(out / "onnx" / "model.onnx"), providers=["CPUExecutionProvider"])
    answers = session.run(None, {"image": images.numpy()})[0]
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(answers), small.logits({"image": images}), rtol=1e-3, atol=1e-4)
