"""``compress``: a user's own model made smaller under a budget, measured beside the original and the usual baselines."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from unmask.errors import UserError, nearest

Talk = Callable[[str], None]
REPORT, PAGE, PICTURE, RANKING = "report.json", "report.html", "importance.png", "ranking.json"
TEST = 2000  # samples of the test part that the metric looks at, unless told otherwise
BATCH = 32


def compress(
    model: Any,
    *,
    method: str = "optin",
    data: Any = None,
    budget: Any = "macs=0.6",
    out: str | Path | None = None,
    baselines: bool | Iterable[str] = True,
    limit: int | None = None,
    batch_size: int = BATCH,
    seed: int = 0,
    device: str = "auto",
    onnx: bool = False,
    model_options: Mapping[str, Any] | None = None,
    overrides: Iterable[str] | Mapping[str, Any] = (),
    talk: Talk | None = None,
    tell: Talk | None = None,
) -> dict[str, Any]:
    """Make a model smaller; returns the report, with ``model`` (a ``UserModel``) in it.

    model: anything ``unmask.models.open_model`` takes; model_options go to it (``weights=FILE``). method: a system of
    ``unmask list --verb compress``; overrides: its options. data: a URI of images or text, ``{"train": ..., "test": ...}`` of
    lists of batches, or one list of batches. budget: ``macs=0.6``, ``parameters=5M``, ``bytes=4M``, ``ms=12``. out: a folder that
    gets the smaller model, the table (``report.json``, ``report.html``) and the picture of what was cut. baselines: also
    magnitude, random, torch prune, int8. limit: test samples at most. Raises ``UserError`` in one line.
    """
    from unmask.api.machine import check_device
    from unmask.catalog import card
    from unmask.contracts import Trainable
    from unmask.engine.run import refuse_occupied
    from unmask.models import open_model
    from unmask.systems.compression.budget import parse_budget

    say = talk or _stderr
    wanted = parse_budget(budget)
    found = card(method)
    if found.verb != "compress":
        raise UserError(f"{method} does not compress: {nearest(method, _compressors())}")
    names = _baselines(baselines)
    cls = found.load()
    if isinstance(cls, type) and issubclass(cls, Trainable):
        return _learned(cls, model, data, out, seed, device, overrides, say)
    options = _options(cls, method, overrides)
    if data is None:
        raise UserError(f"which data? unmask compress {model} --data URI: it calibrates and measures on it")
    if out is not None:
        refuse_occupied(Path(out))
    opened = open_model(model, **(model_options or {}))
    opened.module.to(check_device(device))
    train, test, how = _data(opened, data, limit or TEST, batch_size, seed)
    return _one_shot(
        cls(options),
        opened,
        wanted,
        train,
        test,
        how,
        names,
        seed,
        Path(out) if out is not None else None,
        onnx,
        say,
        tell,
    )


def _one_shot(
    compressor: Any,
    model: Any,
    budget: Any,
    train: Callable[[], Iterable[Any]],
    test: Callable[[], Iterable[Any]],
    how: str,
    names: tuple[str, ...],
    seed: int,
    out: Path | None,
    onnx: bool,
    say: Talk,
    tell: Talk | None,
) -> dict[str, Any]:
    from unmask.draw import Seeded
    from unmask.systems.compression import budget as budgets
    from unmask.systems.compression import measure

    draw = Seeded(seed)
    began = time.monotonic()
    say(f"{model.name}: {model.kind}, {measure.parameters(model.module):,} parameters; {how}")
    made = compressor.compress(model, train(), budget, draw, tell=tell)
    smaller = made.model
    say(f"{compressor.slug}: cut in {time.monotonic() - began:.0f} s; now measuring")
    arms = {"original": model, compressor.slug: smaller}
    arms |= _beside(compressor, model, smaller, budget, train, draw, names, say)
    one = next(iter(test()))
    rows = measure.measured(arms, test, {k: v[:BATCH] for k, v in one.items() if hasattr(v, "shape")}, tell=tell)
    report = {
        "format": 1,
        "method": compressor.slug,
        "model": model.name,
        "kind": model.kind,
        "budget": budgets.plain(budget),
        "options": compressor.config.plain(),
        "data": how,
        "seed": seed,
        "seconds": round(time.monotonic() - began, 1),
        "rows": rows,
        "loads": _loads(smaller),
        **made.report,
    }
    if out is not None:
        _written(report, smaller, made, out, onnx, say)
    return report | {"model": smaller}


# --- what it is compared with -------------------------------------------------------------------------------------


def _beside(
    compressor: Any,
    model: Any,
    smaller: Any,
    budget: Any,
    train: Callable[[], Iterable[Any]],
    draw: Any,
    names: tuple[str, ...],
    say: Talk,
) -> dict[str, Any]:
    """The baselines: the method's own search with other scores where it has them, and torch's two."""
    from unmask.systems.compression import baselines as b
    from unmask.systems.compression import measure

    out: dict[str, Any] = {}
    scored = "importance" in type(compressor.config).model_fields
    for name in names:
        if name in ("magnitude", "random") and scored:
            if compressor.config.importance == name:
                continue
            own = compressor.config.model_copy(update={"importance": name, "units": _without_tokens(compressor.config)})
            try:
                out[name] = type(compressor)(own).compress(model, train(), budget, draw).model
            except UserError as error:
                say(f"{name} is left out: {error}")
        elif name == "torch prune":
            share = measure.parameters(smaller.module) / max(measure.parameters(model.module), 1)
            out[name] = b.torch_pruned(model, min(share, 1.0))
        elif name == "int8" and (made := b.int8(model)) is not None:
            out[name] = made
    return out


def _without_tokens(config: Any) -> Any:
    return tuple(u for u in config.units if u != "tokens")


def _baselines(wanted: bool | Iterable[str]) -> tuple[str, ...]:
    from unmask.systems.compression.baselines import NAMES

    if isinstance(wanted, bool):
        return NAMES if wanted else ()
    chosen = tuple(wanted)
    for name in chosen:
        if name not in NAMES:
            raise UserError(f"no baseline {name!r}: {nearest(name, NAMES)}")
    return chosen


# --- data ---------------------------------------------------------------------------------------------------------


def _data(
    model: Any, data: Any, limit: int, batch_size: int, seed: int
) -> tuple[Callable[[], Iterable[Any]], Callable[[], Iterable[Any]], str]:
    """Batches to calibrate on, batches to measure on (both anew at each call), and where they come from."""
    if isinstance(data, Mapping) and {"train", "test"} <= set(data) and isinstance(data["train"], (list, tuple)):
        return lambda: data["train"], lambda: data["test"], "train and test batches as given"
    if isinstance(data, (list, tuple)) and data and isinstance(data[0], Mapping):
        return lambda: data, lambda: data, "the same batches to calibrate and to measure, as given"
    if model.text:
        return _text(model, data, limit, batch_size, seed)
    from unmask.data.order import shuffled
    from unmask.evaluation.samples import parts

    train, test, how = parts(data, seed=seed, limit=(50_000, limit))
    train, test = (_in_order_of(model, part) for part in (train, test))
    if train.count is not None:  # calibration takes the first ones: classes must not stand in a row
        import torch

        train = train.subset(torch.from_numpy(shuffled(train.count, seed=seed)[:4096].copy()))
    prepared = model.preprocessing
    if prepared is None and train.facts is not None:
        raise UserError(f"{model.name} does not say how its images are prepared: give preprocessing=Preprocessing(...)")
    return (
        lambda: train.batches(prepared, batch_size),
        lambda: test.batches(prepared, batch_size),
        f"{how}; the metric on {test.count if test.count is not None else limit} images",
    )


def _in_order_of(model: Any, part: Any) -> Any:
    """Labels numbered as the model's classes are. Raises ``UserError`` for data with other classes than the model."""
    have, known = part.classes, model.classes
    if not have or not known:
        return part
    if len(have) > len(known):
        raise UserError(
            f"the data has {len(have)} classes, {model.name} knows {len(known)}: give data with the classes of the model"
        )
    numbers = all(name.isdigit() for name in known)
    if numbers and len(have) != len(known):
        raise UserError(
            f"the data has {len(have)} classes, {model.name} knows {len(known)}: give data with the classes of the model"
        )
    if numbers or tuple(have) == tuple(known):
        return part
    other = [name for name in have if name not in known]
    if other:
        raise UserError(f"the data has the class {other[0]!r}, {model.name} knows it not: {nearest(other[0], known)}")
    return part.renumbered(tuple(known))


