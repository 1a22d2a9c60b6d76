"""A claim.yaml that does not fit is refused in one line, before anything is trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from unmask import catalog
from unmask.claims.claim import claim_of, read_claim, tier_of, with_claims
from unmask.claims.jobs import jobs_of
from unmask.claims.materials import find_data
from unmask.config import override
from unmask.errors import UserError

PUBLISHED = ("mae", "simmim", "colormae", "swin")


def broken(path: Path, key: str, value: Any) -> str:
    values = override(yaml.safe_load(path.read_text()), key, value)
    path.write_text(yaml.safe_dump(values, sort_keys=False))
    with pytest.raises(UserError) as caught:
        read_claim(path, "the claim of toy")
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("statment", "x", 'no option "statment" in the claim of toy: did you mean statement?'),
        ("tiers.tiny.seeds", 2, "seeds=2 does not fit"),
        ("tiers.tiny.method", "ratio 0.7", "method 'ratio 0.7' is no arm: did you mean ratio 0.75"),
        ("tiers.tiny.baselines", ["ratio 0.75"], "cannot be its own baseline"),
        ("tiers.tiny.metric", "rigde", "did you mean ridge?"),
        (
            "tiers.tiny.metrics",
            {"ridge": {"probe": "rigde", "data": "cifar10"}},
            "no probe 'rigde': did you mean ridge",
        ),
        ("tiers.tiny.train", {"steps": 10}, "sets train.steps: the budget and the seeds belong to all arms"),
        ("tiers.tiny.budget", {"steps": 0, "batch_size": 8}, "budget.steps=0 does not fit"),
        ("tiers.huge", {}, "tiers.huge"),
    ],
)
def test_what_does_not_fit_is_named_in_one_line(toy: Path, key: str, value: Any, said: str) -> None:
    assert said in broken(toy, key, value)


def test_text_that_is_no_yaml_is_refused(toy: Path) -> None:
    toy.write_text("statement: [")
    with pytest.raises(UserError, match="is not YAML"):
        read_claim(toy)


def test_systems_without_a_claim_and_tiers_that_are_not_there_are_named(toy: Path) -> None:
    with pytest.raises(UserError, match="no system 'toyy': did you mean toy"):
        claim_of("toyy")
    with pytest.raises(UserError, match="has no tier 'small': it takes one of tiny"):
        tier_of("toy", "small")
    toy.unlink()
    with pytest.raises(UserError, match="toy has no claim to reproduce"):
        claim_of("toy")


def test_words_and_nested_values_say_the_same(toy: Path) -> None:
    tier = claim_of("toy").tiers["tiny"]
    assert tier.arms["ratio 0.25"].model == {"mask_ratio": 0.25}
    assert tier.settings("ratio 0.25")["model"]["decoder"] == tier.settings("ratio 0.75")["model"]["decoder"]
    assert tier.settings("ratio 0.75")["train"]["steps"] == 3


def test_every_arm_of_a_seed_has_the_same_seed_data_and_budget(toy: Path, tmp_path: Path) -> None:
    jobs = jobs_of("toy", claim_of("toy").tiers["tiny"], 3, tmp_path, {"sample:fashion": "sample:fashion"})
    assert len({j.folder for j in jobs}) == len(jobs) == 9
    for seed in range(3):
        arms = [j for j in jobs if j.seed == seed]
        assert len(arms) == 3
        assert all(j.recipe["data"] == arms[0].recipe["data"] for j in arms)
        assert all(j.recipe["train"] == arms[0].recipe["train"] for j in arms)
        assert arms[0].recipe["train"]["seed"] == seed


def test_another_version_of_the_library_does_the_jobs_again(toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def folders() -> set[Path]:
        tier = claim_of("toy").tiers["tiny"]
        return {j.folder for j in jobs_of("toy", tier, 3, Path("work"), {"sample:fashion": "sample:fashion"})}

    before = folders()
    assert folders() == before
    monkeypatch.setattr("unmask.claims.jobs.__version__", "another")
    assert not folders() & before


def test_missing_data_are_told_in_one_line_before_anything_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("UNMASK_DATA", str(tmp_path))
    with pytest.raises(
        UserError, match=r"^data missing: nowhere96, camvid, not found under UNMASK_DATA=.*: set UNMASK_DATA"
    ):
        find_data(["nowhere96+camvid", "camvid", "sample:fashion"], tmp_path)


@pytest.mark.parametrize("slug", PUBLISHED)
def test_the_published_claims_are_well_formed(slug: str) -> None:
    if slug not in catalog.cards():
        pytest.skip(f"{slug} does not exist yet")
    claim = claim_of(slug)
    assert slug in with_claims()
    assert set(claim.tiers) == {"tiny", "small"}
    assert all(tier.seeds >= 3 for tier in claim.tiers.values())
