"""A whole claim in seconds: its result, its figures, and going on where it stopped."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

import unmask
from unmask.claims import arm, pool
from unmask.claims.claim import tier_of
from unmask.claims.jobs import jobs_of, read_job
from unmask.errors import UserError

FOUND = {"sample:fashion": "sample:fashion"}


def test_a_claim_runs_end_to_end_and_a_second_time_does_nothing(toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    result = unmask.reproduce("toy", out="results", work="work", jobs=1, talk=told.append)
    kept = json.loads(Path("results/toy.json").read_text())
    assert kept["verdict"] == result["verdict"] in ("shown", "not shown")
    assert {"slug", "claim", "tier", "metric", "baseline", "runs", "seeds", "seconds", "versions", "machine"} <= set(
        kept
    )
    assert kept["seeds"] == [0, 1, 2]
    assert len(kept["runs"]) == 9
    assert all(len(values) == 3 for values in kept["numbers"]["ridge"].values())
    assert len(kept["interval"]) == len(kept["baseline"]) == 2
    assert Path("results/toy.svg").stat().st_size > 1000
    assert any(line.startswith("toy: ") and result["verdict"] in line for line in told)

    monkeypatch.setattr(arm, "trained", lambda *a: pytest.fail("a finished arm was trained again"))
    monkeypatch.setattr(arm, "untrained", lambda *a: pytest.fail("a finished arm was made again"))
    assert unmask.reproduce("toy", out="results", work="work", jobs=1, talk=told.append)["numbers"] == result["numbers"]


def test_a_half_done_claim_goes_on_with_what_is_missing(toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    perform = arm.perform

    def three_only(job, talk):  # type: ignore[no-untyped-def]
        if len(done) == 3:
            raise KeyboardInterrupt
        done.append(job.title)
        return perform(job, talk)

    monkeypatch.setattr(arm, "perform", three_only)
    with pytest.raises(KeyboardInterrupt):
        unmask.reproduce("toy", out="results", work="work", jobs=1, talk=lambda _: None)
    assert not Path("results").exists(), "nothing half-written"

    first = list(done)
    done.clear()
    monkeypatch.setattr(arm, "perform", lambda job, talk: (done.append(job.title), perform(job, talk))[1])
    unmask.reproduce("toy", out="results", work="work", jobs=1, talk=lambda _: None)
    assert not set(first) & set(done)
    assert len(first) + len(done) == 9


def test_a_training_stopped_before_its_first_checkpoint_starts_again(toy: Path) -> None:
    job = jobs_of("toy", tier_of("toy", "tiny")[1], 3, Path("work"), FOUND)[0]
    job.write()
    job.run.mkdir()
    (job.run / "run.json").write_text(json.dumps({"format": 1, "kind": "run", "system": "mae", "state": "interrupted"}))
    assert set(arm.perform(read_job(job.folder), lambda _: None)) == {"ridge"}
    assert job.values() == read_job(job.folder).values()


def test_the_untrained_arm_is_where_the_trained_one_begins(toy: Path) -> None:
    import torch

    random = next(j for j in jobs_of("toy", tier_of("toy", "tiny")[1], 3, Path("work"), FOUND) if j.untrained)
    random.write()
    first, again = arm.untrained(random), arm.untrained(random)
    assert all(torch.equal(a, b) for a, b in zip(first.state_dict().values(), again.state_dict().values(), strict=True))
    assert first.encoder is not None
    assert first.encoder.preprocessing is not None


def test_a_wrong_option_is_told_before_anything_is_trained(toy: Path) -> None:
    values = yaml.safe_load(toy.read_text())
    values["tiers"]["tiny"]["arms"]["ratio 0.25"] = ["mask_ration=0.25"]
    toy.write_text(yaml.safe_dump(values, sort_keys=False))
    with pytest.raises(UserError, match=r"mask_ration.*did you mean mask_ratio"):
        unmask.reproduce("toy", out="results", work="work", jobs=1, talk=lambda _: None)
    assert not list(Path("work").glob("*/run"))


def test_fewer_than_three_seeds_are_refused(toy: Path) -> None:
    with pytest.raises(UserError, match="seeds=2: a paired test needs 3 or more"):
        unmask.reproduce("toy", seeds=2)


@pytest.mark.slow
def test_jobs_side_by_side_give_the_numbers_of_jobs_in_turn(toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("PYTHONPATH", str(Path(unmask.__file__).parents[1]))
    tier, told = tier_of("toy", "tiny")[1], list[str]()
    in_turn, side_by_side = (jobs_of("toy", tier, 3, Path(work), FOUND)[:2] for work in ("first", "second"))
    pool.run_jobs(in_turn, 1, lambda _: None)
    pool.run_jobs(side_by_side, 2, told.append)
    assert [j.values() for j in in_turn] == [j.values() for j in side_by_side]
    assert any(line.startswith("2/2 toy: ") for line in told)


@pytest.mark.slow
def test_a_job_that_fails_is_told_in_one_line(toy: Path) -> None:
    job = jobs_of("toy", tier_of("toy", "tiny")[1], 3, Path("work"), FOUND)[0]
    job.recipe["model"]["backbone"]["name"] = "vit_nono_patch7"
    with pytest.raises(UserError, match=r"toy: ratio 0\.75, seed 0 stopped: .*vit_nono_patch7.*whole log") as caught:
        pool.run_jobs([job], 2, lambda _: None)
    assert "\n" not in str(caught.value)
