"""SimMIM: what is hidden, what is predicted, what the loss counts; every encoder, mask, head and loss."""

import math

import pytest
import torch
from torch.nn import functional as F

from unmask.contracts import Preprocessing
from unmask.draw import Recorder, Replay, Seeded
from unmask.errors import UserError
from unmask.masks.mask import Mask
from unmask.nn.patch import unpatchify
from unmask.systems.pretraining.pictures import HIDDEN
from unmask.systems.pretraining.simmim.model import SimMIM, default_cell
from unmask.systems.pretraining.simmim.official import BACK, load_official, run_case
from unmask.systems.pretraining.simmim.target import Target, local_statistics

SWIN = {"name": "swin_nano", "image_size": 32, "patch_size": 2, "window_size": 4, "embed_dim": 8, "depths": (2, 2)}
SWIN |= {"num_heads": (2, 2)}
SWIN2 = {**SWIN, "name": "swinv2_nano"}
VIT = {"name": "vit_nano_patch4", "image_size": 32, "depth": 2, "embed_dim": 16, "num_heads": 2, "qkv_bias": "qv"}
VIT |= {"position": "none", "relative": ("shared",), "init": "beit", "init_values": 0.1}
CONVNET = {"name": "timm/resnet18", "image_size": 32, "arguments": {"channels": (8, 8, 16, 16)}}


def model(backbone=SWIN, **options) -> SimMIM:
    torch.manual_seed(0)
    return SimMIM(SimMIM.Config(backbone=backbone, **{"cell_size": 8, **options}))


def images(n: int = 2, channels: int = 3, size: tuple[int, int] = (32, 32)) -> torch.Tensor:
    return torch.randn(n, channels, *size, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("backbone", [SWIN, SWIN2, VIT], ids=lambda b: b["name"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"masking": "square", "loss": "l2"},
        {"masking": "block", "loss": "smooth_l1", "head": "mlp"},
        {"loss": "cross_entropy", "bins": 8},
        {"predict": "all"},
        {"local_norm": 5},
    ],
    ids=str,
)
def test_a_bare_loop_learns_with_every_option(backbone, options):
    system = model(backbone, **options)
    optimiser = torch.optim.AdamW(system.parameters(), lr=5e-3)
    losses = []
    for _ in range(25):
        loss = system.loss({"image": images(4) + 1}, Seeded(0, 0))["loss"]
        losses.append(loss.item())
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    assert min(losses[-5:]) < 0.95 * losses[0]
    assert all(p.grad is None or p.grad.isfinite().all() for p in system.parameters())


@pytest.mark.parametrize("options", [{}, {"masking": "block", "head": "mlp"}, {"masking": "square"}])
def test_a_convnet_sees_the_token_painted_into_hidden_pixels(options):
    system = model(CONVNET, **options).eval()
    x = images()
    mask = system.mask(x, Seeded(0))
    hidden = mask.pixels((1, 1))
    changed = torch.where(hidden, x + 1, x)
    torch.testing.assert_close(system.features(x, mask), system.features(changed, mask))
    system.train().loss({"image": x}, Seeded(0))["loss"].backward()
    assert system.mask_token.shape == (3,)
    assert system.mask_token.grad.abs().sum() > 0


@pytest.mark.parametrize("backbone", [SWIN, VIT], ids=lambda b: b["name"])
@pytest.mark.parametrize("options", [{}, {"loss": "cross_entropy"}, {"local_norm": 5}, {"masking": "square"}], ids=str)
def test_predicting_hidden_places_alone_changes_no_number(backbone, options):
    system = model(backbone, **options)
    x = images()
    mask = system.mask(x, Seeded(0))
    features, wanted = system.features(x, mask), system.wanted(x)
    places = system.places(mask, x)
    assert places is not None
    assert places.shape[1] < features.shape[1]
    some = system.compare(features, wanted, places, mask)
    every = system.compare(features, wanted, None, mask)
    torch.testing.assert_close(some, every)
    for a, b in zip(
        torch.autograd.grad(some, system.decoder.parameters(), retain_graph=True),
        torch.autograd.grad(every, system.decoder.parameters()),
        strict=True,
    ):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-4)


