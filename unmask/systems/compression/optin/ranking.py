"""Rankings as files: JSON or safetensors, never pickles; and a cache whose key holds every option, the model and the data."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from unmask.errors import UserError
from unmask.models import UserModel
from unmask.official.load import read_checkpoint
from unmask.systems.compression.structure import Units

Scores = dict[Units, Tensor]


def write_ranking(path: Path, scores: Scores, told: Mapping[str, Any]) -> Path:
    """JSON: for each layer its name, its kind and its scores, and what they were made with."""
    layers = [
        {"name": u.name, "kind": u.kind, "scores": [float(f"{v:.9g}") for v in s.tolist()]} for u, s in scores.items()
    ]
    path.write_text(json.dumps({"format": 1, **told, "layers": layers}, indent=1) + "\n", encoding="utf-8")
    return path


def read_ranking(path: Path, units: Sequence[Units]) -> Scores:
    """Scores from a file that ``write_ranking`` wrote, from safetensors (``head_scores [L, H]``, ``neuron_scores [L, F]``), or
    from a JSON list of plain ``[score, layer, index, "head" | "neuron"]``. Raises ``UserError``: a pickle, another shape."""
    if not path.is_file():
        raise UserError(f"no ranking {path}: give a .json or .safetensors file")
    if path.suffix == ".safetensors":
        state = read_checkpoint(path)
        return _tables(path, {k.removesuffix("_scores"): v for k, v in state.items() if k.endswith("_scores")}, units)
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError):
        raise UserError(
            f"{path} is no JSON: a pickled ranking is not read, since a pickle can run code; write its tuples as JSON"
        ) from None
    if isinstance(value, list):
        return _tuples(path, value, units)
    layers = {(x["kind"], x["name"]): x["scores"] for x in value.get("layers") or []}
    out: Scores = {}
    for u in units:
        found = layers.get((u.kind, u.name))
        if found is None or len(found) != u.count:
            had = "nothing" if found is None else f"{len(found)} scores"
            raise UserError(f"{path} has {had} for {u.name}, the model has {u.count} {u.kind}s there")
        out[u] = torch.tensor(found, dtype=torch.float64)
    return out


def _tuples(path: Path, rows: list[Any], units: Sequence[Units]) -> Scores:
    tables: dict[str, Tensor] = {}
    for kind in ("head", "neuron"):
        own = [r for r in rows if isinstance(r, list) and len(r) == 4 and r[3] == kind]
        if own:
            layers, count = 1 + max(int(r[1]) for r in own), 1 + max(int(r[2]) for r in own)
            tables[kind] = torch.zeros(layers, count, dtype=torch.float64)
            for score, layer, index, _ in own:
                tables[kind][int(layer), int(index)] = float(score)
    if not tables:
        raise UserError(f'{path} holds no ranking: it takes rows [score, layer, index, "head" or "neuron"]')
    return _tables(path, tables, units)


def _tables(path: Path, tables: Mapping[str, Tensor], units: Sequence[Units]) -> Scores:
    out: Scores = {}
    for kind in ("head", "neuron"):
        own = [u for u in units if u.kind == kind]
        table = tables.get(kind)
        wanted = (len(own), own[0].count if own else 0)
        if own and (table is None or tuple(table.shape) != wanted):
            have = "none" if table is None else f"{table.shape[0]} x {table.shape[1]}"
            raise UserError(f"{path} ranks {have} {kind}s, the model has {wanted[0]} layers x {wanted[1]}")
        if table is not None:
            out |= {u: table[i].double() for i, u in enumerate(own)}
    return out


# --- cache --------------------------------------------------------------------------------------------------------


def key_of(options: Mapping[str, Any], model: UserModel, inputs: Mapping[str, Tensor], rows: Tensor | None) -> str:
    """Digest of everything that the scores depend on."""
    digest = hashlib.blake2b(json.dumps(dict(options), sort_keys=True, default=str).encode(), digest_size=16)
    for name, value in [*model.module.state_dict().items(), *inputs.items(), ("rows", rows)]:
        if isinstance(value, Tensor):
            digest.update(f"{name}{tuple(value.shape)}".encode())
            digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def cached(key: str) -> Path:
    root = Path(os.environ.get("UNMASK_CACHE") or Path.home() / ".cache" / "unmask")
    return root / "rankings" / f"{key}.safetensors"


def remember(path: Path, scores: Scores, extra: Mapping[str, Tensor]) -> None:
    """Keep scores; a place that cannot be written is no error."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = path.with_name(f".{path.name}.{os.getpid()}")
        save_file({f"{u.kind}/{u.name}": s.contiguous() for u, s in scores.items()} | dict(extra), aside)
        aside.replace(path)
    except OSError:
        return


def recall(path: Path, units: Sequence[Units]) -> tuple[Scores, dict[str, Tensor]] | None:
    """What ``remember`` kept; None where there is nothing, or not all of it."""
    if not path.is_file():
        return None
    try:
        state = read_checkpoint(path)
    except UserError:
        return None
    names = {f"{u.kind}/{u.name}": u for u in units}
    if any(n not in state for n in names):
        return None
    return {u: state[n].double() for n, u in names.items()}, {n: v for n, v in state.items() if n not in names}
