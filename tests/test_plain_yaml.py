import pytest

from unmask.config import parse_word
from unmask.plain_yaml import read_yaml


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("on", "on"),
        ("off", "off"),
        ("no", "no"),
        ("true", True),
        ("False", False),
        ("1e-3", 1e-3),
        ("-2.5E+2", -250.0),
        ("1.5e-4", 1.5e-4),
        (".5", 0.5),
        ("12", 12),
        ("1.0", 1.0),
        ("null", None),
        ("[0.2, 1]", [0.2, 1]),
        ("vit_small_patch16", "vit_small_patch16"),
        ("1e", "1e"),
        ("2:4", "2:4"),  # a pattern of weights, not 124 to the base 60
        ("010", "010"),
        ("2024-11-25", "2024-11-25"),  # a folder, not a date
        ("-7", -7),
        ("1_000", 1000),
        ("0x10", 16),
    ],
)
def test_a_value_is_read_as_a_person_means_it(text, value):
    found = read_yaml(text)
    assert found == value
    assert type(found) is type(value)
    assert parse_word(f"a.b={text}") == ("a.b", value)


def test_no_tag_makes_an_object():
    with pytest.raises(Exception, match="could not determine a constructor"):
        read_yaml("!!python/object/apply:os.system [echo]")
