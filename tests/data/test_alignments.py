"""Alignments: reading, checks, species, what is held out."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unmask.data.alignments import (
    LETTERS,
    Alignment,
    aligned,
    alignment_files,
    hold_out,
    identity,
    joined,
    read_alignment,
    rows_by_species,
    species_of,
    write_alignment,
)
from unmask.errors import UserError

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data" / "protein_malk_aligned.fasta.gz"


def test_insertions_are_left_out_and_counted() -> None:
    found = aligned([("a", "MKabcE.R*"), ("b", "MK-E")])
    assert found.texts() == ["MKER", "MK-E"]
    assert found.dropped == 5


@pytest.mark.parametrize("suffix", [".fasta", ".fasta.gz", ".a3m"])
def test_what_is_written_is_read_again(tmp_path: Path, suffix: str) -> None:
    table = aligned([("first_9", "MK-E"), ("second_8 with words", "MKQE")])
    again = read_alignment(write_alignment(table, tmp_path / f"family{suffix}"))
    assert again.names == table.names
    assert np.array_equal(again.letters, table.letters)


@given(st.lists(st.text(LETTERS, min_size=7, max_size=7), min_size=1, max_size=5))
@settings(max_examples=25, deadline=None)
def test_any_letters_of_the_alphabet_survive(rows: list[str]) -> None:
    assert aligned([(str(i), row) for i, row in enumerate(rows)]).texts() == rows


def test_stockholm_blocks_are_put_together(tmp_path: Path) -> None:
    path = tmp_path / "family.sto"
    path.write_text("# STOCKHOLM 1.0\n#=GF ID x\none  MK.a\ntwo  MKQ-\n\none  EE\ntwo  ED\n//\n")
    with pytest.raises(UserError, match=r"row 2 .* has 6 letters where row 1 has 4"):
        read_alignment(path)
    path.write_text("# STOCKHOLM 1.0\none  MK.a\ntwo  MK..\n\none  EE\ntwo  ED\n//\n")
    assert read_alignment(path).texts() == ["MKEE", "MKED"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (">a\nMKE\n>b\nMK\n", "row 2 .*b.* has 2 letters where row 1 has 3"),
        (">a\nMJE1\n", "letters outside the alphabet: 1 J"),
        ("", "holds no sequences"),
        (">a\nacde\n>b\nacdf\n", "lower case, '.' and '\\*' are insertions"),
        ("MKE\n", "line 1 comes before the first header"),
    ],
)
def test_bad_files_are_told_in_one_line(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "bad.fasta"
    path.write_text(text)
    with pytest.raises(UserError, match=words):
        read_alignment(path)


def test_unknown_letters_can_be_let_in(tmp_path: Path) -> None:
    path = tmp_path / "odd.fasta"
    path.write_text(">a\nMJE\n")
    found = read_alignment(path, unknown="ok")
    assert found.texts() == ["M?E"]
    assert found.unknown == {"J": 1}


def test_binary_and_missing_files_are_told(tmp_path: Path) -> None:
    path = tmp_path / "x.fasta"
    with pytest.raises(UserError, match="no file"):
        read_alignment(path)
    path.write_bytes(b"\xff\xfe\x00\x81")
    with pytest.raises(UserError, match="no text"):
        read_alignment(path)
    path.write_bytes(gzip.compress(b">a\nMK\n")[:12])
    with pytest.raises(UserError, match="cannot be read"):
        read_alignment(path)


@pytest.mark.parametrize(
    ("name", "rule", "species"),
    [
        ("F4DPU0_F4DPT9_1_1001585", "last_field", "1001585"),
        ("loc|Escherichia coli|x", "field:2", "Escherichia coli"),
        ("sp|P1|MALK_ECOLI Maltose OS=Escherichia coli OX=83333 GN=malK", "uniprot", "83333"),
        ("gene:abc[Homo sapiens]", r"\[(.+)\]", "Homo sapiens"),
    ],
)
def test_species_are_found_by_rule(name: str, rule: str, species: str) -> None:
    assert species_of(name, rule) == species


def test_a_header_without_species_is_told() -> None:
    with pytest.raises(UserError, match="no species in the header 'abc'"):
        species_of("abc")
    with pytest.raises(UserError, match="is no rule"):
        species_of("abc", "(")


def test_held_out_species_share_nothing_near_with_what_is_learnt_from() -> None:
    random = np.random.default_rng(0)
    letters = random.choice(np.frombuffer(b"LAGVSERT", dtype=np.uint8), (60, 12))
    letters[30:] = letters[:30]  # unseen species hold the same sequences
    table = Alignment(letters, [f"x_{i // 2}" for i in range(60)], "family")
    train, test = hold_out(table, rows_by_species(table), test=5, max_identity=0.65)
    assert len(test) == 10
    assert identity(letters[train], letters[test]).max() < 0.65
    names = table.species()
    assert not {names[i] for i in train} & {names[i] for i in test}


def test_alignments_join_row_by_row() -> None:
    a, b = aligned([("x", "MK"), ("y", "ME")]), aligned([("x", "AAA"), ("y", "GGG")])
    assert joined(a, b).texts() == ["MKAAA", "MEGGG"]
    with pytest.raises(UserError, match="2 rows"):
        joined(a, b.select([0]))


def test_a_folder_is_its_alignments(tmp_path: Path) -> None:
    for name in ("b.a3m", "a.fasta.gz", "notes.txt"):
        (tmp_path / name).write_text(">a\nM\n")
    assert [p.name for p in alignment_files(tmp_path)] == ["a.fasta.gz", "b.a3m"]


@pytest.mark.skipif(not SHARED.is_file(), reason="needs ../shared/data")
def test_the_malk_family_is_read_whole() -> None:
    table = read_alignment(SHARED)
    assert table.letters.shape == (5004, 142)
    assert len(rows_by_species(table)) == 880
