"""Token reduction (OPTIN with tokens): which tokens matter where, and how many are left in front of each block."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from unmask.systems.compression.optin.importance import Tell, Trajectories, _given
from unmask.systems.compression.optin.terms import Manifold, divergence, rows_of


@torch.no_grad()
def token_terms(work: Trajectories, protected: int, tell: Tell | None = None) -> tuple[Tensor, Tensor]:
    """``md`` and ``kl`` float64 ``[L, N]``: token u of block l's input set to 0, l >= 1, the first ``protected`` left out
    (their terms are minus infinity: never reduced)."""
    s, base = work.setting, work.base()
    gave, inputs = _gave(work)
    count = inputs[1].shape[1] if len(inputs) > 1 else 0
    md = torch.full((len(work.blocks), count), -torch.inf, dtype=torch.float64)
    kl = torch.full((len(work.blocks), count), -torch.inf, dtype=torch.float64)
    done, total = 0, (len(work.blocks) - 1) * (count - protected)
    for layer in range(1, len(work.blocks)):
        compared = work.compared(layer, s.head_last) if s.need_md else []
        grams = {i: Manifold(rows_of(base.features[i], s.rows), s.aggregate) for i in set(compared)}
        group = s.group or max(min(2**21 // max(base.features[0].numel(), 1), count), 1)
        for first in range(protected, count, group):
            some = torch.arange(first, min(first + group, count))
            with ExitStack() as stack:
                block = work.module.get_submodule(work.blocks[layer])
                hook = block.register_forward_pre_hook(_zero(some, work.size))
                stack.callback(hook.remove)
                _skip(work, layer, gave, len(some), stack)
                found = stack.enter_context(work.watching(sorted(set(compared))))
                repeated = {k: v.repeat(len(some), *[1] * (v.ndim - 1)) for k, v in work.inputs.items()}
                answers = work.model.scores(**repeated).unflatten(0, (len(some), work.size))
            moved = torch.zeros(len(some), dtype=torch.float64)
            for i in set(compared):
                students = rows_of(found[i].unflatten(0, (len(some), work.size)), s.rows)
                moved += compared.count(i) * grams[i](students).double().cpu()
            md[layer, some] = moved
            kl[layer, some] = divergence(base.logits, answers, s.temperature, s.divide).cpu() if s.need_kl else 0.0
            done += len(some)
            if tell is not None:
                tell(done, total)
    return md, kl


def _gave(work: Trajectories) -> tuple[dict[str, Any], list[Tensor]]:
    gave: dict[str, Any] = {}
    inputs: list[Tensor] = []
    hooks = []
    for path in work.blocks:
        module = work.module.get_submodule(path)
        hooks.append(module.register_forward_pre_hook(lambda _m, a: inputs.append(a[0])))
        hooks.append(module.register_forward_hook(lambda _m, _i, o, path=path: gave.update({path: o})))
    work.model.scores(**work.inputs)
    for hook in hooks:
        hook.remove()
    return gave, inputs


def _zero(some: Tensor, size: int) -> Callable[..., Any]:
    def hook(_m: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        x = args[0].clone()
        for c, token in enumerate(some.tolist()):
            x[c * size : (c + 1) * size, token] = 0
        return (x, *args[1:])

    return hook


def _skip(work: Trajectories, layer: int, gave: dict[str, Any], copies: int, stack: ExitStack) -> None:
    for earlier in range(layer):
        module = work.module.get_submodule(work.blocks[earlier])
        module.forward = _given(gave[work.blocks[earlier]], copies if earlier == layer - 1 else 0)  # type: ignore[method-assign]
        stack.callback(lambda m=module: m.__dict__.pop("forward", None))


def schedule(scores: Tensor, saving: float, cost: Callable[[list[int]], float]) -> list[int]:
    """How many tokens enter each block. scores ``[L, N]``, at most 0, the highest the least important; -inf is never taken.

    Each candidate, from the least important upwards, lowers its block's count (and every later one that is larger) by one,
    until ``saving`` of ``cost([N] * L)`` is gone. No block keeps fewer than max(2, N / 4), none merges more than half.
    """
    layers, count = scores.shape
    kept, whole = [count] * layers, cost([count] * layers)
    least = max(2, -(-count // 4))
    order = scores.flatten().argsort(descending=True, stable=True).tolist()
    for place in order:
        layer = place // count
        if not bool(scores.flatten()[place] > -torch.inf):
            break
        if whole - cost(kept) >= saving:
            break
        new = list(kept)
        new[layer] -= 1
        for later in range(layer + 1, layers):
            if new[later] > new[layer]:
                new[later] -= 1
        fits = all(k >= least for k in new) and all(
            a - b <= (a - 1) // 2 for a, b in zip([count, *new[:-1]], new, strict=True)
        )
        if fits and all(a >= b for a, b in pairwise(new)):
            kept = new
    return kept
