"""Checkpoints that are whole or absent: written aside, forced to the disk, renamed; read without running anyone's code.

``checkpoints/step-00000100/`` holds ``model.safetensors``, ``ema.safetensors``, ``optimizer-<phase>.pt``, ``rank-00000.pt``
(generators, the data's position, unfinished sums) and ``state.json`` with the size of every file, written last. A sharded
run holds ``shards/`` (torch.distributed.checkpoint) in place of the first three. ``checkpoints/latest`` and
``checkpoints/best`` are texts that name a folder.
"""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from unmask.engine.distributed import Place
from unmask.engine.run import disk_error, replace_file, write_json
from unmask.errors import UserError

_ASIDE = ".writing-"


def step_name(step: int) -> str:
    return f"step-{step:08d}"


def write(root: Path, step: int, fill: Callable[[Path], None], about: Mapping[str, Any], place: Place) -> Path:
    """Make the checkpoint of ``step``: every process calls it, ``fill(folder)`` writes this process's files.

    Raises ``UserError`` when the disk is full or refuses; then nothing of it is left and earlier checkpoints are whole.
    """
    aside, final = root / (_ASIDE + step_name(step)), root / step_name(step)

    def prepare() -> None:
        root.mkdir(parents=True, exist_ok=True)
        clear_aside(root)
        aside.mkdir()

    problem = _agreed(_tried(prepare) if place.first else None, place)  # nobody fills what is not there
    problem = problem or _agreed(_tried(lambda: fill(aside)), place)
    problem = problem or _agreed(_tried(lambda: _publish(aside, final, step, about)) if place.first else None, place)
    if problem is not None:
        if place.first:
            shutil.rmtree(aside, ignore_errors=True)
        if is_disk_problem(problem):
            raise disk_error(problem, f"saving step {step} in {root}, the checkpoint before it is whole") from problem
        raise problem
    return final


def _publish(aside: Path, final: Path, step: int, about: Mapping[str, Any]) -> None:
    files = {str(p.relative_to(aside)): p.stat().st_size for p in sorted(aside.rglob("*")) if p.is_file()}
    for name in files:
        _force(aside / name)
    write_json(aside / "state.json", {"format": 1, "step": step, "files": files, **about})
    _force(aside)
    if final.exists():  # from before a resume; it is about to be the same again
        shutil.rmtree(final)
    os.rename(aside, final)
    _force(final.parent)
    replace_file(final.parent / "latest", (final.name + "\n").encode())


def _tried(work: Callable[[], None]) -> BaseException | None:
    """What the disk said against it, if anything."""
    try:
        work()
    except (OSError, SafetensorError, RuntimeError) as error:
        return error
    except UserError as error:
        return error.__cause__ or error
    return None


def _agreed(problem: BaseException | None, place: Place) -> BaseException | None:
    """This process's problem, or another's told again, so that all processes leave together."""
    told = place.gathered(None if problem is None else (str(problem), is_disk_problem(problem)))
    other = next((t for t in told if t is not None), None)
    if problem is not None or other is None:
        return problem
    return OSError(other[0]) if other[1] else RuntimeError(other[0])


def is_disk_problem(error: BaseException) -> bool:
    return isinstance(error, OSError) or (isinstance(error, SafetensorError) and "I/O error" in str(error))


def _force(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def clear_aside(root: Path) -> None:
    """Remove what a crash left half-written."""
    for path in root.glob(_ASIDE + "*"):
        shutil.rmtree(path, ignore_errors=True)


def whole_checkpoints(root: Path) -> list[Path]:
    """Checkpoints whose files are all there in full size, the one to resume from first."""
    names = [p.name for p in root.glob("step-*")] if root.is_dir() else []
    ordered = sorted(names, reverse=True)
    first = _named(root / "latest")
    if (
        first in ordered
    ):  # what stands behind "latest" was renamed just before a crash: as good, but its turn comes again
        ordered.remove(first)
        ordered.insert(0, first)
    return [root / name for name in ordered if is_whole(root / name)]


def is_whole(folder: Path) -> bool:
    try:
        files = json.loads((folder / "state.json").read_text())["files"]
        return all((folder / name).stat().st_size == size for name, size in files.items())
    except (OSError, ValueError, KeyError, TypeError):
        return False


def about(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "state.json").read_text())


