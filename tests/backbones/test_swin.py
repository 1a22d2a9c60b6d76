"""Swin V1 and V2: timm's numbers, the authors' names, any size, and what each option does."""

import math
import warnings

import pytest
import timm
import torch
from torch.nn import functional as F

from unmask.backbones import build
from unmask.backbones.swin.attention import log_spaced_coordinates
from unmask.backbones.swin.model import Swin
from unmask.backbones.swin.official import (
    SwinWithHead,
    drop_path_draw,
    load_encoder,
    load_official,
    load_with_head,
    run_case,
)
from unmask.draw import Replay, Seeded
from unmask.errors import UserError
from unmask.nn.positions import resize_relative_table

SMALL = {"image_size": 32, "patch_size": 4, "embed_dim": 16, "depths": (2, 2), "num_heads": (2, 4), "window_size": 4}


def swin(version: int = 1, **options) -> Swin:
    torch.manual_seed(0)
    encoder = build("swin_tiny" if version == 1 else "swinv2_tiny", **{**SMALL, **options})
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return encoder.eval()


def images(*size: int, n: int = 2, channels: int = 3) -> torch.Tensor:
    return torch.randn(n, channels, *(size or (32, 32)), generator=torch.Generator().manual_seed(1))


def timm_model(name: str, **options) -> torch.nn.Module:
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=7, embed_dim=24, depths=(2, 2, 2), num_heads=(2, 3, 6), **options)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model.eval()


@pytest.mark.parametrize(
    ("name", "options", "ours"),
    [
        ("swin_tiny_patch4_window7_224", {"img_size": 56, "window_size": 7}, {"image_size": 56, "window_size": 7}),
        ("swin_tiny_patch4_window7_224", {"img_size": 64, "window_size": 4}, {"image_size": 64, "window_size": 4}),
        ("swinv2_tiny_window8_256", {"img_size": 64, "window_size": 4}, {"image_size": 64, "window_size": 4}),
        (
            "swinv2_tiny_window8_256",
            {"img_size": 64, "window_size": 8, "pretrained_window_sizes": (4, 4, 4)},
            {"image_size": 64, "window_size": 8, "pretrained_windows": (4, 4, 4)},
        ),
    ],
)
def test_timms_weights_give_timms_logits_maps_and_gradients(name, options, ours):
    theirs = timm_model(name, **options)
    encoder = load_official(theirs.state_dict(), ours)
    model = SwinWithHead(encoder, 7).eval()
    load_with_head(model, theirs.state_dict())
    x = images(ours["image_size"], ours["image_size"])
    torch.testing.assert_close(model(x), theirs(x), atol=1e-5, rtol=1e-4)
    maps = theirs.forward_intermediates(x, intermediates_only=True)
    for a, b in zip(encoder.maps(x), maps, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)
    model(x).square().sum().backward()
    theirs(x).square().sum().backward()
    mine = dict(encoder.named_parameters())
    for key in ("patch_embed.proj.weight", "layers.0.blocks.1.attn.qkv.weight", "layers.2.blocks.1.mlp.fc1.weight"):
        size = dict(theirs.named_parameters())[key].grad
        torch.testing.assert_close(mine[key].grad, size, atol=1e-4 * float(size.abs().max()), rtol=1e-3)


@pytest.mark.slow
def test_the_published_swin_tiny_is_timms():
    torch.manual_seed(0)
    theirs = timm.create_model("swin_tiny_patch4_window7_224").eval()
    encoder = load_official(theirs.state_dict())
    assert encoder.config == build("swin_tiny").config
    x = images(224, 224, n=1)
    with torch.no_grad():
        torch.testing.assert_close(encoder(x), theirs.forward_head(theirs.forward_features(x), pre_logits=True))


