"""The MSA Transformer's network: what must hold for any sizes and options."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from unmask.draw import Seeded
from unmask.errors import UserError
from unmask.systems.proteins.alphabet import CLS, MASK, PAD, padded, text_of, tokens_of_batch
from unmask.systems.proteins.msa_transformer.contacts import ContactHead, contact_precision
from unmask.systems.proteins.msa_transformer.model import MSATransformer
from unmask.systems.proteins.msa_transformer.mutations import masked_marginals, read_mutation
from unmask.systems.proteins.msa_transformer.network import MSANetwork, NetworkConfig
from unmask.systems.proteins.rows import filtered_rows, greedy_rows

SMALL = {"embed_dim": 16, "depth": 2, "num_heads": 2, "max_positions": 32, "max_rows": 16}


def network(**options: object) -> MSANetwork:
    torch.manual_seed(0)
    return MSANetwork(NetworkConfig(**{**SMALL, **options})).eval()


def table(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    tokens = torch.randint(4, 24, (rows, columns), generator=torch.Generator().manual_seed(seed))
    tokens[:, 0] = CLS
    return tokens


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("padding", [True, False])
def test_the_map_free_path_gives_what_the_map_path_gives(tied: bool, padding: bool) -> None:
    tokens = padded([table(5, 9), table(3, 7, 1)]) if padding else torch.stack([table(5, 9), table(5, 9, 1)])
    net = network(tied=tied)
    assert torch.allclose(net(tokens).last, net(tokens, need_maps=True).last, atol=1e-5)


@given(rows=st.integers(2, 6), columns=st.integers(2, 9), most=st.integers(1, 20))
@settings(max_examples=10, deadline=None)
def test_working_in_pieces_changes_nothing(rows: int, columns: int, most: int) -> None:
    tokens = padded([table(rows, columns), table(rows - 1, columns - 1, 1)])
    net = network()
    whole = net(tokens).last
    net.config.max_tokens = most
    with torch.no_grad():
        assert torch.allclose(net(tokens).last, whole, atol=1e-5)


def test_rows_of_padding_change_nothing_unless_they_are_counted() -> None:
    tokens = table(4, 7)[None]
    longer = torch.cat((tokens, torch.full((1, 2, 7), PAD)), dim=1)
    free, official = network(count_padded_rows=False, row_positions="none"), network(row_positions="none")
    assert torch.allclose(free(longer).last[:, :4], free(tokens).last, atol=1e-5)
    assert not torch.allclose(official(longer).last[:, :4], official(tokens).last, atol=1e-5)


def test_without_row_positions_the_order_of_rows_does_not_matter() -> None:
    tokens, order = table(5, 8)[None], torch.tensor([3, 0, 4, 1, 2])
    net = network(row_positions="none")
    assert torch.allclose(net(tokens[:, order]).last, net(tokens).last[:, order], atol=1e-5)


def test_checkpointing_gives_the_same_gradients() -> None:
    tokens = table(4, 6)[None]
    gradients = []
    for checkpointing in (False, True):
        net = network()
        net(tokens, checkpointing=checkpointing).last.square().sum().backward()
        gradients.append(net.layers[0].row.qkv.weight.grad)
    assert torch.allclose(*gradients, atol=1e-6)


def test_dropout_asks_the_draw_and_is_the_same_again() -> None:
    tokens = table(4, 6)[None]
    net = network()
    assert torch.equal(net(tokens, draw=Seeded(3)).last, net(tokens, draw=Seeded(3)).last)
    assert not torch.equal(net(tokens, draw=Seeded(3)).last, net(tokens).last)


def test_embedded_one_hot_rows_are_the_tokens() -> None:
    tokens = padded([table(4, 6), table(3, 5, 1)])
    net = network()
    one_hot = torch.nn.functional.one_hot(tokens, 33).float() @ net.embed_tokens.weight
    assert torch.allclose(net(tokens, one_hot).last, net(tokens).last, atol=1e-5)


def test_positions_jump_where_the_chain_breaks() -> None:
    net = network(max_positions=400)
    plain, jumped = net.positions(table(1, 6)[None]), net.positions(table(1, 6)[None], 4, 200)
    assert torch.equal(plain[:, :, :4], jumped[:, :, :4])
    assert torch.equal(jumped[0, 0, 4], net.embed_positions.weight[PAD + 5 + 200])


@pytest.mark.parametrize(
    ("options", "shape", "words"),
    [
        ({"num_heads": 3}, None, "num_heads=3 does not divide embed_dim=16: use 2 or 4"),
        ({}, (1, 17, 5), "17 rows are more than the model's row table holds .*rows=16"),
        ({}, (1, 2, 33), "32 columns are more than the model has positions for"),
    ],
)
def test_what_does_not_fit_is_told(options: dict, shape: tuple | None, words: str) -> None:
    with pytest.raises(UserError, match=words):
        network(**options)(torch.full(shape or (1, 1, 2), 4))


def test_masks_spare_cls_and_padding_and_keep_their_shares() -> None:
    model = MSATransformer(MSATransformer.Config(network=NetworkConfig(**SMALL)))
    tokens = padded([table(40, 200), table(30, 150, 1)])
    masked, hidden = model.mask(tokens, Seeded(0))
    assert not hidden[tokens == PAD].any()
    assert not hidden[tokens == CLS].any()
    assert torch.equal(masked[~hidden], tokens[~hidden])
    assert math.isclose(float(hidden[tokens > 2].float().mean()), 0.15, abs_tol=0.02)
    assert math.isclose(float((masked[hidden] == MASK).float().mean()), 0.8, abs_tol=0.04)


def test_whole_columns_are_hidden_where_asked() -> None:
    config = MSATransformer.Config(network=NetworkConfig(**SMALL), masking={"unit": "columns", "probability": 0.5})
    hidden = MSATransformer(config).mask(table(5, 30)[None], Seeded(0))[1]
    assert hidden.any()
    assert torch.equal(hidden, hidden[:, :1].expand_as(hidden))


def test_batches_of_marginals_are_the_single_ones() -> None:
    tokens, net = table(4, 9)[None], network()
    assert torch.allclose(
        masked_marginals(net, tokens, batch_size=1), masked_marginals(net, tokens, batch_size=5), atol=1e-5
    )


def test_mutations_are_read_and_refused() -> None:
    assert read_mutation("K2E:M1A", "MKL") == [(1, "E"), (0, "A")]
    for text, words in (("K2", "does not fit"), ("A2E", "the query has K at 2, not A"), ("K9E", "places 1 ... 3")):
        with pytest.raises(UserError, match=words):
            read_mutation(text, "MKL")


def test_text_with_bracketed_tokens_is_counted_in_tokens() -> None:
    tokens = tokens_of_batch([["AC<mask>E", "ACDE"]])
    assert tokens.shape == (1, 2, 5)
    assert text_of(tokens[0, 0]) == "AC_E"
    with pytest.raises(UserError, match="row 2 has 3 tokens where row 1 has 4"):
        tokens_of_batch([["ACDE", "ACD"]])


def test_greedy_rows_are_far_apart_and_begin_with_the_query() -> None:
    letters = torch.randint(0, 3, (40, 20), generator=torch.Generator().manual_seed(0)).numpy()
    far, near = greedy_rows(letters, 8), greedy_rows(letters, 8, largest=False)
    spread = [sum((letters[a] != letters[b]).mean() for a in rows for b in rows) for rows in (far, near)]
    assert far[0] == near[0] == 0
    assert spread[0] > spread[1]
    assert len(greedy_rows(letters, 99)) == 40
    assert len(filtered_rows(letters, 8)) <= 8


def test_misses_fill_a_list_that_is_too_short() -> None:
    target = torch.zeros(12, 12)
    target[0, 11] = 1
    found = contact_precision(target, target, least=11)
    assert found["P@L"] == pytest.approx(1 / 12)
    assert found["P@L5"] == pytest.approx(1 / 2)
    assert contact_precision(target, target.where(target > 1, -1), least=6)["P@L"] == 0


def test_the_contact_head_learns_which_map_holds_the_contacts() -> None:
    generator = torch.Generator().manual_seed(0)
    target = (torch.rand(30, 30, generator=generator) < 0.1).long().triu(6)
    target = target + target.T
    maps = torch.rand(2, 3, 31, 31, generator=generator)
    maps[1, 2, 1:, 1:] += 2 * target
    head = ContactHead(6)
    head.fit([maps], [target])
    weight = head.regression.weight[0]
    assert int(weight.argmax()) == 5
    assert bool(head.fitted)
    assert contact_precision(head(maps[None])[0], target)["P@L5"] == 1.0
