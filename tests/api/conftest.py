"""Small real runs that several tests read."""

from __future__ import annotations

import pytest
from small_runs import QUIET, SHORT, SMALL


@pytest.fixture(scope="session")
def mae_run(tmp_path_factory):
    """A finished run of MAE with its probe and report."""
    import unmask

    return unmask.train("mae", out=tmp_path_factory.mktemp("runs") / "mae", overrides=SMALL, **SHORT, **QUIET)


@pytest.fixture(scope="session")
def classifier_run(tmp_path_factory, mae_run):
    """A classifier that started from the encoder of the run above."""
    import unmask

    small = {k: v for k, v in SMALL.items() if not k.startswith(("decoder", "backbone"))}
    return unmask.train(
        "classifier",
        out=tmp_path_factory.mktemp("runs") / "classifier",
        overrides=small,
        init=str(mae_run),
        **SHORT,
        **QUIET,
    )