def test_places_wider_than_a_cell_weigh_pixels():
    system = model(SWIN, cell_size=2)
    x = images()
    assert system.stride == (4, 4)
    mask = system.mask(x, Seeded(0))
    assert mask.num_hidden == math.ceil(256 * 0.6)
    assert system.places(mask, x) is None
    guess = system.reconstruction(system.features(x, mask), x)
    hidden = mask.pixels((2, 2)).float()
    expected = ((guess - x).abs() * hidden).sum() / (hidden.sum() + 1e-5) / 3
    torch.testing.assert_close(system.loss({"image": x}, Seeded(0))["loss"], expected)


def test_the_reconstruction_is_a_pixel_shuffle():
    system = model()
    x = images()
    features = system.features(x, system.mask(x, Seeded(0)))
    maps = system.decoder(features).transpose(1, 2).unflatten(2, (8, 8))
    torch.testing.assert_close(system.reconstruction(features, x), F.pixel_shuffle(maps, 4))


def test_a_step_is_replayed_from_its_recorded_draws():
    system = model(backbone={**SWIN, "drop_path": 0.3})
    recorder = Recorder(Seeded(3, 7))
    first = system.loss({"image": images()}, recorder)["loss"]
    assert set(recorder.recorded) == {"permutation", "drop_path"}
    assert torch.equal(first, system.loss({"image": images()}, Replay(recorder.recorded))["loss"])


def test_images_that_the_stride_does_not_divide_count_real_pixels_only():
    system = model({**SWIN, "image_size": 18, "patch_size": 3, "window_size": 3}, cell_size=3)
    x = images(size=(18, 18))
    assert system.grid(x) == (3, 3)
    system = model({**SWIN, "image_size": 20, "patch_size": 4}, cell_size=4)
    x = images(size=(20, 20))
    assert system.grid(x) == (3, 3), "5 patches become 3 places of 8 pixels, 24 in all"
    mask = system.mask(x, Seeded(0))
    guess = system.reconstruction(system.features(x, mask), x)
    assert guess.shape == x.shape
    hidden = mask.pixels((4, 4)).float()
    expected = ((guess - x).abs() * hidden).sum() / (hidden.sum() + 1e-5) / 3
    torch.testing.assert_close(system.loss({"image": x}, Seeded(0))["loss"], expected)


def test_images_that_are_not_square_have_rows_and_columns_of_cells():
    system = model({**SWIN, "image_size": (32, 48)})
    mask = system.mask(images(size=(32, 48)), Seeded(0))
    assert mask.grid == (16, 24)
    assert mask.num_hidden == math.ceil(24 * 0.6) * 16


def test_local_statistics_are_those_of_the_window_inside_the_image():
    x = images(2, 3, (9, 11))
    mean, deviation = local_statistics(x, 5)
    for row, column in ((0, 0), (4, 5), (8, 3)):
        window = x[:, :, max(row - 2, 0) : row + 3, max(column - 2, 0) : column + 3].flatten(2)
        torch.testing.assert_close(mean[:, :, row, column], window.mean(dim=2), atol=1e-5, rtol=1e-4)
        expected = (window.var(dim=2) + 1e-6).sqrt()
        torch.testing.assert_close(deviation[:, :, row, column], expected, atol=1e-5, rtol=1e-4)


def test_bins_share_the_range_of_a_channel_equally():
    plain = Preprocessing(mean=(0.0,), std=(1.0,), channels=1)
    values = torch.tensor([0.0, 0.124, 0.126, 0.5, 0.999, 1.0, -0.1]).view(1, 1, 1, 7)
    assert Target("cross_entropy", 8).of(values, plain).flatten().tolist() == [0, 0, 1, 4, 7, 7, 0]
    assert Target("cross_entropy", 256).of(values, plain).flatten().tolist() == [0, 31, 32, 128, 255, 255, 0]


