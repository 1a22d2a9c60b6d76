"""One MAE training step (ViT-S/16, 224 pixels, CPU): ours against transformers, lightly and stable-pretraining.

    python bench/mae.py [--batch 16] [--rounds 5] [--threads N] [--json FILE]

Every side takes the same images, a 512-wide decoder of 8 blocks, 75 % hidden, normalised targets, and AdamW. All sides take
turns; ratios are of medians. "best": each side at its faster precision of fp32 and bf16 autocast (ours also compiles its
blocks, as `compile=auto` does for a long run). With transformers and lightly the weights and the mask are shared and the
losses asserted equal; stable-pretraining's decoder has no class token, so there only the same size of loss is asserted.
A peer that is not installed is left out, and said so.
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

from unmask.draw import Replay, Seeded
from unmask.nn.positions import sincos_table
from unmask.systems.pretraining.mae.model import MAE
from unmask.systems.pretraining.mae.official import load_mae

WIDTH, DEPTH, HEADS = 384, 12, 6
Loss = Callable[[Tensor], Tensor]


def ours() -> MAE:
    torch.manual_seed(0)
    return MAE(MAE.Config(backbone={"name": "vit_small_patch16", "image_size": 224})).train()


def transformers_side(images: Tensor) -> tuple[nn.Module, Loss, Loss]:
    """The peer, its loss, and ours with the peer's weights on the peer's mask."""
    from transformers import ViTMAEConfig, ViTMAEForPreTraining

    peer = ViTMAEForPreTraining(
        ViTMAEConfig(
            hidden_size=WIDTH,
            num_hidden_layers=DEPTH,
            num_attention_heads=HEADS,
            intermediate_size=4 * WIDTH,
            norm_pix_loss=True,
            layer_norm_eps=1e-6,
        )
    ).train()
    with torch.no_grad():  # a model made from a config has its fixed tables at zero
        peer.vit.embeddings.position_embeddings[0, 1:] = sincos_table(WIDTH, (14, 14))
        peer.decoder.decoder_pos_embed[0, 1:] = sincos_table(512, (14, 14))
    noise = torch.rand(len(images), 196, generator=torch.Generator().manual_seed(2))
    mine = load_mae(ours(), from_transformers(peer.state_dict()))
    return (
        peer,
        lambda x: peer(pixel_values=x).loss,
        lambda x: peer(pixel_values=x, noise=noise).loss - mine.loss({"image": x}, Replay({"noise": noise}))["loss"],
    )


def from_transformers(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """transformers' names as the MAE authors'."""
    plain = [
        ("vit.embeddings.cls_token", "cls_token"),
        ("vit.embeddings.position_embeddings", "pos_embed"),
        ("vit.embeddings.patch_embeddings.projection", "patch_embed.proj"),
        ("vit.layernorm", "norm"),
        ("decoder.mask_token", "mask_token"),
        ("decoder.decoder_pos_embed", "decoder_pos_embed"),
        ("decoder.decoder_embed", "decoder_embed"),
        ("decoder.decoder_norm", "decoder_norm"),
        ("decoder.decoder_pred", "decoder_pred"),
        ("vit.encoder.layer.", "blocks."),
        ("vit.layers.", "blocks."),
        ("decoder.decoder_layers.", "decoder_blocks."),
        (".layernorm_before", ".norm1"),
        (".layernorm_after", ".norm2"),
        (".attention.output.dense", ".attn.proj"),
        (".attention.o_proj", ".attn.proj"),
        (".intermediate.dense", ".mlp.fc1"),
        (".mlp.fc1", ".mlp.fc1"),
        (".output.dense", ".mlp.fc2"),
    ]
    out: dict[str, Tensor] = {}
    parts: dict[str, dict[str, Tensor]] = {}
    for name, value in state.items():
        for theirs, mine in plain:
            name = name.replace(theirs, mine)
        for word, part in (
            (".query.", "q"),
            (".key.", "k"),
            (".value.", "v"),
            (".q_proj.", "q"),
            (".k_proj.", "k"),
            (".v_proj.", "v"),
        ):
            if word in name:
                block = name.split(".attention")[0] + ".attn.qkv." + name.rpartition(".")[2]
                parts.setdefault(block, {})[part] = value
                break
        else:
            out[name] = value
    return out | {name: torch.cat([found[p] for p in "qkv"]) for name, found in parts.items()}


def lightly_side(images: Tensor) -> tuple[nn.Module, Loss, Loss]:
    from lightly.models import utils
    from lightly.models.modules import MAEDecoderTIMM, MaskedVisionTransformerTIMM
    from timm.models.vision_transformer import vit_small_patch16_224

    class Peer(nn.Module):
        """The model of lightly's MAE example."""

        def __init__(self) -> None:
            super().__init__()
            self.backbone = MaskedVisionTransformerTIMM(vit=vit_small_patch16_224(num_classes=0))
            self.sequence = self.backbone.sequence_length
            self.decoder = MAEDecoderTIMM(
                num_patches=196,
                patch_size=16,
                embed_dim=WIDTH,
                decoder_embed_dim=512,
                decoder_depth=8,
                decoder_num_heads=16,
            )

        def forward(self, x: Tensor, drawn: tuple[Tensor, Tensor] | None = None) -> Tensor:
            keep, hide = drawn or utils.random_token_mask((len(x), self.sequence), mask_ratio=0.75, device=x.device)
            encoded = self.decoder.embed(self.backbone.encode(images=x, idx_keep=keep))
            whole = utils.repeat_token(self.decoder.mask_token, (len(x), self.sequence))
            whole = utils.set_at_index(whole, keep, encoded.type_as(whole))
            predicted = self.decoder.predict(utils.get_at_index(self.decoder.decode(whole), hide))
            target = utils.get_at_index(utils.patchify(x, 16), hide - 1)
            target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6) ** 0.5
            return nn.functional.mse_loss(predicted.float(), target)

    peer = Peer().train()
    noise = torch.rand(len(images), 196, generator=torch.Generator().manual_seed(2))
    order = noise.argsort(1)
    keep = torch.cat((torch.zeros(len(images), 1, dtype=torch.int64), order[:, :49] + 1), 1)
    state = {n.removeprefix("backbone.vit.").removeprefix("decoder."): v for n, v in peer.state_dict().items()}
    mine = load_mae(ours(), {n: v for n, v in state.items() if n not in ("backbone.mask_token",)})
    return (
        peer,
        peer.forward,
        lambda x: peer(x, (keep, order[:, 49:] + 1)) - mine.loss({"image": x}, Replay({"noise": noise}))["loss"],
    )


