"""Optimisers, their parameter groups, and clipping.

AdamW and SGD are torch's, fused where the device has it. LAMB is timm's: without its gradient clipping it takes the step of
You et al. (2020), algorithm 2 with bias correction. LARS is written here, because timm's differs from the LARS of MoCo v3 and
MAE: it divides by ``|g| + wd |w|`` where they divide by ``|g + wd w|``, and without weight decay it does not adapt at all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from unmask.contracts import Trainable
from unmask.engine.distributed import local_part
from unmask.engine.settings import TrainSettings
from unmask.errors import UserError


class Lars(torch.optim.Optimizer):
    """Layer-wise adaptive rate scaling (You et al. 2017), as in MoCo v3 and MAE's linear probe.

    ``u = g + wd w``; for parameters of two axes or more ``u *= trust |w| / |u|`` where both norms are positive;
    ``m = momentum m + u``; ``w -= lr m``. Parameters with fewer axes take plain momentum steps without decay.
    """

    def __init__(
        self, params: Any, lr: float = 0.0, momentum: float = 0.9, weight_decay: float = 0.0, trust: float = 0.001
    ):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "trust": trust})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                update = parameter.grad
                if parameter.ndim > 1:
                    update = update.add(parameter, alpha=group["weight_decay"])
                    size, length = torch.linalg.vector_norm(parameter), torch.linalg.vector_norm(update)
                    adapted = group["trust"] * size / length
                    update = update * torch.where((size > 0) & (length > 0), adapted, torch.ones_like(adapted))
                state = self.state[parameter]
                if "momentum_buffer" not in state:
                    state["momentum_buffer"] = torch.zeros_like(parameter)
                momentum = state["momentum_buffer"].mul_(group["momentum"]).add_(update)
                parameter.add_(momentum, alpha=-group["lr"])


def build_optimizer(
    model: Trainable, settings: TrainSettings, phase: str, *, sharded: bool = False
) -> torch.optim.Optimizer:
    """The optimiser of one phase over ``model.parameter_groups``; each group keeps its ``lr_scale`` and ``decay_scale``."""
    groups = [
        {"params": g.parameters, "lr_scale": g.lr_scale, "decay_scale": g.decay_scale, "weight_decay": 0.0}
        for g in model.parameter_groups(phase, settings.layer_decay)
        if g.parameters
    ]
    if not groups:
        raise UserError(
            f"{model.slug or type(model).__name__} has nothing to train in phase {phase}: every parameter is frozen"
        )
    if sharded and settings.optimizer in ("lamb", "lars"):
        raise UserError(
            f"optimizer={settings.optimizer} cannot train a sharded model: use adamw or sgd, or launch without FSDP"
        )
    parameters = [p for g in groups for p in g["params"]]
    kind = settings.optimizer
    if kind == "adamw":
        return torch.optim.AdamW(groups, lr=0.0, betas=settings.betas, eps=settings.eps, fused=can_fuse(parameters))
    if kind == "sgd":
        return torch.optim.SGD(groups, lr=0.0, momentum=settings.momentum, fused=can_fuse(parameters))
    if kind == "lars":
        return Lars(groups, lr=0.0, momentum=settings.momentum)
    from timm.optim.lamb import Lamb

    return Lamb(groups, lr=0.0, betas=settings.betas, eps=settings.eps, max_grad_norm=None)  # type: ignore[arg-type]


def can_fuse(parameters: Iterable[Tensor]) -> bool:
    """Whether torch has a fused step for all of them."""
    return all(p.device.type in ("cpu", "cuda", "mps", "xpu") and p.is_floating_point() for p in parameters)


def set_rates(optimizer: torch.optim.Optimizer, lr: float, weight_decay: float) -> None:
    """Give every group its learning rate and decay of this step."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]
        group["weight_decay"] = weight_decay * group["decay_scale"]


def skip_where(optimizer: torch.optim.Optimizer, bad: Tensor) -> bool:
    """Make the next steps do nothing where ``bad`` (bool scalar on the device) holds, without asking the device.

    Only fused steps can; returns whether this one does.
    """
    if not optimizer.defaults.get("fused"):
        return False
    optimizer.grad_scale = None  # type: ignore[attr-defined]
    optimizer.found_inf = bad.to(torch.float32)  # type: ignore[attr-defined]
    return True


@torch.no_grad()
def clip(parameters: Sequence[nn.Parameter], settings: TrainSettings, *, sharded: bool = False) -> Tensor:
    """Clip the gradients in place (``clip_each`` per tensor, then ``clip_norm`` over all); the norm of all before it.

    float32 scalar on the device; 0 without gradients. Sharded gradients count as the whole tensors they are parts of.
    """
    held = [p.grad for p in parameters if p.grad is not None]
    if not held:
        return torch.zeros((), device=parameters[0].device if parameters else "cpu")
    gradients = [local_part(g) for g in held]
    norms = torch.stack(torch._foreach_norm(gradients)).float()
    if sharded:
        norms = norms.square()
        dist.all_reduce(norms)
        norms = norms.sqrt()
    total = torch.linalg.vector_norm(norms)
    if settings.clip_each is not None:
        shrink = (settings.clip_each / (norms + 1e-6)).clamp(max=1.0)
        torch._foreach_mul_(gradients, list(shrink.to(gradients[0].dtype).unbind()))
        norms = norms * shrink
    if settings.clip_norm is not None:
        after = torch.linalg.vector_norm(norms) if settings.clip_each is not None else total
        torch._foreach_mul_(gradients, (settings.clip_norm / (after + 1e-6)).clamp(max=1.0).to(gradients[0].dtype))
    return total


def learning_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that take gradients."""
    return [p for p in model.parameters() if p.requires_grad]
