"""HAT's cases against other programs: spandrel's network, torch's spectral norm, resizing and metrics pixel by pixel."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import spectral_norm

from unmask.systems.prediction.hat.official import config_of, load_official, run_case

BASE: dict[str, Any] = {
    "img_size": 16,
    "in_chans": 3,
    "embed_dim": 12,
    "depths": [2],
    "num_heads": [2],
    "window_size": 4,
    "compress_ratio": 3,
    "squeeze_factor": 4,
    "conv_scale": 0.7,
    "overlap_ratio": 0.5,
    "mlp_ratio": 2,
    "upscale": 2,
    "upsampler": "pixelshuffle",
    "num_feat": 8,
}


def theirs(options: dict[str, Any]) -> nn.Module:
    """spandrel's network with weights of which every branch matters."""
    architectures = pytest.importorskip("spandrel.architectures.HAT")
    torch.manual_seed(0)
    made = architectures.HAT(**options).eval()
    with torch.no_grad():
        for name, p in made.named_parameters():
            p.copy_(
                (0.15 if p.ndim == 4 else 0.3) * torch.randn(p.shape) + ("norm" in name and name.endswith("weight"))
            )
    return made


def case(network: nn.Module, **inputs: Tensor) -> dict[str, Tensor]:
    return {f"param.{n}": t for n, t in network.state_dict().items()} | {f"in.{n}": t for n, t in inputs.items()}


@pytest.mark.filterwarnings("ignore:torch.meshgrid")
@pytest.mark.parametrize(
    "options",
    [
        {"upscale": 4, "img_range": 255.0, "in_chans": 1},
        {"upscale": 8, "in_chans": 4, "qkv_bias": False},
        {"upscale": 1, "resi_connection": "identity"},
        {"upscale": 3, "patch_norm": False, "img_range": 2.5},
        {"ape": True, "img_size": [16, 8]},
        {"ape": True, "img_size": 32, "patch_size": 2, "resi_connection": "identity"},
        {"img_size": 4},  # one window: nothing shifts
        {"img_size": [4, 16]},
        {"img_size": 8, "patch_size": 2},
        {"window_size": 16, "overlap_ratio": 0.25, "img_size": 32},
        {"window_size": 8, "overlap_ratio": 0.75},
        {"window_size": 7, "overlap_ratio": 0.3, "img_size": 21},
        {"window_size": 5, "overlap_ratio": 0.5, "img_size": 20},
        {"window_size": 2, "overlap_ratio": 1.0},
        {"window_size": 1, "overlap_ratio": 2.0},
        {"overlap_ratio": 0.0},
        {"depths": [1, 3, 2], "num_heads": [1, 3, 4]},
        {"embed_dim": 11, "num_heads": [1], "mlp_ratio": 1.37, "squeeze_factor": 2},
        {"compress_ratio": 12, "squeeze_factor": 12, "mlp_ratio": 4.0, "num_feat": 64},
        {"qk_scale": 0.3},
    ],
    ids=lambda o: ",".join(f"{k}={v}" for k, v in o.items()),
)
def test_every_option_gives_the_numbers_and_gradients_of_spandrels_network(options):
    options = {**BASE, **options}
    reference, window = theirs(options), options["window_size"]
    size, scale = (
        config_of(options).training_size if options.get("ape") else (2 * window, 3 * window),
        options["upscale"],
    )
    low = torch.rand(2, options["in_chans"], *size)
    restored = reference(low)
    assert restored.shape[2:] == (size[0] * scale, size[1] * scale)
    high = restored.detach() + 0.5 * torch.randn(restored.shape).sign()  # off the kink of the L1, where gradients jump
    loss = (restored - high).abs().mean()
    loss.backward()
    outputs, _, gradients = run_case(options, case(reference, low=low, high=high))
    close(outputs["restored"], restored)
    close(outputs["loss"], loss)
    wanted = {n: p.grad for n, p in reference.named_parameters()}
    assert gradients.keys() == wanted.keys()
    for name, gradient in gradients.items():
        close(gradient, wanted[name], share=1e-4)
    assert torch.equal(outputs["index_sa"], reference.relative_position_index_SA)
    assert torch.equal(outputs["index_oca"], reference.relative_position_index_OCA)
    assert torch.equal(outputs["attn_mask"], reference.calculate_mask(size, torch.float32))
    told = {k: options[k] for k in ("conv_scale", "img_range", "qk_scale") if k in options}
    loaded = load_official(reference.state_dict(), {**told, "image_size": config_of(options).image_size})
    close(loaded.network(low), restored)


