"""Modulations of all blocks at once, the embedding of times, and SwiGLU, against their plain forms."""

import math

import pytest
import torch
from torch.nn import functional as F

from unmask.nn.adaln import Modulations, StackedLinear, modulated
from unmask.nn.swiglu import SwiGLU
from unmask.nn.timestep import ClassEmbedding, TimeEmbedding, sinusoid


def test_stacked_layers_are_their_layers():
    layers = StackedLinear(3, 8, 5)
    torch.nn.init.normal_(layers.bias)
    x = torch.randn(4, 8)
    each = torch.stack([F.linear(x, w, b) for w, b in zip(layers.weight, layers.bias, strict=True)])
    assert torch.allclose(layers.shared(x), each, atol=1e-6)
    assert torch.allclose(layers(x.expand(3, -1, -1)), each, atol=1e-6)


@pytest.mark.parametrize("kind", ["normal", "lora", "swiglu"])
@pytest.mark.parametrize("parts", [2, 6])
def test_every_kind_starts_at_zero_and_then_differs_by_block(kind, parts):
    modulations = Modulations(3, 8, parts, kind=kind, rank=2)
    c = torch.randn(5, 8)
    assert torch.equal(modulations(c), torch.zeros(3, 5, parts, 8))
    for parameter in modulations.parameters():
        torch.nn.init.normal_(parameter)
    out = modulations(c)
    assert out.shape == (3, 5, parts, 8)
    assert not torch.allclose(out[0], out[1])
    assert torch.allclose(modulations(c[:2]), out[:, :2], atol=1e-5)


def test_low_rank_modulations_share_one_layer_between_blocks():
    modulations = Modulations(3, 8, 6, kind="lora", rank=2)
    torch.nn.init.normal_(modulations.everywhere.weight)
    out = modulations(torch.randn(2, 8))
    assert torch.equal(out[0], out[2])
    assert out.abs().sum() > 0


def test_modulation_is_scale_and_shift():
    x, shift, scale = torch.randn(2, 3, 4), torch.randn(2, 1, 4), torch.randn(2, 1, 4)
    assert torch.allclose(modulated(x, shift, scale), x * (1 + scale) + shift)


def test_the_sinusoid_is_cosines_then_sines():
    found = sinusoid(torch.tensor([3.0, 0.5]), 8)
    assert torch.allclose(found[1], torch.tensor([*(math.cos(0.5 * 10.0**-k) for k in range(4)),
                                                  *(math.sin(0.5 * 10.0**-k) for k in range(4))]))  # fmt: skip
    assert TimeEmbedding(16)(torch.tensor([1, 999])).shape == (2, 16)
    assert ClassEmbedding(10, 16)(torch.tensor([10])).shape == (1, 16)


def test_swiglu_gates():
    layer, x = SwiGLU(4, 6, 3), torch.randn(2, 4)
    assert torch.allclose(layer(x), layer.fc2(F.silu(layer.fc1_g(x)) * layer.fc1_x(x)))
    assert layer(x).shape == (2, 3)
