"""Objectives of tokens and of structure: what they draw, what they ask, and what is refused."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import unmask
from unmask.data.text import Document, Tokenizer
from unmask.draw import Seeded
from unmask.errors import UserError
from unmask.systems.language.encoder import EncoderConfig
from unmask.systems.language.heads import JointHead, PairHead, mean_cross_entropy
from unmask.systems.language.ranking import TfIdf, chance_metrics, ranking_metrics
from unmask.systems.language.structural_ssl import clusters, denoising
from unmask.systems.language.structural_ssl.batches import JointBatches, PairBatches, StructuralSettings, open_source
from unmask.systems.language.structural_ssl.joint import JointBuilder, JointConfig, groups_of_k
from unmask.systems.language.structural_ssl.measuring import ranking_questions
from unmask.systems.language.structural_ssl.model import StructuralSSL
from unmask.systems.language.structural_ssl.pairs import CONTEXTUAL, PairBuilder, PairConfig
from unmask.systems.language.structural_ssl.structure import Structure, framed, packed, padded, shortened, structure_of
from unmask.systems.language.structural_ssl.tokens import MaskingConfig, random_tokens

BOOKS = Path(__file__).parents[4] / "shared" / "data" / "text_books.parquet"
ENCODER = EncoderConfig(vocabulary=50, positions=64, embed_dim=16, depth=2, num_heads=2, dropout=0, attention_dropout=0)
SPECIAL = {"pad": 0, "unk": 1, "cls": 2, "sep": 3, "mask": 4}


def model(**options):
    torch.manual_seed(0)
    return StructuralSSL(StructuralSSL.Config(**{"encoder": ENCODER.plain(), "special": SPECIAL, **options}))


def rows(n=4, t=20, seed=0):
    tokens = torch.randint(5, 50, (n, t), generator=torch.Generator().manual_seed(seed))
    tokens[:, 0], tokens[:, -1] = 2, 3
    return {"tokens": tokens, "attention_mask": torch.ones_like(tokens)}


def structure(sizes):
    """sizes: for each document the sentences of its paragraphs; every sentence is three tokens with its own number."""
    paragraphs = [n for d in sizes for n in d]
    total = sum(paragraphs)
    return Structure(
        np.repeat(np.arange(total), 3),
        np.tile(np.arange(3), total),
        np.arange(total + 1) * 3,
        np.cumsum([0, *paragraphs]),
        np.cumsum([0, *(len(d) for d in sizes)]),
        tuple(map(str, range(len(sizes)))),
    )


TEXT = structure([[3, 1, 4, 2], [2], [5, 2, 2], [1, 1, 1, 6], [4]])


def paragraph_of(s, sentence):
    return int(np.searchsorted(s.paragraphs, sentence, side="right")) - 1


# --- pairs ---


@pytest.mark.parametrize("objective", ["ssp", "sp", "psd", "all", *CONTEXTUAL])
@pytest.mark.parametrize(("hard", "negatives"), [(2.0, 4), (0.0, 3), (0.5, 1), (4.0, 2)])
def test_pairs_keep_their_promises(objective, hard, negatives):
    builder = PairBuilder(TEXT, PairConfig(hard=hard, negatives=negatives), objective, seed=3)
    group = 1 + negatives
    assert builder.count == len(builder.anchors) * group
    examples = builder.examples(np.arange(2 * builder.count))
    for first in range(0, len(examples), group):
        some = examples[first : first + group]
        kinds = [e.kind for e in some]
        assert kinds.count("positive") == 1
        assert kinds.count("hard") <= min(int(np.ceil(hard)), negatives)
        assert len({e.a for e in some}) == 1
        hard_units = [paragraph_of(TEXT, e.b[0]) for e in some if e.kind == "hard"]
        assert len(hard_units) == len(set(hard_units))
    for e in examples:
        assert e.a
        assert e.b
        units = {paragraph_of(TEXT, s) for s in e.b}
        assert len(units) == 1
        here, there = paragraph_of(TEXT, e.a[0]), units.pop()
        same_document = TEXT.document_of(here) == TEXT.document_of(there)
        assert e.label == (e.kind == "positive")
        assert not set(e.a) & set(e.b)
        if e.kind == "positive":
            assert (here == there) == (e.objective != "psd")
            assert same_document
        elif e.kind == "hard":
            assert same_document
            assert here != there
            assert e.objective != "psd"
        else:
            assert not same_document
        if e.objective in ("sp", "psd") and e.kind != "positive":
            assert e.b == tuple(TEXT.sentences_of(there))
        if e.objective in CONTEXTUAL:
            assert not set(e.context) & {*e.a, *e.b}
            assert all(TEXT.document_of(paragraph_of(TEXT, s)) == TEXT.document_of(there) for s in e.context)


def test_an_example_depends_on_its_number_alone():
    builder = PairBuilder(TEXT, PairConfig(), "all", seed=1)
    together, alone = builder.examples(np.arange(30)), builder.examples(np.array([17]))
    assert together[17] == alone[0]
    later = builder.examples(np.arange(30) + builder.count)
    assert later != together


def test_a_document_of_one_paragraph_has_no_hard_negative_but_all_the_others():
    lonely = structure([[4], [3], [2]])
    kinds = [e.kind for e in PairBuilder(lonely, PairConfig(hard=2, negatives=4), "ssp").examples(np.arange(15))]
    assert kinds == ["positive", *["easy"] * 4] * 3


def test_text_without_a_positive_pair_is_refused():
    with pytest.raises(UserError, match="longest paragraph has 1 sentence; check data"):
        PairBuilder(structure([[1, 1], [1]]), PairConfig(), "ssp")
    with pytest.raises(UserError, match="longest has 1 paragraph"):
        PairBuilder(structure([[3], [2]]), PairConfig(), "psd")
    with pytest.raises(UserError, match="one document"):
        PairBuilder(structure([[3, 2]]), PairConfig(), "ssp")
    with pytest.raises(UserError, match="did you mean ssp"):
        PairBuilder(TEXT, PairConfig(mix={"sspp": 1}), "all")


# --- candidates ---


@pytest.mark.parametrize("mode", ["following", "same"])
@pytest.mark.parametrize("k", [3, 5, 7])
def test_groups_keep_their_promises(mode, k):
    builder = JointBuilder(TEXT, JointConfig(mode=mode, k=k), seed=2)
    for g in builder.groups(np.arange(3 * builder.count)):
        here = paragraph_of(TEXT, g.premise[0])
        assert len(g.candidates) == min(k, 5)
        assert sum(g.labels) <= 1
        if k >= 5:
            assert sum(g.labels) == 1
        for candidate, label, kind in zip(g.candidates, g.labels, g.kinds, strict=True):
            there = {paragraph_of(TEXT, s) for s in candidate}
            assert len(there) == 1
            unit = there.pop()
            assert 1 <= len(candidate) <= 2
            if kind == "positive":
                assert unit == here
                assert label == 1
                assert not set(candidate) & set(g.premise)
                assert mode == "same" or candidate[0] > g.premise[-1]
            elif kind == "super-hard":
                assert unit == here
                assert candidate[-1] < g.premise[0]
                assert label == 0
            elif kind == "hard":
                assert unit != here
                assert TEXT.document_of(unit) == TEXT.document_of(here)
            else:
                assert TEXT.document_of(unit) != TEXT.document_of(here)
        assert g.kinds.count("hard") <= 2


def test_downstream_candidates_are_grouped_as_asked():
    scores, uniform = np.array([0.1, 0.9, 0.5, 0.7]), np.array([0.3, 0.1, 0.9, 0.2])
    assert [g.tolist() for g in groups_of_k(scores, 3, "all", uniform)] == [[1, 3, 0], [2]]
    assert groups_of_k(scores, 2, "best", uniform)[0].tolist() == [1, 3]
    assert groups_of_k(scores, 2, "worst", uniform)[0].tolist() == [0, 2]
    assert groups_of_k(scores, 2, "random", uniform)[0].tolist() == [1, 3]


def test_joint_heads_read_what_they_say():
    hidden = torch.randn(2, 4 * 5, 16)
    for kind, shape in (
        ("IE_1", (2, 3)),
        ("AE_1", (2, 3)),
        ("IE_k", (2, 3, 3)),
        ("AE_k", (2, 3, 3)),
        ("RE_k", (2, 3, 3)),
    ):
        head = JointHead(kind, 16, 3, labels=3)
        assert head(hidden).shape == shape
        labels = torch.zeros(shape[:-1], dtype=torch.long)
        head.loss(head(hidden), labels).backward()
        with pytest.raises(UserError, match=f"head {kind} takes"):
            head.loss(head(hidden), labels[0])
    with pytest.raises(UserError, match="no 4 equal slots"):
        JointHead("IE_k", 16, 3)(hidden[:, :19])
    with pytest.raises(UserError, match="k=0"):
        JointHead("IE_k", 16, 0)


# --- rows ---


@pytest.fixture(scope="module")
def tokenizer():
    text = "The fog comes on little cat feet. It sits looking over harbor and city and then moves on."
    return {
        style: Tokenizer.learned([text] * 4, kind="bpe", vocabulary=300, style=style) for style in ("bert", "roberta")
    }


def test_the_longest_text_gives_way_first():
    def slow(sizes, room):
        out = list(sizes)
        while sum(out) > room:
            out[out.index(max(out))] -= 1
        return out

    for sizes in ([5, 9], [9, 5], [7, 7, 7], [1, 20, 3], [8, 8], [0, 4]):
        for room in range(sum(sizes) + 2):
            assert shortened(sizes, room) == slow(sizes, room)


def test_rows_are_framed_as_their_models_expect(tokenizer):
    a, b = (np.array([10, 11]), np.array([0, 0])), (np.array([12]), np.array([0]))
    bert, roberta = (framed([a, b], tokenizer[s], 32) for s in ("bert", "roberta"))
    cls, sep = (tokenizer["bert"].special[r] for r in ("cls", "sep"))
    assert bert.tokens.tolist() == [cls, 10, 11, sep, 12, sep]
    assert bert.types.tolist() == [0, 0, 0, 0, 1, 1]
    assert bert.words.tolist() == [-100, 0, 0, -100, 1, -100]
    cls, sep = (tokenizer["roberta"].special[r] for r in ("cls", "sep"))
    assert roberta.tokens.tolist() == [cls, 10, 11, sep, sep, 12, sep]


def test_packed_pairs_have_the_losses_of_padded_ones(tokenizer):
    draws = np.random.default_rng(0)
    some = [
        framed([(draws.integers(5, 50, n), np.arange(n)) for n in sizes], tokenizer["bert"], 30)
        for sizes in ((3, 4), (9, 8), (2, 2), (5, 1), (7, 3))
    ]
    net = model(objective="ssp", token="none").eval()
    label = torch.tensor([1, 0, 1, 1, 0])
    a, b = padded(some, 0) | {"label": label}, packed(some, 0, 40) | {"label": label}
    assert len(b["tokens"]) < len(some)
    one, two = (net.structure_logits(net.network(x), x) for x in (a, b))
    torch.testing.assert_close(one, two, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(net.loss(a, Seeded(0))["loss"], net.loss(b, Seeded(0))["loss"])


def test_documents_become_offsets_and_short_ones_are_left_out(tokenizer):
    found = [
        Document("a", (("The fog comes on little cat feet.", "No."), ("It sits looking over harbor.",))),
        Document("b", (("Short one.",),)),
    ]
    s = structure_of(found, tokenizer["bert"], (10, 20, 30))
    assert s.names == ("a",)
    assert s.sizes.tolist() == [1, 1]
    ids, words = s.span(range(2))
    assert (
        tokenizer["bert"].decode(ids.tolist()).strip()
        == "The fog comes on little cat feet. It sits looking over harbor."
    )
    assert (np.diff(words) >= 0).all()


# --- tokens ---


def test_rts_asks_for_every_token_and_words_only_where_hidden():
    batch = rows()
    rts, slm, mlm = (model(objective=o) for o in ("rts", "slm", "mlm"))
    ids, labels = rts.changed(batch, Seeded(0))
    assert set(labels.unique().tolist()) == {0, 1}
    assert not (ids != batch["tokens"])[labels == 0].any()
    ids, labels = slm.changed(batch, Seeded(0))
    assert not (ids == 4).any()
    ids, labels = mlm.changed(batch, Seeded(0))
    assert (ids == 4).any()
    chosen = labels != -100
    assert torch.equal(labels[chosen], batch["tokens"][chosen])
    hidden = mlm.network({**batch, "tokens": ids})
    whole = mean_cross_entropy(mlm.word_logits(hidden).flatten(0, 1), labels.flatten())
    torch.testing.assert_close(mlm.token_loss(hidden, labels, batch)[0], whole)
    none = torch.full_like(labels, -100)
    assert mlm.token_loss(hidden, none, batch)[0].item() == 0


def test_padding_counts_only_where_it_is_asked_to():
    batch = rows()
    batch["attention_mask"][:, 15:] = 0
    labels = torch.zeros_like(batch["tokens"])
    hidden = torch.randn(4, 20, 16)
    ours, theirs = (model(objective="rts", count_padding=c).eval() for c in (False, True))
    logits = ours.swap(hidden)
    torch.testing.assert_close(
        ours.token_loss(hidden, labels, batch)[0],
        mean_cross_entropy(logits[:, :15].flatten(0, 1), labels[:, :15].flatten()),
    )
    torch.testing.assert_close(
        theirs.token_loss(hidden, labels, batch)[0], mean_cross_entropy(logits.flatten(0, 1), labels.flatten())
    )


def test_random_tokens_keep_away_from_what_is_excluded():
    tokens = torch.randint(5, 20, (50, 40))
    every = random_tokens(
        tokens, Seeded(0), 20, SPECIAL.values(), MaskingConfig(exclude_special=True, exclude_original=True)
    )
    assert not (every == tokens).any()
    assert set(every.unique().tolist()) == set(range(5, 20))
    share = torch.bincount((every - tokens).flatten() % 15, minlength=15)[1:].float()
    assert share.min() > 0.6 * share.mean()
    assert int(random_tokens(tokens, Seeded(0), 20, SPECIAL.values(), MaskingConfig()).min()) == 0


def test_c_rts_counts_what_fools_it_and_saves_that(tmp_path):
    net = model(objective="crts", clusters={"count": 3}).train()
    where = torch.arange(50) % 3
    net.set_clusters(where)
    before = net.counts.clone()
    net.loss(rows(), Seeded(0))["loss"].backward()
    assert torch.equal(net.counts, before)
    net.after_step(None)
    assert not torch.equal(net.counts, before)
    assert int(net.pending.abs().sum()) == 0
    net.save_pretrained(tmp_path / "m")
    again = StructuralSSL.from_pretrained(tmp_path / "m")
    assert torch.equal(again.counts, net.counts)
    assert torch.equal(again.cluster_map(), where)


def test_substitutes_belong_to_the_drawn_cluster():
    where, chances = torch.arange(30) % 3, torch.tensor([[0.0, 1.0, 0.0]] * 3, dtype=torch.float64)
    found = clusters.substitutes(torch.arange(5, 30), where, chances, torch.rand(25), torch.rand(25), [1, 4])
    assert (where[found] == 1).all()
    assert not torch.isin(found, torch.tensor([1, 4])).any()
    flat = clusters.cluster_probabilities(torch.ones(3, 3, dtype=torch.long))
    torch.testing.assert_close(flat, torch.full((3, 3), 1 / 3, dtype=torch.float64))


def test_equal_pairs_of_clusters_are_all_counted():
    one = torch.zeros(1, 6, dtype=torch.long)
    changes = clusters.count_changes(
        one, one + 1, torch.tensor([[True] * 4 + [False] * 2]), one == 0, torch.tensor([0, 1]), 2
    )
    assert changes.tolist() == [[0, 2], [0, 0]]


def test_k_means_finds_clusters_and_leaves_none_empty():
    rng = np.random.default_rng(0)
    points = np.concatenate([rng.normal(c, 0.1, (20, 2)) for c in ((0, 0), (5, 0), (0, 5))])
    own = clusters.k_means(points, 3, Seeded(0))
    assert all(len(set(own[i : i + 20])) == 1 for i in (0, 20, 40))
    assert len(set(own)) == 3
    assert len(set(clusters.k_means(np.repeat(points[:4], 5, axis=0), 4, Seeded(0)))) == 4
    stream = rng.integers(0, 40, 3000)
    assert clusters.word_vectors(stream, 40, Seeded(0), dimensions=8).shape == (40, 8)
    with pytest.raises(UserError, match="clusters=50 is more"):
        clusters.learned_map(points[:40], [0], 50, Seeded(0))


def test_electra_shares_its_words_and_learns_both_networks():
    net = model(objective="electra").train()
    assert net.generator.words is net.network.words
    assert net.generator.config.embed_dim == 8
    out = net.loss(rows(), Seeded(0))
    out["loss"].backward()
    assert net.generator.blocks[0].attn.qkv.weight.grad.abs().sum() > 0
    assert net.network.blocks[0].attn.qkv.weight.grad.abs().sum() > 0
    ids, labels = net.changed(rows(), Seeded(0))
    swapped, told, _ = net._generated(rows(), ids, labels, Seeded(0), None)
    assert torch.equal(told == 1, swapped != rows()["tokens"])
    assert not (told == 1)[labels == -100].any()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"masking": {"probability": 1.0}}, "less than 1"),
        ({"masking": {"split": (0.8, 0.1, 0.2)}}, "sums to 1.1"),
        ({"joint": {"k": 0}, "objective": "mspp"}, "greater than or equal to 1"),
        ({"joint": {"k": 5, "slot": 32}, "objective": "mspp"}, "more than the 64 positions"),
        ({"objective": "mlm", "special": {"pad": 0}}, "needs a mask token"),
    ],
)
def test_settings_that_do_not_fit_are_refused(options, words):
    with pytest.raises((UserError, ValueError), match=words):
        model(**options)


def test_cluster_maps_that_do_not_fit_are_refused(tmp_path):
    net = model(objective="crts", clusters={"count": 3})
    with pytest.raises(UserError, match="map is of 40 tokens, the vocabulary has 50"):
        net.set_clusters(torch.zeros(40, dtype=torch.long))
    lonely = torch.zeros(50, dtype=torch.long)
    lonely[4] = 1
    with pytest.raises(UserError, match="cluster 1 of 2 has no token"):
        net.set_clusters(lonely)
    (tmp_path / "map.json").write_text("{}")
    with pytest.raises(UserError, match="is no cluster map"):
        clusters.read_map(tmp_path / "map.json")
    one_label = model(objective="mspp", token="none", joint={"k": 3, "slot": 8, "head": "IE_1"})
    with pytest.raises(UserError, match="takes one label a row"):
        one_label.structure_loss(torch.zeros(2, 2), torch.zeros(2, 3, dtype=torch.long))


# --- encoder-decoder texts ---


def test_denoising_hides_the_share_asked_for_and_loses_nothing():
    ids = list(range(100, 160))
    plain = [False] * 60
    for step in range(20):
        made = denoising.t5(ids, plain, list(range(1, 30)), 0, Seeded(0, step))
        shown = [t for t in made.source if t >= 100]
        said = [t for t in made.target if t >= 100]
        assert sorted(shown + said) == ids
        assert len(said) == round(60 * 0.15)
        assert made.decoder_input == [0, *made.target[:-1]]
        assert [t for t in made.source if t < 100] == [t for t in made.target if t < 100][:-1]
        noisy = denoising.bart(ids, plain, 4, 2, Seeded(0, step))
        assert noisy.target == ids
        assert noisy.source.count(4) == 6
        assert len(noisy.source) == 60 - 18 + 6
    batch = denoising.collated([made, noisy], pad=1)
    assert (batch["labels"] == -100).any()
    assert denoising.noise_sizes(2, 0.9, 3) == (1, 1)
    with pytest.raises(UserError, match="too few"):
        denoising.t5(ids, plain, [1, 2], 0, Seeded(0))
    assert denoising.t5(ids, [True] * 60, [1], 0, Seeded(0)).source == ids


# --- ranking ---


def test_ranking_metrics_are_those_of_their_definitions():
    found = ranking_metrics([[0.9, 0.1, 0.5], [0.2, 0.8, 0.1]], [[0, 1, 1], [0, 1, 0]])
    assert found["map"] == pytest.approx(((1 / 2 + 2 / 3) / 2 + 1) / 2)
    assert found["mrr"] == pytest.approx((1 / 2 + 1) / 2)
    assert found["p1"] == 0.5
    assert chance_metrics([[1, 0, 0, 0, 0]])["map"] == pytest.approx(0.4567, abs=1e-3)
    assert chance_metrics([[1, 1, 0, 0]])["mrr"] == pytest.approx((0.5 + 1 / 3 * 0.5 + 1 / 6 / 3), abs=1e-6)
    assert ranking_metrics([[1, 2]], [[0, 0]])["questions"] == 0
    assert ranking_metrics([[1, 2]], [[0, 0]], missing="1")["map"] == 1
    with pytest.raises(UserError, match="no right candidate"):
        ranking_metrics([[1, 2]], [[0, 0]], missing="error")
    pages = TfIdf([["a", "b"], ["a", "c"], ["a", "d"]])
    assert pages.similarity(["a", "b"], ["b"]) > pages.similarity(["a", "b"], ["a", "c"])


def test_questions_have_one_right_candidate():
    for q in ranking_questions(TEXT, 50):
        right = q.candidates[q.labels.index(1)]
        assert sum(q.labels) == 1
        assert q.query != right
        assert paragraph_of(TEXT, q.query) == paragraph_of(TEXT, right)
        wrong = [s for s in q.candidates if s != right]
        assert all(paragraph_of(TEXT, s) != paragraph_of(TEXT, right) for s in wrong)


def test_the_pair_head_of_bert_has_no_dropout_before_its_pooler():
    first = torch.randn(3, 8)
    for kind in ("bert", "roberta", "electra"):
        head = PairHead(8, 2, kind, 0.5)
        assert not torch.allclose(head(first, Seeded(0)), head(first))


# --- from files, by the commands ---


@pytest.fixture(scope="module")
def story(tmp_path_factory):
    """Ten documents with a paragraph each about one of ten things."""
    at = tmp_path_factory.mktemp("story")
    things = ["cat", "dog", "sun", "rain", "ship", "tree", "king", "fish", "road", "song"]
    (at / "text").mkdir()
    for number, thing in enumerate(things):
        paragraph = " ".join(
            f"The {thing} was number {i} and the {thing} came home." for i in ["one", "two", "three", "four"]
        )
        other = " ".join(f"Again a {thing} went out with {i} others." for i in ["five", "six", "seven"])
        (at / "text" / f"{number}.txt").write_text(f"{paragraph}\n\n{other}\n\n{paragraph}\n")
    return at


def train(story, *words, recipe="tiny", steps=12):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("UNMASK_CACHE", str(story / "cache"))
        name = "-".join(w.split("=")[-1] for w in words)[:30].replace("/", "_")
        return unmask.train(
            "structural_ssl",
            data=story / "text",
            recipe=recipe,
            steps=steps,
            batch_size=8,
            out=story / f"{recipe}-{name}",
            overrides=[
                "data.vocabulary=300",
                "data.hold_out=5",
                "train.preview_every=0",
                *words,
            ],
            talk=lambda _: None,
        )


SMALL = ("encoder.embed_dim=16", "encoder.depth=1", "encoder.num_heads=2", "data.length=48")


def test_a_run_ranks_scores_and_is_gone_on_from(story, tmp_path):
    run = train(story, *SMALL, "few_labels={pairs: 8, steps: 2, batch_size: 4}")
    numbers = json.loads((run / "evaluation" / "own.json").read_text())
    assert {"map", "mrr", "p1", "pair_accuracy", "accuracy", "few_map"} <= set(numbers)
    assert {"tf-idf", "a random order", "cosine of its mean states"} <= set(numbers["baseline"])
    assert (run / "evaluation" / "sentences.png").is_file()
    [(_, result)] = unmask.predict(run, story / "text" / "0.txt", query="The cat came home.", out=tmp_path / "out")
    assert len(result.sentences) == len(result.scores) == 11
    assert all(0 <= s <= 1 for s in result.scores)
    assert (tmp_path / "out").is_dir()
    [(_, alone)] = unmask.predict(run, story / "text" / "0.txt")
    assert alone.unit == "chance of the same unit"
    more = train(story, f"init={run}", "objective=rts", "data.length=48", "masking.unit=word", recipe="tiny-rts")
    kept, fresh = unmask.load(run, whole=True), unmask.load(more, whole=True)
    assert kept.network.config.embed_dim == fresh.network.config.embed_dim == 16
    assert fresh.swap is not None
    [(_, told)] = unmask.predict(more, story / "text" / "1.txt")
    assert told.unit == "mean chance of a swapped token"


@pytest.mark.parametrize(
    "words",
    [
        ("objective=crts", "clusters.count=5"),
        ("objective=mlm", "masking.unit=span", "data.rows=packed"),
    ],
)
def test_token_objectives_train_from_files(story, words):
    run = train(story, *SMALL, *words, recipe="tiny-mlm", steps=4)
    numbers = json.loads((run / "evaluation" / "own.json").read_text())
    assert "accuracy" in numbers
    assert "cosine_map" in numbers


@pytest.mark.parametrize("words", [("objective=dslc", "token=electra"), ("objective=psd", "data.pack=true")])
def test_structural_objectives_train_from_files(story, words):
    run = train(story, *SMALL, *words, steps=3)
    assert "pair_accuracy" in json.loads((run / "evaluation" / "own.json").read_text())


def test_a_joint_model_trains_from_files(story):
    run = train(
        story,
        "encoder.embed_dim=16",
        "encoder.depth=1",
        "encoder.num_heads=2",
        "joint.slot=24",
        recipe="tiny-mspp",
        steps=3,
    )
    assert "map" in json.loads((run / "evaluation" / "own.json").read_text())
    with pytest.raises(UserError, match="against a query"):
        unmask.predict(run, story / "text" / "0.txt")


def test_held_out_documents_are_never_learned_from(story):
    settings = StructuralSettings(uri=str(story / "text"), hold_out=5)
    learned, held = (
        {row.document for row in open_source(settings.model_copy(update={"split": s})).rows()}
        for s in ("train", "test")
    )
    assert not learned & held
    assert len(learned) == 8


def test_batches_know_no_epoch_twice(story, tokenizer, monkeypatch):
    monkeypatch.setenv("UNMASK_CACHE", str(story / "cache"))
    settings = StructuralSettings(uri=str(story / "text"), length=32, min_chars=(5, 5, 5))
    batches = PairBatches(settings, PairConfig(negatives=1), "ssp", 4, tokenizer=tokenizer["bert"])
    first, later = batches.indices(0), batches.indices(batches.steps_per_epoch)
    assert later.min() >= batches.count > first.max()
    joint = JointBatches(settings, JointConfig(k=3, slot=16), 4, tokenizer=tokenizer["roberta"])
    batch = joint.fetch(np.arange(4))
    assert batch["tokens"].shape == (4, 64)
    assert batch["label"].shape == (4, 3)
    assert (batch["tokens"][:, ::16] == tokenizer["roberta"].special["cls"]).all()


def bad(story, *words, data=None, recipe="tiny-mlm"):
    with pytest.raises(UserError) as caught:
        unmask.train(
            "structural_ssl", data=data or story / "text", recipe=recipe, steps=2, batch_size=1, out=story / "never",
            overrides=["data.vocabulary=300", *SMALL, *words], talk=lambda _: None,
        )  # fmt: skip
    assert not (story / "never").exists()
    return str(caught.value)


def test_bad_texts_are_said_in_one_line(story, tmp_path, monkeypatch):
    monkeypatch.setenv("UNMASK_CACHE", str(tmp_path / "cache"))
    latin, empty, line = (tmp_path / n for n in ("latin.txt", "empty.txt", "line.txt"))
    latin.write_bytes("café au lait\n".encode("latin-1"))
    empty.write_text("")
    line.write_text("Only this.\n")
    assert "is not UTF-8" in bad(story, data=latin)
    assert "is empty" in bad(story, data=empty)
    assert "fewer than a row" in bad(story, data=line)
    assert "no positive pair can be made" in bad(story, data=line, recipe="tiny")


def test_checkpoints_that_do_not_fit_are_said_in_one_line(story, tmp_path, monkeypatch):
    monkeypatch.setenv("UNMASK_CACHE", str(story / "cache"))
    run = train(story, *SMALL, "objective=mlm", recipe="tiny-mlm", steps=1)
    with pytest.raises(UserError, match="rows of 64 tokens are longer than the 48 positions"):
        unmask.train(
            "structural_ssl", data=story / "text", recipe="tiny-mlm", steps=1, batch_size=1, out=story / "never",
            overrides=[f"init={run}", "data.length=64"], talk=lambda _: None,
        )  # fmt: skip
    assert "leave it out" in bad(story, "encoder.positions=20")
    other = Tokenizer.learned(["Quite another text, with other words in it."] * 3, vocabulary=280)
    (tmp_path / "tokenizer.json").write_text(other.text())
    assert "its ids mean other words" in bad(story, f"init={run}", f"data.tokenizer={tmp_path / 'tokenizer.json'}")
    larger = Tokenizer.learned([" ".join(map(str, range(2000)))], vocabulary=900)
    (tmp_path / "tokenizer.json").write_text(larger.text())
    assert "does not fit this checkpoint" in bad(story, f"init={run}", f"data.tokenizer={tmp_path / 'tokenizer.json'}")


@pytest.mark.skipif(not BOOKS.is_file(), reason="../shared/data is not here")
def test_real_books_have_pairs_of_their_own_chapters(tokenizer):
    settings = StructuralSettings(uri=str(BOOKS), hold_out=5, split="test", length=64, cache=False)
    batches = PairBatches(settings, PairConfig(), "all", 32, tokenizer=tokenizer["bert"])
    assert len(batches.structure.names) > 10
    batch = batches.fetch(batches.indices(0))
    assert batch["tokens"].shape[1] <= 64
    assert 0 < int(batch["label"].sum()) < 32