def close(ours: Tensor, wanted: Tensor, share: float = 2e-5) -> None:
    """share: of the largest value."""
    largest = float(wanted.detach().abs().max())
    torch.testing.assert_close(ours.detach(), wanted.detach(), atol=share * largest, rtol=1e-4)


def test_a_case_that_leaves_options_out_has_the_authors_defaults():
    config = config_of({"window_size": 8})
    assert (config.depths, config.heads, config.embed_dim, config.mlp_ratio) == ((6,) * 4, (6,) * 4, 96, 4)
    assert (config.scale, config.compress_ratio, config.squeeze_factor, config.conv_scale) == (2, 3, 30, 0.01)


@pytest.mark.filterwarnings("ignore:torch.meshgrid")
@pytest.mark.parametrize(
    ("size", "tile", "pad", "options"),
    [
        ((13, 18), 8, 4, {}),
        ((5, 17), 4, 8, {"upscale": 3}),
        ((11, 7), 12, 0, {"in_chans": 1, "upscale": 4}),
        ((9, 23), 8, 8, {"window_size": 8, "img_size": 8}),
        ((16, 16), 32, 32, {}),
    ],
)
def test_padding_and_tiles_are_those_of_a_plain_loop(size, tile, pad, options):
    options = {**BASE, **options}
    reference, window, scale = theirs(options), options["window_size"], options["upscale"]
    low = torch.rand(1, options["in_chans"], *size)
    image = F.pad(low, (0, -size[1] % window, 0, -size[0] % window), mode="reflect")
    height, width = image.shape[2:]
    tiled = torch.zeros(1, options["in_chans"], height * scale, width * scale)
    with torch.no_grad():
        whole = reference(image)
        for y in range(0, height, tile):
            for x in range(0, width, tile):
                top, left = max(y - pad, 0), max(x - pad, 0)
                made = reference(image[..., top : min(y + tile, height) + pad, left : min(x + tile, width) + pad])
                inner = made[..., (y - top) * scale :, (x - left) * scale :][..., : tile * scale, : tile * scale]
                tiled[..., y * scale : (y + tile) * scale, x * scale : (x + tile) * scale] = inner[
                    ..., : (height - y) * scale, : (width - x) * scale
                ]
    outputs, _, _ = run_case({**options, "tile_size": tile, "tile_pad": pad}, case(reference, low=low))
    for name, wanted in (("whole", whole), ("tiled", tiled)):
        close(outputs[name], wanted[..., : size[0] * scale, : size[1] * scale])


# --- discriminator ---


class Discriminator(nn.Module):
    def __init__(self, channels: int, n: int, skip: bool):
        super().__init__()
        self.skip = skip
        widths = {1: (1, 2), 2: (2, 4), 3: (4, 8), 4: (8, 4), 5: (4, 2), 6: (2, 1), 7: (1, 1), 8: (1, 1)}
        self.conv0, self.conv9 = nn.Conv2d(channels, n, 3, 1, 1), nn.Conv2d(n, 1, 3, 1, 1)
        for i, (a, b) in widths.items():
            side, stride = (4, 2) if i < 4 else (3, 1)
            self.add_module(f"conv{i}", spectral_norm(nn.Conv2d(n * a, n * b, side, stride, 1, bias=False)))

    def forward(self, x: Tensor) -> Tensor:
        seen = []
        for i in range(9):
            x = F.interpolate(x, scale_factor=2, mode="bilinear") if i in (4, 5, 6) else x
            x = F.leaky_relu(self.get_submodule(f"conv{i}")(x), 0.2)
            seen.append(x)
            x = x + seen[6 - i] if i in (4, 5, 6) and self.skip else x
        return self.conv9(x)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(
    ("channels", "width", "skip", "size"), [(3, 4, True, (16, 24)), (1, 3, True, (8, 8)), (3, 2, False, (18, 13))]
)
def test_the_discriminator_is_that_of_torchs_spectral_norm(channels, width, skip, size, training):
    torch.manual_seed(0)
    reference = Discriminator(channels, width, skip).train(training)
    image = torch.rand(2, channels, *size)
    config = {"num_in_ch": channels, "num_feat": width, "skip_connection": skip, "training": training}
    outputs, model, gradients = run_case(config, {k: t.clone() for k, t in case(reference, image=image).items()})
    scores = reference(image)
    fake = F.binary_cross_entropy_with_logits(scores, torch.zeros_like(scores))
    fake.backward()
    close(outputs["scores"], scores)
    close(outputs["loss_as_fake"], fake)
    close(outputs["loss_as_real"], F.binary_cross_entropy_with_logits(scores, torch.ones_like(scores)))
    for name, p in reference.named_parameters():
        close(gradients[name], p.grad)
    for name, b in reference.named_buffers():
        close(model.state_dict()[name], b)


