"""A run folder as values: what the engine and the probes wrote, read without torch.

A run that was killed is as readable as one that ended: a last line that was cut short is left out, a file that is not
there is empty. Only ``run.json`` has to be whole.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import platform
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from unmask.errors import UserError

Point = tuple[float, float]

_KNOWN = {"kind", "step", "epoch", "loss", "lr", "grad_norm", "images_per_second", "memory_mb", "seconds"}


@dataclass(frozen=True)
class Preview:
    """One picture table of a run: a PNG with ``columns`` side by side, and what it shows."""

    name: str
    step: int
    path: Path
    columns: tuple[str, ...] = ()
    caption: str = ""


@dataclass
class Stage:
    """One training in a run: its log, pictures and probes. A run of one stage is its own only stage."""

    name: str
    folder: Path
    info: dict[str, Any]
    train: list[dict[str, Any]] = field(default_factory=list)
    references: list[dict[str, Any]] = field(default_factory=list)
    probes: list[dict[str, Any]] = field(default_factory=list)
    previews: list[Preview] = field(default_factory=list)
    skipped: list[dict[str, Any]] = field(default_factory=list)
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    pictures: list[Path] = field(default_factory=list)
    saved: int = 0  # the step of the last checkpoint

    @property
    def config(self) -> dict[str, Any]:
        """``{"model": {...}, "data": {...}, "train": {...}}``."""
        return self.info.get("config") or {}

    @property
    def facts(self) -> dict[str, Any]:
        return self.info.get("facts") or {}

    @property
    def noun(self) -> str:
        """What its data are: images, unless the facts of other data say nothing of a picture's size."""
        facts = self.facts
        return "samples" if facts and not (facts.get("image_size") or facts.get("channels")) else "images"

    @property
    def state(self) -> str:
        return present_state(self.info)

    @property
    def steps(self) -> int | None:
        """Optimiser steps that were asked for."""
        return _int(self.info.get("steps")) or _int((self.config.get("train") or {}).get("steps"))

    @property
    def steps_done(self) -> int:
        """Optimiser steps that the log or the last checkpoint knows of; all of them when the run is done."""
        known = int(max((r.get("step") or 0 for r in self.train), default=0))
        return max(known, self.saved, self.steps or 0 if self.state == "done" else 0)

    @property
    def epochs(self) -> float:
        """Passes over the data when the last step was done; 0 where the log does not say."""
        last = self.train[-1] if self.train else {}
        epoch, step = last.get("epoch"), last.get("step")
        return float(epoch or 0) * self.steps_done / step if finite(epoch) and finite(step) and step else 0.0

    @property
    def batch_size(self) -> int | None:
        return _int((self.config.get("train") or {}).get("batch_size"))

    @property
    def images_seen(self) -> int | None:
        return self.steps_done * self.batch_size if self.batch_size else None

    @property
    def seconds(self) -> float | None:
        """As ``run.json`` says, or the last line of the log where a run left without a word."""
        known = [r["seconds"] for r in (self.info, *self.train[-1:]) if finite(r.get("seconds"))]
        return float(max(known)) if known else None

    @property
    def backbone(self) -> str:
        """The name of the backbone in the model's config, or ""."""
        value = (self.config.get("model") or {}).get("backbone")
        return str(value.get("name") or "") if isinstance(value, dict) else str(value or "")

    @property
    def data(self) -> str:
        return str((self.config.get("data") or {}).get("uri") or self.facts.get("uri") or "")

    def curve(self, key: str) -> list[Point]:
        """(step, value) of one logged number, only the finite ones."""
        return [(r["step"], float(r[key])) for r in self.train if "step" in r and finite(r.get(key))]

    def other_losses(self) -> list[str]:
        """Numbers that the system logged besides the loss, in the order they appeared."""
        seen: dict[str, None] = {}
        for record in self.train:
            seen.update(dict.fromkeys(k for k, v in record.items() if k not in _KNOWN and finite(v)))
        return list(seen)

    def probe_curves(self) -> dict[str, list[Point]]:
        """(step, value) of every number that was probed while training."""
        out: dict[str, list[Point]] = {}
        for record in self.probes:
            for key, value in (record.get("values") or {}).items():
                if finite(value):
                    out.setdefault(key, []).append((record.get("step", 0), float(value)))
        return out

    def reference_curves(self) -> dict[str, list[Point]]:
        """(step, loss) of every trivial predictor."""
        out: dict[str, list[Point]] = {}
        for record in self.references:
            for key, value in (record.get("values") or {}).items():
                if finite(value):
                    out.setdefault(key, []).append((record.get("step", 0), float(value)))
        return out

    @property
    def units(self) -> str:
        """What the loss is measured in, as the engine says it, or ""."""
        return next((str(r["units"]) for r in reversed(self.references) if r.get("units")), "")

    def final_loss(self) -> tuple[float, int] | None:
        """The mean over the last twentieth of the logged losses, and how many that are. None without a loss."""
        losses = [value for _, value in self.curve("loss")]
        if not losses:
            return None
        last = max(1, min(20, len(losses) // 20))
        return sum(losses[-last:]) / last, last

    def last_references(self) -> dict[str, float]:
        """The latest loss of every trivial predictor, lowest first."""
        return dict(sorted(((k, v[-1][1]) for k, v in self.reference_curves().items()), key=lambda kv: kv[1]))

    def seconds_at(self, step: float) -> float | None:
        """Seconds of training when ``step`` was done, by straight lines between logged steps."""
        known = [
            (0.0, 0.0),
            *((r["step"], r["seconds"]) for r in self.train if finite(r.get("seconds")) and "step" in r),
        ]
        if len(known) < 2:
            return None
        for (s0, t0), (s1, t1) in itertools.pairwise(known):
            if s0 <= step <= s1:
                return t0 + (t1 - t0) * ((step - s0) / (s1 - s0) if s1 > s0 else 0)
        return known[-1][1]


@dataclass
class Run:
    """A run folder, read."""

    path: Path
    info: dict[str, Any]
    stages: list[Stage]

    @property
    def last(self) -> Stage:
        """The stage that gives the run's numbers: the last one that has begun."""
        begun = [s for s in self.stages if s.train or s.probes or s.evaluations]
        return (begun or self.stages)[-1]

    @property
    def system(self) -> str:
        return str(self.info.get("system") or "")

    @property
    def state(self) -> str:
        """done, running, interrupted, failed; "stopped" where it says running and its process is gone."""
        return present_state(self.info)

    @property
    def command(self) -> str:
        """The command that repeats the run, quoted for a shell."""
        value = self.info.get("command") or []
        return value if isinstance(value, str) else shlex.join(str(v) for v in value)

    @property
    def evaluations(self) -> list[dict[str, Any]]:
        """What the probes wrote for the whole run: the last stage that has any."""
        return next((s.evaluations for s in reversed(self.stages) if s.evaluations), [])

    @property
    def seconds(self) -> float | None:
        told = [float(self.info["seconds"])] if finite(self.info.get("seconds")) else []
        known = [s.seconds for s in self.stages if s.seconds is not None]
        return max([*told, *([sum(known)] if known else [])], default=None)

    @property
    def name(self) -> str:
        return self.path.resolve().name


def present_state(info: dict[str, Any]) -> str:
    """The state that ``run.json`` tells; "stopped" where it tells "running" and the process that wrote it, on this machine,
    is gone: it was killed."""
    state, process = str(info.get("state") or "unknown"), info.get("process")
    if state != "running" or not isinstance(process, dict) or process.get("host") != platform.node():
        return state
    return "running" if _lives(process.get("pid")) else "stopped"


def _lives(pid: Any) -> bool:
    if os.name != "posix" or not isinstance(pid, int) or pid <= 0:  # elsewhere signal 0 is no question
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:  # somebody else's
        return True
    return True


def finite(value: Any) -> bool:
    """Whether a value is a number that can be drawn."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def is_run(folder: Path) -> bool:
    """Whether a folder looks like a run: it holds a ``run.json``."""
    return (folder / "run.json").is_file()


def find_runs(folder: Path) -> list[Path]:
    """Every run at or under ``folder``, sorted by path. A run's own stages are not listed.

    Raises ``UserError`` when the folder is not there.
    """
    if not folder.is_dir():
        raise UserError(f"no folder {folder}: give the folder that holds the runs")
    return sorted(_runs_under(folder))


def _runs_under(folder: Path) -> Iterator[Path]:
    if is_run(folder):
        yield folder
        return
    for inner in folder.iterdir():
        if inner.is_dir() and not inner.name.startswith("."):
            yield from _runs_under(inner)


def read_run(path: Path | str) -> Run:
    """The run in a folder. Raises ``UserError`` when there is none, or when its ``run.json`` cannot be read."""
    path = Path(path)
    if not path.exists():
        raise UserError(f"no run at {path}: `unmask runs DIR` lists the runs under a folder")
    if not is_run(path):
        raise UserError(f"{path} is no run: it holds no run.json; `unmask runs DIR` lists the runs under a folder")
    info = _json(path / "run.json")
    if not isinstance(info, dict):
        raise UserError(f"{path / 'run.json'} cannot be read as JSON: the run's description is damaged")
    names = info.get("stages") or []
    if len(names) < 2:
        return Run(path, info, [_stage("", path, info)])
    stages = []
    for name in names:
        folder = path / "stages" / str(name)
        own = _json(folder / "run.json")
        stages.append(_stage(str(name), folder, own if isinstance(own, dict) else {}))
    whole = _stage("", path, {})
    stages[-1].evaluations = whole.evaluations or stages[-1].evaluations
    stages[-1].pictures = whole.pictures or stages[-1].pictures
    return Run(path, info, stages)


def _stage(name: str, folder: Path, info: dict[str, Any]) -> Stage:
    stage = Stage(name, folder, info)
    kinds = {"train": stage.train, "reference": stage.references, "probe": stage.probes}
    for record in _lines(folder / "metrics.jsonl"):
        kinds.get(str(record.get("kind")), []).append(record)
    stage.saved = _saved_step(folder / "checkpoints" / "latest")
    skipped = _json(folder / "skipped.json")
    stage.skipped = [r for r in skipped if isinstance(r, dict)] if isinstance(skipped, list) else []
    stage.previews = _previews(folder / "previews")
    for path in sorted((folder / "evaluation").glob("*.json")):
        value = _json(path)
        if isinstance(value, dict) and (value.get("probe") or value.get("kind") in (None, "evaluation")):
            stage.evaluations.append({"probe": path.stem, **value})
    stage.pictures = sorted((folder / "evaluation").glob("*.png"))
    return stage


def _saved_step(latest: Path) -> int:
    """The step in a text like "step-00000100"; 0 where there is none."""
    try:
        digits = latest.read_text(encoding="utf-8").strip().removeprefix("step-")
    except (OSError, ValueError):
        return 0
    return int(digits) if digits.isdecimal() else 0


def _previews(folder: Path) -> list[Preview]:
    found = []
    for path in sorted(folder.glob("*.png")):
        digits, dash, name = path.stem.removeprefix("step-").partition("-")
        step = int(digits) if digits.isdigit() else 0
        side = _json(path.with_suffix(".json"))
        side = side if isinstance(side, dict) else {}
        columns = tuple(str(c) for c in side.get("columns") or ())
        found.append(
            Preview(
                name if dash and digits.isdigit() else path.stem, step, path, columns, str(side.get("caption") or "")
            )
        )
    return sorted(found, key=lambda p: (p.name, p.step))


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _lines(path: Path) -> list[dict[str, Any]]:
    """The records of a JSON-lines file. A run that was resumed may hold a step twice: the later line wins."""
    records: dict[Any, dict[str, Any]] = {}
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    for number, line in enumerate(text.splitlines()):
        try:
            value = json.loads(line)
        except ValueError:
            continue
        if isinstance(value, dict):
            key = (value.get("kind"), value["step"]) if "step" in value else number
            records.pop(key, None)
            records[key] = value
    return sorted(records.values(), key=lambda r: r.get("step") or 0)


def _int(value: Any) -> int | None:
    return int(value) if finite(value) else None
