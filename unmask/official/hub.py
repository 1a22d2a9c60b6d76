"""Keeping and finding models by the Hub's habits: a folder with ``config.json`` and ``model.safetensors``.

``config.json`` says what the folder is ("trainable": a whole system, "encoder": what it learned to see with), how to
make it again, and how inputs are prepared. Both files are written aside, then renamed: a full disk leaves the old ones.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from unmask.catalog import backbone_card, card, cards, load_entry
from unmask.contracts import Encoder, Preprocessing, Trainable, configured
from unmask.errors import UserError
from unmask.official.load import State, load_strict, read_checkpoint
from unmask.official.reshaped import Surgery, reshape

CONFIG, WEIGHTS = "config.json", "model.safetensors"
# options of a backbone, and arguments of timm, that say where weights come from; a saved folder has its own
_FROM_ELSEWHERE = {"pretrained", "weights", "checkpoint_path", "pretrained_cfg", "pretrained_cfg_overlay"}


# --- saving ---------------------------------------------------------------------------------------------------


def save_trainable(model: Trainable, folder: str | Path, *, state: Mapping[str, Tensor] | None = None) -> Path:
    """Write a whole system. state: its weights if they were gathered or averaged elsewhere. Raises ``UserError``."""
    encoder = model.encoder
    described: dict[str, Any] = {
        "unmask": _version(),
        "kind": "trainable",
        "system": model.slug,
        "entry": f"{type(model).__module__}:{type(model).__qualname__}",
        "config": own_config(model.config.plain()),
        "preprocessing": encoder.preprocessing.plain() if encoder is not None and encoder.preprocessing else None,
    }
    if model.side_files:
        described["side_files"] = sorted(model.side_files)
    files = {name: text.encode() for name, text in model.side_files.items()}
    if surgery := getattr(model, "surgery", None):
        described["surgery"] = surgery.plain()
    return write_folder(Path(folder), described, model.state_dict() if state is None else state, files=files)


def save_encoder(
    encoder: Encoder, folder: str | Path, *, system: str = "", state: Mapping[str, Tensor] | None = None
) -> Path:
    """Write an encoder so that ``load_encoder`` and ``unmask.load`` make it again, by the name and options it was built
    with. system: the slug of what trained it. Raises ``UserError``."""
    described = {
        "unmask": _version(),
        "kind": "encoder",
        "system": system,
        "backbone": {"name": encoder.name, "options": _plain(_without_sources(getattr(encoder, "options", {})))},
        "preprocessing": encoder.preprocessing.plain() if encoder.preprocessing else None,
    }
    if surgery := getattr(encoder, "surgery", None):
        described["surgery"] = surgery.plain()
    return write_folder(Path(folder), described, encoder.state_dict() if state is None else state)


def own_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """A system's options without where its backbone's first weights came from: a saved folder has its own."""
    return {k: _without_sources(v) if k == "backbone" and isinstance(v, Mapping) else v for k, v in config.items()}


def _without_sources(options: Mapping[str, Any]) -> dict[str, Any]:
    """A backbone's options without those that make it read another file or the network."""
    kept = {k: v for k, v in options.items() if k not in _FROM_ELSEWHERE}
    return {k: _without_sources(v) if k == "arguments" and isinstance(v, Mapping) else v for k, v in kept.items()}


def _plain(value: Any) -> Any:
    if hasattr(value, "plain"):
        return value.plain()
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return str(value) if isinstance(value, Path) else value


def _version() -> str:
    try:
        return metadata.version("unmask")
    except metadata.PackageNotFoundError:
        return "0"


def untied(state: Mapping[str, Tensor]) -> tuple[State, dict[str, str]]:
    """CPU copies fit for safetensors, and which names are the same tensor as an earlier one (name -> first name).

    Tensors that are views of a larger storage are copied out; non-contiguous ones are laid out anew.
    """
    out: State = {}
    tied: dict[str, str] = {}
    seen: dict[tuple[Any, ...], str] = {}
    for name, value in state.items():
        value = value.detach()
        place = (value.device, value.data_ptr(), tuple(value.shape), value.stride(), value.dtype)
        if value.numel() and place in seen:
            tied[name] = seen[place]
            continue
        seen[place] = name
        whole = value.is_contiguous() and value.untyped_storage().nbytes() == value.numel() * value.element_size()
        out[name] = value.cpu() if whole else value.cpu().contiguous().clone()
    return out, tied


