"""What every compressor is compared with: random units and small weights under the same search, torch's own pruning, and
8-bit weights where torch offers them."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from unmask.draw import Draw
from unmask.models import UserModel
from unmask.systems.compression.structure import Structure, Units

NAMES = ("magnitude", "random", "torch prune", "int8")


def random_scores(draw: Draw, structure: Structure) -> dict[Units, Tensor]:
    """-U(0, 1) for every unit."""
    return {
        u: -draw.uniform(f"random_{u.kind}_{i}", (u.count,), shared=True).double()
        for i, u in enumerate(structure.all())
    }


def magnitude_scores(model: UserModel, structure: Structure) -> dict[Units, Tensor]:
    """Minus the L2 norm of the weights that go with each unit (biases left out), divided by the mean of its kind."""
    state = model.module.state_dict()
    norms = {u: norms_of(u, state) for u in structure.all()}
    out: dict[Units, Tensor] = {}
    for kind in ("head", "neuron", "channel"):
        own = {u: n for u, n in norms.items() if u.kind == kind}
        if own:
            mean = torch.cat(list(own.values())).mean().clamp_min(1e-30)
            out |= {u: -n / mean for u, n in own.items()}
    return out


def norms_of(units: Units, state: Mapping[str, Tensor]) -> Tensor:
    """L2 norm of the weights of each unit, float64 ``[count]``."""
    total = torch.zeros(units.count, dtype=torch.float64)
    for one in units.slices:
        weight = state[one.parameter]
        if weight.ndim >= 2:
            squares = weight.double().square().movedim(one.axis, 0).flatten(1).sum(1).cpu()
            total += squares[one.index].sum(1)
    return total.sqrt()


def torch_pruned(model: UserModel, share: float) -> UserModel:
    """A copy with all but ``share`` of its linear and convolution weights set to zero, the smallest first over the whole
    network (``torch.nn.utils.prune``). Nothing gets faster: the zeros are still multiplied."""
    smaller = UserModel(**{**vars(model), "module": copy.deepcopy(model.module)})
    layers = [
        (m, "weight") for m in smaller.module.modules() if isinstance(m, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d))
    ]
    if layers:
        prune.global_unstructured(layers, pruning_method=prune.L1Unstructured, amount=1 - share)
        for layer, name in layers:
            prune.remove(layer, name)
    return smaller.eval()


def int8(model: UserModel) -> UserModel | None:
    """A copy whose linear layers keep 8-bit weights (``torch.ao.quantization``, on the CPU), or None where torch has none."""
    try:
        from torch.ao.quantization import quantize_dynamic
    except ImportError:
        return None
    if model.device.type != "cpu" or not any(isinstance(m, nn.Linear) for m in model.module.modules()):
        return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            module = quantize_dynamic(copy.deepcopy(model.module), {nn.Linear}, dtype=torch.qint8)
            smaller = UserModel(**{**vars(model), "module": module})
            with torch.no_grad():
                smaller.scores(**smaller.inputs(smaller.example(1)))
    except Exception:  # a module that reads its linear layers' weights itself, or an engine that this machine lacks
        return None
    return smaller
