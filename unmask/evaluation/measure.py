"""``evaluate``: one probe on one encoder, beside the same encoder before it learned anything."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from unmask.config import validated
from unmask.contracts import Encoder, Preprocessing, Trainable
from unmask.draw import Seeded
from unmask.engine.precision import chosen_device
from unmask.engine.run import write_json
from unmask.errors import UserError, nearest
from unmask.evaluation.attentive import SETTINGS as ATTENTIVE
from unmask.evaluation.attentive import attentive, heads_for
from unmask.evaluation.features import Pool, augmented, evaluating, features
from unmask.evaluation.fresh import fresh
from unmask.evaluation.knn import knn
from unmask.evaluation.linear import SETTINGS as LINEAR
from unmask.evaluation.linear import linear
from unmask.evaluation.metrics import measured, summary
from unmask.evaluation.pictures import confusion_picture, feature_picture, save_picture
from unmask.evaluation.rankme import rankme
from unmask.evaluation.ridge import fit_ridge
from unmask.evaluation.samples import Samples, parts, preprocessing_for
from unmask.evaluation.subsets import few_labels
from unmask.evaluation.training import HeadSettings

PROBES = ("linear", "ridge", "knn", "attentive", "finetune", "rankme")
# The cheap probes are repeated on several random initialisations, so that a margin can be held against their noise.
BASELINE_SEEDS = {"ridge": 3, "knn": 3, "rankme": 3, "linear": 3, "attentive": 1, "finetune": 1}
RANDOM = "random initialisation"
LARGEST = "always the commonest class"
Tell = Callable[[str], None]


@dataclass(frozen=True)
class Asked:
    """What a probe was asked to do."""

    train: Samples
    test: Samples
    classes: tuple[str, ...]
    preprocessing: Preprocessing | None
    pool: Pool
    seed: int
    precision: Any
    options: Mapping[str, Any]
    tell: Tell | None

    def features(self, encoder: Encoder, data: Samples, pool: Pool, what: str) -> tuple[Tensor, Tensor | None]:
        def told(done: int, count: int | None) -> None:
            if self.tell is not None:
                self.tell(f"{what}: {done}" + (f" of {count}" if count else "") + " images")

        return features(encoder, data, pool, preprocessing=self.preprocessing, precision=self.precision, tell=told)


def evaluate(
    encoder_or_run: Any,
    data: Any,
    probe: str = "linear",
    *,
    labels: float = 1.0,
    baseline: bool | int = True,
    seed: int = 0,
    pool: Pool = "auto",
    limit: int | tuple[int, int] | None = None,
    precision: str = "auto",
    device: str | None = None,
    out: str | Path | None = None,
    columns: Mapping[str, str] | None = None,
    tell: Tell | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Measure an encoder by a probe, beside its random initialisation. Every share lies in 0 ... 1.

    encoder_or_run: an Encoder, a Trainable, a run, an encoder's folder, or a backbone's name (timm/resnet18).
    data: a URI, a source, tensors ``(images, labels)``, or ``{"train": ..., "test": ...}`` of such; without a test part
    the seed splits it 80/20, and the result says so. probe: linear, ridge, knn, attentive, finetune, rankme.
    labels: share of the training labels used, by class (0.01, 0.1). baseline: whether, or on how many random
    initialisations. limit: at most so many images of each part, or of (train, test). out: a folder to write
    ``<probe>.json`` and pictures to.
    options: knn k, temperature; ridge strengths; linear and attentive those of HeadSettings (epochs, base_lr ...), linear
    views (so many augmented views of each training image); finetune what :func:`.finetune.finetune` takes.

    The result: probe, data, top1, top5, per_class, confusion, classes, baseline {name: numbers, with mean and std over
    seeds}, margin over the random initialisation, seconds and how it was measured; for rankme: rankme instead of top1.
    Raises ``UserError`` for unknown probes, data without labels, classes that differ between the parts.
    """
    if probe not in PROBES:
        raise UserError(f"no probe {probe!r}: {nearest(probe, PROBES)}")
    started = time.monotonic()
    check_options(probe, options)
    encoder = encoder_of(encoder_or_run)
    home = next((p.device for p in encoder.parameters()), torch.device("cpu"))
    if device is not None:
        encoder = encoder.to(chosen_device(device))
    train, test, how = parts(data, seed=seed, limit=limit, labelled=probe != "rankme", columns=columns)
    result: dict[str, Any] = {
        "format": 1,
        "probe": probe,
        "data": train.uri,
        "encoder": encoder.name or type(encoder).__name__,
        "parameters": sum(p.numel() for p in encoder.parameters()),
    }
    if probe == "rankme":
        classes: tuple[str, ...] = ()
    else:
        classes = classes_of(train, test)
        if test.classes != classes:
            test = test.renumbered(classes)
        if labels != 1.0:
            if train.labels is None:
                raise UserError(
                    f"few labels need a data set of known length, {train.uri} streams: use limit and labels=1"
                )
            train = train.subset(few_labels(train.labels, labels, Seeded(seed)))
    asked = Asked(train, test, classes, preprocessing_for(encoder, train), pool, seed, precision, options, tell)
    measure = _PROBES[probe]
    numbers = measure(encoder, replace(asked, tell=_named(tell, "this model")))
    result |= numbers
    result |= {"classes": list(classes)} if classes else {}
    result["baseline"] = _baselines(encoder, asked, probe, baseline)
    result |= _margin(result, "rankme" if probe == "rankme" else "top1")
    result |= {"labels": labels, "train_samples": train.count, "test_samples": test.count, "split": how}
    result |= {"pool": "tokens" if probe == "attentive" else pool, "seed": seed}
    result["seconds"] = round(time.monotonic() - started, 2)
    skipped = {one["path"]: one for part in (train, test) if part.source for one in part.source.skipped}
    if skipped:
        result["skipped"] = list(skipped.values())
    if out is not None:
        result["pictures"] = _pictures(encoder, asked, result, Path(out))
        write_json(Path(out) / f"{probe}.json", result)
    encoder.to(home)
    return result


