"""The machine as the rules of ``auto`` and ``unmask doctor`` see it."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

from unmask.api.auto import Machine
from unmask.engine.run import cores, cpu_name

EXTRAS = {  # extra -> modules it brings
    "photos": ("skimage", "sklearn"),
    "export": ("onnx", "onnxruntime", "onnxscript"),
    "track": ("tensorboard", "wandb"),
    "text": ("transformers", "tokenizers"),
    "generate": ("diffusers", "torch_fidelity"),
    "explain": ("captum", "lime"),
    "video": ("av",),
    "audio": ("soundfile",),
    "graphs": ("torch_geometric",),
    "proteins": ("biotite",),
    "ui": ("gradio",),
    "docs": ("mkdocs",),
}
_SHOWN = ("torch", "torchvision", "timm", "accelerate", "datasets", "pydantic")


def check_device(name: str | None) -> str:
    """The device that ``name`` means here ("auto": the accelerator if there is one). Raises ``UserError`` when it is absent."""
    from unmask.engine.precision import chosen_device

    return str(chosen_device(name or "auto"))


def machine(device: str | None = None) -> Machine:
    """What ``auto`` needs to know."""
    import torch

    from unmask.engine.precision import fast_bf16

    chosen = torch.device(check_device(device))
    memory = torch.cuda.get_device_properties(chosen).total_memory / 1e9 if chosen.type == "cuda" else 0.0
    if chosen.type == "mps":
        memory = 8.0  # shared with everything else on the machine
    return Machine(device=chosen.type, cores=cores(), memory_gb=memory, bf16=fast_bf16(chosen))


def doctor() -> list[dict[str, str]]:
    """What this machine offers, one finding a row: what, found, hint (what to do about it, or empty)."""
    rows: list[dict[str, str]] = []

    def add(what: str, found: str, hint: str = "") -> None:
        rows.append({"what": what, "found": found, "hint": hint})

    import torch

    import unmask
    from unmask.data.cache import cache_root

    add("unmask", unmask.__version__)
    add("python", f"{platform.python_version()} on {platform.system()} {platform.machine()}")
    for package in _SHOWN:
        add(package, _version(package) or "missing", "" if _version(package) else "pip install --upgrade unmask")
    here = machine()
    add("device", _device_name(here.device), "" if here.accelerated else "recipes tiny and auto are made for this")
    add("cores", f"{here.cores} for this process, torch uses {torch.get_num_threads()} threads")
    fp32, bf16 = _speed(here.device, torch.float32), _speed(here.device, torch.bfloat16)
    better = "bf16 trains faster here: precision=auto uses it" if bf16 > 1.3 * fp32 else "precision=auto uses fp32 here"
    add("matrix product", f"fp32 {_rate(fp32)}, bf16 {_rate(bf16)} ({bf16 / fp32:.1f} x)", better)
    missing = {extra: [m for m in modules if not _installed(m)] for extra, modules in EXTRAS.items()}
    add("extras", ", ".join(e for e, m in missing.items() if not m) or "none")
    absent = [e for e, m in missing.items() if m]
    if absent:
        add("not installed", ", ".join(absent), f"pip install 'unmask[{absent[0]}]' where you need it")
    data = os.environ.get("UNMASK_DATA")
    add("UNMASK_DATA", _data_found(data), "" if data else "set it to the folder where your data sets lie")
    cache = cache_root()
    free = shutil.disk_usage(_existing(cache)).free / 1e9
    add("cache", f"{cache} ({free:.0f} GB free)", "" if _writable(cache) else "not writable: set UNMASK_CACHE")
    here_ok = _writable(Path.cwd())
    add("this folder", "writable" if here_ok else "not writable", "" if here_ok else "give --out where you may write")
    return rows


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _installed(module: str) -> bool:
    import importlib.util

    return importlib.util.find_spec(module) is not None


def _device_name(kind: str) -> str:
    import torch

    if kind == "cuda":
        found = torch.cuda.get_device_properties(0)
        return f"{torch.cuda.device_count()} x {found.name}, {found.total_memory / 1e9:.0f} GB"
    if kind != "cpu":
        return kind
    return f"CPU {cpu_name()}, no accelerator"


def _speed(kind: str, dtype: Any) -> float:
    """Measured multiply-adds, in floating point operations a second."""
    import torch

    side = 4096 if kind != "cpu" else 768
    a = torch.randn(side, side, device=kind, dtype=dtype)
    for _ in range(2):
        a @ a
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        a @ a
        if kind != "cpu":
            torch.accelerator.synchronize()
        best = min(best, time.perf_counter() - start)
    return 2 * side**3 / best


def _rate(flops: float) -> str:
    return f"{flops / 1e12:.2f} TFLOP/s" if flops >= 1e12 else f"{flops / 1e9:.0f} GFLOP/s"


def _data_found(folder: str | None) -> str:
    if not folder:
        return "not set"
    path = Path(folder)
    if not path.is_dir():
        return f"{folder} (no such folder)"
    names = sorted(p.name for p in path.iterdir() if not p.name.startswith("."))
    return f"{folder}: {len(names)} entries: {', '.join(names[:8])}{' ...' if len(names) > 8 else ''}"


def _existing(path: Path) -> Path:
    while not path.exists() and path != path.parent:
        path = path.parent
    return path


def _writable(folder: Path) -> bool:
    try:
        with tempfile.TemporaryFile(dir=_existing(folder)):
            return True
    except OSError:
        return False
