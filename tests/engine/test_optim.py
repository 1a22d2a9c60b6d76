import copy

import pytest
import torch
from torch import nn

from unmask.engine.optim import Lars, build_optimizer, clip, learning_parameters, set_rates, skip_where
from unmask.engine.settings import TrainSettings

from .toys import Toy


def parameters():
    generator = torch.Generator().manual_seed(0)
    shapes = [(4, 3), (3,), (2, 2, 2)]
    out = [nn.Parameter(torch.randn(s, generator=generator)) for s in shapes]
    return out, [[torch.randn(s, generator=generator) for s in shapes] for _ in range(3)]


def stepped(optimizer, values, gradients):
    for step in gradients:
        for value, gradient in zip(values, step, strict=True):
            value.grad = gradient.clone()
        optimizer.step()
    return [v.detach() for v in values]


def test_lars_takes_the_steps_of_moco_v3():
    values, gradients = parameters()
    expected = [v.detach().clone() for v in values]
    moments = [torch.zeros_like(v) for v in expected]
    for step in gradients:
        for i, (w, g) in enumerate(zip(expected, step, strict=True)):
            u = g
            if w.ndim > 1:
                u = g + 0.1 * w
                u = u * (0.001 * w.norm() / u.norm())
            moments[i] = 0.9 * moments[i] + u
            w -= 0.5 * moments[i]
    got = stepped(Lars(values, lr=0.5, momentum=0.9, weight_decay=0.1), values, gradients)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_lars_adapts_without_weight_decay_and_leaves_zero_weights_to_plain_steps():
    weight = nn.Parameter(torch.zeros(2, 2))
    weight.grad = torch.ones(2, 2)
    Lars([weight], lr=1.0, momentum=0.0).step()
    assert torch.equal(weight.detach(), -torch.ones(2, 2))
    weight = nn.Parameter(torch.ones(2, 2))
    weight.grad = torch.ones(2, 2)
    Lars([weight], lr=1.0, momentum=0.0).step()
    torch.testing.assert_close(weight.detach(), torch.full((2, 2), 1 - 0.001))


def test_lamb_takes_the_steps_of_you_et_al():
    """Algorithm 2 with bias correction; parameters without decay take Adam steps, as in the authors' code."""
    model = Toy(Toy.Config())
    settings = TrainSettings(optimizer="lamb", betas=(0.9, 0.999), eps=1e-6)
    optimizer = build_optimizer(model, settings, "main")
    named = [p for g in optimizer.param_groups for p in g["params"]]
    decays = [g["decay_scale"] * 0.1 for g in optimizer.param_groups for _ in g["params"]]
    generator = torch.Generator().manual_seed(1)
    steps = [[torch.randn(p.shape, generator=generator) * 10 for p in named] for _ in range(3)]
    expected = [p.detach().clone() for p in named]
    m, v = [torch.zeros_like(p) for p in expected], [torch.zeros_like(p) for p in expected]
    for t, gradients in enumerate(steps, 1):
        for i, (w, g) in enumerate(zip(expected, gradients, strict=True)):
            m[i], v[i] = 0.9 * m[i] + 0.1 * g, 0.999 * v[i] + 0.001 * g * g
            r = (m[i] / (1 - 0.9**t)) / ((v[i] / (1 - 0.999**t)).sqrt() + 1e-6) + decays[i] * w
            trust = w.norm() / r.norm() if decays[i] and w.norm() > 0 and r.norm() > 0 else 1.0
            w -= 0.01 * trust * r
    set_rates(optimizer, 0.01, 0.1)
    for a, b in zip(stepped(optimizer, named, steps), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_groups_scale_rate_and_decay():
    model = Toy(Toy.Config())
    optimizer = build_optimizer(model, TrainSettings(), "main")
    set_rates(optimizer, 0.2, 0.05)
    got = {(g["lr"], g["weight_decay"], all(p.ndim < 2 for p in g["params"])) for g in optimizer.param_groups}
    assert got == {(0.2, 0.05, False), (0.2, 0.0, True)}
    assert optimizer.defaults["fused"]


def test_global_clipping_equals_torch():
    model = Toy(Toy.Config())
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    other = copy.deepcopy(model)
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        q.grad = p.grad.clone()
    norm = clip(learning_parameters(model), TrainSettings(clip_norm=0.5))
    assert norm == pytest.approx(float(nn.utils.clip_grad_norm_(other.parameters(), 0.5)), rel=1e-6)
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)


def test_each_tensor_is_clipped_alone():
    values = [nn.Parameter(torch.zeros(4)), nn.Parameter(torch.zeros(4))]
    values[0].grad, values[1].grad = torch.full((4,), 5.0), torch.full((4,), 0.1)
    norm = clip(values, TrainSettings(clip_each=1.0))
    assert float(norm) == pytest.approx((10.0**2 + 0.2**2) ** 0.5)
    assert float(values[0].grad.norm()) == pytest.approx(1.0, abs=1e-4)
    assert float(values[1].grad.norm()) == pytest.approx(0.2, abs=1e-6)


@pytest.mark.parametrize("kind", ["adamw", "sgd"])
def test_fused_steps_can_be_skipped_by_a_flag_on_the_device(kind):
    model = Toy(Toy.Config())
    optimizer = build_optimizer(model, TrainSettings(optimizer=kind), "main")
    set_rates(optimizer, 0.1, 0.1)
    before = copy.deepcopy(model.state_dict())
    for p in model.parameters():
        p.grad = torch.full_like(p, float("nan"))
    assert skip_where(optimizer, torch.tensor(True))
    optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values(), strict=True))
