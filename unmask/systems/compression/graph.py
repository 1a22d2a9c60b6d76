"""Which weights share their channels: a model's graph (torch.export) followed axis by axis.

Every axis of every tensor may carry a ``Space``: a set of channels that some weights produce, others only pass through or
scale, and others consume. An elementwise operation of two tensors makes their spaces one; what cannot be followed (a norm over the
channels, a reshape into heads, a concatenation) freezes a space and says why.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from unmask.errors import UserError
from unmask.systems.compression.axes import BINARY, ELEMENTWISE, Label, Space, join, reshaped


@dataclass
class Layer:
    """A weighted layer as the cost sees it: multiply-adds = places x produced x consumed x kernel."""

    parameter: str
    out: Space
    source: Space | None
    places: int
    kernel: int
    fan_in: int
    depthwise: bool = False


@dataclass
class Graph:
    """What was found: ``spaces`` (merged, in the order of their first producer), ``layers``, and the exported nodes for
    whoever looks for attention."""

    spaces: list[Space]
    layers: list[Layer]
    nodes: list[Any]
    names: dict[Any, str]  # placeholder -> parameter or buffer
    uses: dict[str, int]


class _Called(nn.Module):
    def __init__(self, module: nn.Module, call: Callable[..., Tensor], names: list[str]):
        super().__init__()
        self.module, self.names = module, names
        self._call = [call]

    def forward(self, *inputs: Tensor) -> Tensor:
        return self._call[0](**dict(zip(self.names, inputs, strict=True)))


def export(module: nn.Module, call: Callable[..., Tensor], inputs: Mapping[str, Tensor], name: str) -> Any:
    """The exported program of ``call(**inputs)``. Raises ``UserError`` where torch.export cannot follow the model."""
    from unmask.official.export import _quiet

    whole = _Called(module, call, list(inputs)).eval()
    try:
        with _quiet():
            return torch.export.export(whole, tuple(inputs.values()), strict=False)
    except Exception as error:  # torch.export fails in as many ways as there is Python
        lines = [line for line in str(error).strip().splitlines() if line.strip()] or [type(error).__name__]
        raise UserError(f"the structure of {name} cannot be followed: {lines[0][:160]}") from None


def follow(module: nn.Module, call: Callable[..., Tensor], inputs: Mapping[str, Tensor], name: str) -> Graph:
    """Export the model and follow every axis. inputs: a small batch."""
    program = export(module, call, inputs, name)
    signature = program.graph_signature
    nodes = list(program.graph.nodes)
    named = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    of_module = {
        node: named[node.name].removeprefix("module.")
        for node in nodes
        if node.op == "placeholder" and node.name in named
    }
    return _Follower(nodes, of_module).run()


def op_of(node: Any) -> str:
    """``linear`` of ``aten.linear.default``."""
    if node.op != "call_function":
        return ""
    target = node.target
    name = getattr(target, "__name__", str(target))
    return str(getattr(target, "_opname", name)).partition(".")[0]


def shape_of(node: Any) -> tuple[int, ...]:
    value = node.meta.get("val")
    return tuple(int(s) for s in value.shape) if isinstance(value, Tensor) else ()


class _Follower:
    def __init__(self, nodes: list[Any], names: dict[Any, str]):
        self.nodes, self.names = nodes, names
        self.labels: dict[Any, Any] = {}
        self.spaces: list[Space] = []
        self.layers: list[Layer] = []
        self.uses: dict[str, int] = {}

    def run(self) -> Graph:
        for node in self.nodes:
            if node.op == "placeholder":
                self.labels[node] = [None] * len(shape_of(node))
            elif node.op == "output":
                for source in node.all_input_nodes:
                    self.freeze(source, "is what the model answers")
            elif node.op == "call_function":
                self.labels[node] = self.step(node)
        roots = sorted({s.root() for s in self.spaces}, key=lambda s: s.order)
        for space in roots:
            for parameter, *_ in space.roles:
                if self.uses.get(parameter, 0) > 1:
                    space.freeze(f"shares {parameter} with another layer")
        return Graph(roots, self.layers, self.nodes, self.names, self.uses)

    # --- labels ---
    def of(self, node: Any) -> list[Label]:
        """A small parameter is a space of its own in every axis, so that what it scales takes it along."""
        if node in self.names and not any(self.labels.get(node) or []):
            shape = shape_of(node)
            self.labels[node] = [
                (self.space(s, (self.names[node], i, "with", 1)), 1) if s > 1 else None for i, s in enumerate(shape)
            ]
        labels = self.labels.get(node)
        return (
            list(labels)
            if isinstance(labels, list) and len(labels) == len(shape_of(node))
            else [None] * len(shape_of(node))
        )

    def space(self, size: int, *roles: tuple[str, int, str, int]) -> Space:
        made = Space(size, list(roles), order=len(self.spaces))
        self.spaces.append(made)
        return made

    def freeze(self, node: Any, reason: str) -> None:
        for label in self.of(node):
            if label is not None:
                label[0].freeze(reason)

    def use(self, node: Any) -> str | None:
        name = self.names.get(node)
        if name is not None:
            self.uses[name] = self.uses.get(name, 0) + 1
        return name

    # --- operations ---
    def step(self, node: Any) -> Any:
        op, args = op_of(node), node.args
        shape = shape_of(node)
        handler = getattr(self, f"on_{op.rstrip('_')}", None)
        if handler is not None:
            return handler(node, args, shape)
        if op in ELEMENTWISE and node.all_input_nodes:
            first = args[0]
            labels = self.of(first)
            return labels if len(labels) == len(shape) else [None] * len(shape)
        if op in BINARY:
            return self.binary(node, shape)
        for source in node.all_input_nodes:
            self.freeze(source, f"goes through {op}")
        return [None] * len(shape)

    def binary(self, node: Any, shape: tuple[int, ...]) -> list[Label]:
        out: list[Label] = [None] * len(shape)
        sources = [n for n in node.all_input_nodes if shape_of(n)]
        for axis in range(len(shape)):
            back = axis - len(shape)
            found = [(n, self.of(n)[back], shape_of(n)[back]) for n in sources if len(shape_of(n)) >= -back]
            labelled = [label for _, label, size in found if label is not None and size == shape[axis]]
            bare = [n for n, label, size in found if label is None and size == shape[axis] and size > 1]
            if not labelled:
                continue
            merged = labelled[0]
            for other in labelled[1:]:
                if other[1] != merged[1]:
                    other[0].freeze("joined across a flattening")
                    merged[0].freeze("joined across a flattening")
                else:
                    merged = (join(merged[0], other[0]), merged[1])
            if bare:
                merged[0].freeze(f"is combined with {bare[0].name}, which has no channels to cut")
            out[axis] = merged
        return out

    def on_linear(self, node: Any, args: Any, shape: tuple[int, ...]) -> list[Label]:
        return self.product(args[0], args[1], args[2] if len(args) > 2 else None, 0, shape)

    def on_addmm(self, node: Any, args: Any, shape: tuple[int, ...]) -> list[Label]:
        return self.product(args[1], args[2], args[0], 1, shape)

    def product(self, x: Any, weight: Any, bias: Any, out_axis: int, shape: tuple[int, ...]) -> list[Label]:
        labels, name = self.of(x), self.use(weight)
        if name is None:
            self.freeze(x, "meets a weight that is computed")
            return [None] * len(shape)
        made = self.space(shape[-1], (name, out_axis, "out", 1))
        if bias is not None and (own := self.use(bias)) is not None:
            made.roles.append((own, 0, "with", 1))
        source = self.consume(labels[-1], name, 1 - out_axis)
        places = 1
        for s in shape[:-1]:
            places *= s
        fan = shape_of(weight)[1 - out_axis]
        self.layers.append(Layer(name, made, source, places // max(shape[0], 1), 1, fan))
        return [*labels[:-1], (made, 1)]

    def consume(self, label: Label, name: str, axis: int) -> Space | None:
        if label is None:
            return None
        label[0].root().roles.append((name, axis, "in", label[1]))
        return label[0]

    def on_conv2d(self, node: Any, args: Any, shape: tuple[int, ...]) -> list[Label]:
        x, weight, bias = args[0], args[1], args[2] if len(args) > 2 else None
        groups = int(args[6]) if len(args) > 6 else 1
        labels, name = self.of(x), self.use(weight)
        channels = shape_of(x)[1]
        free: list[Label] = [None] * len(shape)
        if name is None:
            self.freeze(x, "meets a weight that is computed")
            return free
        own = self.use(bias) if bias is not None else None
        kernel = 1
        for s in shape_of(weight)[2:]:
            kernel *= s
        places = 1
        for s in shape[2:]:
            places *= s
        if groups == channels == shape[1] and groups > 1:  # depthwise: channels pass through
            made = self.space(shape[1], (name, 0, "with", 1))
            if own:
                made.roles.append((own, 0, "with", 1))
            label = labels[1]
            whole = join(label[0], made) if label is not None and label[1] == 1 else made
            self.layers.append(Layer(name, whole, None, places, kernel, 1, depthwise=True))
            return [labels[0], (whole, 1), *[None] * (len(shape) - 2)]
        made = self.space(shape[1], (name, 0, "out", 1))
        if own:
            made.roles.append((own, 0, "with", 1))
        if groups > 1:
            made.freeze(f"{name} works in {groups} groups")
            self.freeze(x, f"{name} works in {groups} groups")
            source = None
        else:
            source = self.consume(labels[1], name, 1)
        self.layers.append(Layer(name, made, source, places, kernel, shape_of(weight)[1]))
        return [labels[0], (made, 1), *[None] * (len(shape) - 2)]

    on_conv1d = on_conv2d
    on_conv3d = on_conv2d

    def on_batch_norm(self, node: Any, args: Any, shape: tuple[int, ...]) -> list[Label]:
        labels = self.of(args[0])
        if labels[1] is not None:
            for part in args[1:5]:
                name = self.names.get(part) if part is not None else None
                if name is not None:
                    self.uses[name] = self.uses.get(name, 0) + 1
                    labels[1][0].root().roles.append((name, 0, "with", 1))
        return labels

    def on_layer_norm(self, node: Any, args: Any, shape: tuple[int, ...]) -> list[Label]:
        labels = self.of(args[0])
        where = self.names.get(args[2], "a layer norm") if len(args) > 2 else "a layer norm"
        for label in labels[len(shape) - len(args[1]) :]:
            if label is not None:
                label[0].freeze(f"is normalised over all channels by {where.rpartition('.')[0] or where}")
        return labels

    def on_rms_norm(self, node: Any, args: Any, shape: tuple[int, ...]) -> list[Label]:
        return self.on_layer_norm(node, (args[0], args[1], args[2] if len(args) > 2 else None), shape)

    def on_permute(self, node: Any, args: Any, shape: tuple[int, ...]) -> list[Label]:
        labels = self.of(args[0])
        return [labels[i] for i in args[1]]

    def on_transpose(self, node: Any, args: Any, shape: tuple[int, ...]) -> list[Label]:
        labels, a, b = self.of(args[0]), args[1], args[2]
        labels[a], labels[b] = labels[b], labels[a]
        return labels

    def on_expand(self, node: Any, args: Any, shape: tuple[int, ...]) -> list[Label]:
        labels, old = self.of(args[0]), shape_of(args[0])
        extra = len(shape) - len(old)
        return [None] * extra + [x if s == o else None for x, s, o in zip(labels, shape[extra:], old, strict=True)]

    def on_unsqueeze(self, node: Any, args: Any, shape: tuple[int, ...]) -> list[Label]:
        labels, axis = self.of(args[0]), args[1]
        labels.insert(axis if axis >= 0 else len(labels) + 1 + axis, None)
        return labels

    def on_mean(self, node: Any, args: Any, shape: tuple[int, ...]) -> list[Label]:
        labels = self.of(args[0])
        axes = args[1] if len(args) > 1 and isinstance(args[1], (list, tuple)) else range(len(labels))
        gone = {a % max(len(labels), 1) for a in axes}
        for a in gone:
            if labels[a] is not None:
                labels[a][0].freeze("is averaged over its channels")  # type: ignore[index]
        kept = [None if i in gone else label for i, label in enumerate(labels)]
        return kept if len(kept) == len(shape) else [x for i, x in enumerate(labels) if i not in gone]

    on_sum = on_mean
    on_amax = on_mean

    def on_select(self, node: Any, args: Any, shape: tuple[int, ...]) -> list[Label]:
        labels = self.of(args[0])
        gone = labels.pop(args[1])
        if gone is not None:
            gone[0].freeze("single channels of it are picked")
        return labels

    def on_slice(self, node: Any, args: Any, shape: tuple[int, ...]) -> list[Label]:
        labels, old = self.of(args[0]), shape_of(args[0])
        for i, (s, o) in enumerate(zip(shape, old, strict=True)):
            if s != o and labels[i] is not None:
                labels[i][0].freeze("is sliced")  # type: ignore[index]
                labels[i] = None
        return labels

    def on_cat(self, node: Any, args: Any, shape: tuple[int, ...]) -> list[Label]:
        parts = [p for p in args[0] if len(shape_of(p)) == len(shape)]
        axis = (args[1] if len(args) > 1 else 0) % max(len(shape), 1)
        for part in parts:
            label = self.of(part)[axis]
            if label is not None:
                label[0].freeze("is joined with other channels by cat")
        return self.binary_of(parts, shape, skip=axis)

    def binary_of(self, parts: list[Any], shape: tuple[int, ...], skip: int) -> list[Label]:
        out: list[Label] = [None] * len(shape)
        for axis in range(len(shape)):
            if axis == skip:
                continue
            labels = [self.of(p)[axis] for p in parts]
            known = [x for x in labels if x is not None]
            if not known:
                continue
            merged = known[0]
            for other in known[1:]:
                merged = (join(merged[0], other[0]), merged[1])
            if len(known) < len(labels) and shape[axis] > 1:
                merged[0].freeze("is joined with something that has no channels to cut")
            out[axis] = merged
        return out

    def on_view(self, node: Any, args: Any, shape: tuple[int, ...]) -> list[Label]:
        return reshaped(self.of(args[0]), shape_of(args[0]), shape)

    on_reshape = on_view
    on__unsafe_view = on_view
    on_flatten = on_view
    on_unflatten = on_view
    on_squeeze = on_view

    def on_getitem(self, node: Any, args: Any, shape: tuple[int, ...]) -> list[Label]:
        return [None] * len(shape)
