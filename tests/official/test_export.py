"""Exports: timm and onnxruntime compute our features from the written files."""

import json

import pytest
import timm
import torch

from unmask.backbones import build
from unmask.contracts import Preprocessing
from unmask.errors import MissingExtra, UserError
from unmask.official.export import check_equal, export_encoder
from unmask.official.hub import load_encoder

CASES = {
    "plain": ("vit_nano_patch4", {"image_size": (16, 24), "in_channels": 1}),
    "learned": (
        "vit_nano_patch4",
        {"image_size": 16, "position": "learned", "class_token": False, "qk_norm": True, "init_values": 0.1},
    ),
    "beit": (
        "vit_nano_patch4",
        {"image_size": 16, "position": "none", "relative": ["shared"], "qkv_bias": "qv", "init_values": 0.1},
    ),
    "beit without scales": (
        "vit_nano_patch4",
        {"image_size": 16, "position": "learned", "relative": ["per_block"], "qkv_bias": False},
    ),
    "swin": ("swin_nano", {"image_size": 32, "window_size": 4, "patch_size": 2}),
    "swin v2": ("swinv2_nano", {"image_size": 32, "window_size": 4, "patch_size": 2}),
    "timm resnet": ("timm/resnet18", {"image_size": 32, "in_channels": 2}),
    "timm vit": ("timm/vit_tiny_patch16_224", {"image_size": 32, "patch_size": 8, "pool": "timm"}),
}


def encoder_of(case: str):
    name, options = CASES[case]
    torch.manual_seed(0)
    encoder = build(name, **options).eval()
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return encoder


def images_of(encoder, batch=2):
    return torch.randn(batch, encoder.in_channels, *encoder.image_size)


@pytest.mark.parametrize("case", CASES)
def test_plain_timm_loads_the_export_and_computes_the_same(case, tmp_path):
    encoder = encoder_of(case)
    out = export_encoder(encoder, "timm", tmp_path / "out")
    model = timm.create_model(f"local-dir:{out}", pretrained=True).eval()
    x = images_of(encoder)
    with torch.no_grad():
        torch.testing.assert_close(model(x), encoder(x), rtol=1e-4, atol=1e-5)
    described = json.loads((tmp_path / "out/config.json").read_text())
    plain = timm.create_model(described["architecture"], **described["model_args"])
    plain.load_state_dict(timm.models.load_state_dict(str(tmp_path / "out/model.safetensors")))


def test_timm_learns_how_images_are_prepared(tmp_path):
    encoder = encoder_of("plain")
    encoder.preprocessing = Preprocessing(mean=(0.3,), std=(0.2,), image_size=(16, 24), channels=1, crop=0.8)
    out = export_encoder(encoder, "timm", tmp_path / "out")
    known = timm.data.resolve_model_data_config(timm.create_model(f"local-dir:{out}", pretrained=True))
    assert list(known["mean"]) == [0.3]
    assert list(known["std"]) == [0.2]
    assert list(known["input_size"]) == [1, 16, 24]
    assert known["crop_pct"] == 0.8
    assert known["interpolation"] == encoder.preprocessing.interpolation


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("vit_nano_patch4", {"image_size": 16, "qk_scale": 1.0}, "qk_scale"),
        ("vit_nano_patch4", {"image_size": 16, "relative": ["shared"]}, "relative positions"),
        ("swin_nano", {"image_size": 32, "window_size": 4, "absolute_positions": True}, "absolute_positions"),
        ("swin_nano", {"image_size": 40, "patch_size": 2, "window_size": 4}, "--image-size 32"),
    ],
)
def test_what_timm_does_not_have_is_one_line_and_writes_nothing(name, options, words, tmp_path):
    with pytest.raises(UserError, match=words):
        export_encoder(build(name, **options), "timm", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize("case", ["plain", "beit", "swin", "timm resnet", "timm vit"])
def test_onnxruntime_computes_the_same_for_any_batch(case, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    encoder = encoder_of(case)
    out = export_encoder(encoder, "onnx", tmp_path / "out")
    session = onnxruntime.InferenceSession(f"{out}/encoder.onnx", providers=["CPUExecutionProvider"])
    for batch in (1, 5):
        x = images_of(encoder, batch)
        pooled, tokens = session.run(["pooled", "tokens"], {"image": x.numpy()})
        with torch.no_grad():
            torch.testing.assert_close(torch.from_numpy(pooled), encoder(x), rtol=1e-3, atol=1e-4)
            torch.testing.assert_close(torch.from_numpy(tokens), encoder.tokens(x), rtol=1e-3, atol=1e-4)
    assert json.loads((tmp_path / "out/config.json").read_text())["format"] == "onnx"


def test_a_missing_package_names_the_extra(monkeypatch, tmp_path):
    import importlib.util

    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "onnxscript" else real(name, *a))
    with pytest.raises(MissingExtra, match=r"pip install 'unmask\[export\]'"):
        export_encoder(encoder_of("plain"), "onnx", tmp_path / "out")


def test_unknown_formats_name_the_nearest(tmp_path):
    with pytest.raises(UserError, match="did you mean onnx"):
        export_encoder(encoder_of("plain"), "onx", tmp_path / "out")


def test_the_safetensors_export_loads_here(tmp_path):
    encoder = encoder_of("swin")
    export_encoder(encoder, "safetensors", tmp_path / "out")
    x = images_of(encoder)
    assert torch.equal(load_encoder(tmp_path / "out")(x), encoder(x))


def test_features_that_differ_are_refused():
    with pytest.raises(UserError, match="computes other features"):
        check_equal(torch.ones(2), torch.ones(2) * 1.1, "x")
    with pytest.raises(UserError, match="computes other features"):
        check_equal(torch.ones(2), torch.full((2,), torch.nan), "x")
