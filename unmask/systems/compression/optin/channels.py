"""The trajectory of convolution channels: each is zero where later layers consume it; a layer's feature is what its consumers see.

The parts of a network that lie before the hidden channels are not run again where the network is a chain of modules.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from unmask.models import UserModel
from unmask.systems.compression.optin.importance import Setting, Tell
from unmask.systems.compression.optin.terms import Manifold, divergence, rows_of
from unmask.systems.compression.structure import Units

RowsOf = Callable[[int], "Tensor | None"]  # number of rows -> which of them are compared


class ChannelTrajectories:
    """All channels of a network, scored on one batch ``inputs``."""

    def __init__(
        self, model: UserModel, units: list[Units], inputs: Mapping[str, Tensor], setting: Setting, rows: RowsOf
    ):
        self.model, self.units, self.inputs, self.setting, self.rows = model, units, dict(inputs), setting, rows
        self.module = model.module
        self.size = len(next(iter(self.inputs.values())))

    @contextmanager
    def watching(self, layers: list[int]) -> Iterator[dict[int, Tensor]]:
        found: dict[int, Tensor] = {}
        hooks = []
        for layer in layers:
            path, axis = self.units[layer].sinks[0]

            def hook(_m: nn.Module, i: tuple[Tensor, ...], layer: int = layer, axis: int = axis) -> None:
                found[layer] = as_tokens(i[0], axis)

            hooks.append(self.module.get_submodule(path).register_forward_pre_hook(hook))
        try:
            yield found
        finally:
            for one in hooks:
                one.remove()

    @torch.no_grad()
    def run(self, how: str = "fast", tell: Tell | None = None) -> list[tuple[Tensor, Tensor]]:
        """``(md, kl)`` of each layer's channels, float64."""
        every = list(range(len(self.units)))
        with self.watching(every) as features:
            logits = self.model.scores(**self.inputs)
        rows = {i: self.rows(features[i].shape[0] * features[i].shape[1]) for i in every}
        grams = {i: Manifold(rows_of(features[i], rows[i]), self.setting.aggregate) for i in every}
        chain = _Chain(self.model, self.inputs) if how == "fast" else None
        out, done, total = [], 0, sum(u.count for u in self.units)
        for layer, units in enumerate(self.units):
            last = layer == len(self.units) - 1
            compared = ([layer] if self.setting.neuron_last else []) if last else every[layer + 1 :]
            compared = compared if self.setting.need_md else []
            md = torch.zeros(units.count, dtype=torch.float64)
            kl = torch.zeros(units.count, dtype=torch.float64)
            group = 1 if how == "plain" else self.setting.group or _fitting(self.inputs, units.count)
            for first in range(0, units.count, group):
                some = torch.arange(first, min(first + group, units.count))
                with ExitStack() as stack:
                    stack.enter_context(self._hidden(units, some))
                    found = stack.enter_context(self.watching(compared))
                    answers = (
                        chain.run(units, len(some))
                        if chain is not None
                        else self.model.scores(**_repeated(self.inputs, len(some)))
                    )
                for i in compared:
                    students = found[i].unflatten(0, (len(some), self.size))
                    md[some] += grams[i](rows_of(students, rows[i])).double().cpu()
                if self.setting.need_kl:
                    students = answers.unflatten(0, (len(some), self.size))
                    kl[some] = divergence(logits, students, self.setting.temperature, self.setting.divide).cpu()
                done += len(some)
                if tell is not None:
                    tell(done, total)
            out.append((md, kl))
        return out

    @contextmanager
    def _hidden(self, units: Units, some: Tensor) -> Iterator[None]:
        hooks = []
        for path, axis in units.sinks:

            def hook(_m: nn.Module, inputs: tuple[Tensor, ...], axis: int = axis) -> tuple[Tensor, ...]:
                x = inputs[0]
                wide = torch.ones(len(some), x.shape[axis], device=x.device)
                wide.scatter_(1, units_columns(units, some, x.shape[axis]).to(x.device), 0)
                shape = [len(x)] + [1] * (x.ndim - 1)
                shape[axis] = -1
                return (x * wide.repeat_interleave(self.size, 0).reshape(shape), *inputs[1:])

            hooks.append(self.module.get_submodule(path).register_forward_pre_hook(hook))
        try:
            yield
        finally:
            for one in hooks:
                one.remove()


