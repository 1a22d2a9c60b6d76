import numpy as np
import pytest
import torch
from PIL import Image

from unmask.data.bicubic import resize_bicubic
from unmask.data.restoration import RestorationSettings
from unmask.draw import Seeded
from unmask.errors import UserError
from unmask.systems.prediction.hat.attribution import Influence, area_of_influence
from unmask.systems.prediction.hat.discriminator import PerceptualLoss, SpectralConv, UNetDiscriminator
from unmask.systems.prediction.hat.model import HAT
from unmask.systems.prediction.hat.official import load_official, official_name

SMALL = {
    "scale": 2,
    "in_channels": 3,
    "image_size": 16,
    "embed_dim": 12,
    "depths": (2,),
    "num_heads": 2,
    "window_size": 4,
    "squeeze_factor": 4,
    "reconstruction_dim": 8,
    "drop_path_rate": 0.0,
}


def model(**options) -> HAT:
    torch.manual_seed(0)
    made = HAT(HAT.Config(**{**SMALL, **options}))
    with torch.no_grad():  # so that every branch matters
        for p in made.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return made


def picture(height: int = 16, width: int = 16, channels: int = 3, count: int = 1) -> torch.Tensor:
    return torch.rand(count, channels, height, width, generator=torch.Generator().manual_seed(1))


def official_state(made: HAT) -> dict[str, torch.Tensor]:
    return {official_name(n): t for n, t in made.network.state_dict().items()}


# --- the network ---


@pytest.mark.parametrize(
    ("options", "factor"),
    [
        ({"scale": 2}, 2),
        ({"scale": 3}, 3),
        ({"scale": 4}, 4),
        ({"scale": 1, "upsampler": "none"}, 1),
        ({"scale": 2, "in_channels": 1}, 2),
        ({"scale": 2, "residual": "bicubic"}, 2),
        ({"ape": True, "patch_norm": False, "qkv_bias": False, "resi_connection": "identity", "img_range": 3.0}, 2),
        ({"channel_attention": False, "overlapping_attention": False}, 2),
        ({"overlap_ratio": 0.0}, 2),
        ({"depths": (1, 2), "num_heads": (2, 3), "mlp_ratio": 1.5, "conv_scale": 0.7}, 2),
    ],
)
def test_every_option_gives_a_picture_of_the_right_size_and_gradients_everywhere(options, factor):
    made = model(**options)
    low = picture(channels=made.network.channels)
    out = made.network(low)
    assert out.shape == (1, low.shape[1], 16 * factor, 16 * factor)
    out.abs().mean().backward()
    assert all(p.grad is not None for p in made.network.parameters())


def test_the_published_sizes_have_the_published_numbers_of_parameters():
    with torch.device("meta"):
        made = {size: HAT(HAT.Config(size=size, scale=4)) for size in ("hat_s", "hat", "hat_l")}
    millions = {size: round(sum(p.numel() for p in m.parameters()) / 1e6, 1) for size, m in made.items()}
    assert millions == {"hat_s": 9.6, "hat": 20.8, "hat_l": 40.8}
    assert HAT.Config(size="hat_l").depths == (6,) * 12
    assert HAT.Config(size="hat_l", embed_dim=60).embed_dim == 60


def test_a_network_with_a_bicubic_residual_starts_as_bicubic():
    made = HAT(HAT.Config(**{**SMALL, "residual": "bicubic"}))
    low = picture()
    assert torch.allclose(made.network(low), resize_bicubic(low, 2), atol=1e-6)


def test_a_training_size_of_one_window_switches_the_shifts_off():
    shifts = {size: [b.attn.shift for b in model(image_size=size).network.groups[0].blocks] for size in (4, 8)}
    assert shifts == {4: [0, 0], 8: [0, 2]}


def test_drop_path_comes_from_the_draw_alone():
    made = model(drop_path_rate=0.5, depths=(4,)).train()
    low = picture(count=4)
    assert torch.equal(made.network(low, Seeded(0, 3)), made.network(low, Seeded(0, 3)))
    assert not torch.equal(made.network(low, Seeded(0, 3)), made.network(low, Seeded(0, 4)))
    assert torch.equal(made.eval().network(low, Seeded(0, 3)), made.network(low))


