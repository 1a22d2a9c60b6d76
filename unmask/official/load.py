"""Reading anyone's checkpoint safely, renaming by rules, and loading with nothing missing and nothing left over.

``read_checkpoint`` never runs code from a file: safetensors, or a torch pickle through ``weights_only``. ``rename``
turns an official state dict into ours by rules that stand in a system's ``official.py``; ``load_strict`` says what does
not fit.
"""

from __future__ import annotations

import argparse
import json
import pickle
import pickletools
import re
import struct
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from unmask.errors import UserError

State = dict[str, Tensor]

# Where published files keep their weights, in the order tried: mae, simmim, mmpretrain, lightning, DINO-like, FSDP.
WRAPPERS = (
    "model",
    "state_dict",
    "model_state_dict",
    "module",
    "model_ema",
    "state_dict_ema",
    "teacher",
    "student",
    "network",
    "params_ema",  # BasicSR's files
    "params",
)
PREFIXES = ("module.", "_orig_mod.")  # left by DistributedDataParallel and torch.compile


class _Inert:
    """Stands where a pickle names a harmless foreign class, so that the tensors beside it can be read."""

    def __init__(self, *_: Any):
        pass

    def __new__(cls, *_: Any) -> _Inert:
        return super().__new__(cls)

    def __setstate__(self, _: Any) -> None:
        pass


# Classes that published checkpoints carry beside the weights (options, logs): replaced by containers that do nothing.
_HARMLESS: list[Any] = [
    (argparse.Namespace, "argparse.Namespace"),
    (OrderedDict, "yacs.config.CfgNode"),
    (OrderedDict, "collections.defaultdict"),
    *(
        (_Inert, name)
        for name in (
            "mmengine.logging.history_buffer.HistoryBuffer",
            "numpy.ndarray",
            "numpy.dtype",
            "numpy.core.multiarray._reconstruct",
            "numpy._core.multiarray._reconstruct",
            "numpy.core.multiarray.scalar",
            "numpy._core.multiarray.scalar",
        )
    ),
]


def read_checkpoint(path: str | Path, *, prefer: Sequence[str] = ()) -> State:
    """The tensors in a checkpoint file (or in a folder that holds one), by name, on the CPU.

    prefer: wrappers to look into first ("model_ema"), before ``WRAPPERS``. Prefixes of DDP and torch.compile come off.
    Raises ``UserError`` in one line: missing, truncated, corrupted, wants to run code, holds no tensors.
    """
    path = _file_in(Path(path))
    if _is_safetensors(path):
        state: Any = _read_safetensors(path)
    else:
        state = _unwrapped(_read_pickle(path), (*prefer, *WRAPPERS))
    if not state:
        raise UserError(f"{path} holds no weights (no mapping from names to tensors)")
    for prefix in PREFIXES:
        if all(name.startswith(prefix) for name in state):
            state = {name.removeprefix(prefix): value for name, value in state.items()}
    return dict(state)


def _file_in(path: Path) -> Path:
    if not path.exists():
        raise UserError(f"no checkpoint {path}: give a .safetensors, .pth or .bin file, or a folder that holds one")
    if not path.is_dir():
        return path
    for name in ("model.safetensors", "pytorch_model.bin", "checkpoint.pth"):
        if (path / name).is_file():
            return path / name
    files = sorted(p for p in path.iterdir() if p.suffix in (".safetensors", ".pth", ".pt", ".bin"))
    if len(files) == 1:
        return files[0]
    raise UserError(f"{path} holds {len(files) or 'no'} checkpoint files: name the one to read")


def _is_safetensors(path: Path) -> bool:
    return path.suffix == ".safetensors"