def write_folder(
    folder: Path, described: Mapping[str, Any], state: Mapping[str, Tensor], *, files: Mapping[str, bytes] | None = None
) -> Path:
    """Write ``config.json``, ``model.safetensors`` (where there are tensors) and further files, all aside, then renamed.

    In a folder that exists other files stay. Raises ``UserError`` when the place cannot be written.
    """
    tensors, tied = untied(state)
    meta = {"format": "pt"} | ({"tied": json.dumps(tied)} if tied else {})
    aside: Path | None = None
    try:
        if folder.exists() and not folder.is_dir():
            raise UserError(f"cannot write a model to {folder}: a file of this name is in the way")
        folder.parent.mkdir(parents=True, exist_ok=True)
        fresh = not folder.exists()
        aside = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent if fresh else folder))
        if tensors:
            save_file(tensors, aside / WEIGHTS, metadata=meta)
        for name, content in (files or {}).items():
            (aside / name).write_bytes(content)
        (aside / CONFIG).write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")
        for path in aside.iterdir():
            path.chmod(0o666 & ~_umask())  # temporary files are private, models are not
        if fresh:
            aside.chmod(0o777 & ~_umask())
            aside.rename(folder)
        else:
            for path in sorted(aside.iterdir(), key=lambda p: p.name == CONFIG):
                path.replace(folder / path.name)
    except OSError as error:
        raise UserError(f"cannot write {folder}: {error.strerror or error}") from None
    except SafetensorError as error:  # a full disk, as safetensors says it
        raise UserError(f"cannot write {folder / WEIGHTS}: {error}") from None
    finally:
        if aside is not None:
            shutil.rmtree(aside, ignore_errors=True)
    return folder


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


# --- loading --------------------------------------------------------------------------------------------------


def load_trainable(folder_or_id: str | Path, expected: type[Trainable] | None = None) -> Trainable:
    """The system that a folder (an export, or a run) or a hub id holds, with its weights, in evaluation mode.

    expected: the class it must be. Raises ``UserError`` in one line: not ours, another system's, damaged, offline.
    """
    folder = _folder(folder_or_id, "model")
    described = read_config(folder)
    if described["kind"] != "trainable":
        raise UserError(f"{folder} holds an encoder alone, not a whole system: load it with unmask.load")
    cls = _class_of(described, folder)
    if expected is not None and expected is not Trainable and not issubclass(cls, expected):
        raise UserError(
            f"{folder} holds a {cls.slug or cls.__name__}, not a {expected.slug or expected.__name__}: use unmask.load"
        )
    model = cls.build(configured(cls, own_config(described.get("config") or {})))
    if described.get("surgery"):  # what a compressor cut
        surgery = Surgery.of(described["surgery"])
        reshape(model, surgery)
        if model.encoder is not None:
            model.encoder.surgery = surgery.under("encoder")  # type: ignore[assignment]
    load_strict(model, read_checkpoint(folder / WEIGHTS), where=folder / WEIGHTS)
    if model.encoder is not None and described.get("preprocessing"):
        model.encoder.preprocessing = Preprocessing.of(described["preprocessing"])
    model.side_files = _side_files(folder, described)
    return model.eval()


def _side_files(folder: Path, described: Mapping[str, Any]) -> dict[str, str]:
    """The text files that were saved beside the weights; names that lead out of the folder are refused."""
    found = {}
    for name in described.get("side_files") or []:
        if not isinstance(name, str) or Path(name).name != name or not (folder / name).is_file():
            raise UserError(f"{folder / CONFIG} names the file {name!r}, which is not there: the model is damaged")
        try:
            found[name] = (folder / name).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{folder / name} cannot be read: {error}") from None
    return found


def load_encoder(folder_or_id: str | Path) -> Encoder:
    """The encoder that a folder (an encoder's, a whole system's, or a run) or a hub id holds, in evaluation mode.

    Raises ``UserError`` in one line.
    """
    folder = _folder(folder_or_id, "encoder", "model")
    described = read_config(folder)
    if described["kind"] == "trainable":
        encoder = load_trainable(folder).encoder
        if encoder is None:
            raise UserError(f"{folder} holds a {described.get('system')}, which has no encoder to take away")
        return encoder
    backbone = described.get("backbone") or {}
    name, options = backbone.get("name", ""), backbone.get("options") or {}
    if not isinstance(name, str) or not isinstance(options, dict):
        raise UserError(f"{folder / CONFIG} names no backbone: it is no encoder of ours")
    options = _without_sources(options)
    encoder = load_entry(backbone_card(name).build)(name, **options)
    encoder.name, encoder.options = name, options
    if described.get("surgery"):
        reshape(encoder, Surgery.of(described["surgery"]))
    load_strict(encoder, read_checkpoint(folder / WEIGHTS), where=folder / WEIGHTS)
    if described.get("preprocessing"):
        encoder.preprocessing = Preprocessing.of(described["preprocessing"])
    return encoder.eval()


def read_config(folder: Path) -> dict[str, Any]:
    """``config.json`` of one of our folders. Raises ``UserError`` if there is none, or it is somebody else's."""
    path = folder / CONFIG
    if not path.is_file():
        raise UserError(f"{folder} holds no {CONFIG}: it is no model saved by unmask")
    try:
        described = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    if not isinstance(described, dict) or described.get("kind") not in ("trainable", "encoder"):
        raise UserError(f"{path} is not of a model saved by unmask (no kind in it)")
    return described


