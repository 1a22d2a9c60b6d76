"""Which tokens are hidden."""

import pytest
import torch

from unmask.draw import Seeded
from unmask.masks.tokens import actions, chosen_tokens, corrupt

WORDS = torch.tensor([[-100, 0, 1, 1, 1, 2, 3, 3, -100, -100]])


def test_special_tokens_are_never_chosen():
    for unit in ("token", "word", "word_and_next", "span"):
        chosen, _ = chosen_tokens(torch.zeros(1, 10), WORDS, 0.5, unit, length=torch.full((1, 10), 0.99))
        assert not chosen[WORDS < 0].any()
        assert chosen.any()


def test_whole_words_are_chosen_whole_and_the_official_rule_takes_two_pieces():
    uniform = torch.full((1, 10), 0.9)
    uniform[0, 2] = 0.0  # the first piece of the word of three
    whole, origin = chosen_tokens(uniform, WORDS, 0.15, "word")
    assert whole[0].nonzero().flatten().tolist() == [2, 3, 4]
    assert origin[0, 2:5].tolist() == [2, 2, 2]
    official, _ = chosen_tokens(uniform, WORDS, 0.15, "word_and_next")
    assert official[0].nonzero().flatten().tolist() == [2, 3]
    uniform[0, 2], uniform[0, 3] = 0.9, 0.0  # tails are not drawn
    assert not chosen_tokens(uniform, WORDS, 0.15, "word")[0].any()


@pytest.mark.parametrize("mean", [1.0, 3.0, 3.8, 6.0])
def test_spans_hide_the_share_that_is_asked_for(mean):
    words = torch.arange(400).expand(64, -1)
    draw = Seeded(0)
    chosen, origin = chosen_tokens(
        draw.uniform("select", words.shape), words, 0.15, "span", length=draw.uniform("length", words.shape), mean=mean
    )
    assert chosen.float().mean() == pytest.approx(0.15, abs=0.015)
    runs = int((chosen[:, 1:] & ~chosen[:, :-1]).sum() + chosen[:, 0].sum())
    assert chosen.sum() / runs >= 0.95 * mean  # touching spans make longer runs
    assert (origin[chosen] <= torch.arange(400).expand(64, -1)[chosen]).all()


def test_a_span_ends_before_a_special_token():
    words = torch.tensor([[0, 1, -100, 2, 3]])
    uniform = torch.tensor([[0.0, 0.9, 0.9, 0.9, 0.9]])
    chosen, _ = chosen_tokens(uniform, words, 0.15, "span", length=torch.full((1, 5), 0.999))
    assert chosen.tolist() == [[True, True, False, False, False]]


def test_actions_follow_the_cumulative_shares():
    uniform = torch.tensor([0.0, 0.79, 0.81, 0.89, 0.91, 0.999])
    assert actions(uniform, (0.8, 0.1, 0.1)).tolist() == [0, 0, 1, 1, 2, 2]
    assert actions(uniform, (0.0, 1.0, 0.0)).tolist() == [1] * 6
    tokens = torch.full((6,), 9)
    assert corrupt(
        tokens, torch.ones(6, dtype=torch.bool), actions(uniform, (0.8, 0.1, 0.1)), torch.full((6,), 5), 4
    ).tolist() == [
        4,
        4,
        5,
        5,
        9,
        9,
    ]
