"""The folder of a run: ``run.json``, ``metrics.jsonl``, and the rules under which it may be written. Imports no torch.

``run.json`` is replaced whole, ``metrics.jsonl`` only grows (and is cut back to the checkpoint on a resume), so that a
reader at any moment finds something whole.
"""

from __future__ import annotations

import datetime
import errno
import json
import math
import os
import platform
import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from importlib import metadata
from pathlib import Path
from typing import Any

from unmask.errors import UserError

FORMAT = 1
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT)


class Interrupted(KeyboardInterrupt):
    """A run that was asked to stop, saved itself and left. ``exit_code`` is 128 + the signal, as shells have it."""

    def __init__(self, message: str, signal_number: int = 2):
        super().__init__(message)
        self.exit_code = 128 + signal_number


class RunFolder:
    """One run (or one stage of a run) on disk."""

    def __init__(self, path: Path, info: dict[str, Any], *, writes: bool = True):
        self.path, self.info, self.writes = Path(path), info, writes

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def previews(self) -> Path:
        return self.path / "previews"

    def update(self, **fields: Any) -> None:
        """Change fields of ``run.json``; the file is replaced whole."""
        self.info.update(fields)
        if self.writes:
            write_json(self.path / "run.json", self.info)

    def log(self, record: Mapping[str, Any]) -> None:
        """Append one line to ``metrics.jsonl``. Numbers that JSON cannot say become null."""
        if self.writes:
            line = json.dumps(_sayable(record)) + "\n"
            with (
                mended_errors(f"writing {self.path / 'metrics.jsonl'}"),
                (self.path / "metrics.jsonl").open("a") as file,
            ):
                file.write(line)

    def cut_metrics(self, step: int) -> None:
        """Drop the lines behind ``step``, and a line that was cut off: what a resume will write again."""
        path = self.path / "metrics.jsonl"
        if self.writes and path.exists():
            kept = [record for record in read_metrics(self.path) if record.get("step", 0) <= step]
            replace_file(path, "".join(json.dumps(record) + "\n" for record in kept).encode())

    def sync_metrics(self) -> None:
        """Force the metrics to the disk, so that they never lag behind a checkpoint."""
        path = self.path / "metrics.jsonl"
        if self.writes and path.exists():
            with mended_errors(f"writing {path}"), path.open("rb") as file:
                os.fsync(file.fileno())


def create(path: Path, describe: Mapping[str, Any], *, writes: bool = True) -> RunFolder:
    """A new run folder at ``path``, which must not exist or be empty. Raises ``UserError`` in one line otherwise."""
    folder = RunFolder(path, {**described(describe)}, writes=writes)
    if writes:
        refuse_occupied(path)
        with mended_errors(f"making the run folder {path}"):
            path.mkdir(parents=True, exist_ok=True)
        folder.update()
    return folder


def refuse_occupied(path: Path) -> None:
    """Raise ``UserError`` where a new run cannot stand: a file, a finished or begun run, somebody else's folder."""
    if path.exists() and not path.is_dir():
        raise UserError(f"{path} is a file: give --out a folder that does not exist yet")
    if is_run(path):
        raise UserError(f"{path} holds a run already: go on with --resume, or give another --out")
    if path.is_dir() and any(path.iterdir()):
        raise UserError(f"{path} exists and is no run of ours: give --out a folder that does not exist yet")
    parent = next(p for p in (path, *path.absolute().parents) if p.exists())
    if not os.access(parent, os.W_OK | os.X_OK):
        raise UserError(f"{path} cannot be written: {parent} is not writable for this user, give another --out")


def reopen(path: Path, *, writes: bool = True) -> RunFolder:
    """The run at ``path``, to go on with. Raises ``UserError`` when there is none."""
    if not path.is_dir() or not any(path.iterdir()):
        raise UserError(
            f"nothing to resume in {path}: it is {'empty' if path.is_dir() else 'absent'}; start without --resume"
        )
    return RunFolder(path, read_run(path), writes=writes)


def is_run(path: Path) -> bool:
    """Whether ``path`` is a folder that ``create`` made."""
    try:
        return json.loads((path / "run.json").read_text()).get("kind") == "run"
    except (OSError, ValueError, AttributeError):
        return False


