"""What is measured of maskings: rules of layers, regions, LIME's regression, curves, shape leakage, linearity; the claim's arms."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import unmask
from unmask.claims.claim import claim_of
from unmask.contracts import Preprocessing
from unmask.data.settings import DataSettings
from unmask.draw import Seeded
from unmask.errors import UserError
from unmask.models import open_model
from unmask.systems.explanation import curves, lime, maskings, regions
from unmask.systems.explanation.heat import HeatMap
from unmask.systems.explanation.layer_masking import networks
from unmask.systems.explanation.layer_masking.masked_map import Rules
from unmask.systems.explanation.layer_masking.model import LayerMasking
from unmask.systems.explanation.layer_masking.propagate import LayerMasked, masked, values
from unmask.systems.explanation.layer_masking.visible import Visible, filled
from unmask.systems.prediction.classifier.model import Classifier

KNOWN = Preprocessing((0.5,) * 3, (0.5,) * 3, (16, 16), 3)


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.Conv2d(8, 8, 3)
        )
        self.fc = nn.Linear(8, 4)

    def forward(self, x):
        return self.fc(F.relu(self.body(x)).mean((2, 3)))


def opened(module=None):
    torch.manual_seed(0)
    return open_model((module or Small)().eval(), classes=tuple("abcd"), preprocessing=KNOWN)


def halves(batch=2, side=16):
    visible = torch.ones(batch, 1, side, side)
    visible[:, :, :, side // 2 :] = 0
    return visible


# --- layers ---


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 99),
    kernel=st.sampled_from([1, 3, 5]),
    stride=st.integers(1, 2),
    dilation=st.integers(1, 2),
    share=st.floats(0.05, 0.95),
)
def test_fewer_rounds_than_the_authors_give_the_same_convolution(seed, kernel, stride, dilation, share):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, 4, 12, 11, generator=generator)
    mask = (torch.rand(2, 1, 12, 11, generator=generator) < share).float()
    layer = nn.Conv2d(4, 4, kernel, stride, kernel // 2 * dilation, dilation, groups=2)
    ours, after = values(layer(masked(x, mask, Rules())))
    visible = Visible.of(mask, x)
    theirs = layer(filled(x * mask, visible, dilation * (kernel - 1) + 1)) * after
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_a_gate_without_an_equal_mask_joins_by_intersection_and_concatenation_by_majority():
    x = torch.randn(1, 2, 4, 4)
    a, b, c = torch.zeros(3, 1, 1, 4, 4)
    a[..., :2, :], b[..., :, :2], c[..., :] = 1, 1, 1
    with torch.no_grad():
        total, both = values(masked(x, a) + masked(x, b))
        assert torch.equal(both, a * b)
        assert total[(a * b).expand_as(total) == 0].abs().max() == 0
        votes = values(torch.cat([masked(x, a), masked(x, b), masked(x, c)], 1))[1]
        assert torch.equal(votes, ((a + b + c) > 1.5).float())
        older = Rules(variant="older")
        union = values(torch.cat([masked(x, a, older), masked(x, b, older)], 1))[1]
    assert torch.equal(union, ((a + b) > 0).float())


def test_strict_pools_leave_hidden_places_out_of_a_maximum():
    x = -torch.ones(1, 1, 4, 4)
    mask = torch.zeros(1, 1, 4, 4)
    mask[..., 0] = 1
    loose, strict = (values(F.max_pool2d(masked(x, mask, Rules(strict_pool=s)), 2))[0] for s in (False, True))
    assert loose[0, 0, 0, 0] == 0  # the hidden zero wins over what is visible and negative
    assert strict[0, 0, 0, 0] == -1


def test_images_may_share_one_mask_and_gradients_stop_at_hidden_pixels():
    ask = LayerMasked(opened())
    images, visible = torch.randn(3, 3, 16, 16, requires_grad=True), halves(1)
    shared = ask(images, visible)
    torch.testing.assert_close(shared, ask(images, visible.expand(3, -1, -1, -1)))
    shared.sum().backward()
    assert images.grad[..., 8:].abs().max() == 0
    assert images.grad[..., :8].abs().max() > 0


def test_the_callers_images_and_weights_are_never_changed():
    model = opened()
    before = {k: v.clone() for k, v in model.module.state_dict().items()}
    images = torch.randn(2, 3, 16, 16)
    copy = images.clone()
    LayerMasked(model)(images, halves())
    assert torch.equal(images, copy)
    assert all(torch.equal(v, before[k]) for k, v in model.module.state_dict().items())


class Rolls(Small):
    def forward(self, x):
        return super().forward(torch.roll(x, 1, 2))


class InPlace(Small):
    def forward(self, x):
        x = self.body(x)
        x.add_(1.0)
        x *= 2.0
        return self.fc(x.mean((2, 3)))


class OutOfPlace(Small):
    def forward(self, x):
        return self.fc(((self.body(x) + 1.0) * 2.0).mean((2, 3)))


class Leaves(Small):
    def forward(self, x):
        x = self.body(x)
        F.relu(x, inplace=True)
        return self.fc(x.mean((2, 3)))


def test_sums_and_products_in_place_are_followed():
    images = torch.randn(2, 3, 16, 16)
    answers = [LayerMasked(opened(m))(images, halves()) for m in (InPlace, OutOfPlace)]
    torch.testing.assert_close(*answers)


def test_what_layer_masking_cannot_follow_is_refused_in_a_line():
    images = torch.randn(2, 3, 16, 16)
    with pytest.raises(UserError, match=r"no rule for Rolls \(roll\)"):
        LayerMasked(opened(Rolls))(images, halves())
    with pytest.raises(UserError, match="training mode"):
        LayerMasked(in_training())
    with pytest.raises(UserError, match=r"GroupNorm.*hidden zeros"):
        LayerMasked(open_model(nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4)).eval()))
    with pytest.raises(UserError, match="values between"):
        LayerMasked(opened())(images, halves() * 0.5)
    with pytest.raises(UserError, match="does not fit"):
        LayerMasked(opened())(images, torch.ones(2, 1, 8, 8))
    with pytest.raises(UserError, match="does not follow"):
        LayerMasked(opened(Leaves)).verify(images[:1])


def in_training():
    model = opened()
    model.module.train()
    return model


# --- maskings ---


@pytest.mark.parametrize("name", [*maskings.FILLINGS, "grey+smooth", "blur+smooth"])
def test_a_filling_keeps_visible_pixels_and_forgets_hidden_ones_but_for_blur_and_mean(name):
    model = opened()
    ask = maskings.masking(name, model, color=[0.1, 0.2, 0.3], draw=Seeded(0))
    images, visible = torch.randn(2, 3, 16, 16), halves()
    painted = ask.paint(images, visible)
    assert torch.equal(painted[..., :8], images[..., :8])
    other = torch.where(visible > 0, images, 3.0)
    changed = not torch.equal(ask.paint(other, visible), painted)
    assert changed == (name.partition("+")[0] in ("blur", "mean"))


def test_black_white_and_constant_colours_are_pixels_before_standardisation():
    model = opened()
    image, nothing = torch.zeros(1, 3, 16, 16), torch.zeros(1, 1, 16, 16)
    for name, value in (("black", -1.0), ("white", 1.0), ("grey", 0.0)):
        assert torch.allclose(maskings.masking(name, model).paint(image, nothing), torch.tensor(value))
    constant = maskings.masking("constant", model, color=[0.75, 0.5, 0.25]).paint(image, nothing)
    assert torch.allclose(constant[0, :, 0, 0], torch.tensor([0.5, 0.0, -0.5]))


@pytest.mark.parametrize(("name", "words"), [("gray", "did you mean grey"), ("constant", "needs a colour")])
def test_a_masking_that_cannot_be_made_says_why(name, words):
    with pytest.raises(UserError, match=words):
        maskings.masking(name, opened())


def test_dropped_tokens_of_our_transformer_have_no_influence_and_convnets_have_none_to_drop():
    torch.manual_seed(0)
    backbone = {"name": "vit_nano_patch4", "image_size": 16, "in_channels": 3}
    model = open_model(Classifier(Classifier.Config(backbone=backbone, classes=4)).eval())
    ask = maskings.masking("token_dropping", model)
    images, visible = torch.randn(3, 3, 16, 16), torch.ones(3, 1, 16, 16)
    visible[1, :, :, 8:], visible[2, :, 4:] = 0, 0
    with torch.no_grad():
        answers = ask(images, visible)
        torch.testing.assert_close(answers[:1], model.logits({"image": images})[:1])
        torch.testing.assert_close(answers, ask(torch.where(visible > 0, images, 5.0), visible))
    with pytest.raises(UserError, match="layer_masking is for convolutional networks"):
        maskings.masking("token_dropping", opened())


# --- regions and LIME ---


def test_region_maps_with_gaps_or_of_another_size_are_refused():
    with pytest.raises(UserError, match="no region 1"):
        regions.checked(torch.tensor([[0, 2]]))
    with pytest.raises(UserError, match="does not fit"):
        regions.checked(torch.tensor([[0, 1]]), (2, 2))


@pytest.mark.parametrize("kind", ["slic", "quickshift"])
def test_regions_that_follow_the_picture_are_numbered_without_gaps(kind):
    pytest.importorskip("skimage")
    picture = np.random.default_rng(0).integers(0, 255, (24, 20, 3), dtype=np.uint8)
    assert regions.checked(regions.regions(picture, kind, n_segments=12), (24, 20)).shape == (24, 20)


def test_limes_regression_is_the_packages_own():
    package = pytest.importorskip("lime.lime_base")
    from sklearn.metrics import pairwise_distances

    rows = lime.presence(Seeded(0), 60, 7)
    found = torch.rand(60, 3, generator=torch.Generator().manual_seed(0))
    fit = lime.fit(rows, found, [1])
    base = package.LimeBase(lambda d: np.sqrt(np.exp(-(d**2) / 0.25**2)), random_state=0)
    distance = pairwise_distances(rows.numpy(), rows[:1].numpy(), metric="cosine").ravel()
    intercept, weights, score, _ = base.explain_instance_with_data(rows.numpy(), found.numpy(), distance, 1, 100)
    assert intercept == pytest.approx(float(fit.intercept[0]), abs=1e-5)
    assert score == pytest.approx(float(fit.score[0]), abs=1e-5)
    torch.testing.assert_close(torch.tensor([w for _, w in sorted(weights)]).float(), fit.weights[0], rtol=0, atol=1e-5)


# --- curves ---


def brightness(images, visible):
    """Class 1 where the visible mean is above 0."""
    mean = (images * visible).sum((1, 2, 3)) / (3 * visible.sum((1, 2, 3)).clamp_min(1))
    return torch.stack((-mean, mean), 1)


def test_a_removal_curve_knows_the_whole_image_and_the_empty_one():
    images = torch.randn(20, 3, 8, 8).sign() * torch.ones(20, 1, 1, 1)
    labels = brightness(images, torch.ones(20, 1, 8, 8)).argmax(1)
    segments = regions.squares((8, 8), 2)
    order = curves.order_of(Seeded(0), 20, 16)
    table = torch.eye(2)
    curve = curves.removal_curve(brightness, images, labels, segments, order, similarity=table)
    assert curve.accuracy[0] == curve.kept[0] == 1
    assert curve.entropy[-1] == pytest.approx(0, abs=1e-6)
    assert curve.similarity == pytest.approx(curve.accuracy)
    with pytest.raises(UserError, match=r"\[K, K\]"):
        curves.removal_curve(brightness, images, labels, segments, order, similarity=torch.ones(2, 3))


def test_salient_orders_hide_the_heaviest_or_the_lightest_first():
    saliency = torch.tensor([[0.1, 0.9, 0.5]])
    assert curves.order_of(None, 1, 3, "most salient first", saliency).tolist() == [[1, 2, 0]]
    assert curves.order_of(None, 1, 3, "least salient first", saliency).tolist() == [[0, 2, 1]]
    assert curves.presence_at(torch.tensor([[1, 2, 0]]), 0.4).tolist() == [[1, 0, 1]]


def test_a_heat_map_that_is_right_falls_faster_and_rises_faster_than_its_opposite():
    image = torch.zeros(3, 8, 8)
    image[:, :4], image[:, 4:] = 2, -1.9
    heat = image[0]
    right, wrong = (curves.heat_curve(brightness, image, h, 1)[1] for h in (heat, -heat))
    assert right < wrong
    right, wrong = (curves.heat_curve(brightness, image, h, 1, insert=True)[1] for h in (heat, -heat))
    assert right > wrong


def test_shape_leakage_linearity_and_sensitivity_of_what_is_known():
    images = torch.ones(6, 3, 8, 8)
    things = torch.zeros(6, 8, 8)
    things[:, 2:4, 2:4] = 1
    told = curves.shape_leakage(brightness, images, torch.ones(6, dtype=torch.int64), things)
    assert told == {"object": 1.0, "rolled": 1.0, "ratio": 1.0}

    def additive(x, visible):
        return (x * visible).flatten(1)

    found = curves.linearity(additive, torch.randn(4, 3, 8, 8), regions.squares((8, 8), 2), Seeded(0))
    assert found["cosine"] == pytest.approx(1, abs=1e-5)
    assert found["relative distance"] == pytest.approx(0, abs=1e-5)
    still = curves.sensitivity(lambda _: torch.ones(8, 8), images[0], torch.ones(8, 8), Seeded(0))
    assert still == 0


def test_features_are_what_the_last_linear_layer_reads():
    ask = maskings.masking("layer_masking", opened())
    assert maskings.features(ask)(torch.randn(2, 3, 16, 16), halves()).shape == (2, 8)


# --- results ---


def test_an_overlay_is_a_picture_and_a_saved_heat_keeps_its_numbers(tmp_path):
    picture = np.full((8, 8, 3), 128, np.uint8)
    heat = HeatMap(torch.linspace(-1, 1, 64).reshape(8, 8), 0, {"r2": 0.5, "weights": torch.ones(2)}, picture, "a.png")
    assert heat.overlay().dtype == np.uint8
    saved = heat.save(tmp_path / "a.png")
    assert saved.is_file()
    assert np.allclose(np.load(tmp_path / "a.npy"), heat.heat)
    assert heat.plain() == {"kind": "attribution", "source": "a.png", "target": 0, "r2": 0.5}


# --- fixtures of other sizes ---


def test_a_stack_is_built_from_the_sentence_that_describes_it():
    first = "conv 7 stride 2 pad 3 (4->5), relu, maxpool 3/2"
    sentence = f"{first}, conv 3 pad 1 (5->6), relu, adaptive average pool to 3x3 (as AlexNet)"
    stack = networks.alex_stack(sentence, 1e-5)
    assert [type(m).__name__ for m in stack] == ["Conv2d", "ReLU", "MaxPool2d", "Conv2d", "ReLU", "AdaptiveAvgPool2d"]
    assert (stack[0].kernel_size, stack[0].stride, stack[0].in_channels, stack[0].out_channels) == (
        (7, 7),
        (2, 2),
        4,
        5,
    )
    assert stack(torch.randn(1, 4, 32, 32)).shape == (1, 6, 3, 3)


# --- the claim ---


def test_the_claims_arms_differ_in_the_masking_alone_and_are_measured(tmp_path):
    tier = claim_of("layer_masking").tiers["tiny"]
    assert tier.before.model["backbone"]["name"] == "resnet_nano"
    torch.manual_seed(0)
    backbone = {"name": "resnet_micro", "image_size": 28, "in_channels": 1}
    folder = tmp_path / "model"
    Classifier(Classifier.Config(backbone=backbone, classes=10)).save_pretrained(folder)
    data = DataSettings(uri="sample:fashion", split="test", image_size=28, augment="none")
    wholes = []
    for arm in tier.arms:
        options = {**tier.settings(arm)["model"], "model": str(folder), "levels": [0.0, 0.5]}
        found = LayerMasking(LayerMasking.Config(**options)).measure(data, Seeded(0), limit=24)
        assert set(LayerMasking.measures) <= set(found)
        wholes.append(found["whole"])
    assert len(set(wholes)) == 1  # nothing hidden: the same answers under every masking


def test_there_is_nothing_to_train_and_no_curve_without_a_model():
    system = LayerMasking()
    with pytest.raises(UserError, match="learns nothing"):
        system.loss({}, Seeded(0))
    with pytest.raises(UserError, match="model=RUN"):
        system.measure(DataSettings(uri="sample:fashion"), Seeded(0))


# --- more that does not fit ---


class Maps(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x):
        return self.conv(x)


def test_maps_other_folders_and_empty_objects_are_refused(tmp_path):
    image = torch.rand(3, 16, 16)
    with pytest.raises(UserError, match="give a classifier"):
        unmask.explain(opened(Maps), image, method="grey")
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="holds something else"):
        unmask.explain(opened(), image, method="grey", samples=8, out=tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]
    from PIL import Image

    Image.new("L", (16, 16)).save(tmp_path / "black.png")
    with pytest.raises(UserError, match="marks nothing"):
        unmask.explain(opened(), image, method="grey", samples=8, object=str(tmp_path / "black.png"))
    with pytest.raises(UserError, match=r"0 \.\.\. 3"):
        unmask.explain(opened(), image, method="grey", target=9)
    with pytest.raises(UserError, match="no method"):
        unmask.explain(opened(), image, method=" , ")


def test_a_method_for_another_kind_of_model_is_refused_before_the_first_runs():
    spoken = []
    with pytest.raises(UserError, match="cannot drop any"):
        unmask.explain(opened(), torch.rand(3, 16, 16), method="grey,token_dropping", tell=spoken.append)
    assert not spoken
