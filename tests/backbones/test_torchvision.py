"""torchvision's classifiers as encoders."""

import pytest
import torch

from unmask.backbones import build
from unmask.errors import UserError
from unmask.systems.prediction.classifier.model import Classifier


def test_features_are_what_torchvision_pools_before_its_head() -> None:
    from torchvision import models

    torch.manual_seed(0)
    plain = models.resnet18(num_classes=3).eval()
    encoder = build("torchvision/resnet18", image_size=32).eval()
    state = {k: v for k, v in plain.state_dict().items() if not k.startswith("fc.")}
    encoder.model.load_state_dict(state)
    image = torch.randn(2, 3, 32, 32)
    plain.fc = torch.nn.Identity()
    assert torch.allclose(encoder.pooled(image), plain(image), atol=1e-6)
    assert encoder.tokens(image).shape == (2, 1, 512)


def test_a_classifier_stands_on_it_with_any_number_of_channels() -> None:
    backbone = {"name": "torchvision/mobilenet_v3_small", "image_size": 32, "in_channels": 1}
    model = Classifier(Classifier.Config(backbone=backbone, classes=4)).eval()
    assert model.logits(torch.randn(2, 1, 32, 32)).shape == (2, 4)


def test_unknown_names_are_told_the_nearest() -> None:
    with pytest.raises(UserError, match="did you mean"):
        build("torchvision/resnet81")
