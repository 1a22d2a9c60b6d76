"""MSA Transformer, forward and training step on the CPU: ours against fair-esm, same weights, same tokens.

    python bench/msa_transformer.py [--dim 128] [--layers 2] [--rows 256] [--columns 64] [--rounds 5] [--threads N] [--json FILE]

256 rows, as the paper takes for contacts. Forward: logits of the whole table, no gradients; the second line has more tokens
than fair-esm takes at once (its option max_tokens_per_msa), so that both work in pieces. Step: cross-entropy of 15 % hidden
letters with its gradients; ours computes the head at hidden places alone. Outputs, losses and a gradient are asserted equal;
both sides take turns; ratios are of medians (above 1: ours is faster).
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from unmask.systems.proteins.msa_transformer.official import network_of


def peer(dim: int, layers: int, max_tokens: int) -> Any:
    import esm

    args = Namespace(
        embed_dim=dim,
        layers=layers,
        attention_heads=dim // 64 or 1,
        ffn_embed_dim=4 * dim,
        dropout=0.0,
        attention_dropout=0.0,
        activation_dropout=0.0,
        max_positions=1024,
        max_tokens=max_tokens,
        max_tokens_per_msa=max_tokens,
        embed_positions_msa=True,
    )
    torch.manual_seed(0)
    return esm.model.msa_transformer.MSATransformer(args, esm.data.Alphabet.from_architecture("msa_transformer")).eval()


def tokens_of(rows: int, columns: int) -> Tensor:
    tokens = torch.randint(4, 24, (1, rows, columns + 1), generator=torch.Generator().manual_seed(1))
    tokens[:, :, 0] = 0
    return tokens


def taking_turns(sides: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    times: dict[str, list[float]] = {name: [] for name in sides}
    for name in sides:
        sides[name]()
    for _ in range(rounds):
        for name, run in sides.items():
            started = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - started)
    return {name: statistics.median(values) for name, values in times.items()}


def forwards(ours: Any, theirs: Any, tokens: Tensor) -> dict[str, Callable[[], Tensor]]:
    return {"ours": lambda: ours.letters(ours(tokens).last), "fair-esm": lambda: theirs(tokens)["logits"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (("dim", 128), ("layers", 2), ("rows", 256), ("columns", 64), ("rounds", 5)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    if asked.threads:
        torch.set_num_threads(asked.threads)
    results: dict[str, Any] = {}
    tokens = tokens_of(asked.rows, asked.columns)
    for name, most in (("forward", 2**14), ("forward in pieces", tokens.numel() // 4)):
        theirs = peer(asked.dim, asked.layers, most)
        ours = network_of(
            theirs.state_dict(), {"attention_heads": asked.dim // 64 or 1, "max_tokens_per_msa": most}
        ).eval()
        sides = forwards(ours, theirs, tokens)
        with torch.no_grad():
            assert torch.allclose(*(run() for run in sides.values()), atol=1e-3)
            found = taking_turns(sides, asked.rounds)
        results[name] = {**found, "ratio": found["fair-esm"] / found["ours"]}
    theirs = peer(asked.dim, asked.layers, 2**14)
    ours = network_of(theirs.state_dict(), {"attention_heads": asked.dim // 64 or 1}).eval()
    hidden = torch.rand(tokens.shape, generator=torch.Generator().manual_seed(2)) < 0.15
    hidden[:, :, 0] = False
    masked, target = tokens.masked_fill(hidden, 32), tokens[hidden]

    def their_step() -> Tensor:
        theirs.zero_grad(set_to_none=True)
        loss = torch.nn.functional.cross_entropy(theirs(masked)["logits"][hidden], target)
        loss.backward()
        return loss.detach()

    def our_step() -> Tensor:
        ours.zero_grad(set_to_none=True)
        loss = torch.nn.functional.cross_entropy(ours.letters(ours(masked).last[hidden]), target)
        loss.backward()
        return loss.detach()

    assert torch.allclose(our_step(), their_step(), atol=1e-4)
    one, other = ours.head_dense.weight.grad, theirs.lm_head.dense.weight.grad
    assert one is not None
    assert torch.allclose(one, other, atol=1e-4 * float(other.abs().max()) + 1e-6)
    found = taking_turns({"ours": our_step, "fair-esm": their_step}, asked.rounds)
    results["step"] = {**found, "ratio": found["fair-esm"] / found["ours"]}
    where = f"dim {asked.dim}, {asked.layers} layers, {asked.rows} x {asked.columns + 1} tokens, {torch.get_num_threads()} threads"
    print(where)
    for name, row in results.items():
        print(
            f"  {name:18} ours {row['ours'] * 1e3:8.1f} ms   fair-esm {row['fair-esm'] * 1e3:8.1f} ms   {row['ratio']:.2f}x"
        )
    if asked.json:
        asked.json.write_text(json.dumps({"setting": where, **results}, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
