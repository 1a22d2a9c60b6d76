"""Classes of texts and of pairs, and what becomes of them."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import unmask
from unmask.draw import Seeded
from unmask.errors import UserError
from unmask.models import open_model
from unmask.systems.language.encoder import EncoderConfig
from unmask.systems.language.text_classifier.model import TextClassifier, mean_f1

SST2 = Path(__file__).parents[4] / "shared" / "data" / "text_sst2.parquet"
ENCODER = EncoderConfig(vocabulary=50, positions=16, embed_dim=16, depth=1, num_heads=2, dropout=0, attention_dropout=0)
SMALL = [
    "encoder.embed_dim=16",
    "encoder.depth=1",
    "encoder.num_heads=2",
    "encoder.dropout=0",
    "encoder.attention_dropout=0",
]


def train(at, data, *words, steps=40):
    return unmask.train(
        "text_classifier", data=data, recipe="tiny", steps=steps, batch_size=16, out=at,
        overrides=[*SMALL, "data.vocabulary=300", "data.length=24", "train.lr=1e-2", "train.warmup_steps=4", *words],
        talk=lambda _: None,
    )  # fmt: skip


@pytest.fixture(scope="module")
def moods(tmp_path_factory):
    at = tmp_path_factory.mktemp("moods")
    for split, n in (("train", 60), ("test", 20)):
        lines = [
            json.dumps(
                {"text": f"{'a fine' if i % 2 else 'an awful'} film number {i}", "label": ["bad", "good"][i % 2]}
            )
            for i in range(n)
        ]
        (at / f"moods-{split}.jsonl").write_text("\n".join(lines))
    return at


@pytest.fixture(scope="module")
def run(moods):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("UNMASK_CACHE", str(moods / "cache"))
        return train(moods / "run", moods / "moods-train.jsonl")


def test_it_learns_moods_and_says_how_well(run):
    numbers = json.loads((run / "evaluation" / "own.json").read_text())
    assert numbers["main"] == "top1"
    assert numbers["top1"] > 95
    assert numbers["f1"] > 95
    assert numbers["baseline"]["the commonest class"]["top1"] == 50
    assert numbers["split"] == "test split"


def test_it_answers_for_each_line_of_a_file(run, tmp_path):
    (tmp_path / "new.txt").write_text("a fine film\nan awful film\n")
    [(_, result)] = unmask.predict(run, tmp_path / "new.txt", out=tmp_path / "out")
    assert result.answers == ["good", "bad"]
    assert (tmp_path / "out").is_dir()


def test_it_opens_as_a_text_classifier(run):
    opened = open_model(run)
    assert opened.kind == "text classifier"
    assert opened.classes == ("bad", "good")
    batch = opened.example(batch=3, length=8)
    assert opened.logits(batch).shape == (3, 2)


def test_an_encoder_is_gone_on_from_with_a_fresh_head(run, moods, monkeypatch):
    monkeypatch.setenv("UNMASK_CACHE", str(moods / "cache"))
    more = train(moods / "more", moods / "moods-train.jsonl", f"init={run}", "classes=3", "freeze=true", steps=2)
    a, b = unmask.load(run, whole=True), unmask.load(more, whole=True)
    assert torch.equal(a.network.words.weight, b.network.words.weight)
    assert len(b.classes) == 3


def test_pairs_are_told_and_their_candidates_ranked(tmp_path, monkeypatch):
    monkeypatch.setenv("UNMASK_CACHE", str(tmp_path / "cache"))
    for split in ("train", "test"):
        rows = [
            {
                "question": f"where is the {t}",
                "answer": f"the {u} is here" if t == u else f"no {u} is there",
                "label": int(t == u),
            }
            for t in ("cat", "dog", "fish", "bird")
            for u in ("cat", "dog", "fish", "bird")
        ]
        (tmp_path / f"pairs-{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    made = train(tmp_path / "run", tmp_path / "pairs-train.jsonl", steps=60)
    numbers = json.loads((made / "evaluation" / "own.json").read_text())
    assert numbers["map"] > numbers["baseline"]["a random order"]["map"]
    assert {"mrr", "p1"} <= set(numbers)


def test_what_does_not_fit_is_said_in_one_line(tmp_path, moods, monkeypatch):
    monkeypatch.setenv("UNMASK_CACHE", str(tmp_path / "cache"))
    (tmp_path / "plain.txt").write_text("one text\n\nand another\n\n" * 20)
    with pytest.raises(UserError, match="needs labels"):
        train(tmp_path / "never", tmp_path / "plain.txt")
    with pytest.raises(UserError, match="1 classes, the data has 2"):
        train(tmp_path / "never", moods / "moods-train.jsonl", "classes=1")
    with pytest.raises(UserError, match="classes is open"):
        TextClassifier(TextClassifier.Config(encoder=ENCODER))
    model = TextClassifier(TextClassifier.Config(classes=2, encoder=ENCODER))
    with pytest.raises(UserError, match="longer than the 16 positions"):
        model.loss(
            {"tokens": torch.zeros(1, 20, dtype=torch.long), "label": torch.zeros(1, dtype=torch.long)}, Seeded(0)
        )
    with pytest.raises(UserError, match="without its tokenizer"):
        model.predict(["text"])


def test_f1_is_the_mean_over_classes():
    said, labels = np.array([0, 0, 1, 1]), np.array([0, 1, 1, 1])
    assert mean_f1(said, labels, 2) == pytest.approx((2 / 3 + 4 / 5) / 2)


@pytest.mark.slow
@pytest.mark.skipif(not SST2.is_file(), reason="../shared/data is not here")
def test_real_reviews_are_told_better_than_by_the_commonest_class(tmp_path, monkeypatch):
    monkeypatch.setenv("UNMASK_CACHE", str(tmp_path / "cache"))
    made = unmask.train(
        "text_classifier", data=SST2, recipe="tiny", steps=150, out=tmp_path / "run", talk=lambda _: None
    )
    numbers = json.loads((made / "evaluation" / "own.json").read_text())
    assert numbers["top1"] > numbers["baseline"]["the commonest class"]["top1"] + 10
