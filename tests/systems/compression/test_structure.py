"""What can be cut is found, and the cut model answers as the masked one."""

import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from unmask.contracts import Preprocessing
from unmask.errors import UserError
from unmask.models import UserModel, open_model
from unmask.systems.compression.structure import find_structure
from unmask.systems.compression.surgery import check_cut, cut
from unmask.systems.prediction.classifier.model import Classifier

PREPARED = Preprocessing(image_size=(16, 16))


def opened(module: nn.Module, **options) -> UserModel:
    return open_model(module, classes=3, preprocessing=PREPARED, **options)


class Residual(nn.Module):
    """A stem, a residual block with a gate (squeeze and excitation), a depthwise layer, a linear head over a flattened map."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.inner = nn.Conv2d(8, 12, 3, padding=1)
        self.deep = nn.Conv2d(12, 12, 3, padding=1, groups=12)
        self.squeeze, self.excite = nn.Conv2d(12, 4, 1), nn.Conv2d(4, 12, 1)
        self.outer = nn.Conv2d(12, 8, 1)
        self.head = nn.Linear(8 * 4, 3)

    def forward(self, x):
        x = self.stem(x)
        y = self.deep(self.inner(x)).relu()
        y = y * self.excite(self.squeeze(y.mean((2, 3), keepdim=True)).relu()).sigmoid()
        x = x + self.outer(y)
        return self.head(nn.functional.adaptive_avg_pool2d(x, 2).flatten(1))


class Concatenated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1)
        self.c, self.head = nn.Conv2d(8, 6, 1), nn.Linear(6, 3)

    def forward(self, x):
        return self.head(self.c(torch.cat((self.a(x), self.b(x)), 1)).relu().mean((2, 3)))


class Alone(nn.Module):
    """Nothing behind its only layer."""

    def __init__(self) -> None:
        super().__init__()
        self.only = nn.Linear(3 * 16 * 16, 3)

    def forward(self, x):
        return self.only(x.flatten(1))


class Rest(nn.Module):
    """MLP blocks whose activation is not zero at zero."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(48, 6)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 10), nn.Sigmoid(), nn.Linear(10, 6, bias=False))
            for _ in range(2)
        )
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        x = self.stem(x.flatten(2).mT)
        for block in self.blocks:
            x = x + block(x)
        return self.head(x.mean(1))


def test_channels_that_meet_are_one_and_those_that_are_joined_stay() -> None:
    found = find_structure(opened(Residual()))
    sizes = {u.name: u.count for u in found.channels}
    assert sizes == {"stem.0": 8, "inner": 12, "squeeze": 4}
    inner = next(u for u in found.channels if u.name == "inner")
    assert {s.parameter for s in inner.slices} >= {
        "inner.weight",
        "deep.weight",
        "excite.weight",
        "outer.weight",
        "squeeze.weight",
    }
    joined = find_structure(opened(Concatenated()))
    assert [u.name for u in joined.channels] == ["c"]
    assert "cat" in joined.refused["a"]


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_a_cut_network_answers_as_the_masked_one(seed: int) -> None:
    torch.manual_seed(seed)
    model = opened(Residual())
    for m in model.module.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.running_mean.normal_()
            m.running_var.uniform_(0.5, 2)
    keep = {}
    for units in find_structure(model).all():
        kept = torch.rand(units.count) < 0.6
        kept[0] = True
        keep[units] = kept
    smaller = cut(model, keep)
    check_cut(model, smaller, keep)
    assert sum(p.numel() for p in smaller.module.parameters()) <= sum(p.numel() for p in model.module.parameters())


def test_what_neurons_give_at_rest_goes_into_the_next_bias() -> None:
    torch.manual_seed(0)
    model = open_model(Rest(), classes=3, preprocessing=Preprocessing(image_size=(4, 12), channels=48))
    model.module.stem = nn.Linear(48, 6)
    keep = {u: torch.arange(u.count) < 4 for u in find_structure(model).neurons}
    smaller = cut(model, keep)
    assert smaller.module.blocks[0][3].bias is not None
    check_cut(model, smaller, keep)


def test_our_own_vit_loses_heads_and_whole_layers() -> None:
    torch.manual_seed(0)
    model = open_model(
        Classifier(
            Classifier.Config(
                backbone={"name": "vit_nano_patch4", "image_size": 8, "embed_dim": 32, "depth": 3}, classes=3
            )
        )
    )
    found = find_structure(model)
    assert [(u.count, u.size) for u in found.heads] == [(4, 8)] * 3
    keep = {u: torch.tensor([i == 0] * u.count) for i, u in enumerate(found.heads)}
    keep |= {u: torch.full((u.count,), i > 0) for i, u in enumerate(found.neurons)}
    check_cut(model, cut(model, keep), keep)


def test_attention_that_cannot_lose_heads_is_told_and_its_neurons_go() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = open_model(
            "timm/swin_tiny_patch4_window7_224",
            pretrained=False,
            img_size=56,
            embed_dim=24,
            depths=(1, 1),
            num_heads=(2, 4),
            classes=3,
            window_size=7,
        )
    found = find_structure(model)
    assert not found.heads
    assert len(found.neurons) == 2
    assert any("attn" in name for name in found.refused)


def test_a_structure_that_cannot_be_cut_names_its_layer() -> None:
    with pytest.raises(UserError, match="only is what the model answers"):
        find_structure(opened(Alone()))
