"""ENAT against its definition, written out sample by sample on the authors' names: any grid, depth, schedule of reuse."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from unmask.systems.generation.enat.official import run_case

CODES, CLASSES = 9, 3
Known = tuple[Tensor, Tensor] | None  # what was hidden, and features


def authors_state(tokens: int, width: int, depth: int, ratio: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    linear = {"mlm_layer.fc": (width, width)}
    for mlp in ("prev_embedder", "prev_proj.mlp", *(f"blocks.{i}.mlp" for i in range(depth))):
        linear |= {f"{mlp}.fc1": (ratio * width, width), f"{mlp}.fc2": (width, ratio * width)}
    for i in range(depth):
        linear |= {f"blocks.{i}.attn.{n}": (width, width) for n in ("q", "proj")}
        linear |= {f"blocks.{i}.attn.kv.{n}": (2 * width, width) for n in "AB"}
        linear[f"blocks.{i}.adaLN_modulation.1"] = (8 * width, width)
    shapes: dict[str, tuple[int, ...]] = {f"{n}.weight": s for n, s in linear.items()}
    shapes |= {f"{n}.bias": s[:1] for n, s in linear.items()} | {"mlm_layer.bias": (1, 1, CODES + 1)}
    shapes |= {
        "x_embedder.word_embeddings.weight": (CODES + 1, width),
        "x_embedder.position_embeddings.weight": (tokens, width),
        "y_embedder.embedding_table.weight": (CLASSES + 1, width),
    }
    norms = ("x_embedder.LayerNorm", "prev_proj.norm", "norm", "mlm_layer.ln")
    shapes |= {f"{n}.{kind}": (width,) for n in norms for kind in ("weight", "bias")}
    return {n: torch.randn(s, generator=generator) * 0.4 for n, s in shapes.items()}


class Definition:
    def __init__(self, state: dict[str, Tensor], heads: int, encoder: int, depth: int):
        self.state, self.heads, self.encoder, self.depth = state, heads, encoder, depth

    def linear(self, name: str, x: Tensor) -> Tensor:
        return F.linear(x, self.state[f"{name}.weight"], self.state[f"{name}.bias"])

    def norm(self, x: Tensor, name: str = "", eps: float = 1e-6) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        whole = centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt()
        return whole * self.state[f"{name}.weight"] + self.state[f"{name}.bias"] if name else whole

    def mlp(self, name: str, x: Tensor) -> Tensor:
        return self.linear(f"{name}.fc2", F.gelu(self.linear(f"{name}.fc1", x), approximate="tanh"))

    def block(self, number: int, x: Tensor, context: Tensor, label: Tensor) -> Tensor:
        name, parts = f"blocks.{number}", F.silu(label)
        shift, scale, c_shift, c_scale, gate, m_shift, m_scale, m_gate = self.linear(
            f"{name}.adaLN_modulation.1", parts
        ).chunk(8)
        own = self.norm(x) * (1 + scale) + shift
        others = self.norm(context) * (1 + c_scale) + c_shift
        pairs = torch.cat((self.linear(f"{name}.attn.kv.A", others), self.linear(f"{name}.attn.kv.B", own)))
        keys, values = pairs.chunk(2, dim=1)
        queries = self.linear(f"{name}.attn.q", own)
        mixed = [
            (q @ k.T / math.sqrt(q.shape[1])).softmax(-1) @ v
            for q, k, v in zip(*(t.chunk(self.heads, dim=1) for t in (queries, keys, values)), strict=True)
        ]
        x = x + gate * self.linear(f"{name}.attn.proj", torch.cat(mixed, dim=1))
        return x + m_gate * self.mlp(f"{name}.mlp", self.norm(x) * (1 + m_scale) + m_shift)

    def one(self, ids: Tensor, label: int, before: Known) -> tuple[Tensor, Tensor]:
        hidden, table = ids == CODES, self.state["y_embedder.embedding_table.weight"][label]
        x = self.state["x_embedder.word_embeddings.weight"][ids] + self.state["x_embedder.position_embeddings.weight"]
        x = self.norm(x, "x_embedder.LayerNorm")
        old = torch.zeros_like(hidden) if before is None else ~before[0]
        context = x[:0] if before is None else before[1].detach()[old]
        context = context + self.mlp("prev_proj.mlp", self.norm(context, "prev_proj.norm"))
        features = torch.zeros_like(x).masked_scatter(old[:, None], context)
        for where, first, last in ((~hidden & ~old, 0, self.encoder), (hidden, self.encoder, self.depth)):
            y, seen = x[where], context if first == 0 else features[~hidden]
            for number in range(first, last):
                y = self.block(number, y, seen, table) if len(y) else y
            features = features.masked_scatter(where[:, None], y)
        return hidden, features

    def logits(self, features: Tensor) -> Tensor:
        x = self.norm(F.gelu(self.linear("mlm_layer.fc", self.norm(features, "norm", 1e-5))), "mlm_layer.ln", 1e-5)
        table = self.state["x_embedder.word_embeddings.weight"].detach()
        return (x @ table.T + self.state["mlm_layer.bias"][0])[..., :CODES]

    def __call__(self, ids: Tensor, labels: Tensor, before: list[Known]) -> tuple[Tensor, list[Known]]:
        known = [self.one(*row) for row in zip(ids, labels.tolist(), before, strict=True)]
        return torch.stack([f for _, f in known]), list(known)


def config(grid: int, heads: int, encoder: int, depth: int, ratio: int, **more: object) -> dict[str, object]:
    sizes = {"grid_size": grid, "embed_dim": 12, "num_heads": heads, "encoder_depth": encoder, "mlp_ratio": ratio}
    return {**sizes, "decoder_depth": depth - encoder, "codebook_size": CODES, "num_classes": CLASSES, **more}


@torch.no_grad()
@pytest.mark.parametrize(
    ("sizes", "steps", "weight", "reuse", "noise", "warmth"),
    [
        ((3, 4, 1, 3, 2), 5, 0.0, True, 1.5, 6.0),
        ((5, 3, 3, 4, 3), 8, 3.5, True, 4.0, 1.0),
        ((4, 2, 2, 3, 4), 6, 2.5, False, 1.5, 4.0),
        ((3, 2, 2, 4, 4), 16, 1.0, True, 0.0, 0.0),  # more steps than tokens
        ((2, 1, 1, 2, 4), 1, 1.0, True, 1.0, 1.0),
    ],
)
def test_every_step_of_a_sampling_is_that_of_the_definition(sizes, steps, weight, reuse, noise, warmth):
    grid, heads, encoder, depth, ratio = sizes
    generator, tokens = torch.Generator().manual_seed(1), grid * grid
    state = authors_state(tokens, 12, depth, ratio)
    net, labels = Definition(state, heads, encoder, depth), torch.tensor([1, 0])
    uniform = torch.rand(steps, 2, tokens, CODES + 1, generator=generator).clamp(1e-9, 1 - 1e-7)
    gumbel = -(-uniform.log()).log()
    ids, known, guidance, trace = torch.full((2, tokens), CODES), [[None, None], [None, None]], 0.0, []
    for step in range(steps):
        trace.append(ids)
        share = (step + 1) / steps
        logits = []
        for way, classes in enumerate((labels, torch.full_like(labels, CLASSES))):
            features, now = net(ids, classes, known[way])
            known[way] = now if reuse else [None, None]
            logits.append(net.logits(features))
        log_p = (logits[0] + guidance * (logits[0] - logits[1])).log_softmax(-1)
        chosen = (log_p / max(warmth * (1 - share), 1e-3) + gumbel[step, ..., :CODES]).argmax(-1)
        sure = log_p.gather(2, chosen[..., None])[..., 0] + noise * (1 - share) * gumbel[step, ..., CODES]
        sure, chosen = torch.where(ids == CODES, sure, torch.inf), torch.where(ids == CODES, chosen, ids)
        stay = math.floor(tokens * math.cos(share * math.pi / 2)) if step + 1 < steps else 0
        ids = chosen.scatter(1, sure.argsort(1)[:, :stay], CODES)
        guidance = weight * share
    given = {f"param.{n}": v for n, v in state.items()} | {"in.classes": labels}
    given |= {"draw.token_gumbel": gumbel[..., :CODES], "draw.mask_gumbel": gumbel[..., CODES]}
    asked = {"steps": steps, "cfg_scale": weight, "reuse": reuse}
    asked |= {"mask_temperature": noise, "sampling_temperature": warmth}
    found, _, _ = run_case(config(*sizes, **asked), given)
    assert torch.equal(found["ids_by_step"], torch.stack(trace))
    assert torch.equal(found["tokens"], ids.reshape(2, grid, grid))


@pytest.mark.parametrize(
    ("sizes", "before", "now", "smoothing"),
    [
        ((3, 3, 1, 3, 2), 9, 4, 0.0),  # nothing was visible before
        ((5, 4, 3, 4, 3), 20, 20, 0.1),  # nothing is new
        ((4, 2, 2, 4, 4), 10, 1, 0.2),
        ((4, 2, 2, 4, 4), 16, 16, 0.2),  # nothing is visible
        ((4, 2, 2, 4, 4), None, 7, 0.2),
    ],
)
def test_a_step_of_training_is_that_of_the_definition(sizes, before, now, smoothing):
    grid, heads, encoder, depth, ratio = sizes
    generator, size = torch.Generator().manual_seed(2), (2, grid * grid)
    state = {n: v.requires_grad_() for n, v in authors_state(size[1], 12, depth, ratio).items()}
    net, labels = Definition(state, heads, encoder, depth), torch.tensor([2, CLASSES])
    tokens = torch.randint(0, CODES, size, generator=generator)
    order = torch.rand(size, generator=generator).argsort(1)
    ids = tokens.scatter(1, order[:, :now], CODES)
    given = {f"param.{n}": v.detach() for n, v in state.items()}
    given |= {"in.tokens": tokens, "in.ids": ids, "in.classes": labels}
    wanted = {}

    def look(at: Tensor, known: list[Known], end: str) -> Tensor:
        wanted[f"features{end}"], _ = net(at, labels, known)
        logits = wanted[f"logits{end}"] = net.logits(wanted[f"features{end}"])
        hidden = at == CODES
        wanted[f"loss{end}"] = F.cross_entropy(logits[hidden], tokens[hidden], label_smoothing=smoothing)
        return wanted[f"loss{end}"]

    loss = look(ids, [None, None], "")
    if before is not None:
        given["in.ids_previous"] = tokens.scatter(1, order[:, :before], CODES)
        wanted["previous_features"], known = net(given["in.ids_previous"], labels, [None, None])
        loss = look(ids, known, "_reuse")
    loss.backward()
    found, _, gradients = run_case(config(*sizes, label_smoothing=smoothing), given)
    assert set(found) == set(wanted)
    assert all(torch.allclose(found[k], v.detach(), atol=1e-4) for k, v in wanted.items())
    for name, parameter in state.items():
        if parameter.grad is not None and parameter.grad.abs().max() > 0:
            assert torch.allclose(gradients[name], parameter.grad, atol=1e-5), name
