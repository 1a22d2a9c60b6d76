"""Runs of one stage or several: each has its folder, is resumed where it stopped, and is skipped when it is done."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch

from unmask.contracts import DataFacts, Trainable
from unmask.engine import checkpoint
from unmask.engine.display import Display, SilentDisplay, default_display
from unmask.engine.distributed import Place, open_place
from unmask.engine.keeper import Keeper, Monitor, refuse_changes
from unmask.engine.loop import Training, parameter_count
from unmask.engine.run import (
    Interrupted,
    RunFolder,
    create,
    is_run,
    machine,
    now,
    read_run,
    refuse_occupied,
    reopen,
    stage_folder,
    this_process,
    write_json,
)
from unmask.engine.settings import TrainSettings
from unmask.engine.stopping import StopRequest
from unmask.errors import UserError


@dataclass
class Stage:
    """A training of one Trainable.

    build: makes it; called after the generators are seeded, and after the earlier stages are done, so that it may read
    their folders (``stage_folder``). batches: data as ``unmask.data.batches.Batches``, or a function that makes it.
    describe: what ``run.json`` of this stage says besides what the run says.
    """

    name: str
    build: Callable[[], Trainable]
    batches: Any
    settings: TrainSettings
    monitors: Sequence[Monitor] = ()
    describe: Mapping[str, Any] = field(default_factory=dict)


def train(
    stages: Sequence[Stage],
    out: Path | str,
    *,
    describe: Mapping[str, Any],
    resume: bool = False,
    monitors: Sequence[Monitor] = (),
    display: Display | None = None,
) -> Path:
    """Train every stage in order and leave a run folder; its path.

    describe: fields of ``run.json`` that the caller knows (system, title, command, config, recipe, auto ...).
    Raises ``Interrupted`` when asked to stop, ``StepFailed`` for a step that is not finite, ``UserError`` for what a user
    can mend. Nothing is left behind when it fails before the first step of a new run.
    """
    out, names = Path(out), [stage.name for stage in stages]
    if not stages or len(set(names)) != len(names):
        raise UserError(f"a run needs stages with names of their own, got {names}")
    root: RunFolder | None = None
    place: Place | None = None
    try:
        for index, stage in enumerate(stages):
            path = stage_folder(out, stage.name, names)
            opened = cache(partial(_open, stage))
            if root is not None and _is_done(path, stage, opened):
                continue
            place = open_place(stage.settings, path / "trackers" if stage.settings.trackers else None)
            if root is None:
                _refuse_other_folders(place, out)
                _agreed(place, lambda: _check_folder(out, stages, resume, describe))
            if root is None and resume and _is_done(path, stage, opened):
                root = _open_root(out, place, describe, names, resume=True)
                continue
            batches = opened()
            settings = stage.settings.resolved(batches.steps_per_epoch)
            checkpoint.seed_generators(settings.seed)
            model = stage.build()
            training = Training(_prepared(model, batches), batches, settings, place)
            if root is None:
                root = _open_root(out, place, describe, names, resume=resume)
            folder, resumed = _stage_run(root, path, stage, training, place, len(names))
            shown = (display or default_display()) if place.first else SilentDisplay()
            if resume and len(names) == 1 and not checkpoint.whole_checkpoints(folder.checkpoints):
                shown.say(f"{out} holds no checkpoint yet: it begins anew")
            title = stage.name if len(names) > 1 else str(describe.get("system") or stage.name)
            all_monitors = [*stage.monitors, *monitors]
            with StopRequest(launched=place.world > 1) as stop:
                keeper = Keeper(training, folder, root, shown, all_monitors, stop, title)
                _run(keeper, folder, resumed)
            place.together(partial(_close, folder, keeper.seconds()))
            if root is not folder:
                place.together(partial(_add_up, root, names[: index + 1], names))
        if root is not None and place is not None and root.info["state"] != "done":
            place.together(partial(root.update, state="done", finished=now(), error=None, process=None))
    except BaseException as error:
        if root is not None and root.info.get("state") != "done":
            _tell_end(root, error)
        raise
    if place is not None:
        place.barrier()
    return out


def _open(stage: Stage) -> Any:
    return stage.batches() if callable(stage.batches) else stage.batches


def _prepared(model: Trainable, batches: Any) -> Trainable:
    preprocessing = getattr(batches, "preprocessing", None)
    if model.encoder is not None and preprocessing is not None:
        model.encoder.preprocessing = preprocessing
    model.side_files.update(getattr(batches, "side_files", None) or {})
    return model.train()


def _run(keeper: Keeper, folder: RunFolder, resumed: bool) -> None:
    try:
        keeper.fit(resume=resumed)
    except BaseException as error:
        folder.info["seconds"] = keeper.seconds()
        _tell_end(folder, error)
        raise


def _tell_end(folder: RunFolder, error: BaseException) -> None:
    """Say in ``run.json`` how it ended; on a full disk even that may fail, and the error itself matters more."""
    state = "interrupted" if isinstance(error, KeyboardInterrupt) else "failed"
    text = str(error) if isinstance(error, (UserError, Interrupted)) else f"{type(error).__name__}: {error}"
    with suppress(UserError):
        folder.update(state=state, finished=now(), error=text, process=None)


def _close(folder: RunFolder, seconds: float) -> None:
    folder.update(state="done", finished=now(), seconds=round(seconds, 3), error=None, process=None)


def _add_up(root: RunFolder, done: list[str], names: list[str]) -> None:
    root.update(seconds=sum(_seconds(stage_folder(root.path, n, names)) for n in done))


def _seconds(path: Path) -> float:
    return float(read_run(path).get("seconds") or 0) if is_run(path) else 0.0


def _agreed(place: Place, check: Callable[[], None]) -> None:
    """Check on the first process; every process raises what it found."""
    problem: str | None = None
    if place.first:
        try:
            check()
        except UserError as error:
            problem = str(error)
    problem = place.told(problem)
    if problem is not None:
        raise UserError(problem)


def _refuse_other_folders(place: Place, out: Path) -> None:
    folders = dict.fromkeys(place.gathered(str(out.absolute())))
    if len(folders) > 1:
        raise UserError(
            f"the processes disagree on the run's folder ({', '.join(folders)}): give all of them one --out"
        )


def _check_folder(out: Path, stages: Sequence[Stage], resume: bool, describe: Mapping[str, Any]) -> None:
    """Whether a run can begin, or go on, here: asked before ``run.json`` is written, so that a refusal leaves it as it was."""
    names = [stage.name for stage in stages]
    if not resume:
        refuse_occupied(out)
        return
    info = reopen(out).info
    system = describe.get("system")
    if system and info.get("system") and system != info["system"]:
        raise UserError(f"{out} is a run of {info['system']}, not of {system}: give another --out")
    if info.get("stages") and info["stages"] != (names if len(names) > 1 else None):
        raise UserError(f"{out} has the stages {info['stages']}, not {names}: give another --out")
    for stage in stages:
        path = stage_folder(out, stage.name, names)
        if len(stages) > 1 and (not is_run(path) or read_run(path).get("state") == "done"):
            continue
        for saved in checkpoint.whole_checkpoints(path / "checkpoints"):
            refuse_changes(stage.settings, checkpoint.about(saved)["same"], path)


def _open_root(out: Path, place: Place, describe: Mapping[str, Any], names: list[str], *, resume: bool) -> RunFolder:
    place.barrier()
    if resume:
        root = RunFolder(out, place.told(read_run(out) if place.first else None), writes=place.first)
        place.barrier()
        return root
    return _created(out, {**describe, "stages": names if len(names) > 1 else None}, place)


def _created(path: Path, describe: Mapping[str, Any], place: Place) -> RunFolder:
    made: list[RunFolder] = []
    place.together(lambda: made.append(create(path, describe, writes=place.first)))
    return made[0]


def _stage_run(
    root: RunFolder, path: Path, stage: Stage, training: Training, place: Place, count: int
) -> tuple[RunFolder, bool]:
    """The stage's folder and whether it goes on from something."""
    told = _facts(stage, training, place, root.info.get("config") or {})
    running = {"state": "running", "error": None, "finished": None, "process": this_process()}
    if count == 1:
        begun = (root.path / "checkpoints").exists()
        place.together(lambda: root.update(**running, **told))
        place.together(lambda: _tell_skipped(root, training.batches))
        return root, place.told(begun)
    place.together(lambda: root.update(**running))
    begun = place.told(is_run(path))
    if begun:
        folder = RunFolder(path, place.told(read_run(path) if place.first else None), writes=place.first)
        place.together(lambda: folder.update(**running, **told))
    else:
        shared = {n: root.info.get(n) for n in ("system", "title", "command", "recipe", "auto")}
        folder = _created(path, {**shared, **told, **stage.describe}, place)
        place.together(lambda: root.update(seed=stage.settings.seed, machine=told["machine"]))
    place.together(lambda: _tell_skipped(folder, training.batches))
    return folder, begun


