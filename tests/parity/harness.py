"""The golden harness: what a case is, how an adapter is called, and when two tensors are the same.

A case is a pair ``NAME.json`` + ``NAME.safetensors``. The JSON names the system, its config and a tolerance; the
tensors are ``param.*`` (weights), ``buffer.*`` (running statistics), ``in.*`` (inputs), ``draw.*`` (the random numbers of
the official run), and the answers of the official code, ``out.*`` and ``grad.*``. A system's ``official.py`` offers
``run_case(config, tensors)``. It sees all but the answers and returns outputs, the module and gradients, each under its
name without the prefix.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from unmask import catalog

GIVEN = ("param.", "buffer.", "in.", "draw.")
SMALLEST = 1e-7  # a tensor whose largest value is below this has no size to compare with
RunCase = Callable[[dict[str, Any], dict[str, Tensor]], tuple[Mapping[str, Tensor], Any, Mapping[str, Tensor]]]


@dataclass(frozen=True)
class Case:
    """One golden fixture. ``problem`` is the line that says why the pair cannot be read; such a case fails."""

    path: Path  # of the .json
    system: str = ""
    config: dict[str, Any] = field(default_factory=dict)
    atol: float = 0.0
    rtol: float = 0.0
    problem: str = ""

    @property
    def id(self) -> str:
        return f"{self.path.parent.parent.name}/{self.path.parent.name}/{self.path.stem}"

    @property
    def digest(self) -> bytes:
        """The same for two copies of one case."""
        pair = (self.path, self.path.with_suffix(".safetensors"))
        content = hashlib.sha256(b"\0".join(p.read_bytes() if p.is_file() else str(p).encode() for p in pair))
        return content.digest()

    def tensors(self) -> dict[str, Tensor]:
        return load_file(self.path.with_suffix(".safetensors"))


class Mismatch(AssertionError):
    """What differs, one line a tensor."""


def find_cases(folders: Iterable[Path]) -> list[Case]:
    """Every pair under the folders, in order of folder and path; broken pairs are among them, with their problem."""
    found: list[Case] = []
    for folder in folders:
        stems = {p.with_suffix("") for kind in ("*.json", "*.safetensors") for p in folder.rglob(kind)}
        found += [read_case(stem.with_name(stem.name + ".json")) for stem in sorted(stems)]
    return found


def read_case(path: Path) -> Case:
    """The case of one JSON file; what is wrong with it stands in ``problem``."""
    weights = path.with_suffix(".safetensors")
    if not path.is_file():
        return Case(path, problem=f"broken pair: {weights} has no {path.name} beside it")
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
        system, config = str(facts["system"]), dict(facts["config"])
        atol, rtol = float(facts["tolerance"]["atol"]), float(facts["tolerance"]["rtol"])
    except (ValueError, KeyError, TypeError) as error:
        return Case(path, problem=f"broken pair: {path} is no case: {type(error).__name__}: {error}")
    if not weights.is_file():
        return Case(path, system, problem=f"broken pair: {path} has no {weights.name} beside it")
    return Case(path, system, config, atol, rtol)


def exists(case: Case) -> bool:
    """Whether the catalog has the case's system; a case without one is pending. A broken pair is never pending."""
    return bool(case.problem) or case.system in catalog.cards()


def adapter(case: Case) -> RunCase:
    """``run_case`` of the case's system. Raises ``Mismatch`` where the system has none."""
    module = catalog.card(case.system).module("official")
    if module is None or not hasattr(module, "run_case"):
        raise Mismatch(f"{case.system} has no adapter: its official.py must offer run_case(config, tensors)")
    return module.run_case


def check(case: Case, run_case: RunCase | None = None) -> int:
    """Run the case and compare everything it holds; the number of tensors compared. Raises ``Mismatch``.

    run_case: instead of the system's own adapter (for tests of the harness).
    """
    tensors = readable(case)
    expected = {k: v for k, v in tensors.items() if k.startswith(("out.", "grad."))}
    if not expected:
        raise Mismatch(f"{case.path}: holds no out.* and no grad.*: nothing to compare")
    outputs, _, gradients = (run_case or adapter(case))(dict(case.config), given(tensors))
    lines = []
    for name, theirs in sorted(expected.items()):
        kind, _, key = name.partition(".")
        ours = (outputs if kind == "out" else gradients).get(key)
        lines += [f"{name}: {line}" for line in differences(ours, theirs, case.atol, case.rtol)]
    if lines:
        raise Mismatch(f"{case.id}: {len(lines)} differences\n  " + "\n  ".join(lines))
    return len(expected)


def readable(case: Case) -> dict[str, Tensor]:
    if case.problem:
        raise Mismatch(case.problem)
    try:
        return case.tensors()
    except (SafetensorError, OSError, ValueError) as error:
        raise Mismatch(f"broken pair: {case.path.with_suffix('.safetensors')} cannot be read: {error}") from None


def given(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What an adapter may see: weights, inputs and draws, never the answers."""
    return {k: v.clone() for k, v in tensors.items() if k.startswith(GIVEN)}


def is_mask(values: Tensor) -> bool:
    """Floats that stand for true and false: zeros and ones, both present. The official codes keep masks so."""
    if not values.is_floating_point() or values.numel() < 2:
        return not values.is_floating_point() and not values.is_complex()
    zeros, ones = values == 0, values == 1
    return bool((zeros | ones).all() and zeros.any() and ones.any())


def differences(ours: Tensor | None, theirs: Tensor, atol: float, rtol: float) -> list[str]:
    """Why two tensors are not the same; empty when they are.

    Integers, booleans and masks: equal in value, whatever the dtype. Everything else: within ``atol + rtol |theirs|``
    at each place, and within ``max(1e-3, 10 rtol) max|theirs|`` where that maximum exceeds 1e-7, because many
    gradients are smaller than any absolute tolerance. Infinities and NaNs must stand at the same places.
    """
    if ours is None:
        return ["missing: the adapter did not return it"]
    ours = ours.detach().cpu()
    if ours.shape != theirs.shape:
        return [f"shape {tuple(ours.shape)}, theirs {tuple(theirs.shape)}"]
    if is_mask(theirs):
        wrong = int((wide(ours) != wide(theirs)).sum())
        return [f"{wrong} of {theirs.numel()} values differ (must be equal)"] if wrong else []
    a, b = wide(ours), wide(theirs)
    finite = b.isfinite()
    if not torch.equal(a[~finite].nan_to_num(nan=0.5), b[~finite].nan_to_num(nan=0.5)):
        return ["infinities or NaNs stand at other places or have another sign"]
    a, b = a[finite], b[finite]
    if not a.numel():
        return []
    if not a.isfinite().all():
        return [f"{int((~a.isfinite()).sum())} values are not finite, theirs are"]
    gap, size = (a - b).abs(), float(b.abs().max())
    lines = []
    if bool((gap > atol + rtol * b.abs()).any()):
        lines.append(
            f"differs by up to {float(gap.max()):.3g}, beyond atol {atol:g} + rtol {rtol:g} (largest value {size:.3g})"
        )
    allowed = max(1e-3, 10 * rtol) * size
    if size > SMALLEST and float(gap.max()) > allowed:
        lines.append(
            f"differs by {float(gap.max()) / size:.3g} of its largest value {size:.3g}, allowed {allowed / size:.3g}"
        )
    return lines


def wide(values: Tensor) -> Tensor:
    """float64 view of any tensor (complex numbers as pairs)."""
    return (torch.view_as_real(values) if values.is_complex() else values).to(torch.float64)
