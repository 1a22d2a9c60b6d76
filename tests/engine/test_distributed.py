"""Two gloo processes give the numbers of one, on the same global batch."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from .toys import lines, losses, weights

TESTS = Path(__file__).parents[1]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(TESTS), str(TESTS.parent)])}
FULL = {"accumulate": 2, "ema": 0.9, "clip_norm": 0.5, "model": {"unused": True}, "data": {"streaming": True}}
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def jobs(tmp_path_factory):
    """Every run of this file, by name: its folder, the exit codes of its processes, and what they said."""
    at = tmp_path_factory.mktemp("runs")
    both = [("ddp", False), ("fsdp", True)]
    todo = {
        "one": {**FULL},
        "rivals": {"kind": "Rivals"},
        **{f"two-{n}": {"processes": 2, "sharded": s, **FULL} for n, s in both},
        **{f"rivals-{n}": {"processes": 2, "sharded": s, "kind": "Rivals"} for n, s in both},
        **{f"cut-{n}": {"processes": 2, "sharded": s, "stop": 7, **FULL} for n, s in both},
        **{
            f"cut-{n}-resumed": {"processes": 2, "sharded": s, "resume": True, "out": str(at / f"cut-{n}"), **FULL}
            for n, s in both
        },
        **{f"bad-{n}": {"processes": 2, "sharded": s, "data": {"poison": 5}} for n, s in both},
        "whole-resumed-sharded": {
            "processes": 2,
            "sharded": True,
            "resume": True,
            "steps": 20,
            "out": str(at / "two-ddp"),
            **FULL,
        },
        "uneven": {"processes": 2, "batch_size": 7},
        **{f"spoilt-{n}": {"processes": 2, "sharded": s, "spoil": True} for n, s in both},
        "lamb": {"processes": 2, "sharded": True, "optimizer": "lamb"},
    }
    listed = [{"out": str(at / name), **job} for name, job in todo.items()]
    words = [sys.executable, "-m", "engine.distributed_run", "fork", json.dumps(listed)]
    done = subprocess.run(words, env=ENVIRONMENT, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]
    told = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return {
        name: (Path(job["out"]), t["codes"], t["told"])
        for (name, job), t in zip(zip(todo, listed, strict=True), told, strict=True)
    }


def close(a: Path, b: Path) -> bool:
    assert losses(a) == pytest.approx(losses(b), abs=1e-5)
    norms = [
        [line["grad_norm"] for line in lines(run, "train")] for run in (a, b)
    ]  # Adam forgives a wrong scale; this does not
    assert norms[0] == pytest.approx(norms[1], abs=1e-4)
    for kind in ("reference", "probe"):
        values = [[line["values"] for line in lines(run, kind)] for run in (a, b)]
        assert len(values[0]) == len(values[1]) > 0
        for x, y in zip(*values, strict=True):
            assert x == pytest.approx(y, abs=1e-4)
    one, two = weights(a), weights(b)
    return one.keys() == two.keys() and all(torch.allclose(one[n], two[n], atol=1e-5) for n in one)


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_two_processes_give_the_losses_of_one(jobs, kind):
    out, codes, told = jobs[f"two-{kind}"]
    assert codes == [0, 0], told
    assert close(jobs["one"][0], out)
    assert (out / "checkpoints" / "step-00000012" / "shards").exists() == (kind == "fsdp")


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_two_phases_train_on_two_processes(jobs, kind):
    out, codes, told = jobs[f"rivals-{kind}"]
    assert codes == [0, 0], told
    assert close(jobs["rivals"][0], out)


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_two_processes_stop_together_and_resume_exactly(jobs, kind):
    out, codes, told = jobs[f"cut-{kind}"]
    assert codes == [130, 130], told
    assert all("after step 7" in t for t in told)
    assert jobs[f"cut-{kind}-resumed"][1] == [0, 0], jobs[f"cut-{kind}-resumed"][2]
    straight = jobs[f"two-{kind}"][0]
    assert losses(out) == losses(straight)
    assert all(torch.equal(a, b) for a, b in zip(weights(out).values(), weights(straight).values(), strict=True))


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_a_step_that_is_not_finite_on_one_process_stops_both(jobs, kind):
    out, codes, told = jobs[f"bad-{kind}"]
    assert codes == [2, 2], told
    assert all("first in batch.image" in t for t in told)
    assert (out / "failed-step.safetensors").exists()
    assert (out / "failed-model.safetensors").exists()
    assert json.loads((out / "run.json").read_text())["state"] == "failed"


def test_what_cannot_be_is_told_by_every_process(jobs):
    for name, words in [
        ("uneven", "batch_size=7 does not divide into 2 processes"),
        ("lamb", "cannot train a sharded model"),
        ("whole-resumed-sharded", "resume it the way it was launched"),
    ]:
        _, codes, told = jobs[name]
        assert codes == [2, 2], told
        assert all(words in t for t in told), told
    assert not jobs["uneven"][0].exists()


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_a_disk_that_refuses_the_first_process_stops_both(jobs, kind):
    _, codes, told = jobs[f"spoilt-{kind}"]
    assert codes == [2, 2], told
    assert all("the disk refuses" in t and "metrics.jsonl" in t for t in told)


@pytest.mark.parametrize("launcher", ["torchrun", "accelerate"])
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_real_launchers_give_the_same(jobs, tmp_path, launcher, kind):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = dict(ENVIRONMENT)
    if launcher == "torchrun":
        words = ["-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={port}"]
        environment["ACCELERATE_USE_FSDP"] = str(kind == "fsdp").lower()
    else:
        # "multi_gpu" is Accelerate's word for torchrun; without a GPU the processes meet over gloo
        words = [
            "-m",
            "accelerate.commands.launch",
            "--num_processes=2",
            "--num_machines=1",
            f"--main_process_port={port}",
        ]
        words += ["--mixed_precision=no", "--dynamo_backend=no"]
        words += ["--use_fsdp", "--fsdp_version=2"] if kind == "fsdp" else ["--multi_gpu"]
    script = ["-m", "engine.distributed_run", "run", str(tmp_path / "run"), json.dumps(FULL)]
    done = subprocess.run(
        [sys.executable, *words, *script], env=environment, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert close(jobs["one"][0], tmp_path / "run")
    machine = json.loads((tmp_path / "run" / "run.json").read_text())["machine"]
    assert machine["processes"] == 2
    assert (tmp_path / "run" / "checkpoints" / "step-00000012" / "shards").exists() == (kind == "fsdp")
