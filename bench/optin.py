"""OPTIN: measured latency of a ViT at 60 % of its multiply-adds, and the importance search beside the released code's loop.

    python bench/optin.py [--width 192 --depth 6 --heads 3 --samples 32]

The loop hides one unit, runs the whole network, normalises both sides and builds both Gram matrices, as the released code does;
it is timed on some units of every layer and scaled up. Scores of both are compared on those units. What the search can gain is
bounded by what a candidate has to run: the layers behind it, half of them on average. Beyond two times come from small batches,
which fill no processor one by one.
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Iterator

import torch
from torch import Tensor

from unmask.contracts import Budget
from unmask.draw import Seeded, permutation
from unmask.models import UserModel, open_model
from unmask.systems.compression import measure
from unmask.systems.compression.allocate import Frame
from unmask.systems.compression.optin.importance import Setting, Trajectories
from unmask.systems.compression.optin.model import OPTIN
from unmask.systems.compression.structure import find_structure
from unmask.systems.compression.surgery import cut


def vit(width: int, depth: int, heads: int) -> UserModel:
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        arguments = {"img_size": 32, "patch_size": 4, "embed_dim": width, "depth": depth, "num_heads": heads}
        model = open_model("timm/vit_tiny_patch16_224", pretrained=False, classes=10, **arguments)
    for p in model.module.parameters():
        if p.ndim > 1:
            p.data.mul_(2)  # as after a training: hidden units move the answers
    return model


def bert() -> UserModel:
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=1000,
        hidden_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=256,
        num_labels=77,
    )
    model = open_model(BertForSequenceClassification(config))
    for p in model.module.parameters():
        if p.ndim > 1:
            p.data.mul_(2)
    return model


def latency(model: UserModel, share: float) -> None:
    structure = find_structure(model)
    config = OPTIN.Config(importance="magnitude")
    scores, _ = OPTIN(config).scores(model, structure, model.example(2), Seeded(0))
    batch = model.example(32)
    smaller = cut(model, Frame(model, structure, Budget("macs", share), batch).keep(scores))
    times = measure.latencies({"dense": model, "cut": smaller}, batch, repeats=25, seconds=30)
    macs = measure.macs(smaller) / measure.macs(model)
    dense, after = times["dense"], times["cut"]
    print(
        f"latency, batch of 32: dense {dense['median']:.1f} ms, at {100 * macs:.0f} % of the MACs {after['median']:.1f} ms"
    )
    print(f"  ratio {dense['median'] / after['median']:.2f} (quartiles {after['low']:.1f} ... {after['high']:.1f})")


def search(model: UserModel, samples: int, every: int) -> None:
    structure = find_structure(model)
    inputs = model.inputs(model.example(samples, 12))
    count = samples * (12 if model.text else 65)
    rows = permutation(Seeded(0), "row_permutation", (count,))[:768] if count > 768 else None
    work = Trajectories(model, structure, inputs, Setting(position="mlp", rows=rows))
    base, plain, fast, compared, total = work.base(), 0.0, 0.0, 0, 0
    for kind, layers in (("head", work.heads), ("neuron", work.neurons)):
        for layer, one in enumerate(layers):
            if one is None:
                continue
            # side by side, so that both see the same machine: some units by the loop, twice as many in groups, both scaled up
            some = one.count if kind == "head" else max(one.count // every, 2)
            seconds, theirs = timed(work._plain(kind, layer, one, base), some)
            plain += seconds * one.count
            seconds, ours = timed(work._fast(kind, layer, one, base), 2 * some)
            fast += seconds * one.count
            total += one.count
            compared += len(theirs)
            for mine, other in zip(ours, theirs, strict=False):
                for a, b in zip(mine, other, strict=True):
                    assert abs(a - b) <= 2e-3 * abs(b) + 1e-3, (kind, layer, a, b)
    print(f"{model.name}: importance of {total:,} units, {samples} samples: the loop {plain:.0f} s, ours {fast:.1f} s")
    print(f"  ratio {plain / fast:.1f} ({compared} units of the loop timed; scores equal to 2e-3)")


def timed(parts: Iterator[tuple[int, Tensor, Tensor]], units: int) -> tuple[float, list[tuple[float, float]]]:
    """Seconds a unit, and the terms, of the first units and whatever came in the same batch."""
    found: list[tuple[float, float]] = []
    began = time.perf_counter()
    for _, md, kl in parts:
        found += list(zip(md.tolist(), kl.tolist(), strict=True))
        if len(found) >= units:
            break
    return (time.perf_counter() - began) / len(found), found


def main() -> None:
    parser = argparse.ArgumentParser()
    for name, value in (("width", 192), ("depth", 6), ("heads", 3), ("samples", 16), ("every", 24)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--share", type=float, default=0.6)
    given = parser.parse_args()
    torch.set_num_threads(1)
    model = vit(given.width, given.depth, given.heads)
    latency(model, given.share)
    search(bert(), 64, 16)
    search(bert(), 8, 16)
    search(model, 4, given.every)
    search(model, given.samples, given.every)


if __name__ == "__main__":
    main()
