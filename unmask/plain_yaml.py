"""YAML as people write options in it: only ``true`` and ``false`` are booleans, and ``1e-3`` is a number.

YAML 1.1, which PyYAML reads, also takes ``on``, ``off``, ``yes`` and ``no`` for booleans, ``1e-3`` for a word, ``2:4`` for 124 (to
the base 60), ``010`` for 8 and ``2024-11-25`` for a date; all are traps in recipes and on command lines (``train.compile=off``,
``pattern=2:4``, ``init=2024-11-25``).
"""

from __future__ import annotations

import re
from typing import Any

import yaml


class _Loader(yaml.SafeLoader):
    """The safe loader with the resolvers of YAML 1.2's core schema for booleans and numbers, and none for dates."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith((":bool", ":int", ":float", ":timestamp"))]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:int",
    re.compile(r"^[-+]?(?:0|[1-9][0-9_]*|0b[01_]+|0x[0-9a-fA-F_]+)$"),
    list("-+0123456789"),
)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"^(?:[-+]?(?:\.[0-9]+|[0-9]+\.[0-9]*)(?:[eE][-+]?[0-9]+)?|[-+]?[0-9]+[eE][-+]?[0-9]+"
        r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
    ),
    list("-+0123456789."),
)


def read_yaml(text: str) -> Any:
    """The value of one document. Raises ``yaml.YAMLError``."""
    return yaml.load(text, _Loader)
