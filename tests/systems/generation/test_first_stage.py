import pytest
import torch

from unmask.contracts import DataFacts, Progress
from unmask.draw import Seeded
from unmask.errors import UserError
from unmask.systems.generation.first_stage import FirstStageConfig, open_first_stage
from unmask.systems.generation.first_stage.kl import KLAutoencoder
from unmask.systems.generation.first_stage.vq import VQTokenizer

SMALL = {"image_size": (8, 8), "channels": 3, "width": 8, "multipliers": (1, 2)}


def images(n: int = 8, size: int = 8) -> torch.Tensor:
    return torch.rand(n, 3, size, size, generator=torch.Generator().manual_seed(1)) * 2 - 1


def tokenizer(**options) -> VQTokenizer:
    torch.manual_seed(0)
    return VQTokenizer(VQTokenizer.Config(**{**SMALL, "codes": 16, "code_dim": 4, **options}))


def trained(system, steps: int) -> list[float]:
    system.train()
    optimiser = torch.optim.AdamW(system.parameters(), lr=3e-3)
    colours = torch.randn(64, 3, 1, 1, generator=torch.Generator().manual_seed(3)).tanh()
    losses = []
    for step in range(steps):
        batch = {"image": colours[torch.arange(16) * (step + 1) % 64].expand(-1, -1, 8, 8).contiguous()}
        optimiser.zero_grad()
        loss = system.loss(batch, Seeded(0, step))["loss"]
        loss.backward()
        optimiser.step()
        system.after_step(Progress(step, steps))
        losses.append(loss.item())
    return losses


def test_pixels_come_back_as_they_went():
    stage, _ = open_first_stage(FirstStageConfig(), channels=3)
    assert torch.equal(stage.decode(stage.encode(images())), images())
    assert stage.factor == 1
    assert not stage.discrete


@pytest.mark.parametrize(("channels", "levels"), [(3, 4), (1, 16), (3, 2)])
def test_levels_are_ids_that_lose_half_a_level_at_most(channels, levels):
    stage, _ = open_first_stage(FirstStageConfig(levels=levels), channels=channels)
    given = images()[:, :channels]
    ids = stage.encode(given)
    assert stage.codes == levels**channels
    assert ids.dtype == torch.int64
    assert 0 <= ids.min() <= ids.max() < stage.codes
    assert (stage.decode(ids) - given).abs().max() <= 1 / (levels - 1) + 1e-6


@pytest.mark.parametrize("book", ["average", "gradient"])
def test_the_tokenizer_learns_and_uses_its_code_book(book):
    system = tokenizer(book=book)
    losses = trained(system, 40)
    assert losses[-1] < 0.8 * losses[0]
    assert len(system.eval().ids(images()).unique()) > 1
    assert not system.train()._waiting


def test_an_entry_nobody_chooses_starts_anew_at_a_cell():
    system = tokenizer(restart=0.5, decay=0.0)
    system.entries[3] = 1e4
    system.sums[3] = 1e4
    trained(system, 1)
    assert system.entries[3].abs().max() < 1e3


def test_the_autoencoder_learns_and_knows_the_variance_of_its_latents():
    torch.manual_seed(0)
    system = KLAutoencoder(KLAutoencoder.Config(**SMALL, latent_channels=2))
    losses = trained(system, 40)
    assert losses[-1] < 0.8 * losses[0]
    assert system.variance != 1


@pytest.mark.parametrize("kind", ["vq", "kl"])
def test_a_trained_stage_opens_and_opens_again_from_what_it_described(kind, tmp_path):
    system = tokenizer() if kind == "vq" else KLAutoencoder(KLAutoencoder.Config(**SMALL))
    system.save_pretrained(tmp_path / "model")
    stage, described = open_first_stage(FirstStageConfig(kind=kind), sources={"tokenizer": tmp_path / "model"})
    assert not any(p.requires_grad for p in stage.parameters())
    assert not stage.train().training
    encoded = stage.encode(images())
    assert encoded.shape[-2:] == (4, 4)
    assert stage.decode(encoded).shape == images().shape
    again, same = open_first_stage(described)
    again.load_state_dict(stage.state_dict())
    assert torch.equal(again.encode(images()), encoded)
    assert same == described
    by_name, _ = open_first_stage(FirstStageConfig(kind=kind, weights=str(tmp_path)))
    assert torch.equal(by_name.encode(images()), encoded)


def test_the_autoencoders_latents_are_scaled_and_may_be_sampled(tmp_path):
    system = KLAutoencoder(KLAutoencoder.Config(**SMALL))
    system.variance.fill_(4.0)
    system.save_pretrained(tmp_path)
    stage, _ = open_first_stage(FirstStageConfig(kind="kl"), sources={"tokenizer": tmp_path})
    mean = stage.encode(images())
    assert torch.allclose(mean, system.moments(images())[0] / 2)
    assert not torch.equal(stage.encode(images(), Seeded(0)), mean)


def test_what_does_not_fit_is_one_clear_line(tmp_path):
    tokenizer().save_pretrained(tmp_path / "vq")
    vq = {"tokenizer": tmp_path / "vq"}
    for config, sources, message in (
        ({"kind": "vq", "codes": 512}, vq, "codes=512 does not match: the code book of this vq stage has 16"),
        ({"kind": "kl"}, vq, "holds a vq_tokenizer"),
        ({"kind": "vq"}, None, "nothing to read"),
        ({"kind": "vq", "levels": 4}, vq, "levels is for kind=pixels"),
        ({"kind": "kl", "codes": 4}, vq, "gives latents"),
        ({"weights": "x"}, None, "pixels have none"),
        ({"levels": 16, "kind": "pixels", "codes": 256}, None, "has 4096"),
        ({"kind": "diffusers"}, None, "nothing to read"),
    ):
        with pytest.raises(UserError, match=message):
            open_first_stage(FirstStageConfig(**config), sources=sources)


def test_sizes_and_channels_that_a_stage_cannot_take_are_one_clear_line(tmp_path):
    tokenizer().save_pretrained(tmp_path)
    stage, _ = open_first_stage(FirstStageConfig(kind="vq"), sources={"tokenizer": tmp_path})
    with pytest.raises(UserError, match="multiples of 2, such as 8"):
        stage.grid((8, 7))
    with pytest.raises(UserError, match="3 channels, these have 1"):
        stage.encode(images()[:, :1])
    facts = DataFacts(mean=(0.2,) * 3, std=(0.5,) * 3)
    with pytest.raises(UserError, match="normalise=half"):
        VQTokenizer.adapted(VQTokenizer.Config(), facts)


def test_diffusers_autoencoder_opens_from_a_folder(tmp_path):
    diffusers = pytest.importorskip("diffusers")
    with pytest.raises(UserError, match="gives no AutoencoderKL"):
        open_first_stage(FirstStageConfig(kind="diffusers", weights=str(tmp_path)))
    torch.manual_seed(0)
    net = diffusers.AutoencoderKL(
        in_channels=3, out_channels=3, latent_channels=4, block_out_channels=(8, 8), norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    ).eval()  # fmt: skip
    net.save_pretrained(tmp_path)
    stage, described = open_first_stage(FirstStageConfig(kind="diffusers", weights=str(tmp_path)))
    with torch.no_grad():
        expected = net.encode(images()).latent_dist.mean * 0.18215
    assert torch.allclose(stage.encode(images()), expected, atol=1e-6)
    assert stage.factor == 2
    assert stage.decode(expected).shape == images().shape
    again, _ = open_first_stage(described)
    again.load_state_dict(stage.state_dict())
    assert torch.allclose(again.encode(images()), expected, atol=1e-6)
