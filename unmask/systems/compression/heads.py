"""Attention heads, found where a graph computes attention: row numbers are sent through the reshapes between a projection and
its attention, and what arrives at head h says which rows are its own."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from unmask.systems.compression.axes import ELEMENTWISE, MOVES
from unmask.systems.compression.graph import Graph, op_of, shape_of
from unmask.systems.compression.units import Slice, Units, common, listed, owner_of


def heads_of(module: nn.Module, graph: Graph, refused: dict[str, str]) -> Iterable[Units]:
    for node in graph.nodes:
        found = _attention(node)
        if found is None:
            continue
        query, key, value, out = found
        traced = [_rows(source, graph) for source in (query, key, value)]
        names = [t[0] for t in traced if t is not None]
        label = owner_of(names[-1]) if names else node.name
        shape = shape_of(query)
        if len(shape) < 4 or traced[2] is None or traced[2][1] is None:
            refused.setdefault(label, "is attention whose heads cannot be told apart")
            continue
        units = _units(module, graph, traced, shape, shape_of(value), out, refused, label)
        if units is not None:
            yield units


def _attention(node: Any) -> tuple[Any, Any, Any, Any] | None:
    """Query, key, value and output nodes, of the fused operation or of softmax(q kᵀ) v."""
    op = op_of(node)
    if op == "scaled_dot_product_attention":
        return node.args[0], node.args[1], node.args[2], node
    if op not in ("softmax", "_softmax"):
        return None
    above = node.args[0]
    while op_of(above) in ELEMENTWISE | {"add", "add_", "mul", "div", "masked_fill", "where", "view", "reshape"}:
        sources = [n for n in above.all_input_nodes if n.op == "call_function" and len(shape_of(n)) >= 3]
        if not sources:
            return None
        above = sources[0]
    below = node
    while True:
        users = [u for u in below.users if u.op == "call_function"]
        if not users:
            return None
        if op_of(users[0]) in ("matmul", "bmm"):
            break
        below = users[0]
        if op_of(below) not in ELEMENTWISE:
            return None
    if op_of(above) not in ("matmul", "bmm"):
        return None
    product = users[0]
    return above.args[0], above.args[1], product.args[1], product


def _rows(node: Any, graph: Graph) -> tuple[str, Tensor | None, int] | None:
    """The projection that a tensor comes from, which of its rows arrive where, and how many it has. The rows are None
    where something else than a movement lies between."""
    source, exact, here = None, True, [node]
    seen = set()
    while here:
        one = here.pop(0)
        if one in seen or one.op != "call_function":
            continue
        seen.add(one)
        op = op_of(one)
        if op in ("linear", "addmm"):
            source = one
            break
        if op not in MOVES | {"layer_norm", "rms_norm"}:
            exact = (
                exact and op in ("mul", "div") and sum(1 for n in one.all_input_nodes if n.op == "call_function") == 1
            )
        here += one.all_input_nodes if op != "layer_norm" else one.all_input_nodes[:1]
    if source is None:
        return None
    name = graph.names.get(source.args[1] if op_of(source) == "linear" else source.args[2])
    if name is None:
        return None
    shape = shape_of(source)
    rows = torch.arange(shape[-1], dtype=torch.float64).expand(shape) if exact else None
    try:
        moved = _move(node, source, rows) if rows is not None else None
    except (RuntimeError, TypeError, ValueError):
        moved = None
    return name, moved, shape[-1]


def _move(node: Any, source: Any, value: Tensor) -> Any:
    """What becomes of ``value``, in place of ``source``, on the way to ``node``."""
    if node is source:
        return value
    op = op_of(node)
    if op in ("layer_norm", "rms_norm", "mul", "div"):  # scales single places: numbers stay where they are
        return _move(next(n for n in node.all_input_nodes if n.op == "call_function"), source, value)
    if op not in MOVES:
        raise ValueError(op)
    if op == "getitem":
        return _move(node.args[0], source, value)[node.args[1]]
    args = [_move(a, source, value) if hasattr(a, "all_input_nodes") else a for a in node.args]
    if op in ("to", "_to_copy", "dropout", "contiguous", "lift_fresh_copy"):
        return args[0]
    return node.target(*args, **{k: v for k, v in node.kwargs.items() if not hasattr(v, "all_input_nodes")})


def _units(
    module: nn.Module,
    graph: Graph,
    traced: list[Any],
    shape: tuple[int, ...],
    value_shape: tuple[int, ...],
    out: Any,
    refused: dict[str, str],
    label: str,
) -> Units | None:
    heads, size = shape[-3], value_shape[-1]
    rows_v = traced[2][1].reshape(-1, *traced[2][1].shape[-3:])[0, :, 0].long()  # [H, d]
    if len(rows_v) != heads and heads % len(rows_v) == 0:  # grouped queries, repeated inside the fused operation
        rows_v = rows_v.repeat_interleave(heads // len(rows_v), 0)
    proj = _projection(out, heads, size, graph)
    if proj is None:
        refused.setdefault(label, "is attention whose output goes through more than reshapes before its projection")
        return None
    name_out, columns, axis_out = proj
    # heads that share rows of the values (grouped queries) are one unit
    first_rows = rows_v[:, 0].tolist()
    groups = list(dict.fromkeys(first_rows))
    members = [[h for h in range(heads) if first_rows[h] == g] for g in groups]
    if len({len(m) for m in members}) != 1:
        refused.setdefault(label, "shares values unevenly between its heads")
        return None
    index_v = torch.stack([rows_v[m[0]] for m in members])
    slices: list[Slice] = []
    for position, found in enumerate(traced):
        if found is None:
            refused.setdefault(label, "has queries or keys that come from no projection")
            return None
        name, moved, width = found
        if position == 2:
            index = index_v
        elif moved is not None:
            rows = moved.reshape(-1, *moved.shape[-3:])[0]
            rows = rows[:, 0]
            if position == 1 and _transposed(rows, size, moved):
                rows = moved.reshape(-1, *moved.shape[-3:])[0][:, :, 0]
            rows = rows.long()
            rows = rows.repeat_interleave(heads // len(rows), 0) if len(rows) != heads else rows
            index = torch.stack([torch.cat([rows[h] for h in m]).unique() for m in members])
        else:  # rotary positions lie between: heads are taken to stand one after another
            own = width // (heads * shape[-1]) if width % (heads * shape[-1]) == 0 else 0
            per = width // len(members)
            if width % len(members) or (name == traced[2][0] and own != 1):
                refused.setdefault(label, "mixes queries and keys in one projection before rotating them")
                return None
            index = torch.arange(width).reshape(len(members), per)
        axis = _axis(module, name)
        slices.append(Slice(name, axis, index))
        bias = name.rpartition(".")[0] + ".bias" if name.endswith(".weight") else name.replace("weight", "bias")
        if bias in graph.names.values():
            slices.append(Slice(bias, 0, index))
        above = owner_of(name).rpartition(".")[0]
        for extra, offset in (("q_bias", 0), ("v_bias", 2)):  # BEiT's own biases, as long as one of three parts
            full = f"{above}.{extra}".removeprefix(".")
            if full in graph.names.values() and position == offset:
                slices.append(Slice(full, 0, index % (width // 3)))
    index_out = torch.stack([torch.cat([columns[h] for h in m]) for m in members])
    slices.append(Slice(name_out, axis_out, index_out))
    core = common([owner_of(s.parameter) for s in slices[:-1]], module)
    units = Units(
        "head",
        core,
        len(members),
        _merged(slices),
        list(dict.fromkeys(owner_of(t[0]) for t in traced)),
        [(owner_of(name_out), -1)],
        index_out,
        core=core,
        size=size,
        members=len(members[0]),
    )
    units.block = listed(module, [core, owner_of(name_out)])
    return units


def _transposed(rows: Tensor, size: int, moved: Tensor) -> bool:
    """Whether keys arrive as ``[B, H, d, T]``: then the first column of each head, not the first row, is one token."""
    own = moved.reshape(-1, *moved.shape[-3:])[0]
    return bool((own[0, 0] == own[0, 0, 0]).all())


def _merged(slices: list[Slice]) -> list[Slice]:
    """One slice for each axis of a parameter: a fused projection has its queries, keys and values together."""
    by: dict[tuple[str, int], list[Tensor]] = {}
    for one in slices:
        by.setdefault((one.parameter, one.axis), []).append(one.index)
    return [
        Slice(p, axis, torch.stack([row.unique() for row in torch.cat(parts, dim=1)]) if len(parts) > 1 else parts[0])
        for (p, axis), parts in by.items()
    ]


def _axis(module: nn.Module, name: str) -> int:
    """The axis of a projection's outputs: 1 for the transposed linear layers of GPT-2."""
    owner = module.get_submodule(owner_of(name))
    return 1 if hasattr(owner, "nf") and hasattr(owner, "nx") else 0


def _projection(out: Any, heads: int, size: int, graph: Graph) -> tuple[str, list[Tensor], int] | None:
    """The layer behind the attention, and which of its inputs each head fills."""
    shape = shape_of(out)
    value: Any = (torch.arange(heads)[:, None, None] * size + torch.arange(size)).double().expand(shape)
    here = out
    while True:
        users = [u for u in here.users if u.op == "call_function"]
        nexts = [u for u in users if op_of(u) in MOVES | {"linear", "addmm"}]
        if len(nexts) != 1 or len(users) != 1:
            return None
        step = nexts[0]
        op = op_of(step)
        if op in ("linear", "addmm"):
            weight = step.args[1] if op == "linear" else step.args[2]
            name = graph.names.get(weight)
            if name is None or (step.args[0] if op == "linear" else step.args[1]) is not here:
                return None
            order = value.reshape(-1, value.shape[-1])[0].long()
            columns = [(order // size == h).nonzero()[:, 0] for h in range(heads)]
            if any(len(c) != size for c in columns):
                return None
            return name, columns, 1 if op == "linear" else 0
        try:
            value = _move(step, here, value)
        except (ValueError, RuntimeError, TypeError):
            return None
        here = step
