"""ENAT: what is reused is what recomputing gives, a step costs what it should, options do what they say."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from unmask.catalog import card, recipes
from unmask.claims.claim import claim_of
from unmask.contracts import DataFacts, Generator, Progress, configured
from unmask.draw import Recorder, Seeded
from unmask.errors import UserError
from unmask.official.hub import load_trainable
from unmask.systems.generation.decoding import Step, decode
from unmask.systems.generation.enat.masking import beta_quantile, training_split
from unmask.systems.generation.enat.model import ENAT
from unmask.systems.generation.enat.official import OfficialNoise, load_official, official_gradients, split_of
from unmask.systems.generation.enat.reuse import Guided, left
from unmask.systems.generation.enat.sampling import SamplingSettings, sample_ids
from unmask.systems.generation.schedules import hidden_counts

SMALL = {
    "embed_dim": 16,
    "encoder_depth": 2,
    "decoder_depth": 1,
    "num_heads": 2,
    "codebook_size": 12,
    "grid": 4,
    "classes": 3,
    "first_stage": None,
    "ema": 0.0,
}
PIXELS = {
    "first_stage": {"kind": "pixels", "levels": 2},
    "codebook_size": 2,
    "grid": None,
    "image_size": [8, 8],
    "channels": 1,
}


def model(**options) -> ENAT:
    torch.manual_seed(0)
    made = ENAT(configured(ENAT, {**SMALL, **options}))
    with torch.no_grad():
        for parameter in made.network.parameters():  # away from zero gates, where nothing would depend on anything
            parameter.add_(torch.randn_like(parameter) * 0.3)
        if made.average is not None:
            made.average.update(made.network, 0.0)
    return made.eval()


def batch(count: int = 6, codes: int = 12, tokens: int = 16):
    generator = torch.Generator().manual_seed(1)
    return {
        "tokens": torch.randint(0, codes, (count, tokens), generator=generator),
        "label": torch.arange(count) % 3,
    }


class Naive(Guided):
    """The method by its definition: two passes, features in grid order, the whole chain of steps again at every step."""

    def __init__(self, network, classes, **options):
        super().__init__(network, classes, **options)
        self.classes, self.steps = classes, []

    def __call__(self, ids, hidden, step):
        self.steps.append((ids, hidden))
        weight = self.cfg_scale * step.previous if self.schedule == "linear" else self.cfg_scale
        first = self.alone(self.classes)
        empty = self.alone(torch.full_like(self.classes, self.network.empty_class))
        return first + weight * (first - empty)

    def alone(self, classes):
        net, batch, n = self.network, len(classes), self.network.tokens
        conditions = net.conditions(classes)
        features = torch.zeros(batch, n, net.words.embedding_dim)
        was_visible = torch.zeros(batch, n, dtype=torch.bool)
        for ids, hidden in self.steps:
            visible = torch.ones(batch, n, dtype=torch.bool).scatter(1, hidden, False)
            embedded = net.embed(ids, torch.arange(n).expand_as(ids))
            context = net.previous(features[was_visible].reshape(batch, -1, features.shape[2]))
            features = torch.zeros_like(features)
            features[was_visible] = context.flatten(0, 1)
            fresh = visible & ~was_visible
            if fresh.any():
                new = embedded[fresh].reshape(batch, -1, features.shape[2])
                features[fresh] = net.encode(new, conditions, context).flatten(0, 1)
            was_visible = visible
        seen = features[visible].reshape(batch, -1, features.shape[2])
        return net.logits(net.decode(embedded[~visible].reshape(batch, -1, features.shape[2]), conditions, seen))


@settings(max_examples=8, deadline=None)
@given(
    steps=st.integers(1, 9),
    schedule=st.sampled_from(["cosine", "linear", "square", "log"]),
    guidance_schedule=st.sampled_from(["linear", "constant"]),
    cfg_scale=st.sampled_from([0.0, 2.5]),
    seed=st.integers(0, 99),
)
def test_reuse_gives_the_ids_that_the_definition_gives(steps, schedule, guidance_schedule, cfg_scale, seed):
    system, classes = model(), torch.tensor([0, 2, 3])
    asked = SamplingSettings(
        steps=steps, schedule=schedule, guidance_schedule=guidance_schedule, cfg_scale=cfg_scale, sampling_temperature=1
    )
    ours: list[torch.Tensor] = []
    ids = system.sample_ids(classes, Seeded(seed), asked, trace=ours)
    naive = Naive(system.network, classes, cfg_scale=cfg_scale, schedule=guidance_schedule)
    theirs: list[torch.Tensor] = []
    options = {"steps": steps, "schedule": schedule, "sampling_temperature": 1.0, "trace": theirs}
    assert torch.equal(ids, decode(naive, 3, 16, 12, Seeded(seed), **options))
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    assert ids.max() < 12, "nothing stays hidden"


def test_each_token_is_encoded_once_and_only_hidden_ones_are_decoded():
    system, steps = model(), 8
    encoded, decoded = [], []
    blocks = system.network.blocks
    blocks[0].register_forward_hook(lambda _m, args, _o: encoded.append(tuple(args[0].shape[:2])))
    blocks[2].register_forward_hook(lambda _m, args, _o: decoded.append(tuple(args[0].shape[:2])))
    system.sample_ids(torch.tensor([0, 1]), Seeded(0), SamplingSettings(steps=steps))
    counts = hidden_counts("cosine", steps, 16)
    assert decoded == [(2, 16), *((4, c) for c in counts[1:-1])], (
        "one batch for both passes; the first step needs one pass"
    )
    assert sum(n for _, n in encoded) == 16 - counts[-2], "what became visible before the last step, each once"
    assert all(b == 4 for b, _ in encoded)


def test_an_image_depends_on_seed_and_number_alone():
    system = model()
    together = system.sample_ids(torch.tensor([0, 1, 2]), Seeded(7))
    alone = system.sample_ids(torch.tensor([1]), Seeded(7, 0, 1))
    assert torch.equal(together[1:2], alone)


@pytest.mark.parametrize("network", ["enat", "nat"])
@pytest.mark.parametrize("schedule", ["cosine", "linear", "square", "log"])
def test_every_schedule_samples_without_reuse_too(network, schedule):
    system = model(network=network)
    asked = SamplingSettings(steps=5, schedule=schedule, reuse=False, top_k=4, top_p=0.9)
    assert system.sample_ids(torch.tensor([0]), Seeded(0), asked).max() < 12


def test_an_image_without_reuse_is_another_function_of_the_same_weights():
    system, classes = model(), torch.arange(3)
    reused, anew = (
        system.sample_ids(classes, Seeded(0), SamplingSettings(sampling_temperature=1, reuse=r)) for r in (True, False)
    )
    assert not torch.equal(reused, anew)


def test_top_k_of_one_is_the_likeliest_id_whatever_is_drawn():
    system, classes = model(), torch.arange(3)
    ids = [system.sample_ids(classes, Seeded(s), SamplingSettings(steps=1, top_k=1)) for s in (0, 1)]
    assert torch.equal(*ids)


def test_the_last_block_of_nat_computes_the_hidden_tokens_only_with_the_same_numbers():
    net = model(network="nat").network
    ids = torch.full((2, 16), 12)
    x, conditions = net.embed(ids, torch.arange(16).expand(2, -1)), net.conditions(torch.tensor([0, 1]))
    queries = torch.tensor([[3, 1, 9], [0, 15, 2]])
    whole = net.together(x, conditions)
    assert torch.allclose(net.together(x, conditions, queries), whole[torch.arange(2)[:, None], queries], atol=1e-5)


def test_modulations_made_once_are_those_of_each_call():
    net = model().network
    classes, x, context = torch.tensor([0, 3]), torch.randn(2, 5, 16), torch.randn(2, 4, 16)
    kept, fresh = (net.encode(x, c, context) for c in (net.modulations(classes), net.conditions(classes)))
    assert torch.allclose(kept, fresh, atol=1e-5)


def test_fresh_positions_are_those_that_left_the_hidden_set():
    before, hidden = torch.tensor([[0, 2, 5, 7], [1, 3, 4, 6]]), torch.tensor([[2, 7], [1, 6]])
    assert left(before, hidden, 8).tolist() == [[0, 5], [3, 4]]


# --- training ---


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6), tokens=st.integers(2, 40), reuse=st.sampled_from([0.0, 0.5, 1.0]))
def test_a_split_covers_the_grid_and_hides_something_but_not_all(seed, tokens, reuse):
    split = training_split(Seeded(seed), 3, tokens, reuse_probability=reuse)
    assert 1 <= split.hidden.shape[1] <= tokens - 1
    assert torch.equal(torch.cat((split.hidden, split.visible), 1).sort(1).values, torch.arange(tokens).expand(3, -1))
    assert split.fresh is None if reuse == 0 else reuse < 1 or 0 <= split.fresh <= split.visible.shape[1]


def test_mask_ratios_follow_the_beta_distribution():
    drawn = [beta_quantile(12, 3, (i + 0.5) / 400) for i in range(400)]
    assert np.mean(drawn) == pytest.approx(12 / 15, abs=1e-3)
    assert np.var(drawn) == pytest.approx(12 * 3 / (15**2 * 16), rel=0.02)
    assert np.mean([training_split(Seeded(0, s), 1, 64).fresh is not None for s in range(300)]) == pytest.approx(
        0.5, abs=0.1
    )


def test_reused_features_bring_no_gradient_but_their_projection_learns():
    system = model(reuse_probability=1.0, mask_beta=[4, 4]).train()
    system.loss(batch(), Seeded(1))["loss"].backward()
    net = system.network
    assert net.previous.mlp.fc1.weight.grad.abs().sum() > 0
    assert net.blocks[0].attn.context_kv.weight.grad.abs().sum() > 0
    assert net.words.weight.grad.abs().sum() > 0
    system.zero_grad()
    net.logits(torch.randn(1, 2, 16)).sum().backward()
    assert net.words.weight.grad is None, "the head reads the word table without gradient"


def test_the_averaged_network_makes_what_is_reused_and_is_no_parameter():
    system = model(ema=0.9, reuse_probability=1.0, mask_beta=[4, 4], dropout=0.0, label_dropout=0.0)
    names = dict(system.named_parameters())
    assert not [n for n in names if n.startswith("average")]
    assert not any(m.training for m in system.train().average.modules()), "never in training mode"
    draw = Seeded(1)
    assert system.split(draw, batch()["tokens"]).fresh < system.split(draw, batch()["tokens"]).visible.shape[1]
    before = float(system.loss(batch(), draw)["loss"].detach())
    with torch.no_grad():
        for block in system.average.network.blocks:
            block.mlp.fc2.weight.add_(1.0)
    assert float(system.loss(batch(), draw)["loss"].detach()) != pytest.approx(before, abs=1e-6)
    kept = {n: b.clone() for n, b in system.average.network.named_buffers()}
    with torch.no_grad():
        system.network.norm.weight.fill_(3.0)
    system.after_step(Progress(0, 10))
    wanted = 0.9 * kept["norm.weight"] + 0.1 * 3.0
    assert torch.allclose(system.average.network.norm.weight, wanted, atol=1e-6)
    assert "average.network.blocks.0.attn.qkv.weight" in system.state_dict()


def test_it_learns_and_is_saved_with_its_average(tmp_path):
    torch.manual_seed(0)
    system = ENAT(configured(ENAT, {**SMALL, "embed_dim": 32, "ema": 0.9, "dropout": 0.1})).train()
    tokens = torch.arange(3)[:, None].expand(3, 16).repeat(8, 1) * 4 + torch.arange(16) % 2
    given_ = {"tokens": tokens, "label": torch.arange(3).repeat(8)}
    optimizer = torch.optim.AdamW(system.parameters(), lr=5e-3)
    losses = []
    for step in range(60):
        loss = system.loss(given_, Seeded(0, step))["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        system.after_step(Progress(step, 60))
        losses.append(float(loss.detach()))
    references = system.references(given_, Seeded(0))
    assert losses[-1] < float(references["how often each id occurs"]) < float(references["all ids alike"])
    classes = torch.arange(3)
    asked = SamplingSettings(sampling_temperature=0.1, mask_temperature=0.5)
    made = system.eval().sample_ids(classes, Seeded(0), asked)
    assert (made == tokens[:3]).float().mean() > 0.8
    system.save_pretrained(tmp_path / "model")
    again = load_trainable(tmp_path / "model")
    assert torch.equal(again.sample_ids(classes, Seeded(0), asked), made)


def test_labels_are_dropped_once_or_twice_and_never_in_evaluation():
    drawn = {}
    for name, options in {"once": {}, "twice": {"second_label_dropout": 0.1}}.items():
        system = model(**options).train()
        seen = []
        system.network.class_table.register_forward_hook(lambda _m, args, _o, seen=seen: seen.append(args[0]))
        for step in range(10):
            system.loss(batch(200), Seeded(0, step))
        drawn[name] = float((torch.cat(seen) == 3).float().mean())
        seen.clear()
        system.eval().loss(batch(), Seeded(0))
        assert all(bool((s < 3).all()) for s in seen)
    assert drawn["once"] == pytest.approx(0.15, abs=0.03)
    assert drawn["twice"] == pytest.approx(0.235, abs=0.03)


def test_everything_random_is_drawn_by_name_and_repeats():
    system = model(reuse_probability=1.0).train()
    recorder = Recorder(Seeded(3))
    first = system.loss(batch(), recorder)["loss"]
    assert set(recorder.recorded) == {"ratio", "reuse", "previous ratio", "order", "class_drop", "embedding dropout"}
    torch.manual_seed(99)
    assert torch.equal(first, system.loss(batch(), Seeded(3))["loss"])


def test_a_model_without_classes_learns_and_samples():
    system = model(classes=0).train()
    assert system.loss(batch(), Seeded(0))["loss"].isfinite()
    assert system.sample_ids(torch.zeros(2, dtype=torch.int64), Seeded(0)).shape == (2, 16)


# --- making pictures ---


def test_generate_gives_pictures_by_class_name_and_says_what_made_them():
    system = model(**PIXELS, classes=["cat", "dog", "eel"])
    assert isinstance(system, Generator)
    made = system.generate(2, Seeded(0), condition="dog", steps=3, guidance=2.0, top_k=2)
    assert made[0].value.shape == (8, 8, 3)
    assert made[0].value.dtype == np.uint8
    told = made[0].made_by
    assert (told["class_name"], told["steps"], told["guidance"]) == ("dog", 3, 2.0)
    assert told["options"]["cfg_scale"] == 1.0
    assert told["options"]["top_k"] == 2
    assert system.generate(1, Seeded(0))[0].made_by["guidance"] == 3.5, "the paper's w is 2.5"


def test_previews_show_samples_and_hidden_tokens():
    system = model(**PIXELS)
    pictures = system.preview(
        {"image": torch.randn(4, 1, 8, 8).clamp(-1, 1), "label": torch.zeros(4, dtype=torch.int64)}, Seeded(0)
    )
    assert [p.name for p in pictures] == ["samples", "hidden tokens"]
    assert len(pictures[1].rows) == 4


def test_measure_gives_cross_entropy_beside_what_frequencies_give():
    from unmask.data.settings import DataSettings

    system = model(**{**PIXELS, "classes": 10, "image_size": [14, 14], "frechet_images": 0})
    data = DataSettings(uri="sample:fashion", split="test", image_size=14, normalise="half")
    found = system.measure(data, Seeded(0), limit=20)
    assert found["samples"] == 20
    assert set(system.measures) - {"frechet"} <= set(found)
    base = found["baseline"]["how often each id occurs"]
    assert 0 < base["cross_entropy"] <= math.log(2)
    assert 0 <= found["token_top1"] <= 100
    assert found == system.measure(data, Seeded(0), limit=20)


# --- the authors' files ---


def official_state(system: ENAT) -> dict[str, torch.Tensor]:
    for parameter in system.network.parameters():
        parameter.grad = parameter.detach().clone()
    state = official_gradients(system)
    width = system.config.embed_dim
    if system.network.disentangled:
        for layer, (out, inner) in {"fc1": (4 * width, width), "fc2": (width, 4 * width)}.items():
            state[f"prev_embedder.{layer}.weight"], state[f"prev_embedder.{layer}.bias"] = (
                torch.zeros(out, inner),
                torch.zeros(out),
            )
    return state


@pytest.mark.parametrize("network", ["enat", "nat"])
def test_official_files_are_loaded_by_rules_with_sizes_read_off_them(network):
    system = model(network=network)
    state = official_state(system)
    again = load_official(state, {"num_heads": 2, "decoder_depth": 1})
    assert again.config.network == network
    assert (again.config.encoder_depth, again.grid, again.num_classes, again.codebook_size) == (2, (4, 4), 3, 12)
    classes = torch.arange(3)
    assert torch.equal(again.sample_ids(classes, Seeded(0)), system.sample_ids(classes, Seeded(0)))
    with pytest.raises(UserError, match="16 positions, and a grid of 5x5 needs 25: use grid=4"):
        load_official(state, {"num_heads": 2, "grid": 5})
    with pytest.raises(UserError, match=r"missing network.norm.weight"):
        load_official({k: v for k, v in state.items() if k != "norm.weight"}, {"num_heads": 2, "decoder_depth": 1})
    with pytest.raises(UserError, match="not the weights of ENAT"):
        load_official({"conv1.weight": torch.zeros(1)})
    with pytest.raises(UserError, match="without a tokenizer"):
        again.generate(1, Seeded(0))


def test_recorded_gumbel_noise_is_given_back_exactly():
    from unmask.draw import gumbel

    noise = -(-torch.rand(2, 3, 4).clamp(1e-9).log()).log()
    source = OfficialNoise({"draw.token_gumbel": noise[:, :, :, None], "draw.mask_gumbel": noise})
    assert torch.allclose(gumbel(source, "confidence.1", (3, 4)), noise[1], atol=1e-5)


def test_rows_that_hide_unequal_numbers_are_refused():
    ids = torch.zeros(2, 4, dtype=torch.int64)
    ids[0, 0] = 9
    with pytest.raises(UserError, match="hide as many tokens"):
        split_of(ids, 9)


# --- what a user can get wrong ---


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"num_heads": 3}, "num_heads=3 does not divide embed_dim=16: use num_heads="),
        ({"codebook_size": None}, "codebook_size is open"),
        ({"grid": None}, "grid is open"),
        ({"classes": None}, "classes is open"),
        ({"grid": 1}, "nothing to hide"),
        ({**PIXELS, "codebook_size": 7}, "codebook_size=7 does not match: the first stage's code book has 2"),
        ({**PIXELS, "grid": 3}, "grid 3x3 does not fit: images of 8x8 pixels make 8x8 tokens"),
        ({**PIXELS, "first_stage": {"kind": "pixels"}}, "reads token ids, and first_stage.kind=pixels gives none"),
        ({"first_stage": {"kind": "vq"}, "image_size": [8, 8]}, "nothing to read"),
        ({"mask_beta": [0, 3]}, "must be two numbers above 0"),
        ({"network": "nats"}, "network='nats' does not fit"),
    ],
)
def test_bad_options_are_one_clear_line(options, words):
    with pytest.raises(UserError, match=words):
        model(**options)


def test_bad_requests_are_one_clear_line():
    system = model(**PIXELS)
    for request, words in [
        ({"condition": 3}, None),  # the empty class
        ({"condition": 9}, "no class 9: this enat has classes 0 ... 2"),
        ({"steps": 0}, "steps=0"),
        ({"size": (9, 9)}, "size 9x9 cannot be made"),
        ({"sampling": 2}, 'no option "sampling" in generate with enat'),
        ({"top_p": 0}, "top_p"),
    ]:
        if words is None:
            system.generate(1, Seeded(0), **request)
        else:
            with pytest.raises(UserError, match=words):
                system.generate(1, Seeded(0), **request)
    nat = model(network="nat")
    with pytest.raises(UserError, match="nothing to reuse"):
        nat.sample_ids(torch.zeros(1, dtype=torch.int64), Seeded(0), SamplingSettings(reuse=True))
    with pytest.raises(UserError, match=r"class 5 does not exist: it takes 0 ... 2"):
        sample_ids(nat.network, torch.tensor([5]), Seeded(0), SamplingSettings())
    with pytest.raises(UserError, match=r"token id 12 is outside the code book: it takes 0 ... 11"):
        nat.loss({"tokens": torch.full((1, 16), 12)}, Seeded(0))
    with pytest.raises(UserError, match=r"class 3 is outside the model's classes: it takes 0 ... 2"):
        nat.loss({**batch(1), "label": torch.tensor([3])}, Seeded(0))
    with pytest.raises(UserError, match="make 9 tokens, and the model has a grid of 4x4"):
        nat.loss({"tokens": torch.zeros(1, 9, dtype=torch.int64)}, Seeded(0))
    with pytest.raises(UserError, match="no first stage"):
        nat.loss({"image": torch.zeros(1, 3, 8, 8)}, Seeded(0))
    with pytest.raises(UserError, match=r"use data.normalise=half"):
        ENAT.adapted(ENAT.Config(), DataFacts(mean=(0.4,) * 3, std=(0.2,) * 3))


def test_a_step_of_the_decoding_knows_what_was_done_before():
    assert Step(2, 8, 9, 6, 12).previous == 0.25


def test_card_recipes_and_claim_are_whole():
    assert card("enat").load() is ENAT
    known = recipes("enat")
    assert list(known) == ["tiny", "small", "paper"]
    for recipe in known.values():
        tokenizer, main = recipe["stages"]
        assert main["from"] == {"tokenizer": "tokenizer"}
        configured(ENAT, main["model"])
    paper = configured(ENAT, known["paper"]["stages"][1]["model"])
    assert paper.model_dump(exclude={"frechet_images"}) == ENAT.Config().model_dump(exclude={"frechet_images"})
    assert claim_of("enat").tiers["tiny"].seeds >= 3
