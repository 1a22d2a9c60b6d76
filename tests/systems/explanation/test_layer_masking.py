"""Hiding pixels from a convolutional network, layer by layer; explanations made with it; ``unmask explain``."""

import json

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from torch import nn

import unmask
from unmask.contracts import Preprocessing
from unmask.errors import UserError
from unmask.models import open_model
from unmask.systems.explanation import maskings, methods
from unmask.systems.explanation.regions import squares, visible_of


def opened(name, **options):
    torch.manual_seed(0)
    module = getattr(torchvision.models, name)(num_classes=5, **options).eval()
    for norm in module.modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.uniform_(norm.running_mean, -0.2, 0.2)
            nn.init.uniform_(norm.running_var, 0.5, 1.5)
    known = Preprocessing((0.5,) * 3, (0.5,) * 3, (64, 64), 3)
    return open_model(module, classes=tuple("abcde"), preprocessing=known)


@pytest.mark.parametrize(
    "name", ["resnet18", "resnet50", "vgg11_bn", "convnext_tiny", "mobilenet_v3_small", "densenet121"]
)
def test_hidden_pixels_have_no_influence_and_a_whole_image_is_as_it_was(name):
    model = opened(name)
    ask = maskings.masking("layer_masking", model)
    image = torch.randn(1, 3, 64, 64)
    visible = torch.ones(2, 64, 64)
    visible[1, 8:40, 16:48] = 0
    with torch.no_grad():
        plain = model.logits({"image": image})
        answers = ask(image.expand(2, -1, -1, -1), visible)
        torch.testing.assert_close(answers[:1], plain, rtol=1e-3, atol=1e-4)
        painted = image.clone()
        painted[:, :, 8:40, 16:48] = 7.0
        again = ask(painted.expand(2, -1, -1, -1), visible)
    torch.testing.assert_close(again[1], answers[1], rtol=0, atol=0)
    assert not torch.equal(answers[1], answers[0])


def test_a_network_with_everything_hidden_says_its_bias():
    model = opened("resnet18")
    with torch.no_grad():
        model.module.fc.bias.copy_(torch.arange(5.0))
        answer = maskings.masking("layer_masking", model)(torch.randn(1, 3, 64, 64), torch.zeros(1, 64, 64))
    torch.testing.assert_close(answer[0].softmax(0), torch.arange(5.0).softmax(0), rtol=1e-3, atol=1e-3)


def test_transformers_are_told_to_drop_tokens():
    vit = torchvision.models.VisionTransformer(64, 16, 1, 2, 32, 64, num_classes=5).eval()
    known = Preprocessing((0.5,) * 3, (0.5,) * 3, (64, 64), 3)
    model = open_model(vit, classes=tuple("abcde"), preprocessing=known)
    with pytest.raises(UserError, match="token_dropping"):
        unmask.explain(model, torch.rand(3, 64, 64), method="layer_masking", samples=8)
    [found] = unmask.explain(model, torch.rand(3, 64, 64), method="token_dropping", samples=16)
    assert found.rows[0].method == "token_dropping"


def test_regions_and_presence_agree():
    segments = squares((8, 8), 4)
    assert segments.unique().tolist() == [0, 1, 2, 3]
    visible = visible_of(torch.tensor([[1.0, 0.0, 0.0, 1.0]]), segments)
    assert visible[0, ..., :4, :4].min() == 1
    assert visible[0, ..., :4, 4:].max() == 0


def test_every_method_has_a_name_and_words():
    told = methods.about()
    assert {"layer_masking", "lime", "grey", "integrated_gradients"} <= set(told)
    assert all(told.values())


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    at = tmp_path_factory.mktemp("clf")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("UNMASK_CACHE", str(at / "cache"))
        run = unmask.train(
            "classifier",
            data="sample:fashion",
            recipe="tiny",
            steps=5,
            batch_size=32,
            out=at / "run",
            overrides=["backbone=torchvision/resnet18", "data.image_size=32", "data.limit=200"],
            probe=False,
            talk=lambda _: None,
        )
    noise = np.random.default_rng(0).integers(0, 255, (40, 40, 3), dtype=np.uint8)
    Image.fromarray(noise).save(at / "photo.png")
    return run, at / "photo.png"


def test_one_page_a_person_can_read(classifier, tmp_path):
    run, photo = classifier
    [found] = unmask.explain(str(run), str(photo), method="layer_masking,grey,black", out=tmp_path / "why", samples=24)
    assert [row.method for row in found.rows] == ["layer_masking", "grey", "black"]
    page = (tmp_path / "why" / "index.html").read_text()
    assert "layer masking" in page
    assert "data:image/png" in page
    assert "http://" not in page.replace("http://www.w3.org", "")
    told = json.loads((tmp_path / "why" / "explanations.json").read_text())
    text = json.dumps(told)
    assert '"deletion"' in text
    assert found.name in text
    assert len(list((tmp_path / "why").glob("*.png"))) >= 3


def test_the_same_seed_gives_the_same_heat(classifier):
    run, photo = classifier
    one, two = (unmask.explain(str(run), str(photo), method="grey", samples=16)[0].rows[0].heat.heat for _ in range(2))
    assert torch.equal(one, two)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lime", "integrated_gradients", "saliency", "occlusion"])
def test_other_packages_stand_in_the_same_table(classifier, method):
    pytest.importorskip("lime" if method == "lime" else "captum")
    run, photo = classifier
    [found] = unmask.explain(str(run), str(photo), method=method, **({"samples": 16} if method == "lime" else {}))
    assert found.rows[0].heat.heat.shape == (32, 32)


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"method": "layer_maskin"}, "did you mean layer_masking"),
        ({"method": "grey", "sampels": 3}, "did you mean samples"),
        ({"method": "grey", "target": "Trousers"}, "did you mean Trouser"),
        ({"method": "grey", "samples": 0}, "samples"),
    ],
)
def test_what_does_not_fit_is_said_in_a_line(classifier, asked, words):
    run, photo = classifier
    with pytest.raises(UserError) as error:
        unmask.explain(str(run), str(photo), **asked)
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_what_is_no_classifier_or_no_image_is_said_in_a_line(classifier, tmp_path):
    run, photo = classifier
    (tmp_path / "text.png").write_text("no image")
    for model, file in ((str(run), tmp_path / "text.png"), (str(run), tmp_path / "gone.png"), ("nowhere", photo)):
        with pytest.raises(UserError) as error:
            unmask.explain(model, str(file), method="grey")
        assert "\n" not in str(error.value)


def test_a_layer_without_a_rule_is_named():
    model = open_model(
        nn.Sequential(
            nn.Conv2d(3, 4, 3), nn.ConvTranspose2d(4, 4, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5)
        ),
        classes=tuple("abcde"),
        preprocessing=Preprocessing((0.5,) * 3, (0.5,) * 3, (32, 32), 3),
    )
    with pytest.raises(UserError, match=r"ConvTranspose"):
        unmask.explain(model, torch.rand(3, 32, 32), method="layer_masking", samples=8)
