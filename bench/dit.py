"""DiT's training step and sampling step (S/2 on 32 x 32 latents, CPU): ours against diffusers' DiTTransformer2DModel.

    python bench/dit.py [--batch 8] [--rounds 5] [--threads N] [--variant S] [--json FILE]

Both sides hold the same weights and see the same latents, times, classes and noise; outputs and losses are asserted equal (with
the authors' sinusoid on both: diffusers divides by 127 where they divide by 128). A training step is noise prediction, backward
and AdamW; a sampling step is one guided DDIM step, both passes in one batch. The sides take turns; ratios are of medians. "best":
each side at its faster precision of fp32 and bf16 autocast; ours also compiles its blocks.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from unmask.systems.generation.diffusion import GaussianDiffusion
from unmask.systems.generation.dit.diffusers_names import to_diffusers
from unmask.systems.generation.dit.network import DiTNetwork
from unmask.systems.generation.dit.official import unstacked
from unmask.systems.generation.guidance import combined, doubled

CLASSES, CHANNELS, SIDE = 1000, 4, 32
Predict = Callable[[Tensor, Tensor, Tensor], Tensor]
PRECISIONS = ("fp32", "bf16")


def ours(variant: str) -> DiTNetwork:
    """The network with every weight at work: a zero start would leave the blocks' branches out of the comparison."""
    torch.manual_seed(0)
    config = DiTNetwork.Config(variant=variant, learn_sigma=False)
    network = DiTNetwork(config, in_channels=CHANNELS, grid=(SIDE // 2, SIDE // 2), classes=CLASSES)
    for parameter in network.parameters():
        parameter.data.add_(torch.randn(parameter.shape) * 0.02)
    return network.train()


def theirs(network: DiTNetwork) -> nn.Module:
    """diffusers' network with the same weights."""
    from diffusers import DiTTransformer2DModel

    c = network.config
    peer = DiTTransformer2DModel(
        num_attention_heads=c.num_heads,
        attention_head_dim=c.embed_dim // c.num_heads,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        num_layers=c.depth,
        sample_size=SIDE,
        patch_size=c.patch_size,
        num_embeds_ada_norm=CLASSES,
    )
    peer.load_state_dict(to_diffusers(unstacked(network.state_dict())))
    for block in peer.transformer_blocks:
        block.norm1.emb.time_proj.downscale_freq_shift = 0
        block.norm1.emb.class_embedder.dropout_prob = 0.0  # our loss below drops no class either
    return peer.train()


def training(network: nn.Module, predict: Predict, precision: str) -> Callable[[], float]:
    """A function that takes one training step and returns its seconds."""
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-5, weight_decay=0.0, fused=True)
    diffusion = GaussianDiffusion.of("linear", 1000)
    x0, noise, t, classes = inputs()
    noisy = diffusion.noisy(x0, t, noise)

    def step() -> float:
        start = time.perf_counter()
        optimizer.zero_grad(set_to_none=True)
        with within(precision):
            output = predict(noisy, t, classes)
        (output.float() - noise).square().mean().backward()
        optimizer.step()
        return time.perf_counter() - start

    return step


def sampling(predict: Predict, precision: str) -> Callable[[], float]:
    """A function that takes one guided DDIM step (times differ from call to call) and returns its seconds."""
    diffusion = GaussianDiffusion.of("linear", 1000).respaced(50)
    x, _, _, classes = inputs()
    both = torch.cat((classes, torch.full_like(classes, CLASSES)))
    count = iter(range(10**9))

    @torch.no_grad()
    def step() -> float:
        t = torch.full((len(x),), next(count) % 49 + 1)
        start = time.perf_counter()
        with within(precision):
            output = predict(doubled(x), doubled(diffusion.original(t)), both)
        epsilon = combined(output.float(), 1.5)
        before = diffusion.table("bar_before", t, x)
        _ = diffusion.x0_from_noise(x, t, epsilon) * before.sqrt() + (1 - before).sqrt() * epsilon
        return time.perf_counter() - start

    return step


def within(precision: str) -> Any:
    return torch.autocast("cpu", torch.bfloat16) if precision.startswith("bf16") else nullcontext()


BATCH = 8


def inputs() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x0, noise = torch.randn(2, BATCH, CHANNELS, SIDE, SIDE, generator=generator)
    t = torch.randint(0, 1000, (BATCH,), generator=generator)
    return x0, noise, t, torch.randint(0, CLASSES, (BATCH,), generator=generator)


def compiled(network: DiTNetwork) -> DiTNetwork:
    for block in network.blocks:
        block.compile(dynamic=False)
    return network


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--variant", default="S", choices=("S", "B", "L", "XL"))
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    global BATCH
    BATCH = options.batch
    if options.threads:
        torch.set_num_threads(options.threads)
    try:
        peer = theirs(ours(options.variant))
    except ImportError as error:
        print(f"diffusers: left out, {error}")
        return

    def ask(network: nn.Module) -> Predict:
        return lambda x, t, y: network(x, timestep=t, class_labels=y).sample

    mine = ours(options.variant)
    x0, noise, t, classes = inputs()
    with torch.no_grad():
        a, b = mine(x0, t, classes), ask(peer)(x0, t, classes)
        difference, size = float((a - b).abs().max()), float(b.abs().max())
        loss_gap = abs(float((a - noise).square().mean() - (b - noise).square().mean()))
    assert difference < 1e-4 * max(size, 1), f"outputs differ by {difference:.2g} of {size:.2g}"
    assert loss_gap < 1e-4, f"losses differ by {loss_gap:.2g}"
    print(f"outputs differ by {difference:.1e} (largest value {size:.2f}), losses by {loss_gap:.1e}")

    steps: dict[str, Callable[[], float]] = {}
    for precision in PRECISIONS:
        for name, make, ask_of in (
            ("unmask", lambda: ours(options.variant), lambda n: n),
            ("unmask", lambda: compiled(ours(options.variant)), lambda n: n),
            ("diffusers", lambda: theirs(ours(options.variant)), ask),
        ):
            network = make()
            kind = f"{precision} compiled" if f"{name} {precision} training" in steps else precision
            steps[f"{name} {kind} training"] = training(network, ask_of(network), precision)
            steps[f"{name} {kind} sampling"] = sampling(ask_of(network), precision)
    for step in steps.values():
        step()  # warm-up and compilation
    times: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(options.rounds):
        for name in list(steps)[:: 1 if number % 2 else -1]:
            times[name].append(steps[name]())
    medians = {name: statistics.median(values) for name, values in times.items()}
    for name, value in medians.items():
        print(f"  {name:32} {value * 1e3:7.0f} ms")
    report: dict[str, Any] = {
        "benchmark": "dit",
        "variant": options.variant,
        "batch": options.batch,
        "threads": torch.get_num_threads(),
        "seconds": medians,
    }
    for kind in ("training", "sampling"):
        fastest = {side: min((v, n) for n, v in medians.items() if n.startswith(side) and n.endswith(kind)) for side in
                   ("unmask", "diffusers")}  # fmt: skip
        same = medians[f"diffusers fp32 {kind}"] / medians[f"unmask fp32 {kind}"]
        report[kind] = {"best": fastest["diffusers"][0] / fastest["unmask"][0], "fp32": same}
        print(
            f"{kind} step: best {report[kind]['best']:.2f}x ({fastest['unmask'][1]} against {fastest['diffusers'][1]}), "
            f"fp32, neither compiled {same:.2f}x"
        )
    if options.json:
        options.json.write_text(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
