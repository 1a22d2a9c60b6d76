"""FiTv2: sequences of any shape, packing, rotary positions at new sizes, both objectives, and what a user can get wrong."""

import pytest
import torch
from safetensors.torch import save_file

from unmask.contracts import configured
from unmask.data.aspect import AspectSettings
from unmask.draw import Recorder, Replay, Seeded
from unmask.errors import UserError
from unmask.nn.rotary import METHODS
from unmask.official.load import read_checkpoint
from unmask.systems.generation.dit.official import unstacked
from unmask.systems.generation.fitv2.model import FiTv2
from unmask.systems.generation.fitv2.network import FiTNetwork
from unmask.systems.generation.fitv2.official import PREFER, load_official
from unmask.systems.generation.fitv2.tokens import check_sizes, full_grid, image_of, packed, tokens_of

SMALL = {
    "image_size": (8, 8), "classes": 3, "patch_size": 2, "context": 16, "embed_dim": 16, "depth": 2, "num_heads": 2,
    "adaln_rank": 4, "diffusion_steps": 40,
}  # fmt: skip
SIZES = torch.tensor([[8, 8], [4, 12], [6, 4], [2, 4]])
ROTARY = {"method": "ntk-aware", "decouple": True, "online": True, "trained": 3}
V1 = {"objective": "diffusion", "learn_sigma": True, "qk_norm": False, "adaln": "normal"}


def canvas() -> torch.Tensor:
    pixels = torch.rand(4, 3, 8, 12, generator=torch.Generator().manual_seed(0)) * 2 - 1
    rows, columns = torch.arange(8)[:, None], torch.arange(12)[None]
    inside = (rows < SIZES[:, :1, None]) & (columns < SIZES[:, 1:, None])
    return pixels * inside[:, None]


BATCH = {"image": canvas(), "size": SIZES, "label": torch.tensor([0, 1, 2, -1])}


def made(**options) -> FiTv2:
    torch.manual_seed(0)
    model = FiTv2(configured(FiTv2, {**SMALL, **options}))
    for parameter in model.parameters():
        parameter.data.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) * 0.05)
    return model


