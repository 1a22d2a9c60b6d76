"""Training on families: batches, losses, saving, what is measured and predicted."""

from __future__ import annotations

import csv
import re
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch

from unmask.config import validated
from unmask.data.alignments import Alignment, write_alignment
from unmask.draw import Seeded
from unmask.errors import UserError
from unmask.systems.proteins.alphabet import CLS
from unmask.systems.proteins.batches import AlignmentBatches, AlignmentSettings
from unmask.systems.proteins.diffpalm.model import DiffPALM
from unmask.systems.proteins.msa_transformer.model import MSATransformer
from unmask.systems.proteins.msa_transformer.official import load_file, load_official

NETWORK = {"embed_dim": 16, "depth": 2, "num_heads": 2, "max_positions": 64, "max_rows": 32, "dropout": 0.1}


def family(path: Path, rows: int = 60, columns: int = 14, seed: int = 0, name: str = "p") -> Path:
    random = np.random.default_rng(seed)
    letters = random.choice(np.frombuffer(b"LAGVSERTIDPK", dtype=np.uint8), (rows, columns))
    return write_alignment(Alignment(letters, [f"{name}{i}_{i // 3}" for i in range(rows)]), path)


def settings(uri: Path, **options: object) -> AlignmentSettings:
    return validated(AlignmentSettings, {"uri": str(uri), "rows": 6, **options}, where="data")


def test_tables_begin_with_their_row_and_depend_on_the_draw_alone(tmp_path: Path) -> None:
    batches = AlignmentBatches(settings(family(tmp_path / "a.fasta")), 2)
    raw = batches.fetch(np.array([3, 7]))
    one, again, other = (batches.transform(raw, Seeded(0, step))["tokens"] for step in (1, 1, 2))
    assert one.shape == (2, 6, 15)
    assert torch.equal(one, again)
    assert not torch.equal(one, other)
    assert torch.equal(one[:, 0], other[:, 0])
    assert bool((one[:, :, 0] == CLS).all())


def test_training_rows_are_none_of_the_test(tmp_path: Path) -> None:
    uri = family(tmp_path / "a.fasta")
    train, test = (AlignmentBatches(settings(uri, split=s), 1).tables[0] for s in ("train", "test"))
    assert not set(train.species()) & set(test.species())
    assert len(train) + len(test) == 60


def test_budget_depth_and_choice_bound_the_rows(tmp_path: Path) -> None:
    uri = family(tmp_path / "a.fasta")
    assert AlignmentBatches(settings(uri, tokens=45), 1).samples(1)["tokens"].shape[1] == 3
    lazy = AlignmentBatches(settings(uri, depth="log_uniform"), 1)
    depths = {lazy.transform(lazy.fetch(np.array([0])), Seeded(0, s))["tokens"].shape[1] for s in range(12)}
    assert len(depths) > 2
    assert max(depths) <= 6
    whole = AlignmentBatches(settings(uri, choice="species", hold_out="species"), 1)
    rows = whole.chosen(0, 0, 6, np.random.default_rng(0).random((2, len(whole.tables[0]))))
    names = whole.tables[0].species()
    assert len(rows) == 6
    assert len({names[r] for r in rows}) == 2
    near = AlignmentBatches(settings(uri, choice="nearest"), 1)
    assert near.samples(1)["tokens"].shape[1] == 6


def test_a_folder_holds_a_family_a_file(tmp_path: Path) -> None:
    family(tmp_path / "a.fasta", columns=10)
    family(tmp_path / "b.a3m", columns=14, rows=4)
    batches = AlignmentBatches(settings(tmp_path, hold_out="none"), 2)
    assert batches.samples(2)["tokens"].shape == (2, 6, 15)


def test_a_small_network_learns_a_family_and_is_saved(tmp_path: Path) -> None:
    batches = AlignmentBatches(settings(family(tmp_path / "a.fasta")), 2)
    torch.manual_seed(0)
    model = MSATransformer(MSATransformer.Config(network=NETWORK))
    batch = batches.transform(batches.fetch(np.array([0, 1])), Seeded(0))
    optimiser = torch.optim.Adam(model.parameters(), 1e-2)
    losses = []
    for _ in range(8):
        optimiser.zero_grad()
        loss = model.loss(batch, Seeded(0))["loss"]
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert "column profile of the visible" in model.references(batch, Seeded(0))
    assert model.preview(batch, Seeded(0))[0].rows[0][0].dtype == np.uint8
    model.save_pretrained(tmp_path / "saved")
    again = MSATransformer.from_pretrained(tmp_path / "saved")
    model.eval()
    tokens = batch["tokens"]
    assert torch.equal(model.network(tokens).last, again.network(tokens).last)


def test_measures_stand_beside_profiles(tmp_path: Path) -> None:
    uri = family(tmp_path / "a.fasta")
    model = MSATransformer(MSATransformer.Config(network=NETWORK))
    found = model.measure(settings(uri, split="test"), Seeded(0), limit=3, folder=tmp_path / "out")
    assert set(MSATransformer.measures) <= set(found)
    assert len(found["baseline"]) == 2
    assert (tmp_path / "out" / found["pictures"][0]["file"]).is_file()


