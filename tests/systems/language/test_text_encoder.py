"""The encoder of BERT, RoBERTa and ELECTRA, and the way of their weights in and out."""

import pytest
import torch

from unmask.draw import Seeded
from unmask.errors import UserError
from unmask.systems.language.checkpoints import adopt, config_of, ours, save_transformers, start_from, theirs
from unmask.systems.language.encoder import EncoderConfig, TextEncoder, mean_pooled
from unmask.systems.language.structural_ssl.model import StructuralSSL
from unmask.systems.language.text_classifier.model import TextClassifier

transformers = pytest.importorskip("transformers")
SIZES = {
    "vocab_size": 60,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 40,
    "max_position_embeddings": 20,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
FAMILIES = {
    "bert": (transformers.BertConfig, transformers.BertForMaskedLM, {"type_vocab_size": 2, "pad_token_id": 0}),
    "roberta": (transformers.RobertaConfig, transformers.RobertaForMaskedLM, {"type_vocab_size": 1, "pad_token_id": 1}),
    "electra": (
        transformers.ElectraConfig,
        transformers.ElectraForMaskedLM,
        {"type_vocab_size": 2, "pad_token_id": 0, "embedding_size": 16},
    ),
}
TINY = EncoderConfig(vocabulary=40, positions=16, embed_dim=16, depth=2, num_heads=2, dropout=0, attention_dropout=0)


def peer(family):
    config, cls, more = FAMILIES[family]
    torch.manual_seed(0)
    return cls(config(**{**SIZES, **more})).eval()


def batch_of(family):
    pad = FAMILIES[family][2]["pad_token_id"]
    tokens = torch.randint(5, 60, (3, 12), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(tokens)
    tokens[1, 8:], mask[1, 8:] = pad, 0
    return tokens, mask


@pytest.fixture(params=list(FAMILIES))
def folder(request, tmp_path):
    peer(request.param).save_pretrained(tmp_path / request.param)
    return request.param, tmp_path / request.param


def test_weights_of_transformers_give_its_hidden_states_and_word_scores(folder):
    family, path = folder
    start = start_from(path)
    model = StructuralSSL(
        StructuralSSL.Config(objective="mlm", encoder=start.config.plain(), special={"mask": 4, "pad": 0})
    )
    taken = adopt(model, start)
    assert set(taken) == set(model.state_dict())
    tokens, mask = batch_of(family)
    theirs_out = peer(family)(input_ids=tokens, attention_mask=mask, output_hidden_states=True)
    hidden = model.network({"tokens": tokens, "attention_mask": mask})
    real = mask.bool()
    torch.testing.assert_close(hidden[real], theirs_out.hidden_states[-1][real], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(model.word_logits(hidden)[real], theirs_out.logits[real], atol=1e-5, rtol=1e-4)


def test_what_is_saved_for_transformers_gives_the_same_there(folder, tmp_path):
    family, path = folder
    start = start_from(path)
    model = StructuralSSL(StructuralSSL.Config(objective="mlm", encoder=start.config.plain(), special={"mask": 4}))
    save_transformers(model, tmp_path / "out")
    back = FAMILIES[family][1].from_pretrained(tmp_path / "out").eval()
    tokens, mask = batch_of(family)
    real = mask.bool()
    own = model.word_logits(model.network({"tokens": tokens, "attention_mask": mask}))
    torch.testing.assert_close(
        back(input_ids=tokens, attention_mask=mask).logits[real], own[real], atol=1e-5, rtol=1e-4
    )


def test_a_classifier_goes_to_transformers_with_its_classes(tmp_path):
    for style, cls in (("bert", "BertForSequenceClassification"), ("roberta", "RobertaForSequenceClassification")):
        encoder = TINY.model_copy(update={"style": style, "pad": 1 if style == "roberta" else 0})
        model = TextClassifier(TextClassifier.Config(classes=("no", "yes"), encoder=encoder.plain())).eval()
        save_transformers(model, tmp_path / style)
        back = getattr(transformers, cls).from_pretrained(tmp_path / style).eval()
        assert back.config.id2label == {0: "no", 1: "yes"}
        tokens = torch.randint(5, 40, (2, 9))
        torch.testing.assert_close(
            back(input_ids=tokens).logits, model.logits({"tokens": tokens}), atol=1e-5, rtol=1e-4
        )


def test_names_go_there_and_back():
    for family in FAMILIES:
        state = peer(family).state_dict()
        named = ours(state)
        again = theirs(named, family)
        assert not [n for n in named if n.startswith(("bert.", "roberta.", "electra."))]
        for name, value in again.items():
            torch.testing.assert_close(value, state[name])


def test_texts_of_a_packed_row_are_as_if_alone():
    for style in ("bert", "roberta"):
        model = TextEncoder(TINY.model_copy(update={"style": style}).whole())
        one, two = torch.randint(5, 40, (1, 5)), torch.randint(5, 40, (1, 7))
        packed = {
            "tokens": torch.cat((one, two, torch.full((1, 2), model.pad)), 1),
            "segments": torch.tensor([[1] * 5 + [2] * 7 + [0] * 2]),
            "positions": torch.tensor([[*range(5), *range(7), 0, 0]]),
        }
        out = model(packed)
        torch.testing.assert_close(out[:, :5], model({"tokens": one}), atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(out[:, 5:12], model({"tokens": two}), atol=1e-5, rtol=1e-4)


def test_padding_is_looked_at_by_nobody_and_gets_no_gradient_from_the_table():
    model = TextEncoder(TINY.whole())
    tokens = torch.randint(5, 40, (2, 6))
    longer = torch.cat((tokens, torch.zeros(2, 3, dtype=torch.long)), 1)
    mask = (longer > 0).long()
    out = model({"tokens": longer, "attention_mask": mask})
    torch.testing.assert_close(out[:, :6], model({"tokens": tokens}), atol=1e-5, rtol=1e-4)
    out.sum().backward()
    assert model.words.weight.grad[0].abs().max() == 0
    pooled = mean_pooled(out, {"attention_mask": mask})
    torch.testing.assert_close(pooled, out[:, :6].mean(1))


def test_dropout_is_a_function_of_the_draw():
    model = TextEncoder(TINY.model_copy(update={"dropout": 0.2, "attention_dropout": 0.2}).whole())
    batch = {"tokens": torch.randint(5, 40, (2, 6))}
    a, b, c = (model(batch, Seeded(0, step)) for step in (1, 1, 2))
    torch.testing.assert_close(a, b)
    assert not torch.allclose(a, c)


def test_what_does_not_fit_is_said_in_one_line(tmp_path):
    with pytest.raises(UserError, match="longer than the 16 positions"):
        TextEncoder(TINY.whole())({"tokens": torch.zeros(1, 20, dtype=torch.long)})
    with pytest.raises(UserError, match="needs its vocabulary"):
        TextEncoder(EncoderConfig())
    with pytest.raises(UserError, match="gpt2"):
        config_of({"model_type": "gpt2"})
    with pytest.raises(UserError, match="no folder"):
        start_from(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"no config\.json"):
        start_from(tmp_path)
    assert EncoderConfig(size="mini").embed_dim == 256
    assert EncoderConfig(size="mini", depth=3).depth == 3
