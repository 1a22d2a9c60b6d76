import math

import pytest
import torch

from unmask.contracts import Preprocessing
from unmask.draw import Recorder, Replay, Seeded
from unmask.errors import UserError
from unmask.systems.pretraining.mae.model import MAE
from unmask.systems.pretraining.mae.official import load_official
from unmask.systems.pretraining.pictures import HIDDEN

torch.manual_seed(0)
SMALL = {
    "backbone": {"name": "vit_nano_patch4", "image_size": 16, "depth": 2, "embed_dim": 32, "num_heads": 2},
    "decoder": {"embed_dim": 16, "depth": 2, "num_heads": 2},
}


def model(**options) -> MAE:
    torch.manual_seed(0)
    return MAE(MAE.Config(**{**SMALL, **options}))


def images(n: int = 2, channels: int = 3) -> torch.Tensor:
    return torch.randn(n, channels, 16, 16, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("ratio", [0.25, 0.5, 0.75, 0.9])
def test_every_sample_hides_the_same_number_of_patches(ratio):
    mask = model(mask_ratio=ratio).mask(images(5), Seeded(0))
    assert mask.hidden.sum(1).tolist() == [16 - int(16 * (1 - ratio))] * 5


@pytest.mark.parametrize("target", ["standardised", "pixels", "pca"])
@pytest.mark.parametrize("masking", ["random", "grid", "block"])
def test_a_bare_loop_learns_with_every_target_and_mask(target, masking):
    system = model(target=target, masking=masking, pca_components=8)
    optimiser = torch.optim.AdamW(system.parameters(), lr=3e-3)
    losses = []
    for _ in range(30):
        loss = system.loss({"image": images(4)}, Seeded(0, 0))["loss"]
        losses.append(loss.item())
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    assert losses[-1] < 0.9 * losses[0]


def test_the_loss_does_not_depend_on_visible_pixels_alone_being_predicted():
    """The loss reads hidden patches only: changing a visible patch's target changes nothing but what the encoder sees."""
    system = model()
    x = images()
    mask = system.mask(x, Seeded(0))
    predicted = system.predict_hidden(x, mask)
    every = system.decoder.all_tokens(system.encode(x, mask), mask.keep, mask.hide, mask.grid)
    assert torch.allclose(predicted, torch.stack([every[i, mask.hide[i]] for i in range(2)]), atol=1e-5)


def test_a_step_is_replayed_from_its_recorded_draws():
    system = model()
    recorder = Recorder(Seeded(3, 7))
    first = system.loss({"image": images()}, recorder)["loss"]
    assert set(recorder.recorded) == {"noise"}
    assert torch.equal(first, system.loss({"image": images()}, Replay(recorder.recorded))["loss"])


def test_mask_tokens_in_the_encoder_are_possible_and_see_every_place():
    system = model(mask_tokens_in_encoder=True)
    mask = system.mask(images(), Seeded(0))
    assert system.encode(images(), mask).shape == (2, 17, 32)
    system.loss({"image": images()}, Seeded(0))["loss"].backward()
    assert system.mask_token.grad.abs().sum() > 0


def test_grid_masking_keeps_one_patch_of_every_cell():
    mask = model(masking="grid").mask(images(6), Seeded(0)).on_grid()
    cells = (~mask).unflatten(1, (2, 2)).unflatten(3, (2, 2)).sum((2, 4))
    assert torch.equal(cells, torch.ones_like(cells))


def test_references_are_in_the_targets_units():
    system = model()
    found = system.references({"image": images(8)}, Seeded(0))
    assert found["mean of the visible"].item() == pytest.approx(47 / 48, abs=0.03), (
        "a flat guess of a standardised patch"
    )
    assert set(found) == {"mean of the visible", "nearest visible patch", "bilinear fill"}
    raw = model(target="pixels").references({"image": images(8)}, Seeded(0))
    assert raw["nearest visible patch"] > raw["mean of the visible"], "independent noise is no help"


def test_the_preview_pastes_the_prediction_only_where_patches_were_hidden():
    system = model()
    system.encoder.preprocessing = Preprocessing(mean=(0.5,) * 3, std=(0.25,) * 3, image_size=(16, 16))
    picture = system.preview({"image": images(3)}, Seeded(0))[0]
    assert picture.columns[:4] == ["original", "what the model saw", "prediction", "pasted"]
    hidden = system.mask(images(3), Seeded(0)).pixels((4, 4)).numpy()
    for row, mask in zip(picture.rows, hidden, strict=True):
        original, seen, _, pasted = row[:4]
        assert (original[~mask[0]] == pasted[~mask[0]]).all()
        assert (seen[mask[0]] == HIDDEN).all()


def test_grey_and_many_channels_are_at_home():
    for channels in (1, 2, 5):
        system = model(backbone={**SMALL["backbone"], "in_channels": channels})
        x = images(2, channels)
        assert torch.isfinite(system.loss({"image": x}, Seeded(0))["loss"])
        assert system.preview({"image": x}, Seeded(0))[0].rows[0][0].shape == (16, 16, 3)


def test_the_parameter_count_is_the_papers():
    with torch.device("meta"):
        count = sum(p.numel() for p in MAE(MAE.Config()).parameters())
    assert round(count / 1e6, 1) == 111.7  # 111.9 M counts the two fixed tables


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"mask_ratio": 0.99}, "leaves no visible token of 16"),
        ({"backbone": {**SMALL["backbone"], "image_size": 18}}, "patch 4 does not divide image size 18"),
        ({"decoder": {"embed_dim": 18, "num_heads": 2}}, "divisible by 4"),
        ({"masking": "grid", "mask_ratio": 0.6}, "masking=grid"),
    ],
)
def test_bad_options_are_one_clear_line(options, words):
    with pytest.raises(UserError, match=words):
        model(**options).mask(images(), Seeded(0))