def test_a_perfect_guess_of_bins_costs_nothing_and_shows_their_centres():
    target, plain = Target("cross_entropy", 8), Preprocessing(mean=(0.0,) * 2, std=(1.0,) * 2, channels=2)
    wanted = torch.randint(0, 8, (1, 3, 2 * 4))  # three places of 2 x 2 pixels, two channels
    logits = F.one_hot(wanted.unflatten(2, (2, 4)), 8).movedim(-1, 3).flatten(2).float() * 100
    assert target.loss(logits, wanted, 2, None) < 1e-6
    torch.testing.assert_close(target.values(logits, 2, plain), (wanted + 0.5) / 8)
    assert unpatchify(target.values(logits, 2, plain), (1, 3), (2, 2), channels_first=True).shape == (1, 2, 2, 6)


@pytest.mark.parametrize("masking", ["random", "square", "block"])
def test_references_are_the_losses_of_their_fills(masking):
    system = model(masking=masking)
    x = images(4)
    found = system.references({"image": x}, Seeded(0))
    assert list(found) == ["mean of the visible", "nearest visible patch", "bilinear fill"]
    hidden = system.mask(x, Seeded(0)).pixels((2, 2))
    mean = torch.stack([(i * ~h).sum((1, 2)) / (~h).sum() for i, h in zip(x, hidden, strict=True)])
    expected = ((x - mean[..., None, None]).abs() * hidden).sum() / hidden.sum() / 3
    torch.testing.assert_close(found["mean of the visible"], expected, atol=1e-4, rtol=1e-4)
    assert found["nearest visible patch"] > found["mean of the visible"], "independent noise is no help"
    norm = model(local_norm=5).references({"image": x}, Seeded(0))
    assert norm["mean of the visible"] != found["mean of the visible"]
    bins = model(loss="cross_entropy").references({"image": x}, Seeded(0))
    assert 0 < bins["histogram of the visible"] < math.log(8) * 1.1


@pytest.mark.parametrize("options", [{}, {"local_norm": 5}, {"loss": "cross_entropy"}], ids=str)
def test_the_preview_pastes_the_prediction_only_where_pixels_were_hidden(options):
    system = model(**options)
    system.encoder.preprocessing = Preprocessing(mean=(0.5,) * 3, std=(0.25,) * 3, image_size=(32, 32))
    picture = system.preview({"image": images(3)}, Seeded(0))[0]
    assert picture.columns[:4] == ["original", "what the model saw", "prediction", "pasted"]
    hidden = system.mask(images(3), Seeded(0)).pixels((2, 2)).numpy()
    for row, mask in zip(picture.rows, hidden, strict=True):
        original, seen, _, pasted = row[:4]
        assert (original[~mask[0]] == pasted[~mask[0]]).all()
        assert (seen[mask[0]] == HIDDEN).all()


def test_grey_and_many_channels_are_at_home():
    for channels in (1, 2, 5):
        for loss in ("l1", "cross_entropy"):
            system = model({**SWIN, "in_channels": channels}, loss=loss)
            x = images(2, channels)
            assert torch.isfinite(system.loss({"image": x}, Seeded(0))["loss"])
            assert system.preview({"image": x}, Seeded(0))[0].rows[0][0].shape == (32, 32, 3)


def test_the_cell_left_open_is_the_papers_or_fits_a_small_image():
    assert default_cell((192, 192), (4, 4)) == 32
    assert default_cell((224, 224), (16, 16)) == 32
    assert default_cell((32, 32), (2, 2)) in (4, 8)
    assert default_cell((28, 28), (2, 2)) == 4
    assert default_cell((28, 28), (4, 4)) == 4
    assert default_cell((96, 144), (8, 8)) == 16


def test_the_mask_token_and_tables_take_no_decay():
    named = model(VIT).no_weight_decay()
    assert {"mask_token", "encoder.rel_pos_bias.relative_position_bias_table"} <= named


