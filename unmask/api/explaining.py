"""``explain``: what a classifier looks at, by several methods side by side, on one page."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from unmask.config import Config, Field, field_names, validated
from unmask.errors import UserError, nearest

Talk = Callable[[str], None]
MODEL_WORDS = ("weights", "pretrained", "classes", "image_size", "img_size", "in_chans", "num_classes")


class Ask(Config):
    """What is asked about each image, whatever the method."""

    target: int | str | None = Field(None, description="the class to explain, by number or name; open: the likeliest")
    seed: int = Field(0, description="of masks and noises")
    judge: str = Field(
        "", description="the masking of deletion and insertion curves; open: the one that suits the model"
    )
    steps_of_curves: int = Field(20, ge=2, description="points of deletion and insertion curves")
    sensitivity: int = Field(0, ge=0, description="noises to measure sensitivity with; 0: leave it out (it is slow)")
    object: str = Field(
        "", description="a mask of the object (PNG, white = object): coverage and overlap of region methods"
    )


@dataclass
class Row:
    """One method's answer. deletion, insertion: curves of the target's probability, and the areas under them."""

    method: str
    about: str
    heat: Any  # HeatMap
    seconds: float
    deletion: float
    insertion: float
    curves: dict[str, list[float]]
    numbers: dict[str, float] = field(default_factory=dict)

    def plain(self) -> dict[str, Any]:
        return {
            "method": self.method,
            "about": self.about,
            "seconds": round(self.seconds, 3),
            "deletion": self.deletion,
            "insertion": self.insertion,
            **self.numbers,
            "curves": self.curves,
            "notes": self.heat.plain(),
        }


@dataclass
class Explanation:
    """All methods' answers about one image. picture: uint8 ``[H, W, 3]``, what the model saw; answers: names and probabilities."""

    source: str
    picture: Any
    target: int
    name: str
    probability: float
    answers: list[tuple[str, float]]
    judge: str
    rows: list[Row] = field(default_factory=list)

    def plain(self) -> dict[str, Any]:
        kept = {k: getattr(self, k) for k in ("source", "target", "name", "probability", "judge")}
        return {**kept, "answers": self.answers, "methods": [r.plain() for r in self.rows]}


def explain(
    model: Any,
    files: Any,
    *,
    method: str | Sequence[str] | None = None,
    out: str | Path | None = None,
    device: str = "auto",
    tell: Talk | None = None,
    talk: Talk | None = None,
    **options: Any,
) -> list[Explanation]:
    """What speaks for a classifier's answer, by each method.

    model: a run or export of a classifier, ``timm/NAME``, ``torchvision/NAME``, a transformers folder, or a module. files: one
    image or many (paths, Pillow images, arrays, tensors). method: names, with commas or in a list; default the masking that suits
    the model, beside grey. out: a folder for ``index.html``, ``explanations.json`` and a PNG a method. options: of
    :class:`Ask`, of the methods (``samples=1000``; ``lime.samples=100`` for one of them), and of the model (``weights=FILE``,
    ``pretrained``, ``classes``). tell: called with words on the progress; talk: with lines that a person should read.
    Raises ``UserError`` for whatever does not fit, before anything is computed.
    """
    import torch

    from unmask.api.machine import check_device
    from unmask.api.predicting import _check_heads, _paths_exist, expand
    from unmask.models import open_model
    from unmask.systems.explanation import maskings, methods

    where = torch.device(check_device(device))
    _paths_exist(files)
    inputs = expand(files)
    if not inputs:
        raise UserError("nothing to explain: give image files")
    _check_heads(inputs)
    chosen = _names(method)
    for name in chosen:
        methods.class_of(name)
    if not isinstance(model, (str, Path, torch.nn.Module)) and not hasattr(model, "scores"):
        raise UserError(f"cannot explain a {type(model).__name__}: give a run, timm/NAME, torchvision/NAME or a module")
    own, asked, rest = _sorted(options)
    if own and not isinstance(model, (str, Path)):
        raise UserError(f"{next(iter(own))}= goes with a model's name, this one is built already")
    ask = validated(Ask, asked, where="explain")
    with warnings.catch_warnings(record=True) as noticed:
        warnings.simplefilter("always", UserWarning)
        user = open_model(model, **own)
    for notice in noticed:
        if talk is not None:
            talk(str(notice.message))
    if user.kind != "image classifier":
        raise UserError(f"{user.name} is a {user.kind}: unmask explain takes image classifiers")
    user.module.to(where)
    images, pictures, names = _read(user, inputs, where, talk)
    suits = maskings.best(user, images[:1])
    chosen = chosen or list(dict.fromkeys([suits, "grey"]))
    explainers, left = methods.build(chosen, rest)
    if left:
        known = [*field_names(Ask), *methods.option_names(chosen), *MODEL_WORDS]
        raise UserError(f'no option "{next(iter(left))}" in unmask explain: {nearest(next(iter(left)), known)}')
    _suitable(chosen, explainers, user)
    judge = ask.judge or suits
    judging = maskings.masking(judge, user)
    target = _target(ask.target, user)
    thing = _object(ask.object, pictures[0].shape[:2]) if ask.object else None
    folder = _folder(out)
    found = []
    for image, picture, name in zip(images, pictures, names, strict=True):
        one = _one(user, image, picture, name, explainers, ask, judge, judging, target, thing, tell)
        found.append(one)
    if folder is not None:
        _write(folder, user.name, found)
    return found


