"""What of a model can be cut: attention heads, MLP neurons and convolution channels, with every weight that goes with each.

Nothing is listed by hand. Channels come from :mod:`.graph`; heads are found where the graph computes attention: row numbers
are sent through the reshapes between a projection and its attention, and what arrives at head h says which rows are its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from unmask.errors import UserError
from unmask.models import UserModel
from unmask.systems.compression.graph import ELEMENTWISE, MOVES, Graph, Layer, Space, follow, op_of, shape_of

Kind = Literal["head", "neuron", "channel"]


@dataclass(frozen=True, eq=False)
class Slice:
    """The places ``index [units, each]`` on one axis of a parameter (or buffer) that go with each unit."""

    parameter: str
    axis: int
    index: Tensor


@dataclass(eq=False)
class Units:
    """Units of one kind in one layer. sources: modules that produce them. sinks: modules whose input they are, with the
    axis of their channels. columns: places ``[units, each]`` in the first sink's input. core: of heads, the smallest
    module around their projections. size: of heads, the width of one. block: the repeated block that holds them."""

    kind: Kind
    name: str
    count: int
    slices: list[Slice]
    sources: list[str]
    sinks: list[tuple[str, int]]
    columns: Tensor
    block: str = ""
    core: str = ""
    size: int = 1
    members: int = 1  # query heads that share one unit (grouped queries)
    space: Space | None = None

    def parameters(self, shapes: dict[str, torch.Size]) -> int:
        """Numbers that go with one unit."""
        total = 0
        for one in self.slices:
            shape = shapes[one.parameter]
            total += one.index.shape[1] * (shape.numel() // max(shape[one.axis], 1))
        return total


@dataclass
class Structure:
    """heads and neurons: by layer, in the order of the network; channels: of convolutional networks (and of whatever else is
    no part of a transformer's block). refused: layer -> why it cannot be cut."""

    heads: list[Units] = field(default_factory=list)
    neurons: list[Units] = field(default_factory=list)
    channels: list[Units] = field(default_factory=list)
    refused: dict[str, str] = field(default_factory=dict)
    layers: list[Layer] = field(default_factory=list)

    @property
    def blocks(self) -> list[str]:
        """The repeated blocks that hold heads or neurons, in order."""
        return list(dict.fromkeys(u.block for u in (self.heads or self.neurons) if u.block))

    @property
    def transformer(self) -> bool:
        """Whether its heads and neurons stand in repeated blocks."""
        return bool(self.blocks) and bool(self.neurons)

    def all(self) -> list[Units]:
        return [*self.heads, *self.neurons, *self.channels]


def find_structure(model: UserModel) -> Structure:
    """Everything that can be cut. Raises ``UserError`` naming a layer where nothing can be."""
    module = model.module
    training = module.training
    module.eval()
    example = model.inputs(model.example(2, 8))
    graph = follow(module, model.scores, example, model.name)
    found = Structure(layers=graph.layers)
    for units in _heads(module, graph, found.refused):
        found.heads.append(units)
    blocks = _blocks(module, found.heads)
    for units in _channels(module, graph, found.refused):
        units.block = next((b for b in blocks if all(p.startswith(b + ".") for p in _paths(units))), "")
        linear = units.kind == "neuron"
        if linear and not blocks:
            units.block = _listed(module, _paths(units))
        (found.neurons if linear and units.block else found.channels).append(units)
    if found.heads and not all(_can_lose_heads(model, found.heads, found.refused)):
        found.heads = []
    if found.neurons and blocks:  # a transformer: what stands outside its blocks (a pooler, an embedding) stays whole
        for units in found.channels:
            found.refused.setdefault(units.name, "stands outside the repeated blocks")
        found.channels = []
    if not found.all():
        layer, why = next(iter(found.refused.items()), (model.name, "no layer was found that another one consumes"))
        raise UserError(f"nothing of {model.name} can be cut: {layer} {why}")
    module.train(training)
    return found


# --- channels and neurons -----------------------------------------------------------------------------------------


def _channels(module: nn.Module, graph: Graph, refused: dict[str, str]) -> Iterable[Units]:
    for space in graph.spaces:
        out = [r for r in space.roles if r[2] == "out"]
        into = [r for r in space.roles if r[2] == "in"]
        if not out:
            continue
        name = _owner(out[0][0])
        if space.frozen or not into:
            refused.setdefault(name, space.frozen or "is consumed by no layer")
            continue
        base = torch.arange(space.size)
        slices = [
            Slice(p, axis, base[:, None] * copies + torch.arange(copies)[None] if role == "in" else base[:, None])
            for p, axis, role, copies in space.roles
        ]
        sinks = []
        for p, _, _, copies in into:
            owner = module.get_submodule(_owner(p))
            sinks.append((_owner(p), 1 if isinstance(owner, (nn.Conv1d, nn.Conv2d, nn.Conv3d)) else -1))
        linear = all(not _is_conv(module.get_submodule(_owner(r[0]))) for r in (*out, *into))
        yield Units(
            "neuron" if linear else "channel",
            name,
            space.size,
            slices,
            list(dict.fromkeys(_owner(r[0]) for r in out)),
            list(dict.fromkeys(sinks)),
            base[:, None] * into[0][3] + torch.arange(into[0][3])[None],
            space=space,
        )


def _is_conv(module: nn.Module) -> bool:
    return isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d))


