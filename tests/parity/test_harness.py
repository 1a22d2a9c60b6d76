"""The harness can fail: a golden test that lets a wrong number through proves nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from .conftest import parameter, pending
from .harness import Case, Mismatch, adapter, check, differences, find_cases, is_mask, read_case

SIZE = 1e-4  # gradients this small lie below the absolute tolerance: only the relative rule sees them


def linear(config: dict[str, Any], tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], None, dict[str, Tensor]]:
    """A complete little system: y = x w, hidden where the noise is large, loss of small gradients."""
    assert not any(k.startswith(("out.", "grad.")) for k in tensors), "an adapter must not see the answers"
    weight = tensors["param.weight"].requires_grad_()
    y = tensors["in.x"] @ weight
    mask = (tensors["draw.noise"] > config["ratio"]).float()
    (gradient,) = torch.autograd.grad((y * mask).mean() * SIZE, [weight])
    return {"y": y.detach(), "mask": mask, "ids": mask.argsort(dim=1, stable=True)}, None, {"weight": gradient}


@pytest.fixture
def case(tmp_path: Path) -> Case:
    random = torch.Generator().manual_seed(0)
    tensors = {
        "param.weight": torch.randn(4, 6, generator=random),
        "in.x": torch.randn(5, 4, generator=random),
        "draw.noise": torch.rand(5, 6, generator=random),
    }
    config = {"ratio": 0.5}
    outputs, _, gradients = linear(config, {k: v.clone() for k, v in tensors.items()})
    tensors |= {f"out.{k}": v for k, v in outputs.items()} | {f"grad.{k}": v for k, v in gradients.items()}
    folder = tmp_path / "golden" / "linear"
    folder.mkdir(parents=True)
    save_file({k: v.detach().contiguous() for k, v in tensors.items()}, folder / "small.safetensors")
    facts = {"system": "linear", "case": "small", "config": config, "tolerance": {"atol": 1e-5, "rtol": 1e-4}}
    (folder / "small.json").write_text(json.dumps(facts))
    return read_case(folder / "small.json")


def changed(name: str, how: Any) -> Any:
    """The system with one answer replaced by ``how(answer)``, or left out where that is None."""

    def run_case(config: dict[str, Any], tensors: dict[str, Tensor]) -> Any:
        outputs, _, gradients = linear(config, tensors)
        answers = outputs if name in outputs else gradients
        value = how(answers.pop(name))
        if value is not None:
            answers[name] = value
        return outputs, None, gradients

    return run_case


def test_the_same_numbers_pass_and_each_is_compared(case: Case) -> None:
    assert check(case, linear) == 4


@pytest.mark.parametrize(
    ("name", "how", "said"),
    [
        ("y", lambda v: v + 1e-3, r"out\.y: differs by up to 0\.001"),
        ("y", lambda v: None, r"out\.y: missing"),
        ("y", lambda v: v.half().float().masked_fill(v == v.max(), float("nan")), r"out\.y: 1 values are not finite"),
        ("y", lambda v: v[:, :3], r"out\.y: shape \(5, 3\), theirs \(5, 6\)"),
        ("weight", lambda v: v * 1.01, r"grad\.weight: differs by 0\.0"),
        ("weight", lambda v: None, r"grad\.weight: missing"),
        ("mask", lambda v: v + 1e-6, r"out\.mask: 30 of 30 values differ"),
        ("mask", lambda v: 1 - v, r"out\.mask: 30 of 30 values differ"),
        ("ids", lambda v: v.flip(1), r"out\.ids: \d+ of 30 values differ"),
    ],
)
def test_a_wrong_or_missing_number_fails_and_is_named(case: Case, name: str, how: Any, said: str) -> None:
    with pytest.raises(Mismatch, match=said):
        check(case, changed(name, how))


def test_masks_and_ids_may_have_any_dtype(case: Case) -> None:
    assert check(case, changed("mask", lambda v: v.bool())) == 4
    assert check(case, changed("ids", lambda v: v.to(torch.int32))) == 4


def test_a_mask_is_zeros_and_ones_and_a_loss_of_one_is_none() -> None:
    assert is_mask(torch.tensor([0.0, 1.0]))
    assert is_mask(torch.tensor([True, True]))
    assert not is_mask(torch.tensor(1.0))
    assert not is_mask(torch.zeros(4))  # a bias that stayed zero may be 1e-9 in ours


def test_infinities_must_stand_at_the_same_places() -> None:
    theirs = torch.tensor([1.5, float("-inf")])
    assert differences(theirs.clone(), theirs, 1e-5, 1e-4) == []
    assert differences(torch.tensor([1.5, float("inf")]), theirs, 1e-5, 1e-4)
    assert differences(torch.tensor([1.5, -1e30]), theirs, 1e-5, 1e-4)


def test_a_tensor_below_every_size_is_compared_absolutely_only() -> None:
    theirs = torch.full((3,), 1e-9)
    assert differences(torch.zeros(3), theirs, 1e-5, 1e-4) == []
    assert differences(torch.full((3,), 1e-3), theirs, 1e-5, 1e-4)


def test_a_case_whose_system_does_not_exist_is_pending(case: Case) -> None:
    counts = pending([case])
    assert counts == {"linear": 1}
    (mark,) = parameter("linear", 1).marks  # type: ignore[attr-defined]
    assert mark.name == "skip"
    assert mark.kwargs["reason"] == "pending: system linear does not exist yet (1 cases)"


@pytest.mark.parametrize("gone", [".safetensors", ".json"])
def test_a_broken_pair_fails_with_one_line(case: Case, gone: str) -> None:
    case.path.with_suffix(gone).unlink()
    (broken,) = find_cases([case.path.parents[1]])
    assert not pending([broken])
    with pytest.raises(Mismatch, match=r"^broken pair: .*small") as caught:
        check(broken, linear)
    assert "\n" not in str(caught.value)


def test_a_truncated_tensor_file_fails_with_one_line(case: Case) -> None:
    weights = case.path.with_suffix(".safetensors")
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(Mismatch, match=r"^broken pair: .* cannot be read"):
        check(case, linear)


def test_a_system_without_an_adapter_fails(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    from unmask import catalog

    card = catalog.Card(slug="linear", title="Linear", folder=str(case.path.parent))
    monkeypatch.setattr(catalog, "cards", lambda: {"linear": card})
    with pytest.raises(Mismatch, match="linear has no adapter"):
        adapter(case)
    assert not pending([case])


def test_the_committed_cases_stay_small_and_say_where_they_come_from() -> None:
    folder = Path(__file__).parent / "cases"
    sizes: dict[str, int] = {}
    for committed in find_cases([folder]):
        pair = (committed.path, committed.path.with_suffix(".safetensors"))
        sizes[committed.system] = sizes.get(committed.system, 0) + sum(p.stat().st_size for p in pair)
        assert json.loads(committed.path.read_text())["source"]
    assert {"mae", "simmim", "colormae", "swin"} <= set(sizes)
    assert max(sizes.values()) <= 400_000, sizes