def test_tokens_are_each_samples_own_rectangle_and_come_back():
    tokens = tokens_of(canvas(), SIZES // 2, 2, 16)
    check_sizes(tokens.grid, tokens.mask, tokens.size)
    assert tokens.mask.sum(dim=1).tolist() == [16, 12, 6, 2]
    for i, (h, w) in enumerate(SIZES.tolist()):
        assert torch.equal(image_of(tokens.data[i : i + 1], (h // 2, w // 2), 2)[0], canvas()[i, :, :h, :w])
    assert tokens.grid[1, :, 7].tolist() == [1, 1]  # column, row of the eighth token of a grid six wide


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"rotary": ROTARY},
        {"position": "learned"},
        {"adaln": "swiglu", "feed_forward": "swiglu_large", "qk_norm_weight": True},
        {"adaln": "normal", "feed_forward": "gelu", "qk_norm": False, "rotary": {"values": True}},
        {"time": "uniform", "time_shift": 3.0},
        V1,
    ],
    ids=str,
)
def test_every_option_learns_packed_as_padded_and_samples_any_size(options):
    model = made(**options)
    padded = model.loss(BATCH, Seeded(0))
    padded["loss"].backward()
    unused = [n for n, p in model.named_parameters() if p.grad is None]
    assert not unused
    packed_model = made(**options, pack=20)
    together = packed_model.loss(BATCH, Seeded(0))
    together["loss"].backward()
    assert torch.allclose(padded["loss"], together["loss"], atol=1e-5)
    for (name, a), b in zip(model.named_parameters(), packed_model.parameters(), strict=True):
        assert torch.allclose(a.grad, b.grad, atol=1e-4), name
    assert set(model.references(BATCH, Seeded(0))) == {"nothing", "each value alone"}
    samples = model.generate(2, Seeded(0), condition=[0, "none"], size=(10, 20), steps=2, guidance=2.0)
    assert [s.value.shape for s in samples] == [(10, 20, 3)] * 2


def test_rows_hold_as_many_images_as_fit_each_with_its_number():
    tokens = tokens_of(canvas(), SIZES // 2, 2, 16)
    rows = packed(tokens, 18)
    assert rows.mask.shape == (2, 18)
    assert sorted(rows.owner[0].tolist()) == [0, 3]
    assert (rows.mask[0] == 1).sum() == 16
    assert torch.equal(rows.apart(rows.rows(tokens.data), 4, 16), tokens.data)
    check_sizes(rows.grid, rows.mask, rows.size)
    with pytest.raises(UserError, match="16 tokens does not fit into a context of 10"):
        packed(tokens, 10)


def test_an_image_does_not_see_its_neighbours_in_a_row_nor_the_padding():
    network = made().network.eval()
    grid, size = full_grid(1, (2, 3))
    x, other, t = torch.randn(1, 6, 12), torch.randn(1, 6, 12), torch.tensor([0.3])
    alone = network(x, t, None, grid, None, size)
    mask = torch.tensor([[1] * 6 + [2] * 6 + [0] * 4])
    row = torch.cat((x, other, torch.randn(1, 4, 12)), dim=1)
    places = torch.cat((grid, grid, torch.zeros(1, 2, 4, dtype=torch.int64)), dim=2)
    out = network(row, t, None, places, mask, torch.cat((size, size), dim=1))
    assert torch.allclose(out[:, :6], alone, atol=1e-5)
    assert torch.equal(out[:, 12:], torch.zeros(1, 4, 12))


@pytest.mark.parametrize("sampler", ["heun", "euler", "dopri5", "sde"])
def test_an_image_depends_on_seed_and_number_alone(sampler):
    model = made(rotary=ROTARY)
    options = {"steps": 3, "guidance": 1.5, "size": (6, 10), "sampler": sampler, "scale_pow": 2.0}
    together = model.generate(3, Seeded(5), condition=[0, 1, 2], **options)
    alone = model.generate(1, Seeded(5, 0, 1), condition=[1], **options)
    assert abs(together[1].value.astype(int) - alone[0].value.astype(int)).max() <= 1


@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
def test_v1_samples_like_dit(sampler):
    assert made(**V1).generate(1, Seeded(0), steps=3, sampler=sampler, size=(4, 6))[0].value.shape == (4, 6, 3)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("decouple", [True, False])
def test_every_rotary_method_can_be_asked_at_generation(method, decouple):
    model = made()
    plain = model.generate(1, Seeded(0), size=(8, 24), steps=2)[0].value
    other = model.generate(1, Seeded(0), size=(8, 24), steps=2, rotary=method, decouple=decouple)[0].value
    assert ((plain == other).all()) == (method == "normal")
    same = model.generate(1, Seeded(0), steps=2, rotary="ntk-aware", decouple=decouple)[0].value
    assert (same == model.generate(1, Seeded(0), steps=2)[0].value).all()  # nothing to stretch at the trained size


def test_the_learned_table_at_its_own_size_is_itself():
    model = made(position="learned")
    grid, size = full_grid(1, (4, 4))
    table = model.network.position_table.flatten(1).T
    assert torch.allclose(model.network.absolute(grid, size)[0], table, atol=1e-5)
    wide, wide_size = full_grid(1, (2, 8))
    resized = torch.nn.functional.interpolate(
        model.network.position_table[None], size=(2, 8), mode="bicubic", align_corners=False
    )
    assert torch.allclose(model.network.absolute(wide, wide_size)[0], resized[0].flatten(1).T, atol=1e-5)


def test_a_step_is_replayed_from_its_recorded_draws():
    model, recorder = made().train(), Recorder(Seeded(3))
    first = model.loss(BATCH, recorder)["loss"]
    assert set(recorder.recorded) == {"time", "noise", "class_drop"}
    assert torch.equal(model.loss(BATCH, Replay(recorder.recorded))["loss"], first)


def test_partial_training_leaves_the_matrices_of_the_blocks(tmp_path):
    source = made()
    source.save_pretrained(tmp_path / "source")
    model = FiTv2.build(configured(FiTv2, {**SMALL, "init": str(tmp_path / "source"), "train_only": "partial"}))
    learned = {n for n, p in model.named_parameters() if p.requires_grad}
    assert "network.x_embedder.proj.weight" in learned
    assert "network.final_layer.linear.weight" in learned
    assert "network.blocks.0.attn.qkv.bias" in learned
    assert "network.blocks.0.attn.qkv.weight" not in learned
    assert "network.modulations.up.weight" not in learned
    assert torch.equal(model.network.blocks[0].attn.qkv.weight, source.network.blocks[0].attn.qkv.weight)
    assert model.config.init is None


@pytest.mark.parametrize("name", ["model_ema.bin", "model.safetensors"])
@pytest.mark.parametrize(
    "options",
    [{}, {"adaln": "swiglu", "qk_norm_weight": True}, {"feed_forward": "gelu", "adaln": "normal"}, V1],
    ids=str,
)
def test_the_authors_checkpoints_load(tmp_path, name, options):
    model = made(**options).eval()
    state = {n: v.contiguous() for n, v in unstacked(model.network.state_dict()).items()}
    if name.endswith(".bin"):
        torch.save(state, tmp_path / name)
    else:
        save_file(state, tmp_path / name)
    read = read_checkpoint(tmp_path / name, prefer=PREFER)
    again = load_official(read, {"in_channels": 3, "num_heads": 2, "context": 16}).eval()
    grid, size = full_grid(2, (2, 3))
    x, t, y = torch.randn(2, 6, 12), torch.tensor([0.2, 0.7]), torch.tensor([0, 2])
    a, b = (m.network(x, t, y, grid, None, size) for m in (model, again))
    assert torch.allclose(a, b, atol=1e-6)
    assert again.config.objective == model.config.objective


def test_images_of_mixed_shapes_train(tmp_path):
    import numpy as np
    from PIL import Image

    random = np.random.default_rng(0)
    for i, shape in enumerate([(40, 60, 3), (60, 30, 3), (50, 50, 3), (64, 40, 3)]):
        Image.fromarray(random.integers(0, 255, shape, dtype=np.uint8)).save(tmp_path / f"{i}.png")
    data = AspectSettings(uri=str(tmp_path), augment="flip", normalise="half", cache=False)
    config = configured(FiTv2, {**{k: v for k, v in SMALL.items() if k != "image_size"}, "classes": 0})
    batches = FiTv2.open_batches(config, data, 4, 0)
    model = FiTv2.build(FiTv2.adapted(config, batches.facts))
    batch = batches.transform(next(batches.iterate(0)), Seeded(0))
    assert torch.isfinite(model.loss(batch, Seeded(0))["loss"])
    assert model.shapes() == [(8, 8), (6, 10), (10, 6)]
    own = model.measure(data, Seeded(0), limit=4)
    assert own["samples"] == 4
    assert own["flow_loss"] > 0


def test_variants_are_the_papers():
    config = FiTNetwork.Config(variant="3B")
    assert (config.depth, config.embed_dim, config.num_heads, config.adaln_rank) == (40, 2304, 24, 576)
    assert FiTNetwork.Config(variant="v1_XL").objective == "diffusion"
    torch.manual_seed(0)
    with torch.device("meta"):
        network = FiTNetwork(FiTNetwork.Config(variant="XL"))
    assert 668e6 < sum(p.numel() for p in network.parameters()) < 674e6  # the paper's 671 million


GRID, SIZE = full_grid(1, (2, 3))
WRONG = [
    (lambda: made(num_heads=8), r"embed_dim / num_heads = 2 must be divisible by 4"),
    (lambda: made(num_heads=3), r"num_heads=3 does not divide embed_dim=16"),
    (lambda: made(learn_sigma=True), r"learn_sigma goes with objective=diffusion"),
    (lambda: made(pack=8), r"pack=8 must hold an image of the context, 16 tokens"),
    (lambda: made().generate(1, Seeded(0), size=(9, 8)), r"size 9x8 cannot be made.*multiples of 2"),
    (lambda: made().generate(1, Seeded(0), steps=2, sampler="ddpm"), r"sampler=ddpm does not follow a flow"),
    (lambda: made(**V1).generate(1, Seeded(0), steps=2, sampler="heun"), r"does not follow a diffusion"),
    (lambda: made(position="learned").generate(1, Seeded(0), steps=1, rotary="yarn"), r"position=learned"),
    (lambda: made().tokens({"image": torch.zeros(1, 3, 12, 12)}), r"36 tokens exceed context=16"),
    (lambda: made().network(torch.zeros(1, 6, 5), torch.zeros(1), None, GRID), r"tokens of 12 values.*got 5"),
    (lambda: check_sizes(GRID, torch.ones(1, 6), SIZE.flip(2)), r"size 3x2.*does not match its grid.*2 rows and 3 col"),
    (lambda: load_official({"x_embedder.proj.weight": torch.zeros(4, 3, 2, 2)}), r"not the weights of a flexible"),
    (lambda: FiTv2.open_batches(FiTv2.Config(first_stage={"kind": "kl"}), None, 1, 0), r"give first_stage.weights"),
]


@pytest.mark.parametrize(("wrong", "words"), WRONG)
def test_what_does_not_fit_is_said_in_one_line(wrong, words):
    with pytest.raises(UserError, match=words) as caught:
        wrong()
    assert "\n" not in str(caught.value)