@pytest.mark.parametrize(("name", "million"), [("swin_tiny", 27.5), ("swin_base", 86.7), ("swinv2_tiny", 27.6)])
def test_the_parameter_counts_are_the_papers(name, million):
    with torch.device("meta"):
        assert sum(p.numel() for p in build(name).parameters()) / 1e6 == pytest.approx(million, abs=0.06)


@pytest.mark.parametrize("version", [1, 2])
def test_windows_that_do_not_divide_the_map_change_nothing_for_real_tokens(version):
    """A map of 6 x 7 with windows of 4: each real token attends to the real tokens of its window only."""
    encoder = swin(version, image_size=(24, 28), depths=(1,), num_heads=(2,))
    x = images(24, 28)
    block = encoder.layers[0].blocks[0]
    tokens = encoder.embed(x, None, None)
    got = block(tokens, (6, 7)).unflatten(1, (6, 7))
    assert torch.isfinite(got).all()
    whole = tokens.unflatten(1, (6, 7))[:, :4, :4].reshape(2, 16, -1)
    torch.testing.assert_close(got[:, :4, :4].reshape(2, 16, -1), block(whole, (4, 4)), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("size", [(32, 32), (33, 46), (20, 64), (8, 12), (4, 4)])
def test_any_size_gives_tokens_and_maps_of_the_promised_shapes(version, size):
    encoder = swin(version)
    x = images(*size)
    maps = encoder.maps(x)
    for found, width, stride in zip(maps, encoder.map_dims, encoder.strides, strict=True):
        assert found.shape == (2, width, *(math.ceil(s / stride) for s in size))
    tokens = encoder.tokens(x)
    assert tokens.shape == (2, math.prod(encoder.final_grid(size)), encoder.embed_dim)
    torch.testing.assert_close(tokens, encoder.norm(maps[-1].flatten(2).transpose(1, 2)))
    torch.testing.assert_close(encoder(x), tokens.mean(dim=1))


@pytest.mark.parametrize("version", [1, 2])
def test_a_hidden_token_shows_nothing_of_its_pixels(version):
    encoder = swin(version, absolute_positions=True, in_channels=2)
    x, hidden, token = images(channels=2), torch.zeros(2, 64, dtype=torch.bool), torch.randn(16)
    hidden[:, 9:12] = True
    changed = x.clone()
    changed[:, :, 4:8, 4:16] += 1
    same = [encoder.tokens(i, hidden=hidden, mask_token=token) for i in (x, changed)]
    torch.testing.assert_close(*same)
    assert not torch.allclose(encoder.tokens(x), encoder.tokens(changed))
    other = encoder.tokens(x, hidden=hidden, mask_token=token + 1)
    assert not torch.allclose(same[0], other)


def test_without_shift_a_token_sees_its_window_only():
    still, moving = (swin(depths=(2,), num_heads=(2,), shift=s) for s in (False, True))
    x = images()
    changed = x.clone()
    changed[:, :, :4, 12:16] += 1  # the last column of the first window
    for encoder, sees in ((still, False), (moving, True)):
        gap = (encoder.maps(x)[0] - encoder.maps(changed)[0]).abs().sum(dim=(0, 1))
        assert bool(gap[0, 4] > 0) is sees
        assert gap[0, 0] > 0


def test_out_norm_standardises_every_map():
    for found, width in zip(build("swin_tiny", **SMALL, out_norm=True).maps(images()), (16, 32), strict=True):
        assert found.shape[1] == width
        torch.testing.assert_close(found.mean(dim=1), torch.zeros_like(found[:, 0]), atol=1e-4, rtol=0)


def test_version_2_starts_as_the_identity_between_mergings():
    encoder = build("swinv2_tiny", **SMALL)
    x = images()
    torch.testing.assert_close(encoder.maps(x)[0].flatten(2).transpose(1, 2), encoder.embed(x, None, None))


def test_drop_path_reads_named_uniforms_block_by_block():
    encoder = swin(drop_path=0.5).train()
    x = images()
    none = Replay({"drop_path": torch.full((2, 4, 2), 0.999)})
    kept = encoder.tokens(x, draw=none)
    plain = encoder.eval().tokens(x)
    encoder.train()
    assert not torch.allclose(kept, plain), "kept branches are divided by 1 - rate"
    every = torch.full((2, 4, 2), 0.999)
    every[1, 3] = 0.0  # the last block of the second sample is dropped
    dropped = encoder.tokens(x, draw=Replay({"drop_path": every}))
    torch.testing.assert_close(dropped[0], kept[0])
    assert not torch.allclose(dropped[1], kept[1])
    torch.testing.assert_close(encoder.tokens(x, draw=Seeded(1)), encoder.tokens(x, draw=Seeded(1)))


def test_depths_rise_with_the_blocks_for_layer_decay():
    encoder = swin(out_norm=True)
    order = [encoder.layer_of(n) for n, _ in encoder.named_parameters()]
    assert {encoder.layer_of(n) for n in ("patch_embed.proj.weight", "patch_embed.norm.bias")} == {0}
    assert encoder.layer_of("layers.0.blocks.1.attn.qkv.weight") == 2
    assert encoder.layer_of("layers.0.downsample.norm.weight") == 2
    assert encoder.layer_of("layers.1.blocks.0.attn.qkv.weight") == 3
    assert max(order) == encoder.num_layers + 1 == 5


def test_biases_and_positions_take_no_decay():
    first, second = swin(absolute_positions=True).no_weight_decay(), swin(2).no_weight_decay()
    assert "absolute_pos_embed" in first
    assert "layers.1.blocks.0.attn.relative_position_bias_table" in first
    assert {"layers.0.blocks.0.attn.logit_scale", "layers.0.blocks.0.attn.cpb_mlp.0.weight"} <= second
    assert not any(n.endswith("qkv.weight") for n in first | second)


def test_a_table_of_other_windows_is_resized_as_the_authors_do():
    small, large = swin(window_size=3, image_size=24), swin(window_size=4)
    load_encoder(large, small.state_dict())
    key = "layers.0.blocks.0.attn.relative_position_bias_table"
    old, new = small.state_dict()[key], large.state_dict()[key]
    expected = F.interpolate(old.T.reshape(1, 2, 5, 5), size=(7, 7), mode="bicubic")[0].flatten(1).T
    torch.testing.assert_close(new, expected)
    torch.testing.assert_close(new, resize_relative_table(old, (3, 3), (4, 4)))


def test_absolute_positions_of_another_grid_are_resized():
    small, large = swin(absolute_positions=True), swin(absolute_positions=True, image_size=48)
    load_encoder(large, small.state_dict())
    assert large.absolute_pos_embed.shape == (1, 144, 16)


def test_version_2_goes_to_other_windows_unchanged():
    small = swin(2)
    large = swin(2, window_size=8, pretrained_windows=(4, 4))
    load_encoder(large, small.state_dict())
    assert torch.equal(large.layers[0].blocks[0].attn.q_bias, small.layers[0].blocks[0].attn.q_bias)


def test_log_spaced_coordinates_are_the_papers():
    table = log_spaced_coordinates((4, 4), (0, 0)).view(7, 7, 2)
    assert table[0, 6].tolist() == pytest.approx([-math.log2(9) / 3, math.log2(9) / 3])
    assert table[3, 4].tolist() == pytest.approx([0, math.log2(8 / 3 + 1) / 3])
    assert log_spaced_coordinates((4, 4), (2, 2)).abs().max() == pytest.approx(math.log2(25) / 3)
    assert log_spaced_coordinates((1, 1), (0, 0)).tolist() == [[0.0, 0.0]]


def test_version_2_computes_its_biases_once_for_each_state_of_the_weights():
    encoder = swin(2)
    attention = encoder.layers[0].blocks[0].attn
    with torch.no_grad():
        first = attention.table()
        assert attention.table() is first
        attention.cpb_mlp[2].weight.add_(1.0)
        assert not torch.allclose(attention.table(), first)
    assert attention.table().requires_grad


@pytest.mark.parametrize("version", [1, 2])
def test_exported_encoders_give_the_same_numbers(version):
    encoder = swin(version)
    x = images()
    with torch.no_grad():
        expected = encoder(x)
        exported = torch.export.export(encoder, (x,)).module()
        torch.testing.assert_close(exported(x), expected, atol=1e-5, rtol=1e-4)


def test_bf16_autocast_stays_near_fp32():
    for version in (1, 2):
        encoder, x = swin(version), images()
        with torch.no_grad():
            expected = encoder(x)
            with torch.autocast("cpu", torch.bfloat16):
                found = encoder(x)
        assert (found - expected).abs().max() < 0.05 * expected.abs().max()


def test_parity_options_stand_for_what_a_config_leaves_open():
    encoder = swin(patch_norm=False, qkv_bias=False, absolute_positions=True, image_size=(32, 48))
    head = torch.nn.Linear(32, 3)
    state = {**encoder.state_dict(), **{f"head.{k}": v for k, v in head.state_dict().items()}}
    tensors = {f"param.{k}": v for k, v in state.items()} | {
        "in.images": images(32, 48),
        "in.labels": torch.tensor([0, 2]),
    }
    config = {"version": 1, "image_size": [32, 48], "window_size": 4, "num_heads": [2, 4], "depths": [2, 2]}
    outputs, _, gradients = run_case(config, tensors)
    torch.testing.assert_close(outputs["logits"], head(encoder(images(32, 48))))
    assert outputs["stage1"].shape == (2, 32, 4, 6)
    assert "layers.0.downsample.reduction.weight" in gradients


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"num_heads": (2, 3)}, "num_heads=3 does not divide the stage's width 32"),
        ({"num_heads": (2,)}, "differ in length"),
        ({"image_size": 3}, "smaller than one patch"),
        ({"pretrained_windows": (4,)}, "needs 2 numbers"),
        ({"window": 4}, 'no option "window" in backbone swin_tiny: did you mean window_size'),
    ],
)
def test_bad_options_are_one_clear_line(options, words):
    with pytest.raises(UserError) as error:
        build("swin_tiny", **{**SMALL, **options})
    assert words in str(error.value)


