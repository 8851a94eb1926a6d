"""What the cases are made of: values of all kinds, damage to a file, and the case itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from hypothesis import strategies as st
from hypothesis.strategies import DrawFn


@dataclass(frozen=True)
class Case:
    """A command line, and the files in the folder that it runs in."""

    arguments: tuple[str, ...]
    files: Mapping[str, bytes]


NUMBERS = st.sampled_from(
    [0, 1, 2, 3, 4, 5, 7, 8, 9, 12, 13, 16, 48, 64, 100, 1000, 2**15, 10**8, 2**31, 2**63 - 1, 2**63, 10**30]
)
SMALL = st.sampled_from([0, 1, 1, 2, 2, 3, 4, 5, 6, 8, 9, 12, 16])
HUGE = [10**5, 10**7, 10**8, 2**31, 10**12, 2**63 - 1, 2**64, 10**400]
TEXTS = st.one_of(
    st.sampled_from(
        ["", " ", "-", "--", "-1", "0", "x", "none", "null", "true", "auto", "cached", "é", "\x1b[31m", "a\nb"]
    ),
    st.text(max_size=12),
)
SCALARS = st.one_of(
    NUMBERS,
    NUMBERS.map(lambda number: -number),
    st.floats(),
    st.booleans(),
    st.none(),
    TEXTS,
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=6,
)
YAML_VALUES = st.one_of(
    SCALARS.map(str),
    st.sampled_from(
        [
            *("", "~", "[]", "{}", "[1, [2]]", "{a: 1}", "!!int x", '!!int ""', "!!bool maybe", "!!float z"),
            *("!!null x", "!!binary x", "!!set {a}", "!!timestamp 1", "!!omap [a]", "!x y", "&a [*a]", "*a", "&a 1"),
            *("1e400", ".inf", ".nan", "-.inf", "0x10", "0o17", "1_000", "1:30", "2024-01-01", "yes", "1e", "+1"),
            *("9" * 5000, "[" * 200, "{a: " * 50, "'", '"', "|", ">", "|\n  a", "? a", "- 1", "a: b: c", "%TAG ! x"),
        ]
    ),
    st.text(max_size=20),
)


def damage(draw: DrawFn, content: bytes) -> bytes:
    """Change bytes, cut a piece off or out, repeat one, or insert one; several times."""
    changed = bytearray(content)
    for _ in range(draw(st.integers(1, 4))):
        size = len(changed)
        where, length = draw(st.integers(0, max(0, size - 1))), draw(st.integers(1, 64))
        how = draw(st.sampled_from(["byte", "cut", "remove", "repeat", "insert", "zero"]))
        piece = changed[where : where + length]
        if how == "byte":
            changed[where : where + 1] = bytes([draw(st.integers(0, 255))])
        elif how == "cut":
            del changed[where:]
        elif how == "remove":
            del changed[where : where + length]
        elif how == "repeat":
            changed[where:where] = piece * draw(st.integers(1, 3))
        elif how == "insert":
            changed[where:where] = draw(st.binary(min_size=1, max_size=16))
        else:
            changed[where : where + length] = bytes(len(piece))
    return bytes(changed)