def is_ours(folder: str | Path) -> bool:
    """Whether ``load_trainable`` or ``load_encoder`` would take this folder."""
    try:
        read_config(Path(folder))
    except UserError:
        return False
    return True


def _folder(folder_or_id: str | Path, *inner: str) -> Path:
    """The folder with ``config.json``: the one given, one of ``inner`` inside a run, or a snapshot from the Hub."""
    folder = Path(folder_or_id)
    if folder.is_dir():
        if not (folder / CONFIG).is_file():
            for name in inner:
                if (folder / name / CONFIG).is_file():
                    return folder / name
        return folder
    if isinstance(folder_or_id, str) and re.fullmatch(r"[\w.-]+/[\w.-]+", folder_or_id) and not folder.parent.is_dir():
        return snapshot(folder_or_id)
    raise UserError(f"no folder {folder_or_id}: give a run, an exported model or a hub id (name/model)")


def snapshot(repo_id: str) -> Path:
    """The folder of a hub id, downloaded or from the cache: weights, configs, tokenizer. Raises ``UserError``."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(repo_id, allow_patterns=["*.json", "*.txt", WEIGHTS]))
    except Exception as error:  # the client raises its own, httpx's and OSError for what is one fact to a user
        raise UserError(f"no folder {repo_id} here, and the Hub does not give {repo_id}: {hub_reason(error)}") from None


def hub_reason(error: BaseException) -> str:
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status in (401, 403, 404):
        return f"it does not exist or needs a login (HTTP {status}): check the name, or `hf auth login`"
    text = f"{type(error).__name__} {error}".lower()
    if any(
        word in text for word in ("offline", "connect", "resolve", "network", "timeout", "localentrynotfound", "proxy")
    ):
        return "no connection: copy the folder here, or try again when online"
    return str(error).strip().splitlines()[0][:160] if str(error).strip() else type(error).__name__


def _class_of(described: Mapping[str, Any], folder: Path) -> type[Trainable]:
    slug = described.get("system") or ""
    return trainable_class(str(described.get("entry") or card(slug).entry), where=folder)


def trainable_class(entry: str, where: Path) -> type[Trainable]:
    """The class that a file at ``where`` names as "module:Class". Only packages that own a card are imported, and only a
    ``Trainable`` is taken: a file runs no other code. A system that this process has defined already needs no import.

    Raises ``UserError``.
    """
    loaded = {f"{c.__module__}:{c.__qualname__}": c for c in _subclasses(Trainable)}
    if entry in loaded:
        return loaded[entry]
    module = entry.partition(":")[0]
    trusted = {c.entry.partition(".")[0].partition(":")[0] for c in cards().values() if c.entry} | {"unmask"}
    if module.partition(".")[0] not in trusted:
        raise UserError(f"{where} was made by {module}, which is no installed system: install its package")
    cls = load_entry(entry)
    if not (isinstance(cls, type) and issubclass(cls, Trainable)):
        raise UserError(f"{where}: {entry} is no system that can be trained")
    return cls


def _subclasses(cls: type[Trainable]) -> Iterator[type[Trainable]]:
    for child in cls.__subclasses__():
        yield child
        yield from _subclasses(child)


# --- the Hub --------------------------------------------------------------------------------------------------


def push_to_hub(model: nn.Module, repo_id: str, *, private: bool = False, message: str = "", **card_facts: str) -> str:
    """Upload a system or an encoder with a short model card; returns its address.

    card_facts: "data" and other lines for the card. Raises ``UserError`` in one line when offline or not logged in.
    """
    from huggingface_hub import HfApi

    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repo_id):
        raise UserError(f"hub id {repo_id!r} does not fit: write owner/name")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "model"
        if isinstance(model, Trainable):
            save_trainable(model, folder)
        elif isinstance(model, Encoder):
            save_encoder(model, folder)
        else:
            raise UserError(f"cannot push a {type(model).__name__}: only systems and encoders")
        (folder / "README.md").write_text(_model_card(model, repo_id, card_facts), encoding="utf-8")
        try:
            api = HfApi()
            api.create_repo(repo_id, private=private, exist_ok=True)
            api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message=message or "Upload with unmask")
        except Exception as error:
            raise UserError(f"cannot push to {repo_id}: {hub_reason(error)}") from None
    return f"https://huggingface.co/{repo_id}"


def _model_card(model: nn.Module, repo_id: str, facts: Mapping[str, str]) -> str:
    name = getattr(model, "slug", "") or getattr(model, "name", "") or type(model).__name__
    lines = [f"- {key}: {value}" for key, value in facts.items()]
    head = ["---", "library_name: unmask", "tags: [unmask]", "---", "", f"# {repo_id}", ""]
    body = [f"`{name}`, saved by [unmask](https://pypi.org/project/unmask/).", *lines]
    use = ["", "```python", "import unmask", f'model = unmask.load("{repo_id}")', "```", ""]
    return "\n".join([*head, *body, *use])