def _one(
    user: Any,
    image: Any,
    picture: Any,
    name: str,
    explainers: Mapping[str, Any],
    ask: Ask,
    judge: str,
    judging: Any,
    target: int | None,
    thing: Any,
    tell: Talk | None,
) -> Explanation:
    import torch

    from unmask.draw import Scoped, Seeded
    from unmask.systems.explanation import curves, lime, methods
    from unmask.systems.explanation.heat import HeatMap
    from unmask.systems.explanation.perturbing import likeliest

    shares = likeliest(user, image)
    classes = user.classes or tuple(str(i) for i in range(len(shares)))
    if target is not None and target >= len(shares):
        raise UserError(f"target={target}: {user.name} has the classes 0 ... {len(shares) - 1}")
    label = int(shares.argmax()) if target is None else target
    top = shares.argsort(descending=True)[:5].tolist()
    answers = [(classes[i], float(shares[i])) for i in top]
    one = Explanation(name, picture, label, classes[label], float(shares[label]), answers, judge)
    words = methods.about()
    for method, explainer in explainers.items():
        # the same masks for every method of one image, so that they differ in the masking alone
        draw = Scoped(Seeded(ask.seed), "explain")
        said = None if tell is None else (lambda text, m=method: tell(f"{Path(name).name}: {m}: {text}"))
        if said is not None:
            said("started")
        began = time.monotonic()
        found = explainer.explain(user, image, label, draw, tell=said)
        seconds = time.monotonic() - began
        heat = HeatMap(found.heat.float().cpu(), label, dict(found.notes), picture, name)
        lines, areas = {}, {}
        for kind in ("deletion", "insertion"):
            lines[kind], areas[kind] = curves.heat_curve(
                judging, image, heat.heat, label, insert=kind == "insertion", steps=ask.steps_of_curves
            )
        numbers = {}
        if "r2" in heat.notes:
            numbers["r2"] = float(heat.notes["r2"])
        if thing is not None and isinstance(heat.notes.get("weights"), torch.Tensor):
            weights, segments = heat.notes["weights"], heat.notes["segments"]
            numbers["coverage"] = float(lime.coverage(weights, segments, thing))
            numbers["overlap"] = float(lime.jaccard(weights, segments, thing))
        if ask.sensitivity:

            def again(changed: Any, explainer: Any = explainer, draw: Any = draw) -> Any:
                return explainer.explain(user, changed, label, draw).heat.cpu()

            numbers["sensitivity"] = curves.sensitivity(
                again, image, heat.heat.to(image.device), draw, times=ask.sensitivity
            )
        filling = method.partition("+")[0]
        about = words.get(method) or f"{words[filling]}, edges smoothed"
        one.rows.append(Row(method, about, heat, seconds, areas["deletion"], areas["insertion"], lines, numbers))
    return one


# --- before anything is computed ---


def _names(method: str | Sequence[str] | None) -> list[str]:
    given = method.split(",") if isinstance(method, str) else list(method or ())
    names = [m.strip() for m in given if m.strip()]
    if method is not None and not names:
        raise UserError("no method: give names with commas, such as layer_masking,lime,integrated_gradients")
    return list(dict.fromkeys(names))