# What each probe takes besides what all take; fine-tuning checks its own.
OPTIONS: dict[str, tuple[str, ...]] = {
    "ridge": ("strengths", "standardise"),
    "knn": ("k", "temperature", "chunk"),
    "linear": ("settings", "views", *HeadSettings.model_fields),
    "attentive": ("settings", "num_heads", *HeadSettings.model_fields),
    "rankme": ("part",),
}


def check_options(probe: str, options: Mapping[str, Any]) -> None:
    """Raises ``UserError`` with the nearest name for an option that the probe does not have."""
    if probe == "finetune":
        return
    for name in options:
        if name not in OPTIONS[probe]:
            raise UserError(f'no option "{name}" in probe {probe}: {nearest(name, OPTIONS[probe])}')


def head_settings(probe: str, defaults: HeadSettings, options: dict[str, Any]) -> HeadSettings:
    """The settings of a trained probe; taken out of the options, as ``settings`` or one by one."""
    given = options.pop("settings", defaults)
    changes = {n: options.pop(n) for n in list(options) if n in HeadSettings.model_fields}
    return validated(HeadSettings, {**given.plain(), **changes}, where=f"probe {probe}") if changes else given


def encoder_of(found: Any) -> Encoder:
    """The encoder of a Trainable, a run, an encoder's folder or a backbone's name; an encoder is itself.

    Raises ``UserError`` in one line.
    """
    from unmask.backbones import build
    from unmask.official.hub import load_encoder

    if isinstance(found, Encoder):
        return found
    if isinstance(found, Trainable):
        if found.encoder is None:
            raise UserError(f"{found.slug or type(found).__name__} has no encoder to evaluate")
        return found.encoder
    if not isinstance(found, (str, Path)):
        raise UserError(
            f"cannot evaluate {type(found).__name__}: give an encoder, a run, a folder or a backbone's name"
        )
    if Path(found).exists():
        return load_encoder(found)
    return build(str(found))