def test_kept_biases_follow_the_weights():
    made, low = model().eval(), picture()
    with torch.no_grad():
        before = made.network(low)
        assert torch.equal(before, made.network(low))
        made.network.groups[0].overlap.attn.relative_position_bias_table.mul_(5)
        assert not torch.equal(before, made.network(low))


def test_a_training_under_bf16_keeps_the_bicubic_picture_exact():
    made = HAT(HAT.Config(**{**SMALL, "residual": "bicubic"}))
    low = picture()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.allclose(made.network(low), resize_bicubic(low, 2), atol=1e-6)


# --- any size ---


@pytest.mark.parametrize("size", [(2, 3), (5, 16), (13, 18), (16, 16)])
def test_any_size_is_restored_by_padding(size):
    assert model().restored(picture(*size)).shape == (1, 3, size[0] * 2, size[1] * 2)


def test_faded_tiles_are_the_whole_where_tiles_see_all_that_matters():
    made = model(channel_attention=False, overlapping_attention=False, depths=(1,), resi_connection="identity").eval()
    low = picture(32, 40)
    whole = made.restored(low)
    for fade in (False, True):
        tiled = made.restored(low, tile=8, overlap=16, fade=fade, batch=3)
        assert torch.allclose(tiled, whole, atol=1e-5)


def test_fading_tiles_meet_more_smoothly_than_cut_ones():
    made, low = model(conv_scale=3.0).eval(), picture(32, 32)
    low[..., 16:] *= 0.05  # the channel attention's mean differs between the tiles
    whole = made.restored(low)

    def jump(tiled):  # how much the error changes across the tiles' edges
        error = tiled - whole
        return float((error[..., 32] - error[..., 31]).abs().mean())

    cut, faded = (made.restored(low, tile=16, overlap=8, fade=f) for f in (False, True))
    assert jump(faded) < jump(cut)


def test_with_absolute_positions_every_size_goes_through_in_tiles_of_the_training_size():
    assert model(ape=True).restored(picture(20, 37)).shape == (1, 3, 40, 74)


def test_the_ensemble_of_a_picture_turned_is_the_ensemble_turned():
    made, low = model().eval(), picture()
    ahead = made.restored(low, ensemble=True)
    turned = made.restored(low.flip(-1).transpose(-1, -2), ensemble=True)
    assert torch.allclose(ahead.flip(-1).transpose(-1, -2), turned, atol=1e-5)


# --- predicting ---


def saved(path, array, **options):
    Image.fromarray(array).save(path, **options)
    return path


def test_colour_grey_and_transparent_files_keep_their_kind(tmp_path):
    rng = np.random.default_rng(0)
    colour = saved(tmp_path / "colour.png", rng.integers(0, 256, (13, 18, 3), dtype=np.uint8))
    grey = saved(tmp_path / "grey.png", rng.integers(0, 256, (13, 18), dtype=np.uint8))
    alpha = rng.integers(0, 256, (13, 18, 4), dtype=np.uint8)
    alpha[:4, :, 3] = 0
    clear = saved(tmp_path / "clear.png", alpha)
    results = model().eval().predict([colour, grey, clear])
    assert [r.pixels.shape for r in results] == [(26, 36, 3), (26, 36, 1), (26, 36, 4)]
    assert "grey" in results[1].notes["channels"]
    assert (results[2].pixels[:4, :, 3] == 0).all()
    results[2].save(tmp_path / "out")
    assert Image.open(tmp_path / "out.png").mode == "RGBA"
    assert results[0].overlay().size[0] > 100


def test_a_colour_picture_through_a_grey_network_keeps_its_colours():
    made = HAT(HAT.Config(**{**SMALL, "in_channels": 1, "residual": "bicubic"})).eval()
    low = picture(12, 12)
    [result] = made.predict([low[0]])
    wanted = (resize_bicubic(low, 2).clamp(0, 1) * 255).round()[0].permute(1, 2, 0).numpy()
    assert np.abs(result.pixels.astype(int) - wanted).max() <= 1


