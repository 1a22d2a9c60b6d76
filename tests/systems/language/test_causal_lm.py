"""The small causal language model."""

import json
import math

import pytest
import torch
from torch.nn import functional as F

import unmask
from unmask.draw import Seeded
from unmask.errors import UserError
from unmask.models import open_model
from unmask.nn.losses import next_token_loss
from unmask.systems.language.causal_lm.model import CausalLM

POEM = (
    "The fog comes on little cat feet. It sits looking over harbor and city on silent haunches and then moves on.\n\n"
)
SMALL = CausalLM.Config(vocabulary=30, length=16, embed_dim=16, depth=2, num_heads=2)


def rows(tokens):
    tokens = torch.as_tensor(tokens)
    return {"tokens": tokens, "attention_mask": torch.ones_like(tokens)}


def test_no_token_sees_those_behind_it():
    model = CausalLM(SMALL).eval()
    tokens = torch.randint(0, 30, (2, 12))
    other = tokens.clone()
    other[:, 7:] = (other[:, 7:] + 1) % 30
    a, b = model.logits(rows(tokens)), model.logits(rows(other))
    torch.testing.assert_close(a[:, :7], b[:, :7])
    assert not torch.allclose(a[:, 7:], b[:, 7:])


def test_texts_in_a_packed_row_are_as_if_alone():
    model = CausalLM(SMALL).eval()
    one, two = torch.randint(0, 30, (1, 5)), torch.randint(0, 30, (1, 7))
    packed = {
        "tokens": torch.cat((one, two), 1),
        "attention_mask": torch.ones(1, 12, dtype=torch.long),
        "segments": torch.tensor([[1] * 5 + [2] * 7]),
        "positions": torch.tensor([[*range(5), *range(7)]]),
    }
    out = model.logits(packed)
    torch.testing.assert_close(out[:, :5], model.logits(rows(one)))
    torch.testing.assert_close(out[:, 5:], model.logits(rows(two)))
    total, count = next_token_loss(out, packed)
    alone = [next_token_loss(model.logits(rows(t)), rows(t)) for t in (one, two)]
    torch.testing.assert_close(total, alone[0][0] + alone[1][0])
    assert int(count) == 10


def test_the_loss_is_that_of_the_next_tokens():
    logits, tokens = torch.randn(2, 6, 9), torch.randint(0, 9, (2, 6))
    mask = torch.ones_like(tokens)
    mask[1, 4:] = 0
    total, count = next_token_loss(logits, {"tokens": tokens, "attention_mask": mask})
    expected = sum(
        F.cross_entropy(logits[b, t], tokens[b, t + 1], reduction="sum") for b, n in ((0, 5), (1, 3)) for t in range(n)
    )
    torch.testing.assert_close(total, expected)
    assert int(count) == 8


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    at = tmp_path_factory.mktemp("lm")
    (at / "poem-train.txt").write_text(POEM * 40)
    (at / "poem-test.txt").write_text(POEM * 10)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("UNMASK_CACHE", str(at / "cache"))
        return unmask.train(
            "causal_lm",
            data=at / "poem-train.txt",
            recipe="tiny",
            steps=60,
            batch_size=8,
            out=at / "run",
            overrides=[
                "embed_dim=32",
                "depth=2",
                "num_heads=2",
                "data.length=32",
                "train.lr=1e-2",
                "train.warmup_steps=2",
            ],
            talk=lambda _: None,
        )


def test_it_learns_a_poem_and_says_how_well(trained):
    numbers = json.loads((trained / "evaluation" / "own.json").read_text())
    assert numbers["perplexity"] < numbers["baseline"]["frequencies of tokens"]["perplexity"] / 2
    assert numbers["perplexity"] == pytest.approx(math.exp(numbers["loss"]))
    assert numbers["split"] == "test split"


def test_its_tokenizer_travels_with_it(trained):
    model = unmask.load(trained, whole=True)
    assert model.tokenizer().decode(model.tokenizer().encode(["little cat"])[0].ids) == "little cat"
    opened = open_model(trained)
    assert opened.kind == "causal lm"
    batch = rows(torch.randint(0, 20, (2, 8)))
    torch.testing.assert_close(opened.logits(batch), model.logits(batch))


def test_rows_longer_than_its_positions_are_refused():
    with pytest.raises(UserError, match="longer than the 16 positions"):
        CausalLM(SMALL).loss(rows(torch.zeros(1, 20, dtype=torch.long)), Seeded(0, 0))
    with pytest.raises(UserError, match="needs vocabulary"):
        CausalLM(CausalLM.Config())
