"""The descent on permutations: hide letters of the left part, and let the masked language model say which order helps it most.

Runs are independent: several go through the network as one batch, each with its own draws, optimiser and schedule.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from unmask import config as configs
from unmask.config import Field
from unmask.draw import Draw, Scoped
from unmask.errors import UserError
from unmask.systems.proteins.alphabet import MASK, VOCABULARY
from unmask.systems.proteins.diffpalm.problem import Problem
from unmask.systems.proteins.diffpalm.sinkhorn import centred, matching, sinkhorn, straight_through, with_noise
from unmask.systems.proteins.msa_transformer.network import MSANetwork


class DescentSettings(configs.Config):
    """One run of the optimisation; the defaults are the published example's."""

    steps: int = Field(100, ge=1, description="optimiser steps")
    batch_size: int = Field(1, ge=1, description="forwards with other masks in a step")
    mask_probability: float = Field(0.7, gt=0, le=1, description="share of the left letters hidden")
    std_init: float = Field(0.0, ge=0, description="deviation of the first log_alpha")
    tau: float = Field(1.0, gt=0, description="temperature of the soft permutation")
    sinkhorn_iterations: int = Field(10, ge=1, description="normalisations of rows and columns")
    noise: bool = Field(True, description="Gumbel noise")
    noise_factor: float = Field(0.1, ge=0, description="of the noise")
    noise_std: bool = Field(True, description="noise in units of the deviation of log_alpha")
    noise_schedule: bool = Field(True, description="noise falls with the learning rate")
    relabel: bool = Field(True, description="random orders for the matching, which removes its bias to the diagonal")
    mean_centre: bool = Field(True, description="log_alpha has mean 0 in each species")
    optimizer: Literal["adadelta", "adam", "adamw", "adagrad", "rmsprop", "sgd"] = Field(
        "adadelta", description="the optimiser"
    )
    lr: float = Field(9.0, gt=0, description="first learning rate")
    weight_decay: float = Field(0.1, ge=0, description="decay of log_alpha")
    optimizer_options: dict[str, Any] = Field({}, description="further options of the optimiser, as torch names them")
    plateau: bool = Field(True, description="the rate falls where the loss stays")
    plateau_factor: float = Field(
        0.1, gt=0, lt=1, description="by which it falls; the authors' code has 0.1, whatever it is asked"
    )
    plateau_patience: int = Field(10, ge=0, description="steps it waits; the authors' code has 10")
    jump_from: bool = Field(False, description="positions jump between left and right, a chain break")
    jump_by: int = Field(200, ge=0, description="by how many positions")
    parallel: int = Field(4, ge=1, description="runs computed at once")
    checkpointing: bool = Field(False, description="compute activations again instead of keeping them")


@dataclass
class Record:
    """What one run did. E steps, F = (E + 1) batch_size forwards, S species."""

    losses: list[float] = field(default_factory=list)  # [F]
    lr: list[float] = field(default_factory=list)  # [E], after the schedule
    partner: list[Tensor] = field(default_factory=list)  # [F] of int64 [D]: the left row of each right row
    soft: list[Tensor] = field(default_factory=list)  # [E + 1] of [S, m, m]
    log_alpha: list[Tensor] = field(default_factory=list)  # [E + 1] of [S, m, m], before centring
    gradients: list[Tensor] = field(default_factory=list)  # [E] of [S, m, m]

    @property
    def lowest(self) -> int:
        """The forward with the lowest loss."""
        return min(range(len(self.losses)), key=self.losses.__getitem__)

    @property
    def best(self) -> Tensor:
        """The pairing of that forward."""
        return self.partner[self.lowest]


OPTIMISERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adadelta": torch.optim.Adadelta,
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "adagrad": torch.optim.Adagrad,
    "rmsprop": torch.optim.RMSprop,
    "sgd": torch.optim.SGD,
}


@dataclass
class _Run:
    """The state of one run, and the numbers drawn for it."""

    log_alpha: Tensor
    optimiser: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.ReduceLROnPlateau | None
    mask: Tensor  # [F, D, L1]
    noise: Tensor  # [E + 1, S, m, m]
    orders: list[list[tuple[Tensor, Tensor]]] | None  # [E + 1][S]
    record: Record

    @property
    def lr(self) -> float:
        return float(self.optimiser.param_groups[0]["lr"])