def test_an_unknown_size_names_the_nearest():
    with pytest.raises(UserError, match="did you mean swin_tiny"):
        build("swin_tinny")


def test_a_checkpoint_of_the_other_version_is_refused():
    with pytest.raises(UserError, match=r"of Swin V1, this model of V2: use backbone swin_\*"):
        load_encoder(swin(2), swin(1).state_dict())
    with pytest.raises(UserError, match="not the weights of a Swin"):
        load_official({"patch_embed.proj.weight": torch.zeros(1)})


def test_padding_to_whole_patches_is_said_and_done():
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        encoder = build("swin_tiny", **{**SMALL, "image_size": 30})
    assert "padded to whole patches" in str(said[0].message)
    x = images(30, 30)
    torch.testing.assert_close(encoder(x), encoder(F.pad(x, (0, 2, 0, 2))))


def test_a_map_that_timm_would_cut_otherwise_is_not_exported_to_it():
    from unmask.backbones.swin.to_timm import timm_twin

    options = {"depths": (2, 2), "num_heads": (2, 4), "embed_dim": 8, "window_size": 4}
    with pytest.raises(UserError, match="timm would cut stage 2"):
        timm_twin(build("swin_tiny", image_size=(32, 16), **options))
    timm_twin(build("swin_tiny", image_size=(32, 32), **options))


