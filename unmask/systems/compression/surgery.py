"""Hiding units of a model, and taking them out: the cut model answers as the masked one did."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from unmask.errors import UserError
from unmask.models import UserModel
from unmask.official.reshaped import Constant, Surgery, replace_module
from unmask.systems.compression.structure import Units

Keep = Mapping[Units, Tensor]  # units -> bool [count], True stays
WIDTHS = (
    "num_heads",
    "num_attention_heads",
    "num_key_value_heads",
    "all_head_size",
    "attn_dim",
    "split_size",
    "n_heads",
)


@contextmanager
def masked(module: nn.Module, keep: Keep) -> Iterator[None]:
    """While open, hidden heads and channels are zero where they are consumed, hidden neurons zero before their activation."""
    hooks = []
    for units, kept in keep.items():
        if bool(kept.all()):
            continue
        if units.kind == "neuron":
            hooks += [module.get_submodule(s).register_forward_hook(_Output(kept)) for s in units.sources]
        else:
            for sink, axis in units.sinks:
                hooks.append(
                    module.get_submodule(sink).register_forward_pre_hook(
                        _Input(spread(units, kept, module, sink), axis)
                    )
                )
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


class _Output:
    def __init__(self, kept: Tensor):
        self.kept = kept

    def __call__(self, _module: nn.Module, _inputs: Any, out: Tensor) -> Tensor:
        return out * self.kept.to(out.device, out.dtype)


class _Input:
    def __init__(self, kept: Tensor, axis: int):
        self.kept, self.axis = kept, axis

    def __call__(self, _module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        x = inputs[0]
        shape = [1] * x.ndim
        shape[self.axis] = -1
        return (x * self.kept.to(x.device, x.dtype).reshape(shape), *inputs[1:])


def spread(units: Units, kept: Tensor, module: nn.Module, sink: str) -> Tensor:
    """bool over the places of a sink's input: which of them are of kept units."""
    places = next(
        (s.index for s in units.slices if s.parameter.rpartition(".")[0] == sink and _is_input(s, module)),
        units.columns,
    )
    flags = torch.zeros(int(places.max()) + 1, dtype=torch.bool)
    flags[places.flatten()] = kept[:, None].expand(places.shape).flatten()
    return flags


def _is_input(one: Any, module: nn.Module) -> bool:
    owner = module.get_submodule(one.parameter.rpartition(".")[0])
    transposed = hasattr(owner, "nf") and hasattr(owner, "nx")
    return one.parameter.endswith("weight") and one.axis == (0 if transposed else 1)


# --- cutting ------------------------------------------------------------------------------------------------------


@torch.no_grad()
def cut(model: UserModel, keep: Keep) -> UserModel:
    """A copy of the model without the units that are not kept. What the removed neurons gave at rest (act(0)) goes into the
    next layer's bias. Raises ``UserError`` naming a layer that cannot be cut."""
    rest = at_rest(model, keep)
    module = copy.deepcopy(model.module)
    before = {n: tuple(v.shape) for n, v in module.state_dict().items()}
    sizes = {u: u.count * u.members for u in keep}
    extras = _outputs_of_cores(model, [u for u, k in keep.items() if u.kind == "head" and not k.any()])
    for units, values in rest.items():
        _fold(module, units, keep[units], values)
    attributes: dict[str, dict[str, int]] = {}
    constants: dict[str, list[int]] = {}
    for name, axis, index in _removed(keep):
        _shorten(module, name, axis, index)
    for units, kept in keep.items():
        if units.kind == "neuron" and not bool(kept.any()):
            constants |= {sink: _fixed(module, sink) for sink, _ in units.sinks}
        if units.kind != "head" or bool(kept.all()):
            continue
        left = int(kept.sum()) * units.members
        if left == 0:
            constants[units.core] = _silence(module, units, extras[units])
            continue
        attributes |= {k: attributes.get(k, {}) | v for k, v in _resize(module, units, sizes[units], left).items()}
    _refresh(module)
    # the same for a model that was cut before: its own record goes on
    old = model.surgery
    after = module.state_dict()
    gone = tuple(c + "." for c in constants)
    shapes = {n: list(v.shape) for n, v in after.items() if before.get(n) != tuple(v.shape) and not n.startswith(gone)}
    kept_old = {n: s for n, s in old.shapes.items() if n in after and n not in shapes}
    for one, named in _integers(module, before, after).items():
        attributes[one] = {**named, **attributes.get(one, {})}
    record = Surgery(
        {**kept_old, **shapes},
        {**{k: v for k, v in old.attributes.items() if not (k + ".").startswith(gone or ("\0",))}, **attributes},
        {**old.constants, **constants},
        dict(old.merges),
    )
    module.surgery = record  # type: ignore[assignment]
    if isinstance(getattr(module, "encoder", None), nn.Module):  # what is taken away alone has to know its part
        module.encoder.surgery = record.under("encoder")
    smaller = UserModel(**{**vars(model), "module": module})
    return smaller.eval()