def read_run(path: Path) -> dict[str, Any]:
    """``run.json`` of the run at ``path``. Raises ``UserError`` when it is none."""
    try:
        info = json.loads((Path(path) / "run.json").read_text())
    except OSError:
        raise UserError(f"{path} is no run: it has no run.json") from None
    except ValueError:
        raise UserError(f"{path} is no run: its run.json is damaged") from None
    if not isinstance(info, dict) or info.get("kind") != "run":
        raise UserError(f"{path} is no run: its run.json is somebody else's")
    if info.get("format", 0) > FORMAT:
        raise UserError(f"{path} was written by a newer version of unmask (format {info['format']}): update unmask")
    return info


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of ``metrics.jsonl``, without one that a crash cut off."""
    out = []
    with suppress(OSError):
        for line in (Path(path) / "metrics.jsonl").read_text().splitlines():
            with suppress(ValueError):
                out.append(json.loads(line))
    return out


def stage_folder(out: Path, name: str, stages: Sequence[str] | int) -> Path:
    """Where a stage lives: the run's own folder when it is alone, else ``stages/<name>``."""
    count = stages if isinstance(stages, int) else len(stages)
    return Path(out) if count == 1 else Path(out) / "stages" / name


def resume_command(info: Mapping[str, Any], out: Path) -> str:
    """The command that goes on with a run."""
    words = [str(w) for w in info.get("command") or ["unmask", "train", str(info.get("system") or "SYSTEM")]]
    words[0] = Path(words[0]).name
    if not any(w == "--out" or w == "-o" or w.startswith("--out=") for w in words):
        words += ["--out", str(out)]
    return shlex.join(w for w in words if w != "--resume") + " --resume"


def described(describe: Mapping[str, Any]) -> dict[str, Any]:
    """Every field of ``run.json``, those that the caller tells laid over the rest."""
    base: dict[str, Any] = {
        "format": FORMAT,
        "kind": "run",
        "system": "",
        "title": "",
        "state": "running",
        "command": [],
        "config": {},
        "recipe": "",
        "auto": None,
        "facts": {},
        "parameters": None,
        "versions": versions(),
        "machine": machine(),
        "process": this_process(),
        "started": now(),
        "finished": None,
        "seconds": 0.0,
        "seed": None,
        "steps": None,
        "stages": None,
        "error": None,
    }
    return {**base, **_sayable(describe)}


def versions() -> dict[str, str]:
    """Versions of what decides the numbers."""
    out = {"python": platform.python_version()}
    for name in ("unmask", "torch", "torchvision", "timm", "accelerate", "datasets"):
        with suppress(metadata.PackageNotFoundError):
            out[name] = metadata.version(name)
    return out


def machine() -> dict[str, Any]:
    """What it ran on: the processor's name and cores; the engine adds the device."""
    return {"device": None, "cpu": cpu_name(), "cores": cores(), "gpu": None}


def this_process() -> dict[str, Any]:
    """Who writes the run, as ``process`` in ``run.json`` while it runs: a reader finds out whether it still does."""
    return {"pid": os.getpid(), "host": platform.node()}


def cpu_name() -> str:
    with suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return platform.processor() or platform.machine()


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def write_json(path: Path, value: Any) -> None:
    """Replace ``path`` by the value as JSON, whole or not at all."""
    replace_file(path, (json.dumps(_sayable(value), indent=1) + "\n").encode())


def replace_file(path: Path, content: bytes) -> None:
    """Write aside, force to the disk, rename. Raises ``UserError`` on a full or unwritable disk; the old file stays."""
    aside = path.with_name(f".{path.name}.aside")
    with mended_errors(f"writing {path}"):
        try:
            with aside.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(aside, path)
        except OSError:
            aside.unlink(missing_ok=True)
            raise


@contextmanager
def mended_errors(doing: str) -> Iterator[None]:
    """Turn the disk's refusals (full, read-only, forbidden) into a ``UserError`` in one line."""
    try:
        yield
    except OSError as error:
        raise disk_error(error, doing) from error


def disk_error(error: BaseException, doing: str) -> UserError:
    """The one line for a disk that would not take it."""
    number = getattr(error, "errno", None)
    if number in _NO_SPACE or "no space left" in str(error).lower():
        return UserError(f"the disk is full ({doing}): free some space, or give --out a folder on another disk")
    if number in (errno.EACCES, errno.EPERM, errno.EROFS):
        return UserError(f"the disk refuses ({doing}): {os.strerror(number)}; give --out a folder you may write to")
    return UserError(f"the disk refuses ({doing}): {error}")


def _sayable(value: Any) -> Any:
    """``value`` as JSON can say it: tuples as lists, paths as text, NaN and infinities as null."""
    if isinstance(value, Mapping):
        return {str(k): _sayable(v) for k, v in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_sayable(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, (str, int, float, bool)) or value is None:
        return value
    if hasattr(value, "item") and getattr(value, "ndim", None) == 0:
        return _sayable(value.item())
    if hasattr(value, "plain"):
        return _sayable(value.plain())
    return str(value)