@pytest.mark.parametrize("batch", [1, 2, 6])
def test_recorded_drop_paths_are_read_with_and_without_the_block_that_never_drops(batch):
    """Four blocks: calls of the authors' code number 2 x 3, as its first block draws nothing."""
    uniform = torch.rand(4, 2, batch, generator=torch.Generator().manual_seed(2))
    expected = uniform.permute(2, 0, 1)
    calls = uniform[1:].flatten(0, 1)
    for given in (uniform.flatten(0, 1), expected, uniform):
        torch.testing.assert_close(drop_path_draw({"draw.drop_path": given}, batch, 4).tensors["drop_path"], expected)
    named = {f"draw.drop_path.{i}": u for i, u in enumerate(calls)}
    blocks = {
        f"draw.drop_path.blocks.{i}.{n}": uniform[i, b][:, None, None]
        for i in range(1, 4)
        for b, n in enumerate(("attn", "mlp"))
    }
    layers = {
        f"draw.drop_path.layers.{i // 2}.blocks.{i % 2}.{n}": uniform[i, b]
        for i in range(1, 4)
        for b, n in enumerate(("attn", "mlp"))
    }
    single = [{"draw.drop_path": v} for v in (calls, calls[:, :, None, None], uniform[1:])]
    for tensors in (*single, named, blocks, layers):
        found = drop_path_draw(tensors, batch, 4).tensors["drop_path"]
        torch.testing.assert_close(found[:, 1:], expected[:, 1:])
        assert (found[:, 0] > 0.99).all()


