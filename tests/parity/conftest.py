"""``pytest tests/parity [--cases DIR ...]``: which cases run, and what is said of those that cannot yet."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from .harness import Case, exists, find_cases

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--cases",
        action="append",
        metavar="DIR",
        help="a folder of golden cases (NAME.json + NAME.safetensors at any depth); may be repeated; "
        "default: ../shared/golden where present, and tests/parity/cases",
    )


def pytest_configure(config: pytest.Config) -> None:
    folders(config)  # complains now about a folder that is not there


def folders(config: pytest.Config) -> list[Path]:
    """The folders to search. Raises ``UsageError`` for one that is not there."""
    # the option is unknown when this folder is collected as part of a larger run
    named = [Path(d).expanduser().resolve() for d in (config.getoption("cases", default=None) or [])]
    for folder in named:
        if not folder.is_dir():
            raise pytest.UsageError(f"--cases {folder}: no such folder")
    return named or [f for f in (ROOT.parent / "shared" / "golden", HERE / "cases") if f.is_dir()]


def cases_of(config: pytest.Config) -> list[Case]:
    """Every case once: the committed copies say nothing new beside the originals."""
    seen: set[bytes] = set()
    return [c for c in find_cases(folders(config)) if not (c.digest in seen or seen.add(c.digest))]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    cases = cases_of(metafunc.config) if {"case", "waiting"} & set(metafunc.fixturenames) else []
    if "case" in metafunc.fixturenames and metafunc.module.__name__.endswith("test_parity"):
        ready = [c for c in cases if exists(c)]
        metafunc.parametrize("case", ready, ids=unique([c.id for c in ready]))
    if "waiting" in metafunc.fixturenames:
        counts = pending(cases)
        metafunc.parametrize("waiting", [parameter(system, counts[system]) for system in sorted(counts)])


def pending(cases: list[Case]) -> Counter[str]:
    """The number of cases of each system that does not exist yet."""
    return Counter(c.system for c in cases if not exists(c))


def parameter(system: str, count: int) -> object:
    skipped = pytest.mark.skip(reason=f"pending: system {system} does not exist yet ({count} cases)")
    return pytest.param(system, id=system, marks=skipped)


def unique(names: list[str]) -> list[str]:
    counts: Counter[str] = Counter()
    out = []
    for name in names:
        counts[name] += 1
        out.append(name if counts[name] == 1 else f"{name}#{counts[name]}")
    return out


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Say which cases wait for their system, so that a green line is not read as more than it is."""
    cases = cases_of(config)
    here, waiting = Counter(c.system or "unreadable" for c in cases if exists(c)), pending(cases)
    terminalreporter.write_sep("-", "parity")
    terminalreporter.write_line(f"compared: {sum(here.values())} cases of {len(here)} systems: {listed(here)}")
    if waiting:
        total = f"{sum(waiting.values())} cases of {len(waiting)} systems that do not exist yet"
        terminalreporter.write_line(f"pending:  {total}: {listed(waiting)}")


def listed(counts: Counter[str]) -> str:
    return ", ".join(f"{name} {counts[name]}" for name in sorted(counts)) or "none"
