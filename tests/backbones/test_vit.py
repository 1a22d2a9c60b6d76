import pytest
import timm
import torch

from unmask.backbones import BackboneConfig, build
from unmask.draw import Seeded
from unmask.errors import UserError
from unmask.nn.patch import select

torch.manual_seed(0)


def test_dropping_tokens_equals_attention_among_the_kept_alone():
    encoder = build("vit_nano_patch4", image_size=(16, 24), in_channels=2).eval()
    x = torch.randn(2, 2, 16, 24)
    everything = torch.arange(24).expand(2, -1)
    assert torch.allclose(encoder.tokens(x, keep=everything), encoder.tokens(x), atol=1e-5)
    some = encoder.tokens(x, keep=everything[:, :5])
    assert some.shape == (2, 6, 128)
    changed = x.clone()
    changed[:, :, 4:] += 1  # patches of later rows are not among the kept
    assert torch.allclose(encoder.tokens(changed, keep=everything[:, :5]), some, atol=1e-6)


def test_replaced_tokens_do_not_depend_on_their_pixels():
    encoder = build("vit_nano_patch4", image_size=16).eval()
    x, hidden = torch.randn(1, 3, 16, 16), torch.zeros(1, 16, dtype=torch.bool)
    hidden[0, 3] = True
    changed = x.clone()
    changed[:, :, :4, 12:] += 1
    token = torch.randn(128)
    assert torch.allclose(
        encoder.tokens(x, hidden=hidden, mask_token=token), encoder.tokens(changed, hidden=hidden, mask_token=token)
    )
    assert not torch.allclose(encoder.tokens(x), encoder.tokens(changed))


@pytest.mark.parametrize("position", ["sincos", "learned", "none"])
def test_another_image_size_works_at_once(position):
    encoder = build("vit_nano_patch4", image_size=16, position=position).eval()
    assert encoder.tokens(torch.randn(1, 3, 24, 8)).shape == (1, 13, 128)
    assert encoder.maps(torch.randn(1, 3, 24, 8))[0].shape == (1, 128, 6, 2)


def test_video_is_a_grid_with_a_third_axis():
    encoder = build("vit_nano_patch4", image_size=(4, 8, 8), patch_size=(2, 4, 4), embed_dim=96, num_heads=2)
    assert encoder.grid() == (2, 2, 2)
    assert encoder.tokens(torch.randn(1, 3, 4, 8, 8)).shape == (1, 9, 96)


def test_relative_biases_follow_the_kept_tokens():
    encoder = build("vit_nano_patch4", image_size=16, position="none", relative=("shared", "per_block")).eval()
    for module in encoder.modules():
        if hasattr(module, "relative_position_bias_table"):
            torch.nn.init.normal_(module.relative_position_bias_table)
    x = torch.randn(1, 3, 16, 16)
    order = torch.randperm(16)[None]
    shuffled, plain = encoder.tokens(x, keep=order)[:, 1:], encoder.tokens(x)[:, 1:]
    assert torch.allclose(shuffled, select(plain, order), atol=1e-5)


def test_it_equals_timms_vit_weight_by_weight():
    peer = timm.create_model("vit_tiny_patch16_224", num_classes=0, img_size=32, pretrained=False).eval()
    encoder = build("vit_tiny_patch16", image_size=32, position="learned").eval()
    encoder.load_state_dict(peer.state_dict())
    x = torch.randn(2, 3, 32, 32)
    assert torch.allclose(encoder.tokens(x), peer.forward_features(x), atol=1e-5)


def test_drop_path_is_drawn_by_name_and_only_while_training():
    encoder = build("vit_nano_patch4", image_size=16, drop_path=0.5).train()
    x = torch.randn(4, 3, 16, 16)
    once, again = encoder.tokens(x, draw=Seeded(0, 1)), encoder.tokens(x, draw=Seeded(0, 1))
    assert torch.equal(once, again)
    assert not torch.equal(once, encoder.tokens(x, draw=Seeded(0, 2)))
    assert torch.equal(encoder.eval().tokens(x, draw=Seeded(0, 1)), encoder.tokens(x))


def test_layers_are_numbered_from_the_embeddings_up():
    encoder = build("vit_nano_patch4", image_size=16)
    layers = {n: encoder.layer_of(n) for n, _ in encoder.named_parameters()}
    assert layers["patch_embed.proj.weight"] == 0
    assert layers["cls_token"] == 0
    assert layers["blocks.0.norm1.weight"] == 1
    assert layers["blocks.3.mlp.fc2.bias"] == 4
    assert layers["norm.weight"] == 5


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"image_size": 30}, "patch 4 does not divide image size 30: use --image-size 28"),
        ({"num_heads": 7}, "num_heads=7 does not divide width 128"),
        ({"embed_dims": 64}, "did you mean embed_dim?"),
        ({"embed_dim": 66, "num_heads": 2}, "divisible by 4"),
    ],
)
def test_bad_options_are_one_clear_line(options, words):
    with pytest.raises(UserError, match=words.replace("?", r"\?")):
        build("vit_nano_patch4", **{"image_size": 32, **options})


def test_an_unknown_name_gets_the_nearest_known():
    with pytest.raises(UserError, match="vit_small_patch16"):
        build("vit_smal_patch16")
    with pytest.raises(UserError, match="no backbone"):
        build("resnext")


def test_a_bare_name_is_a_backbone_config():
    config = BackboneConfig.model_validate("vit_nano_patch4")
    assert config.name == "vit_nano_patch4"
    assert config.options == {}
