"""PEM: what its parts promise, at sizes and options that the official numbers do not cover."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import nn
from torch.nn import functional as F

from unmask.config import validated
from unmask.contracts import DataFacts, Preprocessing
from unmask.data.maps import SegmentationBatches, SegmentationData
from unmask.data.shapes import CLASSES, SMALLEST, scene
from unmask.draw import Seeded
from unmask.errors import UserError
from unmask.nn.positions import sine_map
from unmask.official.hub import save_encoder
from unmask.systems.prediction.pem.attention import Attention, MaskedAttention, Memory, PrototypeAttention, prototypes
from unmask.systems.prediction.pem.deformable import by_sampling
from unmask.systems.prediction.pem.model import PEM, pyramid_of
from unmask.systems.prediction.pem.official import load_official
from unmask.systems.prediction.pem.pixel_decoder import Modulation, Refinement, resized

SMALL = {
    "backbone": {"name": "stdc1", "base": 8},
    "conv_dim": 8,
    "hidden_dim": 16,
    "mask_dim": 12,
    "num_heads": 4,
    "ffn_dim": 16,
    "layers": 2,
    "queries": 6,
    "classes": 5,
    "loss": {"num_points": 64},
}


def model(**options) -> PEM:
    torch.manual_seed(0)
    return PEM(PEM.Config(**{**SMALL, **options}))


def batch(images: int = 2, size: tuple[int, int] = (64, 64), classes: int = 5) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    coarse = torch.randint(-1, classes, (images, 1, 4, 4), generator=generator).float()
    labels = F.interpolate(coarse, size=size, mode="nearest")[:, 0].long()
    pictures = torch.randn(images, 3, *size, generator=generator) + labels[:, None] / 2
    return {"image": pictures, "map": labels}


# --- attention ---


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 7), st.sampled_from([1, 2, 4]), st.booleans())
def test_the_prototype_in_pieces_is_the_one_of_all_similarities_together(seed, chunk, heads, masked):
    generator = torch.Generator().manual_seed(seed)
    # small integers: many similarities are equal, and sums are exact in any order
    queries = torch.randint(-2, 3, (2, 3, 8), generator=generator).float()
    places = torch.randint(-2, 3, (2, 11, 8), generator=generator).float()
    mask = None
    if masked:
        mask = torch.where(torch.rand(2, 3, 11, generator=generator) < 0.7, -torch.inf, 0.0)
    per_head = [t.unflatten(2, (heads, -1)).transpose(1, 2) for t in (queries, places)]
    every = per_head[0] @ per_head[1].mT + (0 if mask is None else mask[:, None])
    assert torch.equal(prototypes(queries, places, heads, mask, chunk), every.argmax(dim=-1).transpose(1, 2))


def test_an_empty_mask_is_lifted_for_each_query_or_for_the_whole_image_only():
    logits = torch.tensor([[[1.0, -1, -1], [-1, -1, -1]], [[-1.0, -1, -1], [-1, -1, -1]]])
    by_image = PrototypeAttention(8, 2).additive(logits)
    by_query = PrototypeAttention(8, 2, lift_mask="query").additive(logits)
    hidden = -torch.inf
    assert by_image.tolist() == [[[0, hidden, hidden], [hidden] * 3], [[0] * 3, [0] * 3]]
    assert by_query.tolist() == [[[0, hidden, hidden], [0] * 3], [[0] * 3, [0] * 3]]


@pytest.mark.parametrize("axis", ["queries", "channels"])
def test_the_norm_runs_over_the_axis_that_was_asked_for(axis):
    torch.manual_seed(0)
    look = PrototypeAttention(8, 2, normalise_over=axis).eval()
    memory = Memory(torch.randn(1, 6, 8), torch.zeros(1, 6, 8), (2, 3))
    queries, where = torch.randn(1, 5, 8), torch.zeros(1, 5, 8)
    alone = look(queries[:, :1], where[:, :1], memory)
    together = look(queries, where, memory)[:, :1]
    assert torch.allclose(alone, together, atol=1e-6) == (axis == "channels")


def test_attention_is_torchs_multi_head_attention():
    torch.manual_seed(0)
    theirs, ours = nn.MultiheadAttention(16, 4, batch_first=True), Attention(16, 4)
    ours.qkv.weight, ours.qkv.bias = theirs.in_proj_weight, theirs.in_proj_bias
    ours.proj.weight, ours.proj.bias = theirs.out_proj.weight, theirs.out_proj.bias
    query, key, value = torch.randn(2, 3, 16), torch.randn(2, 7, 16), torch.randn(2, 7, 16)
    blocked = torch.rand(2, 1, 3, 7) < 0.5
    blocked[..., 0] = False
    wanted = theirs(query, key, value, attn_mask=blocked.expand(-1, 4, -1, -1).flatten(0, 1))[0]
    assert torch.allclose(ours(query, key, value, bias=~blocked), wanted, atol=1e-6)
    assert torch.allclose(ours(query, query, query), theirs(query, query, query)[0], atol=1e-6)


@pytest.mark.parametrize("pre_norm", [True, False])
def test_masked_attention_reads_nothing_outside_its_mask(pre_norm):
    torch.manual_seed(0)
    look = MaskedAttention(16, 4, pre_norm=pre_norm)
    plain, queries = torch.randn(1, 6, 16), torch.randn(1, 2, 16)
    logits = torch.tensor([[[1.0, 1, 1, -1, -1, -1], [-1, -1, -1, -1, -1, -1]]])
    other = plain.clone()
    other[:, 4] += 1

    def read(memory: torch.Tensor) -> torch.Tensor:
        return look(queries, torch.zeros(1, 2, 16), Memory(memory, torch.zeros(1, 6, 16), (2, 3)), logits)

    assert torch.equal(read(plain)[:, 0], read(other)[:, 0])
    assert not torch.allclose(read(plain)[:, 1], read(other)[:, 1])  # its empty mask is lifted


def test_positions_of_maps_are_rows_first_and_reach_two_pi():
    table = sine_map(16, (3, 5)).reshape(3, 5, 16)
    assert torch.equal(table[1, 0, :8], table[1, 4, :8])
    assert torch.equal(table[0, 2, 8:], table[2, 2, 8:])
    assert torch.allclose(table[2, 0, :2], torch.tensor([0.0, 1.0]), atol=1e-5)  # sine and cosine of 2 pi
    with pytest.raises(UserError, match="divisible by 4"):
        sine_map(6, (2, 2))


# --- pixel decoder ---


def test_modulation_multiplies_by_at_least_one_and_a_half():
    gain = (Modulation(8, "gn")(torch.ones(2, 8, 3, 3)) - 1)[..., 0, 0].detach()
    assert float(gain.min()) > 0.5
    assert float(gain.max()) < 0.74


def test_a_fresh_deformable_convolution_is_a_plain_one_at_half_strength():
    torch.manual_seed(0)
    deformable, x = Refinement(8, "bn"), torch.randn(2, 8, 5, 7)
    plain = Refinement(8, "bn", deformable=False)
    plain.conv.weight = deformable.conv.weight
    assert torch.allclose(deformable.convolved(x), 0.5 * plain.convolved(x), atol=1e-5)
    y, up = deformable(x)
    assert (y.shape, up.shape) == ((2, 8, 5, 7), (2, 8, 10, 14))


def test_deformable_convolution_by_sampling_is_torchvisions_with_its_gradients():
    from torchvision.ops import deform_conv2d

    torch.manual_seed(0)
    shapes = [(2, 6, 5, 7), (2, 18, 5, 7), (2, 9, 5, 7), (4, 6, 3, 3)]
    x, offset, modulation, weight = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes)
    theirs = deform_conv2d(x, 3 * offset, weight, padding=1, mask=modulation)  # far moves: outside lie zeros
    ours = by_sampling(x, 3 * offset, modulation, weight)
    assert torch.allclose(ours, theirs)
    rows = [torch.autograd.grad(y.square().sum(), (x, offset, modulation, weight)) for y in (ours, theirs)]
    assert all(torch.allclose(a, b) for a, b in zip(*rows, strict=True))


def test_guides_from_resized_features_are_the_resized_masks():
    embedding, features = torch.randn(2, 5, 7), torch.randn(2, 7, 16, 24)
    masks = torch.einsum("bqm,bmhw->bqhw", embedding, features)
    ours = torch.einsum("bqm,bmhw->bqhw", embedding, resized(features, (4, 6)))
    assert torch.allclose(resized(masks, (4, 6)), ours, atol=1e-5)


# --- learning ---

OPTIONS = [
    {},
    {"attention": "masked"},
    {"attention": "masked", "pre_norm": False},
    {"pre_norm": False},
    {"normalise_over": "channels", "lift_mask": "query"},
    {"csm": False, "deformable": False},
    {"attention_mask": False},
    {"norm": "gn"},
    {"conv_dim": 16, "enforce_input_projection": False},
    {"deep_supervision": False, "frozen_norm": True},
    {"backbone": {"name": "vit_nano_patch8", "image_size": 64, "embed_dim": 32, "depth": 1, "num_heads": 2}},
    {"backbone": {"name": "timm/resnet18", "arguments": {"channels": [8, 16, 16, 32]}}},
]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: ",".join(f"{k}={v}" for k, v in o.items())[:60] or "plain")
def test_every_option_learns_in_a_bare_loop(options):
    system = model(**options).train()
    optimiser = torch.optim.AdamW(system.parameters(), lr=3e-3)
    data, losses = batch(), []
    for step in range(8):
        loss = system.loss(data, Seeded(0, step))["loss"]
        losses.append(float(loss.detach()))
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    assert losses[-1] < losses[0]
    assert all(torch.isfinite(p).all() for p in system.parameters())


def test_a_step_is_a_function_of_its_draw():
    system, data = model().eval(), batch()
    first, second, other = (float(system.loss(data, Seeded(s))["loss"]) for s in (0, 0, 1))
    assert first == second != other


def test_images_that_do_not_fit_are_padded_and_what_is_padded_belongs_to_no_mask():
    system = model().eval()
    data = batch(size=(50, 70))
    assert torch.isfinite(system.loss(data, Seeded(0))["loss"])
    whole = {
        "image": F.pad(data["image"], (0, 26, 0, 14)),
        "map": F.pad(data["map"], (0, 26, 0, 14), value=-1),
    }
    assert torch.allclose(system.loss(data, Seeded(0))["loss"], system.loss(whole, Seeded(0))["loss"], atol=1e-5)


def test_an_image_without_any_mask_gives_a_finite_loss_and_gradients():
    system, data = model(), batch()
    data["map"][:] = -1
    system.loss(data, Seeded(0))["loss"].backward()
    assert all(p.grad is None or torch.isfinite(p.grad).all() for p in system.parameters())


def test_more_masks_than_queries_are_said_once():
    system, data = model(queries=2), batch()
    with pytest.warns(UserWarning, match="more than the 2 queries"):
        system.loss(data, Seeded(0))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        system.loss(data, Seeded(0))


def test_the_loss_is_computed_in_float32_under_autocast():
    system, data = model().eval(), batch()
    with torch.autocast("cpu", torch.bfloat16):
        loss = system.loss(data, Seeded(0))["loss"]
    assert loss.dtype == torch.float32
    assert torch.isfinite(loss)


def test_groups_are_the_authors():
    system = model()
    groups = {(g.lr_scale, g.decay_scale): set(g.names) for g in system.parameter_groups()}
    assert {key[0] for key in groups} == {1.0, 0.1}
    spared = groups[1.0, 0.0]
    assert {"head.decoder.query_feat.weight", "head.decoder.level_embed.weight", "head.decoder.norm.bias"} <= spared
    decays = groups[1.0, 1.0]
    assert {"head.decoder.layers.0.look.alpha", "head.decoder.classify.bias"} <= decays
    assert all(n.startswith("encoder.") for n in groups[0.1, 1.0] | groups[0.1, 0.0])
    assert sum(len(names) for names in groups.values()) == len(list(system.parameters()))


def test_frozen_norms_keep_their_statistics():
    system = model(frozen_norm=True).train()
    before = {n: b.clone() for n, b in system.encoder.named_buffers()}
    system.loss(batch(), Seeded(0))
    assert all(torch.equal(b, before[n]) for n, b in system.encoder.named_buffers())


# --- what does not fit ---


def test_bad_options_are_told_in_one_line():
    with pytest.raises(UserError, match="num_heads=3 does not divide hidden_dim=16"):
        validated(PEM.Config, {**SMALL, "num_heads": 3}, where="pem")
    with pytest.raises(UserError, match=r"at least 2 images a step.*norm=gn"):
        PEM.check_batch(PEM.Config(**SMALL), 1)
    PEM.check_batch(PEM.Config(**{**SMALL, "norm": "gn"}), 1)
    with pytest.raises(UserError, match="classes is open"):
        model(classes=None)
    with pytest.raises(UserError, match="no class of this model"):
        model(classes=("sky", "car"), things=("cat",))
    with pytest.raises(UserError, match="needs four maps"):
        model(backbone={"name": "swin_nano"})
    with pytest.raises(UserError, match="has none"):
        PEM.adapted(PEM.Config(**{**SMALL, "classes": None}), DataFacts(uri="photos/"))
    system = model().eval()
    picture = np.zeros((40, 40, 3), np.uint8)
    with pytest.raises(UserError, match="task=panoptic needs to know"):
        system.predict([picture], task="panoptic")
    with pytest.raises(UserError, match="go with task=semantic"):
        model(things=(1,)).predict([picture], task="instance", tile=64)
    with pytest.raises(UserError, match="overlap_threshold"):
        system.predict([picture], overlap_treshold=0.5)


def test_group_norm_trains_with_one_image():
    system = model(norm="gn").train()
    assert torch.isfinite(system.loss(batch(1), Seeded(0))["loss"])


def test_a_plain_transformer_gets_a_pyramid_at_strides_4_to_32():
    from unmask.backbones import build

    for patch, divisor in ((4, 32), (8, 32), (16, 32), (14, 28)):
        encoder = build(f"vit_nano_patch{patch}", image_size=2 * divisor, depth=1)
        pyramid, dims, needed = pyramid_of(encoder)
        maps = pyramid(encoder.maps(torch.zeros(1, 3, 2 * needed, 2 * needed))[-1])
        assert needed == divisor
        assert [m.shape[2] for m in maps] == [16, 8, 4, 2]
        assert [m.shape[1] for m in maps] == list(dims)


def test_an_encoder_of_a_run_comes_in_with_its_weights(tmp_path):
    from unmask.backbones import build

    source = build("vit_nano_patch8", image_size=32, embed_dim=32, depth=1, num_heads=2)
    source.preprocessing = Preprocessing(image_size=(32, 32))
    save_encoder(source, tmp_path / "encoder")
    wanted = {**SMALL, "classes": None, "init": str(tmp_path / "encoder")}
    wanted.pop("backbone")
    facts = DataFacts(image_size=(64, 96), channels=3, classes=("a", "b"), extra={"things": (1,)})
    config = PEM.adapted(PEM.Config(**wanted), facts)
    system = PEM.build(config)
    assert (system.encoder.name, system.encoder.image_size) == ("vit_nano_patch8", (64, 96))
    assert torch.equal(system.encoder.blocks[0].mlp.fc1.weight, source.blocks[0].mlp.fc1.weight)
    assert (system.classes, system.things, system.config.init) == (("a", "b"), (1,), None)


# --- predicting ---


def test_predictions_have_the_pictures_own_size_whatever_it_is(tmp_path):
    system = model(classes=("a", "b", "c", "d", "e"), things=("b", "c")).eval()
    system.encoder.preprocessing = Preprocessing(image_size=(32, 32))
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (45, 70, 3), np.uint8)).save(tmp_path / "a.png")
    inputs = [tmp_path / "a.png", torch.rand(3, 33, 20), np.zeros((20, 30), np.uint8)]
    for task in ("semantic", "panoptic", "instance"):
        found = system.predict(inputs, task=task, object_mask_threshold=0.0, threshold=0.0)
        assert [f.map.shape for f in found] == [(45, 70), (33, 20), (20, 30)]
        assert found[0].source == str(tmp_path / "a.png")
        assert found[0].overlay(size=64).height >= 45
        assert found[0].save(tmp_path / f"{task}.json").is_file()
    assert system.predict(inputs[:1])[0].task == "panoptic"  # it knows things


def test_scales_mirrors_and_tiles_give_every_pixel_a_class():
    system = model().eval()
    system.encoder.preprocessing = Preprocessing(image_size=(64, 64))
    picture = np.random.default_rng(0).integers(0, 255, (80, 100, 3), np.uint8)
    plain, many, tiled = (
        system.predict([picture], **options)[0]
        for options in ({}, {"scales": (0.5, 1.0), "mirror": True}, {"tile": 64, "size": 0})
    )
    assert all(f.map.shape == (80, 100) and f.map.min() >= 0 for f in (plain, many, tiled))


def test_mirrored_averages_of_a_picture_and_of_its_mirror_image_agree():
    system = model().eval()
    system.encoder.preprocessing = Preprocessing(image_size=(64, 64))
    picture = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
    one, other = (system.predict([p], mirror=True)[0].map for p in (picture, picture[:, ::-1]))
    assert (one == other[:, ::-1]).mean() > 0.999


# --- drawn scenes ---


def test_scenes_are_the_same_for_the_same_number_and_their_truth_is_whole():
    for number in range(20):
        image, ids, labels = scene(number, (64, 96))
        again = scene(number, (64, 96))
        assert (image == again[0]).all()
        assert (ids == again[1]).all()
        areas = np.bincount(ids.ravel(), minlength=len(labels) + 1)
        assert len(areas) == len(labels) + 1
        assert min(areas[1:]) >= SMALLEST
        assert set(labels) <= set(range(len(CLASSES)))
    assert not (scene(0)[0] == scene(0, split="test")[0]).all()


def test_shapes_are_segmentation_data():
    data = SegmentationData(uri="sample:shapes", image_size=64, scale=(1.0, 1.0), jitter=False)
    batches = SegmentationBatches(data, 4)
    found = batches.transform(batches.fetch(np.arange(4)), Seeded(0))
    assert batches.facts.classes == CLASSES
    assert batches.facts.extra["things"] == (2, 3, 4, 5)
    assert found["segments"].shape == (4, 64, 64)
    with pytest.raises(UserError, match="no split 'val'"):
        SegmentationBatches(data.model_copy(update={"split": "val"}), 4)


def test_measure_tells_quality_and_a_baseline(tmp_path):
    data = SegmentationData(uri="sample:shapes", image_size=32, split="test", scale=(1.0, 1.0), jitter=False)
    facts = SegmentationBatches(data, 2).facts
    system = PEM(PEM.adapted(PEM.Config(**{**SMALL, "classes": None}), facts)).eval()
    found = system.measure(data, Seeded(0), limit=3, folder=tmp_path)
    assert set(PEM.measures) <= set(found)
    assert found["samples"] == 3
    assert all((tmp_path / p["file"]).is_file() for p in found["pictures"])
    assert next(iter(found["baseline"].values()))["miou"] > 0


def test_previews_show_image_truth_and_prediction():
    system = model()
    (picture,) = system.preview(batch(), Seeded(0))
    assert picture.columns == ["image", "truth", "prediction"]
    assert len(picture.rows) == 2
    assert system.training


# --- the authors' files ---


def test_a_state_with_the_authors_names_comes_back_as_the_same_network():
    from unmask.official.load import rename
    from unmask.systems.prediction.pem.official import RULES

    torch.manual_seed(1)
    system = model(backbone={"name": "stdc1", "base": 8, "layers": [1, 2, 1]}).eval()
    state = official_names(system)
    ours = rename(state, RULES)
    assert {k for k in system.state_dict() if "tracked" not in k and k != "criterion.empty_weight"} == set(ours)
    loaded = load_official(state, {"num_heads": 4})
    x = torch.randn(1, 3, 64, 64)
    assert torch.allclose(loaded.predictions(x).masks(), system.predictions(x).masks(), atol=1e-5)
    with pytest.raises(UserError, match="not the weights of PEM"):
        load_official({"head.weight": torch.zeros(1)})


def test_detectron2s_resnet_names_become_timms():
    from unmask.backbones import build
    from unmask.official.load import rename
    from unmask.systems.prediction.pem.official import RULES, backbone_of

    encoder = build("timm/resnet50")
    back = [
        ("model.conv1.", "backbone.stem.conv1."),
        ("model.bn1.", "backbone.stem.conv1.norm."),
        (".downsample.0.", ".shortcut."),
        (".downsample.1.", ".shortcut.norm."),
        *((f"model.layer{i}.", f"backbone.res{i + 1}.") for i in range(1, 5)),
        *((f".bn{i}.", f".conv{i}.norm.") for i in (1, 2, 3)),
    ]
    state = {}
    for name, value in encoder.state_dict().items():
        if "tracked" in name:
            continue
        theirs = name
        for ours, official in back:
            theirs = theirs.replace(ours, official)
        state[theirs] = value
    assert backbone_of(state) == {"name": "timm/resnet50"}
    wanted = {f"encoder.{n}" for n in encoder.state_dict() if "tracked" not in n}
    assert set(rename(state, RULES)) == wanted


def official_names(system: PEM) -> dict[str, torch.Tensor]:
    """Our state under the authors' names, with the backbone's second copy that their files hold."""
    words = [
        (r"encoder.", "backbone."),
        ("head.pixel_decoder.", "sem_seg_head.pixel_decoder."),
        ("head.decoder.", "sem_seg_head.predictor."),
    ]
    inner = {
        ".context.norm.": ".conv_avg.bn.",
        ".context.": ".conv_avg.",
        ".reduce.": ".mlp.0.mlp.0.",
        ".expand.": ".mlp.0.mlp.3.",
        ".offset.": ".dcn_offset.",
        ".up.": ".up_sample.",
        ".up_norm.": ".up_bn.",
        ".look.memory_norm.": ".look.feature_proj.bn.",
        ".look.memory_conv.": ".look.feature_proj.to_query_3x3.",
        ".look.memory_out.": ".look.feature_proj.out.",
        ".look.query_norm.": ".look.query_proj.0.",
        ".look.query_out.": ".look.query_proj.1.",
        ".classify.": ".class_embed.",
        ".embed_mask.0.": ".mask_embed.layers.0.",
        ".embed_mask.2.": ".mask_embed.layers.1.",
        ".embed_mask.4.": ".mask_embed.layers.2.",
        ".qkv.": ".in_proj_",
        ".attention.proj.": ".attention.out_proj.",
    }
    import re

    out = {}
    for name, value in system.state_dict().items():
        if "tracked" in name or name.startswith("criterion."):
            continue
        theirs = name
        for ours, official in words:
            theirs = official + theirs.removeprefix(ours) if theirs.startswith(ours) else theirs
        if "pixel_decoder" in theirs:
            theirs = re.sub(r"\.projections\.(\d)\.norm\.", r".in_projections.\1.bn.", theirs)
            theirs = theirs.replace(".projections.", ".in_projections.").replace("decoder.out.norm.", "decoder.out.bn.")
            theirs = re.sub(r"\.modulations\.(\d)\.norm\.", r".csm.\1.mlp.0.mlp.1.", theirs)
            theirs = theirs.replace(".modulations.", ".csm.")
            theirs = re.sub(r"\.refinements\.(\d)\.norm\.", r".dcn.\1.dcn_bn.", theirs)
            theirs = re.sub(r"\.refinements\.(\d)\.conv\.", r".dcn.\1.dcn.", theirs)
            theirs = theirs.replace(".refinements.", ".dcn.")
        for ours, official in inner.items():
            theirs = theirs.replace(ours, official)
        theirs = re.sub(r"predictor\.projections\.", "predictor.input_proj.", theirs)
        theirs = re.sub(r"predictor\.norm\.", "predictor.decoder_norm.", theirs)
        theirs = re.sub(r"layers\.(\d)\.look\.", r"transformer_cross_attention_layers.\1.", theirs)
        theirs = re.sub(r"layers\.(\d)\.attention\.", r"transformer_self_attention_layers.\1.self_attn.", theirs)
        theirs = re.sub(r"layers\.(\d)\.attention_norm\.", r"transformer_self_attention_layers.\1.norm.", theirs)
        theirs = re.sub(r"layers\.(\d)\.ffn\.0\.", r"transformer_ffn_layers.\1.linear1.", theirs)
        theirs = re.sub(r"layers\.(\d)\.ffn\.2\.", r"transformer_ffn_layers.\1.linear2.", theirs)
        theirs = re.sub(r"layers\.(\d)\.ffn_norm\.", r"transformer_ffn_layers.\1.norm.", theirs)
        out[theirs] = value
        if theirs.startswith("backbone.features.0."):
            out[theirs.replace("features.0", "x2.0")] = value
    return out


def test_real_street_scenes_are_learnt_from(tmp_path):
    archive = Path(__file__).parents[3] / "shared" / "data" / "camvid_240x320.zip"
    if not archive.is_file():
        pytest.skip("no street scenes on this machine")
    import zipfile

    with zipfile.ZipFile(archive) as held:
        names = [n for n in held.namelist() if n.endswith("classes.txt") or n.startswith(("train/", "test/"))]
        stems = {Path(n).stem for n in names if n.startswith("train/images/")}
        chosen = sorted(stems)[:4]
        for name in names:
            if name.endswith("classes.txt") or Path(name).stem in chosen:
                held.extract(name, tmp_path)
    data = SegmentationData(uri=str(tmp_path), image_size=(64, 96), shortest_edge=64)
    batches = SegmentationBatches(data, 2)
    system = PEM.build(PEM.adapted(PEM.Config(**{**SMALL, "classes": None, "queries": 14}), batches.facts)).train()
    assert "Road" in system.classes
    assert "Unlabelled" not in system.classes
    loss = system.loss(batches.transform(batches.fetch(np.arange(2)), Seeded(0)), Seeded(0))["loss"]
    loss.backward()
    assert torch.isfinite(loss)
