"""DiT: its options, its samplers' laws, both families of checkpoint names, and what a user can get wrong."""

import pytest
import torch

from unmask.contracts import DataFacts, configured
from unmask.draw import Recorder, Replay, Seeded
from unmask.errors import UserError
from unmask.official.load import read_checkpoint
from unmask.systems.generation.dit.diffusers_names import to_diffusers
from unmask.systems.generation.dit.model import DiT
from unmask.systems.generation.dit.network import VARIANTS, DiTNetwork
from unmask.systems.generation.dit.official import PREFER, load_official, unstacked

SMALL = {
    "image_size": (8, 8),
    "classes": ("cat", "dog", "ship"),
    "patch_size": 2,
    "embed_dim": 16,
    "depth": 2,
    "num_heads": 2,
    "diffusion_steps": 40,
}
IMAGES = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
BATCH = {"image": IMAGES, "label": torch.tensor([0, 1, 2, -1])}


def made(**options) -> DiT:
    torch.manual_seed(0)
    model = DiT(configured(DiT, {**SMALL, **options}))
    if not options.get("as_started"):
        for parameter in model.parameters():  # zero starts say nothing: every weight speaks here
            parameter.data.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) * 0.05)
    return model


def official_state(model: DiT) -> dict[str, torch.Tensor]:
    return unstacked({**model.network.state_dict(), "pos_embed": model.network.pos_embed})


@pytest.mark.parametrize("conditioning", ["adaln_zero", "adaln", "in_context"])
@pytest.mark.parametrize("learn_sigma", [True, False])
@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_every_kind_learns_and_samples(conditioning, learn_sigma, schedule):
    model = made(conditioning=conditioning, learn_sigma=learn_sigma, noise_schedule=schedule).train()
    losses = model.loss(BATCH, Seeded(0))
    losses["loss"].backward()
    assert torch.isfinite(losses["loss"])
    assert ("vb" in losses) == learn_sigma
    assert all(p.grad is not None for p in model.parameters())
    samples = model.generate(2, Seeded(0), condition=["dog", 2], steps=3, guidance=2.0)
    assert [s.value.shape for s in samples] == [(8, 8, 3)] * 2
    assert [s.made_by["class_name"] for s in samples] == ["dog", "ship"]


def test_a_block_with_a_zero_start_is_the_identity():
    torch.manual_seed(0)
    network = DiT(configured(DiT, SMALL)).network
    x, modulation = torch.randn(2, 16, 16), network.modulations(torch.randn(2, 16))
    assert torch.equal(network.blocks[0](x, modulation[0]), x)
    assert torch.equal(network(IMAGES[:2], torch.tensor([1, 2])), torch.zeros(2, 6, 8, 8))


def test_all_modulations_at_once_are_those_of_each_block_alone():
    network = made().network
    c = torch.randn(3, 16)
    state = unstacked(network.state_dict())
    for number, modulation in enumerate(network.modulations(c)):
        weight, bias = (state[f"blocks.{number}.adaLN_modulation.1.{k}"] for k in ("weight", "bias"))
        alone = torch.nn.functional.linear(torch.nn.functional.silu(c), weight, bias)
        assert torch.allclose(modulation.flatten(1), alone, atol=1e-6)


def test_an_image_depends_on_seed_and_number_alone():
    model = made()
    for options in ({}, {"sampler": "ddim"}, {"sampler": "ddim", "eta": 0.5}):
        together = model.generate(3, Seeded(7), condition=[0, 1, 2], steps=4, guidance=1.5, **options)
        alone = model.generate(1, Seeded(7, 0, 2), condition=[2], steps=4, guidance=1.5, **options)
        assert abs(together[2].value.astype(int) - alone[0].value.astype(int)).max() <= 1


def test_guidance_of_one_is_the_conditional_pass_alone_and_three_channels_are_guided():
    model = made(channels=4)
    x, t, classes = torch.randn(2, 4, 8, 8), torch.tensor([3, 9]), torch.tensor([0, 2])
    plain = model.field(classes, 1.0)(x, t)
    guided = model.field(classes, 3.0)(x, t)
    assert torch.allclose(plain[:, 3:], guided[:, 3:], atol=1e-5)
    assert not torch.allclose(plain[:, :3], guided[:, :3], atol=1e-3)
    every = made(channels=4, guidance_channels="all").field(classes, 3.0)(x, t)
    assert not torch.allclose(plain[:, 3], every[:, 3], atol=1e-3)
    assert torch.allclose(plain[:, 4:], every[:, 4:], atol=1e-5)


def test_a_step_is_replayed_from_its_recorded_draws():
    model = made().train()
    recorder = Recorder(Seeded(3))
    first = model.loss(BATCH, recorder)["loss"]
    assert set(recorder.recorded) == {"time", "noise", "class_drop"}
    assert torch.equal(model.loss(BATCH, Replay(recorder.recorded))["loss"], first)


def test_images_without_a_label_learn_as_the_empty_class():
    model = made().eval()
    assert model.labels(BATCH).tolist() == [0, 1, 2, 3]
    assert model.labels({"image": IMAGES}).tolist() == [3] * 4
    assert made(classes=0).labels(BATCH) is None


@pytest.mark.parametrize("wrapped", [False, True])
def test_the_authors_checkpoint_loads_plain_and_under_ema(tmp_path, wrapped):
    model = made()
    state = official_state(model)
    noise = {name: torch.zeros_like(value) for name, value in state.items()}
    torch.save({"model": noise, "ema": state, "args": None} if wrapped else state, tmp_path / "DiT.pt")
    again = load_official(read_checkpoint(tmp_path / "DiT.pt", prefer=PREFER), {"num_heads": 2}).eval()
    t, classes = torch.tensor([0, 5, 10, 19]), torch.tensor([0, 1, 2, 3])
    assert torch.allclose(again.network(IMAGES, t, classes), model.network(IMAGES, t, classes), atol=1e-6)
    assert again.config.image_size == (8, 8)
    assert again.config.learn_sigma


