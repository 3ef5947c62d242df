"""proto/ is the wire's documentation: everything in it says what it means. Holds where buf is not installed, too."""

from __future__ import annotations

import re
from itertools import pairwise

import pytest

from baton.v1 import common_pb2, node_pb2, router_pb2, transfer_pb2
from tests.support.root import ROOT

PROTO = ROOT / "proto/baton/v1"
_ELEMENT = re.compile(
    r"\s*((message|enum|service|oneof|rpc) \w+|(repeated |optional )?[\w.]+(<.*>)? \w+ = \d+;|[A-Z_]+ = \d+;)"
)


def undocumented(text: str) -> list[str]:
    lines = text.splitlines()
    return [
        line.strip() for before, line in pairwise(lines) if _ELEMENT.match(line) and not re.match(r"\s*// ?\S", before)
    ]


@pytest.mark.parametrize("name", [path.name for path in sorted(PROTO.glob("*.proto"))])
def test_everything_has_a_comment(name: str) -> None:
    assert undocumented((PROTO / name).read_text()) == []


def test_other_languages_get_a_package_from_the_files_themselves() -> None:
    for module in (common_pb2, node_pb2, router_pb2, transfer_pb2):
        options = module.DESCRIPTOR.GetOptions()
        assert options.go_package == "baton/v1;batonv1"
        assert (options.java_package, options.java_multiple_files) == ("baton.v1", True)


def test_what_has_no_comment_is_found() -> None:
    bare = "message A {\n  oneof x {\n    B b = 1;\n  }\n  repeated .c.D d = 2;\n  map<string, E> e = 3;\n}\n"
    bare += "enum F {\n  G_H = 0;\n}\nservice I {\n  rpc J(K) returns (L);\n}\n"
    assert undocumented(f"// File.\n\n{bare}") == [
        "message A {", "oneof x {", "B b = 1;", "repeated .c.D d = 2;", "map<string, E> e = 3;", "enum F {", "G_H = 0;",
        "service I {", "rpc J(K) returns (L);",
    ]  # fmt: skip
