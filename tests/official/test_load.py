"""Reading anyone's checkpoint: what is taken, what is refused, and that a refusal is one line."""

import argparse
import os
import pickle
import struct

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from unmask.errors import UserError
from unmask.official.load import Rule, load_strict, read_checkpoint, rename, without_prefix

WEIGHTS = {"a.weight": torch.arange(6.0).reshape(2, 3), "a.bias": torch.ones(2)}


class RunsCode:
    def __reduce__(self):
        return (print, ("this ran",))


class CfgNode(dict):
    """Stands for yacs.config.CfgNode, which the checkpoints of Swin and SimMIM carry."""


CfgNode.__module__, CfgNode.__qualname__ = "yacs.config", "CfgNode"


def one_line(error) -> str:
    text = str(error.value)
    assert "\n" not in text
    return text


@pytest.mark.parametrize("wrapper", ["model", "state_dict", "module", "teacher", None])
def test_a_torch_file_is_unwrapped_whatever_its_wrapper(tmp_path, wrapper):
    path = tmp_path / "w.pth"
    torch.save({wrapper: WEIGHTS, "epoch": 3} if wrapper else WEIGHTS, path)
    read = read_checkpoint(path)
    assert read.keys() == WEIGHTS.keys()
    assert torch.equal(read["a.weight"], WEIGHTS["a.weight"])


def test_nested_wrappers_and_ddp_prefixes_come_off(tmp_path):
    torch.save({"model": {"state_dict": {f"module.{k}": v for k, v in WEIGHTS.items()}}}, tmp_path / "w.pth")
    assert read_checkpoint(tmp_path / "w.pth").keys() == WEIGHTS.keys()


def test_the_preferred_wrapper_wins(tmp_path):
    other = {k: v + 1 for k, v in WEIGHTS.items()}
    torch.save({"model": WEIGHTS, "model_ema": other}, tmp_path / "w.pth")
    assert torch.equal(read_checkpoint(tmp_path / "w.pth", prefer=["model_ema"])["a.bias"], other["a.bias"])


def test_options_beside_the_weights_do_not_hinder(tmp_path, monkeypatch):
    import sys
    import types

    module = types.ModuleType("yacs.config")
    module.CfgNode = CfgNode
    monkeypatch.setitem(sys.modules, "yacs", types.ModuleType("yacs"))
    monkeypatch.setitem(sys.modules, "yacs.config", module)
    config = CfgNode(lr=0.1)
    config["deeper"] = CfgNode(x=1)
    import numpy as np

    torch.save(
        {
            "model": WEIGHTS,
            "args": argparse.Namespace(lr=1),
            "config": config,
            "best": np.float64(3.0),
            "log": np.ones(3),
        },
        tmp_path / "w.pth",
    )
    assert read_checkpoint(tmp_path / "w.pth").keys() == WEIGHTS.keys()


@pytest.mark.parametrize("wrapped", [True, False])
def test_a_pickle_that_wants_to_run_code_is_refused(tmp_path, capsys, wrapped):
    path = tmp_path / "evil.pth"
    if wrapped:
        torch.save({"model": WEIGHTS, "x": RunsCode()}, path)
    else:
        path.write_bytes(pickle.dumps({"model": RunsCode()}, protocol=2))
    with pytest.raises(UserError) as error:
        read_checkpoint(path)
    assert "wants to run code" in one_line(error)
    assert "this ran" not in capsys.readouterr().out


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9, 0.999])
@pytest.mark.parametrize("name", ["w.pth", "w.safetensors"])
def test_a_truncated_file_is_named_in_one_line(tmp_path, name, share):
    path = tmp_path / name
    big = {"a": torch.randn(200, 100)}
    torch.save({"model": big}, path) if name.endswith("pth") else save_file(big, path)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    with pytest.raises(UserError) as error:
        read_checkpoint(path)
    assert str(path) in one_line(error)
    assert any(word in str(error.value) for word in ("truncated", "corrupted"))


def _rewritten(path, header: bytes, length=None, tail=b""):
    path.write_bytes(struct.pack("<Q", len(header) if length is None else length) + header + tail)


