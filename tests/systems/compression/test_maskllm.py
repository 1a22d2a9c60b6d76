"""Learnable N:M masks, the one-shot masks they start from, and the files they leave."""

import itertools
import json

import numpy as np
import pytest
import torch
from torch import nn

import unmask
from unmask.contracts import Progress
from unmask.draw import Seeded
from unmask.errors import UserError
from unmask.models import open_model
from unmask.systems.compression.maskllm import files, priors
from unmask.systems.compression.maskllm.gates import MaskedLinear, MaskGate
from unmask.systems.compression.maskllm.model import MaskLLM
from unmask.systems.compression.maskllm.patterns import candidates, check_mask, read_pattern, smallest_removed
from unmask.systems.compression.maskllm.semi_structured import accelerate, fits

POEM = (
    "The fog comes on little cat feet. It sits looking over harbor and city on silent haunches and then moves on.\n\n"
)


@pytest.fixture(scope="module")
def language_model(tmp_path_factory):
    """A run of a small causal model and the text it was trained on."""
    at = tmp_path_factory.mktemp("lm")
    (at / "poem-train.txt").write_text(POEM * 40)
    (at / "poem-test.txt").write_text(POEM * 10)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("UNMASK_CACHE", str(at / "cache"))
        run = unmask.train(
            "causal_lm",
            data=at / "poem-train.txt",
            recipe="tiny",
            steps=25,
            batch_size=8,
            out=at / "run",
            overrides=[
                "embed_dim=32",
                "depth=2",
                "num_heads=2",
                "data.length=32",
                "train.lr=5e-3",
                "train.warmup_steps=2",
            ],
            talk=lambda _: None,
        )
    return run, at


@pytest.fixture
def masking(language_model, tmp_path, monkeypatch):
    run, at = language_model
    monkeypatch.setenv("UNMASK_CACHE", str(at / "cache"))

    def train(*words, steps=6, out="masks", **asked):
        return unmask.train(
            "maskllm",
            data=at / "poem-train.txt",
            recipe="tiny",
            steps=steps,
            batch_size=8,
            out=tmp_path / out,
            overrides=[f"model={run}", "data.length=32", "calibration=16", *words],
            talk=lambda _: None,
            **asked,
        )

    return train


# --- patterns ---


def test_candidates_are_in_lexicographic_order_of_kept_places():
    assert candidates(2, 4).int().tolist() == [
        [1, 1, 0, 0], [1, 0, 1, 0], [1, 0, 0, 1], [0, 1, 1, 0], [0, 1, 0, 1], [0, 0, 1, 1],
    ]  # fmt: skip
    assert candidates(1, 4).int().tolist() == torch.eye(4).int().tolist()
    assert len(candidates(4, 8)) == 70


@pytest.mark.parametrize("text", ["4:4", "0:4", "5:4", "two of four", "8:16", "2-4"])
def test_patterns_that_cannot_be_are_refused(text):
    with pytest.raises(UserError, match="pattern="):
        read_pattern(text)


@pytest.mark.parametrize(("keep", "group"), [(2, 4), (1, 4), (4, 8), (3, 5)])
def test_the_smallest_of_each_group_are_removed_lower_index_first(keep, group):
    scores = torch.randint(0, 4, (6, 4 * group)).float()
    mask = smallest_removed(scores, keep, group)
    for row, kept in zip(scores.reshape(-1, group), mask.reshape(-1, group), strict=True):
        order = sorted(range(group), key=lambda i: (row[i].item(), i))
        assert kept.bool().tolist() == [i in order[group - keep :] for i in range(group)]
    check_mask(mask, keep, group, "x")


def test_a_mask_of_another_pattern_names_its_group():
    mask = smallest_removed(torch.rand(2, 16), 2, 4)
    mask.view(-1)[9] = 1 - mask.view(-1)[9]
    with pytest.raises(UserError, match=r"group 2 of layer\.0 keeps"):
        check_mask(mask, 2, 4, "layer.0")


# --- gates ---


@pytest.mark.parametrize("hard", [False, True])
def test_sampled_masks_keep_their_number_and_have_gradients(hard):
    gate = MaskGate(6, 8, 2, 4)
    noise = torch.randn(12, 6)
    mask = gate.sampled(noise, 100.0, 2.0, hard=hard)
    torch.testing.assert_close(mask.reshape(-1, 4).sum(1), torch.full((12,), 2.0))
    if hard:
        assert set(mask.unique().tolist()) == {0.0, 1.0}
    (mask * torch.rand(6, 8)).sum().backward()
    assert gate.gate.grad.abs().sum() > 0


