"""Text: files to rows, rows to tokens, tokens to batches."""

import gzip
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from unmask.config import validated
from unmask.data.text import TextBatches, TextSettings, Tokenizer, documents, open_text, sentences_of
from unmask.data.text.batches import everything
from unmask.data.text.packing import packed_rows
from unmask.errors import UserError

POEM = "The fog comes on little cat feet.\n\nIt sits looking over harbor and city\non silent haunches\n\nand then moves on.\n"


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("UNMASK_CACHE", str(tmp_path / "cache"))


def settings(**values):
    return validated(TextSettings, values, where="data")


def write_lines(path, rows):
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


def test_plain_text_gives_a_row_a_paragraph_also_when_packed(tmp_path):
    (tmp_path / "a.txt").write_text(POEM)
    with gzip.open(tmp_path / "b.txt.gz", "wt") as file:
        file.write(POEM)
    rows = list(open_text(tmp_path / "a.txt").rows())
    assert [r.text for r in rows] == [p.strip() for p in POEM.split("\n\n")]
    assert [r.text for r in open_text(tmp_path / "b.txt.gz").rows()] == [r.text for r in rows]
    assert open_text(tmp_path).count() == 6


def test_tables_are_read_with_labels_pairs_and_splits(tmp_path):
    rows = [
        {"sentence": f"line {i}", "label": "good" if i % 2 else "bad", "split": "test" if i > 7 else "train"}
        for i in range(10)
    ]
    source = open_text(write_lines(tmp_path / "x.jsonl", rows), "test")
    assert [r.text for r in source.rows()] == ["line 8", "line 9"]
    assert source.classes() == ("bad", "good")
    pq.write_table(
        pa.table({"question": ["a b", "c d"], "answer": ["e", "f"], "label": [1, 0]}), tmp_path / "p.parquet"
    )
    pairs = list(open_text(tmp_path / "p.parquet").rows())
    assert [(r.text, r.pair, r.label) for r in pairs] == [("a b", "e", 1), ("c d", "f", 0)]


def test_siblings_and_folders_are_splits(tmp_path):
    write_lines(tmp_path / "x-train.jsonl", [{"text": "a"}])
    write_lines(tmp_path / "x-validation.jsonl", [{"text": "b"}])
    assert [r.text for r in open_text(tmp_path / "x-train.jsonl", "test").rows()] == ["b"]
    assert [r.text for r in open_text(tmp_path, "test").rows()] == ["b"]
    assert [r.text for r in open_text(tmp_path, "train").rows()] == ["a"]


def test_shares_and_limits_are_fixed_choices(tmp_path):
    path = write_lines(tmp_path / "x.jsonl", [{"text": str(i)} for i in range(50)])
    first, rest = ({r.text for r in open_text(path, s).rows()} for s in ("train[:80%]", "train[80%:]"))
    assert len(first) == 40
    assert not first & rest
    assert len(first | rest) == 50
    assert open_text(path, limit=7).count() == 7


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("latin.txt", "caf\xe9\n".encode("latin-1"), "not UTF-8"),
        ("empty.txt", b"", "empty"),
        ("x.jsonl", b'{"text": "a"}\nnonsense\n', "line 2 is not JSON"),
        ("y.jsonl", b'{"other": "a"}\n', "no column of text"),
        ("z.csv", b"a,b\n", "is no text"),
        ("bad.parquet", b"not parquet", "parquet"),
    ],
)
def test_what_cannot_be_read_is_said_in_a_line(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=words) as error:
        TextBatches(settings(uri=str(tmp_path / name), length=8, vocabulary=300), 1)
    assert "\n" not in str(error.value)


def test_text_too_short_for_a_row_is_refused(tmp_path):
    (tmp_path / "a.txt").write_text("one line\n")
    with pytest.raises(UserError, match="fewer than a row of 64"):
        TextBatches(settings(uri=str(tmp_path / "a.txt"), length=64, vocabulary=300), 1)
    with pytest.raises(UserError, match="one line long"):
        TextBatches(settings(uri=str(tmp_path / "a.txt"), rows="each", vocabulary=300), 1)