def _removed(keep: Keep) -> Iterator[tuple[str, int, Tensor]]:
    gone: dict[tuple[str, int], list[Tensor]] = {}
    for units, kept in keep.items():
        if bool(kept.all()):
            continue
        for one in units.slices:
            gone.setdefault((one.parameter, one.axis), []).append(one.index[~kept].flatten())
    for (name, axis), parts in gone.items():
        yield name, axis, torch.cat(parts).unique()


def _shorten(module: nn.Module, name: str, axis: int, gone: Tensor) -> None:
    parent, _, last = name.rpartition(".")
    owner = module.get_submodule(parent)
    value = getattr(owner, last)
    flags = torch.ones(value.shape[axis], dtype=torch.bool)
    flags[gone] = False
    new = value.detach().index_select(axis, flags.nonzero()[:, 0].to(value.device)).clone()
    if isinstance(value, nn.Parameter):
        setattr(owner, last, nn.Parameter(new, requires_grad=value.requires_grad))
    else:
        setattr(owner, last, new)


def _resize(module: nn.Module, units: Units, heads: int, left: int) -> dict[str, dict[str, int]]:
    """Attributes that count heads, in the core and whatever holds it up to the block."""
    made: dict[str, dict[str, int]] = {}
    groups, kept = heads // units.members, left // units.members
    owner = module.get_submodule(units.core)
    for key in WIDTHS:
        value = getattr(owner, key, None)
        if not isinstance(value, int):
            continue
        new = {heads: left, groups: kept, heads * units.size: left * units.size, groups * units.size: kept * units.size}
        if key.startswith(("num", "n_")):
            new = {heads: left, groups: kept}
        else:
            new = {heads * units.size: left * units.size}
        if value in new:
            setattr(owner, key, new[value])
            made.setdefault(units.core, {})[key] = new[value]
    return made


def _silence(module: nn.Module, units: Units, extra: int) -> list[int]:
    """An attention without heads gives its output bias, or nothing where the projection stands outside it."""
    sink = units.sinks[0][0]
    if sink.startswith(units.core + "."):
        return _fixed(module, sink, units.core, extra)
    replace_module(module, units.core, Constant(0, extra))
    return [0, extra]


def _fixed(module: nn.Module, layer: str, place: str = "", extra: int = 0) -> list[int]:
    """Put the bias of a layer that has no inputs left in the place of the layer (or of what is named)."""
    linear: Any = module.get_submodule(layer)
    size = linear.weight.shape[1] if hasattr(linear, "nf") else linear.weight.shape[0]
    constant = Constant(size, extra)
    if linear.bias is not None:
        constant.value = linear.bias.detach().clone()
    replace_module(module, place or layer, constant)
    return [size, extra]


def _outputs_of_cores(model: UserModel, silent: list[Units]) -> dict[Units, int]:
    """How many outputs besides the first the attention modules give."""
    found: dict[Units, int] = {}
    hooks = []
    for units in silent:

        def hook(_m: nn.Module, _i: Any, out: Any, units: Units = units) -> None:
            found[units] = len(out) - 1 if isinstance(out, tuple) else 0

        hooks.append(model.module.get_submodule(units.core).register_forward_hook(hook))
    if silent:
        model.scores(**model.inputs(model.example(1, 8)))
    for h in hooks:
        h.remove()
    return found


