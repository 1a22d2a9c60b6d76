import math
from pathlib import Path

import pytest
import torch

from unmask.draw import Recorder, Seeded
from unmask.systems.generation import samplers
from unmask.systems.generation.diffusion import GaussianDiffusion, discretised_log_likelihood, normal_kl

CASE = Path(__file__).parents[4] / "shared" / "golden" / "dit" / "ddpm.safetensors"
full = GaussianDiffusion.of("linear", 1000)


def test_noising_keeps_the_variance_of_standard_data():
    x0, noise = torch.randn(2, 4000, generator=torch.Generator().manual_seed(0)).chunk(2)
    for t in (0, 300, 999):
        assert full.noisy(x0, torch.tensor([t]), noise).var() == pytest.approx(1, abs=0.08)


def test_the_data_come_back_from_the_noise_that_was_added():
    x0, noise, t = torch.randn(3, 2, 4, 4), torch.randn(3, 2, 4, 4), torch.tensor([0, 400, 900])
    assert torch.allclose(full.x0_from_noise(full.noisy(x0, t, noise), t, noise), x0, atol=1e-3)


def test_respaced_steps_lead_through_the_same_noise_levels():
    short = full.respaced(7)
    kept = [full.alpha_bar[i] for i in short.timesteps]
    assert short.alpha_bar == pytest.approx(kept, rel=1e-12)


def test_the_learned_variance_runs_from_the_posteriors_to_beta():
    t = torch.tensor([500])
    low, high = (full.learned_log_variance(torch.full((1, 1), v), t).item() for v in (-1.0, 1.0))
    assert high == pytest.approx(math.log(full.betas[500]), abs=1e-5)
    assert low < high


def test_a_network_that_knows_the_noise_has_no_bound_left_where_its_variance_is_the_posteriors():
    x0, noise, t = torch.rand(4, 3, 4, 4) * 2 - 1, torch.randn(4, 3, 4, 4), torch.tensor([1, 10, 500, 999])
    x_t = full.noisy(x0, t, noise)
    terms = full.loss_terms(torch.cat((noise, -torch.ones_like(noise)), 1), x0, x_t, t, noise)
    assert terms["mse"].tolist() == [0, 0, 0, 0]
    assert terms["vb"].abs().max() < 1e-3


def test_the_bound_trains_the_variance_and_not_the_noise():
    x0, noise, t = torch.rand(2, 1, 4, 4) * 2 - 1, torch.randn(2, 1, 4, 4), torch.tensor([0, 600])
    output = torch.randn(2, 2, 4, 4, requires_grad=True)
    full.loss_terms(output, x0, full.noisy(x0, t, noise), t, noise)["vb"].sum().backward()
    assert output.grad is not None
    assert output.grad[:, :1].abs().max() == 0
    assert output.grad[:, 1:].abs().max() > 0


def test_the_levels_of_a_picture_have_probabilities_that_sum_to_one():
    levels = torch.linspace(-1, 1, 256)
    for mean, log_std in ((0.1, -2.0), (-0.95, -3.0), (0.99, 0.0)):
        log_p = discretised_log_likelihood(levels, torch.full_like(levels, mean), torch.full_like(levels, log_std))
        assert log_p.exp().sum().item() == pytest.approx(1, abs=1e-4)


def test_the_divergence_of_a_distribution_to_itself_is_zero():
    mean, log_variance = torch.randn(5), torch.randn(5)
    assert normal_kl(mean, log_variance, mean, log_variance).abs().max() < 1e-6


@pytest.mark.parametrize("sampler", [samplers.ddpm, samplers.ddim])
def test_a_network_that_knows_the_data_leads_every_sampler_to_them(sampler):
    x0, short = torch.rand(2, 3, 4, 4) * 2 - 1, full.respaced(20)
    start = samplers.start_noise(Seeded(0), x0.shape)

    def field(x, time):
        t = torch.tensor([short.timesteps.index(int(i)) for i in time])
        bar = short.table("bar", t, x)
        return (x - bar.sqrt() * x0) / (1 - bar).sqrt()

    assert torch.allclose(sampler(field, short, start, Seeded(0)), x0, atol=1e-4)


def test_ddpm_draws_at_every_step_and_ddim_without_eta_never():
    short, start = full.respaced(5), torch.randn(2, 1, 2, 2)
    for sampler, names in ((samplers.ddpm, [f"step.{i}" for i in range(5)]), (samplers.ddim, [])):
        draw = Recorder(Seeded(0))
        sampler(lambda x, t: x * 0, short, start, draw)
        assert list(draw.recorded) == names


def test_ddim_with_eta_one_differs_from_ddim_without():
    short, start = full.respaced(5), torch.randn(2, 1, 2, 2)
    plain = samplers.ddim(lambda x, t: x * 0.1, short, start, Seeded(0))
    assert not torch.allclose(plain, samplers.ddim(lambda x, t: x * 0.1, short, start, Seeded(0), eta=1.0))


@pytest.mark.skipif(not CASE.is_file(), reason="../shared/golden is not here")
def test_the_authors_numbers_of_the_loss_and_the_tables_are_met():
    from safetensors.torch import load_file

    t = load_file(CASE)
    noisy = full.noisy(t["in.images"], t["in.time"], t["draw.noise"])
    terms = full.loss_terms(t["out.output"], t["in.images"], noisy, t["in.time"], t["draw.noise"])
    assert torch.allclose(noisy, t["out.noisy"], atol=1e-6)
    assert torch.allclose(terms["mse"], t["out.mse"], atol=1e-6)
    assert torch.allclose(terms["vb"], t["out.vb"], atol=1e-6)
    assert full.respaced(6).timesteps == t["out.timesteps"].tolist()
    assert full.respaced(6).betas == pytest.approx(t["out.betas"].numpy(), abs=1e-6)