def _text(
    model: Any, data: Any, limit: int, batch_size: int, seed: int
) -> tuple[Callable[[], Iterable[Any]], Callable[[], Iterable[Any]], str]:
    from itertools import islice

    from unmask.data.text import TextBatches, TextSettings, Tokenizer
    from unmask.data.text.batches import everything

    folder = Path(model.name)
    if not (folder / "tokenizer.json").is_file():
        raise UserError(f"{model.name} brings no tokenizer.json: give batches of tokens as data instead of {data}")
    tokenizer = Tokenizer.load(folder)
    length = min(int(getattr(model.module.config, "max_position_embeddings", 128) or 128), 128)
    rows = "stream" if model.kind == "causal lm" else "each"

    def batches(split: str, most: int) -> Callable[[], Iterable[Any]]:
        settings = TextSettings(uri=str(data), split=split, rows=rows, length=length)  # type: ignore[arg-type]
        opened = TextBatches(settings, 1, seed, tokenizer=tokenizer)
        if rows == "each" and opened.classes and model.classes and len(opened.classes) != len(model.classes):
            raise UserError(
                f"the data has {len(opened.classes)} classes, {model.name} knows {len(model.classes)}: "
                "give data with the classes of the model"
            )
        keep = ("tokens", "attention_mask", "label")
        return lambda: (
            {k: v for k, v in b.items() if k in keep}
            for b in islice(everything(opened, batch_size), max(most // batch_size, 1))
        )

    try:
        return batches("train", 4096), batches("test", limit), "train and test splits of the text"
    except UserError as error:
        if "split" not in str(error):
            raise
    return (
        batches("train[:80%]", 4096),
        batches("train[80%:]", limit),
        "no test split: 80 % of the rows to calibrate, 20 % to measure",
    )


# --- writing ------------------------------------------------------------------------------------------------------


def _written(report: dict[str, Any], smaller: Any, made: Any, out: Path, onnx: bool, say: Talk) -> None:
    from unmask.engine.run import write_json
    from unmask.reports.compression import page
    from unmask.systems.compression.pictures import importance_picture

    smaller.save(out)
    for name, content in (getattr(made, "files", None) or {}).items():
        (out / name).write_bytes(content)
    layers = (report.get("importance") or {}).get("layers")
    if layers:
        importance_picture(layers, out / PICTURE)
        write_json(
            out / RANKING, {"format": 1, "layers": [{k: x[k] for k in ("name", "kind", "scores")} for x in layers]}
        )
    write_json(out / REPORT, report)
    if onnx:
        try:
            smaller.export_onnx(out / "onnx")
        except UserError as error:
            say(f"no ONNX file: {error}")
    page(out)
    say(f"written to {out}: the model (unmask.load), {REPORT}, {PAGE}, {PICTURE}")


def _loads(model: Any) -> dict[str, Any]:
    """How the smaller model is loaded by its own library."""
    from unmask.models.saving import plain_config

    options, why = plain_config(model)
    if options is None:
        return {"plain": False, "why": why}
    return {"plain": True, "options": options}


# --- compressors that learn ---------------------------------------------------------------------------------------


def _learned(
    cls: Any, model: Any, data: Any, out: Any, seed: int, device: str, overrides: Any, say: Talk
) -> dict[str, Any]:
    """A compressor that learns is trained by the engine inside OUT; what it makes of the model lies in ``OUT/model``."""
    from unmask.api.loading import load
    from unmask.api.measuring import evaluate
    from unmask.api.training import train
    from unmask.engine.run import write_json
    from unmask.models import open_model

    if out is None:
        raise UserError(f"where to? {cls.slug} is trained: unmask compress {model} --method {cls.slug} -o DIR")
    words = dict(overrides) if isinstance(overrides, Mapping) else list(overrides)
    if "model" in cls.Config.model_fields and isinstance(model, (str, Path)):
        words = {"model": str(model), **words} if isinstance(words, dict) else [f"model={model}", *words]
    folder = Path(out) / "training"
    recipe = cls.recipe_for(open_model(model)) if hasattr(cls, "recipe_for") else None
    run = train(
        cls.slug, data=data, recipe=recipe, out=folder, seed=seed, device=device, overrides=words, talk=say, probe=False
    )
    system: Any = load(run, whole=True)
    made = system.finish()
    if made is None:
        raise UserError(f"{cls.slug} was trained and made nothing of the model")
    report = {"format": 1, "method": cls.slug, "model": str(model), "seed": seed, "rows": [], **made.report}
    if system.measures:
        say("measuring it beside the original and the usual baselines ...")
        report["scores"] = evaluate(run, device=device, talk=say)
    user = getattr(system, "user", None)
    if user is not None:
        from dataclasses import replace

        smaller = replace(user, module=made.model)
        smaller.save(Path(out) / "model")
    for name, content in (getattr(made, "files", None) or {}).items():
        (Path(out) / name).write_bytes(content)
    write_json(Path(out) / REPORT, report)
    say(f"written to {out}")
    return report | {"model": made.model}


# --- options ------------------------------------------------------------------------------------------------------


def _options(cls: Any, method: str, overrides: Any) -> Any:
    from unmask.config import override, parse_word, validated

    values: dict[str, Any] = {}
    for key, value in overrides.items() if isinstance(overrides, Mapping) else map(parse_word, overrides):
        values = override(values, key, value)
    return validated(cls.Config, values, where=method)


def _compressors() -> list[str]:
    from unmask.catalog import list_systems

    return [c.slug for c in list_systems("compress")]


def _stderr(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