def checked_header(path: Path) -> dict[str, Any]:
    """The header of a safetensors file, after its sizes were held against the file's. Raises ``UserError``."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            lead = file.read(8)
            length = struct.unpack("<Q", lead)[0] if len(lead) == 8 else size
            if 8 + length > size:
                raise UserError(
                    f"{path} is truncated or no safetensors file: {size} bytes, its header alone wants {8 + length}"
                )
            header = json.loads(file.read(length))
        ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
        whole = 8 + length + max(ends, default=0)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError, IndexError):
        raise UserError(f"{path} is corrupted: its safetensors header cannot be read; get the file again") from None
    if whole != size:
        state = "truncated" if size < whole else "corrupted"
        raise UserError(f"{path} is {state}: {size} bytes, its header promises {whole}; get the file again")
    return header


def _read_safetensors(path: Path) -> State:
    header = checked_header(path)
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, RuntimeError, ValueError, OSError) as error:
        raise UserError(f"{path} is corrupted: {error}") from None
    tied = json.loads((header.get("__metadata__") or {}).get("tied", "{}"))
    return state | {name: state[first] for name, first in tied.items() if first in state}


def _read_pickle(path: Path) -> Any:
    try:
        with torch.serialization.safe_globals(_HARMLESS), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # on pickle protocols; what does not load is told below
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(_why_refused(path, str(error))) from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from None
    except Exception as error:  # a broken file fails inside torch's reader in many ways; all mean the same to a user
        raise UserError(_broken(path, error)) from None


def _why_refused(path: Path, message: str) -> str:
    name = re.search(r"GLOBAL ([\w.]+)", message) or re.search(r"(?:function|class) ([<\w. >']+)", message)
    called = name.group(1) if name else _called_in(path)
    if called or "Can only" in message:
        wanted = f" ({called})" if called else ""
        return f"{path} is a pickle that wants to run code{wanted}: refused; get a file of weights only (safetensors)"
    return f"{path} is no checkpoint, or corrupted: torch cannot read it as weights"


def _called_in(path: Path) -> str:
    """The first function that a bare pickle would call, "posix.system" say, read off its opcodes without running them."""
    words: list[str] = []
    try:
        with path.open("rb") as file:
            for opcode, argument, _ in pickletools.genops(file):
                if opcode.name == "GLOBAL":
                    return str(argument).replace(" ", ".")
                if opcode.name == "STACK_GLOBAL":
                    return ".".join(words[-2:])
                if isinstance(argument, str):
                    words.append(argument)
    except Exception:  # no pickle at all, which fails in as many ways as there are files
        return ""
    return ""


def _broken(path: Path, error: Exception) -> str:
    size = path.stat().st_size
    with path.open("rb") as file:
        zipped = file.read(2) == b"PK"
    if zipped and not zipfile.is_zipfile(path):
        return f"{path} is truncated: {size} bytes of an unfinished archive; get the file again"
    lines = str(error).strip().splitlines() or [type(error).__name__]
    why = lines[0][:120] if zipped else "torch cannot read it as weights"
    return f"{path} is no checkpoint, or corrupted ({size} bytes): {why}"


def _unwrapped(value: Any, wrappers: Sequence[str]) -> State:
    """The mapping of names to tensors inside nested wrappers; empty if there is none."""
    if isinstance(value, Tensor) or not isinstance(value, Mapping):
        return {}
    for key in wrappers:
        inner = value.get(key)
        if isinstance(inner, Mapping) and (found := _unwrapped(inner, wrappers)):
            return found
    return {str(name): v.data for name, v in value.items() if isinstance(v, Tensor)}


@dataclass(frozen=True)
class Rule:
    """One renaming: ``re.sub(pattern, name, key)``. ``name=None`` drops the key; ``convert`` changes its tensor.

    Rule(r"^layers\\.(\\d+)\\.ln1\\.", r"blocks.\\1.norm1.")
    """

    pattern: str
    name: str | None = ""
    convert: Callable[[Tensor], Tensor] | None = None


def rename(state: Mapping[str, Tensor], rules: Iterable[Rule]) -> State:
    """The state under new names: every rule is tried on every key, in order, each on what the one before made of it.

    Keys that no rule matches stay. Raises ``UserError`` when two keys end under one name.
    """
    rules = list(rules)
    out: State = {}
    origin: dict[str, str] = {}
    for old, tensor in state.items():
        new = old
        for rule in rules:
            if not re.search(rule.pattern, new):
                continue
            if rule.name is None:
                break
            if rule.convert is not None:
                tensor = rule.convert(tensor)
            new = re.sub(rule.pattern, rule.name, new)
        else:
            if new in out:
                both = f"{origin[new]!r} and {old!r} both become {new!r}"
                raise UserError(f"checkpoint: {both}: these weights are of another system")
            out[new], origin[new] = tensor, old
    return out


def without_prefix(state: Mapping[str, Tensor], prefix: str) -> State:
    """The part of the state under ``prefix``, without it."""
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


def load_strict(
    module: nn.Module, state: Mapping[str, Tensor], *, ignore: Iterable[str] = (), where: str | Path = "checkpoint"
) -> None:
    """Copy the state into the module: nothing may be missing, nothing left over, every shape equal.

    ignore: regular expressions (searched) of names that may be missing or left over. where: the state's name in errors.
    Raises ``UserError`` in one line that names what does not fit; the module is then unchanged.
    """
    patterns = [re.compile(p) for p in ignore]

    def counts(name: str) -> bool:
        return not any(p.search(name) for p in patterns)

    wanted = module.state_dict()
    missing = [n for n in wanted if n not in state and counts(n)]
    left = [n for n in state if n not in wanted and counts(n)]
    uneven = [
        f"{n} is {list(state[n].shape)} where {list(wanted[n].shape)} is needed"
        for n in wanted
        if n in state and state[n].shape != wanted[n].shape
    ]
    if missing or left or uneven:
        parts = [_some("missing", missing), _some("left over", left), _some("shapes differ:", uneven)]
        raise UserError(f"{where} does not fit this {type(module).__name__}: " + "; ".join(p for p in parts if p))
    module.load_state_dict({n: state[n] for n in wanted if n in state}, strict=False)


def _some(title: str, names: list[str]) -> str:
    if not names:
        return ""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{title} {', '.join(names[:3])}{more}"