def test_a_backbone_that_cannot_drop_is_refused_with_the_way_out():
    with pytest.raises(UserError, match="mae drops hidden tokens, swin_tiny needs every token: use simmim"):
        model(backbone={"name": "swin_tiny", "image_size": 32})


def official_names(system: MAE) -> dict[str, torch.Tensor]:
    names = {
        "decoder.embed.": "decoder_embed.",
        "decoder.blocks.": "decoder_blocks.",
        "decoder.norm.": "decoder_norm.",
        "decoder.predict.": "decoder_pred.",
    }
    out = {}
    for key, value in system.state_dict().items():
        key = key.removeprefix("encoder.")
        for ours, theirs in names.items():
            key = key.replace(ours, theirs) if key.startswith(ours) else key
        out["mask_token" if key == "decoder.mask_token" else key] = value
    for name, width in (("pos_embed", 32), ("decoder_pos_embed", 16)):
        table = (
            system.encoder.positions(system.grid, torch.device("cpu"))
            if width == 32
            else system.decoder.positions(system.grid, torch.device("cpu"))
        )
        zero = torch.zeros(1, width)
        out[name] = (table if width == 32 else torch.cat((zero, table)))[None]
    return out


def test_official_files_of_each_kind_are_loaded():
    system = model(target="pixels")
    state = official_names(system)
    heads = {"num_heads": 2, "decoder_num_heads": 2}
    again = load_official(state, heads)
    x = images()
    assert torch.allclose(
        again.loss({"image": x}, Seeded(0))["loss"], system.loss({"image": x}, Seeded(0))["loss"], atol=1e-6
    )
    encoder = load_official({k: v for k, v in state.items() if "decoder" not in k and k != "mask_token"}, heads)
    assert torch.allclose(encoder.tokens(x), system.encoder.tokens(x), atol=1e-6)
    state["pos_embed"] = state["pos_embed"] + 0.1
    with pytest.raises(UserError, match="not the fixed sine-cosine table"):
        load_official(state, heads)
    learned = load_official({k: v for k, v in state.items() if "decoder" not in k and k != "mask_token"}, heads)
    assert learned.config.position == "learned"
    with pytest.raises(UserError, match="not the weights of a masked autoencoder"):
        load_official({"conv1.weight": torch.zeros(1)})


def test_the_step_cost_is_a_quarter_of_the_tokens():
    system = model()
    seen = []
    system.encoder.blocks[0].register_forward_hook(lambda _m, args, _o: seen.append(args[0].shape[1]))
    system.loss({"image": images()}, Seeded(0))
    assert seen == [1 + math.ceil(16 * 0.25)]


def test_the_pca_basis_is_that_of_the_patches_hidden_first():
    from sklearn.decomposition import PCA

    from unmask.nn.patch import select

    system = model(target="pca", pca_components=5)
    x = images(16)
    system.loss({"image": x}, Seeded(0))
    rows = select(system.patches(x), system.mask(x, Seeded(0)).hide).flatten(0, 1)
    wanted = PCA(5).fit(rows.numpy())
    overlap = torch.as_tensor(wanted.components_).float() @ system.pca_basis
    assert torch.allclose(overlap.abs(), torch.eye(5), atol=1e-3)
    before = system.pca_basis.clone()
    system.loss({"image": images(16) * 2}, Seeded(1))
    assert torch.equal(system.pca_basis, before), "fitted once"


def test_only_parameters_with_one_axis_are_spared_from_decay_as_in_the_authors_code():
    spared = [n for g in model().parameter_groups() if g.decay_scale == 0 for n in g.names]
    shapes = dict(model().named_parameters())
    assert spared
    assert all(shapes[n].ndim == 1 for n in spared)
    assert {"encoder.cls_token", "decoder.mask_token"} <= {
        n for g in model().parameter_groups() if g.decay_scale for n in g.names
    }
