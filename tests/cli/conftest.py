"""The command line as a person meets it: run in this process, or in one of its own where imports are counted."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from unmask.cli.app import run


@dataclass
class Said:
    """What a command left behind."""

    code: int
    out: str
    err: str

    @property
    def lines(self) -> list[str]:
        return [line for line in self.err.splitlines() if line.startswith("unmask: ")]


@pytest.fixture
def unmask(capfd, tmp_path, monkeypatch):
    """Runs a command in an empty folder; returns code, stdout, stderr."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")

    def call(*words: object) -> Said:
        capfd.readouterr()
        code = run([str(word) for word in words])
        out, err = capfd.readouterr()
        return Said(code, out, err)

    return call


@pytest.fixture
def process():
    """Runs Python code in a process of its own; returns its stdout."""

    def call(code: str, cwd: Path | None = None) -> str:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd=cwd, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    return call