def test_pairs_are_learnt_and_measured(tmp_path: Path) -> None:
    left, right = family(tmp_path / "l.fasta"), family(tmp_path / "r.fasta", columns=9, seed=1)
    data = settings(left, partner=str(right), choice="species", hold_out="species", test_species=4)
    config = DiffPALM.Config(network=NETWORK, columns=5, descent={"steps": 1}, test={"tables": 1, "rows": 9, "runs": 1})
    batches = DiffPALM.open_batches(config, data, 1, 0)
    config = DiffPALM.adapted(config, batches.facts)
    assert config.lengths == [14, 9]
    assert [len(side) for side in config.kept or []] == [5, 5]
    model = DiffPALM(config)
    batch = batches.samples(1)
    assert batch["tokens"].shape[2] == 11
    assert torch.isfinite(model.loss(batch, Seeded(0))["loss"])
    assert model.preview(batch, Seeded(0))
    found = model.measure(data.model_copy(update={"split": "test"}), Seeded(0), folder=tmp_path / "out")
    assert 0 <= found["correct"] <= 100
    assert set(found["baseline"]) == {"chance", "nearest training pair", "mirrortree on training pairs"}
    with pytest.raises(UserError, match=r"data\.partner=FILE"):
        DiffPALM.open_batches(config, settings(left), 1, 0)


def test_pairing_asks_the_network_of_another_run(tmp_path: Path) -> None:
    trained = MSATransformer(MSATransformer.Config(network=NETWORK))
    trained.save_pretrained(tmp_path / "msa")
    model = DiffPALM(DiffPALM.Config(model=str(tmp_path / "msa")))
    assert model.config.model == ""
    assert torch.equal(model.network.head_dense.weight, trained.network.head_dense.weight)


def test_predictions_are_tables_and_pictures(tmp_path: Path) -> None:
    uri = family(tmp_path / "a.fasta")
    model = MSATransformer(MSATransformer.Config(network=NETWORK))
    with pytest.raises(UserError, match="never fitted to structures: use task=couplings"):
        model.predict([uri])
    (couplings,) = model.predict([uri], task="couplings", rows=8)
    assert couplings.save(tmp_path / "map").is_file()
    assert len(list(csv.DictReader((tmp_path / "map.csv").open()))) == 14 * 13 // 2
    (vectors,) = model.predict([uri], task="embeddings", rows=5, layer=1)
    assert vectors.sites.shape == (5, 14, 16)
    query = uri.read_text().splitlines()[1]
    (scores,) = model.predict([uri], task="mutations", rows=4, mutations=f"{query[0]}1W,{query[2]}3C:{query[3]}4M")
    assert len(scores.scores) == 2
    (scan,) = model.predict([uri], task="mutations", rows=4, strategy="wild_type", choice="random")
    assert scan.table.shape == (14, 20)
    assert scan.overlay().size[0] > 100
    assert any("only 4 rows" in note for note in scan.notes)
    with pytest.raises(UserError, match="layer=9"):
        model.predict([uri], task="embeddings", layer=9)


def test_a_table_of_mutations_gets_a_column_of_scores(tmp_path: Path) -> None:
    uri = family(tmp_path / "a.fasta")
    query = uri.read_text().splitlines()[1]
    (tmp_path / "scan.csv").write_text(f"mutant,measured\n{query[1]}2W,0.5\n")
    model = MSATransformer(MSATransformer.Config(network=NETWORK))
    (found,) = model.predict([uri], task="mutations", mutations=str(tmp_path / "scan.csv"), rows=3)
    found.save(tmp_path / "out")
    (row,) = csv.DictReader((tmp_path / "out.csv").open())
    assert row["measured"] == "0.5"
    assert float(row["score"]) == pytest.approx(found.scores[0], abs=1e-4)
    with pytest.raises(UserError, match="no column"):
        model.predict([uri], task="mutations", mutations=str(tmp_path / "scan.csv"), column="nothing")


def test_public_files_are_read_with_their_second_file(tmp_path: Path) -> None:
    esm = pytest.importorskip("esm", reason="needs fair-esm")
    sizes = {
        "embed_dim": 16,
        "ffn_embed_dim": 24,
        "layers": 2,
        "attention_heads": 2,
        "max_positions": 20,
        "max_tokens": 2**14,
    }
    args = Namespace(**sizes, dropout=0.1, attention_dropout=0.1, activation_dropout=0.1, embed_positions_msa=True)
    theirs = esm.model.msa_transformer.MSATransformer(
        args, esm.data.Alphabet.from_architecture("msa_transformer")
    ).eval()
    plain = theirs.state_dict()
    other = {"row_self": "column_self", "column_self": "row_self"}
    public = {
        ("encoder." if k.startswith("lm_head") else "encoder.sentence_encoder.")
        + re.sub("row_self|column_self", lambda m: other[m[0]], k): v
        for k, v in plain.items()
        if not k.startswith("contact_head")
    }
    regression = {k: v for k, v in plain.items() if k.startswith("contact_head")}
    torch.save({"args": args, "model": public}, tmp_path / "esm.pt")
    bare = load_file(tmp_path / "esm.pt", {"attention_heads": 2})
    assert not bool(bare.network.contact_head.fitted)
    torch.save({"model": regression}, tmp_path / "esm-contact-regression.pt")
    ours = load_file(tmp_path / "esm.pt")  # the regression tells the heads
    tokens = torch.randint(4, 24, (1, 5, 9))
    tokens[..., 0] = CLS
    with torch.no_grad():
        expected = theirs(tokens, return_contacts=True)
        seen = ours.network(tokens, need_maps=True)
        assert torch.allclose(ours.network.letters(seen.last), expected["logits"], atol=1e-4)
        assert torch.allclose(ours.network.contacts(seen.row_maps), expected["contacts"], atol=1e-5)
    with pytest.raises(UserError, match="not the weights of an MSA Transformer"):
        load_official({"head.weight": torch.zeros(1)})
