"""Hostile input ends in one line and an exit code: no traceback, no hang, no large amount of memory.

A few hundred cases in every test run, always the same ones. ``pytest -m fuzz`` runs at least 10,000 others; see
``fuzz_campaign``.
"""

from __future__ import annotations

import os
from pathlib import Path

import fuzz_campaign
import hypothesis
import pytest
from fuzz_cases import KINDS
from fuzz_material import Material, make_material
from fuzz_run import run_case
from fuzz_values import Case

CASES = {"presets": 150, "models": 6, "headers": 40, "commands": 16, "videos": 30}
"""Cases of each kind in every test run."""


@pytest.fixture(scope="module")
def material() -> Material:
    return make_material()


@pytest.mark.parametrize("kind", KINDS)
def test_hostile_input_ends_in_one_line(kind: str, material: Material, tmp_path: Path) -> None:
    @hypothesis.settings(
        max_examples=CASES[kind],
        phases=[hypothesis.Phase.generate],  # without minutes of shrinking
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(KINDS[kind](material))
    def each(case: Case) -> None:
        outcome = run_case(case, tmp_path / "case")
        assert outcome.problem is None, f"{case.arguments}: {outcome.problem}\n{outcome.stderr}\n{outcome.trace}"

    each()


@pytest.mark.fuzz
def test_many_cases(capsys: pytest.CaptureFixture[str]) -> None:
    """Continues an interrupted run in ``runs/fuzz``, and prints the counts."""
    cases = int(os.environ.get("FUZZ_CASES", "10000"))
    with capsys.disabled():
        print()
        findings = fuzz_campaign.run(cases, fuzz_campaign.ROOT / "runs" / "fuzz", list(KINDS))
    assert findings == 0
