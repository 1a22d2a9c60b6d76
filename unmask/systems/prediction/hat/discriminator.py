"""What the second stage of real-world training adds: a U-Net discriminator and a perceptual loss (Wang et al. 2021,
Real-ESRGAN, arXiv:2107.10833, sections 3.4 and 4).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from unmask.errors import UserError

# VGG-19's convolutions whose outputs, before the ReLU, are compared: place in torchvision's sequence -> weight
FEATURES = {2: 0.1, 7: 0.1, 16: 1.0, 25: 1.0, 34: 1.0}  # conv1_2, conv2_2, conv3_4, conv4_4, conv5_4
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's


class SpectralConv(nn.Module):
    """A convolution without bias whose weight is divided by its largest singular value (Miyato et al. 2018).

    One power iteration a forward pass while training, none in evaluation. The singular value takes a gradient, the two
    singular vectors do not.
    """

    weight_u: Tensor
    weight_v: Tensor

    def __init__(self, inside: int, outside: int, side: int, stride: int = 1):
        super().__init__()
        self.stride = stride
        made = nn.Conv2d(inside, outside, side, bias=False)
        self.weight_orig = nn.Parameter(made.weight.detach().clone())
        flat = self.weight_orig.detach().flatten(1)
        self.register_buffer("weight_u", F.normalize(torch.randn(flat.shape[0]), dim=0, eps=1e-12))
        self.register_buffer("weight_v", F.normalize(torch.randn(flat.shape[1]), dim=0, eps=1e-12))

    def forward(self, x: Tensor, frozen: bool = False) -> Tensor:
        """frozen: the weight takes no gradient."""
        weight = self.weight_orig.detach() if frozen else self.weight_orig
        flat = weight.flatten(1)
        with torch.autocast(x.device.type, enabled=False):
            if self.training:
                with torch.no_grad():
                    self.weight_v.copy_(F.normalize(flat.T @ self.weight_u, dim=0, eps=1e-12))
                    self.weight_u.copy_(F.normalize(flat @ self.weight_v, dim=0, eps=1e-12))
            # clones: the next iteration writes into both, and the backward pass still needs these
            sigma = torch.dot(self.weight_u.clone(), flat @ self.weight_v.clone())
        return F.conv2d(x, weight / sigma, stride=self.stride, padding=1)


class UNetDiscriminator(nn.Module):
    """``[B, C, H, W]`` -> a logit a pixel, ``[B, 1, H, W]``: whether this place looks like a real image. H, W: multiples of 8
    (without skips any from 8, of which what 8 does not divide is lost)."""

    def __init__(self, channels: int = 3, num_feat: int = 64, skip_connection: bool = True):
        super().__init__()
        self.skip_connection, n = skip_connection, num_feat
        self.conv0 = nn.Conv2d(channels, n, 3, padding=1)
        self.conv1, self.conv2, self.conv3 = (SpectralConv(n * k, n * 2 * k, 4, stride=2) for k in (1, 2, 4))
        self.conv4, self.conv5, self.conv6 = (SpectralConv(n * 2 * k, n * k, 3) for k in (4, 2, 1))
        self.conv7, self.conv8 = SpectralConv(n, n, 3), SpectralConv(n, n, 3)
        self.conv9 = nn.Conv2d(n, 1, 3, padding=1)

    def forward(self, image: Tensor, frozen: bool = False) -> Tensor:
        """frozen: no parameter takes a gradient, the image does (the generator's step)."""
        if min(image.shape[2:]) < 8 or (self.skip_connection and any(side % 8 for side in image.shape[2:])):
            raise UserError(
                f"hat: the discriminator takes sides that 8 divides, not {image.shape[2]}x{image.shape[3]}: "
                "choose another data.image_size"
            )
        maps = [_leaky(_plain(self.conv0, image, frozen))]
        for conv in (self.conv1, self.conv2, self.conv3):
            maps.append(_leaky(conv(maps[-1], frozen)))
        x = maps.pop()
        for conv in (self.conv4, self.conv5, self.conv6):
            x = F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)
            x = _leaky(conv(x, frozen))
            skip = maps.pop()
            x = x + skip if self.skip_connection else x
        return _plain(self.conv9, _leaky(self.conv8(_leaky(self.conv7(x, frozen)), frozen)), frozen)


def _leaky(x: Tensor) -> Tensor:
    return F.leaky_relu(x, 0.2)


def _plain(conv: nn.Conv2d, x: Tensor, frozen: bool) -> Tensor:
    if not frozen:
        return conv(x)
    bias = None if conv.bias is None else conv.bias.detach()
    return F.conv2d(x, conv.weight.detach(), bias, padding=1)


def adversarial_loss(scores: Tensor, real: bool) -> Tensor:
    """Binary cross-entropy of logits against all-real or all-fake, a mean over pixels."""
    scores = scores.float()
    return F.binary_cross_entropy_with_logits(scores, scores.new_full((), float(real)).expand_as(scores))


class PerceptualLoss:
    """L1 between VGG-19 features, before their ReLUs. No module of the system's: its weights are nobody's to learn or keep.

    weights: a file of torchvision's VGG-19; None: torchvision's own, which it downloads once. Raises ``UserError`` where there
    are none.
    """

    def __init__(self, weights: str | None = None):
        self.layers = _vgg19(weights)

    def __call__(self, made: Tensor, real: Tensor) -> Tensor:
        """made, real: ``[B, 3 or 1, H, W]`` in 0 ... 1."""
        self.layers.to(made.device)
        mean, std = (made.new_tensor(v).view(-1, 1, 1) for v in (MEAN, STD))
        x, y = ((t.expand(-1, 3, -1, -1) - mean) / std for t in (made, real))
        total = made.new_zeros(())
        for place, layer in enumerate(self.layers):
            x = layer(x)
            with torch.no_grad():
                y = layer(y)
            if place in FEATURES:
                total = total + FEATURES[place] * F.l1_loss(x.float(), y.float())
            if place == max(FEATURES):
                break
        return total


def _vgg19(weights: str | None) -> nn.Sequential:
    from torchvision.models import VGG19_Weights
    from torchvision.models.vgg import cfgs, make_layers

    hint = "give adversarial.vgg_weights=FILE (torchvision's vgg19), or adversarial.perceptual_weight=0"
    if weights is not None:
        from unmask.official.load import read_checkpoint

        state: Any = read_checkpoint(Path(weights))
    else:
        try:
            state = VGG19_Weights.IMAGENET1K_V1.get_state_dict(progress=False, check_hash=True)
        except Exception as error:  # no connection, or no room: torch.hub raises whatever its client does
            raise UserError(f"hat: the perceptual loss has no VGG-19 weights ({error}): {hint}") from None
    features = make_layers(cfgs["E"], batch_norm=False)
    wanted = {name: t.shape for name, t in features.state_dict().items()}
    found = {n.removeprefix("features."): t for n, t in state.items() if n.startswith("features.")}
    if {n: t.shape for n, t in found.items()} != wanted:
        raise UserError(f"hat: {weights} does not hold torchvision's VGG-19: {hint}")
    features.load_state_dict(found)
    for layer in features:
        if isinstance(layer, nn.ReLU):
            layer.inplace = False  # features before it are compared
    return features.eval().requires_grad_(False)
