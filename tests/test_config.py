"""Settings: what does not fit is one line with the option, its value and the nearest right name."""

from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import model_validator

from unmask.config import Config, Field, field_names, merged, override, parse_word, validated, words
from unmask.errors import MissingExtra, UserError, nearest


class Inner(Config):
    depth: int = Field(2, ge=1)
    kind: Literal["plain", "fancy"] = "plain"


class Outer(Config):
    mask_ratio: float = Field(0.75, gt=0, lt=1)
    decoder: Inner = Inner()
    maybe: Inner | None = None

    @model_validator(mode="after")
    def _fits(self):
        if self.decoder.depth == 13:
            raise ValueError("thirteen blocks bring no luck: use 12")
        return self


def line(values) -> str:
    with pytest.raises(UserError) as error:
        validated(Outer, values, where="mae")
    assert "\n" not in str(error.value)
    return str(error.value)


def test_an_unknown_option_names_the_nearest():
    assert line({"mask_ration": 0.5}) == 'no option "mask_ration" in mae: did you mean mask_ratio?'
    assert line({"decoder": {"dept": 3}}) == 'no option "decoder.dept" in mae: did you mean depth?'
    assert "it takes one of decoder, mask_ratio, maybe" in line({"zzz": 1})


def test_a_wrong_value_is_shown_with_what_is_taken():
    assert line({"mask_ratio": 1.5}) == "mae: mask_ratio=1.5 does not fit: input should be less than 1"
    assert line({"decoder": {"depth": "many"}}).startswith(
        "mae: decoder.depth='many' does not fit: input should be a valid integer"
    )
    assert "'plain' or 'fancy'" in line({"decoder": {"kind": "plane"}})


def test_a_law_between_options_is_told_in_its_own_words():
    assert line({"decoder": {"depth": 13}}) == "mae: thirteen blocks bring no luck: use 12"


def test_assignments_and_defaults_are_validated():
    config = validated(Outer, {"decoder": {"depth": 4}}, where="mae")
    assert config.plain() == {"mask_ratio": 0.75, "decoder": {"depth": 4, "kind": "plain"}, "maybe": None}
    with pytest.raises(ValueError, match="less than 1"):
        config.mask_ratio = 2


def test_field_names_are_dotted():
    assert field_names(Outer) == [
        "mask_ratio",
        "decoder",
        "decoder.depth",
        "decoder.kind",
        "maybe",
        "maybe.depth",
        "maybe.kind",
    ]


@pytest.mark.parametrize(
    ("word", "key", "value"),
    [
        ("mask_ratio=0.6", "mask_ratio", 0.6),
        ("train.lr=1e-3", "train.lr", 1e-3),
        ("decoder.depth=4", "decoder.depth", 4),
        ("data.crop_scale=[0.5,1]", "data.crop_scale", [0.5, 1]),
        ("norm=true", "norm", True),
        ("data.uri=sample:fashion", "data.uri", "sample:fashion"),
        ("weights=", "weights", ""),
        ("x=none", "x", "none"),
        ("x=null", "x", None),
        ("note=a=b", "note", "a=b"),
    ],
)
def test_words_become_values(word, key, value):
    assert parse_word(word) == (key, value)


@pytest.mark.parametrize("word", ["mask_ratio", "=3", "--lr"])
def test_a_word_without_a_value_is_one_line(word):
    with pytest.raises(UserError, match="write key=value"):
        parse_word(word)


def test_overrides_reach_into_nested_mappings_and_names():
    values = {"backbone": "vit_small", "train": {"lr": 1}}
    assert override(values, "backbone.depth", 4) == {"backbone": {"name": "vit_small", "depth": 4}, "train": {"lr": 1}}
    assert override({}, "a.b.c", 1) == {"a": {"b": {"c": 1}}}
    assert values == {"backbone": "vit_small", "train": {"lr": 1}}
    assert words(["a.b=1", "a.c=2", "d=x"]) == {"a": {"b": 1, "c": 2}, "d": "x"}


NESTED = st.recursive(
    st.integers(), lambda inner: st.dictionaries(st.sampled_from("abc"), inner, max_size=3), max_leaves=8
)
MAPPINGS = st.dictionaries(st.sampled_from("abc"), NESTED, max_size=3)


@given(MAPPINGS)
def test_merging_with_nothing_and_with_itself_changes_nothing(values):
    assert merged(values, None, {}) == values == merged(values, values) == merged({}, values)


def test_later_layers_win_and_lists_replace():
    assert merged({"a": {"b": 1, "c": [1, 2]}}, {"a": {"c": [3]}}, {"d": 4}) == {"a": {"b": 1, "c": [3]}, "d": 4}
    assert merged({"backbone": "vit"}, {"backbone": {"depth": 3}}) == {"backbone": {"name": "vit", "depth": 3}}


def test_errors_are_one_line_and_hints_are_short():
    assert str(UserError("a\n  b")) == "a b"
    assert (
        str(MissingExtra("export", "onnx", "export")) == "export needs the package onnx: pip install 'unmask[export]'"
    )
    assert nearest("resnt", ["resnet", "vit"]) == "did you mean resnet?"
    assert "(100 in all)" in nearest("???", [f"name{i}" for i in range(100)])
    assert nearest("x", []) == "nothing is known by any name here"