def test_a_strong_prior_is_the_mask():
    gate = MaskGate(8, 16, 2, 4)
    prior = smallest_removed(torch.rand(8, 16), 2, 4)
    gate.add_prior(prior, 1e4)
    assert torch.equal(gate.final(), prior)
    assert gate.certainty(500.0, 0.05) > 0.99


def test_a_transposed_layer_groups_its_inputs():
    class Conv1D(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.bias = nn.Parameter(torch.randn(8, 6)), nn.Parameter(torch.randn(6))

    layer = MaskedLinear(Conv1D(), 2, 4, layer="c").eval()
    x = torch.randn(3, 8)
    expected = x @ (layer.dense * layer.diff_mask.final().T) + layer.bias
    torch.testing.assert_close(x @ layer.weight + layer.bias, expected)
    torch.testing.assert_close(layer(x), expected)


def test_a_group_that_does_not_divide_is_named():
    with pytest.raises(UserError, match=r"blocks.0 has 10 inputs"):
        MaskGate(4, 10, 2, 4, layer="blocks.0")


# --- one-shot masks ---


def test_sparsegpt_beats_magnitude_where_inputs_are_correlated():
    torch.manual_seed(0)
    weight = torch.randn(24, 32)
    x = torch.randn(64, 5, 32) @ torch.randn(32, 32)
    known = priors.Statistics(32)
    for part in x.split(16):
        known.add(part)
    whole = priors.Statistics(32)
    whole.add(x)
    torch.testing.assert_close(known.hessian, whole.hessian, rtol=1e-4, atol=1e-3)

    def error(kept):
        return float(((weight - kept) @ x.flatten(0, 1).T).square().mean())

    moved = priors.sparsegpt(weight, known.hessian, pattern=(2, 4))
    frozen = priors.sparsegpt(weight, known.hessian, pattern=(2, 4), update=False)
    magnitude = weight * priors.magnitude(weight, 2, 4)
    assert error(moved.weight) < 0.7 * error(magnitude)
    assert error(frozen.weight) < 1.1 * error(magnitude)
    assert torch.equal(frozen.weight, weight * frozen.mask)
    assert torch.equal(moved.weight != 0, moved.mask.bool())
    assert moved.loss > 0


@pytest.mark.parametrize("sparsity", [0.25, 0.5, 0.75])
def test_unstructured_masks_have_their_sparsity(sparsity):
    weight, norms = torch.randn(40, 64), torch.rand(64)
    assert (priors.wanda_unstructured(weight, norms, sparsity) == 0).float().mean(1).unique().tolist() == [sparsity]
    assert abs(float((priors.wanda_variant(weight, norms, sparsity) == 0).float().mean()) - sparsity) < 0.02
    assert int((priors.magnitude_unstructured(weight, sparsity) == 0).sum()) == int(weight.numel() * sparsity) + 1


def test_padding_does_not_count_in_statistics():
    x, mask = torch.randn(3, 4, 8), torch.ones(3, 4)
    mask[:, 2:] = 0
    padded, cut = priors.Statistics(8), priors.Statistics(8)
    padded.add(x, mask)
    cut.add(x[:, :2])
    torch.testing.assert_close(padded.hessian, cut.hessian)
    torch.testing.assert_close(padded.norms, cut.norms)


def test_a_hessian_that_cannot_be_inverted_says_what_to_do():
    with pytest.raises(UserError, match="raise damping"):
        priors.sparsegpt(torch.randn(4, 8), torch.full((8, 8), float("nan")), pattern=(2, 4), layer="mlp")
    with pytest.raises(UserError, match="do not divide blocks"):
        priors.sparsegpt(torch.randn(4, 8), torch.eye(8), pattern=(2, 4), block=6)


# --- files ---


def test_mask_files_come_back_and_are_checked(tmp_path):
    masks = {"a.0": smallest_removed(torch.rand(5, 8), 2, 4), "b": smallest_removed(torch.rand(3, 12), 2, 4)}
    path = tmp_path / "m.npz"
    path.write_bytes(files.mask_file(masks))
    shapes = {k: tuple(v.shape) for k, v in masks.items()}
    found = files.load_masks(path, shapes)
    assert all(torch.equal(found[k], masks[k]) for k in masks)
    assert np.load(path)["a.0.weight.mask"].tolist() == np.packbits(masks["a.0"].bool().numpy().ravel()).tolist()
    with pytest.raises(UserError, match=r"no mask of c"):
        files.load_masks(path, {**shapes, "c": (4, 4)})
    with pytest.raises(UserError, match="no masked layer"):
        files.load_masks(path, {"b": (3, 12)})
    with pytest.raises(UserError, match="bytes"):
        files.load_masks(path, {**shapes, "b": (9, 12)})
    bad = tmp_path / "bad.npz"
    bad.write_bytes(b"\x80\x04nonsense")
    with pytest.raises(UserError, match="no mask file"):
        files.load_masks(bad, shapes)


# --- the system ---


def test_learned_masks_are_two_of_four_and_measured_beside_the_others(masking, language_model):
    run = masking("weight_reg=1e-5", steps=12)
    numbers = json.loads((run / "evaluation" / "own.json").read_text())
    assert set(numbers["baseline"]) == {"dense", "magnitude", "wanda", "sparsegpt", "sparsegpt with update"}
    assert numbers["baseline"]["dense"]["loss"] <= numbers["baseline"]["magnitude"]["loss"]
    system = unmask.load(run, whole=True)
    assert isinstance(system, MaskLLM)
    for name, mask in system.final_masks().items():
        check_mask(mask, 2, 4, name)
    report = json.loads((run / "compressed" / "report.json").read_text())
    assert report["kept"] == 0.5
    shapes = {n: tuple(layer.weight.shape) for n, layer in system.masked.items()}
    assert len(files.load_masks(run / "compressed" / "mask_compressed.npz", shapes)) == len(shapes) == 8
    # what finish leaves answers as the masked network does
    batch = {"tokens": torch.randint(4, 20, (2, 16)), "attention_mask": torch.ones(2, 16, dtype=torch.long)}
    done = system.finish()
    torch.testing.assert_close(done.model.logits(batch), system.answer(batch))
    assert float((done.model.blocks[0].mlp.fc1.weight == 0).float().mean()) == 0.5
    dense = open_model(language_model[0])
    assert float((dense.module.blocks[0].mlp.fc1.weight == 0).float().mean()) == 0.0


def test_weights_stay_and_gates_learn(masking, language_model):
    run = masking(steps=4)
    system = unmask.load(run, whole=True)
    dense = open_model(language_model[0]).module.state_dict()
    for name, layer in system.masked.items():
        assert torch.equal(layer.dense, dense[f"{name}.weight"])
    names = {n for g in system.parameter_groups() for n in g.names}
    assert all(n.endswith("diff_mask.gate") for n in names)
    assert system.parameter_groups()[0].lr_scale == 10.0


def test_masks_of_a_file_are_the_start(masking, tmp_path):
    first = masking(steps=3)
    file = first / "compressed" / "mask_compressed.npz"
    again = masking(f"masks={file}", "prior_strength=1e4", steps=1, out="again")
    a, b = (unmask.load(r, whole=True).final_masks() for r in (first, again))
    assert all(torch.equal(a[n], b[n]) for n in a)


def test_a_resume_gives_the_same_masks(masking):
    schedule = "temperature=[4,4]"  # a longer run has another schedule; with these it has the same beginning
    straight = masking(
        schedule, "scale=[100,100]", "fade_reg=false", "train.schedule=constant", steps=6, out="a", probe=False
    )
    masking(schedule, "scale=[100,100]", "fade_reg=false", "train.schedule=constant", steps=3, out="b", probe=False)
    cut = unmask.train(straight.parent / "b", steps=6, resume=True, probe=False, talk=lambda _: None)
    a, b = (unmask.load(r, whole=True).state_dict() for r in (straight, cut))
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_schedules_sharpen_the_masks(language_model):
    run, at = language_model
    config = MaskLLM.Config(model=str(run), prior="magnitude")
    system = MaskLLM.build(config).train()
    batch = {"tokens": torch.randint(4, 20, (4, 16)), "attention_mask": torch.ones(4, 16, dtype=torch.long)}
    early = system.loss(batch, Seeded(0, 0), Progress(0, 100))
    late = system.loss(batch, Seeded(0, 99), Progress(99, 100))
    assert late["certainty"] > early["certainty"]
    assert bool(system.prepared)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["pattern=3:4:5"], "pattern"),
        (["layers=nothing_like_this"], "no linear layer matches"),
        (["masks=nowhere.npz"], "no mask file"),
        (["prior=spargegpt"], "prior"),
        (["data.length=64"], "longer than"),
    ],
)
def test_bad_options_are_said_in_a_line(masking, words, said):
    with pytest.raises(UserError, match=said) as error:
        masking(*words, steps=1)
    assert "\n" not in str(error.value)


