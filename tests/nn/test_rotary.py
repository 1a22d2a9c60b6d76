"""Rotary positions: what makes them rotations, and how each way of stretching behaves."""

import math

import pytest
import torch

from unmask.errors import UserError
from unmask.nn.rotary import METHODS, base_frequencies, rotary_tables, rotate, stretched_frequencies

GRID = torch.stack(torch.meshgrid(torch.arange(6), torch.arange(4), indexing="xy")).flatten(1)[None]  # (column, row)
STRETCHED = [m for m in METHODS if m != "normal"]


def test_a_logit_depends_on_the_distance_in_rows_and_columns_alone():
    q, k = torch.randn(2, 1, 1, 1, 16)
    cos, sin = rotary_tables(GRID, head_dim=16)
    logits = (rotate(q.expand(1, 1, 24, 16), cos, sin) @ rotate(k.expand(1, 1, 24, 16), cos, sin).mT)[0, 0]
    logits = logits.reshape(4, 6, 4, 6)
    assert torch.allclose(logits[0, 0, 2, 3], logits[1, 2, 3, 5], atol=1e-5)
    assert not torch.allclose(logits[0, 0, 2, 3], logits[0, 0, 3, 2], atol=1e-4)


def test_turning_keeps_lengths_and_the_origin():
    x = torch.randn(2, 3, 24, 16)
    cos, sin = rotary_tables(GRID, head_dim=16)
    turned = rotate(x, cos.expand(2, -1, -1), sin.expand(2, -1, -1))
    assert torch.allclose(turned.norm(dim=-1), x.norm(dim=-1), atol=1e-5)
    assert torch.equal(turned[:, :, 0], x[:, :, 0])


@pytest.mark.parametrize("method", STRETCHED)
@pytest.mark.parametrize("decouple", [True, False])
def test_nothing_is_stretched_within_the_length_of_training(method, decouple):
    plain = rotary_tables(GRID, head_dim=16)
    found = rotary_tables(GRID, head_dim=16, method=method, decouple=decouple, trained=24, lengths=(4, 6))
    # the ramps of these two mix methods that agree at s = 1; the factors are 1 below twice the length
    for a, b in zip(plain, found, strict=True):
        assert torch.allclose(a, b, atol=1e-6)


@pytest.mark.parametrize("method", STRETCHED)
def test_a_decoupled_axis_is_stretched_by_its_own_length(method):
    options = {"head_dim": 16, "method": method, "trained": 4}
    wide = rotary_tables(GRID, decouple=True, lengths=(4, 16), **options)[0]
    square = rotary_tables(GRID, decouple=False, lengths=(4, 16), **options)[0]
    assert torch.allclose(wide[..., 8:], square[..., 8:])
    if method not in ("yarn", "ntk-aware-pro1", "ntk-aware-pro2"):  # whose factor looks at both sides
        assert torch.allclose(wide[..., :8], rotary_tables(GRID, head_dim=16)[0][..., :8])


@pytest.mark.parametrize("method", STRETCHED)
def test_lengths_of_samples_and_tokens_are_each_used(method):
    options = {"head_dim": 16, "method": method, "trained": 2, "decouple": True}
    lengths = torch.tensor([[4, 6], [8, 3]])
    both = rotary_tables(GRID.expand(2, -1, -1), lengths=lengths, **options)[0]
    for i in range(2):
        assert torch.equal(both[i], rotary_tables(GRID, lengths=lengths[i], **options)[0][0])
    tokens = lengths[:, None].expand(2, 24, 2)
    assert torch.equal(both, rotary_tables(GRID.expand(2, -1, -1), lengths=tokens, **options)[0])


def test_the_slowest_channel_reaches_as_far_as_it_did_and_the_fastest_stays():
    plain = base_frequencies(16, 10000.0)
    ntk = stretched_frequencies(16, 10000.0, "ntk-aware", 8.0, torch.tensor([32.0]))[0]
    assert ntk[0] == plain[0]
    assert torch.allclose(ntk[-1], plain[-1] / 4)
    assert torch.allclose(stretched_frequencies(16, 10000.0, "linear", 8.0, torch.tensor(32.0)), plain / 4)


def test_factors_look_at_the_longer_side():
    cos = rotary_tables(GRID, head_dim=16, method="yarn", decouple=True, trained=4, lengths=(4, 16))[0]
    assert torch.allclose(cos[0, 0], torch.full((16,), 0.1 * math.log(4) + 1))
    cos = rotary_tables(GRID, head_dim=16, method="ntk-aware-pro1", trained=4, lengths=(4, 16))[0]
    assert torch.allclose(cos[0, 0], torch.full((16,), math.sqrt(math.log(32) / math.log(4))))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"head_dim": 6}, "head_dim=6.*divisible by 4"),
        ({"head_dim": 8, "method": "ntk"}, "no rotary method 'ntk'.*ntk-aware"),
        ({"head_dim": 8, "method": "yarn"}, "needs the length of training"),
    ],
)
def test_what_does_not_fit_is_said(options, words):
    with pytest.raises(UserError, match=words):
        rotary_tables(GRID, **options)
