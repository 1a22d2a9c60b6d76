"""``generate``: new samples of a trained generator, image after image, into a folder that can be gone on with."""

from __future__ import annotations

import io
import json
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from unmask.config import parse_word
from unmask.errors import UserError

Talk = Callable[[str], None]
TOLD = "made_by.json"
GRID = "grid.png"
_ON_GRID = 64  # images at most on the sheet


def generate(
    model: Any,
    n: int = 16,
    *,
    classes: Any = None,
    steps: int | None = None,
    guidance: float | None = None,
    seed: int = 0,
    size: str | Sequence[int] | None = None,
    out: str | Path | None = None,
    batch: int = 16,
    device: str = "auto",
    overwrite: bool = False,
    overrides: Iterable[str] | Mapping[str, Any] = (),
    talk: Talk | None = None,
    warn: Talk | None = None,
    **options: Any,
) -> list[Any]:
    """``n`` new images of a trained generator: ``Sample`` objects in order, ``value`` uint8 ``[H, W, 3]``.

    model: a run, an export, a loaded system, or a system's slug, built from the options that its Config knows or, with
    ``weights=FILE``, from an official checkpoint. classes: one by name or number ("none": the empty class), or several that
    the images take in turn; default: all in turn. size: "32x48" or (32, 48), height x width. out: a folder that gets a PNG an
    image, ``grid.png`` and ``made_by.json``; when it was stopped the same call goes on, and a call that differs is refused unless
    ``overwrite``. batch: images made together, which changes speed and memory alone. overrides, options: what the system's own
    ``Ask`` takes (``solver=heun``). talk: called with words on the progress; warn: with whole lines that a person should read.
    Image i depends on (seed, i) alone. Raises ``UserError`` in one line.
    """
    from unmask.api.machine import check_device
    from unmask.draw import Seeded

    if n < 1:
        raise UserError(f"n={n} must be at least 1")
    if batch < 1:
        raise UserError(f"batch={batch} must be at least 1")
    if steps is not None and steps < 1:
        raise UserError(f"steps={steps} must be at least 1")
    wanted = pixels(size)
    where = check_device(device)
    given = dict(overrides if isinstance(overrides, Mapping) else map(parse_word, overrides)) | options
    system, given = _opened(model, given, warn)
    system = system.to(where) if hasattr(system, "to") else system
    asked = {"steps": steps, "guidance": guidance, "size": wanted, **given}
    condition = _in_turn(system, classes, n)
    if hasattr(system, "asked"):  # refused before a folder is made
        system.asked(1, Seeded(seed), condition=condition and condition[:1], **_sorted(asked, given))
    folder = None if out is None else _Folder(Path(out), _told(system, model, n, condition, seed, asked), overwrite)
    try:
        samples = _made(system, n, condition, seed, asked, batch, folder, talk or _nothing)
    except UserError:  # what a generator refuses leaves nothing behind
        if folder is not None:
            folder.undo()
        raise
    if folder is not None:
        folder.finish(samples)
    return samples


def _opened(model: Any, options: dict[str, Any], talk: Talk | None) -> tuple[Any, dict[str, Any]]:
    """The generator, and the options that belong to the call."""
    from unmask.api.predicting import opened
    from unmask.contracts import Generator

    loaded, left = opened(model, options, talk, verb="generate")
    if not isinstance(loaded, Generator):
        slug = getattr(loaded, "slug", "") or type(loaded).__name__
        raise UserError(f"{slug} generates nothing: give a run of one that does (unmask list --verb generate)")
    return loaded, left


def pixels(size: str | Sequence[int] | None) -> list[int] | None:
    """ "32x48", "32", or (32, 48) as [height, width]. Raises ``UserError`` for anything else."""
    if size is None:
        return None
    parts = str(size).lower().split("x") if isinstance(size, (str, int)) else list(size)
    try:
        sides = [int(part) for part in parts]
    except ValueError:
        sides = []
    if not 1 <= len(sides) <= 2 or min(sides) < 1:
        raise UserError(f"--size {size} is no size: write pixels, 32 or 32x48 (height x width)")
    return sides * 2 if len(sides) == 1 else sides


