"""Which arithmetic, which device, and whether compiling pays: decided once, from the machine."""

from __future__ import annotations

import functools
from pathlib import Path

import torch
from torch import nn

from unmask.contracts import default_device
from unmask.errors import UserError


def chosen_device(name: str) -> torch.device:
    """The device that ``auto``, ``cpu``, ``cuda``, ``cuda:1``, ``mps`` ... names. Raises ``UserError`` when absent."""
    if name == "auto":
        return default_device()
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"device={name!r} is no device: it takes auto, cpu, cuda, cuda:1 or mps") from None
    if device.type in ("cpu", "meta"):
        return torch.device("cpu")
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if found is None or found.type != device.type:
        raise UserError(f"device={name}: torch finds no {device.type} device on this machine: use --device cpu")
    if device.index is not None and device.index >= torch.accelerator.device_count():
        raise UserError(
            f"device={name}: this machine has {torch.accelerator.device_count()} {device.type} device(s), counted from 0"
        )
    return device


def chosen_precision(name: str, device: torch.device) -> str:
    """``fp32``, ``bf16`` or ``fp16``; ``auto`` takes bf16 where the hardware multiplies it fast."""
    if name == "auto":
        return "bf16" if fast_bf16(device) else "fp32"
    if name == "fp16" and device.type == "cpu":
        raise UserError("precision=fp16 needs a GPU: use bf16 or fp32 on a CPU")
    return name


def fast_bf16(device: torch.device) -> bool:
    """Whether products in bf16 have hardware of their own: CUDA capability 8 and up; a CPU with AMX or AVX512-BF16."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return device.type == "cpu" and _cpu_multiplies_bf16()


@functools.cache
def _cpu_multiplies_bf16() -> bool:
    for check in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        if getattr(torch.cpu, check, bool)():
            return True
    try:
        flags = Path("/proc/cpuinfo").read_text(errors="replace")
    except OSError:
        return False
    return "amx_bf16" in flags or "avx512_bf16" in flags


def should_compile(choice: str, device: torch.device) -> bool:
    """``auto``: on a CUDA GPU. Not on a CPU, where compiled blocks were measured to be no faster (``bench/mae.py``): matrix
    products take most of a step there, and they are the same."""
    return device.type == "cuda" if choice == "auto" else choice == "on"


def compile_blocks(blocks: list[nn.Module], *, forgiving: bool = False) -> None:
    """Compile each repeated block in place (one graph serves all of the same shape).

    forgiving: where the compiler fails, go on with the plain block; for a choice that the user did not make.
    """
    if forgiving:
        import torch._dynamo

        torch._dynamo.config.suppress_errors = True
    for block in blocks:
        block.compile()
