"""``train``: from a system and some data to a run with a model, a probe and a report."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from unmask.api import recipes
from unmask.api.layers import Layer
from unmask.api.measuring import probe_run, rewrite_report
from unmask.api.plan import Plan, StagePlan, plan
from unmask.config import parse_word
from unmask.errors import UserError

Talk = Callable[[str], None]


def train(
    system: str | Path,
    data: str | Path | None = None,
    *,
    recipe: str | None = None,
    backbone: str | None = None,
    out: str | Path | None = None,
    image_size: int | str | tuple[int, int] | None = None,
    steps: int | None = None,
    epochs: float | None = None,
    batch_size: int | None = None,
    seed: int | None = None,
    device: str | None = None,
    resume: bool = False,
    overrides: Iterable[str] | Mapping[str, Any] = (),
    talk: Talk | None = None,
    probe: bool = True,
    **options: Any,
) -> Path:
    """Train a system; returns the folder of the run. ``unmask train`` calls this with the same names.

    system: a slug, a recipe file, or (to go on) a run. data: default is the recipe's own; with data, the recipe is ``auto``.
    overrides: ``["mask_ratio=0.6", "train.lr=1e-3"]`` or the same as a mapping; options: the same as keywords
    (``mask_ratio=0.6``). talk: takes the lines meant for a person (default: stderr). probe: measure the encoder at the end.
    Raises ``UserError`` in one line for whatever does not fit, before anything is written.
    """
    talk = talk or _stderr
    words = dict(overrides if isinstance(overrides, Mapping) else map(parse_word, overrides)) | options
    asked: dict[str, Any] = {
        "recipe": recipe,
        "data": data,
        "backbone": backbone,
        "image_size": image_size,
        "steps": steps,
        "epochs": epochs,
        "batch_size": batch_size,
        "seed": seed,
        "device": device,
        "overrides": words,
    }
    if resume:
        return _go_on(str(system), None if out is None else Path(out), asked, talk, probe)
    if (Path(str(system)) / "run.json").is_file():
        raise UserError(f"{system} is a run: go on with unmask train {system} --resume, or name a system")
    folder = Path(out) if out is not None else _free_folder(_slug(str(system)))
    _refuse_occupied(folder)
    chosen = plan(system, **asked)
    return carry_out(chosen, folder, talk=talk, probe=probe, first=[*chosen.lines, *chosen.notes])


def carry_out(
    chosen: Plan,
    out: Path,
    *,
    talk: Talk,
    resume: bool = False,
    probe: bool = True,
    command: list[str] | None = None,
    first: Sequence[str] = (),
) -> Path:
    """Do what a plan says: train its stages into ``out``, then probe the encoder and write the report. first: lines that
    are said once the first model is built, so that a plan that cannot be built is refused without a word of them."""
    from unmask.engine import train as run_stages

    waiting = list(first) if _first_process() else []

    def built() -> None:
        while waiting:
            talk(waiting.pop(0))

    stages = [_stage(stage, out, chosen, built) for stage in chosen.stages]
    try:
        run_stages(stages, out, describe=_describe(chosen, out, command), resume=resume)
    except BaseException:
        if (out / "run.json").is_file() and _first_process():
            with suppress(Exception):  # the report of a run that stopped is a courtesy: the first error is the news
                rewrite_report(out)
        raise
    if not _first_process():
        return out
    if probe:
        probe_run(out, talk, seed=chosen.last.train.seed, device=chosen.last.train.device)
    rewrite_report(out)
    return out


def _stage(stage: StagePlan, out: Path, chosen: Plan, built: Callable[[], None]) -> Any:
    from unmask.engine import Stage
    from unmask.evaluation.monitors import monitors_for

    def build() -> Any:
        sources = {name: out / "stages" / earlier / "model" for name, earlier in stage.reads.items()}
        model = stage.system.build(stage.model, sources)
        built()
        return model

    told = {"config": {"data": stage.data.plain()}, "title": chosen.card.title}
    monitors = monitors_for(stage.batches, seed=stage.train.seed) if stage.system.Data is None else []
    return Stage(stage.name, build, stage.batches, stage.train, monitors, told)


def _describe(chosen: Plan, out: Path, command: list[str] | None) -> dict[str, Any]:
    last = chosen.last
    return {
        "system": chosen.card.slug,
        "title": chosen.card.title,
        "command": command or _command(chosen, out),
        "recipe": chosen.recipe,
        "auto": chosen.lines or None,
        "config": last.plain(),
        "entries": {
            s.name: {"entry": f"{s.system.__module__}:{s.system.__qualname__}", "from": s.reads} for s in chosen.stages
        },
        **({"stage_configs": {s.name: s.plain() for s in chosen.stages}} if len(chosen.stages) > 1 else {}),
        "seed": last.train.seed,
    }


def _command(chosen: Plan, out: Path) -> list[str]:
    """The words that started this, where they were typed; else the command that does the same."""
    if Path(sys.argv[0]).name in ("unmask", "__main__.py") and len(sys.argv) > 1 and sys.argv[1] == "train":
        return ["unmask", *sys.argv[1:]]
    return ["unmask", "train", chosen.card.slug, "--data", chosen.last.data.uri, "--out", str(out)]


# --- going on ---


def _go_on(system: str, out: Path | None, asked: dict[str, Any], talk: Talk, probe: bool) -> Path:
    from unmask.engine.run import reopen

    folder = out or Path(system)
    if out is None and not folder.is_dir():
        raise UserError(f"--resume needs the run: unmask train {system} --out RUN --resume")
    info = reopen(folder).info
    slug = str(info.get("system") or "")
    if (
        out is not None
        and not recipes.is_file(system)
        and Path(system).resolve() != folder.resolve()
        and system != slug
    ):
        raise UserError(
            f"{folder} is a run of {slug}, not of {system}: use unmask train {slug} --out {folder} --resume"
        )
    base = _own_options(info)
    known = recipes.from_file(system) if recipes.is_file(system) else None
    name = str(info.get("recipe") or "tiny")
    if info.get("entries") and not known:  # the run says itself what it was made of, whatever became of its recipe
        own = {"about": "", "stages": [{"name": n, **e} for n, e in info["entries"].items()]}
        made = recipes.parse(slug, name, own, where=str(folder))
        again = plan(slug, base=base, made=made, **{**asked, "recipe": None})
    else:
        again = plan(
            system if known else slug,
            base=base,
            **{**asked, "recipe": None if known else (name if _has_recipe(slug, name) else "tiny")},
        )
    again.recipe, again.lines = name, list(info.get("auto") or [])
    if _has_nothing_left(again, folder) and (not probe or any((folder / "evaluation").glob("*.json"))):
        talk(f"{folder} is already done: go on with more steps (--steps) or epochs")
        return folder
    return carry_out(
        again, folder, talk=talk, resume=True, probe=probe, command=list(info.get("command") or []) or None
    )


def _has_nothing_left(chosen: Plan, folder: Path) -> bool:
    """Whether every stage of the run has done all the steps that the plan asks for."""
    from unmask.engine.run import is_run, read_run, stage_folder

    for stage in chosen.stages:
        path = stage_folder(folder, stage.name, len(chosen.stages))
        done = read_run(path) if is_run(path) else {}
        if done.get("state") != "done":
            return False
        if stage.train.total_steps(stage.batches.steps_per_epoch) > (done.get("steps") or 0):
            return False
    return True


def _own_options(info: Mapping[str, Any]) -> dict[str, Layer]:
    """The options that a run began with, by stage."""
    found = info.get("stage_configs") or {"main": info.get("config") or {}}
    return {
        stage: {part: dict(own.get(part) or {}) for part in ("data", "model", "train")} for stage, own in found.items()
    }


def _has_recipe(slug: str, name: str) -> bool:
    from unmask.catalog import recipes as known

    return name in known(slug)


# --- folders ---


def _slug(system: str) -> str:
    return Path(system).stem if recipes.is_file(system) else system


def _free_folder(slug: str, under: Path = Path("runs")) -> Path:
    """``runs/mae-001``, or the next number that is free."""
    taken = [p.name.rpartition("-")[2] for p in under.glob(f"{slug}-*")] if under.is_dir() else []
    number = max((int(t) for t in taken if t.isdigit()), default=0) + 1
    return under / f"{slug}-{number:03d}"


def _refuse_occupied(folder: Path) -> None:
    from unmask.engine.run import refuse_occupied

    refuse_occupied(folder)


def _first_process() -> bool:
    return int(os.environ.get("RANK", "0")) == 0


def _stderr(line: str) -> None:
    print(line, file=sys.stderr)