# --- resizing and metrics ---


def resized(image: np.ndarray, scale: float) -> np.ndarray:
    """``[C, H, W]`` in float64, pixel by pixel: the cubic of a = -1/2, widened where the image shrinks, mirrored edges."""
    for axis in (1, 2):
        size = image.shape[axis]
        stretch, lines = min(scale, 1), []
        for i in range(math.ceil(size * scale)):
            u = (i + 0.5) / scale - 0.5
            reach = range(math.floor(u - 2 / stretch) - 1, math.ceil(u + 2 / stretch) + 2)
            weights = {j: keys(stretch * (u - j)) for j in reach}
            total = sum(weights.values())
            lines.append(sum(w / total * image.take(mirrored(j, size), axis) for j, w in weights.items()))
        image = np.stack(lines, axis=axis)
    return image


def keys(x: float) -> float:
    x = abs(x)
    if x <= 1:
        return 1.5 * x**3 - 2.5 * x**2 + 1
    return -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2 if x <= 2 else 0.0


def mirrored(j: int, size: int) -> int:
    while not 0 <= j < size:
        j = -1 - j if j < 0 else 2 * size - 1 - j
    return j


def compared(restored: np.ndarray, true: np.ndarray, border: int, luma: bool) -> tuple[float, float]:
    """PSNR and SSIM of ``[C, H, W]`` in 0 ... 1, window by window."""
    both = [(t.clip(0, 1) * 255).round() for t in (restored, true)]
    both = [t[:, border : t.shape[1] - border, border : t.shape[2] - border] for t in both]
    if luma and len(true) == 3:
        both = [(16 + (65.481 * r + 128.553 * g + 24.966 * b) / 255)[None] for r, g, b in both]
    psnr = 10 * math.log10(255**2 / np.mean((both[0] - both[1]) ** 2))
    place = np.arange(11) - 5
    bell = np.exp(-(place**2) / (2 * 1.5**2))
    window = np.outer(bell, bell) / bell.sum() ** 2
    values = []
    for a, b in zip(*both, strict=True):
        for y in range(a.shape[0] - 10):
            for x in range(a.shape[1] - 10):
                p, q = a[y : y + 11, x : x + 11], b[y : y + 11, x : x + 11]
                mp, mq = (window * p).sum(), (window * q).sum()
                vp, vq = (window * (p - mp) ** 2).sum(), (window * (q - mq) ** 2).sum()
                cov = (window * (p - mp) * (q - mq)).sum()
                c1, c2 = 2.55**2, 7.65**2
                values.append((2 * mp * mq + c1) * (2 * cov + c2) / ((mp**2 + mq**2 + c1) * (vp + vq + c2)))
    return psnr, float(np.mean(values))


@pytest.mark.parametrize(
    ("size", "channels", "scales", "border"),
    [
        ((24, 20), 3, [2, 3, 4], 2),
        ((23, 21), 3, [2, 3, 4], 3),
        ((21, 27), 3, [3], 0),
        ((20, 16), 1, [4, 2], 1),
        ((18, 21), 3, [1.5], 2),
        ((23, 24), 3, [1.3, 2], 2),
    ],
)
def test_resizing_and_metrics_are_those_computed_pixel_by_pixel(size, channels, scales, border):
    high = torch.rand(channels, *size, generator=torch.Generator().manual_seed(0))
    high = (high + F.avg_pool2d(high, 3, 1, 1)) / 2
    outputs, _, _ = run_case({"scales": scales, "crop_border": border}, {"in.high": high})
    true = high.double().numpy()
    for s in scales:
        low = resized(true, 1 / s)
        assert low.shape[1:] == tuple(math.ceil(n * (1 / s)) for n in size)
        np.testing.assert_allclose(outputs[f"low_x{s}"].numpy(), low, atol=2e-6)
        np.testing.assert_allclose(outputs[f"up_x{s}"].numpy(), resized(low, s), atol=2e-6)
    s = 2 if 2 in scales else scales[0]
    up = outputs[f"up_x{s}"].double().numpy()
    up, true = (t[:, : min(up.shape[1], size[0]), : min(up.shape[2], size[1])] for t in (up, true))
    for ending, cut, luma in (("y", border, True), ("rgb", 0, False)):
        psnr, ssim = compared(up, true, cut, luma)
        assert float(outputs[f"psnr_{ending}"]) == pytest.approx(psnr, rel=1e-6)
        assert float(outputs[f"ssim_{ending}"]) == pytest.approx(ssim, rel=1e-6)