def _facts(stage: Stage, training: Training, place: Place, config: Mapping[str, Any]) -> dict[str, Any]:
    facts = getattr(training.batches, "facts", None)
    gpu = torch.cuda.get_device_name(place.device) if place.device.type == "cuda" else None
    model = training.model.config
    given = {**config, **(stage.describe.get("config") or {})}
    return {
        "config": {**given, "model": model.plain() if model is not None else {}, "train": stage.settings.plain()},
        "facts": asdict(facts) if isinstance(facts, DataFacts) else dict(facts or {}),
        "parameters": parameter_count(training.model),
        "machine": {
            **machine(),
            "device": str(place.device),
            "gpu": gpu,
            "precision": place.precision,
            "compiled": training.compiled,
            "processes": place.world,
        },
        "seed": stage.settings.seed,
        "steps": training.steps,
    }


def _tell_skipped(folder: RunFolder, batches: Any) -> None:
    skipped = getattr(batches, "skipped", None) or getattr(getattr(batches, "source", None), "skipped", None)
    if skipped and folder.writes:
        write_json(folder.path / "skipped.json", skipped)


def _is_done(path: Path, stage: Stage, opened: Callable[[], Any]) -> bool:
    """Whether the stage has nothing left to do; more steps or epochs than it was given before are something to do.

    opened: gives the data, which is asked for its length only where the settings count epochs.
    """
    if not is_run(path):
        return False
    info = read_run(path)
    if info.get("state") != "done":
        return False
    length = opened().steps_per_epoch if stage.settings.steps is None else None
    return stage.settings.total_steps(length) <= (info.get("steps") or 0)