def _owner(parameter: str) -> str:
    return parameter.rpartition(".")[0]


def _paths(units: Units) -> list[str]:
    return [*units.sources, *(s for s, _ in units.sinks)]


# --- heads --------------------------------------------------------------------------------------------------------


def _heads(module: nn.Module, graph: Graph, refused: dict[str, str]) -> Iterable[Units]:
    for node in graph.nodes:
        found = _attention(node)
        if found is None:
            continue
        query, key, value, out = found
        traced = [_rows(source, graph) for source in (query, key, value)]
        names = [t[0] for t in traced if t is not None]
        label = _owner(names[-1]) if names else node.name
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
            exact = exact and op in ("mul", "div") and sum(1 for n in one.all_input_nodes if n.op == "call_function") == 1
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
            rows = rows[:, 0] if rows.shape[1] != rows.shape[2] or position == 0 else rows[:, 0]
            if position == 1 and shape_of_transposed(rows, size, moved):
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
        owner = _owner(name)
        for extra, offset in (("q_bias", 0), ("v_bias", 2)):  # BEiT's own biases, as long as one of three parts
            full = f"{owner}.{extra}".removeprefix(".") if owner else extra
            full = f"{owner.rpartition('.')[0]}.{extra}"
            if full in graph.names.values() and position == offset:
                slices.append(Slice(full, 0, index % (width // 3)))
    index_out = torch.stack([torch.cat([columns[h] for h in m]) for m in members])
    slices.append(Slice(name_out, axis_out, index_out))
    core = _common([_owner(s.parameter) for s in slices[:-1]], module)
    units = Units(
        "head",
        core,
        len(members),
        _merged(slices),
        list(dict.fromkeys(_owner(t[0]) for t in traced)),
        [(_owner(name_out), -1)],
        index_out,
        core=core,
        size=size,
        members=len(members[0]),
    )
    units.block = _listed(module, [core, _owner(name_out)])
    return units


def shape_of_transposed(rows: Tensor, size: int, moved: Tensor) -> bool:
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
    owner = module.get_submodule(_owner(name))
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


# --- modules ------------------------------------------------------------------------------------------------------


def _common(paths: list[str], module: nn.Module) -> str:
    """The smallest module around several."""
    parts = [p.split(".") for p in paths]
    shared: list[str] = []
    for level in zip(*parts, strict=False):
        if len(set(level)) != 1:
            break
        shared.append(level[0])
    here = ".".join(shared)
    owner = module.get_submodule(here)
    return here.rpartition(".")[0] if len(set(paths)) == 1 and isinstance(owner, nn.Linear) or _is_leaf(owner) else here


def _is_leaf(module: nn.Module) -> bool:
    return not any(True for _ in module.children())


def _listed(module: nn.Module, paths: list[str]) -> str:
    """The innermost member of a list of modules that holds all of these paths."""
    shared = _common(paths, module) if len(paths) > 1 else paths[0]
    while shared:
        parent, _, _ = shared.rpartition(".")
        if isinstance(module.get_submodule(parent), (nn.ModuleList, nn.Sequential)) and all(
            p == shared or p.startswith(shared + ".") for p in paths
        ):
            return shared
        shared = parent
    return ""


def _blocks(module: nn.Module, heads: list[Units]) -> list[str]:
    return list(dict.fromkeys(u.block for u in heads if u.block))


def _can_lose_heads(model: UserModel, heads: list[Units], refused: dict[str, str]) -> Iterable[bool]:
    """Whether the modules' own code works with fewer heads: one head of every layer is cut from a copy, and the answers are
    compared with those of the masked model."""
    from unmask.systems.compression.surgery import cut, masked

    keep: dict[Units, Tensor] = {}
    for units in heads:
        kept = torch.ones(units.count, dtype=torch.bool)
        kept[0] = units.count == 1
        keep[units] = kept
    example = model.inputs(model.example(2, 8))
    why = ""
    try:
        with torch.no_grad():
            smaller = cut(model, keep)
            ours = smaller.scores(**example)
            with masked(model.module, keep):
                theirs = model.scores(**example)
        if not torch.allclose(ours, theirs, atol=1e-3 * max(float(theirs.abs().max()), 1e-3), rtol=1e-3):
            why = "answers otherwise without a head than with the head hidden"
    except (RuntimeError, ValueError, AssertionError, UserError, AttributeError, TypeError) as error:
        why = f"does not work with fewer heads ({str(error).strip().splitlines()[0][:80]})"
    if why:
        for units in heads:
            refused.setdefault(units.name, why)
    yield not why


Call = Callable[..., Tensor]