def test_a_missing_model_is_said_in_a_line(language_model):
    with pytest.raises(UserError, match="needs a trained model"):
        MaskLLM.build(MaskLLM.Config())


def test_only_weights_that_fit_are_semi_structured():
    weight = torch.randn(32, 64)
    assert not fits(weight)
    assert fits(weight * priors.magnitude(weight, 2, 4))
    assert not fits(torch.zeros(30, 64))
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="Ampere"):
            accelerate(nn.Linear(64, 32))


def test_transformers_models_are_masked(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(vocab_size=40, n_positions=32, n_embd=16, n_layer=2, n_head=2)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    system = MaskLLM(MaskLLM.Config(model=str(tmp_path / "gpt2"), prior="magnitude")).train()
    assert len(system.masked) == 8, "attention and MLP of two blocks; neither embeddings nor the head"
    batch = {"tokens": torch.randint(0, 40, (2, 8)), "attention_mask": torch.ones(2, 8, dtype=torch.long)}
    losses = system.loss(batch, Seeded(0, 0), Progress(0, 10))
    losses["loss"].backward()
    assert all(layer.diff_mask.gate.grad is not None for layer in system.masked.values())
    model = system.finish().model
    kept = (model.transformer.h[0].mlp.c_fc.weight.T.reshape(-1, 4) != 0).sum(1)
    assert set(kept.tolist()) <= {0, 1, 2}


def test_noise_is_named_by_layer():
    a, b = (MaskedLinear(nn.Linear(8, 4), 2, 4, layer=n) for n in ("a", "b"))
    for one, two in itertools.combinations((a, b), 2):
        two.diff_mask.gate.data.copy_(one.diff_mask.gate.data)
    masks = [m.draw_mask(Seeded(0, 3), 1.0, 1.0, hard=False, recompute=False) for m in (a, b, a)]
    assert not torch.equal(masks[0], masks[1])
    assert torch.equal(masks[0], masks[2])
    again = a.draw_mask(Seeded(0, 3), 1.0, 1.0, hard=False, recompute=True)
    torch.testing.assert_close(again, masks[0])


def test_the_command_leaves_a_model_its_masks_and_a_table(language_model, tmp_path, monkeypatch):
    run, at = language_model
    monkeypatch.setenv("UNMASK_CACHE", str(at / "cache"))
    words = ["train.steps=3", "train.batch_size=8", "data.length=32", "calibration=16"]
    report = unmask.compress(
        str(run),
        method="maskllm",
        data=str(at / "poem-train.txt"),
        out=tmp_path / "small",
        overrides=words,
        talk=lambda _: None,
    )
    assert set(report["scores"]["baseline"]) == {"dense", "magnitude", "wanda", "sparsegpt", "sparsegpt with update"}
    assert report["bytes"]["masked"] < 0.6 * report["bytes"]["dense"]
    assert (tmp_path / "small" / "mask_compressed.npz").is_file()
    smaller = open_model(tmp_path / "small" / "model")
    weight = smaller.module.blocks[0].mlp.fc1.weight
    assert set((weight.reshape(-1, 4) != 0).sum(1).tolist()) <= {0, 1, 2}
    from unmask.cli.commands.compressing import table

    columns, rows = table(report)
    assert "perplexity, learned masks" in columns
    assert [row[0] for row in rows] == [
        "this model",
        "dense",
        "magnitude",
        "wanda",
        "sparsegpt",
        "sparsegpt with update",
    ]


def test_masks_of_an_image_classifier(tmp_path):
    run = unmask.train(
        "classifier",
        data="sample:fashion",
        recipe="tiny",
        steps=5,
        batch_size=32,
        out=tmp_path / "clf",
        overrides=["data.limit=200"],
        probe=False,
        talk=lambda _: None,
    )
    words = ["train.epochs=null", "train.steps=3", "train.batch_size=16", "data.limit=100", "calibration=8"]
    report = unmask.compress(
        str(run), method="maskllm", data="sample:fashion", out=tmp_path / "small", overrides=words, talk=lambda _: None
    )
    assert 0 <= report["scores"]["top1"] <= 1
    assert "dense" in report["scores"]["baseline"]
    with pytest.raises(UserError, match="masks language models"):
        MaskLLM(MaskLLM.Config(model=str(run)))