@pytest.mark.parametrize(
    ("header", "length", "tail"),
    [
        (b"not json", None, b""),
        (b"[]", None, b""),
        (b'{"a": 3}', None, b""),
        (b"{}", 2**60, b""),
        (b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}', None, b"1234"),
        (b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}', None, b"123456789"),
        (b'{"a":{"dtype":"F32","shape":[3],"data_offsets":[0,8]}}', None, b"12345678"),
        (b'{"a":{"dtype":"F99","shape":[2],"data_offsets":[0,8]}}', None, b"12345678"),
        (b'{"a":{"dtype":"F32","shape":[2],"data_offsets":["0","8"]}}', None, b"12345678"),
        (b"\xff\xfe{}", None, b""),
    ],
)
def test_a_safetensors_header_that_lies_is_refused_in_one_line(tmp_path, header, length, tail):
    path = tmp_path / "w.safetensors"
    _rewritten(path, header, length, tail)
    with pytest.raises(UserError) as error:
        read_checkpoint(path)
    assert str(path) in one_line(error)


@pytest.mark.parametrize("content", [{}, {"epoch": 3}, [1, 2], "words"])
def test_a_file_without_weights_says_so(tmp_path, content):
    torch.save(content, tmp_path / "w.pth")
    with pytest.raises(UserError, match="holds no weights"):
        read_checkpoint(tmp_path / "w.pth")


def test_a_missing_file_and_an_ambiguous_folder_say_what_to_give(tmp_path):
    with pytest.raises(UserError, match="no checkpoint"):
        read_checkpoint(tmp_path / "none.pth")
    with pytest.raises(UserError, match="no checkpoint files"):
        read_checkpoint(tmp_path)
    save_file(WEIGHTS, tmp_path / "a.safetensors")
    assert read_checkpoint(tmp_path).keys() == WEIGHTS.keys()
    save_file(WEIGHTS, tmp_path / "b.safetensors")
    with pytest.raises(UserError, match="2 checkpoint files"):
        read_checkpoint(tmp_path)


def test_rules_apply_in_order_each_on_the_name_the_last_one_made():
    rules = [
        Rule(r"^backbone\."),
        Rule(r"^layers\.(\d+)\.ln1\.", r"blocks.\1.norm1."),
        Rule(r"^head\.", None),
        Rule(r"norm1\.weight$", "norm1.weight", lambda t: t * 2),
    ]
    out = rename(
        {"backbone.layers.3.ln1.weight": torch.ones(2), "head.bias": torch.ones(1), "kept": torch.zeros(1)}, rules
    )
    assert out.keys() == {"blocks.3.norm1.weight", "kept"}
    assert torch.equal(out["blocks.3.norm1.weight"], torch.full((2,), 2.0))


def test_two_keys_under_one_name_are_an_error():
    with pytest.raises(UserError, match="both become"):
        rename({"x.a": torch.ones(1), "y.a": torch.ones(1)}, [Rule(r"^[xy]\.")])


def test_a_prefix_selects_its_part():
    assert without_prefix({"e.a": torch.ones(1), "d.a": torch.ones(1)}, "e.").keys() == {"a"}


def test_strict_loading_names_missing_left_over_and_shapes_and_changes_nothing():
    module = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2))
    before = {k: v.clone() for k, v in module.state_dict().items()}
    state = {
        "0.weight": torch.zeros(2, 4),
        "0.bias": torch.zeros(2),
        "1.weight": torch.zeros(2, 2),
        "extra": torch.ones(1),
    }
    with pytest.raises(UserError) as error:
        load_strict(module, state, where="w.pth")
    text = one_line(error)
    for part in ("w.pth", "missing 1.bias", "left over extra", "0.weight is [2, 4] where [2, 3] is needed"):
        assert part in text
    assert all(torch.equal(v, before[k]) for k, v in module.state_dict().items())


def test_ignored_names_may_be_missing_or_left_over():
    module = nn.Linear(3, 2)
    load_strict(module, {"weight": torch.zeros(2, 3), "old.index": torch.ones(1)}, ignore=["index$", "^bias$"])
    assert module.weight.eq(0).all()


@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
def test_a_bare_pickle_of_any_protocol_is_refused_by_the_name_of_what_it_would_call(tmp_path, protocol, recwarn):
    class Runs:
        def __reduce__(self):
            return os.system, ("touch hacked",)

    file = tmp_path / "evil.pth"
    file.write_bytes(pickle.dumps(Runs(), protocol=protocol))
    with pytest.raises(UserError, match=r"wants to run code \(posix\.system\)"):
        read_checkpoint(file)
    assert not recwarn.list