def _sorted(asked: Mapping[str, Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """What every generator is asked, and under ``options`` what only this one takes."""
    return {**{k: v for k, v in asked.items() if k not in options}, "options": dict(options)}


def _in_turn(system: Any, classes: Any, n: int) -> list[Any] | None:
    """The class of every image: image i has the (i mod k)-th of those given, or of all."""
    names = getattr(system, "class_names", ())
    if classes is None:
        return [i % len(names) for i in range(n)] if names else None
    several = [classes] if isinstance(classes, (int, str)) else list(classes)
    if not several:
        return _in_turn(system, None, n)
    if hasattr(system, "class_id"):
        several = [system.class_id(c) for c in several]
    return [several[i % len(several)] for i in range(n)]


def _made(
    system: Any,
    n: int,
    condition: list[Any] | None,
    seed: int,
    asked: Mapping[str, Any],
    batch: int,
    folder: _Folder | None,
    talk: Talk,
) -> list[Any]:
    """All samples, those that lie in the folder already read from there."""
    from unmask.contracts import Sample
    from unmask.draw import Seeded

    samples: list[Any] = []
    begun, fresh = time.monotonic(), 0
    for first in range(0, n, batch):
        count = min(batch, n - first)
        kept = folder.kept(first, count) if folder is not None else None
        if kept is not None:
            samples += [Sample(value, about) for value, about in kept]
            continue
        done = first

        def tell(text: str, done: int = done, fresh: int = fresh) -> None:
            talk(f"generate: {done} of {n} images, {text}{_left(begun, fresh, n - done)}")

        tell("starting")
        some = None if condition is None else condition[first : first + count]
        made = system.generate(count, Seeded(seed, 0, first), condition=some, tell=tell, **asked)
        for number, sample in enumerate(made, start=first):
            sample.made_by |= {"number": number, "seed": seed}
            if folder is not None:
                folder.keep(number, sample)
        samples += made
        fresh += count
    talk(f"generate: {n} of {n} images")
    return samples


def _left(begun: float, done: int, rest: int) -> str:
    if not done:
        return ""
    rate = done / max(time.monotonic() - begun, 1e-9)
    return f", {rate:.3g} images/s, {rest / rate:.0f} s left"


def _told(
    system: Any, model: Any, n: int, condition: list[Any] | None, seed: int, asked: Mapping[str, Any]
) -> dict[str, Any]:
    """What the images are made of, as plain values: what ``made_by.json`` says, and what a folder is compared by."""
    from unmask import __version__
    from unmask.api.predicting import digest

    known = {"run": str(model), **_run_facts(Path(model))} if isinstance(model, (str, Path)) else {"run": None}
    return {
        "unmask": __version__,
        "system": getattr(system, "slug", "") or type(system).__name__,
        **known,
        "weights": digest(system),
        "seed": seed,
        "n": n,
        "asked": {k: v for k, v in asked.items() if v is not None},
        "classes": condition,
    }


def _run_facts(path: Path) -> dict[str, Any]:
    """How far the run's weights were trained, and whether they are averaged."""
    from unmask.api.loading import is_run

    if not is_run(path):
        return {}
    from unmask.engine.run import read_run

    info = read_run(path)
    ema = ((info.get("config") or {}).get("train") or {}).get("ema")
    return {"step": info.get("exported_step") or info.get("steps"), "averaged": ema or None}


class _Folder:
    """The folder of a call: what lies in it already, and what is added. Raises ``UserError`` rather than write over anything."""

    def __init__(self, path: Path, told: dict[str, Any], overwrite: bool):
        from unmask.engine.run import mended_errors

        self.path, self.told = path, told
        self.images: dict[int, dict[str, Any]] = {}
        self.fresh = not path.exists()
        with mended_errors(f"making {path}"):
            path.mkdir(parents=True, exist_ok=True)
        if overwrite:
            self._take_away()
        else:
            self._go_on_or_refuse()
        self.begin()

    def file(self, number: int) -> Path:
        return self.path / f"{number:05d}.png"

    def _go_on_or_refuse(self) -> None:
        before = self._before()
        if before is None:
            taken = [p for p in (*map(self.file, range(self.told["n"])), self.path / GRID) if p.exists()]
            if taken:
                raise UserError(
                    f"{taken[0]} exists and was made by something else: choose another --out, or --overwrite"
                )
            return
        for key in ("weights", "seed", "asked"):
            if before.get(key) != self.told[key]:
                raise UserError(
                    f"{self.path} holds images made with {_words(key, before.get(key))}, now {_words(key, self.told[key])}: "
                    "choose another --out, or --overwrite"
                )
        both = list(zip(before.get("classes") or [], self.told["classes"] or [], strict=False))
        if any(a != b for a, b in both):
            raise UserError(f"{self.path} holds images of other classes: choose another --out, or --overwrite")
        self.images = {int(i["number"]): i for i in before.get("images") or [] if (self.path / i["file"]).is_file()}

    def _take_away(self) -> None:
        """The images of an earlier call that this one will not write over: they would lie among others, told of nowhere."""
        try:
            listed = [int(i["number"]) for i in (self._before() or {}).get("images") or []]
        except (UserError, KeyError, TypeError, ValueError):
            listed = []
        for number in listed:
            if number >= self.told["n"]:
                self.file(number).unlink(missing_ok=True)

    def _before(self) -> dict[str, Any] | None:
        path = self.path / TOLD
        if not path.is_file():
            return None
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(f"{path} cannot be read: {error}: choose another --out, or --overwrite") from None
        return found if isinstance(found, dict) else {}

    def begin(self) -> None:
        """Say what is being made before the first image is: a call that is stopped can go on."""
        self._tell("running")

    def _tell(self, state: str) -> None:
        from unmask.engine.run import write_json

        listed = [self.images[number] for number in sorted(self.images)]
        command = ["unmask", *sys.argv[1:]] if sys.argv[1:2] == ["generate"] else None
        n = max(self.told["n"], len(listed))
        write_json(self.path / TOLD, {**self.told, "n": n, "state": state, "command": command, "images": listed})

    def kept(self, first: int, count: int) -> list[tuple[Any, dict[str, Any]]] | None:
        """The images of a chunk with what made them, where all of them are there."""
        if any(number not in self.images for number in range(first, first + count)):
            return None
        import numpy as np
        from PIL import Image

        found = []
        for number in range(first, first + count):
            with Image.open(self.path / self.images[number]["file"]) as image:
                found.append((np.asarray(image.convert("RGB")), dict(self.images[number])))
        return found

    def keep(self, number: int, sample: Any) -> None:
        from unmask.engine.run import replace_file

        path = self.file(number)
        if number not in self.images:
            replace_file(path, _png(sample.value))
        self.images[number] = {"file": path.name, **sample.made_by}
        if (number + 1) % 8 == 0:
            self._tell("running")

    def undo(self) -> None:
        """Leave no folder that holds no image."""
        if not self.images and self.fresh:
            (self.path / TOLD).unlink(missing_ok=True)
            with suppress(OSError):
                self.path.rmdir()

    def finish(self, samples: Sequence[Any]) -> None:
        from unmask.engine.run import replace_file
        from unmask.systems.generation.pictures import sheet

        replace_file(self.path / GRID, _png(sheet([s.value for s in samples[:_ON_GRID]])))
        self._tell("done")


def _words(key: str, value: Any) -> str:
    if key == "weights":
        return "other weights" if value else "unknown weights"
    if isinstance(value, Mapping):
        return ", ".join(f"{k}={v}" for k, v in value.items()) or "the default options"
    return f"{key} {value}"


def _png(pixels: Any) -> bytes:
    from PIL import Image

    content = io.BytesIO()
    Image.fromarray(pixels).save(content, format="PNG", optimize=True)
    return content.getvalue()


def _nothing(text: str) -> None:
    pass
