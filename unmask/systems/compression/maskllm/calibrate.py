"""What the inputs of the masked layers are on a few samples, and one-shot masks made from it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from unmask.contracts import Batch
from unmask.systems.compression.maskllm import priors
from unmask.systems.compression.maskllm.gates import MaskedLinear
from unmask.systems.compression.maskllm.priors import Pruned, Statistics


@torch.no_grad()
def statistics(
    layers: Mapping[str, MaskedLinear], batches: Iterable[Batch], answer: Callable[[Batch], Any]
) -> dict[str, Statistics]:
    """Statistics of every layer's inputs, from one pass of the model as it is; padding does not count. Layers that are called with
    the same tensor (queries, keys and values) share one."""
    known: dict[str, Statistics] = {}
    shared: dict[str, str] = {}  # layer -> the layer whose input it has
    seen: dict[int, tuple[str, Tensor]] = {}
    mask: Tensor | None = None

    def watch(name: str) -> Callable[..., None]:
        def hook(module: Any, inputs: tuple[Tensor, ...]) -> None:
            x = inputs[0]
            first = seen.setdefault(id(x), (name, x))[0]  # x is kept, so that its id stays its own
            if shared.setdefault(name, first) != name:
                return
            if name not in known:
                known[name] = Statistics(x.shape[-1], device=x.device)
            tokens = mask if mask is not None and mask.shape == x.shape[:-1] else None
            known[name].add(x, tokens)

        return hook

    handles = [layer.register_forward_pre_hook(watch(name)) for name, layer in layers.items()]
    try:
        for batch in batches:
            seen.clear()
            mask = batch.get("attention_mask")
            answer(batch)
    finally:
        for handle in handles:
            handle.remove()
    return {name: known[shared[name]] for name in layers if name in shared}


def one_shot(
    method: str,
    weights: Mapping[str, Tensor],
    known: Mapping[str, Statistics] | None,
    pattern: tuple[int, int],
    damping: float,
) -> dict[str, Pruned]:
    """Masks of every layer by magnitude, wanda, sparsegpt (mask alone) or "sparsegpt with update". A layer that the samples never
    reached is pruned by magnitude. Raises ``UserError`` where a Hessian cannot be inverted."""
    out = {}
    for name, weight in weights.items():
        own = None if known is None else known.get(name)
        block = priors.BLOCK // pattern[1] * pattern[1] or pattern[1]
        if method == "magnitude" or own is None:
            mask = priors.magnitude(weight, *pattern)
        elif method == "wanda":
            mask = priors.wanda(weight, own.norms, *pattern)
        else:
            assert own.hessian is not None
            update = method.endswith("update")
            out[name] = priors.sparsegpt(
                weight, own.hessian, pattern=pattern, update=update, block=block, damping=damping, layer=name
            )
            continue
        out[name] = Pruned(mask, weight * mask)
    return out
