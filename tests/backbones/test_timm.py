"""timm's networks as encoders: their own numbers, with hidden tokens dropped or replaced."""

import pytest
import timm
import torch
from safetensors.torch import save_file

from unmask.backbones import build
from unmask.draw import Seeded
from unmask.errors import UserError
from unmask.nn.patch import select

VIT = "timm/vit_tiny_patch16_224"
VITS = {
    "class token": (VIT, {"image_size": (32, 48)}),
    "distilled": ("timm/deit_tiny_distilled_patch16_224", {"image_size": 32}),
    "registers": ("timm/vit_small_patch14_reg4_dinov2", {"image_size": 28, "arguments": {"depth": 2}}),
    "pooled by mean": ("timm/vit_base_patch16_siglip_224", {"image_size": 32, "arguments": {"depth": 2}}),
    "norm behind pooling": (VIT, {"image_size": 32, "arguments": {"global_pool": "avg"}}),
    "norm in front": ("timm/vit_base_patch32_clip_224", {"image_size": 64, "arguments": {"depth": 2}}),
}
NETS = {
    "resnet": ("timm/resnet18", {"image_size": 64}),
    "convnext": ("timm/convnext_atto", {"image_size": 64}),
    "efficientnet": ("timm/efficientnet_b0", {"image_size": 64}),
    "regnet": ("timm/regnetx_002", {"image_size": 64}),
    "mobilenet": ("timm/mobilenetv3_small_100", {"image_size": 64}),
    "swin": ("timm/swin_tiny_patch4_window7_224", {"image_size": 64, "arguments": {"window_size": 2}}),
    "relative positions": ("timm/vit_relpos_small_patch16_224", {"image_size": 32, "arguments": {"depth": 2}}),
    "rotary positions": ("timm/vit_small_patch16_rope_224", {"image_size": 32, "arguments": {"depth": 2}}),
}


def made(name, options):
    torch.manual_seed(0)
    encoder = build(name, **options).eval()
    return encoder, torch.randn(2, encoder.in_channels, *encoder.image_size)


@pytest.mark.parametrize("case", VITS)
@torch.no_grad()
def test_the_tokens_of_a_vit_are_timms(case):
    encoder, x = made(*VITS[case])
    expected = encoder.model.forward_features(x)
    if case == "norm behind pooling":
        expected = encoder.model.fc_norm(expected)
    tokens = encoder.tokens(x)
    torch.testing.assert_close(tokens, expected)
    assert tokens.shape[1] == encoder.prefix_tokens + encoder.grid()[0] * encoder.grid()[1]
    assert encoder.maps(x)[0].shape == (2, encoder.embed_dim, *encoder.grid())


