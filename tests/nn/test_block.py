import pytest
import torch
from torch.nn import functional as F

from unmask.errors import UserError
from unmask.nn.attention import Attention, _attend_by_products, attend
from unmask.nn.block import Block, drop_path, drop_path_rates
from unmask.nn.heads import BatchNormHead
from unmask.nn.losses import reconstruction_loss, standardise_patches

torch.manual_seed(0)


@pytest.mark.parametrize("bias", [None, "float", "bool"])
def test_both_ways_of_attending_agree_in_values_and_gradients(bias):
    q, k, v = (torch.randn(2, 3, 5, 8, requires_grad=True) for _ in range(3))
    extra = {None: None, "float": torch.randn(3, 5, 5), "bool": torch.rand(2, 1, 5, 5) > 0.3}[bias]
    if bias == "bool":
        extra[..., 0] = True
    plain = _attend_by_products(q, k, v, extra, None)
    fused = F.scaled_dot_product_attention(q, k, v, attn_mask=extra)
    assert torch.allclose(plain, fused, atol=1e-5)
    (got,) = torch.autograd.grad(plain.square().sum(), q, retain_graph=True)
    (wanted,) = torch.autograd.grad(fused.square().sum(), q)
    assert torch.allclose(got, wanted, atol=1e-4)
    with torch.no_grad():
        assert torch.allclose(attend(q, k, v, bias=extra), fused, atol=1e-5)


def test_the_returned_map_explains_the_output():
    attention = Attention(12, 3)
    x = torch.randn(2, 5, 12)
    out, weights = attention(x, need_map=True)
    value = attention.project(x)[2]
    assert torch.allclose(weights.sum(-1), torch.ones(2, 3, 5))
    assert torch.allclose(attention.proj((weights @ value).transpose(1, 2).flatten(2)), out, atol=1e-6)
    assert torch.allclose(attention(x), out, atol=1e-6)


def test_queries_and_values_alone_have_a_bias_in_beits_attention():
    attention = Attention(8, 2, qkv_bias="qv")
    names = dict(attention.named_parameters())
    assert "q_bias" in names
    assert "v_bias" in names
    assert "qkv.bias" not in names
    torch.nn.init.normal_(attention.q_bias)
    torch.nn.init.normal_(attention.v_bias)
    x, zero = torch.randn(1, 3, 8), torch.zeros(8)
    q, k, v = attention.project(x)
    wanted = F.linear(x, attention.qkv.weight, torch.cat((attention.q_bias, zero, attention.v_bias)))
    assert torch.allclose(torch.cat([t.transpose(1, 2).flatten(2) for t in (q, k, v)], -1), wanted, atol=1e-6)


def test_heads_that_do_not_divide_are_refused_with_the_nearest_that_do():
    with pytest.raises(UserError, match="num_heads=5 does not divide width 12: use 4 or 6"):
        Attention(12, 5)


@pytest.mark.parametrize("queries", [slice(2, None), torch.tensor([[1, 4], [3, 0]])])
def test_a_subset_of_queries_gets_the_values_of_the_whole(queries):
    block = Block(12, 3, init_values=0.5, qk_norm=True)
    x = torch.randn(2, 5, 12)
    whole = block(x)
    wanted = (
        whole[:, queries] if isinstance(queries, slice) else torch.stack([whole[i, q] for i, q in enumerate(queries)])
    )
    assert torch.allclose(block(x, queries=queries), wanted, atol=1e-6)


def test_context_replaces_what_is_looked_at():
    block = Block(12, 3)
    x, context = torch.randn(2, 5, 12), torch.randn(2, 7, 12)
    assert block(x, context=context).shape == (2, 5, 12)
    assert not torch.allclose(block(x, context=context), block(x))
    assert torch.allclose(block(x, context=block.norm1(x)), block(x), atol=1e-6)


def test_drop_path_zeroes_the_samples_below_the_rate_and_scales_the_others():
    x = torch.ones(4, 3, 2)
    out = drop_path(x, torch.tensor([0.1, 0.19, 0.2, 0.9]), 0.2)
    assert out[:, 0, 0].tolist() == [0, 0, 1.25, 1.25]
    assert drop_path(x, None, 0.2) is x
    assert drop_path_rates(0.3, 4) == pytest.approx([0, 0.1, 0.2, 0.3])


def test_standardised_patches_use_the_unbiased_variance():
    target = torch.tensor([[[1.0, 2.0, 3.0, 6.0]]])
    out, mean, deviation = standardise_patches(target)
    assert mean.item() == 3
    assert deviation.item() == pytest.approx((14 / 3 + 1e-6) ** 0.5)
    assert torch.allclose(out * deviation + mean, target)


@pytest.mark.parametrize("kind", ["l2", "l1", "smooth_l1"])
def test_reconstruction_loss_is_zero_only_for_the_target(kind):
    target = torch.randn(2, 3, 4)
    assert reconstruction_loss(target, target, kind=kind) == 0
    assert reconstruction_loss(target + 1, target, kind=kind) > 0
    weight = torch.tensor([[1.0, 0, 0], [0, 0, 0]])
    changed = target.clone()
    changed[0, 0] += 2
    whole = {"l2": 4.0, "l1": 2.0, "smooth_l1": 1.5}[kind]
    assert reconstruction_loss(changed, target, kind=kind, weight=weight).item() == pytest.approx(whole, abs=1e-5)


def test_the_probe_head_standardises_without_parameters_of_its_own():
    head = BatchNormHead(6, 3)
    assert [n for n, _ in head.named_parameters()] == ["linear.weight", "linear.bias"]
    x = torch.randn(64, 6) * 7 + 3
    assert torch.allclose(head.norm(x).var(0, unbiased=False), torch.ones(6), atol=1e-3)