def optimise(
    network: MSANetwork,
    left: Tensor,
    right: Tensor,
    problem: Problem,
    settings: DescentSettings,
    draws: Sequence[Draw],
    *,
    positive: Tensor | None = None,
    tell: Callable[[str], None] | None = None,
) -> list[Record]:
    """One record for each of ``draws``. left ``[D, L1 + 1]``, right ``[D, L2 + 1]``: tokens with ``<cls>``, rows by species;
    positive ``[Dp, L1 + L2 + 1]``: known pairs, put on top and never hidden. The network is frozen meanwhile.

    Raises ``UserError`` where nothing is free, or rows or columns are more than there are positions for.
    """
    if not any(problem.free_sizes):
        raise UserError("every pair is fixed already: there is nothing to optimise")
    if max(problem.free_sizes) < 2:
        raise UserError("every species has one row: there is nothing to pair, each row has its partner")
    network.check(len(left) + (0 if positive is None else len(positive)), left.shape[1] + right.shape[1] - 1)
    held = [p.requires_grad for p in network.parameters()]
    was = network.training
    network.eval().requires_grad_(False)
    try:
        records: list[Record] = []
        with torch.inference_mode(False), torch.enable_grad():  # also where a caller only measures
            left, right = left.clone(), right.clone()
            positive = None if positive is None else positive.clone()
            for start in range(0, len(draws), settings.parallel):
                some = draws[start : start + settings.parallel]
                records += _Descent(network, left, right, problem, settings, positive).run(
                    some, start, len(draws), tell
                )
        return records
    finally:
        network.train(was)
        for parameter, flag in zip(network.parameters(), held, strict=True):
            parameter.requires_grad_(flag)


class _Descent:
    def __init__(
        self,
        network: MSANetwork,
        left: Tensor,
        right: Tensor,
        problem: Problem,
        settings: DescentSettings,
        positive: Tensor | None,
    ):
        self.network, self.problem, self.settings = network, problem, settings
        device = next(network.parameters()).device
        self.left, self.right = left.to(device), right.to(device)[:, 1:]
        self.positive = None if positive is None else positive.to(device)
        self.there = problem.there().to(device)
        self.fixed = problem.fixed_places().to(device)
        with torch.no_grad():
            table = network.embed_tokens.weight
            # one-hot rows times the table, with no special place for padding
            self.left_embedded, right_embedded = table[self.left], table[self.right]
            self.right_embedded = right_embedded
            self.positive_embedded = None if self.positive is None else table[self.positive]
            self.hidden_embedded = table[MASK]
            self.left_letters = F.one_hot(self.left[:, 1:], len(VOCABULARY)).to(table.dtype)

    def run(self, draws: Sequence[Draw], first: int, total: int, tell: Callable[[str], None] | None) -> list[Record]:
        settings = self.settings
        runs = [self.begin(draw) for draw in draws]
        for step in range(settings.steps + 1):
            last = step == settings.steps
            for run in runs:
                run.record.log_alpha.append(run.log_alpha.detach().clone())
                run.optimiser.zero_grad()
            sums = [0.0] * len(runs)
            for micro in range(settings.batch_size):
                losses = self.forward(runs, step, step * settings.batch_size + micro, micro == 0)
                if not last:
                    (losses.sum() / settings.batch_size).backward()
                values = losses.detach().cpu().tolist()
                for number, (run, value) in enumerate(zip(runs, values, strict=True)):
                    run.record.losses.append(value)
                    sums[number] += value
            if not last:
                for run, value in zip(runs, sums, strict=True):
                    assert run.log_alpha.grad is not None
                    run.record.gradients.append(run.log_alpha.grad.detach().clone())
                    run.optimiser.step()
                    if run.schedule is not None:
                        run.schedule.step(value)
                    run.record.lr.append(run.lr)
            if tell is not None:
                names = f"runs {first + 1}-{first + len(runs)} of {total}" if total > 1 else "run"
                tell(
                    f"{names}: step {step} of {settings.steps}, loss {sum(sums) / len(sums) / settings.batch_size:.3f}"
                )
        return [run.record for run in runs]

    def begin(self, draw: Draw) -> _Run:
        settings, problem = self.settings, self.problem
        species = [(s, m) for s, m in enumerate(problem.free_sizes) if m]
        size, steps = self.there.shape[-1], settings.steps + 1
        start = torch.zeros(self.there.shape)
        noise = torch.full((steps, *self.there.shape), 0.5)
        orders: list[list[tuple[Tensor, Tensor]]] = [[_empty()] * len(problem.sizes) for _ in range(steps)]
        for s, m in species:
            if settings.std_init:
                start[s, :m, :m] = settings.std_init * draw.normal(f"init_{s}", (m, m))
            if settings.noise:
                noise[:, s, :m, :m] = draw.uniform(f"noise_{s}", (steps, m, m))
            if settings.relabel:
                rows, columns = (
                    draw.uniform(f"perm_{kind}_{s}", (steps, m)).argsort(dim=1, stable=True) for kind in ("row", "col")
                )
                for step in range(steps):
                    orders[step][s] = (rows[step], columns[step])
        assert size == max([*problem.free_sizes, 1])
        mask = draw.uniform("mask", (steps * settings.batch_size, problem.rows, self.left.shape[1] - 1))
        device = self.there.device
        log_alpha = start.to(device).requires_grad_()
        options = {"lr": settings.lr, "weight_decay": settings.weight_decay, **settings.optimizer_options}
        optimiser = OPTIMISERS[settings.optimizer]([log_alpha], **options)
        schedule = (
            torch.optim.lr_scheduler.ReduceLROnPlateau(
                optimiser, factor=settings.plateau_factor, patience=settings.plateau_patience
            )
            if settings.plateau
            else None
        )
        return _Run(
            log_alpha,
            optimiser,
            schedule,
            mask.to(device),
            noise.to(device),
            orders if settings.relabel else None,
            Record(),
        )

    def forward(self, runs: list[_Run], step: int, number: int, keep: bool) -> Tensor:
        """The masked loss of each run, ``[runs]``."""
        settings = self.settings
        softs, hards = [], []
        for run in runs:
            if settings.mean_centre:
                with torch.no_grad():
                    run.log_alpha.copy_(centred(run.log_alpha, self.there))
            factor = settings.noise_factor * (run.lr / settings.lr if settings.noise_schedule else 1.0)
            noise = run.noise[step] if settings.noise else None
            noisy = with_noise(run.log_alpha, self.there, noise, factor, by_spread=settings.noise_std)
            softs.append(sinkhorn(noisy, self.there, tau=settings.tau, iterations=settings.sinkhorn_iterations))
            hards.append(matching(noisy, self.problem.free_sizes, run.orders[step] if run.orders else None))
            if keep:
                run.record.soft.append(softs[-1].detach().clone())
        soft, hard = (self.problem.assemble(torch.stack(t)) for t in (softs, hards))
        partner = hard.argmax(dim=1)  # [runs, D]
        for run, row in zip(runs, partner.cpu(), strict=True):
            run.record.partner.append(row)
        uniform = torch.stack([run.mask[number] for run in runs])
        hidden = (uniform < settings.mask_probability) & ~self.fixed[None, :, None]
        return self.masked_loss(straight_through(hard, soft), partner, hidden)

    def masked_loss(self, permutation: Tensor, partner: Tensor, hidden: Tensor) -> Tensor:
        """permutation ``[runs, D, D]`` left against right, with gradient; partner ``[runs, D]``; hidden ``[runs, D, L1]``."""
        count = len(partner)
        turned = permutation.transpose(1, 2)
        # permute what was embedded: D x D x L x width, instead of embedding soft letters
        moved = (turned @ self.left_embedded.flatten(1)).unflatten(2, self.left_embedded.shape[1:])
        target = (turned @ self.left_letters.flatten(1)).unflatten(2, self.left_letters.shape[1:])
        ids = self.left[partner]
        front = torch.zeros_like(ids[:, :, :1], dtype=torch.bool)
        covered = torch.cat((front, hidden), dim=2)
        ids = ids.masked_fill(covered, MASK)
        moved = torch.where(covered[..., None], self.hidden_embedded, moved)
        tokens = torch.cat((ids, self.right.expand(count, -1, -1)), dim=2)
        embedded = torch.cat((moved, self.right_embedded.expand(count, -1, -1, -1)), dim=2)
        above = 0
        if self.positive is not None and self.positive_embedded is not None:
            above = len(self.positive)
            tokens = torch.cat((self.positive.expand(count, -1, -1), tokens), dim=1)
            embedded = torch.cat((self.positive_embedded.expand(count, -1, -1, -1), embedded), dim=1)
        width = hidden.shape[2]
        seen = self.network(
            tokens,
            embedded,
            jump_from=width + 1 if self.settings.jump_from else None,
            jump_by=self.settings.jump_by,
            checkpointing=self.settings.checkpointing,
        )
        logs = self.network.letters(seen.last[:, above:, 1 : width + 1][hidden]).log_softmax(dim=-1)
        each = -(target[hidden] * logs).sum(dim=-1)
        which = hidden.nonzero()[:, 0]
        return torch.zeros(count, device=each.device, dtype=each.dtype).index_add(0, which, each) / hidden.sum(
            dim=(1, 2)
        ).clamp_min(1)