def _named(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def best(root: Path) -> Path | None:
    """The checkpoint that ``best`` names, if it is whole."""
    name = _named(root / "best")
    return root / name if name and is_whole(root / name) else None


def mark_best(root: Path, step: int) -> None:
    replace_file(root / "best", (step_name(step) + "\n").encode())


def prune(root: Path, keep: int) -> None:
    """Remove all but the last ``keep`` whole checkpoints, the best, and the latest."""
    names = sorted((p.name for p in root.glob("step-*")), reverse=True)
    whole = [name for name in names if is_whole(root / name)]
    kept = {*whole[:keep], _named(root / "best"), _named(root / "latest")}
    for name in names:
        if name not in kept:
            with suppress(OSError):  # first the list of files, so that half a folder never looks whole
                (root / name / "state.json").unlink()
            shutil.rmtree(root / name, ignore_errors=True)


# --- files ------------------------------------------------------------------------------------------------------


class _Telling:
    """A file that remembers why the disk refused; torch's writer only says that it failed."""

    def __init__(self, file: IO[bytes]):
        self.file = file
        self.refusal: OSError | None = None

    def write(self, content: Any) -> int:
        try:
            return self.file.write(content)
        except OSError as error:
            self.refusal = error
            raise

    def flush(self) -> None:
        self.file.flush()


def save_plain(value: Any, path: Path) -> None:
    """Nested plain values and tensors, as ``load_plain`` reads them. Raises ``OSError`` when the disk refuses."""
    with path.open("wb", buffering=0) as file:
        telling = _Telling(file)  # type: ignore[arg-type]
        try:
            torch.save(value, telling)  # type: ignore[arg-type]
        except RuntimeError as error:
            if telling.refusal is not None:
                raise telling.refusal from error
            raise _short_write(path, error) from error


def _short_write(path: Path, error: RuntimeError) -> Exception:
    """A short write with no error of its own is how a disk fills up under torch's writer."""
    if "unexpected pos" in str(error) or shutil.disk_usage(path.parent).free < 1 << 20:
        return OSError(28, os.strerror(28), str(path))
    return error


def load_plain(path: Path) -> Any:
    return torch.load(path, map_location="cpu", weights_only=True)


def save_tensors(state: Mapping[str, Any], path: Path) -> None:
    """The tensors of a state as safetensors, whatever else it holds beside them in ``<name>.pt``."""
    seen: set[int] = set()
    tensors: dict[str, Tensor] = {}
    for name, value in state.items():
        if isinstance(value, Tensor):
            value = value.detach().cpu().contiguous()
            pointer = value.untyped_storage().data_ptr()
            tensors[name] = (
                value.clone() if pointer in seen or value.untyped_storage().nbytes() != value.nbytes else value
            )
            seen.add(pointer)
    save_file(tensors, path)
    rest = {name: value for name, value in state.items() if not isinstance(value, Tensor)}
    if rest:
        save_plain(rest, path.with_suffix(".pt"))


def load_tensors(path: Path) -> dict[str, Any]:
    state: dict[str, Any] = dict(load_file(path))
    if path.with_suffix(".pt").exists():
        state.update(load_plain(path.with_suffix(".pt")))
    return state


# --- generators -------------------------------------------------------------------------------------------------


def generators(device: torch.device) -> dict[str, Any]:
    """The state of every global generator: torch, the device's, numpy, python."""
    kind, keys, position, has_gauss, gauss = np.random.get_state()
    version, words, following = random.getstate()
    out: dict[str, Any] = {
        "torch": torch.get_rng_state(),
        "numpy": [
            str(kind),
            torch.from_numpy(np.asarray(keys).astype(np.int64)),
            int(position),
            int(has_gauss),
            float(gauss),
        ],
        "python": [version, list(words), following],
    }
    if device.type != "cpu":
        out["device"] = torch.get_device_module(device).get_rng_state(device)
    return out


def restore_generators(state: Mapping[str, Any], device: torch.device) -> None:
    torch.set_rng_state(state["torch"])
    kind, keys, position, has_gauss, gauss = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), position, has_gauss, gauss))
    version, words, following = state["python"]
    random.setstate((version, tuple(words), following))
    if device.type != "cpu" and "device" in state:
        torch.get_device_module(device).set_rng_state(state["device"], device)


def seed_generators(seed: int) -> None:
    """Start every global generator; whatever a system draws there instead of from ``draw`` is repeatable too."""
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


# --- shards -----------------------------------------------------------------------------------------------------


def save_shards(model: Any, optimizers: Mapping[str, Any], ema: Mapping[str, Tensor] | None, folder: Path) -> None:
    """Each process writes its own shards, through torch.distributed.checkpoint."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.api import CheckpointException

    try:
        dcp.save(_shards(model, optimizers, ema), checkpoint_id=folder / "shards")
    except CheckpointException as error:  # not an Exception: it carries what each process met
        met = next(iter(error.failures.values()))[0]
        raise (met if isinstance(met, OSError) else RuntimeError(f"saving shards: {met}")) from None


def load_shards(model: Any, optimizers: Mapping[str, Any], ema: Mapping[str, Tensor] | None, folder: Path) -> None:
    """Fill model, optimisers and averages from shards, whatever number of processes wrote them."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint import DefaultLoadPlanner
    from torch.distributed.checkpoint.state_dict import set_model_state_dict, set_optimizer_state_dict

    state = _shards(model, optimizers, ema)
    # a parameter that never had a gradient has no optimiser state in the file, while torch makes one here for all
    steps = {"optimizers": state.pop("optimizers")}
    dcp.load(state, checkpoint_id=folder / "shards")
    dcp.load(steps, checkpoint_id=folder / "shards", planner=DefaultLoadPlanner(allow_partial_load=True))
    set_model_state_dict(model, state["model"])
    for phase, optimizer in optimizers.items():
        set_optimizer_state_dict(model, optimizer, steps["optimizers"][phase])


def _shards(model: Any, optimizers: Mapping[str, Any], ema: Mapping[str, Tensor] | None) -> dict[str, Any]:
    from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_optimizer_state_dict

    state: dict[str, Any] = {
        "model": get_model_state_dict(model),
        "optimizers": {phase: get_optimizer_state_dict(model, o) for phase, o in optimizers.items()},
    }
    if ema is not None:
        state["ema"] = dict(ema)
    return state
