"""``open_model``: whose model a word names, and how each family's models are built and loaded."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from unmask.contracts import Preprocessing, Trainable
from unmask.errors import UserError, nearest
from unmask.models.transformers_models import open_transformers, read_json, read_transformers, wrap_transformers
from unmask.models.user import Kind, UserModel
from unmask.official import hub
from unmask.official.load import load_strict, read_checkpoint
from unmask.official.reshaped import Surgery, reshape

DESCRIPTION = "unmask.json"  # what ``save`` writes beside a foreign model's own files


def open_model(
    model: Any,
    *,
    weights: str | Path | None = None,
    pretrained: bool | None = None,
    classes: int | tuple[str, ...] | list[str] | None = None,
    preprocessing: Preprocessing | None = None,
    kind: Kind | None = None,
    **arguments: Any,
) -> UserModel:
    """A whole model with its head, in evaluation mode.

    model: a run or an export of a classifier of ours, ``timm/NAME``, ``torchvision/NAME``, a folder of transformers, a folder
    that ``UserModel.save`` wrote, or an ``nn.Module``. weights: a checkpoint for timm's and torchvision's architectures (a file,
    read as data). pretrained: their published weights (default: where no weights are given). classes: their number or names.
    arguments: of ``timm.create_model`` or the torchvision builder (``img_size=96``). Raises ``UserError`` in one line: unknown
    names, files that hold code, models that are no classifier.
    """
    if isinstance(model, UserModel):
        return model
    if isinstance(model, Trainable):
        return _of_ours(model, model.slug)
    if isinstance(model, nn.Module):
        return _of_module(model, classes, preprocessing, kind)
    if not isinstance(model, (str, Path)):
        raise UserError(
            f"cannot open a {type(model).__name__}: give a run, timm/NAME, torchvision/NAME, a folder or a module"
        )
    name = str(model)
    path = Path(name)
    if path.is_file():
        raise UserError(
            f"{name} is a file: say whose architecture it is, for example torchvision/resnet18 weights={name}"
        )
    if path.is_dir():
        return _of_folder(path)
    if name.startswith("timm/"):
        opened = _of_timm(name, weights, pretrained, classes, arguments)
    elif name.startswith("torchvision/"):
        opened = _of_torchvision(name, weights, pretrained, classes, arguments)
    else:
        known = ("timm/NAME", "torchvision/NAME")
        raise UserError(f"no model {name}: give a run, an export, {' or '.join(known)}, or a folder of transformers")
    if preprocessing is not None:
        opened.preprocessing = preprocessing
    return opened.eval()


# --- modules and ours ---------------------------------------------------------------------------------------------


def _of_module(module: nn.Module, classes: Any, preprocessing: Preprocessing | None, kind: Kind | None) -> UserModel:
    if hasattr(module, "config") and hasattr(module.config, "model_type"):
        return wrap_transformers(module, type(module).__name__, None)
    return UserModel(
        module.eval(), kind or "image classifier", "module", type(module).__name__, _names(classes), preprocessing
    )


def _of_ours(system: Trainable, name: str) -> UserModel:
    if getattr(system, "kind", None) == "causal lm":
        return UserModel(
            system.eval(), "causal lm", "unmask", name, None, None, system.side_files.get("tokenizer.json")
        )
    if getattr(system, "kind", None) == "text classifier":
        classes, tokenizer = getattr(system, "classes", None), system.side_files.get("tokenizer.json")
        return UserModel(system.eval(), "text classifier", "unmask", name, tuple(classes or ()), None, tokenizer)
    if not hasattr(system, "logits") or not getattr(system, "classes", None):
        raise UserError(f"{name} is no classifier: train one on top of it: unmask train classifier init={name}")
    known = system.encoder.preprocessing if system.encoder is not None else None
    if known is None and system.encoder is not None:
        e = system.encoder
        known = Preprocessing(image_size=tuple(e.image_size), channels=e.in_channels)
        if e.in_channels != 3:
            known = Preprocessing((0.5,) * e.in_channels, (0.5,) * e.in_channels, tuple(e.image_size), e.in_channels)
    return UserModel(system.eval(), "image classifier", "unmask", name, tuple(system.classes), known)  # type: ignore[arg-type]


def _of_folder(folder: Path) -> UserModel:
    if (folder / DESCRIPTION).is_file():
        return _reopened(folder)
    for place in (folder, folder / "model", *sorted(folder.glob("stages/*/model"), reverse=True)):
        described = read_json(place / hub.CONFIG)
        if described.get("kind") == "trainable":
            return _of_ours(hub.load_trainable(place), str(folder))
        if described.get("kind") == "encoder":
            raise UserError(
                f"{folder} holds an encoder without a head, no classifier: unmask train classifier init={folder}"
            )
        if "model_type" in described:
            return open_transformers(place)
        if "architecture" in described and "pretrained_cfg" in described:
            return _of_timm_folder(place, described)
    raise UserError(f"{folder} holds no model that is known here: a run, an export, timm's layout or transformers' own")


def _reopened(folder: Path) -> UserModel:
    """What ``save`` wrote: the architecture is built, shrunk as it was, and filled."""
    described = read_json(folder / DESCRIPTION)
    family, made = described.get("family"), dict(described.get("made") or {})
    surgery = Surgery.of(described.get("surgery") or {})
    classes = described.get("classes")
    if family == "timm":
        module: nn.Module = _timm_module(described["name"], made, pretrained=False)
    elif family == "torchvision":
        module = _torchvision_module(described["name"], made)
    elif family == "transformers":
        module, tokenizer = read_transformers(folder, surgery)
        return _described(module, described, classes, tokenizer)
    else:
        raise UserError(
            f"{folder} holds weights of your own module: build it, then unmask.models.saving.restore(module, ...)"
        )
    reshape(module, surgery)
    load_strict(module, read_checkpoint(folder / hub.WEIGHTS), where=folder / hub.WEIGHTS)
    return _described(module, described, classes, None)


def _described(module: nn.Module, described: Mapping[str, Any], classes: Any, tokenizer: Any) -> UserModel:
    known = described.get("preprocessing")
    return UserModel(
        module.eval(),
        described["kind"],
        described["family"],
        described["name"],
        tuple(classes) if classes else None,
        Preprocessing.of(known) if known else None,
        tokenizer,
        dict(described.get("made") or {}),
    )


# --- timm ---------------------------------------------------------------------------------------------------------


def _of_timm(name: str, weights: Any, pretrained: bool | None, classes: Any, arguments: dict[str, Any]) -> UserModel:
    import timm

    known = name.removeprefix("timm/")
    if not timm.is_model(known):
        raise UserError(f"timm has no model {known!r}: {nearest(known, timm.list_models())}")
    if classes is not None:
        arguments = {**arguments, "num_classes": classes if isinstance(classes, int) else len(classes)}
    state = _state(weights)
    if state is not None and "num_classes" not in arguments:
        arguments = {**arguments, **_classes_in(state)}
    wanted = pretrained if pretrained is not None else state is None
    module = _timm_module(name, arguments, pretrained=wanted)
    if state is not None:
        load_strict(module, state, where=str(weights))
    elif not wanted:
        warnings.warn(f"{name} has random weights: give weights=FILE or pretrained=true", stacklevel=3)
    config: dict[str, Any] = dict(getattr(module, "pretrained_cfg", None) or {})
    channels = int(arguments.get("in_chans", 3))
    size = tuple((config.get("input_size") or (3, 224, 224))[1:])
    if "img_size" in arguments:
        side = arguments["img_size"]
        size = (side, side) if isinstance(side, int) else tuple(side)
    mean, std = tuple(config.get("mean") or (0.5,) * 3), tuple(config.get("std") or (0.5,) * 3)
    if channels != len(mean):
        mean, std = (sum(mean) / len(mean),) * channels, (sum(std) / len(std),) * channels
    how = str(config.get("interpolation") or "bicubic")
    prepared = Preprocessing(mean, std, size, channels, interpolation=how, crop=float(config.get("crop_pct") or 1.0))
    count = int(getattr(module, "num_classes", 0))
    _with_classes(module, name, count)
    return UserModel(module, "image classifier", "timm", name, _names(classes, count), prepared, made=arguments)


def _of_timm_folder(folder: Path, described: Mapping[str, Any]) -> UserModel:
    """A folder in timm's own layout, with a head."""
    if not described.get("num_classes"):
        raise UserError(
            f"{folder} is an encoder of timm without a head, no classifier: unmask train classifier init={folder}"
        )
    arguments = {**(described.get("model_args") or {}), "num_classes": described["num_classes"]}
    name = f"timm/{described['architecture']}"
    opened = _of_timm(name, folder / hub.WEIGHTS, False, None, arguments)
    known = described["pretrained_cfg"] or {}
    names = known.get("label_names") or described.get("label_names")
    if names:
        opened.classes = tuple(map(str, names))
    return opened


