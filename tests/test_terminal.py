"""What the terminal shows: times, and text that could change the terminal's state."""

from __future__ import annotations

import pytest

from ca2vdm_cli.errors import UserError
from ca2vdm_cli.terminal import duration, note, print_error


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.0123, "12.3 ms"),
        (3.414, "3.41 s"),
        (125, "2 min 5 s"),
        (7199, "119 min 59 s"),
        (7200, "2 h 0 min"),
        (15_060, "4 h 11 min"),
        (172_799, "47 h 59 min"),
        (417_660, "4 d 20 h"),  # 6961 minutes
    ],
)
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_control_characters_are_escaped(capsys: pytest.CaptureFixture[str]) -> None:
    """A file's name may have any."""
    print_error(UserError("a\x1b[2Jb\x07\x9e.mp4: \ud800 ist größer als 9×9"))
    note("→ c\x1b]0;title\x07.mp4\nnext")
    assert capsys.readouterr().err == (
        "error: a\\x1b[2Jb\\x07\\x9e.mp4: \\ud800 ist größer als 9×9\n→ c\\x1b]0;title\\x07.mp4\\nnext\n"
    )
