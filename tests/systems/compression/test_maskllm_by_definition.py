"""Masks against the definitions of Wanda, SparseGPT and MaskLLM, written out slowly, for patterns and sizes of all kinds."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from unmask.errors import UserError
from unmask.systems.compression.maskllm.files import load_masks, packed
from unmask.systems.compression.maskllm.official import run_case


def without_smallest(scores: Tensor, group: int, removed: int) -> Tensor:
    mask = torch.ones_like(scores)
    for row in range(len(scores)):
        for first in range(0, scores.shape[1], group):
            gone = scores[row, first : first + group].argsort()[:removed]
            mask[row, first + gone] = 0
    return mask


def sparsegpt(weight: Tensor, hessian: Tensor, block: int, damping: float, **how: object) -> tuple[Tensor, Tensor]:
    """Mask and weight, column by column. how: group and removed, or share; update."""
    work, hessian, columns = weight.clone(), hessian.clone(), weight.shape[1]
    for j in range(columns):
        if hessian[j, j] == 0:
            hessian[j, j], work[:, j] = 1, 0
    hessian += torch.eye(columns) * damping * hessian.diag().mean()
    upper = torch.linalg.cholesky(torch.linalg.inv(hessian.double()), upper=True).float()
    mask = torch.ones_like(work)
    for first in range(0, columns, block):
        last = min(first + block, columns)
        if "share" in how:
            scores = (work[:, first:last] / upper.diag()[first:last]) ** 2
            ordered = scores.flatten().sort().values
            mask[:, first:last] = (scores > ordered[int(len(ordered) * how["share"])]).float()
        for j in range(first, last):
            if "group" in how and (j - first) % how["group"] == 0:
                some = slice(j, j + how["group"])
                mask[:, some] = without_smallest(
                    (work[:, some] / upper.diag()[some]) ** 2, how["group"], how["removed"]
                )
            if how["update"]:  # at once to all columns on the right, blocks only postpone it
                error = work[:, j] * (1 - mask[:, j]) / upper[j, j]
                work[:, j + 1 :] -= error[:, None] * upper[j, j + 1 :]
                work[:, j] *= mask[:, j]
    return mask, work


@pytest.mark.parametrize(
    ("shape", "group", "removed", "block", "damping", "share", "dead"),
    [
        ((12, 32), 4, 2, 8, 0.01, 0.5, [3]),
        ((10, 40), 4, 3, 16, 0.1, 0.3, [0, 9, 17]),  # a short last block
        ((6, 48), 8, 4, 32, 0.01, 0.75, [1, 2, 40]),
        ((8, 36), 4, 1, 128, 0.001, 0.6, []),
        ((4, 24), 3, 2, 9, 0.05, 0.25, [7]),
    ],
)
def test_one_shot_masks_are_those_of_the_definitions(shape, group, removed, block, damping, share, dead):
    generator = torch.Generator().manual_seed(0)
    weight, mixing = torch.randn(shape, generator=generator), torch.randn(shape[1], shape[1], generator=generator)
    x = torch.randn(2, 3, 20, shape[1], generator=generator) @ mixing
    x[..., dead] = 0
    config = {"group": group, "prune_per_group": removed, "block_size": block, "damping": damping}
    config |= {"in_features": shape[1], "out_features": shape[0]}
    found, _, _ = run_case({**config, "unstructured_sparsity": share}, {"param.weight": weight, "in.x": x})
    flat = x.reshape(-1, shape[1])
    hessian, norms = 2 / 6 * flat.T @ flat, flat.square().sum(0) / 6
    scores = weight.abs() * norms.sqrt()
    rows = torch.ones(shape)
    for row, own in zip(rows, scores, strict=True):
        row[own.argsort(stable=True)[: int(shape[1] * share)]] = 0
    rule = {"group": group, "removed": removed}
    moved = sparsegpt(weight, hessian, block, damping, **rule, update=True)
    exact = {
        "magnitude_mask": without_smallest(weight.abs(), group, removed),
        "wanda_mask": without_smallest(scores, group, removed),
        "wanda_unstructured_mask": rows,
        "sparsegpt_mask_frozen": sparsegpt(weight, hessian, block, damping, **rule, update=False)[0],
        "sparsegpt_mask": moved[0],
    }
    near = {
        "hessian": hessian,
        "wanda_scaler": norms,
        "wanda_metric": scores,
        "sparsegpt_weight": moved[1],
        "sparsegpt_unstructured_weight": sparsegpt(weight, hessian, block, damping, share=share, update=True)[1],
    }
    assert set(found) == {*exact, *near}
    assert all(torch.equal(found[k], v) for k, v in exact.items())
    assert all(torch.allclose(found[k], v, rtol=1e-3, atol=1e-3 * float(v.abs().max())) for k, v in near.items())


@pytest.mark.parametrize(
    ("keep", "group", "hard", "iteration", "strength", "reward"),
    [
        (2, 4, True, 0, 0.0, 1e-3),
        (2, 4, False, 10, None, 1.0),
        (4, 8, True, 7, 1.0, 0.1),
        (1, 3, False, 3, 3.0, 0.0),
        (1, 2, True, 5, 1.5, 0.01),
    ],
)
def test_a_step_of_learning_is_that_of_the_definition(keep, group, hard, iteration, strength, reward):
    generator = torch.Generator().manual_seed(1)
    options = torch.zeros(0, group)
    for kept in combinations(range(group), keep):
        options = torch.cat((options, torch.zeros(1, group).index_fill_(1, torch.tensor(kept), 1.0)))
    weights = {"up": torch.randn(24, 24, generator=generator), "down": torch.randn(5, 24, generator=generator)}
    x, target = torch.randn(4, 2, 24, generator=generator), torch.randint(0, 5, (4, 2), generator=generator)
    given = {"in.x": x, "in.target": target}
    masks, gates, kept_weight = {}, {}, torch.zeros(())
    fraction = iteration / 10
    scale, temperature = 5 + 15 * fraction, 4 - 3.5 * fraction
    for name, weight in weights.items():
        start = 0.1 * torch.randn(weight.numel() // group, len(options), generator=generator)
        noise = -(-torch.rand(start.shape, generator=generator).clamp(1e-6).log()).log()
        given |= {f"param.{name}.weight": weight, f"param.{name}.diff_mask.gate": start, f"draw.{name}.gumbel": noise}
        gate = start.clone()
        if strength is not None:
            prior = without_smallest(weight.abs(), group, group - keep)
            given[f"in.{name}.prior_mask"] = prior
            gate += ((options[None] * prior.reshape(-1, 1, group)).sum(-1) - 1) * start.std() * strength
        gates[name] = gate.requires_grad_()
        chances = ((gate * scale + noise) / temperature).softmax(dim=-1)
        if hard:
            chances = F.one_hot(chances.argmax(-1), len(options)) + chances - chances.detach()
        masks[name] = (chances[:, :, None] * options).sum(1).reshape(weight.shape)
        kept_weight = kept_weight + (weight * masks[name]).square().sum()
    logits = F.silu(x @ (weights["up"] * masks["up"]).T) @ (weights["down"] * masks["down"]).T
    task = F.cross_entropy(logits.reshape(-1, 5), target.reshape(-1))
    loss = task - reward * (1 - fraction) * kept_weight
    loss.backward()
    config = {"in_features": 24, "hidden_features": 24, "out_features": 5, "keep": keep, "group": group, "hard": hard}
    config |= {"iteration": iteration, "iterations": 10, "scale_range": [5, 20], "temperature_range": [4, 0.5]}
    found, _, gradients = run_case(config | {"prior_strength": strength, "weight_reg": reward}, given)
    wanted = {"logits": logits, "lm_loss": task, "loss": loss, "regulariser": kept_weight}
    for name, gate in gates.items():
        final = options[gate.argmax(1)].reshape(masks[name].shape)
        assert torch.equal(found[f"{name}.final_mask"], final)
        assert found[f"{name}.final_mask_packed"].tolist() == packed(final).tolist()
        wanted |= {f"{name}.gate_after_prior": gate, f"{name}.soft_mask": masks[name]}
        assert torch.allclose(gradients[f"{name}.diff_mask.gate"], gate.grad, atol=1e-5 * float(gate.grad.abs().max()))
    assert all(torch.allclose(found[k], v.detach(), rtol=1e-4, atol=1e-5) for k, v in wanted.items())


def test_masks_saved_as_a_torch_file_are_read(tmp_path):
    mask = without_smallest(torch.rand(3, 8), 4, 2)
    torch.save({"a.weight.mask": mask}, tmp_path / "masks.pt")
    assert torch.equal(load_masks(tmp_path / "masks.pt", {"a": (3, 8)})["a"], mask)
    with pytest.raises(UserError, match=r"\[3, 8\], its weight \[8, 3\]"):
        load_masks(tmp_path / "masks.pt", {"a": (8, 3)})
