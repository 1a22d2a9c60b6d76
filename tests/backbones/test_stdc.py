"""STDC: its shapes, its stages, and the authors' files."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from unmask.backbones import build
from unmask.backbones.stdc.official import load_official
from unmask.errors import UserError
from unmask.official.export import export_encoder


def small(name: str = "stdc1", **options):
    torch.manual_seed(0)
    return build(name, base=8, **options).eval()


@pytest.mark.parametrize("size", [(64, 96), (50, 70)])
def test_maps_halve_four_times_and_round_up(size):
    encoder = small()
    maps = encoder.maps(torch.zeros(1, 3, *size))
    assert [tuple(m.shape[2:]) for m in maps] == [tuple(-(-s // t) for s in size) for t in (4, 8, 16, 32)]
    assert tuple(m.shape[1] for m in maps) == encoder.map_dims == (8, 32, 64, 128)
    assert encoder.tokens(torch.zeros(1, 3, *size)).shape == (1, maps[-1][0, 0].numel(), 128)
    assert encoder.grid(size) == tuple(maps[-1].shape[2:])


def test_the_two_published_networks_have_their_published_depths_and_weights():
    """8.4 and 12.5 million parameters with the classifier of 1,024 x 1,024 + 1,024 x 1,000 and its convolution."""
    one, two = build("stdc1"), build("stdc2")
    assert (one.num_layers, two.num_layers) == (8, 14)
    assert one.map_dims == (64, 256, 512, 1024)
    millions = [sum(p.numel() for p in e.parameters()) / 1e6 for e in (one, two)]
    assert 5 < millions[0] < 6.5
    assert 9 < millions[1] < 10.5


def test_a_strided_blocks_own_share_is_the_mean_over_nine_places_before_its_depthwise_convolution():
    encoder = small()
    block = encoder.features[2]
    x = torch.randn(1, 8, 8, 8)
    share = nn.functional.avg_pool2d(block.conv_list[0](x), 3, 2, 1)
    assert torch.allclose(block(x)[:, :16], share)


def test_layers_are_numbered_by_depth():
    encoder = small()
    depths = [encoder.layer_of(n) for n, _ in encoder.named_parameters()]
    assert depths == sorted(depths)
    assert (depths[0], depths[-1]) == (1, encoder.num_layers)


@pytest.mark.parametrize(
    "options", [{}, {"layers": (4, 5, 3)}, {"layers": (1, 3, 2), "in_channels": 1, "block_num": 3}]
)
def test_the_authors_files_load_with_their_second_copies_and_classifier(options):
    encoder = small(**options)
    state = {k: v for k, v in encoder.state_dict().items() if "tracked" not in k}
    twice = {f"x2.0.{k.removeprefix('features.0.')}": v for k, v in state.items() if k.startswith("features.0.")}
    head = {"fc.weight": torch.zeros(2, 2), "bn.weight": torch.zeros(2), "linear.weight": torch.zeros(2, 2)}
    for prefix in ("", "backbone."):
        loaded = load_official({prefix + k: v for k, v in {**state, **twice, **head}.items()})
        x = torch.randn(1, encoder.in_channels, 64, 64)
        assert torch.equal(loaded.maps(x)[-1], encoder.maps(x)[-1])
        again = build(loaded.name, **loaded.options)
        assert set(again.state_dict()) == set(loaded.state_dict())


def test_group_norm_needs_no_second_image():
    encoder = small(norm="gn").train()
    assert torch.isfinite(encoder.maps(torch.randn(1, 3, 32, 32))[-1]).all()
    assert not any(isinstance(m, nn.BatchNorm2d) for m in encoder.modules())


def test_what_does_not_fit_is_told(tmp_path):
    with pytest.raises(UserError, match="base=3"):
        build("stdc1", base=3)
    with pytest.raises(UserError, match="did you mean stdc1"):
        build("stdc11")
    with pytest.raises(UserError, match="not the weights of an STDC"):
        load_official({"layer1.0.conv1.weight": torch.zeros(1)})
    with pytest.raises(UserError):
        export_encoder(small(), "timm", tmp_path / "timm")


def test_weights_from_a_file(tmp_path):
    encoder = small()
    torch.save({"state_dict": encoder.state_dict()}, tmp_path / "stdc.tar")
    loaded = build("stdc1", base=8, weights=str(tmp_path / "stdc.tar")).eval()
    x = torch.randn(1, 3, 32, 32)
    assert torch.equal(loaded.maps(x)[-1], encoder.maps(x)[-1])