def test_diffusers_names_are_the_same_weights_both_ways():
    model = made()
    theirs = to_diffusers(official_state(model))
    again = load_official(theirs, {"num_heads": 2, "image_size": (8, 8)})
    for name, value in model.network.state_dict().items():
        assert torch.equal(again.network.state_dict()[name], value), name


@pytest.mark.slow  # importing diffusers takes longer than everything else here
def test_diffusers_network_gives_the_same_with_these_weights():
    diffusers = pytest.importorskip("diffusers")
    model = made()
    peer = diffusers.DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=3, out_channels=6, num_layers=2, sample_size=8,
        patch_size=2, num_embeds_ada_norm=3,
    )  # fmt: skip
    peer.load_state_dict(to_diffusers(official_state(model)))
    for block in peer.transformer_blocks:  # theirs divides the sinusoid's exponent by 127, the authors' by 128
        block.norm1.emb.time_proj.downscale_freq_shift = 0
    t, classes = torch.tensor([0, 5, 10, 19]), torch.tensor([0, 1, 2, 2])
    with torch.no_grad():
        out = peer.eval()(IMAGES, timestep=t, class_labels=classes).sample
        assert torch.allclose(out, model.eval().network(IMAGES, t, classes), atol=1e-5)


def test_variants_are_the_papers_and_single_numbers_win():
    assert DiTNetwork.Config(variant="XL").depth == 28
    assert {k: v["num_heads"] for k, v in VARIANTS.items()} == {"S": 6, "B": 12, "L": 16, "XL": 16}
    assert DiT.Config(variant="S", depth=3).depth == 3
    again = DiT.Config.model_validate(DiT.Config(variant="S", depth=3).plain())
    assert (again.depth, again.embed_dim) == (3, 384)


def test_a_saved_model_is_the_same_again(tmp_path):
    model = made().eval()
    model.save_pretrained(tmp_path / "m")
    again = DiT.from_pretrained(tmp_path / "m").eval()
    assert again.class_names == ("cat", "dog", "ship")
    a, b = (m.generate(1, Seeded(0), condition="dog", steps=2)[0].value for m in (model, again))
    assert (a == b).all()


def test_the_data_say_sizes_classes_and_channels():
    facts = DataFacts(uri="x", channels=1, image_size=(12, 12), classes=("a", "b"), mean=(0.5,), std=(0.5,))
    config = DiT.adapted(configured(DiT, {k: v for k, v in SMALL.items() if k not in ("image_size", "classes")}), facts)
    assert (config.image_size, config.channels, config.classes) == ((12, 12), 1, ("a", "b"))
    with pytest.raises(UserError, match=r"\[-1, 1\].*normalise=half"):
        DiT.adapted(config, DataFacts(mean=(0.1,), std=(0.2,)))


def test_the_trivial_answers_cost_what_they_should():
    """No noise costs the noise's variance; a value alone says more than nothing."""
    found = made().references(BATCH, Seeded(0))
    assert abs(float(found["no noise"]) - 1) < 0.2
    assert found["each value alone"] < found["no noise"]


WRONG = [
    (lambda: made(image_size=(9, 8)), r"image size 9x8 does not fit: it takes multiples of 2"),
    (lambda: made().generate(1, Seeded(0), condition=7), r"no class 7.*0 \.\.\. 2"),
    (lambda: made().generate(1, Seeded(0), condition="dgo"), r"no class 'dgo'.*dog"),
    (lambda: made().generate(1, Seeded(0), steps=0), r"steps=0"),
    (lambda: made().generate(1, Seeded(0), steps=41), r"steps=41 does not fit: it takes 1 \.\.\. 40"),
    (lambda: made().generate(1, Seeded(0), size=(16, 16)), r"16x16 cannot be made"),
    (lambda: made().generate(1, Seeded(0), eta=0.5), r"eta=0.5 is an option of sampler=ddim"),
    (lambda: made().generate(1, Seeded(0), samplr="ddim"), r"no option \"samplr\".*sampler"),
    (lambda: made().network(torch.zeros(1, 4, 8, 8), torch.zeros(1)), r"takes 3 channels of 8x8, got \(4, 8, 8\)"),
    (lambda: made(diffusion_steps=20), r"diffusion_steps=20 are too few"),
    (lambda: made(num_heads=3), r"num_heads=3 does not divide width 16"),
    (lambda: made(guidance_channels=0), r"guidance_channels=0 must be at least 1"),
    (lambda: load_official({"patch_embed.weight": torch.zeros(1)}), r"not the weights of a diffusion transformer"),
]


@pytest.mark.parametrize(("wrong", "words"), WRONG)
def test_what_does_not_fit_is_said_in_one_line(wrong, words):
    with pytest.raises(UserError, match=words) as caught:
        wrong()
    assert "\n" not in str(caught.value)


def test_a_checkpoint_of_another_size_or_channels_is_refused():
    state = official_state(made())
    with pytest.raises(UserError, match=r"positions are \[16, 16\].*give the image_size"):
        load_official(state, {"num_heads": 2, "image_size": (16, 16)})
    with pytest.raises(UserError, match=r"does not fit.*x_embedder"):
        load_official(state, {"num_heads": 2, "channels": 1, "first_stage": "pixels"})
    shifted = {**state, "pos_embed": state["pos_embed"] + 1}
    with pytest.raises(UserError, match=r"not the fixed sine-cosine table"):
        load_official(shifted, {"num_heads": 2})