def test_half_precision_stays_near_single():
    made, low = model().eval(), picture()
    assert (made.restored(low, precision="bf16") - made.restored(low)).abs().max() < 0.05


# --- learning ---


def test_a_bare_loop_learns_in_every_setting():
    high = picture(16, 16, count=2)
    noisy = (high + 0.1 * torch.randn(high.shape, generator=torch.Generator().manual_seed(2))).clamp(0, 1)
    for options, batch in (
        ({"residual": "bicubic"}, {"image": high}),
        ({"scale": 1, "upsampler": "none"}, {"image": high, "low": noisy}),
    ):
        made = HAT(HAT.Config(**{**SMALL, **options}))
        optimiser = torch.optim.Adam(made.parameters(), 3e-3)
        losses = []
        for _ in range(15):
            loss = made.loss(batch, Seeded(0))["loss"]
            losses.append(loss.item())
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        assert losses[-1] < losses[0]


def adversarial(**options) -> HAT:
    return HAT(HAT.Config(**{**SMALL, "adversarial": {"num_feat": 4, "perceptual_weight": 0.0, **options}}))


def test_the_two_phases_touch_their_own_networks_only():
    made = adversarial().train()
    batch = {"image": picture(32, 32, count=2), "sharp": picture(32, 32, count=2)}
    assert made.phases == ("generator", "discriminator")
    for phase, mine, other in (
        ("generator", made.network, made.discriminator),
        ("discriminator", made.discriminator, made.network),
    ):
        made.zero_grad(set_to_none=True)
        losses = made.loss(batch, Seeded(0), phase=phase)
        losses["loss"].backward()
        assert all(p.grad is not None for p in mine.parameters())
        assert all(p.grad is None for p in other.parameters())
        names = {n for g in made.parameter_groups(phase) for n in g.names}
        assert names == {n for n, p in made.named_parameters() if p.grad is not None}
    assert not made._made


def test_the_discriminator_sees_the_picture_that_the_generator_made_before_its_step():
    made = adversarial().train()
    batch = {"image": picture(32, 32)}
    made.loss(batch, Seeded(0), phase="generator")
    kept = made._made[id(batch)]
    assert not kept.requires_grad
    seen = []
    made.discriminator.register_forward_hook(lambda _m, args, _o: seen.append(args[0]))
    made.loss(batch, Seeded(0), phase="discriminator")
    assert torch.equal(seen[0], batch["image"])
    assert seen[1] is kept


def test_spectral_weights_have_a_largest_singular_value_of_one():
    layer = SpectralConv(3, 5, 3).train()
    for _ in range(200):
        layer(picture(8, 8))
    sigma = torch.linalg.svdvals(layer.weight_orig.flatten(1))[0]
    assert torch.allclose(layer.weight_u @ layer.weight_orig.flatten(1) @ layer.weight_v, sigma, rtol=1e-3)
    before = layer.weight_u.clone()
    layer.eval()(picture(8, 8))
    assert torch.equal(layer.weight_u, before)


def test_a_perceptual_loss_reads_a_file_of_vgg_and_is_no_part_of_the_system(tmp_path):
    from torchvision.models.vgg import cfgs, make_layers

    with pytest.raises(UserError, match=r"no checkpoint|perceptual_weight=0"):
        PerceptualLoss(str(tmp_path / "none.pth"))
    torch.save({"features.0.weight": torch.zeros(1)}, tmp_path / "wrong.pth")
    with pytest.raises(UserError, match="VGG-19"):
        PerceptualLoss(str(tmp_path / "wrong.pth"))
    with torch.device("meta"):
        shapes = {f"features.{n}": t.shape for n, t in make_layers(cfgs["E"]).state_dict().items()}
    torch.save({n: 0.02 * torch.randn(s) for n, s in shapes.items()}, tmp_path / "vgg.pth")
    loss = PerceptualLoss(str(tmp_path / "vgg.pth"))
    x = picture(32, 32).requires_grad_()
    assert loss(x, x.detach()).item() == 0
    value = loss(x, picture(32, 32, count=2)[:1] * 0.5)
    value.backward()
    assert value > 0
    assert x.grad.abs().sum() > 0


