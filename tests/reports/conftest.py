"""Run folders as the engine leaves them, written by hand: no training, no torch."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

CLASSES = ["T-shirt", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"]
COLUMNS = ["original", "what the model saw", "prediction", "pasted"]
REFERENCES = {"mean of the visible": 0.96, "nearest visible patch": 1.21, "bilinear fill": 0.71}
VERSIONS = {"unmask": "0.1.0", "torch": "2.11.0", "timm": "1.0.20", "python": "3.11.9"}
MACHINE = {"device": "cpu", "cpu": "a processor", "cores": 2, "gpu": None}


def shapes(count: int, size: int = 28) -> np.ndarray:
    """Grey pictures of discs and bars, uint8 ``[count, size, size]``."""
    y, x = np.mgrid[0:size, 0:size] / size
    out = []
    for i in range(count):
        disc = np.hypot(x - 0.5, y - 0.45) < 0.2 + 0.03 * i
        bar = abs(x - 0.3 - 0.05 * i) < 0.12
        out.append(np.where(disc | bar, 90 + 40 * np.sin(9 * x + i) + 60 * y, 0))
    return np.stack(out).clip(0, 255).astype(np.uint8)


def picture_table(images: np.ndarray, blur: float, patch: int = 4) -> Image.Image:
    """Original | seen | prediction | pasted; ``blur`` in 0 ... 1 says how badly the prediction is done."""
    rng = np.random.default_rng(0)
    cells, gap = [], 4
    for image in images.astype(float):
        size = image.shape[0]
        hidden = np.kron(rng.random((size // patch, size // patch)) < 0.75, np.ones((patch, patch))) > 0
        guess = (1 - blur) * image + blur * image.mean()
        row = [image, np.where(hidden, 128, image), guess, np.where(hidden, guess, image)]
        cells.append([np.kron(c, np.ones((4, 4))) for c in row])
    side = cells[0][0].shape[0] + gap
    sheet = np.full((len(cells) * side - gap, 4 * side - gap), 255.0)
    for r, row in enumerate(cells):
        for c, cell in enumerate(row):
            sheet[r * side : r * side + side - gap, c * side : c * side + side - gap] = cell
    return Image.fromarray(sheet.clip(0, 255).astype(np.uint8)).convert("RGB")


def write(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(value if isinstance(value, str) else json.dumps(value), encoding="utf-8")


def metrics(steps: int, asked: int, *, low: float, noise: float = 0.03, probes: bool = True, top: float = 0.76) -> str:
    """The lines of a log: a loss that falls to ``low``, references, and a probe every fifth."""
    rng = np.random.default_rng(1)
    lines: list[dict[str, Any]] = []
    for i, step in enumerate(range(0, steps + 1, max(asked // 100, 1))):
        share = step / asked
        lines.append(
            {
                "kind": "train",
                "step": step,
                "epoch": round(12 * share, 3),
                "loss": low + 0.7 * math.exp(-9 * share) + noise * rng.normal(),
                "lr": 6e-4 * (share / 0.1 if share < 0.1 else 0.5 + 0.5 * math.cos(math.pi * (share - 0.1) / 0.9)),
                "grad_norm": 1 + 2 * math.exp(-6 * share) + 0.1 * rng.random(),
                "images_per_second": 780 + 25 * rng.normal(),
                "memory_mb": 611,
                "seconds": 151 * share,
            }
        )
        if i % 20 == 0:
            lines.append(
                {
                    "kind": "reference",
                    "step": step,
                    "values": REFERENCES,
                    "units": "squared error of standardised pixels",
                }
            )
            if probes:
                values = {"knn_top1": top - 0.09 * math.exp(-4 * share), "rankme": 14 + 31 * share}
                lines.append({"kind": "probe", "step": step, "values": values})
    return "".join(json.dumps(line) + "\n" for line in lines)


def probe(name: str, top1: float, *, random: float = 0.702, confusion: bool = False) -> dict[str, Any]:
    """What ``unmask eval`` writes."""
    start = {
        "top1": random,
        "top1_std": 0.004,
        "top5": 0.5 + random / 2,
        "values": [random] * 5,
        "seeds": [1, 2, 3, 4, 5],
    }
    out: dict[str, Any] = {
        "format": 1,
        "probe": name,
        "data": "sample:fashion",
        "encoder": "vit_tiny_patch4",
        "parameters": 800_000,
        "top1": top1,
        "top5": 0.5 + top1 / 2,
        "per_class": [top1] * 10,
        "settings": {"k": 20},
        "dim": 96,
        "classes": CLASSES,
        "baseline": {"always the commonest class": {"top1": 0.1}, "random initialisation": start},
        "margin": top1 - random,
        "margin_over_noise": (top1 - random) / 0.004,
        "labels": 1.0,
        "train_samples": 4000,
        "test_samples": 1000,
        "seed": 0,
        "seconds": 3.2,
    }
    if confusion:
        rng = np.random.default_rng(2)
        matrix = rng.integers(0, 6, (10, 10)) + np.diag(rng.integers(60, 95, 10))
        matrix[6, [0, 2, 4]] += 18
        out["confusion"] = matrix.tolist()
        out["pictures"] = [
            {"file": "feature-pca.png", "caption": "The first three principal components of the patch tokens."}
        ]
    return out


def stage_files(
    folder: Path,
    *,
    steps: int = 940,
    asked: int = 940,
    low: float = 0.41,
    images: np.ndarray | None = None,
    probes: bool = True,
    names: tuple[str, ...] = ("reconstruction",),
    top: float = 0.76,
) -> None:
    """Log and previews of one training."""
    write(folder / "metrics.jsonl", metrics(steps, asked, low=low, probes=probes, top=top))
    for name in names:
        for step in sorted({0, steps // 2, steps}):
            path = folder / "previews" / f"{step:08d}-{name}.png"
            side = {
                "columns": COLUMNS,
                "rows": 6,
                "caption": "Hidden patches are grey. Predictions are shown with each patch's true mean and contrast.",
            }
            write(path.with_suffix(".json"), side)
            picture_table(shapes(6) if images is None else images, 0.15 + 0.8 * math.exp(-4 * step / asked)).save(path)


def description(system: str = "mae", *, state: str = "done", asked: int = 940, **more: Any) -> dict[str, Any]:
    """The contents of a run.json."""
    config = {
        "model": {
            "backbone": {"name": "vit_tiny_patch4", "image_size": 28, "in_channels": 1, "depth": 6},
            "mask_ratio": 0.75,
            "standardise_target": True,
            "decoder": {"embed_dim": 96, "depth": 2, "num_heads": 3},
        },
        "data": {
            "uri": "sample:fashion",
            "split": "train",
            "image_size": 28,
            "augment": "crop_flip",
            "crop_scale": [0.6, 1.0],
            "normalise": "dataset",
            "limit": None,
            "workers": 0,
        },
        "train": {
            "steps": asked,
            "batch_size": 64,
            "accumulate": 1,
            "optimizer": "adamw",
            "base_lr": 0.0006,
            "betas": [0.9, 0.95],
            "weight_decay": 0.05,
            "schedule": "cosine",
            "warmup_epochs": 1.2,
            "precision": "auto",
            "compile": "auto",
            "ema": 0.0,
            "seed": 0,
        },
    }
    return {
        "format": 1,
        "kind": "run",
        "system": system,
        "state": state,
        "command": ["unmask", "train", system, "--data", "sample:fashion", "--out", "runs/my first run"],
        "config": config,
        "recipe": "tiny",
        "auto": None,
        "facts": {
            "uri": "sample:fashion",
            "count": 5000,
            "channels": 1,
            "image_size": [28, 28],
            "classes": CLASSES,
            "mean": [0.286],
            "std": [0.353],
            "bit_depth": 8,
        },
        "parameters": 1_234_567,
        "versions": VERSIONS,
        "machine": MACHINE,
        "started": "2025-11-25T01:06:59+00:00",
        "finished": "2025-11-25T01:09:30+00:00",
        "seconds": 151.3,
        "seed": 0,
        "steps": asked,
        "stages": None,
        "error": None,
        "title": "Masked Autoencoders Are Scalable Vision Learners" if system == "mae" else "",
        **more,
    }


VOID = {"meta", "link", "img", "br", "wbr", "hr", "input"}


class Page(HTMLParser):
    """Tags that must close do; what is loaded and what is said are kept."""

    def __init__(self, text: str):
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.wrong: list[str] = []
        self.loads: list[str] = []
        self.ids: list[str] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        if "id" in values:
            self.ids.append(values["id"])
        if tag in ("img", "script", "link", "source", "iframe", "image", "use"):
            self.loads += [values[k] for k in ("src", "href", "srcset") if k in values]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        pass

    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag:
            self.wrong.append(tag)

    def handle_data(self, data):
        if not (self.open and self.open[-1] in ("style", "script")):
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).replace("\u202f", " ").replace("\xa0", " ").split())


@pytest.fixture
def read_page() -> Callable[[str], Page]:
    """The text of a page as a :class:`Page`."""
    return Page


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., Path]:
    """``make_run("complete")`` writes a run folder of that kind under ``tmp_path`` and returns it."""
    return lambda kind="complete", name=None, **more: build_run(tmp_path / (name or kind), kind, **more)


def build_run(
    folder: Path,
    kind: str = "complete",
    *,
    system: str = "mae",
    images: np.ndarray | None = None,
    top1: float = 0.783,
    top: float = 0.76,
    **more: Any,
) -> Path:
    """A run folder: complete, minimal, failed, interrupted, running, stages or unlabelled."""
    if kind == "minimal":
        write(folder / "run.json", {"format": 1, "kind": "run", "system": system, "state": "done"})
    elif kind == "complete":
        auto = [
            "auto: 5 000 grey images of 28 × 28, 8 bit: patch 4 gives 49 tokens.",
            "2 cores and no accelerator: vit_tiny_patch4, batch 64.",
            "about 2 minutes: 12 epochs at a base learning rate of 0.0006.",
        ]
        stage_files(folder, images=images, top=top)
        write(folder / "run.json", description(system, auto=auto, **more))
        write(
            folder / "skipped.json",
            [{"path": f"photos/broken & <b>{i}.jpg", "reason": "truncated: 1 204 of 9 871 bytes"} for i in range(3)],
        )
        write(folder / "evaluation/linear.json", probe("linear", top1, confusion=True))
        write(folder / "evaluation/knn.json", probe("knn", top1 - 0.02, random=0.671))
        picture_table(shapes(6) if images is None else images, 0.3).save(folder / "evaluation/feature-pca.png")
    elif kind in ("interrupted", "running"):
        stage_files(folder, steps=395, images=images)
        write(folder / "run.json", description(system, state=kind, finished=None, **more))
        with (folder / "metrics.jsonl").open("a") as file:
            file.write('{"kind": "train", "step": 404, "lo')
    elif kind == "failed":
        stage_files(folder, steps=130, images=images)
        error = "loss is not finite at step 131; first non-finite tensor: encoder.blocks.3.attn.qkv.weight"
        write(folder / "run.json", description(system, state="failed", error=error, **more))
        (folder / "failed-step.safetensors").write_bytes(b"")
        with (folder / "metrics.jsonl").open("a") as file:
            file.write(json.dumps({"kind": "train", "step": 131, "loss": math.nan, "lr": 6e-4}) + "\n")
    elif kind == "unlabelled":
        stage_files(folder, images=images, probes=False)
        text = (folder / "metrics.jsonl").read_text()
        lines = [json.dumps({"kind": "probe", "step": s, "values": {"rankme": 12 + s / 40}}) for s in (0, 470, 940)]
        write(folder / "metrics.jsonl", text + "\n".join(lines) + "\n")
        values = description(system, **more)
        values["facts"]["classes"] = None
        write(folder / "run.json", values)
    elif kind == "stages":
        whole = description("put", state="interrupted", stages=["tokenizer", "transformer", "upsampler"])
        whole["config"] = {}
        write(folder / "run.json", whole)
        stage_files(folder / "stages/tokenizer", images=images, probes=False)
        write(folder / "stages/tokenizer/run.json", description("put", state="done"))
        stage_files(folder / "stages/transformer", steps=395, images=images, names=("completion", "samples"))
        write(folder / "stages/transformer/run.json", description("put", state="interrupted"))
    else:
        raise ValueError(kind)
    return folder