def units_columns(units: Units, some: Tensor, width: int) -> Tensor:
    """Places of channels in a consumer's input of this width (flattened maps have several a channel)."""
    copies = width // units.count
    return (some[:, None] * copies + torch.arange(copies)).reshape(len(some), -1)


def as_tokens(x: Tensor, axis: int) -> Tensor:
    """``[B, T, C]`` from maps ``[B, C, H, W]`` (axis 1), tokens or vectors."""
    if axis == 1:
        return x.flatten(2).transpose(1, 2)
    return x.flatten(1, -2) if x.ndim > 2 else x[:, None]


class _Chain:
    """The modules that run one after another (members of lists), each from one tensor to one: those before a change hand on
    what they gave. Used only where skipping them all gives the same answers."""

    def __init__(self, model: UserModel, inputs: Mapping[str, Tensor]):
        self.model, self.inputs = model, inputs
        self.order: list[str] = []
        self.gave: dict[str, Tensor] = {}
        listed = [
            f"{name}.{child}".removeprefix(".")
            for name, m in model.module.named_modules()
            if isinstance(m, (nn.Sequential, nn.ModuleList))
            for child, _ in m.named_children()
        ]
        outer = [p for p in listed if not any(p.startswith(q + ".") for q in listed)]
        hooks = []
        for path in outer:

            def hook(_m: nn.Module, i: tuple[Any, ...], o: Any, path: str = path) -> None:
                if isinstance(o, Tensor) and len(i) == 1 and isinstance(i[0], Tensor):
                    self.order.append(path)
                    self.gave[path] = o

            hooks.append(model.module.get_submodule(path).register_forward_hook(hook))
        expected = model.scores(**inputs)
        for one in hooks:
            one.remove()
        if len(set(self.order)) != len(self.order) or not self._same(expected):
            self.order = []

    def _same(self, expected: Tensor) -> bool:
        with self._skipping(self.order[:-1], 2):
            try:
                found = self.model.scores(**self.inputs)
            except RuntimeError:
                return False
        return found.shape[0] == 2 * len(expected) and torch.allclose(found[: len(expected)], expected, atol=1e-5)

    def run(self, units: Units, copies: int) -> Tensor:
        places = [self._place(path) for path, _ in units.sinks]
        skipped = self.order[: min(places)]
        if not skipped:
            return self.model.scores(**_repeated(self.inputs, copies))
        with self._skipping(skipped, copies):
            return self.model.scores(**self.inputs)

    def _place(self, path: str) -> int:
        """How many members of the chain may be skipped for a change at ``path``: of what stands behind them all (a head),
        all; of what stands elsewhere, none."""
        place = next((i for i, p in enumerate(self.order) if path == p or path.startswith(p + ".")), None)
        if place is not None:
            return place
        return len(self.order) - 1 if self.order and path in ("fc", "head", "classifier") else 0

    @contextmanager
    def _skipping(self, paths: list[str], copies: int) -> Iterator[None]:
        modules = [self.model.module.get_submodule(p) for p in paths]
        for number, (path, module) in enumerate(zip(paths, modules, strict=True)):
            gave = self.gave[path]
            value = gave.repeat(copies, *[1] * (gave.ndim - 1)) if number == len(paths) - 1 else gave
            module.forward = lambda *_, value=value: value  # type: ignore[method-assign]
        try:
            yield
        finally:
            for module in modules:
                del module.__dict__["forward"]


def _repeated(inputs: Mapping[str, Tensor], copies: int) -> dict[str, Tensor]:
    return {k: v.repeat(copies, *[1] * (v.ndim - 1)) for k, v in inputs.items()}


def _fitting(inputs: Mapping[str, Tensor], most: int) -> int:
    one = max(next(iter(inputs.values())).numel() * 16, 1)
    budget = 2**22 if next(iter(inputs.values())).device.type == "cpu" else 2**27
    return max(min(budget // one, most, 32), 1)