# --- weights ---


def test_official_files_load_with_every_size_read_off_the_tensors(tmp_path):
    from unmask.official.load import read_checkpoint

    for options in (
        {"scale": 4},
        {"scale": 3, "overlap_ratio": 0.0},
        {"ape": True, "patch_norm": False, "resi_connection": "identity", "qkv_bias": False},
        {"scale": 1, "upsampler": "none"},
    ):
        made = model(**options).eval()
        torch.save({"params_ema": official_state(made), "params": {}}, tmp_path / "hat.pth")
        loaded = load_official(read_checkpoint(tmp_path / "hat.pth", prefer=("params_ema", "params")))
        low = picture()
        assert torch.allclose(loaded.network(low), made.network(low), atol=1e-6)
    with pytest.raises(UserError, match="not the weights of a HAT"):
        load_official({"a": torch.zeros(1)})


def test_another_scale_starts_from_all_but_the_last_layers(tmp_path):
    two = model()
    two.save_pretrained(tmp_path / "two")
    four = HAT.build(HAT.Config(**{**SMALL, "scale": 4, "init": str(tmp_path / "two")}))
    assert four.config.init is None
    assert torch.equal(four.network.groups[0].conv.weight, two.network.groups[0].conv.weight)
    assert torch.equal(four.network.reconstruct.upsample["0"].weight, two.network.reconstruct.upsample["0"].weight)
    with pytest.raises(UserError, match="same size and options"):
        HAT.build(HAT.Config(**{**SMALL, "depths": (3,), "init": str(tmp_path / "two")}))


# --- attribution ---


def test_the_influence_of_a_window_network_ends_where_its_windows_do():
    near = model(channel_attention=False, overlapping_attention=False, depths=(1,), resi_connection="identity").eval()
    far = model(conv_scale=1.0).eval()
    low = picture(32, 32)
    first, second = (area_of_influence(m, low, patch=4) for m in (near, far))
    assert first.far_share < second.far_share
    assert first.diffusion_index < second.diffusion_index
    assert area_of_influence(near, low, patch=4, method="path", steps=3).heat.shape == (32, 32)
    assert Influence(torch.ones(8, 8), (0, 0, 2)).diffusion_index == pytest.approx(100)
    with pytest.raises(UserError, match="does not lie"):
        area_of_influence(near, low, patch=40)


# --- bad input ---


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"scale": 5}, "2, 3, 4"),
        ({"scale": 1}, "upsampler=none"),
        ({"scale": 2, "upsampler": "none"}, "scale=1"),
        ({"num_heads": 5}, "does not divide"),
        ({"num_heads": (2, 2)}, "groups"),
        ({"window_size": 6, "image_size": 12}, "must be even"),
        ({"image_size": 2}, "smaller than window_size"),
    ],
)
def test_options_that_do_not_fit_are_told_in_one_line(options, words):
    from unmask.contracts import configured

    with pytest.raises(UserError, match=words) as told:
        configured(HAT, {**SMALL, **options})
    assert "\n" not in str(told.value)


def test_inputs_that_do_not_fit_are_told_in_one_line():
    made = model().eval()
    for words, act in {
        "multiple of window_size=4": lambda: made.network(picture(15, 16)),
        "has 1 channels": lambda: made.network(picture(channels=1)),
        "fixed to image_size": lambda: model(ape=True).network(picture(8, 8)),
        "divide 8-bit values": lambda: made.network((picture() * 255).to(torch.uint8)),
        "in 0 ... 1": lambda: made.predict([picture()[0] * 255]),
        "leave scale out": lambda: made.predict([picture()[0]], scale=4),
        "must be a multiple of the window 4": lambda: made.predict([picture()[0]], tile=6),
        "2 a side|needs 2": lambda: made.predict([picture(1, 9)[0]]),
        "takes sides that 8 divides": lambda: UNetDiscriminator(3, 4)(picture(12, 12)),
        "needs low": lambda: model(scale=1, upsampler="none").loss({"image": picture()}, Seeded(0)),
    }.items():
        with pytest.raises(UserError, match=words):
            act()