def _empty() -> tuple[Tensor, Tensor]:
    return torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.int64)


@torch.no_grad()
def order_losses(
    network: MSANetwork,
    left: Tensor,
    right: Tensor,
    orders: Tensor,
    draw: Draw,
    *,
    masks: int = 200,
    probability: float = 0.7,
    positive: Tensor | None = None,
) -> Tensor:
    """``[n]``: the masked loss of given orders ``[n, D]`` (the left row of each right row), a mean over the same ``masks`` masks.
    Of the true order it is the target loss: how low a run could go."""
    problem = Problem([len(left)])
    descent = _Descent(network.eval(), left, right, problem, DescentSettings(), positive)
    uniform = draw.uniform("target.mask", (masks, len(left), left.shape[1] - 1)).to(descent.left.device)
    sums = torch.zeros(len(orders))
    for order_number, order in enumerate(orders.to(descent.left.device)):
        whole = F.one_hot(order, len(left)).T.to(descent.left_embedded.dtype)
        for one in uniform:
            sums[order_number] += descent.masked_loss(whole[None], order[None], (one < probability)[None])[0].cpu()
    return sums / masks


def run_draws(draw: Draw, runs: int, name: str = "run") -> list[Draw]:
    """A source for each run."""
    return [Scoped(draw, f"{name}{number}") for number in range(runs)]