def classes_of(train: Samples, test: Samples) -> tuple[str, ...]:
    """The classes of the training part, or of the test part where it only has more of them; the test part's labels may be
    counted otherwise. Raises ``UserError`` where there are none, one only, or others in the test part."""
    for part in (train, test):
        if part.classes is None:
            raise UserError(
                f"{part.uri or 'this data'} has no labels to probe with: use probe rankme, which needs none"
            )
    first, second = tuple(train.classes or ()), tuple(test.classes or ())
    if second[: len(first)] == first:  # tensors: of the training part only its largest label was seen
        first = second
    elif not set(second) <= set(first):
        odd = sorted(set(first) ^ set(second))
        raise UserError(
            f"the classes of train and test differ ({len(first)} and {len(second)}; {', '.join(odd[:3])}): "
            "give both parts the same classes"
        )
    if len(first) < 2:
        raise UserError(
            f"{train.uri or 'this data'} has {len(first)} class: a probe needs two or more; use probe rankme"
        )
    return first


# --- the probes -------------------------------------------------------------------------------------------------


def _features_of_parts(encoder: Encoder, asked: Asked, pool: Pool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x, y = asked.features(encoder, asked.train, pool, "train")
    x_test, y_test = asked.features(encoder, asked.test, pool, "test")
    if y is None or y_test is None:
        raise UserError(
            f"{asked.train.uri or 'this data'} has no labels to probe with: use probe rankme, which needs none"
        )
    return x, y, x_test, y_test


def _ridge(encoder: Encoder, asked: Asked) -> dict[str, Any]:
    x, y, x_test, y_test = _features_of_parts(encoder, asked, asked.pool)
    fitted = fit_ridge(x, y, len(asked.classes), **asked.options)
    chosen = {"strength": fitted.strength, "leave_one_out_top1": fitted.leave_one_out}
    return {**measured(fitted.scores(x_test), y_test), "settings": chosen, "dim": x.shape[1]}


def _knn(encoder: Encoder, asked: Asked) -> dict[str, Any]:
    x, y, x_test, y_test = _features_of_parts(encoder, asked, asked.pool)
    options = {"k": 20, "temperature": 0.07, **asked.options}
    votes = knn(x, y, x_test, classes=len(asked.classes), **options)
    return {**measured(votes, y_test), "settings": {**options, "k": min(options["k"], len(x))}, "dim": x.shape[1]}


def _linear(encoder: Encoder, asked: Asked) -> dict[str, Any]:
    x, y, x_test, y_test = _features_of_parts(encoder, asked, asked.pool)
    device = next((p.device for p in encoder.parameters()), torch.device("cpu"))
    options = dict(asked.options)
    options["settings"] = head_settings("linear", LINEAR, options)
    wanted, views = int(options.pop("views", 0)), None
    if wanted:
        views = augmented(encoder, asked.train, wanted, asked.pool, preprocessing=asked.preprocessing, seed=asked.seed)
    scores, chosen = linear(
        x,
        y,
        x_test,
        classes=len(asked.classes),
        views=views,
        seed=asked.seed,
        device=device,
        tell=asked.tell,
        **options,
    )
    return {**measured(scores, y_test), "settings": chosen, "dim": x.shape[1]}


def _attentive(encoder: Encoder, asked: Asked) -> dict[str, Any]:
    x, y, x_test, y_test = _features_of_parts(encoder, asked, "tokens")
    device = next((p.device for p in encoder.parameters()), torch.device("cpu"))
    options = {"num_heads": heads_for(x.shape[-1], encoder), **asked.options}
    options["settings"] = head_settings("attentive", ATTENTIVE, options)
    scores, chosen = attentive(
        x, y, x_test, classes=len(asked.classes), seed=asked.seed, device=device, tell=asked.tell, **options
    )
    return {**measured(scores, y_test), "settings": chosen, "dim": x.shape[-1]}


def _rankme(encoder: Encoder, asked: Asked) -> dict[str, Any]:
    x, _ = asked.features(
        encoder, asked.test if asked.options.get("part") == "test" else asked.train, asked.pool, "images"
    )
    return {"rankme": rankme(x), "dim": x.shape[1], "samples": len(x)}


def _finetune(encoder: Encoder, asked: Asked) -> dict[str, Any]:
    from unmask.evaluation.finetune import finetune

    scores, y_test, settings = finetune(
        encoder,
        asked.train,
        asked.test,
        classes=asked.classes,
        preprocessing=asked.preprocessing,
        seed=asked.seed,
        tell=asked.tell,
        precision=asked.precision,
        **asked.options,
    )
    return {**measured(scores, y_test), "settings": settings, "dim": encoder.embed_dim}


_PROBES: dict[str, Callable[[Encoder, Asked], dict[str, Any]]] = {
    "ridge": _ridge,
    "knn": _knn,
    "linear": _linear,
    "attentive": _attentive,
    "rankme": _rankme,
    "finetune": _finetune,
}


# --- beside what -------------------------------------------------------------------------------------------------


def _baselines(encoder: Encoder, asked: Asked, probe: str, wanted: bool | int) -> dict[str, Any]:
    out: dict[str, Any] = {}
    if probe != "rankme" and asked.test.labels is not None and asked.train.labels is not None:
        commonest = int(torch.bincount(asked.train.labels).argmax())
        out[LARGEST] = {"top1": round(float((asked.test.labels == commonest).float().mean()), 6)}
    count = BASELINE_SEEDS[probe] if wanted is True else int(wanted)
    if not count:
        return out
    seeds = [1_000_000 + asked.seed + i for i in range(count)]  # away from the seeds that trainings are given
    if probe == "finetune":  # layer decay protects what was learned; a network that learned nothing needs its full rate
        asked = replace(asked, options={"layer_decay": 1.0, **asked.options})
    names = [f"{RANDOM} {i + 1} of {count}" if count > 1 else RANDOM for i in range(count)]
    runs = [
        _PROBES[probe](fresh(encoder, seed), replace(asked, tell=_named(asked.tell, name)))
        for seed, name in zip(seeds, names, strict=True)
    ]
    key = "rankme" if probe == "rankme" else "top1"
    over = summary([r[key] for r in runs])
    out[RANDOM] = {key: over["mean"], f"{key}_std": over["std"], "values": over["values"], "seeds": seeds}
    if probe != "rankme":
        out[RANDOM]["top5"] = summary([r["top5"] for r in runs])["mean"]
    return out


def _named(tell: Tell | None, network: str) -> Tell | None:
    """Talk that says which network is measured."""
    return None if tell is None else lambda line: tell(f"{network}, {line}")


def _margin(result: Mapping[str, Any], key: str) -> dict[str, Any]:
    """How far above the random initialisation, and in how many of its standard deviations (None for a single seed)."""
    random = result["baseline"].get(RANDOM)
    if random is None:
        return {}
    margin = result[key] - random[key]
    noise = random[f"{key}_std"]
    return {
        "margin": margin,
        "margin_over_noise": margin / noise if noise > 0 and math.isfinite(margin / noise) else None,
    }


def _pictures(encoder: Encoder, asked: Asked, result: Mapping[str, Any], folder: Path) -> list[dict[str, str]]:
    """Draw what the probe can show into ``folder``; a file and a caption each."""
    probe, drawn = result["probe"], []
    if "confusion" in result:
        title = f"{probe} on {result['data']}: top-1 {100 * result['top1']:.1f} %"
        confusion_picture(result["confusion"], asked.classes, folder / f"{probe}-confusion.png", title=title)
        caption = "Which classes are taken for which; each row is a true class, in percent."
        drawn.append({"file": f"{probe}-confusion.png", "caption": caption})
    first = next(iter(asked.test.batches(asked.preprocessing, 8)))["image"]
    device = next((p.device for p in encoder.parameters()), torch.device("cpu"))
    if first.ndim == 4 and probe != "finetune":
        with evaluating(encoder):
            picture = feature_picture(encoder, first.to(device), preprocessing=asked.preprocessing)
        save_picture(picture, folder / "feature-pca.png")
        drawn.append({"file": "feature-pca.png", "caption": picture.caption})
    return drawn
