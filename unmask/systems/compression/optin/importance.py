"""The trajectory of every unit: how far the later layers' features and the logits move when it is hidden.

``fast`` reuses what a candidate does not change: the model's own forward runs, but blocks before the candidate's hand on what
they gave before, a neuron is a rank-one change behind its MLP and a head one behind its attention, many candidates share a
batch, and the teacher's Gram matrices are built once. ``plain`` hides one unit, runs everything and compares, as the released
code does. Both give the same numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from unmask.models import UserModel
from unmask.systems.compression.optin.terms import Manifold, divergence, manifold, rows_of
from unmask.systems.compression.structure import Structure, Units
from unmask.systems.compression.surgery import masked

Position = Literal["mlp", "input", "attention", "hidden"]
Tell = Callable[[int, int], None]


@dataclass
class Setting:
    """What the terms need to know. rows: which rows of the flattened features are compared, None for all."""

    position: Position = "mlp"
    aggregate: Literal["sum", "mean"] = "sum"
    temperature: float = 4.0
    divide: bool = False
    head_last: bool = True
    neuron_last: bool = True
    need_md: bool = True
    need_kl: bool = True
    once_more: bool = False  # without KL the last layer's term counts once more for its own candidates
    carry: bool = False
    resample: Callable[[], Tensor | None] | None = None
    rows: Tensor | None = None
    group: int = 0  # candidates in a batch; 0: as many as suit


@dataclass
class Base:
    """The untouched model on the calibration batch."""

    logits: Tensor
    features: list[Tensor]
    caches: dict[str, Any] = field(default_factory=dict)


class Trajectories:
    """All candidates of a transformer, scored on one batch ``inputs`` (of ``model.inputs``)."""

    def __init__(self, model: UserModel, structure: Structure, inputs: Mapping[str, Tensor], setting: Setting):
        self.model, self.inputs, self.setting = model, dict(inputs), setting
        self.blocks = structure.blocks
        by_block = {u.block: u for u in structure.heads}
        self.heads: list[Units | None] = [by_block.get(b) for b in self.blocks]
        self.neurons = [next(u for u in structure.neurons if u.block == b) for b in self.blocks]
        self.size = len(next(iter(self.inputs.values())))
        self.module = model.module

    # --- where features are read ---
    def place(self, layer: int) -> tuple[str, bool]:
        """The module whose output (or input: True) is layer's feature."""
        position, neurons, heads = self.setting.position, self.neurons[layer], self.heads[layer]
        if position == "input" and heads is not None:
            return heads.sources[0], True
        if position == "attention" and heads is not None:
            return heads.sinks[0][0], False
        if position == "hidden":
            return neurons.sources[0], False
        return neurons.sinks[0][0], False

    @contextmanager
    def watching(self, layers: range | list[int]) -> Iterator[dict[int, Tensor]]:
        found: dict[int, Tensor] = {}
        hooks = []
        for layer in layers:
            path, of_input = self.place(layer)
            module = self.module.get_submodule(path)
            if of_input:
                hooks.append(
                    module.register_forward_pre_hook(lambda _m, i, layer=layer: found.__setitem__(layer, i[0]))
                )
            else:
                hooks.append(module.register_forward_hook(lambda _m, _i, o, layer=layer: found.__setitem__(layer, o)))
        try:
            yield found
        finally:
            for hook in hooks:
                hook.remove()

    @torch.no_grad()
    def base(self) -> Base:
        with self.watching(range(len(self.blocks))) as found:
            logits = self.model.scores(**self.inputs)
        return Base(logits, [found[i] for i in range(len(self.blocks))])

    def compared(self, layer: int, last: bool) -> list[int]:
        """The layers whose features count for a candidate of this one."""
        end = len(self.blocks) - 1
        if layer < end:
            return list(range(layer + 1, end + 1))
        if self.setting.position == "input" and self.heads[end] is not None:
            return []  # a block's input does not change with what is hidden in it: the term is 0
        out = [end] if last else []
        return out + ([end] if self.setting.once_more else [])

    # --- both kinds, by layer ---
    def run(self, kind: str, how: str = "fast", tell: Tell | None = None) -> tuple[Tensor, Tensor]:
        """``md`` and ``kl``, float64 ``[L, units]``, of "head" or "neuron" candidates."""
        base = self.base()
        layers = self.heads if kind == "head" else self.neurons
        count = max((u.count for u in layers if u is not None), default=0)
        md = torch.zeros(len(layers), count, dtype=torch.float64)
        kl = torch.zeros(len(layers), count, dtype=torch.float64)
        total, done = sum(u.count for u in layers if u is not None), 0
        step = self._fast if how == "fast" else self._plain
        for layer, units in enumerate(layers):
            if units is None:
                continue
            for first, m, k in step(kind, layer, units, base):
                md[layer, first : first + len(m)] = m.double().cpu()
                kl[layer, first : first + len(k)] = k.double().cpu()
                done += len(m)
                if tell is not None:
                    tell(done, total)
        return md, kl

    def carried(self, kind: str, layer: int) -> dict[Units, Tensor]:
        """The released code's leftover: earlier layers run without their last head while later heads are scored."""
        if not self.setting.carry or kind != "head":
            return {}
        return {u: ~_only(u.count, u.count - 1) for u in self.heads[:layer] if u is not None}

    # --- the plain loop ---
    @torch.no_grad()
    def _plain(self, kind: str, layer: int, units: Units, base: Base) -> Iterator[tuple[int, Tensor, Tensor]]:
        s = self.setting
        last = s.head_last if kind == "head" else s.neuron_last
        compared = self.compared(layer, last) if s.need_md else []
        for unit in range(units.count):
            keep = {**self.carried(kind, layer), units: ~_only(units.count, unit)}
            with masked(self.module, keep), self.watching(sorted(set(compared))) as found:
                logits = self.model.scores(**self.inputs)
            rows = s.resample() if s.resample is not None else s.rows
            md = sum(
                (manifold(base.features[i], found[i], rows, s.aggregate).double() for i in compared),
                start=torch.zeros((), dtype=torch.float64),
            )
            kl = divergence(base.logits, logits, s.temperature, s.divide) if s.need_kl else torch.zeros(())
            yield unit, md[None], kl[None]

    # --- with everything reused ---
    @torch.no_grad()
    def _fast(self, kind: str, layer: int, units: Units, base: Base) -> Iterator[tuple[int, Tensor, Tensor]]:
        s = self.setting
        last = s.head_last if kind == "head" else s.neuron_last
        compared = self.compared(layer, last) if s.need_md else []
        wanted = sorted(set(compared))
        carried = self.carried(kind, layer)
        kept = self._kept(kind, layer, units, carried)
        if s.resample is None:
            grams = {i: Manifold(rows_of(base.features[i], s.rows), s.aggregate) for i in wanted}
        group = s.group or _fitting(self.inputs, base, units.count)
        for first in range(0, units.count, group):
            some = torch.arange(first, min(first + group, units.count))
            with ExitStack() as stack:
                stack.enter_context(masked(self.module, carried))
                stack.enter_context(self._replaced(kind, layer, units, some, kept))
                found = stack.enter_context(self.watching(wanted))
                logits = self.model.scores(**self._inputs(layer, len(some)))
            md = torch.zeros(len(some), dtype=torch.float64)
            if s.resample is not None:
                for c in range(len(some)):
                    rows = s.resample()
                    for i in compared:
                        student = found[i].unflatten(0, (len(some), self.size))[c]
                        md[c] += manifold(base.features[i], student, rows, s.aggregate).double().cpu()
            else:
                for i in wanted:
                    student = rows_of(found[i].unflatten(0, (len(some), self.size)), s.rows)
                    md += compared.count(i) * grams[i](student).double().cpu()
            answers = logits.unflatten(0, (len(some), self.size))
            kl = divergence(base.logits, answers, s.temperature, s.divide) if s.need_kl else torch.zeros(len(some))
            yield first, md, kl

    def _inputs(self, layer: int, copies: int) -> dict[str, Tensor]:
        """The batch, once for each candidate; of images only once where the blocks before hand on their copies."""
        if layer > 0 and not self.model.text:
            return self.inputs
        return {k: v.repeat(copies, *[1] * (v.ndim - 1)) for k, v in self.inputs.items()}

    def _kept(self, kind: str, layer: int, units: Units, carried: dict[Units, Tensor]) -> dict[str, Any]:
        """What one pass leaves behind for all candidates of a layer: what earlier blocks gave, and what stands at its change."""
        sink = self.module.get_submodule(units.sinks[0][0])
        kept: dict[str, Any] = {}
        hooks = [sink.register_forward_hook(lambda _m, i, o: kept.update(into=i[0], out=o))]
        heads = self.heads[layer]
        if heads is not None:
            core = self.module.get_submodule(heads.core)
            hooks.append(core.register_forward_hook(lambda _m, _i, o: kept.update(core=o)))
            proj = self.module.get_submodule(heads.sinks[0][0])
            hooks.append(proj.register_forward_hook(lambda _m, _i, o: kept.update(proj=o)))
        for earlier in range(layer):
            path = self.blocks[earlier]
            one = self.module.get_submodule(path)
            hooks.append(one.register_forward_hook(lambda _m, _i, o, path=path: kept.update({path: o})))
        with masked(self.module, carried):
            self.model.scores(**self.inputs)
        for hook in hooks:
            hook.remove()
        return kept

    @contextmanager
    def _replaced(self, kind: str, layer: int, units: Units, some: Tensor, kept: dict[str, Any]) -> Iterator[None]:
        """While open, blocks before ``layer`` do nothing, the candidates' block starts from its kept input, and its layer behind
        the units gives what it gave, less each candidate's own part."""
        copies = len(some)
        swaps: list[tuple[nn.Module, Callable[..., Any]]] = []
        for earlier in range(layer):
            path = self.blocks[earlier]
            swaps.append((self.module.get_submodule(path), _given(kept[path], copies if earlier == layer - 1 else 0)))
        sink = self.module.get_submodule(units.sinks[0][0])
        # features read inside the block need its own intermediate values; else nothing before the change is computed again
        inside = self.setting.position in ("hidden", "attention") and layer == len(self.blocks) - 1
        if not inside:
            swaps.append(
                (sink, _changed(kept["into"], kept["out"], self._weights(units, some), self._columns(units, some)))
            )
            heads = self.heads[layer]
            if kind == "neuron":
                swaps += [(self.module.get_submodule(source), _nothing) for source in units.sources]
            if heads is not None:
                swaps += self._still(kind, heads, units, some, kept)
        hooks = self._hidden(units, some) if inside else []
        old = [(m, m.__dict__.get("forward")) for m, _ in swaps]
        for module, forward in swaps:
            module.forward = forward  # type: ignore[method-assign]
        try:
            yield
        finally:
            for module, before in old:
                if before is None:
                    del module.__dict__["forward"]
                else:
                    module.forward = before  # type: ignore[method-assign]
            for hook in hooks:
                hook.remove()

    def _still(self, kind: str, heads: Units, units: Units, some: Tensor, kept: dict[str, Any]) -> list[Any]:
        """The attention module is not run again where what it gives is known: for neurons as it was, for heads where
        nothing follows the projection inside it."""
        core = self.module.get_submodule(heads.core)
        out = kept["core"]
        value = out[0] if isinstance(out, tuple) else out
        ends = isinstance(value, Tensor) and value.shape == kept["proj"].shape and torch.equal(value, kept["proj"])
        if kind == "neuron":
            swaps: list[Any] = [(core, _given(out, len(some)))]
            if not ends:  # a projection outside the core: its input is as it was
                swaps.append((self.module.get_submodule(heads.sinks[0][0]), _given(kept["proj"], len(some))))
            return swaps
        if ends:
            changed = _changed(kept["into"], kept["out"], self._weights(units, some), self._columns(units, some))
            return [(core, _as(out, changed))]
        if heads.sinks[0][0].startswith(heads.core + "."):
            return []  # something follows: the attention runs, only its projection is replaced
        return [(core, _given(out, len(some)))]

    def _weights(self, units: Units, some: Tensor) -> Tensor:
        """``[c, e, D]``: what the sink makes of each candidate's places."""
        sink: Any = self.module.get_submodule(units.sinks[0][0])
        weight = sink.weight if hasattr(sink, "nf") else sink.weight.T
        return weight[self._columns(units, some)]

    def _columns(self, units: Units, some: Tensor) -> Tensor:
        return units.columns.to(self.model.device)[some.to(self.model.device)]

    def _hidden(self, units: Units, some: Tensor) -> list[Any]:
        """Candidates hidden one in each copy of the batch."""
        flags = torch.ones(len(some), units.count, device=self.model.device)
        flags[torch.arange(len(some)), some] = 0
        hooks = []
        if units.kind == "neuron":

            def after(_m: nn.Module, _i: Any, out: Tensor) -> Tensor:
                return out * flags.repeat_interleave(self.size, 0).reshape(len(out), *[1] * (out.ndim - 2), -1)

            hooks += [self.module.get_submodule(s).register_forward_hook(after) for s in units.sources]
        else:

            def before(_m: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
                x = inputs[0]
                wide = torch.ones(len(some), x.shape[-1], device=x.device)
                wide.scatter_(1, self._columns(units, some).reshape(len(some), -1), 0)
                return (x * wide.repeat_interleave(self.size, 0).reshape(len(x), *[1] * (x.ndim - 2), -1), *inputs[1:])

            hooks.append(self.module.get_submodule(units.sinks[0][0]).register_forward_pre_hook(before))
        return hooks


def _only(count: int, unit: int) -> Tensor:
    flags = torch.zeros(count, dtype=torch.bool)
    flags[unit] = True
    return flags


def _copied(out: Any, copies: int) -> Any:
    """What a module gave, for so many copies of the batch; further outputs of a tuple are dropped."""
    if isinstance(out, tuple):
        return (_copied(out[0], copies), *(None,) * (len(out) - 1))
    return out.repeat(copies, *[1] * (out.ndim - 1)) if copies > 1 else out


def _given(out: Any, copies: int) -> Callable[..., Any]:
    """A forward that gives what was kept (copies 0: nobody looks at it, so it is not even copied)."""
    value = _copied(out, copies) if copies else out
    return lambda *_a, **_k: value


def _nothing(x: Tensor, *_: Any) -> Tensor:
    """A forward whose output nobody needs: no channels at all."""
    return x.new_zeros(*x.shape[:-1], 0)


def _as(out: Any, changed: Callable[..., Tensor]) -> Callable[..., Any]:
    if isinstance(out, tuple):
        return lambda *a, **k: (changed(), *(None,) * (len(out) - 1))
    return lambda *a, **k: changed()


def _changed(into: Tensor, out: Tensor, weights: Tensor, columns: Tensor) -> Callable[..., Tensor]:
    """The layer's output less the part of each candidate: ``out - into[..., columns] @ weights``, candidates first."""

    def forward(*_: Any, **__: Any) -> Tensor:
        parts = into[..., columns].movedim(-2, 0)  # [c, B, T, e]
        if parts.shape[-1] == 1:
            own = weights[:, 0].reshape(len(weights), *[1] * (parts.ndim - 2), -1)
            return torch.addcmul(out[None], parts, own, value=-1).flatten(0, 1)
        return (out[None] - torch.einsum("c...e,ced->c...d", parts, weights)).flatten(0, 1)

    return forward


def _fitting(inputs: Mapping[str, Tensor], base: Base, most: int) -> int:
    """Candidates in a batch: about half a million numbers of a feature at once on a CPU, whose caches they should fit."""
    one = max(base.features[0].numel(), 1)
    budget = 2**19 if base.features[0].device.type == "cpu" else 2**26
    return max(min(budget // one, most), 1)