def _sorted(options: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Options of the model, of ``Ask``, and the others."""
    own = {k: v for k, v in options.items() if k in MODEL_WORDS}
    asked = {k: v for k, v in options.items() if k in Ask.model_fields}
    return own, asked, {k: v for k, v in options.items() if k not in own and k not in asked}


def _read(user: Any, inputs: list[Any], device: Any, talk: Talk | None) -> tuple[Any, list[Any], list[str]]:
    import torch

    from unmask.contracts import Preprocessing
    from unmask.systems.explanation.perturbing import picture_of
    from unmask.systems.prediction.inputs import fit_channels, read_image, standardised

    if user.preprocessing is None:
        user.preprocessing = Preprocessing()
        if talk is not None:
            talk(
                f"{user.name} does not say how images are prepared: 224 x 224 with ImageNet's mean and spread are taken"
            )
    known = user.preprocessing
    read = [read_image(x, i) for i, x in enumerate(inputs)]
    images = standardised([fit_channels(a, known.channels, n) for a, n in read], known).to(device)
    with torch.no_grad():
        try:
            shape = tuple(user.scores(image=images[:1]).shape)
        except (RuntimeError, ValueError, AssertionError, TypeError) as error:
            lines = str(error).strip().splitlines() or [type(error).__name__]
            raise UserError(
                f"{user.name} does not take images of {tuple(images.shape[1:])}: {lines[0][:160]}"
            ) from None
    if len(shape) != 2 or shape[1] < 2:
        raise UserError(f"{user.name} answers with {shape}, not with one score a class [B, K]: give a classifier")
    return images, [picture_of(i, known) for i in images], [n for _, n in read]


def _suitable(chosen: Sequence[str], explainers: Mapping[str, Any], user: Any) -> None:
    """Raises ``UserError`` for a method that is not for this model, before the first one is run."""
    from unmask.draw import Seeded

    for name in chosen:
        if hasattr(explainers[name], "asked"):
            explainers[name].asked(user, Seeded(0))


def _target(target: int | str | None, user: Any) -> int | None:
    if target is None:
        return None
    names = user.classes or ()
    if isinstance(target, str) and not target.isdigit():
        if target not in names:
            raise UserError(f"target={target}: {user.name} has no such class: {nearest(target, names)}")
        return names.index(target)
    number = int(target)
    if number < 0 or (names and number >= len(names)):
        raise UserError(f"target={target}: {user.name} has the classes 0 ... {len(names) - 1}")
    return number


def _object(path: str, size: tuple[int, int]) -> Any:
    import torch

    from unmask.systems.prediction.inputs import read_image

    array, _ = read_image(path)
    grey = torch.from_numpy(array.astype("float32")).mean(dim=2)
    if tuple(grey.shape) != tuple(size):
        grey = torch.nn.functional.interpolate(grey[None, None], size, mode="area")[0, 0]
    thing = (grey > float(grey.max()) / 2).float()
    if not 0 < float(thing.sum()) < thing.numel():
        raise UserError(f"object={path} marks nothing or everything: white is the object, black is not")
    return thing


def _folder(out: str | Path | None) -> Path | None:
    if out is None:
        return None
    folder = Path(out)
    if folder.is_file():
        raise UserError(f"{folder} is a file: give a folder with -o")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / "explanations.json").is_file():
        raise UserError(f"{folder} holds something else: give a new folder with -o")
    return folder


def _write(folder: Path, model: str, found: list[Explanation]) -> None:
    from unmask.engine.run import write_json
    from unmask.reports.explanation import write_explanations
    from unmask.systems.explanation.heat import write_png

    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write {folder}: {error.strerror}") from None
    shown = []
    for number, one in enumerate(found):
        stem = Path(one.source).stem if len({Path(e.source).stem for e in found}) == len(found) else f"{number + 1}"
        write_png(folder / f"{stem}.png", one.picture)
        files = {}
        for row in one.rows:
            files[row.method] = row.heat.save(folder / f"{stem}.{row.method}.png").name
        shown.append({**one.plain(), "photo": f"{stem}.png", "files": files})
    write_json(folder / "explanations.json", {"format": 1, "model": model, "images": shown})
    write_explanations(folder)