def test_recorded_keeps_drop_what_they_say_at_any_rate():
    keep = torch.tensor([[1, 0], [0, 1], [1, 1], [1, 0], [0, 0], [1, 1]])
    for value in (keep, keep.bool(), keep.float(), keep / 0.7):
        found = drop_path_draw({"draw.drop_path": value}, 2, 4).tensors["drop_path"][:, 1:]
        assert torch.equal((found >= 0.9).int().permute(1, 2, 0).reshape(6, 2), keep.int())
        assert float(found.max()) < 1


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({"drop_path": torch.zeros(5, 2)}, "shape [5, 2] does not fit 4 blocks and 2 samples"),
        ({"drop_path.0": torch.zeros(2), "drop_path.1": torch.zeros(3)}, "differ in shape"),
        ({"drop_path": torch.tensor([[-0.5, 0.5]] * 8)}, "neither uniforms"),
    ],
)
def test_drop_paths_that_do_not_fit_are_one_clear_line(tensors, words):
    with pytest.raises(UserError) as error:
        drop_path_draw({f"draw.{k}": v for k, v in tensors.items()}, 2, 4)
    assert words in str(error.value)


def test_a_case_with_the_authors_drop_path_runs():
    encoder = swin(drop_path=0.3)
    tensors = {f"param.{k}": v for k, v in encoder.state_dict().items()} | {"in.images": images()}
    tensors["draw.drop_path"] = torch.rand(6, 2, 1, 1)
    config = {"image_size": 32, "window_size": 4, "num_heads": [2, 4], "drop_path_rate": 0.3}
    draw = drop_path_draw(tensors, 2, 4)
    torch.testing.assert_close(
        run_case(config, tensors)[0]["features"], encoder.train().pooled(images(), draw=draw).detach()
    )


def test_embedded_patches_are_dropped_by_named_uniforms_in_training_only():
    encoder = swin(drop_rate=0.25)
    x = images()
    whole = encoder.embed(x, None, None)
    uniform = torch.rand(whole.shape, generator=torch.Generator().manual_seed(3))
    draw = Replay({"dropout": uniform})
    torch.testing.assert_close(encoder.tokens(x, draw=draw), encoder.tokens(x))
    seen = []
    encoder.layers[0].blocks[0].register_forward_pre_hook(lambda _module, given: seen.append(given[0]))
    encoder.train().tokens(x, draw=draw)
    torch.testing.assert_close(seen[0], torch.where(uniform < 0.25, 0, whole / 0.75))
    encoder.tokens(x)
    torch.testing.assert_close(seen[1], whole)