@pytest.mark.parametrize("case", VITS)
@torch.no_grad()
def test_a_vit_that_keeps_every_token_in_any_order_gives_the_same_features(case):
    encoder, x = made(*VITS[case])
    order = torch.stack([torch.randperm(encoder.grid()[0] * encoder.grid()[1]) for _ in x])
    whole, prefix = encoder.tokens(x), encoder.prefix_tokens
    shuffled = encoder.tokens(x, keep=order)
    torch.testing.assert_close(shuffled[:, prefix:], select(whole[:, prefix:], order), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(shuffled[:, :prefix], whole[:, :prefix], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_dropped_tokens_cannot_be_seen():
    encoder, x = made(*VITS["class token"])
    keep = torch.tensor([[0, 1, 5]] * 2)
    before = encoder.tokens(x, keep=keep)
    x[:, :, 16:, :16] = 99.0  # patch 3: hidden
    assert torch.equal(encoder.tokens(x, keep=keep), before)


@pytest.mark.parametrize("case", ["swin", "relative positions", "rotary positions"])
@torch.no_grad()
def test_replaced_tokens_cannot_be_seen(case):
    encoder, x = made(*NETS[case])
    assert encoder.can_replace
    assert not encoder.can_drop
    grid, patch = encoder.grid(), encoder.patch_size[0]
    hidden = torch.zeros(2, grid[0] * grid[1], dtype=torch.bool)
    hidden[:, 1] = True
    token = torch.randn(encoder.model.patch_embed(x).shape[-1])
    before = encoder.tokens(x, hidden=hidden, mask_token=token)
    plain = encoder.tokens(x)
    x[:, :, :patch, patch : 2 * patch] = 99.0
    assert torch.equal(encoder.tokens(x, hidden=hidden, mask_token=token), before)
    assert not torch.allclose(plain, before)
    assert not encoder.model.patch_embed._forward_hooks


def test_the_mask_token_learns():
    encoder, x = made(*VITS["class token"])
    token = torch.zeros(encoder.embed_dim, requires_grad=True)
    hidden = torch.zeros(2, 6, dtype=torch.bool)
    hidden[:, 2:4] = True
    encoder.tokens(x, hidden=hidden, mask_token=token).square().sum().backward()
    assert token.grad.abs().sum() > 0


@pytest.mark.parametrize("case", NETS)
@torch.no_grad()
def test_tokens_and_maps_have_the_shapes_that_the_encoder_says(case):
    encoder, x = made(*NETS[case])
    maps = encoder.maps(x)
    assert [m.shape[1] for m in maps] == list(encoder.map_dims)
    assert [64 // m.shape[3] for m in maps] == list(encoder.strides) or encoder.image_size != (64, 64)
    tokens = encoder.tokens(x)
    assert tokens.shape[2] == encoder.embed_dim
    assert tokens.shape[1] == encoder.prefix_tokens + maps[-1].shape[2] * maps[-1].shape[3]
    assert encoder(x).shape == (2, encoder.embed_dim)


@torch.no_grad()
def test_timms_own_pooling_is_an_option():
    encoder, x = made(VIT, {"image_size": 32, "pool": "timm"})
    torch.testing.assert_close(encoder(x), encoder.model(x))
    encoder, x = made("timm/resnet18", {"image_size": 64})
    torch.testing.assert_close(encoder(x), encoder.model(x))  # for a plain convnet both are the mean


@torch.no_grad()
def test_other_sizes_and_channels_go_in():
    encoder, _ = made(VIT, {"image_size": (32, 64), "in_channels": 5, "patch_size": 8})
    assert encoder.grid() == (4, 8)
    assert encoder.tokens(torch.randn(1, 5, 16, 24)).shape == (1, 1 + 6, 192)
    encoder, _ = made("timm/resnet18", {"in_channels": 1})
    assert encoder.maps(torch.randn(1, 1, 28, 28))[-1].shape == (1, 512, 1, 1)
    assert encoder.grid((28, 28)) == (1, 1)


def test_depth_grows_from_the_embeddings_to_the_last_block():
    encoder, _ = made(VIT, {"image_size": 32})
    assert encoder.num_layers == 12
    assert encoder.layer_of("model.patch_embed.proj.weight") == 0
    assert encoder.layer_of("model.blocks.0.attn.qkv.weight") == 1
    assert encoder.layer_of("model.blocks.11.attn.qkv.weight") == 12
    assert {"model.pos_embed", "model.cls_token"} <= encoder.no_weight_decay()
    assert len(encoder.blocks_to_compile()) == 12
    convnet, _ = made("timm/resnet18", {})
    depths = [convnet.layer_of(n) for n, _ in convnet.named_parameters()]
    assert depths[0] == 0
    assert max(depths) == convnet.num_layers == 8
    assert len(convnet.blocks_to_compile()) == 8


@pytest.mark.parametrize("name", [VIT, "timm/convnext_atto", "timm/swin_tiny_patch4_window7_224"])
def test_drop_path_comes_from_the_draw_alone(name):
    encoder, x = made(name, {"image_size": 224 if "swin" in name else 64, "drop_path": 0.5})
    encoder.train()

    def features(draw):
        torch.rand(1)
        return encoder.tokens(x, draw=draw)

    with torch.no_grad():
        first, again, other, none = features(Seeded(0)), features(Seeded(0)), features(Seeded(1)), features(None)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    torch.testing.assert_close(none, encoder.eval().tokens(x))


def test_a_file_of_weights_is_loaded_and_resized(tmp_path):
    source = timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=7)
    save_file(source.state_dict(), tmp_path / "w.safetensors")
    encoder = build(VIT, image_size=32, weights=str(tmp_path / "w.safetensors")).eval()
    x = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(encoder.tokens(x), source.eval().forward_features(x))
    larger = build(VIT, image_size=64, weights=str(tmp_path / "w.safetensors"))
    assert larger.model.pos_embed.shape[1] == 17
    assert encoder.preprocessing.mean == tuple(source.pretrained_cfg["mean"])
    assert build(VIT, image_size=32).preprocessing is None


def wrong(name, **options) -> str:
    with pytest.raises(UserError) as error:
        build(name, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_what_does_not_fit_is_one_line(tmp_path):
    assert "did you mean resnet18" in wrong("timm/resnet_18")
    assert "no option" in wrong("timm/resnet18", image_sise=3)
    assert "does not take these options" in wrong("timm/resnet18", arguments={"colour": 3})
    assert "patch 16 does not divide image size 40: use --image-size 32" in wrong(VIT, image_size=40)
    assert "no checkpoint" in wrong(VIT, weights=str(tmp_path / "none.pth"))
    save_file(timm.create_model("resnet18").state_dict(), tmp_path / "r.safetensors")
    assert "does not fit" in wrong(VIT, weights=str(tmp_path / "r.safetensors"))
    assert "not both" in wrong(VIT, weights="x", pretrained=True)
    assert "out_indices" in wrong("timm/resnet18", out_indices=[9])


def test_published_weights_that_cannot_be_had_are_one_line(monkeypatch):
    def offline(*_args, **_options):
        raise OSError("Connection refused")

    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", offline)
    monkeypatch.setattr("timm.models._builder.load_pretrained", offline)
    text = wrong("timm/resnet18", pretrained=True)
    assert "no weights for timm/resnet18" in text
    assert "weights=FILE" in text
