"""Every system gives its authors' numbers, from their weights, inputs and random draws."""

from __future__ import annotations

import pytest
import torch

from .harness import Case, RunCase, adapter, check, given, readable


def test_our_numbers_equal_the_official_ones(case: Case) -> None:
    assert check(case) > 0


def test_no_weight_of_the_official_code_is_missing_or_left_over(case: Case) -> None:
    tensors = given(readable(case))
    run_case = adapter(case)
    if not any(name.startswith("param.") for name in tensors):
        pytest.skip("the case has no weights")
    with pytest.raises(Exception, match=r"nobody\.knows\.me"):
        run_case(dict(case.config), {**tensors, "param.nobody.knows.me": torch.zeros(3)})
    # tables of positions may be derivable or an option of the network; matrices and norms never are
    for name in [n for n in tensors if n.startswith("param.") and n.endswith(".weight")]:
        assert refuses(run_case, case, {n: value for n, value in tensors.items() if n != name}), f"nobody missed {name}"


def refuses(run_case: RunCase, case: Case, tensors: dict[str, torch.Tensor]) -> bool:
    try:
        run_case(dict(case.config), tensors)
    except Exception:
        return True
    return False


def test_pending_systems_have_cases_here(waiting: str) -> None:
    raise AssertionError(f"{waiting}: a system that does not exist yet cannot be compared")


def test_there_are_cases(request: pytest.FixtureRequest) -> None:
    from .conftest import find_cases, folders

    searched = folders(request.config)
    assert find_cases(searched), f"no case (*.json + *.safetensors) under {', '.join(map(str, searched))}"
