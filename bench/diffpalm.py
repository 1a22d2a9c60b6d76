"""One DiffPALM optimisation step on the CPU: ours against the formulation of the authors' loop around fair-esm's network.

    python bench/diffpalm.py [--dim 128] [--layers 4] [--rows 32] [--columns 60] [--steps 5] [--threads N] [--json FILE]

The loop of the other side: one-hot letters of 33 through soft and hard permutations, embedded by a product with the token table,
the head at every place, gradients also for the network's weights, species by species. Its network is fair-esm's (the fork that
takes one-hot input differs from it in the embedding alone, which is passed in here). The same weights, noise, masks and orders;
losses of all steps are asserted equal. Ratios are of the mean step.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from msa_transformer import peer  # the file beside this one
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from unmask.draw import Recorder, Seeded
from unmask.systems.proteins.diffpalm.optimising import DescentSettings, optimise
from unmask.systems.proteins.diffpalm.problem import Problem
from unmask.systems.proteins.msa_transformer.official import network_of


class _Given(nn.Module):
    """Hands the network an embedding that was made elsewhere."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner, self.next = inner, None

    @property
    def weight(self) -> Tensor:
        return self.inner.weight

    def forward(self, tokens: Tensor) -> Tensor:
        assert self.next is not None
        return self.next.clone()


def their_loop(
    network: Any, left: Tensor, right: Tensor, sizes: list[int], settings: DescentSettings, drawn: dict[str, Tensor]
) -> list[float]:
    """The authors' loop, from its description: a list of log_alpha, one group of Adadelta each."""
    table = network.embed_tokens.weight
    embedding = _Given(network.embed_tokens)
    network.embed_tokens = embedding
    alphas = [nn.Parameter(torch.zeros(n, n)) for n in sizes]
    optimiser = torch.optim.Adadelta(
        [{"params": [a]} for a in alphas], lr=settings.lr, weight_decay=settings.weight_decay
    )
    one_left, one_right = (torch.nn.functional.one_hot(t, 33).float()[None] for t in (left, right))
    mask_letter = torch.nn.functional.one_hot(torch.tensor(32), 33).float()
    losses = []
    for step in range(settings.steps + 1):
        optimiser.zero_grad()
        soft_blocks, hard_blocks = [], []
        for s, alpha in enumerate(alphas):
            with torch.no_grad():
                alpha -= alpha.mean()
            uniform = drawn[f"noise_{s}"][step]
            gumbel = -torch.log(-torch.log(uniform + 1e-20) + 1e-20)
            factor = settings.noise_factor * optimiser.param_groups[0]["lr"] / settings.lr
            noisy = alpha + factor * (alpha.std() if bool(alpha.any()) else 0.0) * gumbel
            x = noisy / settings.tau
            for _ in range(settings.sinkhorn_iterations):
                x = x - torch.logsumexp(x, dim=1, keepdim=True)
                x = x - torch.logsumexp(x, dim=0, keepdim=True)
            soft_blocks.append(x.exp())
            rows, columns = (drawn[f"perm_{k}_{s}"][step].argsort() for k in ("row", "col"))
            i, j = linear_sum_assignment(noisy.detach()[rows][:, columns].numpy(), maximize=True)
            hard = torch.zeros_like(noisy)
            hard[rows[torch.from_numpy(i)], columns[torch.from_numpy(j)]] = 1.0
            hard_blocks.append(hard)
        soft, hard = torch.block_diag(*soft_blocks), torch.block_diag(*hard_blocks)
        y_soft, y_hard = (torch.einsum("pq,bplf->bqlf", p, one_left) for p in (soft, hard))
        moved = y_hard - y_soft.detach() + y_soft
        hidden = drawn["mask"][step][None] < settings.mask_probability
        covered = torch.cat((torch.zeros_like(hidden[..., :1]), hidden), dim=2)
        shown = torch.where(covered[..., None], mask_letter, moved)
        whole = torch.cat((shown, one_right[:, :, 1:]), dim=2)
        embedding.next = whole @ table
        logits = network(whole.detach().argmax(-1))["logits"]
        loss = torch.nn.functional.cross_entropy(logits[:, :, : left.shape[1]][covered], moved[covered])
        losses.append(float(loss.detach()))
        if step < settings.steps:
            loss.backward()
            optimiser.step()
    network.embed_tokens = embedding.inner
    return losses


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (("dim", 128), ("layers", 4), ("rows", 32), ("columns", 60), ("steps", 5)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    if asked.threads:
        torch.set_num_threads(asked.threads)
    theirs = peer(asked.dim, asked.layers, 2**14)
    ours = network_of(theirs.state_dict(), {"attention_heads": asked.dim // 64 or 1}).eval()
    sizes = [4] * (asked.rows // 4)
    random = np.random.default_rng(0)
    left, right = (torch.from_numpy(random.integers(4, 24, (sum(sizes), asked.columns + 1))) for _ in range(2))
    left[:, 0] = right[:, 0] = 0
    settings = DescentSettings(steps=asked.steps, plateau=False)
    recorder = Recorder(Seeded(0))
    optimise(ours, left, right, Problem(sizes), settings.model_copy(update={"steps": 1}), [Recorder(Seeded(0))])  # warm
    started = time.perf_counter()
    (record,) = optimise(ours, left, right, Problem(sizes), settings, [recorder])
    mine = (time.perf_counter() - started) / (asked.steps + 0.5)
    started = time.perf_counter()
    losses = their_loop(theirs, left, right, sizes, settings, recorder.recorded)
    other = (time.perf_counter() - started) / (asked.steps + 0.5)
    assert np.allclose(losses, record.losses, atol=2e-3), (losses, record.losses)
    where = f"dim {asked.dim}, {asked.layers} layers, {sum(sizes)} x {2 * asked.columns + 1} tokens"
    where += f", {torch.get_num_threads()} threads"
    print(
        f"{where}\n  step   ours {mine * 1e3:8.1f} ms   authors' formulation {other * 1e3:8.1f} ms   {other / mine:.2f}x"
    )
    if asked.json:
        found = {"setting": where, "step": {"ours": mine, "authors' formulation": other, "ratio": other / mine}}
        asked.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
