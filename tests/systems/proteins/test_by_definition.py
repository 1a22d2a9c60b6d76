"""MSA Transformer and DiffPALM against their definitions, written out on the authors' names: any sizes and options."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.nn import functional as F

from unmask.systems.proteins.alphabet import CLS, MASK, PAD
from unmask.systems.proteins.diffpalm.official import run_case as run_pairing
from unmask.systems.proteins.msa_transformer.official import run_case as run_network
from unmask.systems.proteins.rows import greedy_rows


def authors_state(
    width: int, heads: int, layers: int, *, rows: int | None, row_width: int | None = None, contacts: bool = True
) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    linear, norms = {"lm_head.dense": (width, width)}, ["emb_layer_norm_before", "emb_layer_norm_after"]
    for i in range(layers):
        for kind in ("row", "column"):
            name = f"layers.{i}.{kind}_self_attention"
            linear |= {f"{name}.layer.{p}_proj": (width, width) for p in ("q", "k", "v", "out")}
            norms.append(f"{name}.layer_norm")
        name = f"layers.{i}.feed_forward_layer"
        linear |= {f"{name}.layer.fc1": (3 * width, width), f"{name}.layer.fc2": (width, 3 * width)}
        norms.append(f"{name}.layer_norm")
    if contacts:
        linear["contact_head.regression"] = (1, layers * heads)
    shapes: dict[str, tuple[int, ...]] = {f"{n}.weight": s for n, s in linear.items()}
    shapes |= {f"{n}.bias": s[:1] for n, s in linear.items()}
    shapes |= {f"{n}.{k}": (width,) for n in [*norms, "lm_head.layer_norm"] for k in ("weight", "bias")}
    shapes |= {"embed_tokens.weight": (33, width), "embed_positions.weight": (26, width), "lm_head.bias": (33,)}
    if rows:
        shapes["msa_position_embedding"] = (1, rows, 1, row_width or width)
    return {n: torch.randn(s, generator=generator) * 0.4 for n, s in shapes.items()}


def definition(state: dict[str, Tensor], tokens: Tensor, heads: int, letters: Tensor | None = None) -> dict:
    """All that the network gives, one row and one column after the other. letters: one-hot rows that need not be whole."""

    def linear(name: str, x: Tensor) -> Tensor:
        return F.linear(x, state[f"{name}.weight"], state[f"{name}.bias"])

    def norm(name: str, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"])

    def split(name: str, x: Tensor) -> list[Tensor]:
        return [linear(f"{name}.layer.{p}_proj", x).unflatten(-1, (heads, -1)) for p in "qkv"]

    padding = tokens == PAD
    there = (~padding).long()
    x = state["embed_tokens.weight"][tokens] if letters is None else letters @ state["embed_tokens.weight"]
    x = x + state["embed_positions.weight"][there.cumsum(2) * there + 1]
    if "msa_position_embedding" in state:
        x = x + state["msa_position_embedding"][:, : tokens.shape[1]]
    x = norm("emb_layer_norm_before", x) * there[..., None]
    rows, width = tokens.shape[1], x.shape[-1]
    layers = 1 + max(int(n.split(".")[1]) for n in state if n.startswith("layers."))
    kept, row_maps, column_maps = [x], [], []
    for i in range(layers):
        name = f"layers.{i}.row_self_attention"
        q, k, v = split(name, norm(f"{name}.layer_norm", x))
        q = q * there[..., None, None] / (width / heads * rows) ** 0.5
        logits = sum(torch.einsum("bihd,bjhd->bhij", q[:, r], k[:, r]) for r in range(rows))
        weights = logits.masked_fill(padding[:, 0, None, None], -10000).softmax(-1)
        mixed = torch.stack([torch.einsum("bhij,bjhd->bihd", weights, v[:, r]) for r in range(rows)], dim=1)
        x = x + linear(f"{name}.layer.out_proj", mixed.flatten(3))
        row_maps.append(weights)
        name = f"layers.{i}.column_self_attention"
        q, k, v = split(name, norm(f"{name}.layer_norm", x))
        logits = torch.einsum("bichd,bjchd->bhcij", q / (width / heads) ** 0.5, k)
        weights = logits.masked_fill(padding.transpose(1, 2)[:, None, :, None], -10000).softmax(-1)
        mixed = torch.einsum("bhcij,bjchd->bichd", weights, v)
        x = x + linear(f"{name}.layer.out_proj", mixed.flatten(3))
        column_maps.append(weights)
        name = f"layers.{i}.feed_forward_layer"
        x = x + linear(f"{name}.layer.fc2", F.gelu(linear(f"{name}.layer.fc1", norm(f"{name}.layer_norm", x))))
        kept.append(x)
    kept[-1] = last = norm("emb_layer_norm_after", x)
    head = norm("lm_head.layer_norm", F.gelu(linear("lm_head.dense", last)))
    out = {f"representation_{i}": value for i, value in enumerate(kept)} | {"representation_last": last}
    out |= {"row_attentions": torch.stack(row_maps, 1), "col_attentions": torch.stack(column_maps, 1)}
    out["logits"] = F.linear(head, state["embed_tokens.weight"], state["lm_head.bias"])
    if "contact_head.regression.weight" in state:
        maps = out["row_attentions"][..., 1:, 1:].flatten(1, 2)
        maps = maps + maps.transpose(2, 3)
        total = maps.sum((2, 3), keepdim=True)
        maps = maps - maps.sum(3, keepdim=True) * maps.sum(2, keepdim=True) / total
        out["contacts"] = linear("contact_head.regression", maps.permute(0, 2, 3, 1))[..., 0].sigmoid()
    return out


def table(rows: int, columns: int, *, padded_rows: int = 0, padded_columns: int = 0, seed: int = 0) -> Tensor:
    tokens = torch.randint(4, 31, (rows, columns), generator=torch.Generator().manual_seed(seed))
    tokens[:, 0] = CLS
    tokens[rows - padded_rows :] = PAD
    tokens[:, columns - padded_columns :] = PAD
    return tokens


@pytest.mark.parametrize(
    ("heads", "layers", "rows", "row_width", "shape", "padding", "shares"),
    [
        (4, 1, 8, 1, (4, 9), [(0, 0), (2, 3)], (0.8, 0.1, 0.1)),  # a number a row, as in the first release
        (3, 3, 6, None, (5, 7), [(0, 0), (3, 0), (0, 2)], (0.7, 0.2, 0.1)),
        (2, 2, None, None, (6, 8), [(0, 0)], (1.0, 0.0, 0.0)),
        (1, 2, 4, 1, (1, 9), [(0, 0), (0, 3)], (0.5, 0.5, 0.0)),
    ],
)
def test_a_step_of_training_is_that_of_the_definition(heads, layers, rows, row_width, shape, padding, shares):
    state = authors_state(12, heads, layers, rows=rows, row_width=row_width)
    state = {n: v.requires_grad_() for n, v in state.items()}
    tokens = torch.stack([table(*shape, padded_rows=r, padded_columns=c, seed=i) for i, (r, c) in enumerate(padding)])
    generator = torch.Generator().manual_seed(3)
    select, action = (torch.rand(tokens.shape, generator=generator) for _ in range(2))
    random = torch.randint(4, 24, tokens.shape, generator=generator)
    hidden = (select < 0.4) & (tokens != CLS) & (tokens != PAD)
    instead = torch.where(action < shares[0], MASK, torch.where(action < shares[0] + shares[1], random, tokens))
    masked = torch.where(hidden, instead, tokens)
    wanted = definition(state, masked, heads)
    wanted["loss"] = F.cross_entropy(wanted["logits"][hidden], tokens[hidden])
    (wanted["loss"] + 0.1 * wanted["contacts"].square().sum()).backward()
    given = {f"param.{n}": v.detach() for n, v in state.items()}
    given |= {"in.tokens": tokens, "draw.select": select, "draw.action": action, "draw.random_token": random}
    config = {"attention_heads": heads, "mask_probability": 0.4, "mask_share": shares[0], "random_share": shares[1]}
    found, _, gradients = run_network({**config, "keep_share": shares[2]}, given)
    assert torch.equal(found["masked_tokens"], masked)
    assert torch.equal(found["hidden"], hidden)
    assert {*wanted, "masked_tokens", "hidden"} == set(found)
    assert all(torch.allclose(found[k], v.detach(), atol=2e-5) for k, v in wanted.items())
    for name, parameter in state.items():
        if parameter.grad is not None:
            assert torch.allclose(gradients[name], parameter.grad, atol=1e-5), name


@torch.no_grad()
@pytest.mark.parametrize(("rows", "row_width", "shape", "most"), [(8, 1, (7, 9), 5), (None, None, (5, 8), 17)])
def test_scores_of_mutations_are_those_of_the_definition(rows, row_width, shape, most):
    state = authors_state(12, 3, 2, rows=rows, row_width=row_width)
    tables = {
        "msa": table(*shape)[None],
        "msa_row_padded": table(*shape, padded_rows=3)[None],
        "single": table(1, 8)[None],
    }
    columns, mutants = torch.tensor([1, 4, 4]), torch.tensor([5, 9, 23])
    given = {f"param.{n}": v for n, v in state.items()} | {f"in.{n}": v for n, v in tables.items()}
    given |= {"in.mutation_column": columns, "in.mutation_token": mutants}
    found, _, _ = run_network({"attention_heads": 3, "max_tokens_per_msa_chunked": most}, given)
    for name, tokens in tables.items():
        wanted = definition(state, tokens, 3)
        for key in ("logits", "contacts", "col_attentions"):
            assert torch.allclose(found[f"{name.removeprefix('msa_')}_{key}"], wanted[key], atol=1e-5)
    marginals = []
    for column in range(shape[1]):
        one = tables["msa"].clone()
        one[0, 0, column] = MASK
        marginals.append(definition(state, one, 3)["logits"][0, 0, column].log_softmax(-1))
    logs = torch.stack(marginals)
    assert torch.allclose(found["masked_marginals"], logs, atol=1e-5)
    score = logs[columns, mutants] - logs[columns, tables["msa"][0, 0, columns]]
    assert torch.allclose(found["mutation_score"], score, atol=1e-5)


@pytest.mark.parametrize("seed", range(40))
def test_rows_that_are_equally_far_are_taken_as_by_the_authors(seed):
    random = np.random.default_rng(seed)
    letters = random.integers(65, 68, (random.integers(4, 60), random.integers(4, 30))).astype(np.uint8)
    for largest in (True, False):
        chosen = [0]
        while len(chosen) < len(letters) // 2:
            rest = np.array([i for i in range(len(letters)) if i not in chosen])
            far = np.array([(letters[rest] != letters[one]).mean(axis=1) for one in chosen])
            mean = np.asfortranarray(far).mean(axis=0)  # the order of a sum decides between equals
            chosen.append(int(rest[mean.argmax() if largest else mean.argmin()]))
        assert greedy_rows(letters, len(letters) // 2, largest=largest).tolist() == sorted(chosen)


# --- pairing ---


def pairing_by_definition(state, left, right, above, config, drawn) -> dict[str, Tensor]:
    train, sizes, fixed = config["train"], config["species_sizes"], config["fixed_pairings"]
    rows, count, batch = sum(sizes), train["epochs"] + 1, train["batch_size"]
    free, known = {}, []
    for number, size in enumerate(sizes):
        start, pairs = sum(sizes[:number]), list(fixed[number]) if fixed is not None else []
        ends = [[start + i for i in range(size) if i not in {pair[side] for pair in pairs}] for side in (0, 1)]
        known += [(start + p, start + q) for p, q in pairs]
        if fixed is not None and len(ends[0]) == 1:
            known.append((ends[0][0], ends[1][0]))
        elif ends[0]:
            free[number] = (torch.tensor(ends[0])[:, None], torch.tensor(ends[1])[None])
    tables = {s: (train["std_init"] * drawn[f"init_{s}"]).requires_grad_() for s in free}
    optimiser = getattr(torch.optim, train["optimizer_name"])(
        [{"params": [one]} for one in tables.values()], **train["optimizer_kwargs"]
    )
    schedule = None
    if train["scheduler_name"]:
        schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(optimiser, **config["scheduler_effective"])
    out: dict[str, list] = {n: [] for n in ("losses", "lr", "partner", "soft", "log_alpha")}
    out |= {f"grad_log_alpha_{s}": [] for s in free}
    letters = [F.one_hot(t, 33).float() for t in (left, right, above)]
    for number in range(count * batch):
        step, first, last = number // batch, number % batch == 0, number // batch == count - 1
        if first:
            whole = torch.zeros(rows, rows)
            for s, place in free.items():
                whole[place] = tables[s].detach()
            out["log_alpha"].append(whole)
            optimiser.zero_grad()
        factor = train["noise_factor"]
        if train["noise_scheduler"]:
            factor *= optimiser.param_groups[0]["lr"] / train["optimizer_kwargs"]["lr"]
        soft, hard = torch.zeros(rows, rows), torch.zeros(rows, rows)
        for p, q in known:
            soft[p, q] = hard[p, q] = 1
        for s, place in free.items():
            if train["mean_centering"]:
                with torch.no_grad():
                    tables[s] -= tables[s].mean()
            x = tables[s]
            if train["noise"]:
                gumbel = -torch.log(-torch.log(drawn[f"noise_{s}"][step] + 1e-20) + 1e-20)
                x = x + factor * (x.std() if train["noise_std"] else 1.0) * gumbel
            log_p = x / train["tau"]
            for _ in range(train["n_sink_iter"]):
                log_p = log_p.log_softmax(1).log_softmax(0)
            soft = soft.index_put(place, log_p.exp())
            turns = [torch.eye(len(x))] * 2
            if train["use_rand_perm"]:
                turns = [torch.eye(len(x))[drawn[f"perm_{end}_{s}"][step]] for end in ("row", "col")]
            i, j = linear_sum_assignment((turns[0] @ x.detach() @ turns[1].T).numpy(), maximize=True)
            match = torch.zeros_like(x)
            match[i, j] = 1
            hard[place] = turns[0].T @ match @ turns[1]
        if first:
            out["soft"].append(soft.detach())
        out["partner"].append(hard.argmax(0))
        moved, smooth = (torch.einsum("pq,plv->qlv", p, letters[0]) for p in (hard, soft))
        moved = moved - smooth.detach() + smooth
        hidden = F.pad(drawn["mask"][number] < config["p_mask"], (1, 0))
        hidden[[q for _, q in known]] = False
        seen = torch.where(hidden[..., None], F.one_hot(torch.tensor(MASK), 33).float(), moved)
        seen = torch.cat((letters[2], torch.cat((seen, letters[1][:, 1:]), 1)))
        logits = definition(state, seen.detach().round().argmax(-1)[None], 2, seen[None])["logits"][0, len(above) :]
        logs = logits[:, : left.shape[1]].log_softmax(-1)
        loss = -(moved * logs).sum(-1)[hidden].mean()
        out["losses"].append(loss.detach())
        if not last:
            (loss / batch).backward()
            if number % batch == batch - 1:
                for s, one in tables.items():
                    out[f"grad_log_alpha_{s}"].append(one.grad.clone())
                optimiser.step()
                if schedule is not None:
                    schedule.step(sum(out["losses"][-batch:]))
                out["lr"].append(torch.tensor(float(optimiser.param_groups[0]["lr"])))
    return {n: torch.stack(v) for n, v in out.items()}


RUN = {
    "std_init": 0.1, "epochs": 3, "batch_size": 1, "optimizer_name": "Adadelta",
    "optimizer_kwargs": {"lr": 9, "weight_decay": 0.1}, "tau": 1.0, "n_sink_iter": 10, "noise": True, "noise_std": True,
    "noise_factor": 0.1, "noise_scheduler": True, "scheduler_name": "ReduceLROnPlateau", "use_rand_perm": True,
    "mean_centering": True,
}  # fmt: skip


@pytest.mark.parametrize(
    ("sizes", "fixed", "examples", "share", "patience", "options"),
    [
        ([3, 1, 2], None, 0, 0.7, 10, {"noise_std": False}),  # a species of one row keeps its entry
        ([3, 1, 2, 4], [[], [], [], [[3, 0], [1, 1]]], 2, 0.4, 10, {"noise_factor": 0.5, "batch_size": 3}),
        ([4, 3], [[], []], 1, 0.5, 1, {"epochs": 8, "noise_factor": 0.4}),  # the rate falls
        ([4], None, 0, 0.6, 10, {"optimizer_name": "AdamW", "optimizer_kwargs": {"lr": 0.1}, "scheduler_name": None}),
        (
            [2, 5], None, 0, 0.9, 10,
            {"optimizer_name": "SGD", "optimizer_kwargs": {"lr": 0.5, "momentum": 0.9}, "noise": False, "use_rand_perm": False},
        ),
        (
            [4, 3], [[[0, 0], [1, 1], [2, 2]], []], 3, 1.0, 10,
            {"optimizer_name": "Adam", "optimizer_kwargs": {"lr": 0.1, "betas": [0.5, 0.9]}, "tau": 0.3, "n_sink_iter": 1,
             "mean_centering": False},
        ),
    ],
)  # fmt: skip
def test_a_run_of_pairing_is_that_of_the_definition(sizes, fixed, examples, share, patience, options):
    state, rows = authors_state(8, 2, 2, rows=16, contacts=False), sum(sizes)
    left, right, above = table(rows, 6), table(rows, 5, seed=1), table(examples, 10, seed=2)
    train = {**RUN, **options}
    generator, count = torch.Generator().manual_seed(5), train["epochs"] + 1
    drawn = {"mask": torch.rand(count * train["batch_size"], rows, 5, generator=generator)}
    for s, size in enumerate(sizes):
        free = size if fixed is None else size - len(fixed[s])
        if free > 1 or fixed is None:
            drawn |= {
                f"init_{s}": torch.randn(free, free, generator=generator),
                f"noise_{s}": torch.rand(count, free, free, generator=generator),
                f"perm_row_{s}": torch.rand(count, free, generator=generator).argsort(1),
                f"perm_col_{s}": torch.rand(count, free, generator=generator).argsort(1),
            }
    config = {"species_sizes": sizes, "fixed_pairings": fixed, "p_mask": share, "train": train}
    config |= {"model": {"attention_heads": 2}, "scheduler_effective": {"factor": 0.1, "patience": patience}}
    wanted = pairing_by_definition(state, left, right, above, config, drawn)
    given = {f"param.{n}": v for n, v in state.items()} | {f"draw.{n}": v for n, v in drawn.items()}
    given |= {"in.left": left[None], "in.right": right[None]} | ({"in.positive": above[None]} if examples else {})
    found, _, _ = run_pairing(config, given)
    assert set(found) == set(wanted)
    assert torch.equal(found["partner"], wanted["partner"])
    assert all(torch.allclose(found[k].float(), v.float(), atol=2e-5, rtol=1e-3) for k, v in wanted.items())