def _timm_module(name: str, arguments: Mapping[str, Any], *, pretrained: bool) -> nn.Module:
    import timm

    try:
        return timm.create_model(name.removeprefix("timm/"), pretrained=pretrained, **arguments).eval()
    except (TypeError, ValueError, RuntimeError, AssertionError, KeyError) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(f"timm cannot build {name} with {dict(arguments)}: {lines[0][:160]}") from None
    except Exception as error:  # the hub client's own errors
        reason = hub.hub_reason(error)
        raise UserError(
            f"no weights for {name}: {reason}; or weights=FILE, or pretrained=false for random ones"
        ) from None


def _classes_in(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """``num_classes`` as a checkpoint's last layer has it."""
    for key in ("head.weight", "fc.weight", "head.fc.weight", "classifier.weight"):
        if key in state:
            return {"num_classes": int(state[key].shape[0])}
    return {}


# --- torchvision --------------------------------------------------------------------------------------------------


def _of_torchvision(
    name: str, weights: Any, pretrained: bool | None, classes: Any, arguments: dict[str, Any]
) -> UserModel:
    from torchvision import models

    known = name.removeprefix("torchvision/")
    image_size = arguments.pop("image_size", None)
    if known not in models.list_models(module=models):
        raise UserError(f"torchvision has no classifier {known!r}: {nearest(known, models.list_models(module=models))}")
    if classes is not None:
        arguments = {**arguments, "num_classes": classes if isinstance(classes, int) else len(classes)}
    state = _state(weights)
    if state is not None and "num_classes" not in arguments:
        last = next((v for k, v in reversed(state.items()) if k.endswith(".weight") and v.ndim == 2), None)
        arguments = arguments if last is None else {**arguments, "num_classes": int(last.shape[0])}
    published = models.get_model_weights(known).DEFAULT  # type: ignore[attr-defined]
    wanted = pretrained if pretrained is not None else state is None
    names: Any = classes
    module = _torchvision_module(name, arguments)
    if state is not None:
        load_strict(module, state, where=str(weights))
    elif wanted:
        load_strict(module, _published(name, published), where=name)
        names = names or tuple(published.meta.get("categories") or ()) or None
    else:
        warnings.warn(f"{name} has random weights: give weights=FILE or pretrained=true", stacklevel=3)
    shown = published.transforms()
    size = image_size or shown.crop_size[0]
    prepared = Preprocessing(
        tuple(shown.mean),
        tuple(shown.std),
        (size, size) if isinstance(size, int) else tuple(size),
        interpolation=str(shown.interpolation.value),
        crop=min(shown.crop_size[0] / shown.resize_size[0], 1.0),
    )
    count = _outputs(module)
    _with_classes(module, name, count)
    return UserModel(module, "image classifier", "torchvision", name, _names(names, count), prepared, made=arguments)


def _torchvision_module(name: str, arguments: Mapping[str, Any]) -> nn.Module:
    from torchvision import models

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return models.get_model(name.removeprefix("torchvision/"), weights=None, **arguments).eval()
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"torchvision cannot build {name} with {dict(arguments)}: {error}") from None


def _published(name: str, weights: Any) -> dict[str, Tensor]:
    try:
        return dict(weights.get_state_dict(progress=False, check_hash=True))
    except Exception as error:  # urllib's own errors, among them those of a machine without a network
        reason = hub.hub_reason(error)
        raise UserError(
            f"no weights for {name}: {reason}; or weights=FILE, or pretrained=false for random ones"
        ) from None


def _outputs(module: nn.Module) -> int:
    """Outputs of the last layer."""
    last = [m for m in module.modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
    return getattr(last[-1], "out_features", getattr(last[-1], "out_channels", 0)) if last else 0


# --- shared -------------------------------------------------------------------------------------------------------


def _state(weights: Any) -> dict[str, Tensor] | None:
    return None if weights is None else read_checkpoint(Path(weights))


def _names(classes: Any, count: int | None = None) -> tuple[str, ...] | None:
    if isinstance(classes, (tuple, list)):
        return tuple(map(str, classes))
    number = classes if isinstance(classes, int) else count
    return tuple(str(i) for i in range(number)) if number else None


def _with_classes(module: nn.Module, name: str, count: int) -> None:
    if count < 1:
        raise UserError(f"{name} was built without a head, no classifier: give classes=10")