# --- from the command line's functions ---


def test_a_run_trains_measures_and_is_opened_again(tmp_path, monkeypatch):
    import unmask

    monkeypatch.setenv("UNMASK_CACHE", str(tmp_path / "cache"))
    rng = np.random.default_rng(0)
    photos = tmp_path / "photos"
    photos.mkdir()
    for i in range(4):
        saved(photos / f"{i}.png", rng.integers(0, 256, (40, 48, 3), dtype=np.uint8))
    run = unmask.train(
        "hat",
        photos,
        recipe="tiny",
        out=tmp_path / "run",
        steps=2,
        batch_size=2,
        device="cpu",
        talk=lambda _: None,
        overrides={"embed_dim": 12, "depths": [1], "num_heads": 2, "squeeze_factor": 4, "data.eval_crop": 32},
    )
    result = unmask.load(run, whole=True)
    numbers = result.measure(RestorationSettings(uri=str(photos)), Seeded(0), limit=2, folder=tmp_path / "shown")
    assert numbers["samples"] == 2
    assert set(numbers["baseline"]["bicubic"]) == {"psnr_y", "ssim_y", "psnr", "ssim"}
    assert abs(numbers["psnr_y"] - numbers["baseline"]["bicubic"]["psnr_y"]) < 1  # it starts as bicubic
    assert len(list((tmp_path / "shown").glob("*.png"))) == 2


@pytest.mark.slow
def test_both_stages_of_real_world_training_run(tmp_path, monkeypatch):
    import unmask

    monkeypatch.setenv("UNMASK_CACHE", str(tmp_path / "cache"))
    recipe = tmp_path / "real.yaml"
    recipe.write_text(
        """
system: hat
stages:
  - name: pixels
    data: &data {uri: "sample:photos", image_size: 32, degradation: real, limit: 8, eval_crop: 32}
    model: &model {scale: 4, embed_dim: 12, depths: [1], num_heads: 2, window_size: 4, squeeze_factor: 4, reconstruction_dim: 8}
    train: &train {steps: 2, batch_size: 2, device: cpu}
  - name: adversarial
    from: {init: pixels}
    data: *data
    model: {<<: *model, adversarial: {num_feat: 4, perceptual_weight: 0}}
    train: *train
"""
    )
    run = unmask.train(recipe, out=tmp_path / "run", talk=lambda _: None)
    result = unmask.load(run, whole=True)
    assert result.phases == ("generator", "discriminator")
    assert result.config.init is None


@pytest.mark.slow
def test_bicubic_of_set5_has_its_usual_quality():
    import zipfile
    from pathlib import Path

    archive = Path(__file__).resolve().parents[3] / "shared" / "data" / "sr_set5_set14_hr.zip"
    if not archive.is_file():
        pytest.skip("no ../shared/data/sr_set5_set14_hr.zip")
    import io

    from unmask.data.restoration import evaluation_pair
    from unmask.systems.prediction.metrics import psnr

    values = []
    with zipfile.ZipFile(archive) as held:
        for name in sorted(n for n in held.namelist() if "Set5/" in n and not n.endswith("/")):
            pixels = np.asarray(Image.open(io.BytesIO(held.read(name))).convert("RGB"))
            high, low = evaluation_pair(pixels, RestorationSettings(), 4, 3, Seeded(0))
            values.append(float(psnr(resize_bicubic(low, 4).clamp(0, 1), high, border=4)))
    assert len(values) == 5
    assert 27.5 < np.mean(values) < 30.5  # published: 28.42 dB, on files without compression