def test_a_missing_split_and_column_name_what_there_is(tmp_path):
    path = write_lines(tmp_path / "x.jsonl", [{"text": "a", "label": 0}])
    with pytest.raises(UserError, match="no split 'test'"):
        open_text(path, "test")
    with pytest.raises(UserError, match="did you mean label"):
        open_text(path, columns={"label": "lable"})
    with pytest.raises(UserError, match="no text"):
        open_text(tmp_path / "nowhere.txt")


@pytest.mark.parametrize("style", ["bert", "roberta", "gpt"])
def test_a_learned_tokenizer_gives_text_back(style):
    tokenizer = Tokenizer.learned([POEM] * 3, vocabulary=300, style=style)
    [row] = tokenizer.encode([POEM], special=False)
    assert tokenizer.decode(row.ids).strip() == POEM.strip()
    again = Tokenizer.from_text(tokenizer.text())
    assert again.special == tokenizer.special
    assert again.style == style
    assert again.encode([POEM])[0].ids == tokenizer.encode([POEM])[0].ids


def test_characters_are_tokens_of_their_own():
    tokenizer = Tokenizer.learned([POEM], kind="chars", style="gpt")
    [row] = tokenizer.encode([POEM])
    assert len(row.ids) == len(POEM)
    assert tokenizer.decode(row.ids) == POEM


def test_rows_of_pairs_are_framed_and_typed():
    bert = Tokenizer.learned([POEM] * 3, vocabulary=300, style="bert")
    [row] = bert.encode(["little cat"], ["silent feet"])
    s = bert.special
    assert row.ids[0] == s["cls"]
    assert row.ids.count(s["sep"]) == 2
    assert row.types[0] == 0
    assert row.types[-1] == 1
    words = [w for w in row.words if w >= 0]
    assert words == sorted(words), "the second text's words go on being numbered"
    roberta = Tokenizer.learned([POEM] * 3, vocabulary=300, style="roberta")
    [row] = roberta.encode(["little"], ["feet"])
    assert row.ids.count(roberta.special["sep"]) == 3