def stable_pretraining_side(images: Tensor) -> tuple[nn.Module, Loss, Loss]:
    from stable_pretraining.methods import MAE as Peer

    peer, mine = Peer("vit_small_patch16_224").train(), ours()
    # another decoder: two untrained networks of the same recipe must at least see the same size of problem
    return peer, lambda x: peer(x).loss, lambda x: peer(x).loss - mine.loss({"image": x}, Seeded(0))["loss"]


SIDES = {"transformers": transformers_side, "lightly": lightly_side, "stable-pretraining": stable_pretraining_side}

TOLERANCE = {"transformers": 1e-4, "lightly": 1e-4, "stable-pretraining": 1.0}


def stepper(model: nn.Module, loss: Loss, precision: str) -> Callable[[Tensor], float]:
    """A function that takes one training step and returns its seconds."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.05, fused=True)

    def step(images: Tensor) -> float:
        start = time.perf_counter()
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cpu", torch.bfloat16) if precision.startswith("bf16") else nullcontext():
            value = loss(images)
        value.backward()
        optimizer.step()
        return time.perf_counter() - start

    return step


def our_stepper(precision: str) -> Callable[[Tensor], float]:
    model = ours()
    if precision.endswith("compiled"):
        for block in model.blocks_to_compile():
            block.compile(dynamic=False)
    count = iter(range(10**9))
    return stepper(model, lambda x: model.loss({"image": x}, Seeded(0, next(count)))["loss"], precision)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    if options.threads:
        torch.set_num_threads(options.threads)
    images = torch.randn(options.batch, 3, 224, 224, generator=torch.Generator().manual_seed(1))

    steps: dict[str, Callable[[Tensor], float]] = {
        f"unmask {p}": our_stepper(p) for p in ("fp32", "fp32 compiled", "bf16", "bf16 compiled")
    }
    peers = []
    for name, make in SIDES.items():
        try:
            peer, loss, gap = make(images[:2])
        except ImportError as error:
            print(f"{name}: left out, {error}")
            continue
        with torch.no_grad():
            difference = abs(float(gap(images[:2])))
        assert difference < TOLERANCE[name], f"{name}: losses differ by {difference:.2g}"
        print(f"{name}: losses differ by {difference:.1e} (allowed: {TOLERANCE[name]:g})")
        peers.append(name)
        steps |= {f"{name} {p}": stepper(peer, loss, p) for p in ("fp32", "bf16")}

    for step in steps.values():
        step(images)  # warm-up and compilation
    times: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(options.rounds):
        for name in list(steps)[:: 1 if number % 2 else -1]:
            times[name].append(steps[name](images))
    medians = {name: statistics.median(values) for name, values in times.items()}
    for name, value in medians.items():
        print(f"  {name:28} {value * 1e3:7.0f} ms")
    report: dict[str, Any] = {
        "benchmark": "mae",
        "batch": options.batch,
        "threads": torch.get_num_threads(),
        "seconds": medians,
    }
    best = min((v, n) for n, v in medians.items() if n.startswith("unmask"))
    single = min(v for n, v in medians.items() if n.startswith("unmask fp32"))
    for peer in peers:
        theirs = min((v, n) for n, v in medians.items() if n.startswith(peer))
        report[peer] = {"best": theirs[0] / best[0], "fp32": medians[f"{peer} fp32"] / single}
        print(
            f"{peer}: best {report[peer]['best']:.2f}x ({best[1]} against {theirs[1]}), fp32 {report[peer]['fp32']:.2f}x"
        )
    if options.json:
        options.json.write_text(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
