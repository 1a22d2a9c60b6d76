"""``predict``: what a model says about inputs."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from inspect import signature
from pathlib import Path
from typing import Any

from unmask.api.answers import Answers
from unmask.catalog import cards, supervised
from unmask.config import Config, field_names, override, validated
from unmask.errors import UserError, nearest

Talk = Callable[[str], None]
CHUNK = 16  # inputs that go to a predictor at once, unless it says otherwise (``predict_batch``)


def predict(
    model: Any,
    files: Any,
    *,
    out: str | Path | None = None,
    device: str = "auto",
    overlay: bool = True,
    tell: Talk | None = None,
    **options: Any,
) -> list[tuple[Any, Any]]:
    """What a model says about inputs: ``[(input, result), ...]`` in order.

    model: a run, an export, a loaded system, or the slug of a system, which is then built from the options that its Config knows;
    ``weights=FILE`` loads an official checkpoint. files: one path, many, or folders (PIL images and tensors pass, too).
    options: of the prediction (the system's ``Ask``: task=, threshold=, tile= ...). out: a folder that gets one result after
    another; the same call goes on where it was stopped, and finished inputs come back as they were saved. overlay: also a
    picture to look at. tell: called with words on the progress. Raises ``UserError`` when the model cannot predict, an option
    or a file is missing, or ``out`` holds something else.
    """
    return list(predict_each(model, files, out=out, device=device, overlay=overlay, tell=tell, options=options))


def predict_each(
    model: Any,
    files: Any,
    *,
    out: str | Path | None = None,
    device: str = "auto",
    overlay: bool = True,
    tell: Talk | None = None,
    talk: Talk | None = None,
    options: Mapping[str, Any] | None = None,
) -> Iterator[tuple[Any, Any]]:
    """:func:`predict`, one answer at a time: with ``out``, no more than a few results are in memory. talk: called with whole
    lines that a person should read (random weights, what is there already)."""
    import torch

    from unmask.api.machine import check_device
    from unmask.contracts import Predictor

    where = check_device(device)
    _paths_exist(files)
    loaded, left = opened(model, dict(options or {}), talk)
    slug = str(getattr(loaded, "slug", "") or type(loaded).__name__)
    if not isinstance(loaded, Predictor):
        raise UserError(f"{slug} predicts nothing by itself{_instead(loaded, model)}")
    ask = asked(loaded, left, slug)
    inputs = expand(files, getattr(loaded, "suffixes", None))
    if not inputs:
        raise UserError("nothing to predict on: give image files, or a folder that holds some")
    _check_heads(inputs)
    if isinstance(loaded, torch.nn.Module):
        loaded = loaded.to(where)
    joint = bool(getattr(loaded, "joint", False))
    answers = None
    if joint and out is not None and Path(out).suffix:  # one file was asked for, not a folder
        if Path(out).exists():
            raise UserError(f"{out} exists and would be written over: choose another --out, or remove it")
        for result in (results := loaded.predict(list(inputs), **ask, **_telling(loaded, tell))):
            result.save(Path(out))
        yield from ((str(getattr(r, "source", "") or out), r) for r in results)
        return
    if out is not None:
        shown = {name: _plain(value) for name, value in ask.items()}
        together = [str(Path(i).resolve()) for i in inputs if isinstance(i, (str, Path))] if joint else None
        answers = Answers(
            Path(out),
            {"system": slug, "weights": digest(loaded), "options": shown, **({"files": together} if joint else {})},
        )
    if joint:
        yield from _jointly(loaded, inputs, ask, answers, overlay, tell)
    else:
        yield from _one_by_one(loaded, inputs, ask, answers, overlay, tell, talk)


def _one_by_one(
    model: Any,
    inputs: list[Any],
    ask: Mapping[str, Any],
    answers: Answers | None,
    overlay: bool,
    tell: Talk | None,
    talk: Talk | None,
) -> Iterator[tuple[Any, Any]]:
    todo = list(range(len(inputs))) if answers is None else answers.plan(inputs)
    if talk is not None and len(todo) < len(inputs):
        talk(f"{len(inputs) - len(todo)} of {len(inputs)} are there already")
    started, waiting = time.monotonic(), set(todo)
    chunk = int(getattr(model, "predict_batch", CHUNK))
    ready: dict[int, Any] = {}
    done = begun = 0
    for place, item in enumerate(inputs):
        if place not in waiting:
            assert answers is not None
            yield item, answers.saved(item, place)
            continue
        if place not in ready:
            some = todo[begun : begun + chunk]
            said = _within(tell, begun, len(todo))
            results = model.predict([inputs[i] for i in some], **ask, **_telling(model, said))
            if answers is not None and not begun:
                answers.begin()
            begun += len(some)
            for i, result in zip(some, results, strict=True):
                ready[i] = result
                if answers is not None:
                    answers.write(inputs[i], i, result, overlay=overlay, said=words(result))
                done += 1
                if tell is not None:
                    tell(progress(done, len(todo), time.monotonic() - started))
        yield item, ready.pop(place)


def _jointly(
    model: Any,
    inputs: list[Any],
    ask: Mapping[str, Any],
    answers: Answers | None,
    overlay: bool,
    tell: Talk | None,
) -> Iterator[tuple[Any, Any]]:
    """All inputs are one question: results are named by themselves, or numbered."""
    results = model.predict(list(inputs), **ask, **_telling(model, tell))
    named = [str(getattr(r, "source", "") or f"result-{i + 1}") for i, r in enumerate(results)]
    if answers is not None:
        todo = answers.plan(named)
        answers.begin()
        for place in todo:
            answers.write(named[place], place, results[place], overlay=overlay, said=words(results[place]))
    yield from zip(named, results, strict=True)


# --- the model ---


def opened(
    model: Any, options: dict[str, Any], talk: Talk | None = None, *, verb: str = "predict"
) -> tuple[Any, dict[str, Any]]:
    """The model behind a word, and the options that are not its own. A slug is built from its Config's options, or, with
    ``weights=FILE``, from the authors' checkpoint and what its rules need to be told. verb: the method that is wanted of it."""
    from unmask.api.loading import load

    if not isinstance(model, (str, Path)):
        return model, options
    name = str(model)
    if Path(name).exists() or name not in cards() or not cards()[name].entry:
        if "weights" in options:
            what = "has its own" if Path(name).exists() else "is no system"
            raise UserError(f"weights={options['weights']} goes with the name of a system; {name} {what}")
        return load(name, whole=True), options
    card = cards()[name]
    cls = card.load()
    if not hasattr(cls, verb):
        raise UserError(f"{name} {verb}s nothing by itself: unmask info {name} says what it is for")
    weights = options.pop("weights", None)
    if weights is not None:
        from unmask.official.load import read_checkpoint

        rules = card.module("official")
        if rules is None or not hasattr(rules, "load_official"):
            raise UserError(f"{name} has no rules for official checkpoints: give a run of it")
        known = set(getattr(rules, "OPTIONS", ()))
        own = {k: options.pop(k) for k in list(options) if k.partition(".")[0] in known}
        if hasattr(rules, "load_file"):  # what is published in more than one file
            return rules.load_file(Path(str(weights)), own).eval(), options
        state = read_checkpoint(Path(str(weights)), prefer=getattr(rules, "PREFER", ()))
        return rules.load_official(state, own).eval(), options
    fields = set(cls.Config.model_fields)
    asks = set(_ask_class(cls).model_fields) if _ask_class(cls) is not None else set()
    own = {}
    for key in list(options):
        head = key.partition(".")[0]
        if head in fields and head not in asks:
            own = override(own, key, options.pop(key))
        elif head not in asks:
            raise UserError(
                f'no option "{key}" in {name}: {nearest(key, [*field_names(cls.Config), *asks, "weights"])}'
            )
    built = cls.build(validated(cls.Config, own, where=name))
    if talk is not None and any(True for _ in built.parameters()) and not getattr(built, "brings_weights", False):
        talk(
            f"{name} is at random initialisation and guesses: weights=FILE loads an official checkpoint, or give a run"
        )
    return built.eval(), options


def _ask_class(model: Any) -> type[Config] | None:
    ask = getattr(model, "Ask", None)
    return ask if isinstance(ask, type) and issubclass(ask, Config) else None


def asked(model: Any, options: Mapping[str, Any], slug: str) -> dict[str, Any]:
    """The validated options of a prediction, every one of the system's ``Ask``. Raises ``UserError`` for an unknown one."""
    ask = _ask_class(model)
    if ask is None:
        if options:
            raise UserError(f'no option "{next(iter(options))}" in a prediction of {slug}: it takes none')
        return {}
    nested: dict[str, Any] = {}
    for name, value in options.items():
        nested = override(nested, name, value)
    found = validated(ask, nested, where=f"a prediction of {slug}")
    return {name: getattr(found, name) for name in ask.model_fields}


def _plain(value: Any) -> Any:
    return value.plain() if isinstance(value, Config) else value


def digest(model: Any) -> str:
    """A short word that changes when the weights do."""
    import hashlib

    import torch

    if not isinstance(model, torch.nn.Module):
        return type(model).__name__
    held = hashlib.blake2b(digest_size=8)
    for name, value in sorted(model.state_dict().items()):
        number = value.detach().cpu().double()  # not every device has float64
        held.update(
            f"{name} {tuple(value.shape)} {float(number.sum()):.12e} {float(number.abs().sum()):.12e}\n".encode()
        )
    return held.hexdigest()


# --- the inputs ---


def expand(files: Any, suffixes: Any = None) -> list[Any]:
    """Paths with folders replaced by what in them can be read: images, or files with one of ``suffixes``. Raises ``UserError``
    for what is not there."""
    if isinstance(files, (str, Path)) or not isinstance(files, Sequence):
        files = [files]
    from unmask.data.decode import SUFFIXES, is_image

    def fits(path: Path) -> bool:
        return is_image(path) if suffixes is None else path.is_file() and path.name.lower().endswith(tuple(suffixes))

    out: list[Any] = []
    for item in files:
        if not isinstance(item, (str, Path)):
            out.append(item)
            continue
        path = Path(item)
        if path.is_dir():
            found = sorted(p for p in path.rglob("*") if fits(p))
            if not found:
                what = "image" if suffixes is None else "file to predict on"
                raise UserError(f"no {what} in {path}: it takes {', '.join(sorted(suffixes or SUFFIXES))}")
            out += found
        elif path.is_file():
            out.append(path)
        else:
            raise UserError(f"no file {path}: check the path")
    return out


def _paths_exist(files: Any) -> None:
    """Said before a model is loaded."""
    for item in [files] if isinstance(files, (str, Path)) or not isinstance(files, Sequence) else files:
        if isinstance(item, (str, Path)) and not Path(item).exists():
            raise UserError(f"no file {item}: check the path")


def _check_heads(inputs: Sequence[Any]) -> None:
    """Raises ``UserError`` for the first image file that is none, before anything is predicted or written."""
    from unmask.data.decode import Unreadable, header, is_image

    for item in inputs:
        if isinstance(item, (str, Path)) and is_image(Path(item)):
            try:
                header({"bytes": None, "path": str(item)})
            except Unreadable as error:
                raise UserError(f"{item} cannot be read: {error}") from None


# --- words ---


def words(result: Any) -> str:
    """A result in a few words: its own, the likeliest classes, or its plain values."""
    if hasattr(result, "words"):
        return str(result.words())
    if hasattr(result, "top"):
        return ", ".join(f"{name} {100 * share:.0f} %" for name, share in result.top(3))
    values = result.plain() if hasattr(result, "plain") else {}
    return ", ".join(
        f"{k} {v}" for k, v in values.items() if k not in ("kind", "source") and not isinstance(v, (list, dict))
    )


def _instead(model: Any, named: Any) -> str:
    """What to do with a model that predicts nothing."""
    from unmask.contracts import Encoder, Generator

    if isinstance(model, Generator):
        return f", it makes: unmask generate {named} -o samples/"
    if isinstance(model, Encoder) or getattr(model, "encoder", None) is not None:
        return f": train one that does on top: unmask train {supervised().slug} --data LABELLED init={named}"
    return ""


def _telling(model: Any, tell: Talk | None) -> dict[str, Talk]:
    """``tell`` as a keyword, for a system whose ``predict`` takes one."""
    return {"tell": tell} if tell is not None and "tell" in signature(model.predict).parameters else {}


def _within(tell: Talk | None, done: int, total: int) -> Talk | None:
    """What a system tells of its input, behind which of how many that is."""
    if tell is None or total == 1:
        return tell
    return lambda line: tell(f"{done + 1} of {total}: {line}")


def progress(done: int, total: int, seconds: float) -> str:
    """``12 of 40, 3.1 a second, 9 s left``"""
    rate = done / max(seconds, 1e-6)
    left = (total - done) / max(rate, 1e-9)
    shown = f"{left / 60:.0f} min" if left >= 120 else f"{left:.0f} s"
    speed = f"{rate:.1f} a second" if rate >= 1 else f"{1 / max(rate, 1e-9):.1f} s each"
    return f"{done} of {total}, {speed}, {shown} left"