def test_the_defaults_are_the_papers():
    with torch.device("meta"):
        config = SimMIM.Config()
    assert (config.mask_ratio, config.loss, config.head, config.predict) == (0.6, "l1", "linear", "hidden")
    assert config.backbone.name == "swin_base"


def official_names(system: SimMIM) -> dict[str, torch.Tensor]:
    import re

    out = {}
    for key, value in system.state_dict().items():
        if key.endswith("relative_position_index"):
            continue
        for pattern, word in BACK:
            key = re.sub(pattern, word, key)
        if key == "encoder.mask_token":
            value = value.reshape(1, 1, -1)
        elif key.startswith("decoder.") and key.endswith("weight"):
            value = value[:, :, None, None]
        out[key] = value
    return out


@pytest.mark.parametrize("backbone", [SWIN, SWIN2, VIT], ids=lambda b: b["name"])
@pytest.mark.parametrize("head", ["linear", "mlp"])
def test_an_official_checkpoint_becomes_the_same_system(backbone, head):
    system = model(backbone, head=head).eval()
    state = official_names(system)
    words = {"image_size": 32, "window_size": 4, "mask_patch_size": 8, "num_heads": backbone["num_heads"]}
    loaded = load_official(state, words).eval()
    x = images()
    mask = system.mask(x, Seeded(0))
    torch.testing.assert_close(loaded.features(x, mask), system.features(x, mask))
    torch.testing.assert_close(
        loaded.loss({"image": x}, Seeded(0))["loss"], system.loss({"image": x}, Seeded(0))["loss"]
    )


@pytest.mark.parametrize("backbone", [SWIN2, VIT, {**SWIN, "drop_path": 0.4}], ids=lambda b: b["name"])
def test_a_case_with_drop_path_and_local_norm_is_replayed(backbone):
    system = model(backbone, local_norm=5).train()
    x, order = images(), torch.stack([torch.randperm(16) for _ in range(2)])
    depth = system.encoder.num_layers
    uniform = torch.rand(2, depth, 2)
    tensors = {f"param.{k}": v for k, v in official_names(system).items()}
    tensors |= {"in.images": x, "draw.permutation": order, "draw.drop_path": uniform}
    config = {"image_size": 32, "mask_patch_size": 8, "window_size": 4, "num_heads": backbone["num_heads"]}
    config |= {"drop_path_rate": backbone.get("drop_path", 0.0), "norm_target": {"enable": True, "patch_size": 5}}
    outputs, _, gradients = run_case(config, tensors)
    hidden = torch.zeros(2, 16, dtype=torch.bool).scatter_(1, order[:, :10], True).view(2, 4, 4)
    times = outputs["mask"].shape[1] // 4
    assert torch.equal(outputs["mask"].bool(), hidden.repeat_interleave(times, 1).repeat_interleave(times, 2))
    draw = Replay({"permutation": order.argsort(dim=1).float(), "drop_path": uniform})
    expected = system.loss({"image": x}, draw)["loss"]
    torch.testing.assert_close(outputs["loss"], expected.detach())
    mask = Mask(outputs["mask"].bool().flatten(1), (4 * times, 4 * times))
    torch.testing.assert_close(outputs["features"].flatten(2).transpose(1, 2), system.features(x, mask, draw).detach())
    assert gradients["encoder.mask_token"].shape[:2] == (1, 1)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"cell_size": 12}, "cell_size=12 does not divide image size 32: use 8"),
        ({"cell_size": 7}, "cell_size=7 is no multiple of the patch 2"),
        ({"mask_ratio": 0.97}, "leaves no visible cell of 16"),
        ({"local_norm": 46}, "local_norm=46 must be odd: use 47"),
        ({"local_norm": 47, "loss": "cross_entropy"}, "use loss=l1"),
    ],
)
def test_bad_options_are_one_clear_line(options, words):
    with pytest.raises(UserError) as error:
        model(**options)
    assert words in str(error.value)


def test_weights_of_another_system_are_refused():
    with pytest.raises(UserError, match="not weights of SimMIM"):
        load_official({"x": torch.zeros(1)})
