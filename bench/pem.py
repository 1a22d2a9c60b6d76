"""The head of PEM against transformers' Mask2Former head (CPU): the same maps in, class and mask logits out.

    python bench/pem.py [--size 512x512] [--queries 100] [--rounds 5] [--threads N] [--train] [--json FILE]

Both sides take the same four maps of a ResNet-50 (256, 512, 1024, 2048 channels at strides 4 ... 32), 100 queries, 19 classes,
width 256, and do the published number of layers: ours a convolutional pixel decoder (128) and 6 layers of prototype attention,
theirs 6 layers of multi-scale deformable attention and 9 of masked attention; "theirs, 6 layers" is the same with 6. The
shapes of the answers are asserted equal. Where weights can be shared they are: our masked attention with theirs' weights
must give their numbers. "formulation": PEM's own head written as its authors did (all similarities, all masks in full), whose
outputs must equal ours. All sides take turns; ratios are of medians.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from unmask.systems.prediction.pem.attention import MaskedAttention, Memory, PrototypeAttention, picked_by_head
from unmask.systems.prediction.pem.head import HeadConfig, PEMHead
from unmask.systems.prediction.pem.query_decoder import Predictions, QueryDecoder

DIMS, CLASSES = (256, 512, 1024, 2048), 19
Answer = tuple[Tensor, Tensor]
Side = Callable[[list[Tensor]], Answer]


def maps_of(size: tuple[int, int]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [
        torch.randn(1, dim, size[0] // stride, size[1] // stride, generator=generator)
        for dim, stride in zip(DIMS, (4, 8, 16, 32), strict=True)
    ]


# --- ours ---


def ours(queries: int) -> PEMHead:
    torch.manual_seed(0)
    head = PEMHead(HeadConfig(queries=queries), DIMS, CLASSES)
    for module in head.modules():  # statistics as after a training, not 0 and 1
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.uniform_(-0.1, 0.1)
            module.running_var.uniform_(0.8, 1.2)
    return head.eval()


def answer(head: PEMHead, maps: list[Tensor]) -> Answer:
    found = head(maps)
    return found.logits[-1], found.masks()


class Formulation(QueryDecoder):
    """The same decoder as its authors wrote it: all masks in full, all similarities at once, positions anew in each layer."""

    def forward(self, memories: list[Tensor], features: Tensor) -> Predictions:
        read = self.memories(memories)
        queries, position = self.query_feat.weight.expand(len(features), -1, -1), self.query_embed.weight[None]
        found = Predictions([], [], features)
        for place, layer in enumerate(self.layers):
            self.predict(queries, found)
            memory = read[place % len(read)]
            masks = F.interpolate(found.masks(), size=memory.size, mode="bilinear", align_corners=False)
            queries = layer(queries, position, memory, masks.flatten(2))
        self.predict(queries, found)
        return found


def plain_look(self: PrototypeAttention, queries: Tensor, where: Tensor, memory: Memory, logits: Tensor) -> Tensor:
    """PrototypeAttention.forward with the whole ``[B, heads, N, Q]`` tensor."""
    placed = memory.placed.transpose(1, 2).unflatten(2, memory.size).contiguous()
    x = self.memory_conv(self.memory_norm(placed)).flatten(2).transpose(1, 2)
    found, asked = (
        F.normalize(self.memory_out(x), dim=-1),
        F.normalize(self.query_out(self.query_norm(queries + where)), dim=-1),
    )
    keys, wanted = (t.unflatten(2, (self.num_heads, -1)).transpose(1, 2) for t in (found, asked))
    similar = keys @ wanted.mT
    hidden = (logits < 0).mT
    hidden = hidden & ~hidden.flatten(1).all(dim=1)[:, None, None]
    index = similar.masked_fill(hidden[:, None], -torch.inf).argmax(dim=2).transpose(1, 2)
    picked = picked_by_head(found, index)
    product = F.normalize(self.proj(picked * asked), dim=1)
    return queries + self.final(product * self.alpha + picked)


def formulation(head: PEMHead) -> Side:
    """The given head's weights in the authors' formulation."""
    import copy
    import types

    twin = copy.deepcopy(head)
    twin.decoder.__class__ = Formulation
    for layer in twin.decoder.layers:
        layer.look.forward = types.MethodType(plain_look, layer.look)
    return lambda maps: answer(twin, maps)


# --- transformers ---


def theirs(queries: int, layers: int) -> nn.Module:
    from transformers import Mask2FormerConfig, SwinConfig
    from transformers.models.mask2former.modeling_mask2former import (
        Mask2FormerPixelDecoder,
        Mask2FormerTransformerModule,
    )

    config = Mask2FormerConfig(
        backbone_config=SwinConfig(depths=[1, 1, 1, 1]),
        num_queries=queries,
        num_labels=CLASSES,
        decoder_layers=layers + 1,
    )

    class Peer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.pixel_decoder = Mask2FormerPixelDecoder(config, feature_channels=list(DIMS))
            self.decoder = Mask2FormerTransformerModule(in_features=config.feature_size, config=config)
            self.classify = nn.Linear(config.hidden_dim, CLASSES + 1)

        def forward(self, maps: list[Tensor]) -> Answer:
            pixels = self.pixel_decoder(maps, output_hidden_states=False)
            found = self.decoder(
                multi_scale_features=pixels.multi_scale_features,
                mask_features=pixels.mask_features,
                output_hidden_states=True,
                output_attentions=False,
            )
            logits = [self.classify(x.transpose(0, 1)) for x in found.intermediate_hidden_states]
            return logits[-1], found.masks_queries_logits[-1]

    torch.manual_seed(0)
    return Peer().eval()


def masked_attention_gap(peer: Any) -> float:
    """Our masked attention with the peer's weights against the peer's own: the largest difference."""
    layer = peer.decoder.decoder.layers[0]
    mine = MaskedAttention(256, 8, pre_norm=layer.pre_norm).eval()
    own = layer.cross_attn
    with torch.no_grad():
        mine.attention.qkv.weight.copy_(own.in_proj_weight)
        mine.attention.qkv.bias.copy_(own.in_proj_bias)
        mine.attention.proj.weight.copy_(own.out_proj.weight)
        mine.attention.proj.bias.copy_(own.out_proj.bias)
        mine.norm.load_state_dict(layer.cross_attn_layer_norm.state_dict())
        plain, position, queries, where = (torch.randn(1, n, 256) for n in (60, 60, 5, 5))
        logits = torch.randn(1, 5, 60)
        asked = (mine.norm(queries) if layer.pre_norm else queries) + where
        turned = [t.transpose(0, 1) for t in (asked, plain + position, plain)]  # theirs has batches second
        wanted = queries + own(*turned, attn_mask=(logits < 0).expand(8, -1, -1))[0].transpose(0, 1)
        wanted = wanted if layer.pre_norm else mine.norm(wanted)
        return float((mine(queries, where, Memory(plain, position, (6, 10)), logits) - wanted).abs().max())


def timed(side: Side, maps: list[Tensor], *, train: bool) -> float:
    start = time.perf_counter()
    if train:
        logits, masks = side(maps)
        (logits.square().mean() + masks.square().mean()).backward()
    else:
        with torch.no_grad():
            side(maps)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--size", default="512x512", help="height x width of the image the maps belong to")
    parser.add_argument("--queries", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--train", action="store_true", help="forward and backward")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    if options.threads:
        torch.set_num_threads(options.threads)
    height, width = (int(side) for side in options.size.split("x"))
    maps = maps_of((height, width))

    head = ours(options.queries)
    sides: dict[str, Side] = {"unmask": lambda x: answer(head, x), "formulation": formulation(head)}
    with torch.no_grad():
        first, second = (side(maps) for side in sides.values())
    for one, other in zip(first, second, strict=True):
        gap = float((one - other).abs().max() / other.abs().max())
        assert gap < 1e-3, f"the authors' formulation differs by {gap:.2g}"
        print(f"formulation: outputs differ by {gap:.1e} of their size (allowed: 1e-3)")
    try:
        for name, layers in (("transformers", 9), ("transformers, 6 layers", 6)):
            peer = theirs(options.queries, layers)
            with torch.no_grad():
                shapes = [tuple(t.shape) for t in peer(maps)]
            assert shapes == [tuple(t.shape) for t in first], f"{name}: other shapes: {shapes}"
            sides[name] = peer
        difference = masked_attention_gap(peer)
        assert difference < 1e-4, f"masked attention differs by {difference:.2g}"
        print(f"transformers: same shapes; masked attention with shared weights differs by {difference:.1e}")
    except ImportError as error:
        print(f"transformers: left out, {error}")

    times: dict[str, list[float]] = {name: [] for name in sides}
    for side in sides.values():
        timed(side, maps, train=options.train)  # warm-up
    for number in range(options.rounds):
        for name in list(sides)[:: 1 if number % 2 else -1]:
            times[name].append(timed(sides[name], maps, train=options.train))
    medians = {name: statistics.median(values) for name, values in times.items()}
    report: dict[str, Any] = {
        "benchmark": "pem",
        "size": [height, width],
        "what": "forward and backward" if options.train else "forward",
        "threads": torch.get_num_threads(),
        "seconds": medians,
        "ratio": {name: value / medians["unmask"] for name, value in medians.items() if name != "unmask"},
    }
    for name, value in medians.items():
        print(f"  {name:24} {value * 1e3:7.0f} ms")
    for name, value in report["ratio"].items():
        print(f"{name}: {value:.2f}x the time of ours")
    if options.json:
        options.json.write_text(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