def test_a_transformers_folder_is_a_tokenizer(tmp_path):
    transformers = pytest.importorskip("transformers")
    words = {"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3, "[MASK]": 4, "fog": 5, "cat": 6}
    (tmp_path / "vocab.txt").write_text("\n".join(words) + "\n")
    transformers.BertTokenizerFast(str(tmp_path / "vocab.txt")).save_pretrained(tmp_path / "bert")
    tokenizer = Tokenizer.load(tmp_path / "bert")
    assert tokenizer.special == {"pad": 0, "unk": 1, "cls": 2, "sep": 3, "mask": 4}
    assert tokenizer.encode(["fog cat"])[0].ids == [2, 5, 6, 3]


def test_no_tokenizer_is_said_in_a_line(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="is no tokenizer"):
        Tokenizer.load(tmp_path)
    with pytest.raises(UserError, match="holds no tokenizer"):
        Tokenizer.load(tmp_path.parent)


def test_a_hub_out_of_reach_is_asked_once_and_said_in_a_line(monkeypatch, capfd):
    pytest.importorskip("transformers")
    monkeypatch.setattr("unmask.official.reach._reachable", lambda *_: False)
    with pytest.raises(UserError, match="no tokenizer nobody/nothing: no folder is there, and from the Hub: "):
        Tokenizer.load("nobody/nothing")
    assert capfd.readouterr().err == ""


def test_a_stream_holds_every_token_once(tmp_path):
    (tmp_path / "a.txt").write_text(POEM * 20)
    batches = TextBatches(settings(uri=str(tmp_path / "a.txt"), tokenizer="chars", style="gpt", length=32), 4)
    seen = np.concatenate([b["tokens"].flatten().numpy() for b in everything(batches)])
    assert (seen == batches.data.ids[: len(seen)]).all()
    assert len(batches.data.ids) - len(seen) < 32
    assert batches.tokenizer.decode(seen[:120]).startswith(POEM[:80]), "paragraphs are joined as they stood"


def test_rows_are_padded_to_the_longest_of_a_batch(tmp_path):
    path = write_lines(tmp_path / "x.jsonl", [{"text": "cat " * (i % 5 + 1), "label": i % 2} for i in range(20)])
    batches = TextBatches(settings(uri=str(path), rows="each", vocabulary=300, length=16), 4)
    batch = batches.fetch(np.array([0, 4]))
    assert batch["tokens"].shape[1] == int(batch["attention_mask"].sum(1).max())
    assert (batch["tokens"][batch["attention_mask"] == 0] == batches.tokenizer.special["pad"]).all()
    assert batch["label"].tolist() == [0, 0]
    assert batches.facts.classes == ("0", "1")


def test_packed_rows_keep_their_texts_apart(tmp_path):
    path = write_lines(tmp_path / "x.jsonl", [{"text": "cat " * (i % 5 + 1)} for i in range(40)])
    each = TextBatches(settings(uri=str(path), rows="each", vocabulary=300, length=24), 4)
    packed = TextBatches(settings(uri=str(path), rows="packed", vocabulary=300, length=24), 4)
    batch = next(iter(everything(packed, packed.count)))
    share = float(batch["attention_mask"].float().mean())
    assert share > 0.9
    assert int(batch["attention_mask"].sum()) == len(each.data.ids), "no token is lost"
    starts = (batch["positions"] == 0) & (batch["segments"] > 0)
    assert (batch["tokens"][starts] == packed.tokenizer.special["cls"]).all()
    assert int(starts.sum()) == 40


@given(st.lists(st.integers(0, 40), min_size=1, max_size=60), st.integers(4, 32))
def test_packing_loses_nothing_and_never_overflows(lengths, length):
    bins = packed_rows(np.array(lengths), length)
    placed = sorted(r for b in bins for r in b)
    assert placed == [i for i, n in enumerate(lengths) if n]
    assert all(sum(min(lengths[r], length) for r in b) <= length for b in bins)


def test_the_second_time_nothing_is_read_anew(tmp_path, monkeypatch):
    path = write_lines(tmp_path / "x.jsonl", [{"text": f"cat {i}"} for i in range(9)])
    first = TextBatches(settings(uri=str(path), rows="each", vocabulary=300), 2)
    monkeypatch.setattr(Tokenizer, "encode", lambda *a, **k: pytest.fail("tokenised again"))
    monkeypatch.setattr(Tokenizer, "learned", lambda *a, **k: pytest.fail("learned again"))
    again = TextBatches(settings(uri=str(path), rows="each", vocabulary=300), 2)
    assert (again.data.ids == first.data.ids).all()


def test_documents_have_paragraphs_and_sentences(tmp_path):
    table = {"doc_id": [0, 0, 1], "sentences": [["A cat.", "A fog."], ["Feet."], ["City."]]}
    pq.write_table(pa.table(table), tmp_path / "d.parquet")
    found = list(documents(open_text(tmp_path / "d.parquet")))
    assert [d.paragraphs for d in found] == [(("A cat.", "A fog."), ("Feet.",)), (("City.",),)]
    (tmp_path / "a.txt").write_text("One here. Two there.\n\nThree.\n")
    [text] = documents(open_text(tmp_path / "a.txt"))
    assert text.paragraphs == (("One here.", "Two there."), ("Three.",))


def test_sentences_end_where_a_reader_ends_them():
    text = 'He said "Go." Then Mr. Smith left at 5 p.m. sharp. Really? Yes! J. R. Smith stayed.'
    assert sentences_of(text) == (
        'He said "Go."',
        "Then Mr. Smith left at 5 p.m. sharp.",
        "Really?",
        "Yes!",
        "J. R. Smith stayed.",
    )


def test_settings_refuse_what_they_do_not_know():
    with pytest.raises(UserError, match="columns names 'txt'"):
        settings(uri="x", columns={"txt": "a"})
    with pytest.raises(UserError, match="did you mean length"):
        settings(uri="x", lenght=3)