def _refresh(module: nn.Module) -> None:
    """The layers' own numbers of channels, from their weights."""
    for m in module.modules():
        if isinstance(m, nn.Linear):
            m.out_features, m.in_features = m.weight.shape
        elif isinstance(m, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
            if m.groups > 1 and m.groups == m.in_channels and m.weight.shape[1] == 1:
                m.groups = m.in_channels = m.out_channels = m.weight.shape[0]
            elif m.groups == 1:
                m.out_channels, m.in_channels = m.weight.shape[:2]
        elif isinstance(m, nn.modules.batchnorm._BatchNorm) and m.running_mean is not None:
            m.num_features = int(m.running_mean.shape[0])
        elif hasattr(m, "nf") and hasattr(m, "nx") and isinstance(getattr(m, "weight", None), nn.Parameter):
            m.nx, m.nf = m.weight.shape  # type: ignore[assignment]


def _integers(module: nn.Module, before: Mapping[str, Any], after: Mapping[str, Tensor]) -> dict[str, dict[str, int]]:
    """The numbers of channels of the layers that changed, as a record."""
    keys = ("in_features", "out_features", "in_channels", "out_channels", "groups", "num_features", "nf", "nx")
    changed = {n.rpartition(".")[0] for n, v in after.items() if before.get(n) != tuple(v.shape)}
    out: dict[str, dict[str, int]] = {}
    for name in sorted(changed):
        owner = module.get_submodule(name)
        if isinstance(owner, Constant):
            continue
        found = {k: getattr(owner, k) for k in keys if isinstance(getattr(owner, k, None), int)}
        if found:
            out[name] = found
    return out


# --- what removed neurons give at rest ----------------------------------------------------------------------------


@torch.no_grad()
def at_rest(model: UserModel, keep: Keep) -> dict[Units, Tensor]:
    """For neurons whose activation is not 0 at 0: what each gives to the next layer then, ``[count]``."""
    wanted = [u for u, k in keep.items() if u.kind == "neuron" and not bool(k.all())]
    found: dict[Units, Tensor] = {}
    hooks = []
    for units in wanted:
        hide = _Output(torch.zeros(1))
        hooks += [model.module.get_submodule(s).register_forward_hook(hide) for s in units.sources]

        def hook(_m: nn.Module, inputs: tuple[Tensor, ...], units: Units = units) -> None:
            found[units] = inputs[0].detach().reshape(-1, inputs[0].shape[-1])[0]

        hooks.append(model.module.get_submodule(units.sinks[0][0]).register_forward_pre_hook(hook))
    if wanted:
        model.scores(**model.inputs(model.example(1, 8)))
    for h in hooks:
        h.remove()
    return {u: v for u, v in found.items() if bool(v.abs().max() > 0)}


def _fold(module: nn.Module, units: Units, kept: Tensor, rest: Tensor) -> None:
    for sink, _ in units.sinks:
        layer: Any = module.get_submodule(sink)
        transposed = hasattr(layer, "nf")
        weight = layer.weight if not transposed else layer.weight.T
        given = weight[:, ~kept] @ rest[~kept].to(weight)
        if layer.bias is None:
            layer.bias = nn.Parameter(torch.zeros_like(given))
        layer.bias.add_(given)


def check_cut(model: UserModel, smaller: UserModel, keep: Keep) -> None:
    """Raise ``UserError`` when the cut model does not answer as the masked one does, naming a layer."""
    example = model.inputs(model.example(2, 8))
    with torch.no_grad():
        ours = smaller.scores(**example)
        with masked(model.module, keep):
            theirs = model.scores(**example)
    size = max(float(theirs.abs().max()), 1e-6)
    if not float((ours - theirs).abs().max()) <= 2e-3 * size:
        layer = next(u.name for u, k in keep.items() if not bool(k.all()))
        raise UserError(
            f"{model.name} answers otherwise after its cut than with the same units hidden, from {layer} on"
        )
