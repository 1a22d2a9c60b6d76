"""Residual networks for small images."""

import pytest
import torch

from unmask.backbones import build
from unmask.errors import UserError


def test_maps_have_the_sizes_they_promise():
    encoder = build("resnet_nano", image_size=32).eval()
    maps = encoder.maps(torch.randn(2, 3, 32, 32))
    assert [tuple(m.shape[1:]) for m in maps] == [
        (d, 32 // s, 32 // s) for d, s in zip(encoder.map_dims, encoder.strides, strict=True)
    ]
    assert encoder.tokens(torch.randn(1, 3, 33, 30)).shape[1] == encoder.grid((33, 30))[0] * encoder.grid((33, 30))[1]


def test_layers_count_from_the_stem_to_the_last_block():
    encoder = build("resnet_micro", layers=[2, 1, 1])
    assert [encoder.layer_of(n) for n in ("conv1.weight", "layer1.1.conv1.weight", "layer3.0.bn1.bias")] == [0, 2, 4]
    assert encoder.num_layers >= 4


def test_stages_that_do_not_match_are_refused():
    with pytest.raises(UserError, match="the same stages"):
        build("resnet_nano", layers=[1, 1])
    with pytest.raises(UserError, match="did you mean resnet_nano"):
        build("resnet_nan")
